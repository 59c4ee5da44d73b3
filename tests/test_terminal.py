"""chat.py in a pseudo-terminal, as a user drives it."""

import os
import re
import shutil
import signal
import sys
import time
from contextlib import suppress

import pytest
import torch

from plumbing.terminal import find_pictures, half_blocks
from tests.common import EXAMPLE, ROOT

pty = pytest.importorskip("pty")
SLOW = """import sys, time, model
fast = model.MiniGPT4.generate
def generate(*args, **options):
    for token in fast(*args, **options):
        time.sleep(0.05)
        yield token
model.MiniGPT4.generate = generate
import chat, configs.schema
plumbing.console.run_main(chat.main)
"""


class Terminal:
    """The program in a pseudo-terminal; `see` waits for words and returns what was printed up to them."""

    def __init__(self, folder, *args, slow=False, env=None, columns=80):
        environment = {
            "TERM": "xterm-256color",
            "HOME": str(folder),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "COLUMNS": str(columns),
        } | (env or {})
        command = [
            sys.executable,
            *(["-c", SLOW] if slow else ["chat.py"]),
            "--temperature=0",
            *args,
        ]
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.execve(sys.executable, command, {**os.environ, **environment})
        os.set_blocking(self.fd, False)
        self.all = self.unseen = b""

    def type(self, text):
        text = text.encode() if isinstance(text, str) else text
        while text:
            with suppress(BlockingIOError):  # the program has not read what was typed
                text = text[os.write(self.fd, text[:1000]) :]
            self.read()

    def see(self, words, seconds=20):
        end = time.time() + seconds
        while words.encode() not in self.unseen and time.time() < end and self.read():
            pass
        seen, found, rest = self.unseen.partition(words.encode())
        assert found, f"{words!r} is not in {self.unseen[-2000:]!r}"
        self.unseen = rest
        return (seen + found).decode(errors="replace")

    def read(self):
        """Read what was printed; False when the program has ended."""
        try:
            new = os.read(self.fd, 65536)
        except BlockingIOError:
            new = b""
            time.sleep(0.02)
        except OSError:
            return False
        self.all, self.unseen = self.all + new, self.unseen + new
        return True

    def ask(self, message, words):
        self.type(message + "\n")
        return self.see(words)

    def end(self, seconds=20):
        """The exit status."""
        end = time.time() + seconds
        while time.time() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            self.read() or time.sleep(0.02)
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError(f"the program goes on: {self.all[-500:]!r}")


@pytest.mark.slow
def test_a_conversation(tmp_path):
    spaced = tmp_path / "my photo (1).png"
    shutil.copy(EXAMPLE, spaced)
    t = Terminal(tmp_path, EXAMPLE)
    assert "\x1b[38;2;" in t.see("you> ")  # the picture in colors
    assert "red" in t.ask("What color is the star?", "you> ")
    t.type("\x1b[A\n")  # the last message again
    assert "What color is the star?" in t.see("red")
    t.see("you> ")
    assert "Forgotten" in t.ask("/undo", "you> ")
    assert "red" in t.ask("/regenerate", "red")
    t.see("you> ")
    t.ask('"""How many objects\nare there?"""', "you> ")
    assert "How many objects\r\nare there?" in t.ask("/undo", "there?")
    t.see("you> ")
    escaped = re.sub(r"([ ()])", r"\\\1", str(spaced))
    for spelling in (
        f"'{spaced}'",
        f'"{spaced}"',
        escaped,
        "file://" + str(spaced).replace(" ", "%20"),
        str(spaced),
        escaped.replace(str(tmp_path), "~"),
    ):
        assert "What would you like to know?" in t.ask(spelling, "know?")
        t.see("you> ")
        t.ask("/clear", "you> ")
    assert "red" in t.ask(f"What color is the star in {escaped}?", "red")
    t.see("you> ")
    t.type("/regen\t\n")
    t.see("red")
    t.see("you> ")
    t.type(f"/image {str(spaced)[:-9]}\x15/bye\n")
    assert t.end() == 0
    assert "What color is the star?" in (tmp_path / ".nanominigpt4_history").read_text()


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_at_the_prompt_leads_to_a_fresh_line(tmp_path):
    t = Terminal(tmp_path, EXAMPLE, slow=True)
    t.see("you> ")
    t.type("Describe this image in detail.\n")
    t.see("There are")
    t.type("\x03")
    assert "you stopped it" in t.see("you> ")
    t.type("abc\x03")
    t.see("(/bye or Ctrl-D leaves)")
    t.see("you> ")
    assert "red" in t.ask("What color is the star?", "red")
    t.see("you> ")
    t.type("\x04")
    assert t.end() == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, env", [(["--plain"], {}), ([], {"NO_COLOR": "1"}), ([], {"TERM": "dumb"})]
)
def test_plain_text_alone(tmp_path, options, env):
    t = Terminal(tmp_path, EXAMPLE, *options, env=env)
    t.see("you> ")
    t.ask("What color is the star?", "red")
    t.see("you> ")
    t.type("/bye\n")
    assert t.end() == 0
    assert not re.search(
        rb"[^\x20-\x7e\t\r\n\x80-\xff]", t.all
    )  # the terminal itself adds "\r"


@pytest.mark.slow
def test_odd_input(tmp_path):
    t = Terminal(tmp_path, EXAMPLE, columns=20)
    t.see("you> ")
    t.type(b"What color is the star, caf\xe9?\n")
    t.see("you> ")
    t.type("word " * 20000 + "\n")
    t.see("room for")
    t.see("you> ")
    assert "red" in t.ask("What color is the star?", "red")
    t.see("you> ")
    t.type("/bye\n")
    assert t.end() == 0 and b"Traceback" not in t.all


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


def test_half_blocks_hold_two_pixels_each():
    image = torch.arange(12, dtype=torch.uint8).view(
        3, 2, 2
    )  # red, green, blue: 0-3, 4-7, 8-11
    assert half_blocks(image) == (
        "\x1b[38;2;0;4;8;48;2;2;6;10m\u2580\x1b[38;2;1;5;9;48;2;3;7;11m\u2580\x1b[0m"
    )
    assert len(half_blocks(torch.zeros(3, 6, 6, dtype=torch.uint8)).splitlines()) == 3
