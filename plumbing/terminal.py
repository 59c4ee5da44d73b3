"""The terminal: line editing, pictures as text, messages and the paths in them."""

import atexit
import io
import json
import os
import re
import select
import shutil
import sys
from collections.abc import Collection
from contextlib import suppress
from glob import escape, glob
from pathlib import Path
from unicodedata import east_asian_width
from urllib.parse import unquote

from torch import Tensor

from plumbing.console import InputError, note
from plumbing.files import SUFFIXES, replacing

# A word as terminals insert paths: "a b.png", 'it'\''s a.png', it\'s\ a.png
IN_DOUBLE_QUOTES = r'"([^"]+)"'
IN_QUOTES = r"'((?:[^']|'\\'')+)'"
ESCAPED = r"((?:\\.|\S)+)"
WORD = re.compile(rf"(?<!\S)(?:{IN_DOUBLE_QUOTES}|{IN_QUOTES}|{ESCAPED})")
EAST_ASIAN = "\u3002\uff0c\u3001\uff01\uff1f\uff1a\uff1b\u300c\u300d\uff08\uff09"
PUNCTUATION = "?!.,;:()<>`" + EAST_ASIAN  # around a path in a sentence
ASCII = re.compile(r"[!-~]+")  # Chinese and Japanese have no spaces around a path
SUFFIX = re.compile("|".join(map(re.escape, SUFFIXES)), re.IGNORECASE)
# White space, or nothing after a letter of Chinese, Japanese, Korean, Thai and others
GAP = re.compile(r"(\s+|(?<=[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\uffef]))")
LONGEST_PATH = 4096  # characters
LONG = '"""'  # begins and ends a message of several lines

COLORED_BLOCK = "\x1b[38;2;{};{};{};48;2;{};{};{}m\u2580"  # upper half, lower half
RESET = "\x1b[0m"
PIPE_SECONDS = 5
PICTURE_STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"II*\0", b"MM\0*")


def half_blocks(image: Tensor) -> str:
    """Draw a picture, uint8 (3, H, W), as H / 2 lines of W colored half-blocks."""
    rows = image.permute(1, 2, 0).tolist()
    lines = []
    for upper, lower in zip(rows[::2], rows[1::2]):
        blocks = [COLORED_BLOCK.format(*a, *b) for a, b in zip(upper, lower)]
        lines.append("".join(blocks) + RESET)
    return "\n".join(lines)


def picture_width() -> int:
    """The columns for half_blocks in this terminal: even, at most 40."""
    columns = shutil.get_terminal_size().columns
    return max(2, min(40, columns // 2 * 2))


class Wrapper:
    """Breaks the lines of a growing text at words. A word comes when it is complete."""

    def __init__(self, columns: int):
        self.columns = columns
        self.column = 0  # where the last line ends
        self.gap = ""  # white space after the words that were given back
        self.word = ""  # not complete

    def add(self, piece: str) -> str:
        """The complete words of the text that were not given back before."""
        *complete, self.word = GAP.split(self.word + piece)
        words = ""
        for word, gap in zip(complete[::2], complete[1::2]):
            words += self._place(word)
            self.gap += gap
        return words

    def rest(self) -> str:
        """The end of the text."""
        return self._place(self.word) + self.gap

    def _place(self, word):
        if not word:
            return ""
        before, self.gap = self.gap, ""
        end = self.column + len(before) + width(word)
        if "\n" not in before and self.column and end > self.columns:
            before = "\n"
        if "\n" in before:
            end = len(before.rpartition("\n")[2]) + width(word)
        self.column = end
        return before + word


def width(text: str) -> int:
    """The columns that a text takes: two for each Chinese character, for instance."""
    return sum(2 if east_asian_width(letter) in "WF" else 1 for letter in text)


def answer_columns(is_plain: bool) -> int:
    """The width that answers are wrapped to; without a terminal they are not."""
    if is_plain or not sys.stdout.isatty():
        return sys.maxsize
    return shutil.get_terminal_size().columns


def find_pictures(message: str) -> tuple[str, list[str]]:
    """Split a message into its text and the paths of existing pictures in it."""
    whole = os.path.expanduser(message)
    if _is_picture(whole):  # its spaces need no escapes
        return "", [whole]
    paths = []

    def take(word):
        path = _picture_in(word)
        if path:
            paths.append(path)
            return ""
        start, end, path = _embedded_path(word[0])
        if path:
            paths.append(path)
            return word[0][:start] + word[0][end:]
        return word[0] if word[0].isascii() else ASCII.sub(take_run, word[0])

    def take_run(run):
        path = os.path.expanduser(as_path(run[0].strip(PUNCTUATION)))
        if not _is_picture(path):
            return run[0]
        paths.append(path)
        return ""

    text = WORD.sub(take, message)
    if not paths:
        return message, []
    return re.sub(" {2,}", " ", text).strip(), paths


def _picture_in(word: re.Match):
    """The path of the picture that a word of a message names; "" if there is none."""
    in_double_quotes, in_quotes, escaped = word.groups(default="")
    path = in_double_quotes or in_quotes.replace(r"'\''", "'")
    path = as_path(path or re.sub(r"\\(.)", r"\1", escaped))
    for spelling in (path, as_path(path.strip(PUNCTUATION)), word[0]):
        candidate = os.path.expanduser(spelling)
        if _is_picture(candidate):
            return candidate
    return ""


def _embedded_path(word: str) -> tuple[int, int, str]:
    """Where a path is in a word, "[x](/tmp/a.png)", and the picture; else 0, 0, "".

    Chinese and Japanese have no spaces around a path, which may have their letters.
    """
    starts = [match.start() for match in re.finditer(r"file://|[~/]", word)]
    ends = [match.end() for match in SUFFIX.finditer(word)]
    for start in starts:
        for end in reversed(ends):
            path = os.path.expanduser(as_path(word[start:end]))
            if end - start <= LONGEST_PATH and _is_picture(path):
                return start, end, path
    return 0, 0, ""


def as_path(address: str) -> str:
    """ "file:///tmp/a%20b.png" -> "/tmp/a b.png"; a path stays."""
    if address.startswith("file://"):
        return unquote(re.sub("^file://(localhost)?", "", address))
    return address


def _is_picture(path):
    return path.lower().endswith(SUFFIXES) and os.path.isfile(path)


def check_pictures(text: str):
    """Raise InputError for a word that is named like a picture: "See typo.png?"."""
    for word in (*text.split(), *ASCII.findall(text)):
        name = word.strip(PUNCTUATION + "'\"")
        if _is_named_like_a_picture(name):
            raise InputError(f"{name}: there is no such picture on this computer")


def _is_named_like_a_picture(name):
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def read_message(commands: Collection[str]) -> tuple[str, str]:
    """Read a command with its argument, or "" with a message.

    A message is a line, or the lines between two \"\"\". Raises EOFError when stdin has
    ended.
    """
    you, more = ("you> ", "...> ") if sys.stdin.isatty() else ("", "")
    text = input(you)
    is_long = text.lstrip().startswith(LONG)
    if is_long:
        with suppress(EOFError):  # the end of stdin closes them, too
            while text.count(LONG) < 2:
                text += "\n" + input(more)
        text = text.split(LONG, 1)[1].replace(LONG, " ")
    text = text.replace("\0", "").strip()

    first, *rest = text.split(maxsplit=1) or [""]
    if is_long or not first.startswith("/"):
        return "", text
    if first not in commands:
        _, paths = find_pictures(text)
        # /home/a.png is no unknown command
        if paths or _is_named_like_a_picture(first):
            return "", text
    return first, "".join(rest)


def read_piped(is_optional: bool) -> str | bytes:
    """The text on stdin, without white space around it, or a picture's file.

    It is "" from a terminal.

    Optional text is waited for PIPE_SECONDS: under ssh or a scheduler, for instance,
    stdin may be an open pipe that nobody writes to.
    """
    if sys.stdin.isatty():
        return ""
    if is_optional and not _has_input():
        note(
            f"note: nothing arrived on stdin within {PIPE_SECONDS} s; "
            "continuing without it (</dev/null saves the wait)"
        )
        return ""
    content = b""
    with suppress(OSError):  # it cannot be read
        if isinstance(sys.stdin, io.StringIO):  # has no bytes
            content = sys.stdin.read().encode()
        else:
            content = sys.stdin.buffer.read()
    if content.startswith(PICTURE_STARTS):
        return content
    return content.decode("utf-8-sig", "replace").replace("\0", "").strip()


def _has_input():
    """Whether stdin is a file, has ended, or gets data within PIPE_SECONDS."""
    try:
        readable, _, _ = select.select([sys.stdin], [], [], PIPE_SECONDS)
    except (OSError, ValueError):  # select knows no pipe on Windows and no StringIO
        return True
    return bool(readable)


def has_command(text: str, commands: Collection[str]) -> bool:
    """Whether a line of a text begins with a command, or with a mistyped picture."""
    for word in re.findall(r"^/\S+", text, re.MULTILINE):
        is_missing = _is_named_like_a_picture(word) and not os.path.exists(word)
        if word in commands or is_missing:
            return True
    return False


def set_up_readline(commands: Collection[str], settings: Collection[str], history: str):
    """Switch on arrow keys, a history in a file, and Tab.

    Tab completes commands, the names of settings after /set, and paths. Lines that are
    pasted are one message.
    """
    try:
        import readline
    except ImportError:  # on Windows
        return
    path = Path(history).expanduser()
    with suppress(OSError):  # no folder to write to
        path.touch()
        readline.read_history_file(path)
        atexit.register(readline.write_history_file, path)

    def complete(text, index):
        found = completions(text, commands if readline.get_begidx() == 0 else ())
        if readline.get_line_buffer().startswith("/set "):
            found = [name for name in settings if name.startswith(text)]
        return [*found, None][index]  # None ends the list

    readline.set_completer(complete)
    readline.set_completer_delims(" \t\n\"'")
    readline.parse_and_bind("set enable-bracketed-paste on")
    is_libedit = "libedit" in str(readline.__doc__)
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")


def completions(text: str, commands: Collection[str]) -> list[str]:
    """The commands and paths that begin with `text`, folders with a slash.

    Readline hides exceptions raised here.
    """
    found = [command for command in commands if text and command.startswith(text)]
    for path in glob(escape(os.path.expanduser(text)) + "*"):
        found.append(path + "/" if os.path.isdir(path) else path)
    return found


def write_conversation(path: str, about: dict, turns: list[dict]):
    """Write what a conversation is about and its turns, as JSON or else Markdown.

    Raises InputError without a path, and for one that exists.
    """
    if not path or os.path.exists(path):
        what = f"{path}: it exists already" if path else "/save wants a file name"
        raise InputError(f"{what}; give a new one, such as talk.json or talk.md")
    blocks = []
    for turn in turns:
        blocks += [f"![](<{picture}>)\n" for picture in turn["pictures"]]
        blocks += [f"**{turn['prompt']}**\n", f"{turn['answer']}\n"]
    is_json = path.endswith(".json")
    content = about | {"turns": turns}
    text = json.dumps(content, indent=1) if is_json else "\n".join(blocks)
    with replacing(path) as file:
        file.write_text(text, "utf-8", "replace")
