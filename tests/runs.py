"""Training runs of a micro model, in this process and in others."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import train
from configs.schema import Config
from model import MiniGPT4
from tests.common import ROOT

CPU = torch.device("cpu")


ENV = os.environ | {"OMP_NUM_THREADS": "1"}  # the runs below are too small for more


def micro(world, out, **changes) -> Config:
    """A run of a few steps of the micro model on its stage-1 data."""
    settings = dict(
        dtype="float32",
        batch_size=4,
        max_steps=6,
        warmup_steps=2,
        lr=0.01,
        min_lr=0.001,
        num_workers=0,
        log_interval=1,
        save_interval=2,
        eval_interval=100,
        device="cpu",
        out_dir=str(out),
        **{k: world[k] for k in ("vision", "qformer", "llama", "data")},
    )
    return Config(**settings | changes)


def read_log(out) -> list[dict]:
    return [
        json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()
    ]


def losses(log) -> list[float]:
    return [row["loss"] for row in log if "loss" in row]


def run(config: Config) -> list[dict]:
    """Train in this process; the lines of log.jsonl."""
    train.train(config, CPU)
    return read_log(config.out_dir)


def run_until_killed(config: Config, monkeypatch):
    """Train in this process until it is killed while it writes its second checkpoint."""
    replace_file, calls = os.replace, []

    def die_at_the_second_state(source, target):
        calls.append(Path(target).name)
        if calls.count("state.pt") == 2:
            raise KeyboardInterrupt
        replace_file(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", die_at_the_second_state)
        run(config)


def command(config: Config) -> list[str]:
    """The command line that runs `config` in a process of its own."""
    path = Path(f"{config.out_dir}.py")
    path.write_text("".join(f"{k} = {v!r}\n" for k, v in vars(config).items()))
    return [str(ROOT / "train.py"), str(path)]


def by_torchrun(config: Config, processes: int, port: int) -> list[dict]:
    """Train in several processes; the lines of log.jsonl."""
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(processes),
        "--master-port",
        str(port),
    ]
    done = subprocess.run(
        [*start, *command(config)], env=ENV, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return read_log(config.out_dir)


def changed_llama(world, folder, name: str, factor: float) -> str:
    """The world's language model with one tensor multiplied."""
    model = MiniGPT4.from_files(None, None, world["llama"])
    model.llama.get_parameter(name).data *= factor
    model.save_part("llama", folder)
    return f"{folder}/llama"


def weights(out) -> dict[str, torch.Tensor]:
    """The trained tensors and the optimizer's of a run's last checkpoint."""
    state = torch.load(Path(out) / "state.pt", weights_only=True)
    moments = {
        f"{i}.{k}": t
        for i, row in state["optimizer"]["state"].items()
        for k, t in row.items()
    }
    return state["parameters"] | moments


assert_same = partial(torch.testing.assert_close, rtol=0, atol=0)
