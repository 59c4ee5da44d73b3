"""Files: what one is before it is opened, whole ones, rows of JSON."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from plumbing.console import InputError


def append_row(file, **row):
    """Append a JSON line to an open file. Raises InputError when that fails."""
    try:
        print(json.dumps(row), file=file, flush=True)
    except OSError as e:
        with suppress(OSError):  # which would be the user's message instead
            file.close()
        raise InputError(
            f"{file.name}: cannot be written ({e.strerror}); what it holds is kept"
        ) from e


def start_of(path: str | Path, kind: str = "file") -> bytes:
    """A file's first bytes. Raises InputError if it is missing, a pipe, or something saved in its place."""
    if not os.path.isfile(path):
        raise InputError(
            f"{path}: {'not a file' if os.path.exists(path) else f'there is no such {kind}'}"
        )
    with open(path, "rb") as f:
        start = f.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise InputError(
            f"{path}: a Git LFS pointer, not the content; run `git lfs pull` in its folder"
        )
    if (
        start.lstrip(b"\xef\xbb\xbf \t\r\n")
        .lower()
        .startswith((b"<!doctype", b"<html"))
    ):
        raise InputError(
            f"{path}: a saved web page, no PyTorch file or other data; download again"
        )
    return start


def read_json(path: Path) -> dict:
    """A JSON file that holds an object."""
    start_of(path)
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: not valid JSON ({e}); fetch or make it again") from e
    if not isinstance(content, dict):
        raise InputError(
            f"{path}: it should hold a JSON object; fetch or make it again"
        )
    return content


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; it replaces `path` at the end, in one move."""
    temporary = Path(path).parent / f".{Path(path).name}.tmp"
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes its files private to their owner
        with open(temporary, "rb+") as f:  # Windows flushes only what it may write to
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as e:
        raise InputError(
            f"{path or '?'}: cannot be written ({e}); what was there before is kept"
        ) from e
    finally:
        with suppress(OSError):
            temporary.unlink()


SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def read_rows(path: str | Path) -> tuple[list[tuple[int, bytes]], bytes]:
    """The lines of a file of JSON rows that are not blank, each with its number from 1,
    and what follows the last newline: b"", or a row that was cut while it was written.
    """
    *lines, rest = Path(path).read_bytes().split(b"\n")
    rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    return rows, rest
