"""Weight files: the tensors of parts are read, checked, loaded and saved."""

import hashlib
import json
import os
import re
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from plumbing.console import InputError, note, progress
from plumbing.files import read_json, replacing, start_of
from plumbing.options import override
from plumbing.quantized import QUANTIZED, quantize_linears, shapes_of

PARTS = ("vision", "qformer", "proj", "llama")
DTYPES = ("float32", "bfloat16", "float16")
MAX_SIZE = 1e9  # of a number in a model's sizes; more would exhaust the memory
MAX_LAYERS = 1000

Tensors = dict[str, Tensor]  # by their names in a file
Marks = dict[str, str]  # fingerprints of parts, by their names
# What get_weights.py calls models with these files; others have their folder's name
RECIPES_BY_NAME = {
    "eva_vit_g.safetensors": "vicuna-7b",
    "qformer.safetensors": "vicuna-7b",
    "llama-2-7b-chat": "llama2-7b",
}


class Part(NamedTuple):
    """Modules whose tensors share a file, by the prefix of their names there."""

    modules: dict[str, nn.Module]
    optional: tuple[str, ...] = ()  # how names begin that the file may hold or lack

    def tensors(self) -> Tensors:
        """Parameters and buffers under their names in the file."""
        tensors = {}
        for prefix, module in self.modules.items():
            module.state_dict(destination=tensors, prefix=prefix, keep_vars=True)
        return tensors


class PartFile(NamedTuple):
    """A part's file as it was read; of a new part, the sizes alone."""

    path: str
    tensors: Tensors | None
    sizes: object  # a LlamaConfig, a dict of sizes, or the companions of a projection
    kind: str = ""  # of module, such as "eva_vit"; unknown in older files


Files = dict[str, PartFile]  # by the names of the parts
Sources = dict[str, str | dict | None]  # their paths, or the sizes of new parts


def load_tensors(path: str | Path) -> tuple[Tensors, dict[str, str]]:
    """Memory-map a safetensors file; returns its tensors and its metadata.

    Raises InputError for a file that cannot be read.
    """
    start_of(path, "weight file")
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as e:
        raise InputError(
            f"{path}: not a complete safetensors file ({e}); fetch or convert it again"
        ) from e


def save_tensors(path: str | Path, tensors: Tensors, dtype: str, metadata):
    """Write a safetensors file, floats as `dtype`; at the end it replaces an older."""
    cast = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensor = tensor.to(getattr(torch, dtype))
        cast[name] = tensor.detach().cpu().contiguous()
    with replacing(path) as temporary:
        save_file(cast, temporary, {"format": "pt"} | metadata)
        sort_metadata(temporary)


def sort_metadata(path: Path):
    """Sort the metadata of a safetensors file, so that equal files have equal bytes."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
        file.seek(8)
        file.write(text.encode().ljust(size))


def read_parts(sources: Sources, llama_config: type) -> Files:
    """The files of a model's parts; for a new part, just the sizes in `sources`.

    llama_config: the dataclass that reads LLaMA's config.json.
    """
    files = {}
    for name, source in sources.items():
        check_fetched(source)
        if isinstance(source, dict):
            files[name] = PartFile("the run's config", None, source)
        elif source and name == "llama":
            files[name] = read_hub_folder(source, llama_config)
        elif source:
            files[name] = read_part(name, source)
    return files


def check_fetched(source: str | dict | None):
    """Raise InputError for a missing path in weights/, which get_weights.py fills."""
    path = source if isinstance(source, str) else ""
    name = Path(path).name
    if "weights" not in Path(path).parent.parts or os.path.exists(path):
        return
    recipe = RECIPES_BY_NAME.get(name, name)
    if not recipe.endswith(".safetensors"):  # somebody's own
        raise InputError(
            f"{path}: there is no such weight file or folder; was "
            f"`python tools/get_weights.py {recipe}` run?"
        )


def read_part(name: str, path: str) -> PartFile:
    """The file of a part other than LLaMA. Raises InputError for something else."""
    tensors, metadata = load_tensors(path)
    try:
        if name == "proj":
            sizes = metadata.get("trained_with", "{}")
        else:
            sizes = metadata["config"]
        content = dict(json.loads(sizes))
    except (KeyError, ValueError, TypeError, RecursionError) as e:
        raise InputError(
            f"{path}: no metadata of a {name} file; "
            f"make it with tools/convert.py {name}"
        ) from e
    return PartFile(path, tensors, content, metadata.get("kind", ""))


def load_part(name: str, part: Part, file: PartFile, dtype: torch.dtype, device):
    """Give a part the tensors of its file: all of them, and no others."""
    expected = part.tensors()
    check_buffers(name, part)
    tensors = {k: t for k, t in expected.items() if k.startswith(part.optional)}
    for key, tensor in file.tensors.items():
        if key in expected or not key.startswith(part.optional):
            tensors[key] = tensor
    check_fit(file.path, name, shapes_of(tensors), shapes_of(expected))
    if name == "llama" and file.sizes.quantization:
        quantize_linears(
            part.modules[""],
            file.sizes.quantization,
            lambda: read_hub_tensors(file.path),
            lambda tensor, key: finite(tensor, f"{file.path}: {key}"),
            device,
            file.sizes.rotated,
        )
    for prefix, module in part.modules.items():
        state = {}
        initial = module.state_dict()
        for key in progress(initial, f"loading {name}", delay=1, leave=False):
            tensor = tensors[prefix + key]
            if initial[key].is_floating_point():
                tensor = finite(tensor, f"{file.path}: {prefix}{key}").to(dtype)
            state[key] = tensor.to(device)
        module.load_state_dict(state, assign=True)


def reset_part(part: Part):
    """Draw new random weights by the rules of the layers, then of the whole module."""
    for module in part.modules.values():
        for layer in reversed(list(module.modules())):
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()


def describe_part(name, parts: dict[str, Part], fingerprints: Marks) -> dict[str, str]:
    """The metadata of a part's file: its kind, and its sizes or its companions."""
    module = next(iter(parts[name].modules.values()))
    kind = getattr(module, "kind", type(module).__name__.lower())
    if hasattr(module, "config"):
        return {"kind": kind, "config": json.dumps(asdict(module.config))}
    companions = dict(fingerprints)
    companions.pop(name, None)
    for other in companions.keys() & parts.keys():
        tensors = parts[other].tensors()
        if any(tensor.requires_grad for tensor in tensors.values()):
            companions[other] = fingerprint(tensors)  # it has learned, too
    return {"kind": kind, "trained_with": json.dumps(companions)}


def build(module_class, config, is_from_file: bool):
    """A module; without memory for weights that will come from a file.

    New weights follow the module's own rule, if it has one. What PyTorch draws before
    is not used, and leaves the random numbers as they were.
    """
    if is_from_file:
        with torch.device("meta"):
            return module_class(config)
    with torch.random.fork_rng(devices=[]):
        module = module_class(config)
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()
    return module


@contextmanager
def uninitialized_as_nan():
    """Fill new memory with NaN: what a new part forgets to initialize then shows."""
    was = torch.are_deterministic_algorithms_enabled()
    # The public function imports the compiler, which takes a second.
    torch._C._set_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(was)


def check_buffers(name: str, part: Part):
    """Raise InputError for a buffer that the part's file would not hold."""
    for module in part.modules.values():
        buffers = dict(module.named_buffers())
        for key in buffers.keys() - module.state_dict().keys():
            raise InputError(
                f"{name}: no file holds the buffer {key}; "
                "register it with persistent=True, or compute it in forward"
            )


def check_initialized(name: str, part: Part):
    """Raise InputError for a new part with values that are NaN or infinite."""
    check_buffers(name, part)
    for key, tensor in part.tensors().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(
                f"{name}: {key} has no initial values, or infinite ones; "
                "set them in its constructor or in reset_parameters"
            )


def identify(parts: dict[str, Part], files: Files) -> Marks:
    """The fingerprints of all parts, as loaded."""
    marks = {}
    for name, part in parts.items():
        is_read = name in files and files[name].tensors is not None
        tensors = files[name].tensors if is_read else part.tensors()
        marks[name] = fingerprint(tensors)
    # That of the weights before they were converted to int8 or int4.
    original = getattr(files["llama"].sizes, "fingerprint", "")
    if original:
        marks["llama"] = original
    return marks


def check_fit(path: str | Path, part: str, shapes: dict, expected: dict):
    """Raise InputError unless a file's {name: shape} is what the part expects."""
    problems = {
        "missing": expected.keys() - shapes.keys(),
        "unexpected": shapes.keys() - expected.keys(),
        "of another shape": [
            f"{name} {shapes[name]} instead of {shape}"
            for name, shape in expected.items()
            if shapes.get(name, shape) != shape
        ],
    }
    found = []
    for problem, names in problems.items():
        if names:
            first = ", ".join(sorted(names)[:3])
            more = ", ..." if len(names) > 3 else ""
            found.append(f"{len(names)} {problem} ({first}{more})")
    if found:
        raise InputError(
            f"{path}: does not fit as {part}: {'; '.join(found)}; "
            "it is for another model"
        )


def finite(tensor, where) -> Tensor:
    """The tensor. Raises InputError unless it holds finite floats.

    Of a large tensor it checks one value in each page of the mapped file.
    """
    stride = 1 if tensor.numel() < 2**22 else 2048
    values = tensor.flatten()[::stride]
    if not tensor.is_floating_point() or not values.float().sum().isfinite():
        raise InputError(f"{where} holds NaN or infinity, or no floats; get it again")
    return tensor


def fingerprint(tensors: Tensors) -> str:
    """12 hex digits that identify a part's weights, whatever dtype they are cast to.

    They come from the names, the shapes and the first and last values as bfloat16.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        values = tensor.detach().reshape(-1)
        ends = torch.cat((values[:16], values[-16:])).to("cpu", torch.bfloat16)
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(ends.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def check_sizes(sizes, where: str):
    """The dataclass `sizes`. Raises InputError for NaN, 0 or less, and absurd sizes."""
    for name, value in asdict(sizes).items():
        limit = MAX_LAYERS if "layers" in name else MAX_SIZE
        if type(value) in (int, float) and not 0 < value < limit:
            raise InputError(
                f"{where}: {name} {value} is no size; "
                "it has to be above 0, and not huge"
            )
    return sizes


@torch.no_grad()
def init_weights(module: nn.Module, stds: dict, residual=(), depth=1):
    """Random weights of a transformer: matrices normal, biases zero.

    The variance of a matrix is 1 / inputs, unless `stds` gives its standard deviation.
    Outputs to the residual stream, names ending in `residual`, are smaller by the
    square root of twice the depth. Other parameters, such as those of norms, keep what
    the constructor gave them. On the meta device there is nothing to do.
    """
    for name, p in module.named_parameters():
        if p.is_meta:
            continue
        is_matrix = p.dim() > 1 and name.endswith("weight")
        if name in stds or is_matrix:
            n_inputs = p[0].numel()
            if name.endswith(residual):
                n_inputs *= 2 * depth
            nn.init.normal_(p, std=stds.get(name, n_inputs**-0.5))
        elif name.endswith("bias"):
            p.zero_()


def read_weight_map(index: Path) -> dict[str, str]:
    """{tensor: file name} of a Hugging Face *.index.json."""
    weight_map = read_json(index).get("weight_map")
    is_map = isinstance(weight_map, dict)
    if not is_map or set(map(type, weight_map.values())) != {str}:
        raise InputError(f"{index}: it has no weight_map; fetch it again")
    return weight_map


def indexed_files(index: Path) -> list[Path]:
    """The weight files that a Hugging Face *.index.json names."""
    names = sorted(set(read_weight_map(index).values()))
    files = [index.parent / name for name in names]
    for file in files:
        require_file(file, index.name)
    return files


def require_file(file, origin):
    """Raise InputError for a missing weight file that the file `origin` names."""
    if not file.is_file():
        raise InputError(
            f"{file}: no such weight file, but {origin} names it; fetch it too"
        )


def read_hub_folder(folder: str, llama_config: type) -> PartFile:
    """A language model's folder as the Hugging Face hub has it."""
    path = Path(folder, "config.json")
    if not path.is_file():
        raise InputError(
            f"{folder}: not a LLaMA folder, it has no config.json; see the README"
        )
    sizes = llama_config.from_dict(read_json(path), str(path))
    tensors = read_hub_tensors(folder)
    if sizes.tie_word_embeddings:
        check_tied(folder, tensors)
        tensors.pop("lm_head.weight", None)
    return PartFile(folder, tensors, sizes)


def read_hub_tensors(folder) -> Tensors:
    """The tensors of a Hugging Face folder, under their names without `model.`."""
    tensors = {}
    shards = hub_weight_files(Path(folder))
    if not shards:
        raise InputError(
            f"{folder}: no *.safetensors file; see the README on getting the weights"
        )
    for shard in shards:
        for hub_name, tensor in load_tensors(shard)[0].items():
            name = hub_name.removeprefix("model.")
            check_new(name, tensors, shard)
            if not name.endswith("rotary_emb.inv_freq"):  # these are computed
                tensors[name] = tensor
    return tensors


def check_tied(folder, tensors: Tensors):
    """Warn of an output matrix that is not used, but no copy of the embeddings."""
    if not {"lm_head.weight", "embed_tokens.weight"} <= tensors.keys():
        return
    embeddings = tensors["embed_tokens.weight"]
    if not torch.equal(tensors["lm_head.weight"].to(embeddings.dtype), embeddings):
        note(
            f"warning: {folder}: its lm_head.weight is not used, and it is no copy of "
            'the embeddings; if it is to be used, set "tie_word_embeddings": false in '
            "config.json"
        )


def check_new(name: str, known, file: Path):
    """Raise InputError for a tensor that another file of its folder has, too."""
    if name in known:
        raise InputError(
            f"{file}: another file of this folder also holds {name}; remove one of them"
        )


def hub_name(name: str) -> str:
    """Hugging Face's name of a tensor of ours."""
    return name if name.startswith("lm_head") else f"model.{name}"


def save_hub_folder(
    folder: str, tensors: Tensors, dtype: str, sizes: dict, tokenizer_files: dict
):
    """Write a language model's folder as the Hugging Face hub has it."""
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    config = json.dumps(sizes, indent=1).encode()
    for name, content in {"config.json": config, **tokenizer_files}.items():
        with replacing(root / name) as temporary:
            temporary.write_bytes(content)
    named = {hub_name(name): tensor for name, tensor in tensors.items()}
    save_tensors(root / "model.safetensors", named, dtype, {})


def hub_weight_files(
    folder: Path, whole: str = "model.safetensors", pattern: str = "[!.]*.safetensors"
) -> list[Path]:
    """The weight files of a Hugging Face folder, [] without any.

    They are those of the index, or the file with all weights, or those of the pattern.
    Raises InputError if one of several is missing.
    """
    index = folder / f"{whole}.index.json"
    if index.is_file():
        return indexed_files(index)
    if (folder / whole).is_file():
        return [folder / whole]
    files = sorted(folder.glob(pattern))
    for file in files:
        shard = re.fullmatch(r"(.+)-\d+-of-(\d{5})", file.stem)
        if shard:
            stem, total = shard.groups()
            for i in range(1, int(total) + 1):
                name = f"{stem}-{i:05d}-of-{total}{file.suffix}"
                require_file(folder / name, file.name)
    return files


def check_sources(
    sources: Sources,
    trainable: tuple[str, ...],
    dtype: str,
    tokenizer: str | None,
):
    """Raise InputError for arguments of from_files that do not go together."""
    vision, llama = sources["vision"], sources["llama"]
    is_new = isinstance(llama, dict)
    known = DTYPES + QUANTIZED
    if dtype not in known:
        raise InputError(f"dtype {dtype!r}: give one of {', '.join(known)}")
    if sources["qformer"] and not vision:
        raise InputError("qformer: it needs a vision part; give vision as well")
    if not llama:
        raise InputError("llama: no language model is given; set llama to its folder")
    if is_new and not tokenizer:
        raise InputError("llama: a new one needs a tokenizer.model; set tokenizer")
    with_proj = sources | {"proj": vision}  # each vision part has a projection
    parts = [name for name, source in with_proj.items() if source]
    for name in trainable:
        if name not in parts:
            raise InputError(
                f"trainable: {name!r} is no part of this model; "
                f"it has {', '.join(parts)}"
            )
    if dtype in QUANTIZED and (trainable or is_new):
        raise InputError(f"dtype {dtype}: not for trained or new parts")


def check_vocabulary(tokenizer, n_ids: int):
    """Raise InputError for a tokenizer with more pieces than the model has ids."""
    if tokenizer.vocab_size > n_ids:
        raise InputError(
            f"{tokenizer.path}: it has more pieces than llama, {n_ids}; "
            "not of the same model"
        )


def choose_quantization(files: Files, dtype: str, trainable: tuple[str, ...]) -> str:
    """Note in LLaMA's sizes how to quantize it; returns the dtype of the other parts.

    Raises InputError for a folder that was quantized in another way, or is to learn.
    """
    file = files["llama"]
    converted = getattr(file.sizes, "quantization", "")
    kind = dtype if dtype in QUANTIZED else converted
    if not kind:
        return dtype
    if converted and (trainable or kind != converted):
        raise InputError(
            f"{file.path}: already {converted}; "
            f"take the original for {dtype}, or to train"
        )
    sizes = replace(file.sizes, quantization=kind)
    if not converted:
        sizes = replace(sizes, rotated=True)
    files["llama"] = file._replace(sizes=sizes)
    return "bfloat16"


def check_companions(files: Files, fingerprints: Marks):
    """Warn if a projection was trained beside other parts than the given ones."""
    if "proj" not in files:
        return
    path, _, companions, _ = files["proj"]
    if not companions:
        note(f"note: {path} does not say which parts it was trained with")
    other = [k for k, mark in fingerprints.items() if companions.get(k, mark) != mark]
    if other:
        note(
            f"warning: {path} was trained with another "
            f"{' and another '.join(other)}: its answers will be meaningless; "
            "give the parts that it was trained with"
        )


def read_sizes(
    files: Files,
    kinds: dict[str, dict[str, type]],
    vocab_size: int,
    image_size: int = 0,
) -> tuple:
    """The sizes of vision, qformer and llama; None for a part without a file.

    kinds: {part: {kind: dataclass of its sizes}}; a new LLaMA has `vocab_size` ids.
    Raises InputError for sizes that do not go together.
    """
    vision = read_part_sizes("vision", files, kinds)
    width = vision.width if vision else 0
    qformer = read_part_sizes("qformer", files, kinds, vision_width=width)
    if qformer and qformer.vision_width != width:
        raise InputError(
            f"{files['qformer'].path}: {qformer} does not fit the vision part; "
            f"needed is vision_width {width}"
        )
    llama = files["llama"].sizes
    if isinstance(llama, dict):
        llama_config = kinds["llama"]["llama"]
        override(llama_config(), llama, "llama")  # refuses unknown names
        llama = llama_config.from_dict({"vocab_size": vocab_size} | llama, "llama")
    if vision and image_size % vision.patch_size:
        raise InputError(
            f"image_size {image_size}: give a multiple of {vision.patch_size}, "
            "for whole patches"
        )
    return vision, qformer, llama


def read_part_sizes(name: str, files: Files, kinds: dict, **defaults: int):
    """The sizes of one part; the first of its kinds is that of files without a kind."""
    if name not in files:
        return None
    where, _, given, kind = files[name]
    sizes = defaults | given
    kind = sizes.pop("kind", kind) or next(iter(kinds[name]))
    if kind not in kinds[name]:
        known = " or ".join(kinds[name])
        raise InputError(f"{where}: a {kind} file; as {name}, give {known}")
    config = override(kinds[name][kind](), sizes, f"{where}: {name}")
    check_sizes(config, where)
    if config.width % config.n_heads:
        raise InputError(
            f"{where}: {config}: give a width that is a multiple of n_heads"
        )
    return config
