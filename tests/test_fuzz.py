"""Random command lines, configs, damaged files and ids of answers: nothing breaks."""

import io
import json
import math
import re
import shutil
import tarfile
from dataclasses import fields, replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

import chat
from configs.prompts import END, is_end, stop_sequences
from configs.schema import Config
from data import Samples, draw_samples
from llama import Tokenizer
from model import MiniGPT4
from plumbing.console import InputError
from plumbing.options import override, parse_args
from plumbing.sources import Rows, Shards, index_tar
from plumbing.weights import load_tensors
from tests.common import GOLDEN, ROOT
from tests.samples import picture

pytestmark = pytest.mark.slow  # hundreds of cases each


TOKENIZER = Tokenizer(GOLDEN / "tokenizer" / "tokenizer.model")
NAMES = [f.name for f in fields(Config)]
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=9),
    st.lists(st.text(max_size=3)),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
WORDS = st.one_of(
    st.text(max_size=9),
    st.sampled_from(NAMES).map("--{}".format),
    st.builds(
        "--{}={}".format, st.one_of(st.sampled_from(NAMES), st.text(max_size=5)), VALUES
    ),
)


@given(st.lists(WORDS, max_size=5))
def test_a_command_line_is_taken_or_refused_in_one_line(words):
    try:
        words = [word for word in words if word not in ("-h", "--help")]
        override(Config(), parse_args(words, "", "[X ...]", Config)[1])
    except InputError as e:
        assert str(e)


@given(
    st.dictionaries(
        st.one_of(st.sampled_from(NAMES), st.text(max_size=5)), VALUES, max_size=4
    )
)
def test_a_config_is_taken_or_refused(values):
    try:
        config = override(Config(), values)
    except InputError:
        return
    for name, value in values.items():
        kept = getattr(config, name)
        assert (
            kept == value or isinstance(value, str) or isinstance(kept, (tuple, float))
        ), name


NUMBERS = st.one_of(
    st.integers(-(10**9), 10**9).map(str),
    st.floats().map(str),
    st.builds("{}e{}".format, st.integers(-99, 99), st.integers(-3, 9)),
    st.sampled_from(["1_000", "1,000", "ten", "1k", "", " 5", "\u0663"]),
)


@given(name=st.sampled_from(["max_steps", "lr", "grad_accum", "seed"]), text=NUMBERS)
def test_a_number_is_exactly_what_was_typed_or_refused(name, text):
    try:
        given = parse_args([f"--{name}={text}"], "", "[X ...]", Config)[1]
        config = override(Config(), given)
    except InputError as e:
        assert name in str(e)
        return
    assert getattr(config, name) == float(text)


@given(text=st.one_of(st.text(max_size=9), st.sampled_from(["none", "None", "null"])))
def test_a_choice_is_one_of_those_offered_or_refused(text):
    try:
        config = override(Config(), parse_args([f"--dtype={text}"], "", "", Config)[1])
    except InputError as e:
        assert "dtype" in str(e)
        return
    assert config.dtype == text


def damaged(content: bytes):
    """Some bytes of a file changed, and perhaps its end cut off."""
    change = st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255))
    return st.builds(
        lambda changes, end: _change(content, changes)[:end],
        st.lists(change, max_size=8),
        st.one_of(st.just(len(content)), st.integers(0, len(content))),
    )


def _change(content: bytes, changes) -> bytes:
    changed = bytearray(content)
    for place, value in changes:
        changed[place] = value
    return bytes(changed)


def _tar() -> bytes:
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w") as tar:
        for name, content in (
            ("a.jpg", picture()),
            ("a.json", b'{"caption": "A dog"}'),
            ("b.jpg", picture()),
            ("b.txt", b"A cat"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


FIXTURES = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

KEYS = st.sampled_from(
    [
        "image",
        "image_id",
        "caption",
        "text",
        "context",
        "conversation",
        "conversations",
        "x",
    ]
)
TURNS = st.lists(
    st.one_of(
        st.dictionaries(
            st.sampled_from(("user", "assistant", "x")), st.text(max_size=5), max_size=2
        ),
        st.fixed_dictionaries(
            {
                "from": st.sampled_from(("human", "gpt", "x")),
                "value": st.text(max_size=5),
            }
        ),
    )
)
JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), TURNS
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=4)
    ),
)


@FIXTURES
@given(
    rows=st.lists(JSON, min_size=1, max_size=3),
    template=st.sampled_from(("", "vicuna", "llama2")),
)
def test_any_json_is_a_sample_or_a_bad_one(tmp_path, rows, template):
    (path := tmp_path / "rows.json").write_text(json.dumps(rows))
    samples = Samples(
        [Rows(path)],
        Config(template=template, trainable=("proj", "llama")),
        TOKENIZER,
        28,
        3,
    )
    good, faults = samples.first(9)
    assert len(good) + len(faults) == len(rows)
    for fault in faults:
        said = f"{fault.kind} {fault.message}"
        assert not re.search(r"[a-z]Error|Exception|Traceback", said), fault


@FIXTURES
@given(content=damaged(_tar()))
def test_a_damaged_tar_costs_samples_and_nothing_else(tmp_path, content):
    path = tmp_path / "0.tar"
    path.write_bytes(content)
    index_tar.cache_clear()
    try:
        source = Shards([str(path)])
    except InputError as e:
        assert "0.tar" in str(e)
        return
    samples = Samples([source], Config(), TOKENIZER, 28, 3)
    good, faults = samples.first(9)
    assert len(good) + len(faults) == sum(source.counts)


@FIXTURES
@given(
    content=damaged(
        save({"proj.weight": torch.ones(4, 3), "proj.bias": torch.ones(4)}, {"a": "{}"})
    )
)
def test_a_damaged_weight_file_is_read_or_refused(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    try:
        tensors, metadata = load_tensors(tmp_path / "x.safetensors")
    except InputError as e:
        assert "x.safetensors: " in str(e)
    else:
        assert sum(t.nbytes for t in tensors.values()) <= len(content) and isinstance(
            metadata, dict
        )


LLAMA = ROOT / "assets/tiny/llama"
# What other programs write into config.json, or add to the tensors
CONFIG_CHANGES = st.dictionaries(
    st.sampled_from(
        [
            "model_type",
            "hidden_act",
            "attention_bias",
            "mlp_bias",
            "sliding_window",
            "use_sliding_window",
            "rope_scaling",
            "rope_parameters",
            "quantization_config",
            "torch_dtype",
            "num_experts",
        ]
    ),
    st.one_of(
        VALUES,
        st.sampled_from(["gelu", "mistral", "qwen2", "qwen3", "gemma2", "phi3"]),
        st.sampled_from([{"rope_type": "yarn", "factor": 2.0}, {"type": "linear"}]),
        st.just({"quant_method": "compressed-tensors", "bits": 8}),
    ),
    max_size=2,
)
ENDINGS = ["_scale", "_scale_inv", "_zero_point", ".absmax", "_old", "_g_idx"]
CHANGED_TENSORS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from([*ENDINGS, ".bias"])),
        st.tuples(st.just("drop"), st.just("")),
        st.tuples(
            st.just("cast"),
            st.sampled_from(["int8", "uint8", "int64", "bool"]),
        ),
        st.tuples(st.just("spoil"), st.sampled_from([math.nan, math.inf])),
        st.tuples(st.just("cut"), st.integers(1, 4)),
    ),
    max_size=2,
)


def changed_tensors(tensors, changes, data):
    tensors = dict(tensors)
    for what, how in changes:
        name = data.draw(st.sampled_from(sorted(tensors)))
        tensor = tensors[name]
        if what == "add":
            base = name.removesuffix(".weight") if how == ".bias" else name
            tensors[base + how] = torch.full((len(tensor),), 0.5)
        elif what == "drop":
            del tensors[name]
        elif what == "cast":
            tensors[name] = tensor.to(getattr(torch, how))
        elif what == "spoil" and tensor.is_floating_point():
            tensors[name] = tensor.clone()
            tensors[name].flatten()[0] = how
        elif what == "cut":
            tensors[name] = tensor[how:].clone()
    return tensors


def first_logits(folder):
    llama = MiniGPT4.from_files(None, None, str(folder), dtype="float32").llama
    with torch.no_grad():
        return llama.logits(llama(llama.embed_tokens(torch.arange(3, 40)[None])))


@cache
def healthy():
    """The tiny LLaMA: config.json, tensors, logits."""
    config = json.loads((LLAMA / "config.json").read_text())
    tensors, _ = load_tensors(LLAMA / "model.safetensors")
    return config, {k: v.clone() for k, v in tensors.items()}, first_logits(LLAMA)


@FIXTURES
@given(config=CONFIG_CHANGES, changes=CHANGED_TENSORS, data=st.data())
def test_foreign_weights_are_computed_right_or_refused(tmp_path, config, changes, data):
    original, tensors, logits = healthy()
    (tmp_path / "config.json").write_text(json.dumps(original | config))
    tensors = changed_tensors(tensors, changes, data)
    (tmp_path / "model.safetensors").write_bytes(save(tensors))
    shutil.copy(LLAMA / "tokenizer.model", tmp_path)
    try:
        assert torch.equal(first_logits(tmp_path), logits)
    except InputError as e:
        assert "\n" not in str(e)


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(sum),
    st.integers(0, 2**31),
    st.integers(1, 9),
    st.integers(0, 3),
)
def test_an_epoch_holds_each_sample_once(counts, seed, window, epoch):
    n = sum(counts)
    source = type("Source", (), {"counts": counts})()

    def draw(first, n):
        draws = range(first, first + n)
        return [
            tuple(place) for place in draw_samples(source, (seed, 0), window, draws)
        ]

    drawn = draw(epoch * n, n)
    assert sorted(drawn) == [
        (shard, row) for shard, count in enumerate(counts) for row in range(count)
    ]
    assert [draw(epoch * n + i, 1)[0] for i in reversed(range(n))] == drawn[::-1]


@pytest.fixture(scope="module")
def tiny():
    return chat.load(chat.Options(device="cpu"))


@example(
    ids=[0, 375, 375], end="###"
)  # "\u2047 #", then "###": the space before it is no part of the answer
@given(
    ids=st.lists(st.integers(0, 511), min_size=1, max_size=40),
    end=st.sampled_from(["###", END, "STOP"]),
)
def test_the_pieces_of_an_answer_are_the_answer(tiny, ids, end):
    model, options = tiny
    talk = chat.Chat(model, replace(options, max_new_tokens=len(ids)))
    talk.template = SimpleNamespace(**vars(talk.template) | {"end": end})
    stop, given_ids = stop_sequences(model.tokenizer, end), []
    for token in ids:
        given_ids.append(token)
        if is_end(given_ids, stop):
            break
    original, model.generate = model.generate, lambda *args, **kwargs: iter(given_ids)
    try:
        pieces = list(talk.ask("Hi"))
    finally:
        model.generate = original
    assert "".join(pieces) == talk.turns[-1].answer
    assert end == END or end not in talk.turns[-1].answer
    assert talk.turns[-1].ended == is_end(given_ids, stop)
