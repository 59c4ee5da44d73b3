"""chat.py without a terminal: pictures and text on stdin, JSON, saved conversations, exit status."""

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import chat
from chat import Chat, Options
from llama import Llama, LlamaConfig
from plumbing.terminal import find_pictures, half_blocks

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = str(ROOT / "assets/tiny/example.png")
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
    (row,) = json.loads((tmp_path / "a.json").read_text())
    assert (row["question"], row["pictures"], row["ended"]) == (STAR, [EXAMPLE], True)
    assert row["answer"] in out
    text = (tmp_path / "a.md").read_text()
    assert f"![](<{EXAMPLE}>)\n\n**{STAR}**\n\n{row['answer']}\n" == text


@pytest.mark.parametrize(
    "path", ["", ".", "/", "nowhere/a.md", "README.md/x", "x" * 300, "a\0/b"]
)
def test_a_conversation_that_cannot_be_saved_goes_on(run, path):
    out, err = run(EXAMPLE, stdin=f"{STAR}\n/save {path}\n/regenerate\n")
    assert "cannot be written" in err and out.count("red") == 2


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
    assert [
        row["question"] for row in json.loads((tmp_path / "a.json").read_text())
    ] == [STAR]
    assert (
        out.count("red") == 2
        and out.count("seen.") == out.count("Forgotten") == 9
        and "yellow" in out
    )


@pytest.mark.parametrize(
    "spelling", ["'{}'", '"{}"', "{}", "file://localhost{}", "({})", "`{}`,", "<{}>?"]
)
def test_pictures_are_found_in_messages(tmp_path, spelling):
    path = tmp_path / "it's (a) b.PNG"
    path.write_text("")
    (tmp_path / "a.png").write_text("")
    quoted = str(path).replace("'", "'\\''") if spelling[0] == "'" else str(path)
    if spelling[0] not in "'\"":
        quoted = re.sub(r"([ ()'])", r"\\\1", quoted)
    if spelling.startswith("file"):
        quoted = str(path).replace(" ", "%20").replace("'", "%27")
    message = (
        f"Compare {tmp_path}/data.png {spelling.format(quoted)} {tmp_path}/a.png please"
    )
    assert find_pictures(message) == (
        f"Compare {tmp_path}/data.png please",
        [str(path), f"{tmp_path}/a.png"],
    )


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


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_quantized_model_chats(dtype):
    talk = Chat(*chat.load(Options(device="cpu", temperature=0.0, dtype=dtype)))
    talk.add_image(EXAMPLE)
    assert "red" in "".join(talk.ask(STAR)) and "two" in "".join(
        talk.ask("How many objects are there?")
    )


def test_half_blocks_hold_two_pixels_each():
    image = torch.arange(12, dtype=torch.uint8).view(
        3, 2, 2
    )  # red, green, blue: 0-3, 4-7, 8-11
    assert half_blocks(image) == (
        "\x1b[38;2;0;4;8;48;2;2;6;10m\u2580\x1b[38;2;1;5;9;48;2;3;7;11m\u2580\x1b[0m"
    )
    assert len(half_blocks(torch.zeros(3, 6, 6, dtype=torch.uint8)).splitlines()) == 3


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_compiled_rows_give_the_same_logits_and_no_compiler_is_noted(
    monkeypatch, capsys
):
    torch.manual_seed(0)
    model = Llama(LlamaConfig(64, 64, 64, 2, 4, 4, 16)).requires_grad_(
        False
    )  # one shape to compile
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    rows = [torch.randn(1, 1, 64), torch.randn(1, 5, 64), torch.randn(2, 1, 64)]
    want = [model.logits(model(x)) for x in rows]
    monkeypatch.setenv("CXX", "no-such-compiler")
    model.compile_rows()
    assert "needs a C++ compiler" in capsys.readouterr().err
    monkeypatch.setenv("CXX", "g++")
    model.compile_rows()
    assert capsys.readouterr().err == "" and "forward" in vars(model.lm_head)
    for x, logits in zip(rows, want):
        assert torch.allclose(model.logits(model(x)), logits, atol=1e-4)
