"""The language model against Hugging Face's: small, float32, the same weights."""

import itertools
import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from configs.prompts import is_end
from llama import (
    CONTEXT,
    KVCache,
    Llama,
    LlamaConfig,
    attend,
    attend_last,
    beam_search,
    sample,
)
from model import MiniGPT4
from plumbing.console import InputError
from tests.common import GOLDEN
from tools import convert

SIZES = {
    "vocab_size": 640,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SHAPES = {
    "multi_head": {},
    "grouped_query": {"num_key_value_heads": 2},
    "one_key_head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "rope_theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "rms_norm_eps": {"rms_norm_eps": 1e-2},
    "head_dim": {"head_dim": 20},
    "mixed": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "llama3_rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "mistral": {
        "model_type": "mistral",
        "sliding_window": None,
        "num_key_value_heads": 2,
    },
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 20},
    "tied_qwen3": {
        "model_type": "qwen3",
        "num_key_value_heads": 4,
        "head_dim": 8,
        "tie_word_embeddings": True,
    },
}
TOKENS = torch.randint(3, 600, (2, 40), generator=torch.Generator().manual_seed(7))


def make_folder(folder, **changes):
    """Save a Hugging Face LLaMA; its random weights make wrong attention show."""
    shard = (
        {"max_shard_size": changes.pop("max_shard_size")}
        if "max_shard_size" in changes
        else {}
    )
    torch.manual_seed(0)
    settings = SIZES | {"model_type": "llama", "initializer_range": 0.2} | changes
    config = transformers.AutoConfig.for_model(**settings)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, p in theirs.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(p, 0.5, 1.5)
        elif name.endswith("bias"):
            torch.nn.init.uniform_(p, -1, 1)
    theirs.save_pretrained(folder, **shard)
    shutil.copy(GOLDEN / "tokenizer" / "tokenizer.model", folder)
    return theirs


def load(folder, dtype="float32", trainable=()):
    return MiniGPT4.from_files(
        vision=None, qformer=None, llama=str(folder), dtype=dtype, trainable=trainable
    )


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model.llama.logits(model.llama(model.llama.embed_tokens(tokens)))


@torch.no_grad()
def their_logits(theirs):
    return theirs(TOKENS).logits


def close(got, want, tolerance):
    torch.testing.assert_close(got, want, atol=tolerance, rtol=0)


# ---- parity --------------------------------------------------------------------------


@torch.no_grad()
def test_llama3_s_positions_equal_transformers_beyond_the_original_context(tmp_path):
    """8,192 tokens; LLaMA 3.2's numbers."""
    rope = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    changes = dict(rope_parameters=rope, num_hidden_layers=1, num_attention_heads=1)
    theirs = make_folder(
        tmp_path, **changes, head_dim=64, max_position_embeddings=131_072
    )
    model = load(tmp_path)
    tokens = torch.arange(9000).remainder(600)[None]
    got = model.llama(model.llama.embed_tokens(tokens))[:, -100:]
    want = theirs.model(tokens).last_hidden_state[:, -100:]
    close(got, want, 1e-5)
    cache = KVCache()
    parts = model.llama.embed_tokens(tokens).split((8990, 9, 1), 1)
    *_, last = [model.llama(part, cache) for part in parts]
    close(last, want[:, -1:], 1e-5)


def test_ids_that_the_tokenizer_does_not_have_are_never_chosen(tmp_path):
    """Even where their embeddings are the likeliest."""
    make_folder(tmp_path, vocab_size=640)  # the tokenizer has 600
    model, prompt = load(tmp_path), TOKENS[0].tolist()
    model.llama.lm_head.weight[600:] *= 100
    options = dict(max_new_tokens=20, repetition_penalty=1.0)
    answers = [list(model.generate(prompt, temperature=t, **options)) for t in (0, 5.0)]
    answers += model.generate_batch([prompt] * 2, **options)
    answers.append(model.beam_search(prompt, **options, num_beams=3))
    assert max(id for answer in answers for id in answer) < 600


@pytest.mark.parametrize(
    "change, context",
    [
        ({}, 40960),
        ({"sliding_window": 4096}, 40960),
        ({"sliding_window": 4096, "use_sliding_window": False}, 40960),
        ({"sliding_window": 4096, "use_sliding_window": True}, 4096),
    ],
    ids=["none", "unused", "off", "on"],
)
def test_qwen_s_window_counts_only_where_it_is_used(change, context):
    sizes = {"model_type": "qwen3", "max_position_embeddings": 40960}
    config = LlamaConfig.from_dict(LlamaConfig().to_hub() | sizes | change)
    assert config.max_position_embeddings == context


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(tmp_path, shape):
    theirs = make_folder(tmp_path, **SHAPES[shape])
    want = their_logits(theirs)
    assert want.std() > 0.5  # large enough for the tolerance to mean something
    close(logits(load(tmp_path)), want, 1e-6)


def test_each_size_changes_the_logits(tmp_path):
    """Parity would hold even if both readers ignored rope_theta or rms_norm_eps."""
    plain = their_logits(make_folder(tmp_path))
    for shape in (
        "rope_theta",
        "rms_norm_eps",
        "tied",
        "llama3_rope",
        "qwen2",
        "qwen3",
    ):
        assert (
            their_logits(make_folder(tmp_path, **SHAPES[shape])) - plain
        ).abs().max() > 0.05, shape


@pytest.mark.parametrize("shape", ["multi_head", "mixed"])
def test_cached_decoding_equals_the_full_forward(tmp_path, shape):
    make_folder(tmp_path, **SHAPES[shape])
    model = load(tmp_path)
    want, prompt = logits(model), 7
    cache = KVCache()
    with torch.no_grad():
        x = model.llama.embed_tokens(TOKENS)
        close(
            model.llama.logits(model.llama(x[:, :prompt], cache)),
            want[:, :prompt],
            2e-5,
        )
        for t in range(prompt, TOKENS.shape[1]):
            assert cache.length == t
            close(
                model.llama.logits(model.llama(x[:, t : t + 1], cache)),
                want[:, t : t + 1],
                2e-5,
            )


def test_several_tokens_after_the_cached_ones_equal_the_full_forward(tmp_path):
    make_folder(tmp_path, **SHAPES["grouped_query"])
    model = load(tmp_path)
    cache, x = KVCache(), model.llama.embed_tokens(TOKENS.repeat(1, 30))
    parts = [
        model.llama(part, cache) for part in x.split((5, 1, 20, x.shape[1] - 26), 1)
    ]  # it grows twice
    assert torch.allclose(torch.cat(parts, 1), model.llama(x), atol=2e-5)
    cache.length = 4  # forgets the others
    assert torch.allclose(
        model.llama(x[:, 4:], cache), model.llama(x)[:, 4:], atol=2e-5
    )


def test_answers_of_a_batch_equal_single_ones_each_ending_on_its_own(tmp_path):
    make_folder(tmp_path, **SHAPES["mixed"])
    model, rows = load(tmp_path), [row.tolist() for row in TOKENS]
    options = dict(max_new_tokens=12, temperature=0, repetition_penalty=1.3)
    single = [list(model.generate(row, **options)) for row in rows]
    stop = single[0][3:5]
    assert stop != single[1][3:5] and len(single[1]) == 12
    first, second = model.generate_batch(rows, **options, stop=(stop,))
    assert first == single[0][:5]
    assert second == single[1]


def causal_attention(q, k, v):
    """By its definition: q (B, H, T, d), k and v (B, K, S, d)."""
    H, T, d = q.shape[1:]
    K, S = k.shape[1:3]
    k, v = (t.repeat_interleave(H // K, dim=1) for t in (k, v))
    scores = q @ k.transpose(2, 3) / d**0.5
    is_future = torch.arange(S) > torch.arange(S - T, S)[:, None]
    return scores.masked_fill(is_future, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("n_key_heads", [4, 2, 1])
@pytest.mark.parametrize("T, S", [(6, 6), (3, 7), (2, 3), (1, 5), (1, 1)])
def test_attention_is_causal_and_query_heads_share_key_heads(T, S, n_key_heads):
    q = torch.randn(2, 4, T, 8)
    k, v = torch.randn(2, 2, n_key_heads, S, 8)
    want = causal_attention(q, k, v)
    cache = KVCache()
    cache.length = S - T
    attention = attend_last if T == 1 else attend
    close(attention(q, k, v, cache.mask(T, "cpu")), want, 1e-5)


def test_a_cache_selects_repeats_and_forgets_rows():
    """It grows beyond its 256 first places without losing any."""
    cache = KVCache()
    k, v = torch.randn(2, 3, 2, 300, 4)
    for start, end in ((0, 250), (250, 251), (251, 300)):
        got_k, got_v = cache.append(7, k[:, :, start:end], v[:, :, start:end])
        cache.length = end
        assert torch.equal(got_k, k[:, :, :end])
        assert torch.equal(got_v, v[:, :, :end])
    rows = torch.tensor([2, 2, 0, 1])
    cache.select(rows)
    cache.length = 299
    got_k, got_v = cache.append(7, k[rows, :, 299:], v[rows, :, 299:])
    assert torch.equal(got_k, k[rows]) and torch.equal(got_v, v[rows])


@pytest.mark.parametrize("length_penalty", [1.0, -2.0, 3.0])
@pytest.mark.parametrize("min_length", [0, 3])
def test_enough_beams_find_the_likeliest_of_all_answers(min_length, length_penalty):
    """Against all answers to a prompt, each scored without a cache."""
    torch.manual_seed(2)
    V, n_new, eos = 5, 3, 4
    model = Llama(LlamaConfig(V, 16, 16, 1, 2, 2, 8)).requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    stops = ([eos], [1, 2])
    prompt = torch.tensor([[1, 3]])

    def score(ids):
        """None for ids that go on after an end."""
        x = model.embed_tokens(torch.tensor([[*prompt[0].tolist(), *ids]]))
        logits = model.logits(model(x)[0, 1:-1])
        log_prob = 0.0
        for n, (row, id) in enumerate(zip(logits.log_softmax(-1), ids), 1):
            if n < min_length and id == eos or n > 1 and is_end(ids[: n - 1], stops):
                return None
            log_prob += row[id].item()
        if is_end(ids, stops):
            return log_prob / len(ids) ** length_penalty
        return log_prob / (n_new + 1) ** length_penalty if len(ids) == n_new else None

    scores = {}
    for length in range(1, n_new + 1):
        for ids in itertools.product(range(V), repeat=length):
            value = score(list(ids))
            if value is not None:
                scores[ids] = value
    got = beam_search(
        model,
        model.embed_tokens(prompt),
        torch.zeros(1, V, dtype=torch.bool),
        n_new,
        stops[:1],
        stops[1:],
        num_beams=V**n_new,
        repetition_penalty=1.0,
        min_length=min_length,
        length_penalty=length_penalty,
    )
    assert tuple(got) == max(scores, key=scores.get)


@pytest.mark.parametrize("num_beams, penalty", [(2, 1.0), (4, 0.5), (3, -1.0)])
def test_beam_search_equals_transformers(tmp_path, num_beams, penalty):
    """With a likely `</s>`: some answers end early, others at the limit."""
    # as many ids as the tokenizer has
    theirs = make_folder(tmp_path, **SHAPES["grouped_query"], vocab_size=600)
    model, prompt = load(tmp_path), TOKENS[:1]
    model.tokenizer.eos = next(model.generate(prompt[0].tolist(), temperature=0))
    want = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=12,
        num_beams=num_beams,
        length_penalty=penalty,
        pad_token_id=0,
        min_new_tokens=1,
        eos_token_id=model.tokenizer.eos,
    )[0, prompt.shape[1] :].tolist()
    got = model.beam_search(
        prompt[0].tolist(),
        max_new_tokens=12,
        repetition_penalty=1.0,
        min_length=2,
        num_beams=num_beams,
        length_penalty=penalty,
    )
    assert [*got] == [id for id in want if id]


@pytest.mark.parametrize("shape", ["multi_head", "llama3_rope", "qwen2", "tied_qwen3"])
@pytest.mark.parametrize("dtype, error", [("int8", 0.05), ("int4", 0.5)])
def test_quantized_matrices_are_close_and_the_same_from_a_converted_folder(
    tmp_path, dtype, error, shape
):
    sizes = dict(vocab_size=600, hidden_size=64, intermediate_size=128)
    make_folder(tmp_path / "hub", **SHAPES[shape] | sizes | {"head_dim": 16})
    hub, small = str(tmp_path / "hub"), str(tmp_path / "small")
    convert.main(["llama", hub, small, f"--dtype={dtype}", "--check=false"])
    model, plain, again = load(hub, dtype), load(hub), load(small)
    assert (
        torch.equal(logits(model), logits(again))
        and model.fingerprints == plain.fingerprints
    )
    assert again.fingerprints == plain.fingerprints
    assert (
        0
        < (logits(model).float() - logits(plain)).abs().mean()
        < error * logits(plain).std()
    )
    other = "int8" if dtype == "int4" else "int4"
    for options in ({"dtype": other}, {"dtype": "bfloat16", "trainable": ("llama",)}):
        with pytest.raises(InputError, match=f"already {dtype}"):
            MiniGPT4.from_files(None, None, small, **options)
    with pytest.raises(InputError, match="not for trained"):
        load(hub, dtype, trainable=("llama",))


def test_greedy_generation_equals_transformers(tmp_path):
    theirs = make_folder(tmp_path, **SHAPES["grouped_query"])
    prompt = TOKENS[:1]
    want = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=25,
        pad_token_id=0,
    )[0, prompt.shape[1] :]
    got = load(tmp_path).generate(
        prompt[0].tolist(), max_new_tokens=25, temperature=0, repetition_penalty=1.0
    )
    assert list(got) == want.tolist()


def test_prompt_is_cut_on_the_left_to_fit_the_context(tmp_path):
    """What remains of the prompt leaves room for the answer."""
    make_folder(tmp_path)
    model, prompt = load(tmp_path), TOKENS[0].tolist()

    def answer(ids, context):
        return list(
            model.generate(ids, max_new_tokens=10, temperature=0, context=context)
        )

    assert answer(prompt, 30) == answer(prompt[-20:], 2000) != answer(prompt, 2000)
    assert answer(prompt, 50) == answer(prompt, 2000)  # it just fits


def test_bfloat16_is_close_to_float32(tmp_path):
    theirs = make_folder(tmp_path, **SHAPES["mixed"])
    model = load(tmp_path, "bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    want = their_logits(theirs)
    got = logits(model)
    assert got.dtype == torch.bfloat16
    theirs_off = (
        their_logits(theirs.to(torch.bfloat16)).float() - want
    ).norm() / want.norm()
    ours_off = (got.float() - want).norm() / want.norm()
    assert ours_off < 0.05 and ours_off < 1.5 * theirs_off


def test_only_trainable_parts_have_gradients(tmp_path):
    """A trainable part is float32, whatever the dtype of the others."""
    make_folder(tmp_path)
    assert not any(p.requires_grad for p in load(tmp_path).parameters())
    trained = load(tmp_path, "bfloat16", trainable=("llama",))
    assert all(
        p.requires_grad and p.dtype == torch.float32 for p in trained.parameters()
    )


def test_loaded_projection_is_float32_even_when_frozen(tmp_path):
    make_folder(tmp_path / "llama")
    sizes = {
        "image_size": 28,
        "patch_size": 14,
        "width": 16,
        "n_layers": 1,
        "n_heads": 2,
        "mlp_hidden": 16,
    }
    parts = {"vision": sizes, "qformer": None, "llama": str(tmp_path / "llama")}
    MiniGPT4.from_files(**parts).save_part("proj", str(tmp_path), "bfloat16")
    for trainable in ((), ("proj",)):
        model = MiniGPT4.from_files(
            **parts, proj=str(tmp_path / "proj.safetensors"), trainable=trainable
        )
        assert {p.dtype for p in model.proj.parameters()} == {torch.float32}
        assert {p.dtype for p in model.llama.parameters()} == {torch.bfloat16}
        assert {k for k, p in model.named_parameters() if p.requires_grad} == (
            {"proj.weight", "proj.bias"} if trainable else set()
        )


# ---- files ---------------------------------------------------------------------------


def test_sharded_folder_is_read_by_its_index(tmp_path):
    """A stray file beside the shards, such as Meta's `consolidated`, is not read."""
    theirs = make_folder(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    save_file(
        {"tok_embeddings.weight": torch.zeros(1)}, tmp_path / "consolidated.safetensors"
    )
    close(logits(load(tmp_path)), their_logits(theirs), 2e-5)


def test_missing_shard_is_named(tmp_path):
    make_folder(tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(InputError, match=shard.name):
        load(tmp_path)


def test_rotary_buffers_of_old_files_are_ignored(tmp_path):
    theirs = make_folder(tmp_path)
    change_tensors(
        tmp_path,
        lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)},
    )
    close(logits(load(tmp_path)), their_logits(theirs), 2e-5)


def test_tied_tensor_that_is_stored_twice_is_ignored(tmp_path, capsys):
    theirs = make_folder(tmp_path, tie_word_embeddings=True)
    for factor, n_warnings in ((1, 0), (0, 1)):
        head = factor * theirs.get_input_embeddings().weight.data
        change_tensors(tmp_path, lambda t, head=head: t | {"lm_head.weight": head})
        capsys.readouterr()
        close(logits(load(tmp_path)), their_logits(theirs), 2e-5)
        warning = "its lm_head.weight is not used, and it is no copy"
        assert capsys.readouterr().err.count(warning) == n_warnings


@pytest.mark.parametrize("shape", SHAPES)
def test_saved_part_loads_again_here_and_in_transformers(tmp_path, shape):
    theirs = make_folder(tmp_path / "in", **SHAPES[shape])
    want = their_logits(theirs)
    load(tmp_path / "in").save_part("llama", str(tmp_path))
    close(logits(load(tmp_path / "llama")), want, 2e-5)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "llama", dtype=torch.float32
    ).eval()
    close(their_logits(again), want, 2e-5)


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    "old",
    [
        {"rope_theta": 500.0},
        {"rope_scaling": LLAMA3_ROPE},
        {"rope_scaling": LLAMA3_ROPE | {"rope_theta": 500.0}, "rope_theta": 1e6},
        {"rope_scaling": {"rope_type": "default"}, "rope_theta": 500.0},
    ],
    ids=["theta", "scaling", "both", "default"],
)
def test_of_both_spellings_of_rope_the_same_counts_as_in_transformers(tmp_path, old):
    make_folder(tmp_path)
    new = {"rope_type": "default", "rope_theta": 2000.0}
    change_config(tmp_path, lambda config: config | {"rope_parameters": new} | old)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval().float()
    close(logits(load(tmp_path)), their_logits(theirs), 2e-5)


def test_a_yarn_beside_plain_rope_parameters_is_refused():
    changes = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    changes["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    with pytest.raises(InputError, match="rotary scaling .*yarn.* is not supported"):
        LlamaConfig.from_dict(LlamaConfig().to_hub() | changes)


def test_old_config_json_has_rope_theta_at_the_top(tmp_path):
    """Old folders have no rope_parameters, head_dim or num_key_value_heads."""
    theirs = make_folder(tmp_path, **SHAPES["rope_theta"])
    keep = (*SIZES, "rms_norm_eps", "model_type")
    change_config(
        tmp_path,
        lambda c: {k: c[k] for k in keep} | {"rope_theta": 500.0, "rope_scaling": None},
    )
    close(logits(load(tmp_path)), their_logits(theirs), 2e-5)


def change_tensors(folder, change):
    save_file(
        change(load_file(folder / "model.safetensors")),
        folder / "model.safetensors",
        {"format": "pt"},
    )


def change_config(folder, change):
    path = folder / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


Q = "layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "fault, change",
    {
        f"missing ({Q})": lambda t: {k: v for k, v in t.items() if k != f"model.{Q}"},
        "unexpected (layers.0.extra.weight)": lambda t: (
            t | {"model.layers.0.extra.weight": torch.zeros(2)}
        ),
        f"of another shape ({Q} (48, 47) instead of (48, 48))": lambda t: (
            t | {f"model.{Q}": torch.zeros(48, 47)}
        ),
    }.items(),
)
def test_tensors_that_do_not_fit_are_named(tmp_path, fault, change):
    make_folder(tmp_path)
    change_tensors(tmp_path, change)
    with pytest.raises(InputError) as error:
        load(tmp_path)
    assert fault in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.model", "model.safetensors"]
)
def test_missing_files_are_named(tmp_path, name):
    make_folder(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(
        InputError, match=name.replace("model.safetensors", "safetensors")
    ) as error:
        load(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.model", "model.safetensors"]
)
def test_truncated_files_are_named(tmp_path, name):
    """As an interrupted download leaves them."""
    make_folder(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=name):
        load(tmp_path)


@pytest.mark.parametrize(
    "named, change",
    [
        (
            "linear",
            {
                "rope_parameters": {
                    "rope_type": "linear",
                    "factor": 2.0,
                    "rope_theta": 10000.0,
                }
            },
        ),
        (
            "llama3",
            {
                "rope_parameters": None,
                "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
            },
        ),
        (
            "dynamic",
            {
                "rope_parameters": None,
                "rope_scaling": {"type": "dynamic", "factor": 2.0},
            },
        ),
        ("gemma2", {"model_type": "gemma2"}),
        ("smollm3", {"model_type": "smollm3"}),
        ("partial_rotary", {"rope_parameters": {"partial_rotary_factor": 0.5}}),
        (
            "full_attention",
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        ),
        ("biases", {"model_type": "qwen3", "attention_bias": True}),
        (
            "sliding window",
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 1024,
            },
        ),
        ("sliding window", {"model_type": "mistral", "sliding_window": 1024}),
        ("biases", {"attention_bias": True}),
        ("biases", {"mlp_bias": True}),
        ("activation", {"hidden_act": "gelu"}),
        ("not of the same model", {"vocab_size": 599}),
    ],
    ids=[
        "linear_rope",
        "llama3_rope",
        "dynamic_rope",
        "gemma2",
        "smollm3",
        "partial_rope",
        "rope_by_layer",
        "qwen3_with_biases",
        "qwen2_window",
        "short_window",
        "attention_bias",
        "mlp_bias",
        "gelu",
        "small_vocabulary",
    ],
)
def test_unsupported_models_raise_one_line(tmp_path, named, change):
    make_folder(tmp_path)
    change_config(tmp_path, lambda c: c | change)
    with pytest.raises(InputError, match=named):
        load(tmp_path)


@pytest.mark.parametrize("key", SIZES)
def test_sizes_missing_from_config_json_are_named(tmp_path, key):
    make_folder(tmp_path)
    change_config(tmp_path, lambda c: {k: v for k, v in c.items() if k != key})
    with pytest.raises(
        InputError, match=f"config.json: no whole number above 0 for {key}"
    ):
        load(tmp_path)


# ---- sampling ------------------------------------------------------------------------


def draw(scores, seen_ids, temperature, top_p, penalty, generator=None):
    """`sample` with a list of seen ids."""
    seen = torch.zeros(len(scores), dtype=torch.bool)
    seen[seen_ids] = True
    return int(sample(scores, seen, temperature, top_p, penalty, generator))


def random_logits(seed, n=50, scale=2.0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)) * scale


def test_temperature_zero_is_greedy():
    for seed in range(20):
        assert (
            draw(random_logits(seed), [1], 0, 0.9, 1.0) == random_logits(seed).argmax()
        )


def test_repetition_penalty_equals_transformers():
    """Scores of both signs; an id seen twice is penalized once."""
    penalize, changed = transformers.RepetitionPenaltyLogitsProcessor(1.5), 0
    for seed in range(100):
        scores = (
            random_logits(seed) + (seed % 3 - 1) * 5
        )  # all below zero, mixed, all above
        ids = [1, *scores.topk(2).indices.tolist(), int(scores.argmax())]
        want = penalize(torch.tensor([ids]), scores[None].clone())[0].argmax()
        before = scores.clone()
        assert draw(scores, ids, 0, 0.9, 1.5) == want
        assert torch.equal(scores, before)  # the caller's logits stay as they were
        changed += int(want != scores.argmax())
    assert changed > 10


def test_top_p_keeps_exactly_the_nucleus():
    scores = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    generator = torch.Generator().manual_seed(0)

    def draws(top_p):
        return {draw(scores, [0], 1.0, top_p, 1.0, generator) for _ in range(400)}

    assert draws(0.45) == {1}  # the token that passes top_p is kept
    assert draws(0.7) == {1, 3}
    assert draws(0.9) == {0, 1, 3}
    assert draws(1.0) == {0, 1, 2, 3}


def test_sampled_frequencies_equal_transformers():
    """Penalty, temperature and top_p together, as in `generate`, over 5000 draws."""
    scores, ids, n = random_logits(3, n=8, scale=1.5), [1, 4, 5], 5000
    chain = transformers.LogitsProcessorList(
        [
            transformers.RepetitionPenaltyLogitsProcessor(1.3),
            transformers.TemperatureLogitsWarper(0.7),
            transformers.TopPLogitsWarper(0.8),
        ]
    )
    want = chain(torch.tensor([ids]), scores[None].clone())[0].softmax(-1)
    assert 1 < (want > 0).sum() < 8
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor(
        [draw(scores, ids, 0.7, 0.8, 1.3, generator) for _ in range(n)]
    )
    drawn = drawn.bincount(minlength=8) / n
    assert torch.equal(drawn > 0, want > 0)
    close(drawn, want, 0.03)


def test_the_same_seed_repeats_the_answer(tmp_path):
    make_folder(tmp_path)
    model = load(tmp_path)

    def answer(seed):
        return list(
            model.generate(
                [1, 300, 301],
                max_new_tokens=20,
                temperature=1.0,
                generator=torch.Generator().manual_seed(seed),
            )
        )

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


def test_a_sliding_window_wider_than_the_context_is_accepted():
    sizes = LlamaConfig().to_hub() | {"model_type": "mistral", "sliding_window": 4096}
    assert LlamaConfig.from_dict(sizes) == LlamaConfig()


@pytest.mark.parametrize(
    "limit, window, context",
    [(2048, None, 2048), (32768, 4096, 4096), (3000, 4096, 3000), (300, 0, 300)],
    ids=["no_window", "window", "wider_window", "short"],
)
def test_a_conversation_fits_the_positions_and_the_window(limit, window, context):
    sizes = LlamaConfig().to_hub()
    sizes |= {"max_position_embeddings": limit, "sliding_window": window}
    assert LlamaConfig.from_dict(sizes).max_position_embeddings == context


@pytest.mark.parametrize("window", [CONTEXT - 1, 1])
def test_a_window_that_a_conversation_outgrows_is_not_supported(window):
    sizes = LlamaConfig().to_hub() | {"sliding_window": window}
    with pytest.raises(InputError, match=f"window of {window} tokens, below 2000"):
        LlamaConfig.from_dict(sizes)


@pytest.mark.parametrize(
    "change",
    [{"rope_scaling": "linear"}, {"rope_parameters": [1]}, {"sliding_window": "4096"}],
    ids=["text", "list", "window"],
)
def test_malformed_settings_are_named(change):
    with pytest.raises(InputError, match="my.json: .*malformed; fetch it again"):
        LlamaConfig.from_dict(LlamaConfig().to_hub() | change, "my.json")


@pytest.mark.parametrize("dtype", ["int3", "float64", ""])
def test_unknown_dtype_raises_one_line(tmp_path, dtype):
    make_folder(tmp_path)
    with pytest.raises(
        InputError, match=f"^dtype '{dtype}': give one of float32, [^\n]*$"
    ):
        load(tmp_path, dtype)


def test_missing_language_model_is_named_as_such():
    with pytest.raises(
        InputError, match="^llama: no language model is given; set llama"
    ):
        load("")
