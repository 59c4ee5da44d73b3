"""tools/caption.py: captions of many pictures, and a .jsonl that training reads."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import chat
import train
from plumbing import console
from plumbing.console import InputError
from tests.common import TINY, readable
from tools import caption, make_scenes, show_data

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with 7 pictures in photos/."""
    make_scenes.main(["test", str(tmp_path / "photos"), "--n=7"])
    (tmp_path / "photos/scenes.json").unlink()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(path="captions.jsonl"):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.mark.slow
def test_greedy_captions_are_those_of_chat(folder):
    caption.main(["photos", "--batch_size=3", "--dtype=float32"])
    talk = chat.Chat(*chat.load(chat.Options(temperature=0.0, dtype="float32")))
    assert [row["image"] for row in lines()] == [f"photos/{i}.jpg" for i in range(7)]
    for row in lines():
        talk.reset()
        talk.add_image(row["image"])
        assert list(row) == ["image", "caption"]
        assert row["caption"] == "".join(talk.ask("Describe this image in detail."))
    assert len({row["caption"] for row in lines()}) > 4


@pytest.mark.parametrize(
    "options",
    [["--num_beams=2"], ["--temperature=1", "--seed=3"]],
    ids=readable,
)
def test_beams_and_samples(folder, options):
    for out in ("a.jsonl", "b.jsonl"):
        caption.main(
            [
                "photos/0.jpg",
                "photos/1.jpg",
                f"--out={out}",
                "--max_new_tokens=20",
                *options,
            ]
        )
    assert lines("a.jsonl") == lines("b.jsonl") and all(
        row["caption"] for row in lines("a.jsonl")
    )


@pytest.mark.slow
def test_a_stopped_run_continues(folder, capsys):
    caption.main(["photos", "--batch_size=4"])
    whole = Path("captions.jsonl").read_text().splitlines(keepends=True)
    for rest in ("", whole[4][:1], whole[4][:-9], whole[4][:-1]):
        Path("captions.jsonl").write_text("".join(whole[:4]) + rest)
        caption.main(["photos", "--batch_size=4"])
        assert Path("captions.jsonl").read_text() == "".join(whole)
    before = os.stat("captions.jsonl")
    caption.main(["photos"])
    assert os.stat("captions.jsonl").st_size == before.st_size
    assert "7 captions (0 new ones cut off), 0 failures" in capsys.readouterr().out


@pytest.mark.slow
def test_bad_pictures_are_kept_out_and_tried_again_when_asked(folder, capsys):
    Path("photos/2.jpg").rename("good.jpg")
    Path("photos/2.jpg").write_bytes(b"no picture")
    Image.new("RGB", (1, 1)).save("photos/a\033[31m.png")
    Path("list.txt").write_text(
        "photos/0.jpg\r\n\nphotos/nowhere.jpg\n", encoding="utf-8-sig"
    )
    for _ in range(2):
        caption.main(["photos", "list.txt", "--batch_size=1"])
        assert len(lines()) == 6 and len(lines("captions.errors.jsonl")) == 3
    assert "only 1 x 1 pixels" in lines("captions.errors.jsonl")[1]["error"]
    Path("good.jpg").rename("photos/2.jpg")
    caption.main(["photos"])
    assert len(lines()) == 6
    caption.main(["photos", "--retry"])
    assert len(lines()) == 7 and len(lines("captions.errors.jsonl")) == 2
    assert "\033" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("options", [[], ["--plain"]], ids=["terminal", "--plain"])
def test_plain_text_has_no_progress_bar(folder, options, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(console, "_plain", False)  # undone at the end
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    caption.main(["photos", "--max_new_tokens=2", *options])
    assert ("7 pictures: " in sys.stderr.getvalue()) == (not options)


@pytest.mark.slow
def test_training_reads_them(folder, capsys, monkeypatch):
    Path("photos/2.jpg").write_bytes(b"no picture")
    Path("own").mkdir()
    caption.main(["photos", "--out=own/captions.jsonl"])
    assert lines("own/captions.jsonl")[0]["image"] == "../photos/0.jpg"
    monkeypatch.chdir(ROOT)
    data = [f"--data={folder}/own/captions.jsonl"]
    show_data.main(["configs/finetune_own.py", *data, "--plain", "--show=1"])
    assert "6 good samples and 0 bad ones" in capsys.readouterr().out
    train.main(
        [
            "configs/finetune_own.py",
            *data,
            f"--out_dir={folder}/out",
            "--max_steps=2",
            "--num_workers=0",
        ]
    )
    assert (
        folder / "out/proj.safetensors"
    ).is_file() and "cannot be used" not in capsys.readouterr().out


def test_paths_lead_from_the_file_to_the_picture_also_through_links(folder):
    (folder / "deep/down").mkdir(parents=True)
    (folder / "link").symlink_to(folder / "deep/down")
    (folder / "album").symlink_to(folder / "photos")
    assert caption.written_path("album/0.jpg", Path("link")) == "../../photos/0.jpg"
    assert caption.written_path(str(folder / "photos/0.jpg"), Path("photos")) == "0.jpg"


def test_folders_globs_lists_and_files(folder):
    Path("photos/notes.txt").write_text("no list")
    Path("photos/sub").mkdir()
    Path("photos/0.jpg").rename("photos/sub/[0].JPG")
    assert caption.list_pictures("photos") == [f"photos/{i}.jpg" for i in range(1, 7)]
    assert caption.list_pictures("photos/**")[-1] == "photos/sub/[0].JPG"
    assert caption.list_pictures("photos/sub/[0].JPG") == caption.list_pictures(
        "photos/sub"
    )
    Path("list.txt").write_text("photos/1.jpg\nphotos/lost.jpg\n")
    assert caption.list_pictures("list.txt") == ["photos/1.jpg", "photos/lost.jpg"]


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "0 pictures"),
        (["nowhere.jpg"], "nowhere.jpg: no pictures"),
        (["out"], "out: no pictures"),
        (["photos/notes.txt"], "no pictures"),
        (["photos/*.png"], "no pictures"),
        (["photos", "--out=a.txt"], "a .jsonl"),
        (["photos", "--batch_size=0"], "at least 1"),
        (["photos", "--temprature=1"], "did you mean temperature"),
        (["photos", "--ckpt=nowhere"], "nowhere"),
        (["photos", f"--prompt={'a b ' * 900}"], "takes .* tokens"),
    ],
    ids=readable,
)
def test_mistakes_raise(folder, argv, words):
    Path("photos/notes.txt").write_text("no list")
    Path("out").mkdir()
    with pytest.raises(InputError, match=words):
        caption.main(argv)


def test_a_folder_says_what_else_is_in_it(folder, capsys):
    for name in ("a.MP4", "b.MP4", "README", "deep/c.jpg"):
        path = folder / "more" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    shutil.copy(folder / "photos/0.jpg", folder / "more/d.jpg")
    assert [Path(p).name for p in caption.list_pictures("more")] == ["d.jpg"]
    note = capsys.readouterr().err
    assert "more: left out: " in note and '1 subfolders ("more/**" takes' in note
    assert "2 .MP4" in note and "1 without suffix" in note
    assert len(caption.list_pictures("more/**")) == 2
    assert caption.list_pictures("photos") and not capsys.readouterr().err


def test_captions_of_another_prompt_or_model_are_not_mixed(folder):
    caption.main(["photos/0.jpg", "--out=a.jsonl", "--max_new_tokens=4"])
    before = Path("a.jsonl").read_text()
    for change in ("--prompt=What?", "--num_beams=2", f"--ckpt={TINY}/stage1"):
        with pytest.raises(InputError, match="a.jsonl: written with .*another --out"):
            caption.main(["photos", "--out=a.jsonl", "--max_new_tokens=4", change])
    assert Path("a.jsonl").read_text() == before


WRITER = """
import fcntl
file = open("a.jsonl", "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
input()
"""


def test_two_at_once_are_refused(folder):
    command = [sys.executable, "-c", WRITER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(InputError, match="a.jsonl: another process writes to it"):
            caption.main(["photos/0.jpg", "--out=a.jsonl"])
        other.communicate(b"\n")
    caption.main(["photos/0.jpg", "--out=a.jsonl", "--max_new_tokens=4"])
    assert len(lines("a.jsonl")) == 1


@pytest.mark.parametrize(
    "content",
    ['[\n {"image": "a.png"},\n {"image": "b.png"}\n]', "a\tb", '{"text": 1'],
    ids=["array", "table", "other_rows"],
)
def test_a_file_of_something_else_is_left_as_it_is(folder, content):
    Path("mine.jsonl").write_text(content)
    with pytest.raises(InputError, match="mine.jsonl: not a file of captions"):
        caption.main(["photos", "--out=mine.jsonl"])
    assert Path("mine.jsonl").read_text() == content


@pytest.mark.slow
@pytest.mark.parametrize(
    "argv",
    [["no\033[31mwhere.jpg"], ["photos", "--out=none/a.jsonl"]],
    ids=readable,
)
def test_a_mistake_is_one_line_without_control_characters_and_status_2(folder, argv):
    command = [sys.executable, str(ROOT / "tools/caption.py"), *argv]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (
        done.returncode == 2
        and len(done.stderr.splitlines()) == 1
        and "\033" not in done.stderr
    )
