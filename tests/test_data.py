"""What the model is fed: token layout and targets, sources, the order of the samples, bad samples."""

import json
import tarfile
import time
from collections import Counter

import numpy as np
import pytest
import torch

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
    Groups,
    Reader,
    SampleOrder,
    Samples,
    clean_caption,
    collate,
    open_samples,
)
from llama import IGNORE
from plumbing.console import InputError
from plumbing.sources import BadSample, Sample, open_source
from tests.common import TOKENIZER
from tests.samples import BOS, EOS, LLAMA2, VICUNA, N, layout, picture, write_tar

CAPTION, TURN = Sample([""], "A Dog!"), Sample([""], turns=[("Hi", "A dog.")])

TALK = Sample(turns=[("Hi", "A dog."), ("And?", "A cat.")])

# ---- tokens and targets ------------------------------------------------------------------------------------


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


# ---- the order of the samples ------------------------------------------------------------------------------


class Talks:
    """A source in memory; each sample has its own text, of any length, and a tenth are bad."""

    def __init__(self, name, counts):
        self.name, self.counts, self.content = name, counts, ""

    def describe(self, shard, row):
        return f"{shard}:{row}"

    def __getitem__(self, place):
        number = hash((self.name, *place))
        if number % 10 == 0:
            raise BadSample("bad")
        return Sample(turns=[("Say it.", f"{self.name} {place}" + " w" * (number % 6))])


@pytest.fixture(params=range(24))
def shape(request):
    """A random run: (samples, weights, config, processes x batch_size x grad_accum, generator)."""
    rng = np.random.default_rng(request.param)
    counts = [
        [1, *rng.integers(0, 12, rng.integers(6)).tolist()]
        for _ in range(rng.integers(1, 4))
    ]
    config = Config(
        trainable=("llama",),
        chat_share=0.5,
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
    """The Groups of every rank of the run."""
    config = Config(
        **vars(shape[2]) | {"batch_size": batch_size, "grad_accum": grad_accum}
    )
    return [Groups(*shape[:2], config, rank, world) for rank in range(world)]


def rows(batches):
    """The token ids of the batches' samples."""
    return [
        tuple(i for i in row if i)
        for batch in batches
        if batch
        for row in batch.tokens.tolist()
    ]


def global_batches(groups):
    """[step] -> (source, the token ids of all samples of all ranks, sorted)."""
    for g in range(len(groups[0])):
        for shares in zip(*(rank[g][0] for rank in groups)):
            (source,) = {source for source, _ in shares}
            yield source, sorted(row for _, batches in shares for row in rows(batches))


def test_a_global_batch_depends_on_the_product_of_processes_batch_size_and_grad_accum(
    shape,
):
    samples, _, config, n, rng = shape
    (one,) = ranks(shape, 1, n, 1)
    wanted = list(global_batches([one]))
    ways = [
        (a, b, n // a // b)
        for a in range(1, n + 1)
        for b in range(1, n + 1)
        if n % (a * b) == 0
    ]
    for way in rng.permutation(ways)[:4].tolist():
        assert list(global_batches(ranks(shape, *way))) == wanted, way
    for first in range(
        0, len(wanted), config.length_group
    ):  # sorting by length keeps a group's samples
        steps = range(first, first + config.length_group)
        drawn = [
            sample
            for step in steps
            for key in one.keys(step)
            if (sample := samples[key])
        ]
        given = [row for step in steps for row in wanted[step][1]]
        assert sorted(given) == sorted(tuple(ids) for _, ids, _ in drawn)


def test_each_sample_comes_once_per_epoch_of_its_source(shape):
    (groups,) = ranks(shape, 1, shape[3], 1)
    drawn = [key for step in range(len(groups.sources)) for key in groups.keys(step)]
    for i, source in enumerate(shape[0].sources):
        order, n = [key[1:3] for key in drawn if key.source == i], sum(source.counts)
        for epoch in (order[at : at + n] for at in range(0, len(order), n)):
            assert len(set(epoch)) == len(epoch) and all(
                row < source.counts[shard] for shard, row in epoch
            )


def test_a_reader_from_step_k_gives_what_an_unbroken_one_gives(shape):
    groups = ranks(shape, 2, shape[3] // 2, 1)[int(shape[-1].integers(2))]
    unbroken = [(source, rows(batches)) for source, batches in Reader(groups)]
    for k in shape[-1].integers(0, len(unbroken), 3).tolist():
        assert [
            (source, rows(batches)) for source, batches in Reader(groups, k)
        ] == unbroken[k:]


def test_each_epoch_is_shuffled_differently_within_windows_of_shards():
    order = SampleOrder([10] * 8, 1, 0, window=2)
    first, second = ([order[epoch * 80 + i] for i in range(80)] for epoch in (0, 1))
    windows = [
        [{shard for shard, _ in epoch[at : at + 20]} for at in range(0, 80, 20)]
        for epoch in (first, second)
    ]
    assert sorted(first) == sorted(second) and windows[0] != windows[1]
    assert all(len(window) == 2 for window in windows[0] + windows[1])


def test_the_mixture_is_drawn_by_weight():
    samples = Samples([Talks(0, [1000]), Talks(1, [1000])], Config(), TOKENIZER, 28, N)
    drawn = Groups(samples, {"a": 115, "b": 14}, Config(max_steps=100_000)).sources
    assert abs(np.mean(drawn) - 14 / 129) < 0.01 * 14 / 129


# ---- reading -----------------------------------------------------------------------------------------------


def reader(data, start=0, **settings):
    config = Config(
        **dict(batch_size=2, num_workers=0, length_group=4, shuffle_shards=3) | settings
    )
    samples, weights = open_samples(data, config, TOKENIZER, 28, N)
    return Reader(Groups(samples, weights, config), start)


def take(reader, n):
    """The next n batches."""
    return [batch for _, (_, (batch,)) in zip(range(n), reader)]


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
    take(
        reader(
            f"{tmp_path}/many", 15_625, batch_size=64, length_group=8, shuffle_shards=8
        ),
        1,
    )
    assert time.perf_counter() - start < 10


# ---- bad samples -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_tenth_of_bad_samples_is_left_out_counted_and_named_once(tmp_path, capfd):
    """2,400 samples, 240 broken in 12 ways; all good ones arrive, once."""
    ways = [
        ({"jpg": picture(size=(200, 200))[:300]}, "OSError"),
        ({"jpg": b"<html>404</html>"}, "UnidentifiedImageError"),
        ({"jpg": bytes(range(256)) * 4}, "UnidentifiedImageError"),
        ({"jpg": b""}, "no picture"),
        ({"jpg": picture("L", (1, 1), "PNG")}, "InputError"),
        ({"jpg": picture("1", (14_000, 14_000), "PNG")}, "DecompressionBombError"),
        ({"json": b""}, "no caption"),
        ({"json": None}, "no caption"),
        ({"json": b'{"caption": "a d'}, "JSONDecodeError"),
        ({"json": b'{"url": "x"}'}, "KeyError"),
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
    assert it.skipped == causes and causes.total() == 240 and it.n_read == 2400
    said = [
        line
        for line in capfd.readouterr().err.splitlines()
        if "first of its kind" in line
    ]
    assert len(said) == len(causes) and all(".tar:" in line for line in said)
    assert "240 of 2400 samples cannot be used" in it.account()


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
    assert len(names(take(it, 15))) == 49 + 25 and it.skipped.total() == 26 + 50


def test_too_many_bad_samples_stop_the_run(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        map(str, range(300)),
        **{f"{i}.jpg": b"x" for i in range(0, 300, 4)},
    )
    with pytest.raises(
        InputError,
        match=r"cannot be used \(UnidentifiedImageError \d+\), more than max_bad",
    ):
        take(reader(str(tmp_path), batch_size=10), 40)


def test_a_batch_with_no_usable_sample_is_replaced_by_the_first_good_one(tmp_path):
    write_tar(
        tmp_path / "a/a.tar",
        [f"n{i}" for i in range(20)],
        **{"n0.jpg": b"x", "n10.jpg": b"x"},
    )
    seen = Counter(
        names(take(reader(f"{tmp_path}/a", batch_size=1, length_group=1), 20))
    )
    assert seen == {f"n{i}": 3 if i == 1 else 1 for i in range(20) if i % 10}
    write_tar(tmp_path / "b/b.tar", ["n0"], **{"n0.jpg": b"x"})
    with pytest.raises(InputError, match="not one sample of the data can be used"):
        take(reader(f"{tmp_path}/b", batch_size=1), 1)


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
        '{"image": "a.jpg", "conversation": [{"user": "No template."}, {"assistant": "Hi"}]}',
    ],
)
def test_any_odd_line_of_a_jsonl_is_one_bad_sample(tmp_path, capsys, line):
    (tmp_path / "a.jpg").write_bytes(picture())
    path = tmp_path / "own.jsonl"
    path.write_text(
        f'\n\n{{"image": "a.jpg", "caption": "A dog.", "text": null}}\n{line}\n'
    )
    it = reader(str(path), length_group=1)
    assert names(take(it, 1)) == ["A"] and it.skipped.total() == 1
    assert "own.jsonl, line 4 (" in capsys.readouterr().err


def test_a_short_run_of_bad_samples_alone_stops(tmp_path):
    rows = [{"image": "none.jpg", "caption": "a"}] * 40 + [
        {"image": "a.jpg", "caption": "a"}
    ]
    (tmp_path / "a.jpg").write_bytes(picture())
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    it = reader(str(tmp_path / "a.jsonl"), batch_size=2, length_group=1, max_steps=4)
    it.groups.orders[0] = [(0, row) for row in range(8)]
    with pytest.raises(InputError, match="8 of 8 samples cannot be used"):
        list(it)


def test_control_characters_of_names_are_shown_as_codes(tmp_path, capsys):
    write_tar(
        tmp_path / "0.tar", ["a"], **{"\x1b[2J.jpg": b"no picture", "\x1b[2J.txt": b"b"}
    )
    list(reader(str(tmp_path), length_group=1, max_steps=2, max_bad_fraction=1.0))
    message = capsys.readouterr().err
    assert "\\x1b[2J" in message and "\x1b" not in message
