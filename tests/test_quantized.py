"""int8 and int4."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import chat
from chat import Chat, Options
from llama import KVCache, Llama, LlamaConfig
from model import MiniGPT4
from plumbing.console import InputError
from plumbing.quantized import (
    QuantizedLinear,
    int8_saturates,
    multiply_int8_on_cpu,
    pack,
    pack_int4_on_cpu,
    quantize,
    quantize_linears,
    quantize_matrix,
    rotate,
    shapes_of,
)
from plumbing.weights import hub_name
from tests.common import EXAMPLE
from tests.hub import hub_folder

KINDS = ("int8", "int4")
SIZES = LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)

STAR = "What color is the star?"


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_quantized_model_chats(dtype):
    talk = Chat(*chat.load(Options(device="cpu", temperature=0.0, dtype=dtype)))
    talk.add_image(EXAMPLE)
    assert "red" in "".join(talk.ask(STAR))
    assert "two" in "".join(talk.ask("How many objects are there?"))


def random_matrix(n_outputs, n_inputs=128):
    generator = torch.Generator().manual_seed(n_outputs)
    return torch.randn(n_outputs, n_inputs, generator=generator)


def random_llama(sizes=SIZES):
    torch.manual_seed(0)
    model = Llama(sizes).requires_grad_(False)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model


def quantized_copy(model, kind, tensors=None):
    """A model on the meta device, quantized from the tensors; and how often it read."""
    tensors = tensors or dict(model.named_parameters())
    with torch.device("meta"):
        copy = Llama(model.config)
    n_reads = []

    def read_tensors():
        n_reads.append(1)
        return tensors

    quantize_linears(copy, kind, read_tensors, lambda tensor, name: tensor, "cpu")
    rest = {name: tensors[name] for name in copy.state_dict()}
    copy.load_state_dict(rest, assign=True)
    return copy, len(n_reads)


@pytest.mark.parametrize("kind, n_steps", [("int8", 254), ("int4", 15)])
def test_a_quantized_value_is_off_by_half_a_step(kind, n_steps):
    """A step: the range of an output (int8) or of a group of 64 inputs (int4)."""
    matrix = random_matrix(32)
    values, scales = quantize(matrix, kind)
    tensors = {"a.weight": values, "a.weight_scale": scales}
    assert shapes_of(tensors) == {"a.weight": matrix.shape}
    foreign = {"a.weight": matrix, "a.weight_scale": scales}
    assert shapes_of(foreign).keys() == foreign.keys()
    if kind == "int8":
        restored = values * scales[:, None]
        step = 2 * matrix.abs().amax(1, keepdim=True) / n_steps
    else:
        columns = torch.stack((values >> 4, values & 15), 2).view(32, 2, 64)
        scale, middle = scales.float().transpose(0, 1).split(1, dim=2)
        restored = ((columns.float() - 8) * scale + middle).view(32, 128)
        groups = matrix.view(32, 2, 64)
        step = (groups.amax(2) - groups.amin(2)).repeat_interleave(64, 1) / n_steps
    # bfloat16 scales and middles of int4 add a little.
    slack = 0.5 if kind == "int8" else 0.6
    assert ((restored - matrix).abs() <= slack * step + 1e-6).all()


def test_int4_names_the_matrix_that_it_cannot_hold():
    for shape in ((24, 64), (32, 96)):
        with pytest.raises(InputError, match=rf"int4.*{shape[0]}, {shape[1]}.*int8"):
            quantize(torch.zeros(shape), "int4")


@pytest.mark.parametrize("n_rows", [1, 5], ids=["one_row", "rows"])
@pytest.mark.parametrize("kind", KINDS)
def test_fused_products_equal_single_ones_with_their_biases(kind, n_rows):
    sizes = (32, 16, 48)
    matrices = [quantize(random_matrix(n), kind) for n in sizes]
    biases = [random_matrix(n)[:, 0] for n in sizes]
    x = torch.randn(1, n_rows, 128).bfloat16()
    fused = QuantizedLinear(matrices, biases, "cpu")(x)
    for y, matrix, bias, n in zip(fused, matrices, biases, sizes):
        want = QuantizedLinear([matrix], [], "cpu")(x) + bias.bfloat16()
        assert torch.equal(y, want) and y.shape == (1, n_rows, n)
        assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_row_beside_a_large_one_keeps_its_precision(kind):
    linear = QuantizedLinear([quantize(random_matrix(32), kind)], [], "cpu")
    x = torch.randn(2, 128).bfloat16()
    x[1] *= 2**-10
    together, alone = linear(x)[1], linear(x[1:])[0]
    # With the scale of the large row it would be all zeros.
    assert (together - alone).abs().max() < 0.1 * alone.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_is_replaced_and_the_tensors_are_mapped_for_each_module(kind):
    model = random_llama().bfloat16()
    copy, n_reads = quantized_copy(model, kind)
    assert not any(isinstance(m, nn.Linear) for m in copy.modules())
    assert n_reads == 1 + 2 * len(model.layers)  # lm_head; attention, MLP
    block = copy.layers[0]
    names = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    assert not any(hasattr(block.self_attn, name) for name in names)
    assert not any(hasattr(block.mlp, name) for name in names)
    assert block.self_attn.qkv.sizes == [64, 32, 32]
    assert block.self_attn.qkv.is_int8 == (kind == "int8")
    assert copy.lm_head.is_int8

    x = torch.randn(1, 9, 64).bfloat16()
    want = model.logits(model(x)).float()
    got = copy.logits(copy(x)).float()
    assert (got - want).std() < {"int8": 0.1, "int4": 0.5}[kind] * want.std()
    cache = KVCache()
    parts = [copy(part, cache) for part in x.split((4, 1, 4), 1)]
    cached = copy.logits(torch.cat(parts, 1)).float()
    assert (cached - got).std() < 0.1 * want.std()


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_with_scales_are_taken_as_they_are(kind):
    model = random_llama().bfloat16()
    tensors = dict(model.named_parameters())
    for name, tensor in list(tensors.items()):
        if name.endswith("_proj.weight"):
            values, scales = quantize_matrix(name, tensor, kind)
            tensors |= {name: values, f"{name}_scale": scales}
    x = torch.randn(1, 3, 64).bfloat16()
    one, _ = quantized_copy(model, kind, tensors)
    other, _ = quantized_copy(model, kind)
    assert torch.equal(one.logits(one(x)), other.logits(other(x)))


@pytest.mark.parametrize("n", [64, 100, 576, 2048])
def test_a_rotation_undoes_itself_and_keeps_lengths(n):
    x = torch.randn(3, n)
    torch.testing.assert_close(rotate(rotate(x)), x)
    torch.testing.assert_close(rotate(x).norm(dim=1), x.norm(dim=1))
    assert not torch.allclose(rotate(x), x)


@pytest.mark.parametrize("n_rows", [1, 64])
@pytest.mark.parametrize("reduce_range", [False, True], ids=["8_bits", "7_bits"])
def test_large_inputs_do_not_spoil_an_int8_product(reduce_range, n_rows):
    if int8_saturates() and not reduce_range:
        pytest.skip("needs VNNI")
    weight, x = torch.randn(1024, 2048), torch.randn(n_rows, 2048)
    x[:, [3, 700, 1100, 2000]] *= 50
    matrix = quantize_matrix("q_proj.weight", weight, "int8")
    linear = QuantizedLinear([matrix], [], "cpu", is_rotated=True)
    linear.reduce_range = reduce_range
    want = x @ weight.T
    limit = 0.025 if reduce_range else 0.02  # not rotated: 0.15 and 0.07
    assert (linear(x) - want).norm() < limit * want.norm()


def test_int8_folders_from_before_the_rotation_still_load(tmp_path):
    model = random_llama(replace(SIZES, vocab_size=640))
    tensors = {}
    for name, tensor in model.named_parameters():
        if name.endswith(("_proj.weight", "lm_head.weight")):
            tensors[hub_name(name)], scales = quantize(tensor, "int8")
            tensors[f"{hub_name(name)}_scale"] = scales
        else:
            tensors[hub_name(name)] = tensor.bfloat16()
    sizes = model.config.to_hub() | {"quantization": "int8", "fingerprint": "0"}
    folder = hub_folder(tmp_path / "old", sizes, tensors)
    old = MiniGPT4.from_files(None, None, str(folder)).llama
    x = torch.randn(1, 9, 64)
    want = model.logits(model(x))
    got = old.logits(old(x.bfloat16())).float()
    assert (got - want).std() < 0.1 * want.std()


@pytest.mark.parametrize("reduce_range", [False, True], ids=["8_bits", "7_bits"])
def test_int8_products_are_close_where_they_do_not_saturate(reduce_range):
    weight, x = torch.randn(64, 256), torch.randn(3, 256)
    packed = pack(*quantize(weight, "int8"))
    y = multiply_int8_on_cpu(x, packed, reduce_range)
    error = (y - x @ weight.T).norm() / (x @ weight.T).norm()
    is_right = error < 0.02
    assert is_right or (int8_saturates() and not reduce_range)


def test_int4_has_the_error_of_least_squares():
    """Scales from the least and the largest alone would have 0.0896."""
    torch.manual_seed(0)
    weight = torch.randn(512, 2048)
    values, scales = quantize(weight, "int4")
    steps = torch.stack((values >> 4, values & 15), 2).view(512, 32, 64).float() - 8
    scale, middle = scales.float().transpose(0, 1).unsqueeze(2).unbind(-1)
    error = (steps * scale + middle).flatten(1) - weight
    assert 0.08 < error.norm() / weight.norm() < 0.0875


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_quantized_alone_and_int4_is_packed_in_blocks(kind):
    weight = torch.randn(80, 4096)  # AT_ONCE has 32 rows
    values, scales = quantize(weight, kind)
    axis = 1 if kind == "int4" else 0  # of the outputs' scales
    for start in (0, 32, 64):
        part, part_scales = quantize(weight[start : start + 16], kind)
        assert torch.equal(part, values[start : start + 16])
        assert torch.equal(part_scales, scales.narrow(axis, start, 16))
    if kind == "int4":
        assert torch.equal(pack(values, scales), pack_int4_on_cpu(values))
