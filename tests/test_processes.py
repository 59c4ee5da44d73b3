"""Signals, several processes, data made on first use."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from plumbing.console import InputError
from plumbing.processes import make_missing
from tests.common import ROOT
from tests.runs import (
    ENV,
    by_torchrun,
    command,
    losses,
    micro,
    read_log,
    run,
    run_until_killed,
    weights,
)

# ---- signals -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_ends_a_run_after_its_step_saved(world, tmp_path, name):
    run(micro(world, tmp_path / "whole", max_steps=8))
    config = micro(
        world, tmp_path / "run", max_steps=100_000, save_interval=100_000, num_workers=1
    )
    process = subprocess.Popen(
        [sys.executable, *command(config)],
        env=ENV,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (tmp_path / "run/log.jsonl").exists() or not losses(
        read_log(tmp_path / "run")
    ):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, getattr(signal, name))  # its data worker gets it, too
    _, err = process.communicate(timeout=60)
    assert (
        process.returncode == (130 if name == "SIGINT" else 0)
        and "Traceback" not in err
    ), err
    step = read_log(tmp_path / "run")[-1]["step"]
    assert f"stopped after step {step}, which is saved" in err
    assert torch.load(tmp_path / "run/state.pt", weights_only=True)["step"] == step


def test_the_third_signal_ends_a_run_whose_data_worker_hangs(world, tmp_path):
    config = micro(world, tmp_path / "run", max_steps=100_000, num_workers=1)
    process = subprocess.Popen(
        [sys.executable, *command(config)], env=ENV, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "run/log.jsonl").exists() or not losses(
        read_log(tmp_path / "run")
    ):
        time.sleep(0.02)
    worker = int(
        Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[-1]
    )
    os.kill(worker, signal.SIGSTOP)
    time.sleep(1)  # what it has made already is trained on
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert not Path(f"/proc/{worker}").exists()


def test_a_killed_data_worker_is_one_line(world, tmp_path):
    config = micro(world, tmp_path / "run", max_steps=100_000, num_workers=1)
    process = subprocess.Popen(
        [sys.executable, *command(config)], env=ENV, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "run/log.jsonl").exists() or not losses(
        read_log(tmp_path / "run")
    ):
        time.sleep(0.02)
    worker = (
        Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[-1]
    )
    os.kill(int(worker), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in err, err
    assert re.search(r"error: a data worker died .*--resume$", err, re.MULTILINE), err


def test_messages_that_nobody_reads_do_not_end_a_run(world, tmp_path):
    config = micro(world, tmp_path / "run", max_steps=50)
    process = subprocess.Popen(
        [sys.executable, *command(config)], env=ENV, stderr=subprocess.PIPE
    )
    process.stderr.read(10)
    process.stderr.close()
    assert process.wait() == 0 and read_log(tmp_path / "run")[-1]["step"] == 50


# ---- several processes ---------------------------------------------------------------


@pytest.mark.parametrize(
    "processes, settings, changes, port",
    [
        (2, {"max_steps": 50, "eval_interval": 25}, {}, 29521),
        (4, {}, {}, 29522),
        (2, {}, {"shard": True}, 29523),
        (2, {}, {"grad_accum": 2, "batch_size": 2, "cache_features": True}, 29524),
        (2, {"trainable": ("proj", "llama")}, {}, 29525),
    ],
)  # on texts too, which give the projection no gradient
def test_processes_give_the_numbers_of_one(
    world, tmp_path, processes, settings, changes, port
):
    data = {world["data"]: 1} | ({world["texts"]: 1} if "trainable" in settings else {})
    one = micro(
        world,
        tmp_path / "one",
        batch_size=8,
        data=data,
        heldout_data=world["stage2"],
        eval_samples=8,
        **{"eval_interval": 3} | settings,
    )
    many = replace(
        one, out_dir=f"{tmp_path}/many", **{"batch_size": 8 // processes} | changes
    )
    logs = run(one), by_torchrun(many, processes, port)
    for key in ("loss", "heldout_loss"):
        a, b = ([row[key] for row in log if key in row] for log in logs)
        assert len(a) > 1 and b == pytest.approx(a, rel=1e-5)
    torch.testing.assert_close(
        weights(many.out_dir), weights(one.out_dir), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("length_group, port", [(1, 29514), (4, 29515)])
def test_a_run_goes_on_in_twice_the_processes_at_half_the_batch_size(
    world, tmp_path, monkeypatch, length_group, port
):
    mixed = {world["data"]: 2, world["stage2"]: 1}
    unbroken = micro(
        world,
        tmp_path / "unbroken",
        data=mixed,
        length_group=length_group,
        batch_size=8,
        max_steps=20,
        save_interval=6,
    )
    broken = replace(unbroken, out_dir=f"{tmp_path}/broken")
    run_until_killed(broken, monkeypatch)
    resumed = by_torchrun(replace(broken, batch_size=4, resume=True), 2, port)
    assert (
        losses(resumed) == pytest.approx(losses(run(unbroken)), rel=1e-5)
        and len(resumed) == 20
    )


def test_the_ranks_end_when_torchrun_dies(world, tmp_path):
    config = micro(world, tmp_path / "run", max_steps=100_000, save_interval=100_000)
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--master-port=29517",
    ]
    torchrun = subprocess.Popen(
        [*start, *command(config)], env=ENV, stderr=subprocess.DEVNULL
    )
    while not (tmp_path / "run/log.jsonl").exists() or not losses(
        read_log(tmp_path / "run")
    ):
        time.sleep(0.02)
    ranks = (
        Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    )
    torchrun.kill()
    torchrun.wait()
    end = time.time() + 30
    while any(Path(f"/proc/{rank}").exists() for rank in ranks) and time.time() < end:
        time.sleep(0.1)
    assert len(ranks) == 2 and not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    assert (tmp_path / "run/state.pt").exists()


# ---- data made on first use ----------------------------------------------------------


def test_missing_data_is_made_on_first_use_after_what_it_is_made_from(tmp_path):
    text, tokenizer, make = (
        tmp_path / "text",
        tmp_path / "tokenizer.model",
        f"{ROOT}/tools/make_scenes.py",
    )
    prepare = {
        str(text): f"{make} text {text} --n=300",
        str(
            tokenizer
        ): f"{make} tokenizer {tokenizer} --text={text}/chat.jsonl --vocab_size=500",
    }
    used = [str(tmp_path)]
    make_missing(prepare, ["other", *used])
    assert not tokenizer.exists()  # not used, not made
    make_missing(prepare, used + [str(tokenizer)])
    assert tokenizer.is_file()
    shutil.rmtree(text)
    make_missing(prepare, used + [str(tokenizer)])
    assert not text.exists()  # what it was for is there
    with pytest.raises(InputError, match="could not be made"):
        make_missing({"none": f"{make} nothing"}, ["none"])
