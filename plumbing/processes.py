"""Processes: device, signals, memory."""

import signal
import sys
from contextlib import suppress

import torch

from plumbing.console import InputError

# that end a run after its step; Windows has not all of them
SIGNALS = [
    getattr(signal, name)
    for name in ("SIGTERM", "SIGUSR1", "SIGINT")
    if hasattr(signal, name)
]


def peak_mib(device: torch.device | str) -> float:
    """The peak of this process's tensors on a GPU, or of its resident memory; NaN on Windows."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with suppress(ImportError):
        from resource import RUSAGE_SELF, getrusage

        return getrusage(RUSAGE_SELF).ru_maxrss / (
            2**20 if sys.platform == "darwin" else 2**10
        )
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
