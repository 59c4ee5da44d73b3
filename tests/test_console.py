"""Mistakes of the user and ours, and Ctrl-C."""

import io
import signal
import subprocess
import sys
import time
import warnings

import pytest
from PIL import Image

import chat
import train
from plumbing.console import (
    InputError,
    note,
    note_warnings,
    optional_package,
    outlive_reader,
    printable,
    progress,
    run_main,
    set_quiet,
)
from tests.common import ROOT, readable
from tests.runs import ENV, command, micro, wait_until
from vision import load_image


@pytest.mark.parametrize(
    "arguments",
    [
        ["train.py"],
        ["train.py", "configs/none.py"],
        ["train.py", "configs/stage1.py"],
        ["train.py", "configs/stage1.py", "--stpes=3"],
        ["chat.py", "none.jpg"],
        ["chat.py", "--ckpt=nowhere"],
        ["chat.py", "--prompt"],
    ],
    ids=readable,
)
def test_a_mistake_of_the_user_gives_one_line_and_status_2(
    arguments, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        run_main({"train.py": train, "chat.py": chat}[arguments[0]].main)
    errors = [
        line
        for line in capsys.readouterr().err.splitlines()
        if line.startswith("error: ")
    ]
    assert end.value.code == 2 and len(errors) == 1


@pytest.fixture
def quiet():
    set_quiet(True)
    yield
    set_quiet(False)


def test_a_quiet_process_prints_no_notes_and_no_progress_but_errors(quiet, capsys):
    def main(argv):
        note("as every process knows")
        list(progress(range(3), "reading"))
        raise InputError("this process's disk is full")

    with pytest.raises(SystemExit):
        run_main(main)
    assert capsys.readouterr().err == "error: this process's disk is full\n"


def test_a_tool_prints_its_notes_where_a_cluster_sets_the_rank(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    note("two  words\nand \x1b[2J")
    assert capsys.readouterr().err == "two words and \\x1b[2J\n"


@pytest.mark.slow
def test_of_several_training_processes_one_prints_notes(world, tmp_path):
    data = tmp_path / "shards.txt"
    data.write_text(f"{world['data']}/00000.tar\n{tmp_path}/missing.tar\n")
    config = micro(world, tmp_path / "run", max_steps=1, data=str(data))
    done = subprocess.run(
        command(config, processes=2), env=ENV, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("1 of 2 shards are missing") == 1


@pytest.mark.parametrize("letter", "\u200c\u200d\u200e\u200f")
def test_marks_that_scripts_need_are_printed(letter):
    assert printable(f"a{letter}b") == f"a{letter}b"


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "^the page needs the package odd_package: pip install odd_package$"),
        ("raise ImportError('no socksio')", "odd_package cannot be imported: no sock"),
        ("import missing_one", "odd_package cannot be imported: .*missing_one"),
        ("1 / 0", "odd_package cannot be imported: division by zero"),
    ],
    ids=["missing", "import_error", "needs_another", "broken"],
)
def test_a_missing_package_and_a_broken_one_are_told_apart(
    tmp_path, monkeypatch, content, words
):
    if content:
        (tmp_path / "odd_package.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=words):
        optional_package("odd_package", "the page")


@pytest.mark.parametrize("name", ["\n", "a\nb", "a\r\nb", "a\u2028b\x0b"])
def test_a_message_is_one_line_whatever_it_quotes(name):
    message = str(InputError(f"the architecture {name} is not supported"))
    assert len(message.splitlines()) == 1
    assert message.startswith("the architecture ")
    assert message.endswith(" is not supported")


def test_text_that_would_control_a_terminal_is_shown_as_codes():
    assert printable("\x1b[2Ja\r\u202e\ud800") == "\\x1b[2Ja\\x0d\\x202e\\xd800"
    joined = "caf\u00e9 \u4e2d\n\t\U0001f469\u200d\U0001f680"
    assert printable(joined) == joined


def test_a_stream_without_a_reader_loses_text_but_raises_nothing():
    class Pipe(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    pipe = Pipe()
    with pytest.raises(BrokenPipeError):
        print("nobody reads this", file=pipe)
    outlive_reader(pipe)
    print("nobody reads this", file=pipe, flush=True)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_program_runs_with_closed_streams(closed):
    code = "from plumbing.console import note, run_main; "
    code += "run_main(lambda argv: (note('a'), print('b'), sys.stdin.read()))"
    shell = f'exec "$0" -c "$1" {closed}'
    start = ["sh", "-c", shell, sys.executable, f"import sys; {code}"]
    done = subprocess.run(start, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_mistake_of_ours_gives_a_traceback():
    with pytest.raises(ValueError):
        run_main(lambda argv: int("ours"))
    assert not issubclass(
        InputError, ValueError
    )  # or `except ValueError` would swallow it


@pytest.mark.slow
def test_ctrl_c_ends_a_script_with_130_and_a_mistake_with_2(tmp_path):
    code = (
        "import sys, time, model, chat, plumbing.console\n"
        "def generate(*args, **options):\n"
        "    print('begun', flush=True)\n"
        "    time.sleep(30)\n"
        "    yield 5\n"
        "model.MiniGPT4.generate = generate\n"
        "plumbing.console.run_main(chat.main)\n"
    )
    out, err = tmp_path / "out", tmp_path / "err"
    with out.open("w") as stdout, err.open("w") as stderr:
        program = subprocess.Popen(
            [sys.executable, "-c", code, "--prompt=x"],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
        )
    wait_until(program, lambda: out.read_text() == "begun\n")
    time.sleep(0.2)
    program.send_signal(signal.SIGINT)
    assert program.wait(20) == 130
    assert "Traceback" not in err.read_text()
    done = subprocess.run(
        [sys.executable, "chat.py", "nowhere.png"],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2
        and "nowhere.png" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_pillow_s_warnings_are_notes_and_others_stay(tmp_path, monkeypatch, capsys):
    others = []
    monkeypatch.setattr(warnings, "showwarning", lambda *given: others.append(given))
    warnings.simplefilter("always")  # pytest undoes it
    broken = b"Exif\0\0MM\0*\0\0\0\x08\0\x05" + b"\x01\x12\0\x03\0\0\0\x01"
    path = tmp_path / "a.jpg"
    Image.new("RGB", (20, 20)).save(path, exif=broken)
    note_warnings()
    load_image(str(path), 20)
    err = capsys.readouterr().err
    assert err.startswith("note: a picture: Corrupt EXIF data.")
    assert err.count("\n") == 1
    assert not others
    warnings.warn("ours", stacklevel=1)
    assert len(others) == 1 and not capsys.readouterr().err
