"""What the model is fed: token layout and targets, sources, the order of the samples, bad samples."""

import io
import json
import tarfile
import time
from collections import Counter

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
    Groups,
    Reader,
    SampleOrder,
    Samples,
    clean_caption,
    collate,
    open_samples,
)
from llama import IGNORE, Tokenizer
from plumbing.console import InputError
from plumbing.sources import BadSample, Sample, open_source
from tests.common import GOLDEN
from tools import make_scenes

N = 3  # image tokens
TOKENIZER = Tokenizer(GOLDEN / "tokenizer" / "tokenizer.model")
BOS, EOS = [TOKENIZER.bos], [TOKENIZER.eos]
VICUNA, LLAMA2 = {"template": "vicuna"}, {"template": "llama2"}
CAPTION, TURN = Sample([""], "A Dog!"), Sample([""], turns=[("Hi", "A dog.")])
TALK = Sample(turns=[("Hi", "A dog."), ("And?", "A cat.")])

# ---- tokens and targets ------------------------------------------------------------------------------------


def layout(segments):
    """The ids and targets of segments; those in a set are predicted."""
    ids, targets = [], []
    for segment in segments:
        if isinstance(segment, set):
            (text,) = segment
            new = TOKENIZER.encode(text.removesuffix("</s>")) + EOS * text.endswith(
                "</s>"
            )
        else:
            new = (
                [IMAGE] * N
                if segment == IMAGE
                else TOKENIZER.encode(segment)
                if segment != BOS
                else BOS
            )
        ids += new
        targets += new if isinstance(segment, set) else [IGNORE] * len(new)
    return ids, targets


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


# ---- sources -----------------------------------------------------------------------------------------------


def picture(mode="RGB", size=(20, 10), kind="JPEG"):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path, names, **changed):
    """One sample per name, which is also its caption. `changed`: other members, {name: content}."""
    path.parent.mkdir(exist_ok=True)
    members = {
        f"{name}.{kind}": content
        for name in names
        for kind, content in (("jpg", picture()), ("txt", name.encode()))
    }
    with tarfile.open(path, "w") as tar:
        for name, content in (members | changed).items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_shards_read_every_sample(tmp_path):
    folder = tmp_path / "stage1"
    make_scenes.main(["stage1", str(folder), "--n=1030"])  # two shards
    source = open_source(str(folder))
    with tarfile.open(folder / "00001.tar") as tar:
        wanted = json.loads(tar.extractfile("000010004.json").read())["caption"]
        member = tar.getmember("000010004.jpg")
    assert source[1, 4].caption == wanted
    assert source[1, 4].images == [
        (f"{folder}/00001.tar", member.offset_data, member.size)
    ]
    (tmp_path / "list.txt").write_text(f"{folder}/00001.tar\n\n{folder}/00000.tar\n")
    listed = open_source(f"{tmp_path}/list.txt")
    assert listed.counts == [30, 1000] and listed.content != source.content
    for path in (folder, f"{folder}/{{00000..00001}}.tar", f"{folder}/*.tar"):
        assert open_source(str(path)).counts == [1000, 30]


def test_missing_shards_of_a_range_are_left_out_with_one_warning(tmp_path, capsys):
    write_tar(tmp_path / "00000.tar", "ab")
    write_tar(tmp_path / "00003.tar", "c")
    source = open_source(f"{tmp_path}/{{00000..00003}}.tar")
    assert source.counts == [2, 1] and source[1, 0].caption == "c"
    (warning,) = capsys.readouterr().err.splitlines()
    assert "2 of 4 shards are missing" in warning and "00001.tar" in warning


@pytest.mark.parametrize(
    "file, content",
    [
        ("index.json", {"samples": {"a.tar": 7}}),
        ("a_stats.json", {"successes": 7, "count": 9}),
    ],
)
def test_known_counts_are_used_without_reading_the_shard(tmp_path, file, content):
    write_tar(tmp_path / "a.tar", "x")
    (tmp_path / file).write_text(json.dumps(content))
    source = open_source(f"{tmp_path}/a.tar")
    assert source.counts == [7] and source[0, 0].caption == "x"
    with pytest.raises(BadSample, match="missing in its tar file"):
        source[0, 1]


def test_caption_folder(tmp_path):
    file = tmp_path / "filter_cap.json"
    file.write_text('{"annotations": [{"image_id": "7", "caption": "A dog."}]}')
    source = open_source(str(tmp_path))
    assert source.counts == [1] and source[0, 0] == Sample(
        [f"{tmp_path}/image/7.jpg"], "A dog."
    )
    for content in (
        "[]",
        '{"annotations": null}',
        '{"annotations": 7}',
        '{"annotations": {}}',
    ):
        file.write_text(content)
        with pytest.raises(InputError, match="filter_cap.json"):
            open_source(str(tmp_path))


def said(*texts):
    """LLaVA's conversation of these texts."""
    return [
        {"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)
    ]


SEEN = (
    "###Human: <Img>",
    IMAGE,
    "</Img> What is it? ###Assistant: ",
    {"A dog.###"},
)  # trained: in a set
LLAVA = [  # (record, segments of its ids, or the kind of fault)
    (
        {
            "id": "1",
            "image": "a.jpg",
            "conversations": said("<image>\nWhat is it?", "A dog."),
        },
        SEEN,
    ),
    (
        {
            "conversations": said("What is it?", "A dog."),
            "id": 2,
            "image": "00/日本 é.jpg",
        },
        SEEN,
    ),  # not marked
    (
        {"image": "a.jpg", "conversations": said("What is it?\n<image>", "A dog.")},
        ("###Human: What is it? <Img>", IMAGE, "</Img> ###Assistant: ", {"A dog.###"}),
    ),
    (
        {
            "image": "a.jpg",
            "conversations": [
                {"value": "What is it?", "from": "human"},
                {"value": "A dog.", "from": "gpt"},
                {"value": "<image>\nAnd it?", "from": "human"},
                {"value": "A cat.", "from": "gpt"},
            ],
        },
        (
            "###Human: What is it? ###Assistant: ",
            {"A dog.###"},
            "Human: <Img>",
            IMAGE,
            "</Img> And it? ###Assistant: ",
            {"A cat.###"},
        ),
    ),
    (
        {
            "image": ["a.jpg", "b.png"],
            "conversations": said("<image>\n<image>\nCompare.", "Equal."),
        },
        (
            "###Human: <Img>",
            IMAGE,
            "</Img> <Img>",
            IMAGE,
            "</Img> Compare. ###Assistant: ",
            {"Equal.###"},
        ),
    ),
    (
        {"conversations": said("Hi", "Hello", "Bye", "Bye")},
        (
            "###Human: Hi ###Assistant: ",
            {"Hello###"},
            "Human: Bye ###Assistant: ",
            {"Bye###"},
        ),
    ),
    (
        {"image": None, "conversations": said("Hi", "Hello")},
        ("###Human: Hi ###Assistant: ", {"Hello###"}),
    ),
    (
        {"image": "none.jpg", "conversations": said("<image>\nWhat is it?", "A dog.")},
        "FileNotFoundError",
    ),
    (
        {"image": "a.jpg", "conversations": said("<image>\nThis <image>?", "A dog.")},
        "not as many <image> as pictures",
    ),
    (
        {"conversations": said("<image>\nWhat is it?", "A dog.")},
        "not as many <image> as pictures",
    ),
    (
        {"image": "a.jpg", "conversations": said("<image>\nWhat?")},
        "user and assistant do not alternate",
    ),
    (
        {
            "image": "a.jpg",
            "conversations": [{"from": "system", "value": "x"}, *said("a", "b")],
        },
        "user and assistant do not alternate",
    ),
    ({"image": "a.jpg", "conversations": []}, "ValueError"),
    ({"image": "a.jpg", "conversations": said("<image>", 3)}, "TypeError"),
    ({"image": "a.jpg", "conversations": [{"from": "human"}]}, "KeyError"),
    (3, "TypeError"),
]


@pytest.mark.parametrize("folder", ["images", "."])
def test_llava_s_records_give_their_ids_or_count_as_bad(tmp_path, folder):
    for name in ("a.jpg", "b.png", "00/日本 é.jpg"):
        (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / name).write_bytes(picture())
    records = [record for record, _ in LLAVA] * 3
    (tmp_path / "own.json").write_text(json.dumps(records, ensure_ascii=False), "utf-8")
    config = Config(trainable=("llama",), **VICUNA)
    samples, _ = open_samples(f"{tmp_path}/own.json", config, TOKENIZER, 28, N)
    rows = [samples.read(key) for key in samples.keys()]
    assert (
        len(rows) == 48
        and [bool(row) for row in rows] == [type(e) is tuple for _, e in LLAVA] * 3
    )
    kinds = iter(samples.bad)
    for row, (record, expected) in zip(rows, LLAVA * 3):
        if row:
            assert row[1:] == layout((BOS, *expected))
            assert len(row[0]) == expected.count(IMAGE)
        else:
            kind, where = next(kinds)
            assert (
                kind.startswith(expected)
                and f"{tmp_path}/own.json, annotation " in where
            )


def test_llava_s_single_turns_are_captions_where_there_is_no_template(tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg")
    records = [
        {"image": "a.jpg", "conversations": said(*texts)}
        for texts in (
            ("Describe it.\n<image>", "A Dog!"),
            ("<image>\nWhat?", " "),
            ("<image>", "Hello", "Bye", "Bye"),
        )
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(records))
    samples, _ = open_samples(
        f"{tmp_path}/pairs.json", Config(clean_captions=True), TOKENIZER, 28, N
    )
    (_, *row), *bad = [samples.read(key) for key in samples.keys()]
    assert tuple(row) == layout((BOS, IMAGE, {"a dog\n"})) and bad == [None, None]
    assert [kind for kind, _ in samples.bad] == [
        "empty caption",
        "a conversation about pictures needs a template, vicuna or llama2",
    ]


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
