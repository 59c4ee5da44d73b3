"""Files, texts and weights from strangers: what is wrong is named in one line, and nothing else is lost."""

import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import chat
from configs.prompts import END, IMAGE, harmless, is_end, stop_sequences, user_message
from configs.schema import Config, load_config
from data import Samples
from llama import Tokenizer
from plumbing.console import InputError
from plumbing.files import append_row
from plumbing.sources import Sample, index_tar, open_source
from tests.common import GOLDEN
from tests.test_data import N, picture, reader, write_tar
from tools import convert
from vision import load_image

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "assets/tiny"
TOKENIZER = Tokenizer(GOLDEN / "tokenizer" / "tokenizer.model")

# ---- data --------------------------------------------------------------------------------------------------


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


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
PAGE = b"\n<!DOCTYPE html><html>"


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


@pytest.mark.parametrize("content", ["[" * 100_000, '{"samples": [1]}', "\xff", "[]"])
def test_an_odd_index_is_not_used(tmp_path, content):
    write_tar(tmp_path / "0.tar", ["a"])
    (tmp_path / "index.json").write_text(content, "latin-1")
    assert captions(open_source(str(tmp_path))) == ["a"]


def test_a_malformed_row_is_called_so(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"conversation": [{}, {}]}\n5\n')
    samples = Samples(
        [open_source(str(tmp_path / "a.jsonl"))],
        Config(template="vicuna"),
        TOKENIZER,
        28,
        N,
    )
    assert [samples.read(key) for key in samples.keys()] == [None, None]
    assert "line 1 (malformed, StopIteration" in samples.bad[0][1]
    assert "line 2 (malformed, TypeError" in samples.bad[1][1]


@pytest.mark.parametrize("suffix", ["jpg", "png", "jpeg"])
def test_pictures_of_stage_2_may_be_png_or_jpeg(tmp_path, suffix):
    (tmp_path / "image").mkdir()
    (tmp_path / f"image/7.{suffix}").write_bytes(picture())
    (tmp_path / "filter_cap.json").write_text(
        '{"annotations": [{"image_id": "7", "caption": "A dog."}]}'
    )
    assert open_source(str(tmp_path))[0, 0].images == [f"{tmp_path}/image/7.{suffix}"]


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


# ---- texts -------------------------------------------------------------------------------------------------

FORGED = st.lists(
    st.sampled_from(
        (
            "###",
            "#",
            "Human: ",
            "Assistant: ",
            "\n",
            " ",
            "[INST]",
            "[/INST]",
            "</s>",
            "<s>",
            "<Img>",
            "</Img>",
            "<image>",
            "a dog",
            "<ImageHere>",
        )
    )
).map("".join)


def ends(ids, end):
    """How often ids end a turn."""
    stop = stop_sequences(TOKENIZER, end)
    return sum(is_end(ids[:i], stop) for i in range(1, len(ids) + 1))


@given(FORGED, FORGED)
def test_no_text_ends_a_turn_begins_one_or_adds_a_picture(question, answer):
    for template, end in (("vicuna", "###"), ("llama2", END)):
        samples = Samples(
            [], Config(template=template, max_txt_len=10_000), TOKENIZER, 28, N
        )
        ids, targets = samples.tokenize(
            Sample([""], turns=[(question, answer)]), np.random.default_rng(0)
        )
        plain = samples.tokenize(
            Sample([""], turns=[("a", "a")]), np.random.default_rng(0)
        )[0]
        assert ids.count(IMAGE) == N and ids.count(TOKENIZER.bos) == 1
        assert ends(ids, end) == ends(plain, end)
        assert TOKENIZER.decode([i for i in ids if i > 2]).count("[INST]") == (
            template == "llama2"
        )


def test_a_question_cannot_end_its_turn_with_an_end_of_the_user_s_own():
    assert user_message("a<END>b", 0, "<END>") == ["a b"]
    config = Config(template="vicuna", end_sym="<END>")
    ids, _ = Samples([], config, TOKENIZER, 28, N).tokenize(
        Sample(turns=[("a<END>b", "c")]), np.random.default_rng(0)
    )
    assert TOKENIZER.decode(ids).count("<END>") == 1


@given(FORGED)
def test_a_caption_of_stage_1_ends_once(caption):
    samples = Samples([], Config(max_txt_len=10_000), TOKENIZER, 28, N)
    try:
        ids, _ = samples.tokenize(Sample([""], caption), np.random.default_rng(0))
    except Exception as e:
        assert str(e) == "empty caption"
    else:
        assert ids.count(TOKENIZER.encode("a\n")[-1]) == 1 and ids.count(IMAGE) == N


@given(st.text(st.characters(exclude_characters="#[")))
def test_other_texts_stay_as_they_are(text):
    assert harmless(text) == text == harmless(text, "###")


# ---- pictures ----------------------------------------------------------------------------------------------


def test_a_pipe_is_not_waited_for_and_other_formats_start_no_program(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n%%EOF\n"
    )
    for name in "ab":
        with pytest.raises(
            InputError, match=f"{name}.jpg: cannot be read as a picture"
        ):
            load_image(str(tmp_path / f"{name}.jpg"), 28)


def test_a_picture_that_would_take_gigabytes_is_refused(tmp_path):
    Image.new("1", (13000, 13000)).save(
        tmp_path / "a.png"
    )  # a large one of one bit a pixel is none
    assert load_image(str(tmp_path / "a.png"), 28).shape == (3, 28, 28)
    header = io.BytesIO()
    Image.new("RGBA", (8, 8)).save(header, "PNG")
    big = bytearray(header.getvalue())
    big[16:24] = (13000).to_bytes(4, "big") * 2
    big[29:33] = zlib.crc32(big[12:29]).to_bytes(4, "big")
    with pytest.raises(InputError, match="too large: 13000 x 13000 pixels"):
        load_image(bytes(big), 28)


# ---- programs ----------------------------------------------------------------------------------------------


def python(*words, stdin="", **env):
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        input=stdin.encode(),
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
    )


def test_stdin_is_utf_8_also_where_the_locale_is_not():
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = python(
        "chat.py",
        "--json",
        "--max_new_tokens=2",
        stdin="\ufeffGr\u00f6\u00dfe?",
        **locale,
    )
    assert json.loads(done.stdout)["prompt"] == "Gr\u00f6\u00dfe?"


def test_windows_modules_are_enough():
    absent = "import sys; sys.modules |= dict.fromkeys(('fcntl', 'resource', 'readline', 'termios'))"
    done = python(
        "-c",
        f"{absent}; import chat, train; from tools import bench, caption, convert, show_data",
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "text", ["exit()", "raise SystemExit(0)", "1 / 0", "import nothing_of_this_name"]
)
def test_a_config_that_ends_early_is_a_mistake_of_the_user(tmp_path, text):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(InputError, match=r"config file \S+c.py: \w+"):
        load_config(str(tmp_path / "c.py"), {})


def test_an_out_dir_that_is_a_file_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="out_dir = .*file.: name a folder"):
        Config(out_dir=str(tmp_path / "file"))


def test_a_full_disk_is_named_with_the_file():
    with (
        pytest.raises(InputError, match="/dev/full: cannot be written"),
        open("/dev/full", "w") as file,
    ):
        append_row(file, step=1)


# ---- weights -----------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path):
    return shutil.copytree(TINY, tmp_path / "tiny")


def load(folder):
    return chat.load(chat.Options(ckpt=str(folder), device="cpu"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "file", ["proj.safetensors", "qformer.safetensors", "llama/model.safetensors"]
)
def test_weights_that_are_not_finite_are_named(tiny, file, value):
    tensors = load_file(tiny / file)
    name = next(k for k in tensors if tensors[k].dim() == 1)
    tensors[name][-1] = value
    with safe_open(tiny / file, "pt") as f:
        metadata = f.metadata()
    save_file(tensors, tiny / file, metadata)
    with pytest.raises(
        InputError, match=f"{name.removeprefix('model.')} holds NaN or infinity"
    ):
        load(tiny)


@pytest.mark.parametrize(
    "file, changes, words",
    [
        (
            "llama/config.json",
            {"num_hidden_layers": 10**7},
            "num_hidden_layers 10000000 is no size",
        ),
        (
            "config.json",
            {"image_size": 28000},
            "image_size = 28000: give one from 0 to 2048",
        ),
        (
            "config.json",
            {"tokenizer": "/dev/zero"},
            "/dev/zero: no sentencepiece model",
        ),
        (
            "llama/config.json",
            {"rms_norm_eps": float("nan")},
            "rms_norm_eps nan is no size",
        ),
        ("llama/config.json", {"rope_theta": -1.0}, "rope_theta -1.0 is no size"),
        (
            "llama/config.json",
            {"num_key_value_heads": -1},
            "num_key_value_heads -1 is no size",
        ),
        ("llama/config.json", {"head_dim": -4}, "head_dim -4 is no size"),
    ],
)
def test_sizes_are_checked_before_memory_is_taken(tiny, file, changes, words):
    content = json.loads((tiny / file).read_text())
    (tiny / file).write_text(json.dumps(content | changes))
    with pytest.raises(InputError, match=words):
        load(tiny)


@pytest.mark.parametrize(
    "content, words", [(POINTER, "a Git LFS pointer"), (PAGE, "a saved web page")]
)
@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        "proj.safetensors",
        "llama/config.json",
        "llama/tokenizer.model",
        "llama/model.safetensors",
    ],
)
def test_what_lies_in_the_place_of_a_weight_file_is_named(tiny, file, content, words):
    (tiny / file).write_bytes(content)
    with pytest.raises(InputError, match=f"{file}: {words}"):
        load(tiny)


def test_a_mac_s_notes_beside_weights_and_byte_order_marks_do_not_matter(tiny):
    (tiny / "llama/._model.safetensors").write_bytes(b"notes")
    for file in ("config.json", "llama/config.json"):
        (tiny / file).write_bytes(b"\xef\xbb\xbf" + (tiny / file).read_bytes())
    assert load(tiny)[0].tokenizer.vocab_size == 1024


@pytest.mark.parametrize(
    "file, changes",
    [
        ("vision.safetensors", {"n_layers": 2_000_000_000}),
        ("qformer.safetensors", {"n_layers": 2_000_000_000}),
        ("vision.safetensors", {"patch_size": 2_147_483_647}),
        ("qformer.safetensors", {"width": -1}),
    ],
)
def test_sizes_in_weight_files_are_checked(tiny, file, changes):
    with safe_open(tiny / file, "pt") as f:
        config = json.loads(f.metadata()["config"]) | changes
    save_file(load_file(tiny / file), tiny / file, {"config": json.dumps(config)})
    with pytest.raises(InputError, match=f"{file}: {[*changes][0]} .* is no size"):
        load(tiny)


@pytest.mark.parametrize(
    "weight_map", [{"a": ["x"]}, {"a": 1, "b": "c"}, {"a": 1}, [], {}]
)
def test_an_odd_index_of_weights_is_refused(tiny, weight_map):
    (tiny / "llama/model.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map})
    )
    with pytest.raises(InputError, match="it has no weight_map"):
        load(tiny)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64])
def test_integers_are_no_weights(tiny, dtype):
    tensors = load_file(tiny / "proj.safetensors")
    save_file(
        tensors | {"proj.bias": tensors["proj.bias"].to(dtype)},
        tiny / "proj.safetensors",
    )
    with pytest.raises(
        InputError, match="proj.bias holds NaN or infinity, or no floats"
    ):
        load(tiny)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_matrix_with_nan_is_not_quantized(tiny, dtype):
    tensors = load_file(tiny / "llama/model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 5] = float("nan")
    save_file(tensors, tiny / "llama/model.safetensors")
    with pytest.raises(InputError, match="layers.1.mlp.up_proj.weight holds NaN"):
        chat.load(chat.Options(ckpt=str(tiny), device="cpu", dtype=dtype))


def test_a_missing_shard_is_named_also_without_an_index(tiny):
    (tiny / "llama/model.safetensors").rename(
        tiny / "llama/model-00001-of-00002.safetensors"
    )
    with pytest.raises(
        InputError, match="model-00002-of-00002.safetensors: no such weight file"
    ):
        load(tiny)


def test_a_language_model_s_folder_is_no_run():
    with pytest.raises(InputError, match="llama: a language model's folder"):
        load(TINY / "llama")


@pytest.mark.parametrize(
    "tensor, words",
    [
        (torch.zeros(1).expand(999, 999), "fewer than its shape says"),
        (torch.zeros(3, 3).int(), "holds no weights"),
        (torch.zeros(3, 3).cfloat(), "holds no weights"),
        (torch.zeros(0, 3), "holds no weights"),
        (torch.full((3, 3), float("nan")), "holds NaN or infinity"),
    ],
)
def test_converted_are_finite_weights_only(tmp_path, tensor, words):
    torch.save(
        {"llama_proj.weight": tensor, "llama_proj.bias": torch.zeros(3)},
        tmp_path / "x.pth",
    )
    with pytest.raises(InputError, match=f"proj.weight.* {words}"):
        convert.main(
            ["proj", str(tmp_path / "x.pth"), str(tmp_path / "proj.safetensors")]
        )
    assert not (tmp_path / "proj.safetensors").exists()


def test_a_model_that_computes_nan_says_so(tiny):
    model, options = load(tiny)
    model.llama.norm.weight.data[3] = float("nan")
    with pytest.raises(InputError, match="computes NaN"):
        list(chat.Chat(model, options).ask("Hi"))
