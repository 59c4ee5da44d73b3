"""Random command lines, configs, damaged files and ids of answers: nothing breaks."""

import io
import json
import tarfile
from dataclasses import fields, replace
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
from plumbing.console import InputError
from plumbing.options import override, parse_args
from plumbing.sources import Rows, Shards, index_tar
from plumbing.weights import load_tensors
from tests.common import GOLDEN
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
