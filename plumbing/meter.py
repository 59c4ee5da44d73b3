"""The losses and the speed of a run since its last report."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode

from plumbing.processes import all_sum, n_processes


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
