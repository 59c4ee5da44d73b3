"""LLaMA's matrices in int8 and int4."""

import warnings

import torch
import torch.nn.functional as F
from torch import nn

from plumbing.console import InputError, progress

QUANTIZED = ("int8", "int4")  # dtypes


def quantize(weight: torch.Tensor, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix (out, in) -> int8 (out, in) with scales float32 (out,); or two int4 in a uint8 (out, in / 2),
    the even column in the high bits, with bfloat16 (in / 64, out, 2): per group of 64 inputs a scale and the
    value of 8."""
    w = weight.float()
    if dtype == "int8":
        scale = w.abs().amax(1).clamp(min=1e-12) / 127
        return (w / scale[:, None]).round_().to(torch.int8), scale
    if w.shape[0] % 16 or w.shape[1] % 64:
        raise InputError(
            f"int4: a matrix of {tuple(w.shape)}, not multiples of 16 and 64; take int8"
        )
    groups = w.unflatten(1, (-1, 64))
    low, high = groups.aminmax(dim=2, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-12).bfloat16().float()
    middle = (low + 8 * scale).bfloat16().float()
    q = (
        ((groups - middle) / scale)
        .round_()
        .add_(8)
        .clamp_(0, 15)
        .to(torch.uint8)
        .flatten(1)
    )
    return q[:, ::2] << 4 | q[:, 1::2], torch.cat((scale, middle), 2).transpose(
        0, 1
    ).bfloat16().contiguous()


class QuantizedLinear(nn.Module):
    """x (..., in) -> x @ W.T for one W of `quantize`, or a tuple for several, computed together."""

    def __init__(
        self, matrices: list[tuple[torch.Tensor, torch.Tensor]], device: torch.device
    ):
        super().__init__()
        weights, scales = zip(*matrices)
        self.sizes, self.is_int8 = (
            [len(w) for w in weights],
            weights[0].dtype == torch.int8,
        )
        w, self.scale = (
            torch.cat(weights).to(device),
            torch.cat(scales, -2 + self.is_int8).to(device),
        )
        if self.is_int8 and w.is_cpu:  # in the layout of this CPU's kernels
            with warnings.catch_warnings(
                action="ignore"
            ):  # quantized tensors are deprecated, but fastest
                zeros = torch.zeros(len(w), dtype=torch.long)
                w = torch._make_per_channel_quantized_tensor(
                    w, self.scale.double(), zeros, 0
                )
            w = torch.ops.quantized.linear_prepack(w, None)
        elif w.is_cpu:
            columns = torch.stack((w >> 4, w & 15), 2).flatten(1)
            w = torch.ops.aten._convert_weight_to_int4pack_for_cpu(columns.int(), 1)
        elif not self.is_int8:
            w = torch.ops.aten._convert_weight_to_int4pack(
                w, 4 if w.shape[1] % 64 else 8
            )  # tiles of 16
        self.weight = w

    def forward(self, x):
        rows = x.flatten(0, -2)
        if (
            self.is_int8 and x.is_cpu
        ):  # x is quantized, too, with one scale for all rows: give them one range
            largest = (
                rows.float().abs().amax(1, keepdim=True).clamp(min=1e-12)
                if len(rows) > 1
                else 1.0
            )
            y = (
                torch.ops.quantized.linear_dynamic(rows.float() / largest, self.weight)
                * largest
            )
            y = y.to(x.dtype)
        elif self.is_int8:
            y = F.linear(rows, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        else:
            product = (
                "_weight_int4pack_mm_for_cpu" if x.is_cpu else "_weight_int4pack_mm"
            )
            y = getattr(torch.ops.aten, product)(rows, self.weight, 64, self.scale)
        y = y.unflatten(0, x.shape[:-1])
        return y.split(self.sizes, -1) if len(self.sizes) > 1 else y


def matrix_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape of the matrix that a tensor of a file holds; a uint8 is two int4."""
    if tensor.dtype != torch.uint8:
        return tuple(tensor.shape)
    return (*tensor.shape[:1], *(2 * n for n in tensor.shape[1:]))


def quantize_linears(llama, kind, read_tensors, check, device):
    modules = [p for p in llama.named_modules() if getattr(p[1], "quantized", {})]
    for prefix, module in progress(
        modules, f"quantizing to {kind}", delay=1, leave=False
    ):
        mapped = read_tensors()  # mapped again, to free pages that were read
        for new_name, linears in module.quantized.items():
            names = [f"{prefix}.{linear}.weight".lstrip(".") for linear in linears]
            matrices = [
                (mapped[w], mapped[f"{w}_scale"])
                if f"{w}_scale" in mapped
                else quantize(
                    check(mapped[w], w), "int8" if w == "lm_head.weight" else kind
                )
                for w in names
            ]
            for linear in linears:
                setattr(module, linear, None)
            setattr(module, new_name, QuantizedLinear(matrices, device))
