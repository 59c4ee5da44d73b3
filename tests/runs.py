"""Training runs of a micro model, in this process and in others."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

import train
from configs.schema import Config
from model import MiniGPT4
from tests.common import ROOT

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
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
    """Train in this process, killed while it writes its second checkpoint."""
    replace_file, calls = os.replace, []

    def die_at_the_second_state(source, target):
        calls.append(Path(target).name)
        if calls.count("state.pt") == 2:
            raise KeyboardInterrupt
        replace_file(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", die_at_the_second_state)
        run(config)


def command(config: Config, processes: int = 1) -> list[str]:
    """The command line that runs `config` in one or several processes of its own."""
    path = Path(f"{config.out_dir}.py")
    path.write_text("".join(f"{k} = {v!r}\n" for k, v in vars(config).items()))
    launcher = []
    if processes > 1:  # --standalone takes a free port
        launcher = ["-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc-per-node={processes}"]
    return [sys.executable, *launcher, str(ROOT / "train.py"), str(path)]


def by_torchrun(config: Config, processes: int) -> list[dict]:
    """Train in several processes; the lines of log.jsonl."""
    done = subprocess.run(
        command(config, processes),
        env=ENV,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return read_log(config.out_dir)


def wait_until(process: subprocess.Popen, condition, seconds: float = 60):
    """Wait until `condition()` holds; fail if the process ends before, or at last."""
    end = time.monotonic() + seconds
    while True:
        status = process.poll()
        if condition():
            return
        assert status is None, f"the process ended with status {status}"
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.005)


def children(pid: int) -> list[int]:
    """The processes that a process started, oldest first."""
    return [
        int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ]


def lives(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


class Run:
    """A training run in the background, in a process group of its own."""

    def __init__(self, config: Config, processes: int = 1):
        self.out = Path(config.out_dir)
        self.messages = Path(f"{config.out_dir}.err")  # a file is never full
        with self.messages.open("w") as stderr:
            self.process = subprocess.Popen(
                command(config, processes),
                env=ENV,
                stderr=stderr,
                start_new_session=True,
            )
        self.pid = self.process.pid

    def wait_for_steps(self, n: int = 1):
        """Until the log has n rows with a loss."""
        log = self.out / "log.jsonl"
        wait_until(self.process, lambda: log.exists() and len(self.losses()) >= n)

    def losses(self) -> list[float]:
        """So far; the last row may be half written."""
        text = (self.out / "log.jsonl").read_text()
        rows = text[: text.rfind("\n") + 1].splitlines()
        return losses(json.loads(row) for row in rows)

    def wait(self, seconds: float = 60) -> tuple[int, str]:
        """Its exit status, and what it wrote to stderr."""
        status = self.process.wait(seconds)
        return status, self.messages.read_text()


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


@contextmanager
def web_page():
    """Serve tools/webchat.py with the tiny model and greedy answers; its address."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "tools/webchat.py", f"--port={port}", "--temperature=0"]
    with tempfile.NamedTemporaryFile("w") as file:
        server = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=file,
            stderr=file,
            env=ENV | {"PYTHONUNBUFFERED": "1"},
        )
        try:
            wait_until(server, lambda: "Running on" in Path(file.name).read_text())
            yield f"http://127.0.0.1:{port}"
        finally:
            server.kill()
            server.wait()
