"""The tensors of a part: read, checked, loaded, fingerprinted; initial weights."""

import hashlib
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from plumbing.console import InputError
from plumbing.files import read_json, start_of

DTYPES = ("float32", "bfloat16", "float16")


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file -> its tensors, memory-mapped, and metadata. Raises InputError if unreadable."""
    start_of(path, "weight file")
    try:
        with safe_open(path, framework="pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}
    except (SafetensorError, OSError) as e:
        raise InputError(
            f"{path}: not a complete safetensors file ({e}); fetch or convert it again"
        ) from e


def check_fit(
    path: str, part: str, shapes: dict[str, tuple], expected: dict[str, tuple]
):
    """Raise InputError unless a file's {name: shape} is exactly what the part expects."""
    problems = {
        "missing": sorted(expected.keys() - shapes.keys()),
        "unexpected": sorted(shapes.keys() - expected.keys()),
        "of another shape": [
            f"{k} {shapes[k]} instead of {shape}"
            for k, shape in expected.items()
            if shapes.get(k, shape) != shape
        ],
    }
    found = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
        for what, names in problems.items()
        if names
    ]
    if found:
        raise InputError(
            f"{path}: does not fit as {part}: {'; '.join(found)}; it is for another model"
        )


def finite(tensor: Tensor, where: str) -> Tensor:
    """The tensor. Raises InputError unless it holds finite floats; of a large one, some are looked at."""
    some = tensor.flatten()[
        :: 1 if tensor.numel() < 2**22 else 2048
    ]  # of each page of a mapped file
    if not tensor.is_floating_point() or not some.float().sum().isfinite():
        raise InputError(f"{where} holds NaN or infinity, or no floats; get it again")
    return tensor


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """12 hex digits that identify a part's weights, also cast ones: of names, shapes and some values."""
    digest = hashlib.sha256()
    for k in sorted(tensors):
        values = tensors[k].detach().reshape(-1)
        ends = (
            torch.cat((values[:16], values[-16:]))
            .to("cpu", torch.bfloat16)
            .view(torch.uint8)
        )
        digest.update(
            f"{k} {tuple(tensors[k].shape)}".encode() + ends.numpy().tobytes()
        )
    return digest.hexdigest()[:12]


def check_sizes(sizes, where: str):
    """The dataclass `sizes`. Raises InputError for one that is NaN, not above 0, or absurdly large."""
    for name, value in asdict(sizes).items():
        if type(value) in (int, float) and not 0 < value < (
            1000 if "layers" in name else 1e9
        ):
            raise InputError(
                f"{where}: {name} {value} is no size; it has to be above 0, and not huge"
            )
    return sizes


@torch.no_grad()
def init_weights(
    module: nn.Module,
    stds: dict[str, float],
    residual: tuple[str, ...] = (),
    depth: int = 1,
):
    """Random weights of a transformer: normal with variance 1 / inputs, or the standard deviation in `stds`;
    smaller for the outputs to the residual stream, those with a `residual` ending; norms one, biases zero."""
    for name, p in module.named_parameters():
        if p.dim() == 1:
            p.fill_(name.endswith("weight"))  # only norms have such weights
        else:
            n_inputs = p[0].numel() * (2 * depth if name.endswith(residual) else 1)
            nn.init.normal_(p, std=stds.get(name, n_inputs**-0.5))


def read_weight_map(index: Path) -> dict[str, str]:
    """{tensor: file name} of a Hugging Face *.index.json."""
    weight_map = read_json(index).get("weight_map")
    is_map = isinstance(weight_map, dict) and weight_map
    if not is_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index}: it has no weight_map; fetch it again")
    return weight_map


def indexed_files(index: Path) -> list[Path]:
    """The weight files that a Hugging Face *.index.json names."""
    names = sorted(set(read_weight_map(index).values()))
    files = [index.parent / name for name in names]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise InputError(
            f"{missing[0]}: no such weight file, but {index.name} names it; "
            "fetch it too"
        )
    return files
