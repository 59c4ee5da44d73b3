"""Linear layers that decode faster: int8 and int4 matrices, and compiled products.

A matrix in int8 has float32 scales, one per output. In int4, each group of 64 inputs
of an output has a scale and an offset in bfloat16.
"""

import os
import shutil
import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plumbing.console import InputError, note, progress

QUANTIZED = ("int8", "int4")  # dtypes
GROUP = 64  # inputs that share an int4 scale

# Linears with a common input, and the method of their module that returns all their
# products. One fused product replaces the method: decoding gets faster.
FUSED = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "gate_up": ("gate_proj", "up_proj"),
}


def quantize(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """A matrix (out, in) -> its quantized values and scales.

    int8: int8 (out, in) and float32 (out,).
    int4: two columns in a uint8 (out, in / 2), the even one in the high bits;
    bfloat16 (in / 64, out, 2) holds each group's scale and the value of 8.
    """
    return quantize_int8(weight) if kind == "int8" else quantize_int4(weight)


def quantize_int8(weight):
    weight = weight.float()
    scale = weight.abs().amax(1).clamp(min=1e-12) / 127
    return (weight / scale[:, None]).round_().to(torch.int8), scale


def quantize_int4(weight):
    n_outputs, n_inputs = weight.shape
    if n_outputs % 16 or n_inputs % GROUP:
        raise InputError(
            f"int4: a matrix of {tuple(weight.shape)}, not multiples of 16 and "
            f"{GROUP}; take int8"
        )
    groups = weight.float().unflatten(1, (-1, GROUP))
    low, high = groups.aminmax(dim=2, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-12)
    scale = scale.bfloat16().float()
    middle = (low + 8 * scale).bfloat16().float()
    steps = ((groups - middle) / scale).round_()
    steps = steps.add_(8).clamp_(0, 15).to(torch.uint8).flatten(1)
    packed = steps[:, ::2] << 4 | steps[:, 1::2]
    scales = torch.cat((scale, middle), dim=2).bfloat16()
    return packed, scales.transpose(0, 1).contiguous()


def matrix_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape before quantization; a uint8 holds two int4."""
    shape = tuple(tensor.shape)
    if tensor.dtype == torch.uint8 and len(shape) == 2:
        return shape[0], 2 * shape[1]
    return shape


# Products of x (rows, in) with a quantized matrix -> (rows, out), by kind and device.


class Int8OnCPU:
    """PyTorch's int8 kernels, which quantize x, too: with one scale for all rows."""

    def __init__(self, weight, scale):
        zeros = torch.zeros(len(weight), dtype=torch.long)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, but fastest
            quantized = torch._make_per_channel_quantized_tensor(
                weight, scale.double(), zeros, 0
            )
        self.packed = torch.ops.quantized.linear_prepack(quantized, None)

    def __call__(self, x):
        rows = x.float()
        if len(rows) == 1:
            return self.product(rows).to(x.dtype)
        # Divided by its largest value, each row makes good use of the common scale.
        largest = rows.abs().amax(1, keepdim=True).clamp(min=1e-12)
        return (self.product(rows / largest) * largest).to(x.dtype)

    def product(self, rows):
        return torch.ops.quantized.linear_dynamic(rows, self.packed)


class Int8OnGPU:
    def __init__(self, weight, scale):
        self.weight, self.scale = weight, scale

    def __call__(self, x):
        y = F.linear(x, self.weight.to(x.dtype))
        return y * self.scale.to(x.dtype)


class Int4OnCPU:
    def __init__(self, weight, scale):
        columns = torch.stack((weight >> 4, weight & 15), 2).flatten(1)
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
            columns.int(), 1
        )
        self.scale = scale

    def __call__(self, x):
        return torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, self.packed, GROUP, self.scale
        )


class Int4OnGPU:
    def __init__(self, weight, scale):
        # Of 16 inputs each; 8 need a multiple of 128 inputs, half as many bytes.
        n_inner_tiles = 4 if weight.shape[1] % 64 else 8
        self.packed = torch.ops.aten._convert_weight_to_int4pack(weight, n_inner_tiles)
        self.scale = scale

    def __call__(self, x):
        return torch.ops.aten._weight_int4pack_mm(x, self.packed, GROUP, self.scale)


class QuantizedLinear(nn.Module):
    """x (..., in) -> x @ W.T + bias, for one W of `quantize`.

    For several W with the same `in`, a tuple of their products, computed together.
    """

    def __init__(
        self,
        matrices: list[tuple[Tensor, Tensor]],
        device: torch.device | str,
        bias: Tensor | None = None,
    ):
        super().__init__()
        weights, scales = zip(*matrices)
        is_int8 = weights[0].dtype == torch.int8
        weight = torch.cat(weights).to(device)
        scale = torch.cat(scales, dim=0 if is_int8 else 1).to(device)
        if weight.is_cpu:
            multiply = Int8OnCPU if is_int8 else Int4OnCPU
        else:
            multiply = Int8OnGPU if is_int8 else Int4OnGPU
        self.product = multiply(weight, scale)
        self.bias = bias
        self.sizes = [len(w) for w in weights]

    def forward(self, x):
        rows = x.flatten(0, -2)
        y = self.product(rows).unflatten(0, x.shape[:-1])
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y if len(self.sizes) == 1 else y.split(self.sizes, -1)


def linear_groups(module: nn.Module) -> list[tuple[str, tuple[str, ...]]]:
    """The linears of a module, without its children's: (attribute to set, names)."""
    names = [k for k, m in module.named_children() if isinstance(m, nn.Linear)]
    groups = []
    for method, fused in FUSED.items():
        if set(fused) <= set(names):
            groups.append((method, fused))
            names = [name for name in names if name not in fused]
    return groups + [(name, (name,)) for name in names]


def quantize_linears(
    model: nn.Module,
    kind: str,
    read_tensors: Callable[[], dict[str, Tensor]],
    check: Callable[[Tensor, str], Tensor],
    device: torch.device | str,
):
    """Replace each nn.Linear of a model, perhaps on the meta device.

    read_tensors() maps the weight files and returns {name: tensor}. It is called for
    each module: unmapping frees the pages that were read. check(tensor, name) returns
    the tensor, or raises InputError. Matrices with scales are quantized already.
    """

    def quantized_matrix(name):
        scale = tensors.get(f"{name}_scale")
        if scale is not None:
            return tensors[name], scale
        # In int4, the output embedding would cost too much of the quality.
        is_head = name == "lm_head.weight"
        return quantize(check(tensors[name], name), "int8" if is_head else kind)

    modules = [(k, m) for k, m in model.named_modules() if linear_groups(m)]
    label = f"quantizing to {kind}"
    for module_name, module in progress(modules, label, delay=1, leave=False):
        prefix = f"{module_name}." if module_name else ""
        tensors = read_tensors()
        for attribute, names in linear_groups(module):
            matrices, biases = [], []
            for name in names:
                matrices.append(quantized_matrix(f"{prefix}{name}.weight"))
                if getattr(module, name).bias is not None:
                    bias = tensors[f"{prefix}{name}.bias"]
                    biases.append(check(bias, f"{prefix}{name}.bias"))
                setattr(module, name, None)
            bias = torch.cat(biases).to(device) if biases else None
            linear = QuantizedLinear(matrices, device, bias)
            # A bound method hides the class's method; a module would not.
            is_method = attribute in FUSED
            setattr(module, attribute, linear.forward if is_method else linear)


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works: on a CPU it needs a C++ compiler."""
    return device.type != "cpu" or bool(shutil.which(os.environ.get("CXX", "g++")))


def compile_blocks(part: nn.Module | None, device: torch.device):
    """Compile a part's blocks: one graph for all of them and any number of tokens."""
    if not can_compile(device):
        raise InputError(
            "compile = True: on a CPU it needs a C++ compiler; "
            "install g++ or switch it off"
        )
    for child in part.children() if part else ():
        if isinstance(child, nn.ModuleList):
            for block in child:
                block.compile(dynamic=True)


def autocast(forward: Callable, device: torch.device, dtype: str) -> Callable:
    """A forward method whose float32 parts compute in `dtype`."""
    half = torch.autocast(
        device.type, getattr(torch, dtype), enabled=dtype != "float32"
    )
    return half(forward)


def compile_rows(model: nn.Module):
    """Compile each nn.Linear's product with a single row, for decoding on a CPU.

    In bfloat16 it is twice as fast as PyTorch's own.
    """
    device = next(model.parameters()).device
    if device.type != "cpu" or not can_compile(device):
        note("note: compiling needs a C++ compiler and a CPU; continuing without it")
        return

    @torch.compile(dynamic=False)
    def row_product(weight, x):
        products = weight.float() * x.float()
        return products.sum(-1).to(x.dtype).view(*x.shape[:-1], -1)

    def forward(weight, x):
        is_row = x.numel() == x.shape[-1]
        return row_product(weight, x) if is_row else F.linear(x, weight)

    for linear in model.modules():
        if isinstance(linear, nn.Linear) and linear.bias is None:
            # From the mapped file to huge pages: faster to read.
            linear.weight.data = linear.weight.clone()
            linear.forward = partial(forward, linear.weight)
