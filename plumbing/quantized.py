"""What makes steps faster: int8 and int4 matrices, CUDA graphs, torch.compile.

A matrix in int8 has float32 scales, one per output. In int4, each group of 64 inputs
of an output has a scale and an offset in bfloat16.

On a CPU int8 rounds the inputs, too, with one scale per row, and a few large inputs
leave the others few steps. So inputs and matrix are rotated first, as in QuaRot (arXiv
2404.00456): with an orthogonal R, x @ W.T = (x @ R) @ (W @ R).T, and x @ R has no
outliers.
"""

import math
import os
import subprocess
import threading
import warnings
import weakref
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plumbing.console import InputError, note, progress

QUANTIZED = ("int8", "int4")  # dtypes
GROUP = 64  # inputs that share an int4 scale
AT_ONCE = 2**17  # values that are quantized at once: fast, and little memory
BLOCK = 128  # most inputs that a rotation mixes, a power of 2; 256 are slower

_one_row = threading.Lock()  # held by one_row_kernels

# Linears with a common input, and the method of their module that returns all their
# products. One fused product replaces the method: decoding gets faster.
FUSED = {
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "gate_proj": "gate_up",
    "up_proj": "gate_up",
}


def quantize(
    weight: Tensor, kind: str, is_rotated: bool = False
) -> tuple[Tensor, Tensor]:
    """A matrix W (out, in) -> the quantized values of W, or of W @ R, and scales.

    int8: int8 (out, in) and float32 (out,).
    int4: two columns in a uint8 (out, in / 2), the even one in the high bits;
    bfloat16 (in / 64, out, 2) holds each group's scale and the value of 8.
    """
    n_outputs, n_inputs = weight.shape
    if kind == "int4" and (n_outputs % 16 or n_inputs % GROUP):
        raise InputError(
            f"int4: a matrix of {tuple(weight.shape)}, not multiples of 16 and "
            f"{GROUP}; take int8"
        )
    quantize_rows = quantize_int4 if kind == "int4" else quantize_int8
    parts = []
    for rows in weight.split(max(1, AT_ONCE // n_inputs)):
        parts.append(quantize_rows(rotate(rows) if is_rotated else rows.float()))
    values, scales = zip(*parts)
    return torch.cat(values), torch.cat(scales, dim=1 if kind == "int4" else 0)


def quantize_int8(rows):
    scale = rows.abs().amax(1).clamp(min=1e-12) / 127
    return (rows / scale[:, None]).round_().to(torch.int8), scale


def round_scale(scale):
    return scale.clamp(min=1e-12).bfloat16().float()


def int4_steps(groups, scale, middle):
    """The nearest steps from the middle, -8 to 7."""
    return (groups - middle).div_(scale).round_().clamp_(-8, 7)


def quantize_int4(rows):
    groups = rows.unflatten(1, (-1, GROUP))
    low, high = groups.aminmax(dim=2, keepdim=True)
    scale = round_scale((high - low) / 15)
    middle = (low + 8 * scale).bfloat16().float()
    # Least squares for these steps: a tenth less squared error.
    steps = int4_steps(groups, scale, middle)
    mean = steps.mean(2, keepdim=True)
    steps -= mean
    variance = steps.square().sum(2, keepdim=True).clamp(min=1e-12)
    scale = round_scale((steps * groups).sum(2, keepdim=True) / variance)
    middle = (groups.mean(2, keepdim=True) - scale * mean).bfloat16().float()
    steps = int4_steps(groups, scale, middle).add_(8).to(torch.uint8).flatten(1)
    packed = steps[:, ::2] << 4 | steps[:, 1::2]
    scales = torch.cat((scale, middle), dim=2).bfloat16()
    return packed, scales.transpose(0, 1)


@cache
def hadamard(n: int, device: torch.device):
    """The symmetric, orthogonal matrix of Hadamard, float32 (n, n), n a power of 2."""
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < n:
        upper, lower = torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)
        matrix = torch.cat((upper, lower))
    return matrix / n**0.5


def rotate(x: Tensor) -> Tensor:
    """x (..., in) @ R, float32; to rotate twice changes nothing.

    R has blocks of up to 128 inputs, each a Hadamard matrix.
    """
    size = math.gcd(x.shape[-1], BLOCK)
    blocks = x.float().reshape(-1, size)  # one flat product is the fastest
    return (blocks @ hadamard(size, x.device)).view(x.shape)


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, tuple]:
    """{name: shape before quantization}, without our scales. A uint8 holds two int4.

    Scales beside other matrices, such as float8, are not ours and stay.
    """
    shapes = {}
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if tensor.dtype == torch.uint8 and len(shape) == 2:
            shape = (shape[0], 2 * shape[1])
        matrix = tensors.get(name.removesuffix("_scale"))
        is_scale = name.endswith(".weight_scale") and matrix is not None
        if not is_scale or matrix.dtype not in (torch.int8, torch.uint8):
            shapes[name] = shape
    return shapes


def pack(weight, scale):
    """The values of a quantized matrix in the layout of its device's kernels."""
    is_int8 = weight.dtype == torch.int8
    if is_int8 and weight.is_cpu:
        zeros = torch.zeros(len(weight), dtype=torch.long)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, but fastest
            weight = torch._make_per_channel_quantized_tensor(weight, scale, zeros, 0)
        return torch.ops.quantized.linear_prepack(weight, None)
    if is_int8:
        return weight
    if weight.is_cpu:  # the layout is that of blocks of 64 rows or less
        return torch.cat([pack_int4_on_cpu(rows) for rows in weight.split(64)])
    # Tiles of 16 inputs; 8 tiles need a multiple of 128 inputs, half as many bytes.
    n_tiles = 4 if weight.shape[1] % 64 else 8
    return torch.ops.aten._convert_weight_to_int4pack(weight, n_tiles)


def pack_int4_on_cpu(rows):
    columns = torch.stack((rows >> 4, rows & 15), 2).flatten(1)
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(columns.int(), 1)


def multiply_int8_on_cpu(rows, packed, reduce_range):
    """rows (n, in) -> float32 (n, out). reduce_range: 7 bits of x instead of 8."""
    multiply = torch.ops.quantized.linear_dynamic
    rows = rows.float()
    if len(rows) == 1:
        return multiply(rows, packed, reduce_range)
    # The kernel quantizes x, too, with one scale for all rows: give them one range.
    largest = rows.abs().amax(1, keepdim=True).clamp(min=1e-12)
    return multiply(rows / largest, packed, reduce_range) * largest


def int8_saturates() -> bool:
    """Whether the kernel adds products in 16 bits, which overflow: without VNNI.

    Asked for each matrix: FBGEMM's instruction set may be changed in between.
    """
    n = 64
    largest = torch.full((1, n), 127, dtype=torch.int8)
    y = torch.ops.quantized.linear_dynamic(
        torch.ones(1, n), pack(largest, torch.ones(1))
    )
    return y.item() < 0.99 * 127 * n


class QuantizedLinear:
    """x (..., in) -> x @ W.T + bias, for one W of `quantize`.

    For several W with the same `in`, a tuple of their products, computed together.
    is_rotated: the matrices are those of W @ R.
    """

    def __init__(self, matrices, biases, device, is_rotated=False):
        weights, scales = zip(*matrices)
        self.is_int8 = weights[0].dtype == torch.int8
        self.is_rotated = self.is_int8 and is_rotated
        self.scale = torch.cat(scales, dim=0 if self.is_int8 else 1).to(device)
        # a copy of a large matrix would count in the peak
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        self.weight = pack(weight.to(device), self.scale)
        self.bias = None
        if biases:  # bfloat16, as in converted files
            self.bias = torch.cat(biases).to(device, torch.bfloat16)
        self.sizes = [len(weight) for weight in weights]
        self.reduce_range = self.is_int8 and self.scale.is_cpu and int8_saturates()

    def __call__(self, x):
        y = self.product(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y if len(self.sizes) == 1 else y.split(self.sizes, -1)

    def product(self, rows):
        dtype = rows.dtype
        if self.is_rotated:
            rows = rotate(rows)
        if self.is_int8 and rows.is_cpu:
            return multiply_int8_on_cpu(rows, self.weight, self.reduce_range).to(dtype)
        if self.is_int8:
            rows = rows.to(dtype)
            return F.linear(rows, self.weight.to(dtype)) * self.scale.to(dtype)
        if rows.is_cpu:
            multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        else:
            multiply = torch.ops.aten._weight_int4pack_mm
        return multiply(rows, self.weight, GROUP, self.scale)


def linear_groups(module):
    """{attribute to set: names of linears} of a module, without its children's."""
    groups = defaultdict(list)
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            method = FUSED.get(name, name)
            groups[method if hasattr(module, method) else name].append(name)
    return groups


def quantize_matrix(name: str, matrix: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """A model's matrix -> values and scales; in int8 they are those of W @ R."""
    if name == "lm_head.weight":  # not in int4
        kind = "int8"
    return quantize(matrix, kind, is_rotated=kind == "int8")


def quantized_matrix(tensors, name, kind, check):
    """A matrix with its scales, from the file or computed."""
    if f"{name}_scale" in tensors:
        return tensors[name], tensors[f"{name}_scale"]
    return quantize_matrix(name, check(tensors[name], name), kind)


def quantize_linears(
    model: nn.Module, kind: str, read_tensors, check, device, is_rotated=True
):
    """Replace each nn.Linear of a model, perhaps on the meta device.

    read_tensors() maps the weight files and returns {name: tensor}. It is called for
    each module: unmapping frees the pages that were read. check(tensor, name) returns
    the tensor, or raises InputError. Several threads do so at the same time: packing
    a matrix keeps one busy. Matrices with scales are quantized already; is_rotated:
    whether those in int8 were rotated before.
    """
    if kind == "int8" and torch.device(device).type == "cpu":
        model.compute_dtype = torch.float32  # the kernel's; bfloat16 would round twice

    def replace_linears(path, module):
        tensors = read_tensors()
        for attribute, names in linear_groups(module).items():
            matrices, biases = [], []
            for name in names:
                full_name = f"{path}.{name}".removeprefix(".")
                weight = f"{full_name}.weight"
                matrices.append(quantized_matrix(tensors, weight, kind, check))
                if getattr(module, name).bias is not None:
                    bias = f"{full_name}.bias"
                    biases.append(check(tensors[bias], bias))
                delattr(module, name)
            # It may hide a method of the class; an nn.Module could not.
            linear = QuantizedLinear(matrices, biases, device, is_rotated)
            setattr(module, attribute, linear)

    modules = {path: m for path, m in model.named_modules() if linear_groups(m)}
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        done = pool.map(replace_linears, modules, modules.values())
        label = f"quantizing to {kind}"
        for _ in progress(done, label, total=len(modules), delay=1, leave=False):
            pass


def can_compile(device) -> bool:
    """Whether torch.compile works: on a CPU it needs a C++ compiler that works."""
    if device.type != "cpu":
        return True
    command = [os.environ.get("CXX", "g++"), "-x", "c++", "-fsyntax-only", "-"]
    try:
        done = subprocess.run(command, input=b"int main() {}", capture_output=True)
    except OSError:
        return False
    return done.returncode == 0


def compile_blocks(model: nn.Module, device: torch.device):
    """Compile a model's blocks: one graph per list of them, for any number of tokens.

    Raises InputError without a compiler.
    """
    if not can_compile(device):
        raise InputError(
            "compile = True: on a CPU it needs a C++ compiler; "
            "install g++ or switch it off"
        )
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                block.compile(dynamic=True)


@contextmanager
def one_row_kernels(x: Tensor):
    """The context in which products of x, if it is one row, are the fastest.

    With one row in bfloat16 on a CPU, oneDNN takes twice as long as PyTorch's own.
    """
    if not x.is_cpu or x.dtype != torch.bfloat16 or x.numel() > x.shape[-1]:
        yield
        return
    # The switch is of the process: two threads would restore each other's "off".
    with _one_row, torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        yield


class GraphedSteps:
    """Llama's steps for one token as CUDA graphs: no Python between their kernels.

    Called as the model is, which computes whatever is no such step. There is a graph
    for each batch size and capacity of the cache, captured when it is first needed.
    """

    def __init__(self, llama: nn.Module):
        self.llama = llama
        self.steps: dict[tuple[int, int], GraphedStep] = {}
        self.pool = None
        if llama.norm.weight.is_cuda:
            self.pool = torch.cuda.graph_pool_handle()  # the graphs share memory

    def __call__(self, x: Tensor, cache):
        """x (B, T, D) and a KVCache -> hidden states, valid until the next call."""
        if x.shape[1] > 1 or not cache.length:
            return self.llama(x, cache)
        cache.reserve(1)
        sizes = len(x), cache.capacity
        if sizes not in self.steps:
            self.steps[sizes] = GraphedStep(self.llama, x, cache, self.pool)
        return self.steps[sizes](x, cache)


class GraphedStep:
    """One of them, with the tensors that its graph reads and writes.

    On other devices the same step runs without a graph.
    """

    def __init__(self, llama, x, cache, pool):
        self.llama = llama
        self.x = x.clone()
        self.static = cache.static()
        self.position = self.static.length.clone()
        self.user = weakref.ref(cache)
        self.length = -1  # of the cache after the last call
        self.replay = self.capture(pool) if x.is_cuda else self.run

    def run(self):
        self.static.length.copy_(self.position)  # the model advances it
        self.hidden = self.llama(self.x, self.static)

    def capture(self, pool):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # libraries allocate and choose kernels
                self.run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            self.run()
        return graph.replay

    def __call__(self, x, cache):
        self.hold(cache)
        if cache.length != self.length:  # after a prompt
            self.static.clear(cache.length)
        self.x.copy_(x)
        self.position.fill_(cache.length)
        self.replay()
        cache.length += 1
        self.length = cache.length
        return self.hidden

    def hold(self, cache):
        """Let a cache use the graph's tensors; the one that had them gets a copy."""
        if cache.keys[0] is self.static.keys[0]:
            return
        user = self.user()
        if user is not None and user.keys[0] is self.static.keys[0]:
            copy = user.static()
            user.keys, user.values = copy.keys, copy.values
        self.length = -1
        self.static.copy_(cache)
        cache.keys, cache.values = dict(self.static.keys), dict(self.static.values)
        self.user = weakref.ref(cache)


def graph_steps(llama: nn.Module) -> GraphedSteps | None:
    """GraphedSteps on a GPU; elsewhere none, with a note."""
    if llama.norm.weight.is_cuda:
        return GraphedSteps(llama)
    note("note: cuda_graphs needs a GPU; continuing without")
    return None
