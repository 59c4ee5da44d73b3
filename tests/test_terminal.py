"""plumbing/terminal.py, and chat.py in a pseudo-terminal, as a user drives it."""

import os
import re
import shutil
import sys
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plumbing import terminal
from plumbing.console import InputError
from plumbing.terminal import (
    Wrapper,
    check_pictures,
    completions,
    find_pictures,
    half_blocks,
)
from tests.common import EXAMPLE

Terminal = pytest.importorskip("tests.pseudo_terminal").Terminal

NAMES = ("/image", "/reset", "/regenerate", "/help")
SETTINGS = ("top_p", "temperature")
START = """
from plumbing.console import run_main
run_main(chat.main)
"""
SLOW = """
import time
import chat

fast = chat.MiniGPT4.generate

def generate(*args, **options):
    for token in fast(*args, **options):
        time.sleep(0.05)
        yield token

chat.MiniGPT4.generate = generate
"""
WITH_BAR = """
import chat
from plumbing.console import progress

load = chat.load

def load_with_bar(options):
    for _ in progress(range(2), "the bar"):
        pass
    return load(options)

chat.load = load_with_bar
"""


@pytest.fixture
def start(tmp_path):
    """A function that starts chat.py; what is left of it is killed.

    `before` is Python code that imports chat and changes the program.
    """
    terminals = []

    def call(*args, before="import chat", **options):
        arguments = ("-c", before + START, "--temperature=0", *args)
        terminals.append(Terminal(tmp_path, *arguments, **options))
        return terminals[-1]

    yield call
    for each in terminals:
        each.kill()


# ---- in a pseudo-terminal ------------------------------------------------------------


@pytest.mark.slow
def test_a_conversation(start, tmp_path):
    spaced = tmp_path / "my photo (1).png"
    shutil.copy(EXAMPLE, spaced)
    t = start(EXAMPLE)
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
    t.type("/bye\n")
    assert t.end() == 0
    assert "What color is the star?" in (tmp_path / ".nanominigpt4_history").read_text()


@pytest.mark.slow
def test_tab_completes_commands_and_paths(start, tmp_path):
    (tmp_path / "folder").mkdir()
    shutil.copy(EXAMPLE, tmp_path / "folder/star.png")
    t = start()
    t.see("you> ")
    t.type(f"/ima\t {tmp_path}/fol\tsta\t\n")
    t.see(f"{tmp_path}/folder/star.png: seen")
    t.see("you> ")
    t.type("What color is the star?\n")
    t.see("red")
    t.see("you> ")
    t.type("/regen\t\n")
    t.see("red")
    t.see("you> ")
    t.type("/bye\n")
    assert t.end() == 0


@pytest.mark.slow
def test_pasted_lines_are_one_message(start):
    t = start(EXAMPLE)
    t.see("you> ")
    t.type("\033[200~What color is\nthe star?\033[201~\n")
    t.see("red")
    t.see("you> ")
    t.type("/undo\n")
    t.see("Forgotten: What color is")
    t.see("you> ")
    t.type("/undo\n")
    t.see("example.png")  # there was one question alone
    t.type("/bye\n")
    assert t.end() == 0


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_at_the_prompt_leads_to_a_fresh_line(start):
    t = start(EXAMPLE, before=SLOW)
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
def test_a_terminal_gets_progress_bars(start):
    t = start(before=WITH_BAR)
    t.see("the bar: 100%")
    t.see("you> ")
    t.type("\x04")
    assert t.end() == 0


PLAIN = {
    "--plain": (["--plain"], {}),
    "NO_COLOR": ([], {"NO_COLOR": "1"}),
    "TERM=dumb": ([], {"TERM": "dumb"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("options, env", PLAIN.values(), ids=PLAIN)
def test_plain_text_alone(start, options, env):
    t = start(EXAMPLE, *options, env=env, before=WITH_BAR)
    t.see("you> ")
    t.ask("What color is the star?", "red")
    t.see("you> ")
    t.type("/bye\n")
    assert t.end() == 0
    assert b"the bar" not in t.all
    # the terminal itself adds "\r"
    assert not re.search(rb"[^\x20-\x7e\t\r\n\x80-\xff]", t.all)


@pytest.mark.slow
def test_odd_input(start):
    t = start(EXAMPLE, columns=20)
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


# ---- Tab -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, found",
    [
        ("/re", ["/reset", "/regenerate"]),
        ("/image", ["/image"]),
        ("/x", []),
        ("re", []),
    ],
    ids=["two commands", "one command", "unknown", "no slash"],
)
def test_completions_of_commands(text, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert completions(text, NAMES) == found


def test_completions_of_paths(tmp_path, monkeypatch):
    (tmp_path / "[a]").mkdir()
    (tmp_path / "[a]/b.png").touch()
    (tmp_path / "ab.png").touch()
    (tmp_path / ".hidden").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert completions("a", ()) == ["ab.png"]
    assert completions("[", ()) == ["[a]/"]
    assert completions("[a]/", ()) == ["[a]/b.png"]
    assert sorted(completions("", NAMES)) == ["[a]/", "ab.png"]
    assert completions("~/ab", ()) == [f"{tmp_path}/ab.png"]
    assert completions(f"{tmp_path}/[", NAMES) == [f"{tmp_path}/[a]/"]
    assert completions("nowhere/", NAMES) == []


@pytest.fixture
def completer(tmp_path, monkeypatch):
    """What readline calls at Tab, with the column where the word begins to be set."""
    readline = pytest.importorskip("readline")
    monkeypatch.setattr(terminal.atexit, "register", lambda *_: None)
    terminal.set_up_readline(NAMES, SETTINGS, str(tmp_path / "history"))
    assert (tmp_path / "history").exists()

    def complete(text, column):
        monkeypatch.setattr(readline, "get_begidx", lambda: column)
        found = []
        while (match := readline.get_completer()(text, len(found))) is not None:
            found.append(match)
        return found

    yield complete
    readline.set_completer(None)
    readline.clear_history()


def test_tab_offers_commands_at_the_start_of_a_line_alone(completer):
    assert completer("/re", 0) == ["/reset", "/regenerate"]
    assert completer("/re", 5) == []
    assert completer(EXAMPLE[:-2], 7) == [EXAMPLE]


def test_tab_offers_settings_after_set(completer, monkeypatch):
    readline = pytest.importorskip("readline")
    monkeypatch.setattr(readline, "get_line_buffer", lambda: "/set te")
    assert completer("te", 5) == ["temperature"]


def test_a_folder_without_permission_leaves_the_history_out(monkeypatch):
    readline = pytest.importorskip("readline")
    registered = []
    monkeypatch.setattr(terminal.atexit, "register", registered.append)
    terminal.set_up_readline(NAMES, SETTINGS, "/nowhere/history")
    assert not registered and readline.get_completer()("/he", 0) is not None
    readline.set_completer(None)


# ---- messages ------------------------------------------------------------------------


MESSAGES = {
    "a message": ("  What is it? \n", ("", "What is it?")),
    "a command": ("/set top_p 0.5\n", ("/set", "top_p 0.5")),
    "a tab": ("/image\ta b.png \n", ("/image", "a b.png")),
    "no argument": ("/reset\n", ("/reset", "")),
    "nothing": (" \n", ("", "")),
    "unknown": ("/dance now\n", ("/dance", "now")),
    "a picture": (f"{EXAMPLE} this?\n", ("", f"{EXAMPLE} this?")),
    "several lines": ('"""/reset\nthis?""" now\n', ("", "/reset\nthis?  now")),
    "lines to the end": ('"""/a\nb', ("", "/a\nb")),
    "a quote inside": ('a """b"""\n', ("", 'a """b"""')),
    "zeros": ("a\0b\n", ("", "ab")),
}


@pytest.mark.parametrize("typed, read", MESSAGES.values(), ids=MESSAGES)
def test_messages_and_commands(typed, read, monkeypatch):
    lines = iter(typed.splitlines())

    def input_line(prompt):
        assert prompt == ""  # stdin is no terminal
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", input_line)
    with open(os.devnull) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert terminal.read_message(NAMES) == read


@pytest.mark.parametrize(
    "spelling",
    ["'{}'", '"{}"', "{}", "file://localhost{}", "({})", "`{}`,", "<{}>?"],
    ids=[
        "single quotes",
        "double quotes",
        "escapes",
        "file URL",
        "parentheses",
        "backticks",
        "angle brackets",
    ],
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
    assert find_pictures(f"<file://{tmp_path}/a.png>") == ("", [f"{tmp_path}/a.png"])


@pytest.mark.parametrize(
    "message, text",
    [
        ("\u8bf7\u770b {}\u3002", "\u8bf7\u770b"),
        (
            "\u8bf7\u770b{}\u3002\u8fd9\u662f\u4ec0\u4e48\uff1f",
            "\u8bf7\u770b\u3002\u8fd9\u662f\u4ec0\u4e48\uff1f",
        ),
        ("\u300c{}\u300d\u306f?", "\u300c\u300d\u306f?"),
        ("\u8fd9\u662f{}\u3002", "\u8fd9\u662f\u3002"),
        ("![x]({}) hi", "![x]() hi"),
    ],
    ids=["full stop", "chinese", "japanese", "before", "markdown"],
)
@pytest.mark.parametrize("name", ["a.png", "\u732b.PNG"])
def test_paths_stand_between_chinese_or_japanese_words(tmp_path, message, text, name):
    path = f"{tmp_path}/{name}"
    if name == "a.png":
        with pytest.raises(InputError, match="there is no such picture"):
            check_pictures(message.format(path))
    (tmp_path / name).touch()
    assert find_pictures(message.format(path)) == (text, [path])


@given(
    pieces=st.lists(st.text("ab \n", max_size=8), max_size=9),
    columns=st.integers(1, 20),
)
def test_answers_wrap_at_words(pieces, columns):
    text = "".join(pieces)
    wrapper = Wrapper(columns)
    shown = "".join([*map(wrapper.add, pieces), wrapper.rest()])
    assert shown.split() == text.split()
    assert re.sub(r"\s", "", shown) == re.sub(r"\s", "", text)
    for line in shown.rstrip().split("\n"):
        assert len(line.rstrip()) <= columns or not re.search(r"\S\s+\S", line)
    unbroken = Wrapper(sys.maxsize)
    assert "".join([*map(unbroken.add, pieces), unbroken.rest()]) == text


def test_words_without_spaces_are_shown_at_once_and_wrap_by_their_width():
    wrapper = Wrapper(7)
    assert wrapper.add("\u4f60\u597d") == "\u4f60\u597d"
    assert wrapper.add("\u5417\u3002") == "\u5417\n\u3002"
    assert wrapper.add(" a dog") == " a"
    assert wrapper.rest() == "\ndog"


def test_spaces_stay_in_a_message_without_pictures():
    assert find_pictures("a  b  'c d.png'") == ("a  b  'c d.png'", [])


# ---- text on stdin -------------------------------------------------------------------


@pytest.fixture
def pipe(monkeypatch):
    """A pipe as stdin; the function that writes to it, and with None closes it."""
    reader, writer = os.pipe()
    stdin = os.fdopen(reader)
    monkeypatch.setattr(sys, "stdin", stdin)
    is_open = True

    def write(text):
        nonlocal is_open
        if text is None and is_open:
            is_open = False
            os.close(writer)
        elif is_open:
            os.write(writer, text.encode())

    yield write
    write(None)
    stdin.close()


def test_optional_text_is_read_from_a_pipe(pipe, capsys):
    pipe(" a\nb\n")
    pipe(None)
    assert terminal.read_piped(is_optional=True) == "a\nb"
    assert capsys.readouterr().err == ""


def test_a_pipe_that_was_closed_empty_is_not_waited_for(pipe, capsys):
    pipe(None)
    start = time.monotonic()
    assert terminal.read_piped(is_optional=True) == ""
    assert time.monotonic() - start < 2 and capsys.readouterr().err == ""


def test_optional_text_is_not_waited_for_without_end(pipe, capsys, monkeypatch):
    monkeypatch.setattr(terminal, "PIPE_SECONDS", 0.1)
    assert terminal.read_piped(is_optional=True) == ""
    assert "nothing arrived on stdin" in capsys.readouterr().err


def test_text_that_comes_late_is_read(pipe):
    """Also its end, which comes later still."""
    late = threading.Thread(
        target=lambda: (
            [time.sleep(0.2), pipe("a "), time.sleep(0.2), pipe("b")] and pipe(None)
        )
    )
    late.start()
    assert terminal.read_piped(is_optional=True) == "a b"
    late.join(timeout=5)


def test_text_that_is_not_optional_is_waited_for(pipe, monkeypatch):
    monkeypatch.setattr(terminal, "PIPE_SECONDS", 0.1)
    late = threading.Timer(0.5, lambda: [pipe("late"), pipe(None)])
    late.start()
    assert terminal.read_piped(is_optional=False) == "late"
    late.join(timeout=5)


@pytest.mark.parametrize("content", ["a text\n", ""], ids=["a text", "empty"])
def test_a_file_on_stdin_is_read_at_once(tmp_path, content, monkeypatch, capsys):
    (tmp_path / "text").write_text(content)
    with open(tmp_path / "text") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert terminal.read_piped(is_optional=True) == content.strip()
    assert capsys.readouterr().err == ""


# ---- pictures as text ----------------------------------------------------------------


def test_half_blocks_hold_two_pixels_each():
    # red, green, blue: 0-3, 4-7, 8-11
    image = torch.arange(12, dtype=torch.uint8).view(3, 2, 2)
    assert half_blocks(image) == (
        "\x1b[38;2;0;4;8;48;2;2;6;10m\u2580\x1b[38;2;1;5;9;48;2;3;7;11m\u2580\x1b[0m"
    )
    assert len(half_blocks(torch.zeros(3, 6, 6, dtype=torch.uint8)).splitlines()) == 3


@pytest.mark.parametrize("columns, width", [(1, 2), (21, 20), (80, 40)])
def test_a_picture_fits_the_terminal(columns, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert terminal.picture_width() == width
