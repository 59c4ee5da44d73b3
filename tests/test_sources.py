"""Tar shards, folders of captions and JSON rows -> samples; faults are named."""

import gc
import gzip
import json
import os
import tarfile
import tracemalloc

import pytest
from PIL import Image

from configs.prompts import IMAGE
from configs.schema import Config
from data import Samples, open_samples
from plumbing.console import InputError
from plumbing.sources import BadSample, Sample, index_tar, open_source
from tests.common import TOKENIZER, readable
from tests.samples import BOS, PAGE, POINTER, VICUNA, N, layout, picture, write_tar
from tools import make_scenes

# ---- tar shards ----------------------------------------------------------------------


@pytest.mark.slow
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
    ids=readable,
)
def test_known_counts_are_used_without_reading_the_shard(tmp_path, file, content):
    write_tar(tmp_path / "a.tar", "x")
    (tmp_path / file).write_text(json.dumps(content))
    source = open_source(f"{tmp_path}/a.tar")
    assert source.counts == [7] and source[0, 0].caption == "x"
    with pytest.raises(BadSample, match="missing in its tar file"):
        source[0, 1]


def captions(source):
    return [
        source[shard, row].caption
        for shard, n in enumerate(source.counts)
        for row in range(n)
    ]


def test_folders_and_a_mac_s_notes_in_a_tar_are_no_samples(tmp_path):
    write_tar(
        tmp_path / "0.tar",
        ["data/a"],
        **{"data/._a.jpg": b"notes", "data/._a.txt": b"notes"},
    )
    with tarfile.open(tmp_path / "0.tar", "a") as tar:
        folder = tarfile.TarInfo("data")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    assert captions(open_source(str(tmp_path))) == ["data/a"]


def test_a_json_without_caption_leaves_it_to_the_text_which_may_begin_with_a_mark(
    tmp_path,
):
    write_tar(
        tmp_path / "0.tar",
        [],
        **{
            "a.jpg": picture(),
            "a.json": b'{"url": "x"}',
            "a.txt": b"\xef\xbb\xbfA dog",
            "b.jpg": picture(),
            "b.json": b'\xef\xbb\xbf{"caption": "A cat"}',
        },
    )
    assert captions(open_source(str(tmp_path))) == ["A dog", "A cat"]


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "if it is compressed, unpack it"),
        (b"<html>404</html>", "0.tar: "),
        (b"", "0.tar: "),
    ],
)
def test_an_unreadable_shard_among_good_ones_is_named(tmp_path, capsys, content, words):
    write_tar(tmp_path / "0.tar", ["a"])
    write_tar(tmp_path / "1.tar", ["b", "c"])
    content = (
        gzip.compress((tmp_path / "0.tar").read_bytes()) if content is None else content
    )
    (tmp_path / "0.tar").write_bytes(content)
    assert captions(open_source(str(tmp_path))) == ["b", "c"]
    message = capsys.readouterr().err
    assert "1 of 2 shards are left out, the first is" in message and words in message
    with pytest.raises(InputError, match="0.tar"):
        open_source(str(tmp_path / "0.tar"))


def test_a_shard_that_was_cut_or_has_a_hole_is_named(tmp_path, capsys):
    write_tar(tmp_path / "0.tar", [f"{i}" for i in range(40)])
    whole = (tmp_path / "0.tar").read_bytes()
    assert (
        len(captions(open_source(str(tmp_path)))) == 40
        and "damaged" not in capsys.readouterr().err
    )
    hole = whole[:30_720] + bytes(30_720) + whole[61_440:]
    for content in (whole[:51_200], whole[:70_000], hole, whole * 2):
        index_tar.cache_clear()
        (tmp_path / "0.tar").write_bytes(content)
        open_source(str(tmp_path))
        assert ("0.tar: cut or damaged" in capsys.readouterr().err) == (
            content != whole * 2
        )


@pytest.mark.parametrize("name", ["data [1]", "a*b", "what?"])
def test_a_folder_may_have_marks_of_a_pattern_in_its_name(tmp_path, name):
    write_tar(tmp_path / name / "0.tar", ["a", "b"])
    folder = f"{tmp_path}/{name}"
    assert captions(open_source(folder)) == ["a", "b"]
    assert captions(open_source(f"{folder}/0.tar")) == ["a", "b"]


def test_a_worker_keeps_the_tables_of_many_shards_in_little_memory(tmp_path):
    n = 2000
    members = {f"{i:09d}.{end}": b"x" for i in range(n) for end in ("jpg", "json")}
    write_tar(tmp_path / "0.tar", [], **members)
    tracemalloc.start()
    try:
        table = index_tar(f"{tmp_path}/0.tar")
        gc.collect()
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(table) == n and size < 250 * n  # bytes; tuples take 350
    key, files = table[7]
    assert key == "000000007" and set(files) == {"jpg", "json"}
    assert files["jpg"].read() == b"x"


def test_pictures_of_several_kinds_are_taken_in_a_fixed_order(tmp_path):
    png = picture(kind="PNG")
    members = {"a.png": png, "a.JPG": picture(), "a.cls": b"7", "a.txt": b"A dog"}
    write_tar(tmp_path / "0.tar", [], **members)
    ((picture_file,), caption, *_) = open_source(str(tmp_path))[0, 0]
    assert picture_file.read() == picture() and caption == "A dog"


def test_an_empty_file_of_a_tar_is_the_same_as_none(tmp_path):
    members = {"a.jpg": b"", "a.png": picture(), "a.json": b"", "a.txt": b"A dog"}
    write_tar(tmp_path / "0.tar", [], **members)
    ((picture_file,), caption, *_) = open_source(str(tmp_path))[0, 0]
    assert picture_file.read() == picture() and caption == "A dog"


@pytest.mark.parametrize("content", [b"[1]", b"null", b'"abc"', b"7", b"[" * 100_000])
def test_any_odd_json_of_a_tar_is_one_bad_sample(tmp_path, content):
    for names in ({"a.txt": b"text"}, {}):
        members = {"a.jpg": picture(), "a.json": content} | names
        write_tar(tmp_path / "0.tar", [], **members)
        index_tar.cache_clear()
        with pytest.raises(BadSample, match="malformed row|not valid|missing key"):
            open_source(str(tmp_path))[0, 0]


def test_a_mistake_in_a_reader_is_no_bad_sample(tmp_path, monkeypatch):
    (tmp_path / "own.jsonl").write_text('{"image": "a.jpg", "caption": "A dog."}')
    source = open_source(f"{tmp_path}/own.jsonl")

    def mistaken(row, folder):
        return folder.no_such_name

    monkeypatch.setattr("plumbing.sources.read_caption", mistaken)
    with pytest.raises(AttributeError, match="no_such_name"):
        source[0, 0]


def test_an_index_that_counts_nothing_does_not_hide_a_shard(tmp_path):
    write_tar(tmp_path / "0.tar", ["a"])
    (tmp_path / "index.json").write_text('{"samples": {"0.tar": 0}}')
    assert captions(open_source(str(tmp_path))) == ["a"]


def test_a_pipe_in_the_place_of_an_index_is_not_waited_for(tmp_path):
    write_tar(tmp_path / "0.tar", ["a"])
    os.mkfifo(tmp_path / "index.json")
    assert captions(open_source(str(tmp_path))) == ["a"]


def test_a_count_that_no_shard_can_have_is_not_believed(tmp_path):
    write_tar(tmp_path / "0.tar", ["a", "b"])
    (tmp_path / "index.json").write_text(json.dumps({"samples": {"0.tar": 10**13}}))
    assert open_source(str(tmp_path)).counts == [2]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("[" * 100_000, id="deep"),
        pytest.param('{"samples": [1]}', id="a list of counts"),
        pytest.param('{"samples": {"0.tar": null}}', id="no number"),
        pytest.param('{"samples": {"0.tar": NaN}}', id="not a number"),
        pytest.param('{"samples": {"0.tar": 2.5}}', id="a fraction"),
        pytest.param('{"samples": {"0.tar": "7"}}', id="a text"),
        pytest.param("\xff", id="no UTF-8"),
        pytest.param("[]", id="a list"),
    ],
)
def test_an_odd_index_is_not_used(tmp_path, content):
    write_tar(tmp_path / "0.tar", ["a"])
    (tmp_path / "index.json").write_text(content, "latin-1")
    assert captions(open_source(str(tmp_path))) == ["a"]


# ---- JSON files ----------------------------------------------------------------------


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


@pytest.mark.parametrize("folder", [".", "images", "image"])
def test_the_pictures_of_llava_are_beside_the_file_or_in_a_folder(tmp_path, folder):
    path = tmp_path / folder / "a.jpg"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(picture())
    spoken = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A dog."}]
    rows = [{"image": "a.jpg", "conversations": spoken}]
    (tmp_path / "own.json").write_text(json.dumps(rows))
    sample = open_source(f"{tmp_path}/own.json")[0, 0]
    assert sample.images == [str(path)]


@pytest.mark.parametrize("suffix", ["jpg", "png", "jpeg"])
def test_pictures_of_stage_2_may_be_png_or_jpeg(tmp_path, suffix):
    (tmp_path / "image").mkdir()
    (tmp_path / f"image/7.{suffix}").write_bytes(picture())
    (tmp_path / "filter_cap.json").write_text(
        '{"annotations": [{"image_id": "7", "caption": "A dog."}]}'
    )
    assert open_source(str(tmp_path))[0, 0].images == [f"{tmp_path}/image/7.{suffix}"]


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
        "missing file",
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
    ({"image": "a.jpg", "conversations": []}, "malformed row"),
    ({"image": "a.jpg", "conversations": said("<image>", 3)}, "malformed row"),
    ({"image": "a.jpg", "conversations": [{"from": "human"}]}, "missing key"),
    (3, "malformed row"),
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
    keys = list(samples.all_keys())
    assert len(keys) == 48
    for key, (_, expected) in zip(keys, LLAVA * 3):
        if isinstance(expected, tuple):
            images, *row = samples.read(key)
            assert tuple(row) == layout((BOS, *expected))
            assert len(images) == expected.count(IMAGE)
        else:
            assert samples[key] is None
            with samples.noting(faults := [], key):
                samples.read(key)
            ((kind, message),) = faults
            assert kind.startswith(expected)
            assert f"{tmp_path}/own.json, annotation " in message


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
    (good,), faults = samples.first(3)
    assert good[1:] == layout((BOS, IMAGE, {"a dog\n"}))
    assert [fault.kind for fault in faults] == [
        "empty caption",
        "a conversation about pictures needs a template, vicuna or llama2",
    ]


def test_a_malformed_row_is_called_so(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"conversation": [{}, {}]}\n5\n')
    samples = Samples(
        [open_source(str(tmp_path / "a.jsonl"))],
        Config(template="vicuna"),
        TOKENIZER,
        28,
        N,
    )
    _, (first, second) = samples.first(2)
    assert "line 1 (malformed row" in first.message
    assert "line 2 (malformed row" in second.message


# ---- all kinds -----------------------------------------------------------------------


def test_texts_are_utf_8_with_or_without_a_mark(tmp_path):
    line = '{"image": "a.jpg", "caption": "Ein Bär"}'
    (tmp_path / "a.jsonl").write_text(f"{line}\n", "utf-8-sig")
    annotations = {"annotations": [{"image_id": 1, "caption": "Ein Bär"}]}
    (tmp_path / "filter_cap.json").write_text(
        json.dumps(annotations, ensure_ascii=False), "utf-8-sig"
    )
    write_tar(tmp_path / "ä.tar", ["Ein Bär"])
    (tmp_path / "list.txt").write_text(f"{tmp_path}/ä.tar\n", "utf-8-sig")
    for path in (tmp_path / "a.jsonl", tmp_path, tmp_path / "list.txt"):
        assert captions(open_source(str(path))) == ["Ein Bär"]


@pytest.mark.parametrize("name", ["0.tar", "rows.jsonl", "rows.json"])
@pytest.mark.parametrize(
    "content, words", [(POINTER, "a Git LFS pointer"), (PAGE, "a saved web page")]
)
def test_what_lies_in_the_place_of_data_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: {words}"):
        open_source(str(tmp_path / name))


@pytest.mark.parametrize("name", ["0.tar", "rows.jsonl"])
def test_a_pipe_is_no_data_and_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match=f"{name}: not a file"):
        open_source(str(tmp_path / name))


def test_data_that_is_not_there_is_named(tmp_path):
    with pytest.raises(
        InputError, match="data .*rows.jsonl: no samples, for nothing is there"
    ):
        open_source(str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize(
    "row, names",
    [
        ({"file_name": "a.jpg", "text": "a dog"}, "file_name, text"),
        ({"img": "a.jpg", "label": "a dog"}, "img, label"),
        ({}, ""),
    ],
    ids=["image_folder", "others", "none"],
)
def test_unknown_keys_are_named_with_those_that_are_needed(tmp_path, row, names):
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(BadSample, match=f"unknown keys {names}; needed: image and cap"):
        open_source(str(tmp_path / "a.jsonl"))[0, 0]
