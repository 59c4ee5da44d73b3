"""What a program says: usage errors, notes, text that is safe to print."""

import os
import sys
import unicodedata
from contextlib import suppress
from functools import partial

from tqdm import tqdm

_plain = False


class InputError(Exception):
    """A mistake of the user. The message is one line: what is wrong, where, and what to do."""


def note(text: str):
    """Print one line on stderr; of several training processes, only the first does."""
    if os.environ.get("RANK", "0") == "0":
        print(printable(" ".join(text.split())), file=sys.stderr)


def progress(items=None, label: str = "", **settings) -> tqdm:
    """tqdm, switched off where stderr is no terminal or where plain text is wanted."""
    return tqdm(items, label, disable=is_plain(), dynamic_ncols=True, **settings)


def is_plain() -> bool:
    """Whether stderr should get text alone: no colors, no progress bars."""
    wanted = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return _plain or bool(wanted) or not sys.stderr.isatty()


def set_plain(plain: bool):
    """Switch colors and progress bars off for the rest of the process (--plain)."""
    global _plain
    _plain = plain


def outlive_reader(stream):
    """Let a stream lose what it cannot write: a run goes on when the reader of its messages has left."""

    def attempt(function, *args):
        with suppress(OSError):
            return function(*args)

    stream.write, stream.flush = (
        partial(attempt, stream.write),
        partial(attempt, stream.flush),
    )


def printable(text: str) -> str:
    """Show characters that would steer a terminal as codes, such as \\x1b."""
    return "".join(
        c
        if c in "\n\t\u200d" or unicodedata.category(c) not in ("Cc", "Cf", "Cs")
        else f"\\x{ord(c):02x}"
        for c in text
    )


def run_main(main):
    """Call `main(argv)`; a mistake of the user becomes one line on stderr and exit status 2."""
    for name in ("stdin", "stdout", "stderr"):
        setattr(
            sys, name, getattr(sys, name) or open(os.devnull, "r+")
        )  # it may be closed
        with suppress(AttributeError):  # tests replace it
            encoding = (
                "utf-8-sig" if name == "stdin" and not sys.stdin.isatty() else None
            )  # None: its own
            getattr(sys, name).reconfigure(encoding=encoding, errors="replace")
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, such as head, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InputError, OSError) as e:  # OSError: no permission, no space left
        print(printable(" ".join(f"error: {e}".split())), file=sys.stderr)
        sys.exit(2)
