"""Token layout and targets, the order of the samples, batches, bad samples."""

import io
import json
import os
import re
import tarfile
import time
from collections import Counter
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from PIL import Image

from configs.prompts import (
    END,
    IMAGE,
    SYSTEM,
    TEMPLATES,
    chat_segments,
    encode_segments,
    stop_sequences,
    user_message,
)
from configs.schema import Config
from data import (
    Samples,
    TrainingSteps,
    clean_caption,
    collate,
    draw_samples,
    open_samples,
    precompute_features,
)
from llama import IGNORE
from plumbing.console import InputError
from plumbing.sources import RECENT, BadSample, Sample, Source, open_source
from tests.common import TOKENIZER
from tests.samples import BOS, EOS, LLAMA2, VICUNA, N, layout, picture, write_tar

CAPTION, TURN = Sample([""], "A Dog!"), Sample([""], turns=[("Hi", "A dog.")])

TALK = Sample(turns=[("Hi", "A dog."), ("And?", "A cat.")])

# ---- tokens and targets --------------------------------------------------------------


@pytest.mark.parametrize(
    "sample, settings, expected",
    [  # each text is one segment; sets are predicted
        (CAPTION, {}, [BOS, IMAGE, {"A Dog!\n"}]),  # stage 1
        (CAPTION, {"clean_captions": True}, [BOS, IMAGE, {"a dog\n"}]),
        (
            TURN,
            VICUNA,
            [BOS, "###Human: <Img>", IMAGE, "</Img> Hi ###Assistant: ", {"A dog.###"}],
        ),
        (
            TURN,
            LLAMA2,
            [BOS, "[INST] <Img>", IMAGE, "</Img> Hi [/INST] ", {"A dog.</s>"}],
        ),
        (
            TURN,
            LLAMA2 | {"end_sym": "###"},
            [BOS, "[INST] <Img>", IMAGE, "</Img> Hi [/INST] ", {"A dog.###"}],
        ),
        (
            TALK,
            VICUNA,
            [
                BOS,
                "###Human: Hi ###Assistant: ",
                {"A dog.###"},
                "Human: And? ###Assistant: ",
                {"A cat.###"},
            ],
        ),
        (TALK, {}, [BOS, "Hi", {"A dog.\n"}, "And?", {"A cat.\n"}]),
        (
            Sample(turns=TALK.turns[:1]),
            VICUNA | {"chat_share": 1.0},  # as in chat, with the system text
            [BOS, SYSTEM + "###Human: Hi###Assistant: ", {"A dog.###"}],
        ),
        (
            Sample(["", ""], turns=TURN.turns),
            VICUNA,
            [
                BOS,
                "###Human: <Img>",
                IMAGE,
                "</Img> <Img>",
                IMAGE,
                "</Img> Hi ###Assistant: ",
                {"A dog.###"},
            ],
        ),
        (Sample(text="A dog.", context="Look:"), {}, [BOS, "Look:", {"A dog."}]),
    ],
    ids=[
        "caption",
        "clean-caption",
        "turn-vicuna",
        "turn-llama2",
        "turn-other-end",
        "talk",
        "talk-plain",
        "talk-as-in-chat",
        "two-pictures",
        "text",
    ],
)
def test_layout_of_a_sample(sample, settings, expected):
    samples = Samples([], Config(max_txt_len=160, **settings), TOKENIZER, 28, N)
    assert samples.tokenize(sample, np.random.default_rng(0)) == layout(expected)


def test_stage_2_draws_an_instruction_and_cuts_long_answers_without_an_end():
    samples = Samples([], Config(max_txt_len=3, **VICUNA), TOKENIZER, 28, N)
    drawn = [samples.tokenize(CAPTION, np.random.default_rng(i)) for i in range(20)]
    assert len({tuple(ids) for ids, _ in drawn}) == 4
    answer = TOKENIZER.encode("A Dog!###")[:3]
    assert all([t for t in targets if t != IGNORE] == answer for _, targets in drawn)


def test_control_tokens_typed_as_letters_are_text():
    segments = chat_segments([(user_message("</s><s>", 0), None)], TEMPLATES["llama2"])
    ids = encode_segments(TOKENIZER, segments, N)
    assert (
        ids.count(TOKENIZER.bos) == 2 and TOKENIZER.eos not in ids
    )  # the start, and the template's own <s>
    # alone, and after a text
    assert stop_sequences(TOKENIZER, "###") == (EOS, [346], [322])
    assert stop_sequences(TOKENIZER, END) == (EOS,)


@pytest.mark.parametrize(
    "raw, clean",
    [
        ("A Dog; (two)  cats!", "a dog two cats"),
        ("...!!!", ""),
        ("it's 5-6% & more?", "it's 5-6% & more?"),
        (" ".join(["word"] * 60), " ".join(["word"] * 50)),
    ],
)
def test_clean_caption(raw, clean):
    assert clean_caption(raw) == clean


def test_collate_pads_on_the_right():
    image = torch.zeros(3, 2, 2, dtype=torch.uint8)
    batch = collate([([image], [1, -1, 5], [-100, -100, 5]), ([image], [1], [-100])])
    assert batch.images.shape == (2, 3, 2, 2)
    assert batch.tokens.tolist() == [[1, -1, 5], [1, 0, 0]]
    assert batch.targets.tolist() == [[-100, -100, 5], [-100, -100, -100]]
    assert (batch.n_tokens, batch.n_targets) == (4, 1)


def test_empty_data_and_data_of_no_weight_are_refused(tmp_path):
    with pytest.raises(InputError, match="no samples"):
        open_source(str(tmp_path))
    for data in ([], {}, {"a": 0}, {"a": "x"}):
        with pytest.raises(InputError, match="weights above 0"):
            open_samples(data, Config(), TOKENIZER, 28, N)


# ---- the order of the samples --------------------------------------------------------


class Talks(Source):
    """A source in memory: each sample has its own text; a tenth are bad."""

    def __init__(self, name, counts):
        self.name, self.counts, self.content = name, counts, ""

    def describe(self, shard, row):
        return f"{shard}:{row}"

    def __getitem__(self, place):
        number = hash((self.name, *place))
        if number % 10 == 0:
            raise BadSample("bad")
        return Sample(turns=[("Say it.", f"{self.name} {place}" + " w" * (number % 6))])


class Vanishing(Talks):
    """A source of good samples, until it is gone."""

    is_gone = False

    def __getitem__(self, place):
        if self.is_gone:
            raise BadSample("gone")
        return Sample(turns=[("Say it.", str(place))])


SHAPES = [pytest.param(seed, marks=pytest.mark.slow) for seed in range(6, 24)]


@pytest.fixture(params=[*range(6), *SHAPES])
def shape(request):
    """A random run: (samples, weights, config, size of a global batch, generator)."""
    rng = np.random.default_rng(request.param)
    counts = [
        [1, *rng.integers(0, 12, rng.integers(6)).tolist()]
        for _ in range(rng.integers(1, 4))
    ]
    config = Config(
        trainable=("llama",),
        chat_share=0.5,
        max_bad_fraction=1.0,
        num_workers=0,
        seed=int(rng.integers(99)),
        **VICUNA,
        max_steps=int(rng.integers(5, 30)),
        length_group=int(rng.integers(1, 5)),
        shuffle_shards=int(rng.integers(1, 5)),
    )
    samples = Samples(
        [Talks(i, c) for i, c in enumerate(counts)], config, TOKENIZER, 0, 0
    )
    weights = dict(zip("abc", rng.uniform(0.1, 1, len(counts))))
    return samples, weights, config, int(rng.choice([4, 6, 8, 12, 24])), rng


def ranks(shape, world, batch_size, grad_accum):
    """The TrainingSteps of every rank of the run."""
    config = Config(
        **vars(shape[2]) | {"batch_size": batch_size, "grad_accum": grad_accum}
    )
    return [TrainingSteps(*shape[:2], config, rank, world) for rank in range(world)]


def rows(batches):
    """The token ids of the batches' samples."""
    found = [row for batch in batches for row in batch.tokens.tolist()]
    return [tuple(i for i in row if i) for row in found if any(row)]


def global_batches(runs):
    """[step] -> (source, the token ids of all samples of all ranks, sorted)."""
    found = []
    for group in range(len(runs[0].source_of_group)):
        for shares in zip(*(run[group][0] for run in runs)):
            texts = [row for batches in shares for row in rows(batches)]
            found.append((runs[0].source_of_group[group], sorted(texts)))
    return found


def test_a_global_batch_depends_on_the_product_of_processes_batch_size_and_grad_accum(
    shape,
):
    samples, _, config, n, rng = shape
    (one,) = ranks(shape, 1, n, 1)
    wanted = global_batches([one])
    ways = [
        (a, b, n // a // b)
        for a in range(1, n + 1)
        for b in range(1, n + 1)
        if n % (a * b) == 0
    ]
    for way in rng.permutation(ways)[:4].tolist():
        assert global_batches(ranks(shape, *way)) == wanted, way
    # sorting by length keeps a group's samples
    for group in range(len(one.source_of_group)):
        drawn = [samples[key] for key in one.keys(group)]
        good = [tuple(each.ids) for each in drawn if each]
        first = group * config.length_group
        steps = wanted[first : first + config.length_group]
        given = [row for _, texts in steps for row in texts]
        assert sorted(given) == sorted(good)


def test_several_processes_count_each_sample_once(shape):
    (one,) = ranks(shape, 1, shape[3], 1)
    runs = ranks(shape, 2, shape[3] // 2, 1)
    for group in range(len(one.source_of_group)):
        _, n_read, faults = one[group]
        shares = [run[group] for run in runs]
        assert n_read == sum(n for _, n, _ in shares) == len(one.keys(group))
        assert sorted(faults) == sorted(f for share in shares for f in share[2])


def test_each_sample_comes_once_per_epoch_of_its_source(shape):
    (steps,) = ranks(shape, 1, shape[3], 1)
    drawn = [
        key for group in range(len(steps.source_of_group)) for key in steps.keys(group)
    ]
    for i, source in enumerate(shape[0].sources):
        order, n = [key[1:3] for key in drawn if key.source == i], sum(source.counts)
        for epoch in (order[at : at + n] for at in range(0, len(order), n)):
            assert len(set(epoch)) == len(epoch) and all(
                row < source.counts[shard] for shard, row in epoch
            )


def test_the_steps_from_k_on_are_those_of_an_unbroken_run(shape):
    steps = ranks(shape, 2, shape[3] // 2, 1)[int(shape[-1].integers(2))]
    unbroken = [(*step, rows(batches)) for *step, batches in steps.read()]
    assert [step for step, _, _ in unbroken] == list(range(1, shape[2].max_steps + 1))
    for k in shape[-1].integers(1, len(unbroken), 3).tolist():
        resumed = [(*step, rows(batches)) for *step, batches in steps.read(k)]
        assert resumed == unbroken[k - 1 :]


def test_a_step_is_described_by_the_places_of_its_samples(shape):
    (steps,) = ranks(shape, 1, shape[3], 1)
    for step, _, batches in steps.read():
        places = steps.describe(step)
        assert len(places) >= len(rows(batches))
        texts = [TOKENIZER.decode(list(row)) for row in rows(batches)]
        for text in texts:  # "... 0 (1, 2) w w": source 0, shard 1, row 2
            shard, row = re.search(r" \((\d+), (\d+)\)", text).groups()
            assert f"{shard}:{row}" in places


def draw(counts, n, seed=(1, 0), window=2, first=0):
    draws = range(first, first + n)
    return list(draw_samples(Talks(0, counts), seed, window, draws))


def test_each_epoch_is_shuffled_differently_within_windows_of_shards():
    both = draw([10] * 8, 160)
    first, second = both[:80], both[80:]
    windows = [
        [{shard for shard, _ in epoch[at : at + 20]} for at in range(0, 80, 20)]
        for epoch in (first, second)
    ]
    assert sorted(first) == sorted(second) and windows[0] != windows[1]
    assert all(len(window) == 2 for window in windows[0] + windows[1])


def test_the_order_is_the_same_in_all_versions():
    """Otherwise runs that were begun before could not be continued."""
    assert draw([3, 1, 2], 8) == [
        [0, 0],
        [0, 1],
        [0, 2],
        [1, 0],
        [2, 1],
        [2, 0],
        [0, 0],
        [0, 2],
    ]
    steps = TrainingSteps(
        Samples([Talks(0, [5]), Talks(1, [5])], Config(), TOKENIZER, 28, N),
        {"a": 1, "b": 1},
        Config(max_steps=12, batch_size=1),
    )
    assert steps.source_of_group == [1, 0, 1, 1, 0, 1, 1, 1, 0, 0, 0, 1]


def test_the_mixture_is_drawn_by_weight():
    samples = Samples([Talks(0, [1000]), Talks(1, [1000])], Config(), TOKENIZER, 28, N)
    weights = {"a": 115, "b": 14}
    for length_group in (1, 4):
        config = Config(max_steps=100_000 * length_group, length_group=length_group)
        drawn = TrainingSteps(samples, weights, config).source_of_group
        assert len(drawn) == 100_000
        assert abs(np.mean(drawn) - 14 / 129) < 0.01 * 14 / 129


def test_only_a_run_whose_order_has_changed_says_so():
    samples = Samples([Talks(0, [9]), Talks(1, [9])], Config(), TOKENIZER, 28, N)
    for weights, length_group, is_new in (
        ({"a": 1}, 4, False),
        ({"a": 1, "b": 1}, 1, False),
        ({"a": 1, "b": 1}, 4, True),
    ):
        config = Config(length_group=length_group)
        steps = TrainingSteps(samples, weights, config)
        assert ("order of samples" in steps.identity) == is_new


# ---- reading -------------------------------------------------------------------------


def reader(data, **settings):
    config = Config(
        **dict(batch_size=2, num_workers=0, length_group=4, shuffle_shards=3) | settings
    )
    samples, weights = open_samples(data, config, TOKENIZER, 28, N)
    return TrainingSteps(samples, weights, config)


def take(steps, n, start=1):
    """The first n batches."""
    return [batch for _, (_, _, (batch,)) in zip(range(n), steps.read(start))]


def names(batches):
    """Which samples the batches hold, by the first words of their captions."""
    texts = [
        TOKENIZER.decode([t for t in row if t != IGNORE])
        for b in batches
        for row in b.targets.tolist()
    ]
    return [text.split()[0] for text in texts]


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(tmp_path, workers):
    mixed = {f"{tmp_path}/a": 3, f"{tmp_path}/b": 1}
    for shard in range(3):
        write_tar(
            tmp_path / f"a/{shard}.tar",
            [f"a{shard}.{i}" + " w" * (i % 6) for i in range(20)],
        )
    write_tar(tmp_path / "b/0.tar", [f"b{i}" for i in range(30)])
    for a, b in zip(
        take(reader(mixed, num_workers=workers), 60), take(reader(mixed), 60)
    ):
        assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_length_groups_hold_the_same_samples_with_less_padding(tmp_path):
    write_tar(tmp_path / "0.tar", [f"n{i}" + " w" * (i % 6) for i in range(140)])
    grouped, drawn = (
        take(reader(str(tmp_path), batch_size=5, length_group=n), 28) for n in (28, 1)
    )
    assert (
        sorted(names(grouped)) == sorted(names(drawn)) and len(set(names(drawn))) == 140
    )
    padding = [
        sum(b.tokens.numel() - b.n_tokens for b in batches)
        for batches in (grouped, drawn)
    ]
    assert padding[0] < 0.2 * padding[1]


@pytest.mark.slow
def test_resuming_far_into_ten_thousand_shards_reads_only_what_comes_next(tmp_path):
    write_tar(tmp_path / "one.tar", [str(i) for i in range(1000)])
    (tmp_path / "many").mkdir()
    shards = [f"{i:05d}.tar" for i in range(10_000)]
    for name in shards:
        (tmp_path / "many" / name).symlink_to(tmp_path / "one.tar")
    (tmp_path / "many/index.json").write_text(
        json.dumps({"samples": dict.fromkeys(shards, 1000)})
    )
    start = time.perf_counter()
    steps = reader(f"{tmp_path}/many", batch_size=64, length_group=8, shuffle_shards=8)
    take(steps, 1, start=15_626)
    assert time.perf_counter() - start < 10


# ---- bad samples ---------------------------------------------------------------------


@pytest.mark.slow
def test_a_tenth_of_bad_samples_is_left_out_counted_and_named_once(tmp_path, capfd):
    """2,400 samples, 240 broken in 12 ways; all good ones arrive, once."""
    ways = [
        ({"jpg": picture(size=(200, 200))[:300]}, "unreadable file"),
        ({"jpg": b"<html>404</html>"}, "not a picture"),
        ({"jpg": bytes(range(256)) * 4}, "not a picture"),
        ({"jpg": b""}, "no picture"),
        ({"jpg": picture("L", (1, 1), "PNG")}, "unreadable file"),
        ({"jpg": picture("1", (14_000, 14_000), "PNG")}, "unreadable file"),
        ({"json": b""}, "no caption"),
        ({"json": None}, "no caption"),
        ({"json": b'{"caption": "a d'}, "not valid JSON"),
        ({"json": b'{"url": "x"}'}, "caption is not a text"),
        ({"json": b'{"caption": 7}'}, "caption is not a text"),
        ({"json": b'{"caption": null}'}, "caption is not a text"),
    ]
    causes, members, good = Counter(), {}, []
    for i in range(2400):
        sample = {"jpg": picture(), "json": json.dumps({"caption": f"n{i}"}).encode()}
        if i % 10 == 3:
            changed, cause = ways[i // 10 % 12]
            sample, causes[cause] = sample | changed, causes[cause] + 1
        else:
            good.append(f"n{i}")
        members |= {
            f"{i:05d}.{k}": content
            for k, content in sample.items()
            if content is not None
        }
    write_tar(tmp_path / "00000.tar", [], **members)
    it = reader(str(tmp_path), batch_size=10, num_workers=2, max_bad_fraction=0.2)
    assert sorted(names(take(it, 240))) == sorted(good)
    assert (
        it.account.skipped == causes
        and causes.total() == 240
        and it.account.n_read == 2400
    )
    said = [
        line
        for line in capfd.readouterr().err.splitlines()
        if "first of its kind" in line
    ]
    assert len(said) == len(causes) and all(".tar:" in line for line in said)
    assert "240 of 2400 samples cannot be used" in it.account.text


def test_damaged_and_unreadable_shards_cost_only_what_is_lost(tmp_path):
    for name in ("0", "1"):
        write_tar(tmp_path / f"{name}.tar", [f"n{i}" for i in range(50)])
    whole = (tmp_path / "0.tar").read_bytes()
    with tarfile.open(tmp_path / "0.tar") as tar:
        middle = tar.getmember("n25.jpg").offset
    (tmp_path / "0.tar").write_bytes(
        whole[:middle] + b"\xff" * 512 + whole[middle + 512 :]
    )
    (tmp_path / "1.tar").write_bytes(whole[: middle + 600])
    (tmp_path / "2.tar").write_text("<html>404</html>")
    (tmp_path / "index.json").write_text(
        json.dumps({"samples": {"0.tar": 50, "1.tar": 50, "2.tar": 50}})
    )
    it = reader(str(tmp_path), batch_size=10, length_group=15, max_bad_fraction=1.0)
    assert len(names(take(it, 15))) == 49 + 25 and it.account.skipped.total() == 26 + 50


def test_too_many_bad_samples_stop_the_run(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        map(str, range(300)),
        **{f"{i}.jpg": b"x" for i in range(0, 300, 4)},
    )
    with pytest.raises(
        InputError,
        match=r"cannot be used \(not a picture \d+\), more than max_bad",
    ):
        take(reader(str(tmp_path), batch_size=10), 40)


def test_a_batch_without_a_good_sample_is_empty(tmp_path):
    write_tar(
        tmp_path / "a/a.tar",
        [f"n{i}" for i in range(20)],
        **{"n0.jpg": b"x", "n10.jpg": b"x"},
    )
    batches = take(reader(f"{tmp_path}/a", batch_size=1, length_group=1), 20)
    empty = [batch for batch in batches if not batch.n_targets]
    good = [batch for batch in batches if batch.n_targets]
    assert sorted(names(good)) == sorted(f"n{i}" for i in range(20) if i % 10)
    assert len(empty) == 2
    for images, tokens, targets in empty:
        assert images is None and tokens.tolist() == [[0]]
        assert targets.tolist() == [[IGNORE]]


def test_data_without_one_good_sample_stop_the_run_at_once(tmp_path):
    write_tar(tmp_path / "b.tar", ["n0", "n1"], **{"n0.jpg": b"x", "n1.jpg": b"x"})
    steps = reader(str(tmp_path), batch_size=1, max_bad_fraction=1.0)
    with pytest.raises(InputError, match="not one sample of the data can be used"):
        take(steps, 1)


@pytest.mark.slow
@pytest.mark.parametrize("n_sources", [1, 2])
def test_a_source_that_vanishes_late_is_noticed_soon(n_sources):
    """After 20,000 good samples; the share of bad ones in all is then still small."""
    config = Config(
        trainable=("llama",), batch_size=50, max_steps=1000, num_workers=0, **VICUNA
    )
    sources = [Vanishing(i, [10_000]) for i in range(n_sources)]
    samples = Samples(sources, config, TOKENIZER, 0, 0)
    weights = dict(zip("ab"[:n_sources], (20, 1)))
    steps = TrainingSteps(samples, weights, config)
    seen = []
    with pytest.raises(InputError, match="of the last 1000 samples of .* cannot be us"):
        for step, source, _ in steps.read():
            seen.append(source)
            sources[-1].is_gone = step >= 400
    n_drawn = 50 * sum(source == n_sources - 1 for source in seen[400:])
    assert n_drawn <= 0.55 * RECENT


@pytest.mark.slow
def test_many_bad_samples_below_the_limit_do_not_stop_a_run():
    config = Config(
        trainable=("llama",), batch_size=50, max_steps=200, num_workers=0, **VICUNA
    )
    config = replace(config, max_bad_fraction=0.2)
    samples = Samples([Talks(0, [5000])], config, TOKENIZER, 0, 0)
    steps = TrainingSteps(samples, {"a": 1}, config)
    assert len(list(steps.read())) == 200 and steps.account.n_read == 10_000
    assert 500 < steps.account.skipped["bad"] < 1500


def test_a_mistake_in_the_code_is_no_bad_sample(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", ["n0"])
    samples, _ = open_samples(str(tmp_path), Config(), TOKENIZER, 28, N)
    (key,) = samples.all_keys()
    for name in ("harmless", "encode_segments", "load_image"):
        with monkeypatch.context() as patch:
            patch.setattr(f"data.{name}", lambda *args, **settings: {}["typo"])
            with pytest.raises(KeyError, match="typo"):
                samples.read(key)


@pytest.mark.parametrize(
    "line",
    [
        '{"text": 5}',
        '{"image": "a.jpg", "caption": "\\ud800"}',
        "[" * 100_000,
        "not json",
        '{"img": "a.jpg", "caption": "A dog."}',
        '{"image": "a.jpg", "caption": ""}',
        '{"image": "none.jpg", "caption": "A dog."}',
        "[1]",
        '{"conversation": []}',
        '{"image": "a.jpg", "text": "A dog."}',
        '{"text": "A dog.", "context": 5}',
        '{"conversation": [{"assistant": "Hi"}]}',
        '{"image": "a.jpg", "conversation": [{"user": "Hi"}, {"assistant": "Hi"}]}',
    ],
)
def test_any_odd_line_of_a_jsonl_is_one_bad_sample(tmp_path, capsys, line):
    (tmp_path / "a.jpg").write_bytes(picture())
    path = tmp_path / "own.jsonl"
    path.write_text(
        f'\n\n{{"image": "a.jpg", "caption": "A dog.", "text": null}}\n{line}\n'
    )
    it = reader(str(path), length_group=1)
    assert names(take(it, 1)) == ["A"] and it.account.skipped.total() == 1
    assert "own.jsonl, line 4 (" in capsys.readouterr().err


def test_a_short_run_of_bad_samples_alone_stops(tmp_path, monkeypatch):
    rows = [{"image": "none.jpg", "caption": "a"}] * 40 + [
        {"image": "a.jpg", "caption": "a"}
    ]
    (tmp_path / "a.jpg").write_bytes(picture())
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    steps = reader(str(tmp_path / "a.jsonl"), batch_size=2, length_group=1, max_steps=4)
    monkeypatch.setattr(
        "data.draw_samples", lambda *args: [(0, row) for row in args[-1]]
    )
    with pytest.raises(InputError, match="8 of 8 samples cannot be used"):
        list(steps.read())


def test_control_characters_of_names_are_shown_as_codes(tmp_path, capsys):
    write_tar(
        tmp_path / "0.tar", ["a"], **{"\x1b[2J.jpg": b"no picture", "\x1b[2J.txt": b"b"}
    )
    steps = reader(str(tmp_path), length_group=1, max_steps=2, max_bad_fraction=1.0)
    list(steps.read())
    message = capsys.readouterr().err
    assert "\\x1b[2J" in message and "\x1b" not in message


# ---- held-out samples, cached features -----------------------------------------------


def pictures_of_colors(path, n, first=0):
    """n samples "c<i>" whose picture is gray, i bright."""
    members = {}
    for i in range(first, first + n):
        buffer = io.BytesIO()
        Image.new("L", (8, 8), i).save(buffer, "PNG")
        members |= {f"{i:03d}.png": buffer.getvalue(), f"{i:03d}.txt": b"c%d" % i}
    write_tar(path, [], **members)


def test_the_first_samples_are_taken_from_all_sources_in_turn(tmp_path):
    pictures_of_colors(tmp_path / "a/0.tar", 4)
    pictures_of_colors(tmp_path / "b/0.tar", 2, 100)
    pictures_of_colors(tmp_path / "c/0.tar", 3, 200)
    paths = [f"{tmp_path}/{name}" for name in "abc"]
    samples, _ = open_samples(paths, Config(), TOKENIZER, 28, N)
    good, faults = samples.first(7)
    assert names([collate(good)]) == ["c0", "c100", "c200", "c1", "c101", "c201", "c2"]
    assert faults == [] and samples.first(0) == ([], [])
    assert len(samples.first(100)[0]) == 9


def test_bad_samples_before_the_first_good_ones_are_reported(tmp_path):
    write_tar(tmp_path / "a.tar", ["n0", "n1", "n2"], **{"n1.jpg": b"x"})
    samples, _ = open_samples(str(tmp_path), Config(), TOKENIZER, 28, N)
    good, (fault,) = samples.first(2)
    assert names([collate(good)]) == ["n0", "n2"]
    assert fault.kind == "not a picture" and "a.tar:n1 (" in fault.message


def encode(images):
    """Features (B, 2, 3) that tell the brightness of each picture."""
    assert images.dtype == torch.uint8
    return images[:, :, 0, 0].float().unsqueeze(1).repeat(1, 2, 1)


@pytest.mark.parametrize("n_workers", [0, 2])
def test_each_sample_gets_the_features_of_its_own_pictures(tmp_path, n_workers):
    pictures_of_colors(tmp_path / "a/0.tar", 7)
    pictures_of_colors(tmp_path / "a/1.tar", 5, 50)
    lines = [
        {"image": ["g9.png", "g8.png"], "conversation": turn("both")},
        {"image": "none.png", "conversation": turn("none")},
        {"conversation": turn("text")},
        {"image": "g7.png", "conversation": turn("one")},
    ]
    for i in (7, 8, 9):
        Image.new("L", (8, 8), 100 + i).save(tmp_path / f"g{i}.png")
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = Config(
        trainable=("proj", "llama"), batch_size=3, num_workers=n_workers, **VICUNA
    )
    paths = [f"{tmp_path}/a", f"{tmp_path}/own.jsonl"]
    samples, weights = open_samples(paths, config, TOKENIZER, 8, N)
    precompute_features(samples, encode, config, "cpu")
    assert samples.features.shape == (15, 2, 3)
    good, (fault,) = samples.first(100)
    assert fault.kind == "missing file" or "picture" in fault.kind
    brightness = {}
    for images, _, targets in good:
        text = TOKENIZER.decode([t for t in targets if t != IGNORE])
        brightness[text.split("###")[0]] = [image.unique().tolist() for image in images]
    wanted = {f"c{i}": [[float(i)]] for i in (*range(7), *range(50, 55))}
    assert brightness == wanted | {"both": [[109.0], [108.0]], "one": [[107.0]]} | {
        "text": []
    }
    config = replace(config, max_steps=12, batch_size=2, length_group=2)
    for _, _, (batch,) in TrainingSteps(samples, weights, config).read():
        assert batch.images is None or batch.images.shape[1:] == (2, 3)


def turn(answer):
    return [{"user": "Hi"}, {"assistant": answer}]


def test_workers_get_all_features_by_one_file_descriptor(tmp_path):
    """Python 3.14 sends them to each worker; a system has a limit of descriptors."""
    pictures_of_colors(tmp_path / "0.tar", 200)
    config = Config(num_workers=0)
    samples, _ = open_samples(str(tmp_path), config, TOKENIZER, 8, N)
    precompute_features(samples, encode, config, "cpu")
    before = len(os.listdir("/proc/self/fd"))
    sent = ForkingPickler.dumps(samples)
    assert len(os.listdir("/proc/self/fd")) <= before + 4
    assert len(sent) < 100_000


def test_two_processes_share_the_features_that_each_computes(tmp_path, monkeypatch):
    pictures_of_colors(tmp_path / "0.tar", 5)
    shares, counts = {}, {}
    for rank in (1, 0):
        config = Config(num_workers=0, batch_size=2)
        samples, _ = open_samples(str(tmp_path), config, TOKENIZER, 8, N)

        def gather(share, rank=rank):
            shares[rank] = share
            counts[rank] = sum(len(tensor) for tensor in share[1])
            return [shares.get(0, share), shares.get(1, share)]

        monkeypatch.setattr("data.process_rank", lambda rank=rank: rank)
        monkeypatch.setattr("data.n_processes", lambda: 2)
        monkeypatch.setattr("data.gather", gather)
        precompute_features(samples, encode, config, "cpu")
    assert counts == {0: 3, 1: 2} and len(samples.features) == 5
    good, faults = samples.first(100)
    assert [images[0].mean().item() for images, _, _ in good] == [0, 1, 2, 3, 4]
    assert faults == []
