"""What a program says: usage errors, notes, text that is safe to print."""

import os
import sys
import unicodedata
from contextlib import suppress
from functools import partial


class InputError(Exception):
    """A mistake of the user. The message is one line: what is wrong, where, and what to do."""


def note(text: str):
    """Tell the user something in one line, on stderr."""
    print(printable(" ".join(text.split())), file=sys.stderr)


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
        note(f"error: {e}")
        sys.exit(2)
