"""A run's folder, which no other run overwrites: log, losses and speed, checkpoints."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from plumbing.console import InputError, is_plain, note
from plumbing.files import append_row, lock, replacing
from plumbing.processes import all_sum, n_processes
from plumbing.quantized import shapes_of

ADVICE = (
    "the last checkpoint is kept; "
    "start again with a lower --lr, or with --grad_clip=1.0"
)
ADVICE_AT_START = (
    "no step was: look at the data with tools/show_data.py, at the weights, at --lr"
)
MAX_FAILED = 20  # steps in a row whose loss or gradient is not finite


class RunFolder:
    """The folder of a run: weights, config.json, log.jsonl, state.pt, state.old.pt."""

    def __init__(self, path: str, weights: list[str], resume: bool):
        """weights: the files that the run writes.

        Raises InputError for a folder with another run, or with one that cannot be
        resumed.
        """
        self.path = Path(path)
        self.weights = list(map(Path, weights))
        self.log = self.path / "log.jsonl"
        self.state = self.path / "state.pt"
        self.older_state = self.path / "state.old.pt"
        states = list(filter(Path.exists, (self.state, self.older_state)))
        results = list(filter(Path.exists, self.weights))
        held = states + results
        if self.log.is_file() and self.log.stat().st_size > 0:
            held.append(self.log)
        if held and not resume:
            raise InputError(
                f"{held[0]}: already holds a run; "
                "continue it with --resume, or change --out_dir"
            )
        if results and not states:
            raise InputError(
                f"{results[0]}: without state.pt, its run cannot be resumed; "
                "change --out_dir"
            )


class Meter:
    """Sums over steps, of all ranks together, without waiting for the device."""

    def __init__(self, sources: list[str], device, peak_flops: float = 0.0):
        """peak_flops: FLOP/s of one device; with it, reports have `mfu`."""
        self.sources = sources
        self.peak_flops = peak_flops * n_processes()
        self.flops_per_token = 0.0
        # Of each source: the loss, answer tokens, pictures (or texts), tokens.
        self.sums = torch.zeros(len(sources), 4, device=device, dtype=torch.float64)
        self.restart()

    def restart(self):
        self.sums.zero_()
        self.since = time.perf_counter()
        self.waited = 0.0  # seconds without data

    def add(self, source: int, loss: torch.Tensor, batches: list):
        """Count a step. loss: its mean over the answer tokens of all ranks."""
        batches = [batch for batch in batches if batch.n_tokens]  # some have no sample
        n_targets = sum(batch.n_targets for batch in batches)
        n_images = sum(
            len(batch.tokens if batch.images is None else batch.images)
            for batch in batches
        )
        row = self.sums[source]
        row[0] += loss * n_targets
        row[1] += n_targets
        row[2] += n_images
        row[3] += sum(batch.n_tokens for batch in batches)

    @contextmanager
    def counting_flops(self, batches: list):
        """Count the FLOPs of the first step inside, where reports have `mfu`."""
        if not self.peak_flops or self.flops_per_token:
            yield
            return
        with FlopCounterMode(display=False) as counter:
            yield
        n_tokens = sum(batch.n_tokens for batch in batches)
        self.flops_per_token = counter.get_total_flops() / max(1, n_tokens)

    def time_waiting(self, items: Iterable) -> Iterator:
        """Yield the items; the time until one is there counts as waiting for data."""
        start = time.perf_counter()
        for item in items:
            self.waited += time.perf_counter() - start
            yield item
            start = time.perf_counter()

    @contextmanager
    def paused(self):
        """What happens inside, such as saving, does not count."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def report(self) -> dict:
        """The loss per answer token, also of each of several sources, and the speed.

        Empty if no step was counted. The next report starts from here.
        """
        rows = all_sum(self.sums).tolist()  # waits for the device
        loss, n_targets, n_images, n_tokens = map(sum, zip(*rows))
        if n_targets == 0:
            return {}
        seconds = time.perf_counter() - self.since
        report = {"loss": loss / n_targets}
        if len(self.sources) > 1:
            report["losses"] = {
                name: row[0] / row[1] for name, row in zip(self.sources, rows) if row[1]
            }
        report["images_per_s"] = round(n_images / seconds, 1)
        report["tokens_per_s"] = round(n_tokens / seconds)
        report["data_wait"] = round(self.waited / seconds, 3)
        if self.peak_flops:
            flops = n_tokens * self.flops_per_token
            report["mfu"] = round(flops / seconds / self.peak_flops, 3)
        self.restart()
        return report


class RunLog(AbstractContextManager):
    """log.jsonl and the progress bar; silent on all ranks but the first."""

    def __init__(self, folder: RunFolder, max_steps: int, done: int, is_silent: bool):
        """Keep the rows of the steps that are done; the others come again.

        Raises InputError if another run writes to the log.
        """
        self.n_failed = self.last_failed = 0  # steps in a row, and the last one
        folder.path.mkdir(parents=True, exist_ok=True)
        self.file = open_to_append(os.devnull if is_silent else folder.log)
        if not is_silent:
            lock(
                self.file,
                f"{folder.path}: another run writes to it; choose another --out_dir",
            )
            # Through this file: to open and close it once more would end the lock.
            self.file.seek(0)
            self.file.truncate(length_until(self.file.buffer.read(), done))
        self.bar = tqdm(
            total=max_steps,
            initial=done,
            unit="step",
            dynamic_ncols=True,
            disable=is_silent or is_plain(),
        )
        self.is_silent = is_silent

    def __exit__(self, *error):
        self.bar.close()
        self.file.close()

    def advance(self):
        """Count a step."""
        self.bar.update()

    def failure(self, step: int, samples: list[str]):
        """A step that was not finite: where its samples are.

        Raises InputError for too many in a row.
        """
        is_in_a_row = step == self.last_failed + 1
        self.n_failed = self.n_failed + 1 if is_in_a_row else 1
        self.last_failed = step
        append_row(self.file, step=step, not_finite=self.n_failed, samples=samples)
        if self.n_failed == MAX_FAILED:
            is_start = step == MAX_FAILED
            raise InputError(
                f"step {step}: the last {self.n_failed} losses or gradients were not "
                f"finite; {ADVICE_AT_START if is_start else ADVICE}"
            )

    def progress(self, step: int, lr: float, seen: int, report: dict):
        """What a meter reports; nothing if no step was finite."""
        if report:
            append_row(self.file, step=step, lr=lr, seen=seen, **report)
            shown = {k: v for k, v in report.items() if k != "losses"}
            shown["lr"] = f"{lr:.1e}"
            self.bar.set_postfix(shown, refresh=False)
            if self.bar.disable:  # a log without a terminal gets lines
                texts = [f"{name} {value}" for name, value in shown.items()]
                self.write(f"step {step}: {', '.join(texts)}")

    def bad_samples(self, step: int, account):
        """How many samples could not be used so far."""
        if account.skipped:
            append_row(self.file, step=step, skipped=account.skipped, of=account.n_read)
            self.write(f"step {step}: {account.text}")

    def evaluation(self, step: int, result: tuple[float, list[dict]] | None):
        """The held-out loss and sample answers; nothing for an interrupted one."""
        if result is None:
            return
        loss, answers = result
        finite_loss = loss if math.isfinite(loss) else None
        append_row(self.file, step=step, heldout_loss=finite_loss, samples=answers)
        lines = [f"step {step}: held-out loss {loss:.4f}"]
        for answer in answers:
            lines.append(f"  answer: {answer['answer']!r}")
            lines.append(f"  data:   {answer['data']!r}")
        self.write("\n".join(lines))

    def write(self, text: str):
        """Print above the bar."""
        if not self.is_silent:
            self.bar.write(text, file=sys.stderr)


def open_to_append(path):
    """A text file to read and append to."""
    return open(path, "a+", encoding="utf-8", newline="\n")


def length_until(log: bytes, done: int) -> int:
    """The bytes of a log up to the last row of a step that is done.

    Rows may be damaged, and the last one cut.
    """
    kept = end = 0
    for line in log.split(b"\n")[:-1]:
        end += len(line) + 1
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            if json.loads(line)["step"] <= done:
                kept = end
    return kept


@dataclass
class Checkpoint:
    """What state.pt holds: trained tensors, optimizer, scaler, and the run's identity.

    identity: what must not change in a run. frozen: fingerprints of the other parts.
    save_parts() writes the weights.
    """

    folder: RunFolder
    tensors: dict[str, torch.Tensor]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    identity: dict
    frozen: dict[str, str]
    save_parts: Callable[[], None]
    state_is_damaged: bool = False

    def save(self, step: int):
        """Write the weights and the state; the state before is kept as state.old.pt.

        Raises InputError for weights that are not finite.
        """
        if not all(tensor.isfinite().all() for tensor in self.tensors.values()):
            raise InputError(
                f"step {step}: the weights have become infinite or NaN; {ADVICE}"
            )
        is_first = not self.folder.state.exists()
        if is_first:  # weights without any state could not be resumed
            self.write_state(step)
        self.save_parts()
        if not is_first:
            self.write_state(step)

    def save_missing_parts(self):
        """Write the weights if the run was killed before it wrote them once."""
        if not all(map(Path.exists, self.folder.weights)):
            self.save_parts()

    def write_state(self, step):
        state = {
            "step": step,
            "parameters": {name: t.detach() for name, t in self.tensors.items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "identity": self.identity,
            "frozen": self.frozen,
        }
        with replacing(self.folder.state) as temporary:
            torch.save(state, temporary)
            if self.folder.state.exists() and not self.state_is_damaged:
                os.replace(self.folder.state, self.folder.older_state)
        self.state_is_damaged = False

    def load(self) -> int:
        """Restore state.pt or, if it is damaged, the state before it.

        Returns its step, 0 without a state. Raises InputError if all are damaged, or
        for the state of another run.
        """
        damage = ""
        for path in (self.folder.state, self.folder.older_state):
            if not path.is_file():
                continue
            if damage:
                note(f"warning: {damage}; the run goes on from {path}")
            try:
                return self.restore(path)
            except InputError:
                raise
            except Exception as e:  # a damaged file breaks the readers in many ways
                damage = f"{path}: damaged ({e})"
                self.state_is_damaged = True
        if damage:
            raise InputError(f"{damage}; choose another --out_dir")
        return 0

    def restore(self, path) -> int:
        """Take over a saved state and return its step.

        Raises InputError for the state of another run, other errors for a damaged one.
        """
        state = read_state(path)
        for name, now in self.identity.items():
            then = state["identity"].get(name)
            if then != now:
                raise InputError(
                    f"{path}: {name} was {then}, now it is {now}; "
                    "keep it or change out_dir"
                )
        saved = state["parameters"]
        if shapes_of(saved) != shapes_of(self.tensors):
            raise InputError(
                f"{path}: its parts have other sizes; give them, or another --out_dir"
            )
        before = state["frozen"]
        other = [name for name, mark in self.frozen.items() if before.get(name) != mark]
        if other:
            note(f"warning: {path} was trained with another {', '.join(other)}")
        for name, tensor in self.tensors.items():
            tensor.data.copy_(saved[name])
        self.restore_optimizer(state["optimizer"]["state"])
        self.scaler.load_state_dict(state["scaler"])
        return state["step"]

    def restore_optimizer(self, moments):
        """Take over the moments, but keep this run's options."""
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        for parameter, state in self.optimizer.state.items():
            check_moments(parameter, state)


def read_state(path: Path) -> dict:
    """A state file. Raises an error of any kind if it is damaged."""
    broken = ZipFile(path).testzip()  # compares checksums
    if broken:
        raise ValueError(f"the checksum of {broken} does not match")
    state = torch.load(path, map_location="cpu", weights_only=True)
    step = state["step"]
    if type(step) is not int or step <= 0:
        raise ValueError(f"step {step}")
    return state


def check_moments(parameter, state):
    """Raise ValueError unless AdamW's state fits: a step count and two moments."""
    values = [parameter, *state.values()]
    if not all(value.isfinite().all() for value in values):
        raise ValueError("a parameter or a moment is not finite")
    shapes = [value.shape for value in state.values()]
    expected = [torch.Size(()), parameter.shape, parameter.shape]
    if shapes != expected:
        raise ValueError(f"moments of shapes {shapes} for {tuple(parameter.shape)}")
