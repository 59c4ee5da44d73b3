"""Mistakes of the user and ours, and Ctrl-C."""

import signal
import subprocess
import sys
import time

import pytest

import chat
import train
from plumbing.console import InputError, run_main
from tests.common import ROOT


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


def test_a_mistake_of_ours_gives_a_traceback():
    with pytest.raises(ValueError):
        run_main(lambda argv: int("ours"))
    assert not issubclass(
        InputError, ValueError
    )  # or `except ValueError` would swallow it


def test_ctrl_c_ends_a_script_with_130_and_a_mistake_with_2():
    code = (
        "import sys, time, model, chat, plumbing.console\n"
        "def generate(*args, **options):\n    print('begun', flush=True); time.sleep(30); yield 5\n"
        "model.MiniGPT4.generate = generate\nplumbing.console.run_main(chat.main)"
    )
    program = subprocess.Popen(
        [sys.executable, "-c", code, "--prompt=x"],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert program.stdout.readline() == "begun\n"
    time.sleep(0.2)
    program.send_signal(signal.SIGINT)
    assert (
        "Traceback" not in program.communicate(timeout=20)[1]
        and program.returncode == 130
    )
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
