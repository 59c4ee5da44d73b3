"""Processes: device, signals, memory, commands that make missing data."""

import gc
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from plumbing.console import InputError, note, note_warnings, set_quiet

# that end a run after its step; Windows has not all of them
STOPPING = ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP")
SIGNALS = [s for s in signal.Signals if s.name in STOPPING]
MANY_FILES = 4096  # with fewer, tensors are shared by name instead
LAUNCHER = os.getppid()  # torchrun, or a shell


def n_processes() -> int:
    """The processes of the run, each with a device of its own."""
    return dist.get_world_size() if dist.is_initialized() else 1


def process_rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_sum(value: torch.Tensor) -> torch.Tensor:
    """The sum over all processes of the run, in place."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def data_parallel(model: nn.Module) -> nn.Module:
    """The model, its gradients averaged over the processes where there are several.

    It is not copied from rank 0: all ranks start alike, by their seed.
    """
    if n_processes() == 1:
        return model
    return DistributedDataParallel(model, init_sync=False)


def gather(value) -> list:
    """The values of all processes of the run, by rank."""
    values = [value] * n_processes()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def check_same_everywhere(value, what: str):
    """Raise InputError unless all processes of the run have the same value."""
    if any(other != value for other in gather(value)):
        raise InputError(
            f"the processes found another {what}; give all the same folders"
        )


class StopSignals:
    """Ends a run after its step: at a signal, or when the launcher has died."""

    def __init__(self, device: torch.device):
        self.device = device
        self.received: list[int] = []  # by this process
        for number in SIGNALS:
            is_ignored = signal.getsignal(number) == signal.SIG_IGN
            if not is_ignored or number.name != "SIGHUP":  # nohup ignores it
                signal.signal(number, self.receive)

    def receive(self, number, frame):
        """The third signal ends the run at once: torchrun may pass one on twice."""
        self.received.append(number)
        if len(self.received) > 2:
            signal.default_int_handler(number, frame)

    def received_anywhere(self) -> bool:
        """Whether to stop; the same on all processes, which have to ask together."""
        if n_processes() == 1:
            return bool(self.received)
        stop = len(self.received) > 0 or os.getppid() != LAUNCHER
        n_stopping = all_sum(torch.tensor(float(stop), device=self.device))
        return n_stopping.item() > 0

    def was_ctrl_c(self) -> bool:
        """Whether Ctrl-C was pressed."""
        return signal.SIGINT in self.received


@contextmanager
def process_group(device_name: str) -> Iterator[tuple[torch.device, int, int]]:
    """Join the processes that torchrun started: (device, rank, number of processes).

    Without torchrun it is one process of rank 0. Data workers end with the group.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(device_name, int(os.environ.get("LOCAL_RANK", 0)))
    rank = join_group(device, world) if world > 1 else 0
    try:
        yield device, rank, world
        if world > 1:
            # A rank that leaves while rank 0 evaluates or saves may crash on its way.
            dist.barrier()
    except (RuntimeError, EOFError, ConnectionError) as e:
        is_worker = re.search(r"DataLoader worker .*(is killed|exited)", str(e))
        if isinstance(e, RuntimeError) and not is_worker:
            raise
        raise InputError(
            f"a data worker died ({e}); if memory ran out, lower num_workers; --resume"
        ) from e
    finally:
        for worker in multiprocessing.active_children():
            worker.kill()  # it may hang
        if world > 1:
            # Frees what holds the group, so that its threads end before Python does.
            gc.collect()
            dist.destroy_process_group()


def join_group(device, world) -> int:
    """Meet the other processes; returns the rank of this one."""
    # The others wait while rank 0 makes data, evaluates and saves.
    patience = timedelta(hours=2)
    # On one machine torchrun's store outlives a restart of the processes, and with it
    # the addresses of the ranks before: each attempt gets keys of its own.
    attempt = ""
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    store, rank, _ = next(dist.rendezvous("env://", timeout=patience))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        rank=rank,
        world_size=world,
        store=dist.PrefixStore(attempt, store),
        timeout=patience,
    )
    return rank


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

        unit = 2**20 if sys.platform == "darwin" else 2**10  # of bytes, or of KiB
        return getrusage(RUSAGE_SELF).ru_maxrss / unit
    return float("nan")


def pick_device(name: str = "", index: int = 0) -> torch.device:
    """The named device; without a name, cuda if there is one, else cpu.

    index: which GPU. Raises InputError for a device that this machine lacks.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name, index) if name == "cuda" else torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        raise InputError(
            f"device {name!r}: not available on this machine ({reason})"
        ) from e
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def set_up_worker(rank, worker):
    """In a data worker: leave SIGNALS, which reach all processes, to the training.

    The first worker of rank 0 speaks for all. Python 3.14 does not fork workers: they
    have to be told of warnings again.
    """
    set_quiet(rank > 0 or worker > 0)
    note_warnings()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def start_workers(dataset, order, n_workers: int) -> Iterator:
    """dataset[i] for each i of `order`, from data workers that start now."""
    allow_many_files()
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=order,
        num_workers=n_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=partial(set_up_worker, process_rank()),
    )
    items = iter(loader)
    if hasattr(signal, "SIGCHLD"):
        # PyTorch's handler would raise anywhere, also while a file is written
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return items


def allow_many_files():
    """Let data workers share many tensors, of which each is an open file."""
    with suppress(ImportError, ValueError, OSError):  # Windows has no such limit
        import resource

        _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        if limit < MANY_FILES:
            torch.multiprocessing.set_sharing_strategy("file_system")


def make_missing(prepare: dict[str, str], used: list[str]):
    """Make the paths that are missing, if one of them is used or holds one that is.

    prepare: {path: arguments of python that make it}, in the order to run them. Paths
    that exist are left alone. Raises InputError when a command fails.
    """
    missing = [path for path in prepare if not Path(path).exists()]
    is_needed = any(
        Path(str(path)).is_relative_to(folder) for path in used for folder in missing
    )
    if not is_needed:
        return
    for path in missing:
        note(f"{path} is missing; making it: python {prepare[path]}")
        command = [sys.executable, *shlex.split(prepare[path])]
        if subprocess.run(command).returncode != 0:
            raise InputError(f"{path} could not be made: the command above failed")
