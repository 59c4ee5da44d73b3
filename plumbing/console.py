"""What a program says: usage errors, notes, progress, text that is safe to print."""

import importlib
import os
import sys
import unicodedata
import warnings
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

_plain = False
_quiet = False


class InputError(Exception):
    """A usage error. Its message is one line: what is wrong, where, and what to do."""

    def __init__(self, message: str):
        # What it quotes, such as a name in a file, may have several lines.
        super().__init__(" ".join(message.splitlines()))


def optional_package(name: str, purpose: str):
    """Import a package. Raises InputError that says whether it is missing or broken."""
    top = name.partition(".")[0]
    try:
        importlib.import_module(top)
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name == top:
            raise InputError(
                f"{purpose} needs the package {top}: pip install {top}"
            ) from e
        reason = e
    except Exception as e:  # an installed package may raise anything
        reason = e
    raise InputError(f"{purpose}: the package {name} cannot be imported: {reason}")


def note(text: str):
    """Print one line on stderr, unless this process is quiet."""
    if not _quiet:
        _print_line(text)


def note_warnings():
    """Print Pillow's warnings, which are about odd pictures, as notes."""
    show = warnings.showwarning

    def show_warning(message, category, filename, *rest):
        if "PIL" in Path(filename).parts:
            return note(f"note: a picture: {message}")
        show(message, category, filename, *rest)

    warnings.showwarning = show_warning


def progress(items=None, label: str = "", **settings) -> tqdm:
    """tqdm, off if this process is quiet, or where plain text is wanted."""
    disable = _quiet or is_plain()
    return tqdm(items, label, disable=disable, dynamic_ncols=True, **settings)


def set_quiet(quiet: bool):
    """Switch notes and progress off: of a run's processes, only one shows them.

    Errors are always shown: perhaps no other process knows of them.
    """
    global _quiet
    _quiet = quiet


def is_plain() -> bool:
    """Whether stderr should get text alone: no colors, no progress bars."""
    wanted = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return _plain or bool(wanted) or not sys.stderr.isatty()


def set_plain(plain: bool):
    """Switch colors and progress bars off for the rest of the process (--plain)."""
    global _plain
    _plain = plain


def printable(text: str) -> str:
    """Show characters that would control a terminal as codes, such as \\x1b."""
    return "".join(map(_printable, text))


def _printable(character: str) -> str:
    # The zero-width ones join emojis, and are part of words in Persian or Hebrew.
    if character in "\n\t\u200c\u200d\u200e\u200f":
        return character
    if unicodedata.category(character) in ("Cc", "Cf", "Cs"):
        return f"\\x{ord(character):02x}"
    return character


def _print_line(text: str):
    line = " ".join(text.split())
    # In one piece: other processes may print lines, too.
    print(f"{printable(line)}\n", end="", file=sys.stderr)


def outlive_reader(stream):
    """Let a run continue when the reader of its messages is gone; they are lost."""
    stream.write = _without_os_errors(stream.write)
    stream.flush = _without_os_errors(stream.flush)


def _without_os_errors(function):
    def attempt(*args):
        with suppress(OSError):
            return function(*args)

    return attempt


def run_main(main):
    """Call `main(argv)`; a usage error becomes one line on stderr and exit status 2."""
    if sys.getfilesystemencoding() != "utf-8":
        # Typed paths and those in files could not be opened: start again in UTF-8 mode.
        python, *arguments = sys.orig_argv
        os.execv(sys.executable, [python, "-X", "utf8", *arguments])
    for name in ("stdin", "stdout", "stderr"):
        _prepare_stream(name)
    note_warnings()
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, such as head, is gone
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
    except (InputError, OSError) as e:  # OSError: no permission, no space left
        _print_line(f"error: {e}")
        sys.exit(2)


def _prepare_stream(name: str):
    """Make sys.stdin, stdout or stderr accept any text, also if it was closed."""
    if getattr(sys, name) is None:
        nowhere = os.open(os.devnull, os.O_RDWR)
        setattr(sys, name, os.fdopen(nowhere, "r+"))
    stream = getattr(sys, name)
    with suppress(AttributeError):  # tests replace streams
        is_file = name == "stdin" and not stream.isatty()
        encoding = "utf-8-sig" if is_file else None  # None: keep the terminal's
        stream.reconfigure(encoding=encoding, errors="replace")
