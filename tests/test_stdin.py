"""chat.py without a terminal: pictures and text on stdin, JSON, saved conversations."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import chat
from plumbing.console import InputError
from tests.common import EXAMPLE, ROOT
from tests.runs import ENV
from tests.samples import write_tar

STAR = "What color is the star?"


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that calls chat.main with text or bytes on stdin -> stdout, stderr."""

    def call(*argv, stdin=""):
        content = stdin if isinstance(stdin, bytes) else stdin.encode()
        monkeypatch.setattr(
            sys, "stdin", io.TextIOWrapper(io.BytesIO(content), errors="replace")
        )
        chat.main([*argv, "--temperature=0"])
        return capsys.readouterr()

    return call


def test_stdin_is_the_prompt_or_stands_before_it(run):
    alone = run(EXAMPLE, stdin=f"{STAR}\n").out
    assert "red" in alone and len(alone.splitlines()) == 1
    both = json.loads(
        run(
            EXAMPLE, "--json", "--prompt=of the star?", stdin="What color is\nthis\n"
        ).out
    )
    assert both["prompt"] == "What color is\nthis\nof the star?"
    assert "\ufffd" in json.loads(run("--json", stdin=b"caf\xe9?").out)["prompt"]


@pytest.mark.slow
def test_a_prompt_is_answered_though_stdin_stays_open():
    """As under ssh or a scheduler: a pipe that nobody writes to, nor closes."""
    program = subprocess.Popen(
        [sys.executable, "chat.py", EXAMPLE, f"--prompt={STAR}", "--temperature=0"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        program.wait(timeout=60)
        assert program.returncode == 0 and "red" in program.stdout.read()
        assert "nothing arrived on stdin" in program.stderr.read()
    finally:
        program.kill()
        program.communicate()


@pytest.mark.slow
def test_paths_are_found_where_the_file_system_encoding_is_not_utf_8(tmp_path):
    picture = tmp_path / "röt\u661f.png"
    shutil.copy(EXAMPLE, picture)
    shards = tmp_path / "shards.txt"
    write_tar(tmp_path / "röt.tar", "ab")
    shards.write_text(f"{tmp_path}/röt.tar\n", "utf-8")
    ascii_alone = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    data = ["configs/tiny_stage1.py", f"--data={shards}", "--prepare={}"]
    for arguments, stdin, words in (
        (["chat.py", "--temperature=0"], f"{picture}\n{STAR}\n", "red"),
        (["chat.py", "--temperature=0", str(picture)], f"{STAR}\n", "red"),
        (["tools/show_data.py", *data], "", "2 good samples and 0 bad ones"),
    ):
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            input=stdin.encode(),
            capture_output=True,
            env=ENV | ascii_alone,
        )
        assert done.returncode == 0 and words in done.stdout.decode(), done.stderr


def test_a_command_on_stdin_makes_a_conversation(run):
    out = run(
        "--json", stdin=f"/image {EXAMPLE}\n{STAR}\n/clear\n{STAR}\n"
    ).out.splitlines()
    rows = [json.loads(line) for line in out if line.startswith("{")]
    assert [row["pictures"] for row in rows] == [[EXAMPLE], []] and "red" in rows[0][
        "answer"
    ]


def test_json_tells_all_about_an_answer(run):
    row = json.loads(
        run("-", f"--prompt={STAR}", "--json", stdin=Path(EXAMPLE).read_bytes()).out
    )
    assert row.keys() == {"prompt", "pictures", "answer", "tokens", "seconds", "ended"}
    assert row["pictures"] == ["-"] and row["ended"] and "red" in row["answer"]
    assert row["tokens"] > 3 and 0 < row["seconds"] < 60
    cut = json.loads(
        run(EXAMPLE, f"--prompt={STAR}", "--json", "--max_new_tokens=2").out
    )
    assert cut["tokens"] == 2 and not cut["ended"]


def test_with_json_stdout_has_answers_alone(run):
    talk = f"/image {EXAMPLE}\nHi\n/undo\n/show\n/set seed 3\n/help\n/x\n/clear\nHi\n"
    out, err = run("--json", stdin=talk)
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["Hi", "Hi"]
    for words in ("seen", "Forgotten: Hi", "/x: unknown command", "begins"):
        assert words in err


def test_a_picture_that_is_not_there_is_named_and_nothing_is_answered(run):
    out, err = run(stdin="/undo\nWhat is in photos/typo.png?\n/tmp/typo.png What?\n")
    assert out == "There is no question yet.\n"
    for name in ("photos/typo.png", "/tmp/typo.png"):
        assert f"error: {name}: there is no such picture on this computer" in err
    _, err = run(stdin="See a.heic\n/tmp/b.png What is this?")
    assert "/tmp/b.png: there is no such picture" in err
    with pytest.raises(InputError, match="cat.jpeg: there is no such picture"):
        run("--prompt=What is in https://example.org/cat.jpeg?")
    out, _ = run("--prompt=What is a .png?", "--max_new_tokens=2")
    assert out


def test_a_picture_on_stdin_needs_no_dash(run, tmp_path):
    content = Path(EXAMPLE).read_bytes()
    out, _ = run(f"--prompt={STAR}", stdin=content)
    assert "red" in out
    Image.open(EXAMPLE).convert("RGB").save(tmp_path / "a b.jpg")
    address = (tmp_path / "a b.jpg").as_uri()
    assert "red" in run(address, f"--prompt={STAR}").out


def test_a_file_that_exists_is_not_overwritten(run, tmp_path):
    (tmp_path / "a.md").write_text("mine")
    _, err = run(stdin=f"Hi\n/save {tmp_path}/a.md\n/save\n")
    assert "a.md: it exists already; give a new one" in err
    assert "/save wants a file name" in err
    assert (tmp_path / "a.md").read_text() == "mine"


def test_a_command_with_a_typing_mistake_is_hinted_at(run):
    out, _ = run(stdin="/clear\n/undoo\n/zzz\n")
    assert "/undoo: unknown command; did you mean /undo?" in out
    assert "/zzz: unknown command\n" in out


def test_a_picture_in_the_prompt_is_shown_and_none_is_noted(run):
    found = run(f"--prompt=What color is the star in '{EXAMPLE}'?")
    assert "red" in found.out and "no picture" not in found.err
    assert "no picture has been shown" in run("--prompt=Hello").err


def test_save_and_stats(run, tmp_path):
    files = f"/save {tmp_path}/a.json\n/save '{tmp_path}/a.md'\n"
    out, err = run(stdin=f"/image {EXAMPLE}\n/set stats on\n{STAR}\n{files}/show\n")
    assert (
        "tokens/s, first word after" in err
        and "MiB" in err
        and "stats               True" in out
    )
    saved = json.loads((tmp_path / "a.json").read_text())
    (row,) = saved["turns"]
    assert (row["prompt"], row["pictures"], row["ended"]) == (STAR, [EXAMPLE], True)
    assert saved["template"] == "vicuna" and saved["options"]["temperature"] == 0
    assert "tiny" in saved["model"]
    assert row["answer"] in out
    text = (tmp_path / "a.md").read_text()
    assert f"![](<{EXAMPLE}>)\n\n**{STAR}**\n\n{row['answer']}\n" == text


@pytest.mark.parametrize(
    "path", ["", ".", "/", "nowhere/a.md", "README.md/x", "x" * 300, "a\0/b"]
)
def test_a_conversation_that_cannot_be_saved_goes_on(run, path):
    out, err = run(EXAMPLE, stdin=f"{STAR}\n/save {path}\n/regenerate\n")
    assert re.search("cannot be written|exists already|wants a file name", err)
    assert out.count("red") == 2


@pytest.mark.slow
def test_a_message_that_fails_leaves_nothing_behind(run, tmp_path):
    (tmp_path / "no.png").write_text("no picture")
    lines = [
        STAR,
        f"'{EXAMPLE}' {tmp_path}/no.png How many?",
        "/save a.json",
        "/regenerate",
        *[f"/image {EXAMPLE}"] * 9,
        "/regenerate",
        *["/undo"] * 9,
        "And of the ring?",
    ]
    out, err = run(
        EXAMPLE, stdin="\n".join(lines).replace("a.json", f"{tmp_path}/a.json")
    )
    assert "no.png: cannot be read" in err and "room for; shorten it" in err
    turns = json.loads((tmp_path / "a.json").read_text())["turns"]
    assert [turn["prompt"] for turn in turns] == [STAR]
    assert (
        out.count("red") == 2
        and out.count("seen.") == out.count("Forgotten") == 9
        and "yellow" in out
    )


def python(*words, stdin="", **env):
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        input=stdin.encode(),
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
    )


@pytest.mark.slow
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
