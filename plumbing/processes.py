"""Processes: device, signals, memory, commands that make missing data."""

import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from plumbing.console import InputError, note

# that end a run after its step; Windows has not all of them
SIGNALS = [
    getattr(signal, name)
    for name in ("SIGTERM", "SIGUSR1", "SIGINT")
    if hasattr(signal, name)
]


def peak_mib(device: torch.device | str) -> float:
    """The process's own peak: tensors on a GPU, or resident memory; NaN on Windows."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with suppress(OSError):  # Linux only
        status = Path("/proc/self/status").read_text()
        if found := re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE):
            return int(found[1]) / 2**10
    # a started process inherits this peak from the process that started it
    with suppress(ImportError):
        from resource import RUSAGE_SELF, getrusage

        peak = getrusage(RUSAGE_SELF).ru_maxrss
        is_mac = sys.platform == "darwin"
        return peak / (2**20 if is_mac else 2**10)  # bytes, or KiB
    return float("nan")


def pick_device(name: str = "", index: int = 0) -> torch.device:
    """ "" -> cuda if there is one, else cpu. Raises InputError for a device that this machine lacks."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name, index) if name == "cuda" else torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as e:
        raise InputError(
            f"device {name!r}: not available on this machine ({str(e).splitlines()[0]})"
        ) from e
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def ignore_signals(worker: int):
    """In a data worker: SIGNALS reach all processes of a run; the training process saves and stops it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def start_workers(loader: DataLoader) -> Iterator:
    """An iterator over a loader, whose workers start now."""
    batches = iter(loader)
    if hasattr(signal, "SIGCHLD"):
        # PyTorch's handler would raise anywhere, also while a file is written
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return batches


def make_missing(prepare: dict[str, str], used: list[str]):
    """Make the paths that are missing, if one of them is used or holds one that is.

    prepare: {path: arguments of python that make it}, in the order to run them. Paths
    that exist are left alone. Raises InputError when a command fails.
    """
    missing = [path for path in prepare if not Path(path).exists()]
    if not any(is_within(path, missing) for path in used):
        return
    for path in missing:
        note(f"{path} is missing; making it: python {prepare[path]}")
        command = [sys.executable, *shlex.split(prepare[path])]
        if subprocess.run(command).returncode != 0:
            raise InputError(f"{path} could not be made: the command above failed")


def is_within(path: str, folders: list[str]) -> bool:
    """Whether a path is one of `folders`, or lies in one."""
    return any(f"{path}/".startswith(f"{folder}/") for folder in folders)
