"""Files: checked before they are read, replaced as a whole, rows of JSON."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from plumbing.console import InputError

# of pictures
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
HEIF_SUFFIXES = (".heic", ".heif", ".avif")
SUFFIXES += HEIF_SUFFIXES

BOM = b"\xef\xbb\xbf"


def start_of(path: str | Path, kind: str = "file") -> bytes:
    """A file's first 64 bytes.

    Raises InputError if it is missing, a folder or a pipe, a Git LFS pointer, or a web
    page that was saved instead of the download.
    """
    if not os.path.exists(path):
        raise InputError(f"{path}: there is no such {kind}")
    if not os.path.isfile(path):
        raise InputError(f"{path}: not a file")
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise InputError(
            f"{path}: a Git LFS pointer, not the content; "
            "run `git lfs pull` in its folder"
        )
    text = start.lstrip(BOM + b" \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html")):
        raise InputError(
            f"{path}: a saved web page, no PyTorch file or other data; download again"
        )
    return start


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises InputError for anything else."""
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


def read_rows(path: str | Path) -> tuple[list[tuple[int, bytes]], bytes]:
    """A file of JSON rows -> (its lines, the rest after the last newline).

    Lines come with their number from 1; blank ones are left out. The rest is b"", or a
    row that was cut while it was written.
    """
    *lines, rest = Path(path).read_bytes().split(b"\n")
    numbered = enumerate(lines, 1)
    rows = [(number, line) for number, line in numbered if line.strip()]
    return rows, rest


def append_row(file, **row):
    """Append a JSON line to an open file. Raises InputError if that fails."""
    try:
        print(json.dumps(row), file=file, flush=True)
    except OSError as e:
        with suppress(OSError):  # closing fails, too, and would hide the message
            file.close()
        raise InputError(
            f"{file.name}: cannot be written ({e.strerror}); what it holds is kept"
        ) from e


def lock(file, message: str):
    """Keep other processes from writing to an open file, until this one ends.

    Raises InputError with the message if another has it. To open and close the same
    file again would end the lock.
    """
    with suppress(ImportError, OSError):  # Windows, or a file system without locks
        from fcntl import LOCK_EX, LOCK_NB, lockf

        try:
            lockf(file, LOCK_EX | LOCK_NB)
        except (BlockingIOError, PermissionError) as e:
            raise InputError(message) from e


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write to; at the end, it replaces `path` in one move.

    Raises InputError if writing fails; `path` is then as before.
    """
    target = Path(path)
    temporary = target.parent / f".{target.name}.tmp"
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes its files private to their owner
        with open(temporary, "rb+") as file:  # Windows flushes only writable files
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except (OSError, RuntimeError, SafetensorError) as e:
        raise InputError(
            f"{path or '?'}: cannot be written ({e}); what was there before is kept"
        ) from e
    finally:
        with suppress(OSError):
            temporary.unlink()


def relative_path(path: str, folder: str) -> str:
    """A path as it is seen from a folder, which may be a link."""
    return os.path.relpath(os.path.realpath(path), os.path.realpath(folder))
