"""What the log says about loss and speed."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from data import Example, TrainingSteps, collate
from plumbing.meter import Meter
from tests.runs import CPU, micro, run


def read_steps(config):
    """The model of a run, and its steps, each (step, source, micro-batches)."""
    model = train.build(config, CPU)
    samples, sources, _ = train.open_data(config, model, CPU)
    return model, list(TrainingSteps(samples, sources, config).read())


def test_the_log_has_the_mean_loss_per_token_of_its_interval_for_each_source(
    world, tmp_path
):
    mixed = {world["data"]: 1, world["stage2"]: 1}
    each, total = (
        run(micro(world, tmp_path / str(n), data=mixed, log_interval=n)) for n in (1, 6)
    )
    _, steps = read_steps(micro(world, tmp_path, data=mixed))
    counts = [
        (list(mixed)[source], sum(b.n_targets for b in batches))
        for _, source, batches in steps
    ]
    assert len(total) == 1 and total[0]["losses"].keys() == mixed.keys()
    for name in (*mixed, None):
        pairs = [
            (row["loss"], n)
            for row, (source, n) in zip(each, counts)
            if name in (source, None)
        ]
        mean = sum(loss * n for loss, n in pairs) / sum(n for _, n in pairs)
        assert (
            total[0]["losses"][name] if name else total[0]["loss"]
        ) == pytest.approx(mean, rel=1e-6)


def test_the_log_tells_the_speed_and_with_peak_tflops_mfu(world, tmp_path):
    for peak in (0.0, 1e-3):
        for row in run(micro(world, tmp_path / str(peak), peak_tflops=peak)):
            assert (
                row["tokens_per_s"] > row["images_per_s"] > 0
                and 0 <= row["data_wait"] <= 1
            )
            assert row["mfu"] > 0 if peak else "mfu" not in row
            assert "losses" not in row  # there is only one source


def test_texts_count_as_pictures_and_a_batch_without_samples_as_nothing():
    text = Example([], [1, 5, 6], [-100, 5, 6])
    pictures = Example([torch.zeros(4, 8)] * 2, [1, -1, -1, 5], [-100] * 4)
    meter = Meter(["a"], CPU)
    for samples in ([text, text, text], [pictures], []):
        meter.add(0, torch.tensor(1.0), [collate(samples)])
    n_targets, n_images, n_tokens = meter.sums[0, 1:].tolist()
    assert (n_targets, n_images, n_tokens) == (6, 5, 13)


def test_flops_are_those_of_the_first_step(world, tmp_path):
    config = micro(world, tmp_path)
    model, steps = read_steps(config)
    batches = steps[0][2]
    with FlopCounterMode(display=False) as counter:
        for batch in batches:
            model(*batch).backward()
    meter = Meter(["a"], CPU, peak_flops=1e9)
    for _ in range(2):  # the second is not counted
        with meter.counting_flops(batches):
            for batch in batches:
                model(*batch).backward()
    n_tokens = sum(batch.n_tokens for batch in batches)
    assert meter.flops_per_token == counter.get_total_flops() / n_tokens
