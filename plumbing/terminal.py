"""The terminal: line editing, pictures as text, the paths in a message."""

import os
import re
import sys
from contextlib import suppress
from urllib.parse import unquote

import torch

from plumbing.files import SUFFIXES

# a word, quoted or with its spaces escaped, as terminals insert paths: 'it'\''s a.png', it\'s\ a.png
WORD = re.compile(r"""(?<!\S)(?:"([^"]+)"|'((?:[^']|'\\'')+)'|((?:\\.|\S)+))""")


def half_blocks(image: torch.Tensor) -> str:
    """uint8 (3, S, S), S even -> lines of S characters for a terminal, each of two pixels in true color."""
    rows, cell = (
        image.permute(1, 2, 0).tolist(),
        "\x1b[38;2;{};{};{};48;2;{};{};{}m\u2580",
    )
    lines = (
        "".join(cell.format(*a, *b) for a, b in zip(*pair))
        for pair in zip(rows[::2], rows[1::2])
    )
    return "\x1b[0m\n".join(lines) + "\x1b[0m"


def find_pictures(message: str) -> tuple[str, list[str]]:
    """A message without the paths of pictures in it, as a terminal inserts them, and these paths."""
    paths = []

    def take(word: re.Match) -> str:
        path = (
            word[1]
            or (word[2] or "").replace("'\\''", "'")
            or re.sub(r"\\(.)", r"\1", word[3])
        )
        path = (
            unquote(re.sub("^file://(localhost)?", "", path))
            if path.startswith("file://")
            else path
        )
        for each in map(os.path.expanduser, (path, path.strip("?!.,;:()<>`"), word[0])):
            if each.lower().endswith(SUFFIXES) and os.path.isfile(each):
                return paths.append(each) or ""
        return word[0]

    if (whole := os.path.expanduser(message)).lower().endswith(
        SUFFIXES
    ) and os.path.isfile(whole):
        return "", [whole]  # with spaces that are not escaped
    rest = WORD.sub(take, message)
    return re.sub(" {2,}", " ", rest).strip() if paths else message, paths


def read_message() -> tuple[str, bool]:
    """A line, or what stands between two \"\"\" (or one and the end), and whether it may be a command."""
    you, more = ("you> ", "...> ") if sys.stdin.isatty() else ("", "")
    message = input(you)
    with suppress(EOFError):
        while (is_long := message.lstrip().startswith('"""')) and message.count(
            '"""'
        ) < 2:
            message += "\n" + input(more)
    message = message.split('"""', 1)[1].replace('"""', " ") if is_long else message
    return message.replace("\0", "").strip(), not is_long
