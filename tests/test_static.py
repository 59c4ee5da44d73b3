"""Decoding with shapes that do not depend on the length, here without a CUDA graph."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from llama import KVCache, LlamaConfig
from plumbing.quantized import GraphedSteps, graph_steps, one_row_kernels
from tests.test_quantized import SIZES, quantized_copy, random_llama

QWEN3 = LlamaConfig(**vars(SIZES) | {"model_type": "qwen3", "head_dim": 32})


def make_llama(kind):
    if kind == "qwen3":
        return random_llama(QWEN3)
    model = random_llama()
    return model if kind == "float32" else quantized_copy(model.bfloat16(), kind)[0]


def embeddings(model, B, T):
    torch.manual_seed(B + T)
    ids = torch.randint(model.config.vocab_size, (B, T))
    return model.embed_tokens(ids.to(model.norm.weight.device))


def close(model, got, want, kind):
    """Logits equal to 1e-6 of their scale.

    Where a difference meets a rounding, int8's of inputs or int4's to bfloat16, it
    grows; most are as small.
    """
    got, want = (model.logits(hidden).float() for hidden in (got, want))
    error = (got - want).abs() / max(1, want.abs().max())
    assert error.median() <= 1e-6
    assert error.max() <= (1e-2 if kind in ("int8", "int4") else 1e-6)


@torch.no_grad()
def decode(model, steps, x, n_prompt, cache, start=0):
    """The hidden states of x, first the prompt's, then one token at a time."""
    parts = [steps(x[:, start:n_prompt], cache)]
    for t in range(n_prompt, x.shape[1]):
        parts.append(steps(x[:, t : t + 1], cache).clone())
    return torch.cat(parts, 1)


@pytest.mark.parametrize("kind", ["float32", "qwen3", "int8", "int4"])
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("n_prompt", [1, 2, 80, 254, 255, 256, 300, 511])
def test_static_steps_equal_the_growing_cache(n_prompt, B, kind):
    model = make_llama(kind)
    steps, x = GraphedSteps(model), embeddings(model, B, n_prompt + 5)
    want = decode(model, model, x, n_prompt, KVCache())
    got = decode(model, steps, x, n_prompt, KVCache())
    close(model, got, want, kind)
    capacities = {capacity for _, capacity in steps.steps}
    assert capacities <= {256, 512, 1024} and capacities


def test_turns_undo_and_a_cache_that_grows():
    model = make_llama("float32")
    steps, x = GraphedSteps(model), embeddings(model, 1, 520)
    with torch.no_grad():
        want = model(x)
    cache = KVCache()
    close(model, decode(model, steps, x[:, :30], 20, cache), want[:, :30], "float32")
    # a second turn, then /undo: the cache forgets it
    second = decode(model, steps, x[:, :60], 50, cache, start=30)
    close(model, second, want[:, 30:60], "float32")
    cache.length = 30
    other = torch.cat((x[:, :30], x[:, 100:140]), 1)
    with torch.no_grad():
        want_other = model(other)
    again = decode(model, steps, other, 35, cache, start=30)
    close(model, again, want_other[:, 30:], "float32")
    cache.length = 30
    rest = decode(model, steps, x, 250, cache, start=30)
    close(model, rest, want[:, 30:], "float32")
    assert cache.length == 520
    assert [capacity for _, capacity in steps.steps] == [256, 512, 1024]


def test_conversations_take_turns_with_one_graph():
    """Each keeps its own tokens while another uses the graph's tensors."""
    model = make_llama("float32")
    steps, x = GraphedSteps(model), embeddings(model, 3, 24)
    with torch.no_grad():
        want = model(x)
        caches = [KVCache() for _ in x]
        rows = list(zip(x.split(1), caches))
        parts = [[steps(row[:, :10], cache)] for row, cache in rows]
        for t in range(10, 24):
            for part, (row, cache) in zip(parts, rows):
                part.append(steps(row[:, t : t + 1], cache).clone())
    got = torch.cat([torch.cat(part, 1) for part in parts])
    close(model, got, want, "float32")
    assert len(steps.steps) == 1


def test_layers_have_one_capacity_after_a_pass_that_failed():
    model = make_llama("float32")
    steps, x = GraphedSteps(model), embeddings(model, 1, 300)
    cache = KVCache()
    decode(model, steps, x[:, :200], 195, cache)
    append = cache.append

    def out_of_memory(layer, k, v):
        if layer == 1:
            raise torch.OutOfMemoryError("simulated")
        return append(layer, k, v)

    cache.append = out_of_memory
    with pytest.raises(torch.OutOfMemoryError), torch.no_grad():
        model(x[:, 200:], cache)
    cache.append = append
    assert {len(cache.keys[i][0, 0]) for i in (0, 1)} == {256, 512}
    with torch.no_grad():
        want = model(x[:, :203])
    got = [steps(x[:, t : t + 1], cache).clone() for t in range(200, 203)]
    close(model, torch.cat(got, 1), want[:, 200:], "float32")


def test_what_is_forgotten_may_have_been_nan():
    model = make_llama("float32")
    steps, x = GraphedSteps(model), embeddings(model, 1, 30)
    broken = x.clone()
    broken[:, 24:] = torch.nan
    with torch.no_grad():
        want = model(x)
        cache = KVCache()
        decode(model, steps, x[:, :20], 15, cache)
        steps(broken[:, 20:], cache)  # as in a prompt
        cache.length = 20
        got = decode(model, steps, x, 22, cache, start=20)
        close(model, got, want[:, 20:], "float32")
        cache.length = 20
        decode(model, steps, broken, 22, cache, start=20)  # and as in an answer
        cache.length = 20
        got = decode(model, steps, x, 22, cache, start=20)
    close(model, got, want[:, 20:], "float32")


def test_threads_leave_one_dnn_as_it_was():
    x = torch.randn(1, 1, 8).bfloat16()

    def use(_):
        for _ in range(200):
            with one_row_kernels(x):
                assert not torch.backends.mkldnn.enabled

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(use, range(4)))
    assert torch.backends.mkldnn.enabled


def test_a_conversation_that_is_gone_needs_no_copy():
    model = make_llama("float32")
    steps, x = GraphedSteps(model), embeddings(model, 1, 12)
    first = decode(model, steps, x, 8, KVCache())
    second = decode(model, steps, x, 8, KVCache())
    assert torch.equal(first, second)


def test_without_a_gpu_there_are_no_graphs_and_a_note(capsys):
    assert graph_steps(make_llama("float32")) is None
    assert "needs a GPU" in capsys.readouterr().err
