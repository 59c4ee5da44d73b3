"""Signals, several processes, data made on first use."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from dataclasses import replace

import pytest
import torch

from plumbing.console import InputError, note
from plumbing.processes import StopSignals, make_missing, start_workers
from tests.common import ROOT
from tests.runs import (
    CPU,
    ENV,
    by_torchrun,
    children,
    command,
    lives,
    losses,
    micro,
    read_log,
    run,
    run_until_killed,
    weights,
)


class Noting:
    """Samples, each with a note."""

    def __getitem__(self, i):
        note(f"sample {i}")
        return i


@pytest.mark.parametrize("rank, n_notes", [(0, 2), (1, 0)])
def test_one_data_worker_of_one_rank_speaks(monkeypatch, capfd, rank, n_notes):
    monkeypatch.setattr("plumbing.processes.process_rank", lambda: rank)
    assert list(start_workers(Noting(), range(4), 2)) == [0, 1, 2, 3]
    assert capfd.readouterr().err.count("sample") == n_notes


# ---- signals -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, status",
    [("SIGTERM", 0), ("SIGUSR1", 0), ("SIGHUP", 0), ("SIGINT", 130)],
)
def test_a_signal_ends_a_run_after_its_step_saved(world, tmp_path, start, name, status):
    endless = dict(max_steps=100_000, save_interval=100_000, num_workers=1)
    run = start(micro(world, tmp_path / "run", **endless))
    run.wait_for_steps()
    os.killpg(run.pid, getattr(signal, name))  # its data worker gets it, too
    got, err = run.wait()
    assert got == status and "Traceback" not in err, err
    step = read_log(run.out)[-1]["step"]
    assert f"stopped after step {step}, which is saved" in err
    assert torch.load(run.out / "state.pt", weights_only=True)["step"] == step


def test_nohup_keeps_a_run_from_ending_with_its_terminal():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    StopSignals(CPU)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    stop = StopSignals(CPU)
    assert signal.getsignal(signal.SIGHUP) == stop.receive


@pytest.mark.slow
def test_the_third_signal_ends_a_run_whose_data_worker_hangs(world, tmp_path, start):
    run = start(micro(world, tmp_path / "run", max_steps=100_000, num_workers=1))
    run.wait_for_steps()
    worker = children(run.pid)[-1]
    os.kill(worker, signal.SIGSTOP)
    time.sleep(1)  # what it has made already is trained on
    for _ in range(3):
        run.process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    status, err = run.wait(30)
    assert status == 130 and "Traceback" not in err, err
    assert not lives(worker)


@pytest.mark.slow
def test_a_killed_data_worker_is_one_line(world, tmp_path, start):
    run = start(micro(world, tmp_path / "run", max_steps=100_000, num_workers=1))
    run.wait_for_steps()
    os.kill(children(run.pid)[-1], signal.SIGKILL)
    status, err = run.wait()
    assert status == 2 and "Traceback" not in err, err
    assert re.search(r"error: a data worker died .*--resume$", err, re.MULTILINE), err


@pytest.mark.slow
def test_messages_that_nobody_reads_do_not_end_a_run(world, tmp_path):
    config = micro(world, tmp_path / "run", max_steps=50)
    process = subprocess.Popen(command(config), env=ENV, stderr=subprocess.PIPE)
    process.stderr.read(10)
    process.stderr.close()
    assert process.wait(60) == 0
    assert read_log(tmp_path / "run")[-1]["step"] == 50


@pytest.mark.slow
def test_few_open_files_are_enough(world, tmp_path):
    config = micro(world, tmp_path / "run", num_workers=1, length_group=64)
    line = shlex.join(command(config))
    done = subprocess.run(["sh", "-c", f"ulimit -n 128; {line}"], env=ENV, timeout=120)
    assert done.returncode == 0
    assert read_log(tmp_path / "run")[-1]["step"] == 6


# ---- several processes ---------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes, settings, changes",
    [
        pytest.param(2, {"max_steps": 50, "eval_interval": 25}, {}, id="two"),
        pytest.param(4, {}, {}, id="four"),
        pytest.param(2, {}, {"shard": True}, id="sharded"),
        pytest.param(
            2,
            {},
            {"grad_accum": 2, "batch_size": 2, "cache_features": True},
            id="accumulated-cached",
        ),
        # on texts too, which give the projection no gradient
        pytest.param(2, {"trainable": ("proj", "llama")}, {}, id="llama-on-texts"),
    ],
)
def test_processes_give_the_numbers_of_one(
    world, tmp_path, processes, settings, changes
):
    data = {world["data"]: 1}
    if "trainable" in settings:
        data[world["texts"]] = 1
    shared = {"eval_interval": 3, "eval_samples": 8, "batch_size": 8} | settings
    heldout = world["stage2"]
    one = micro(world, tmp_path / "one", data=data, heldout_data=heldout, **shared)
    changes = {"batch_size": 8 // processes} | changes
    many = replace(one, out_dir=f"{tmp_path}/many", **changes)
    logs = run(one), by_torchrun(many, processes)
    for key in ("loss", "heldout_loss"):
        a, b = ([row[key] for row in log if key in row] for log in logs)
        assert len(a) > 1 and b == pytest.approx(a, rel=1e-5)
    torch.testing.assert_close(
        weights(many.out_dir), weights(one.out_dir), rtol=0, atol=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("length_group", [1, 4])
def test_a_run_goes_on_in_twice_the_processes_at_half_the_batch_size(
    world, tmp_path, monkeypatch, length_group
):
    unbroken = micro(
        world,
        tmp_path / "unbroken",
        data={world["data"]: 2, world["stage2"]: 1},
        length_group=length_group,
        batch_size=8,
        max_steps=20,
        save_interval=6,
    )
    broken = replace(unbroken, out_dir=f"{tmp_path}/broken")
    run_until_killed(broken, monkeypatch)
    resumed = by_torchrun(replace(broken, batch_size=4, resume=True), 2)
    assert losses(resumed) == pytest.approx(losses(run(unbroken)), rel=1e-5)
    assert len(resumed) == 20


@pytest.mark.slow
def test_the_ranks_end_when_torchrun_dies(world, tmp_path, start):
    endless = dict(max_steps=100_000, save_interval=100_000)
    run = start(micro(world, tmp_path / "run", **endless), processes=2)
    run.wait_for_steps()
    ranks = children(run.pid)
    assert len(ranks) == 2
    run.process.kill()
    run.wait()
    end = time.monotonic() + 30
    while any(map(lives, ranks)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(lives, ranks))
    assert (run.out / "state.pt").exists()


# ---- data made on first use ----------------------------------------------------------


@pytest.mark.slow
def test_missing_data_is_made_on_first_use_after_what_it_is_made_from(tmp_path):
    text, tokenizer = tmp_path / "text", tmp_path / "tokenizer.model"
    make = f"{ROOT}/tools/make_scenes.py"
    chats = f"{text}/chat.jsonl"
    prepare = {
        str(text): f"{make} text {text} --n=300",
        str(tokenizer): f"{make} tokenizer {tokenizer} --text={chats} --vocab_size=500",
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


def test_a_tokenizer_that_prepare_makes_is_there_for_the_model(world, tmp_path):
    target, text = tmp_path / "made.model", tmp_path / "text.jsonl"
    text.write_text('{"text": "a red star and a small ring"}\n' * 8)
    source = ROOT / "assets/tiny/llama/tokenizer.model"
    make = f"-c \"import shutil; shutil.copy('{source}', '{target}')\""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = micro(
        world,
        tmp_path / "out",
        vision="",
        qformer="",
        llama=sizes | {"num_attention_heads": 2},
        tokenizer=str(target),
        prepare={str(target): make},
        trainable=("llama",),
        data=str(text),
        max_steps=1,
        warmup_steps=0,
    )
    assert len(losses(run(config))) == 1


def test_missing_weights_are_named_before_data_are_made(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = f"{tmp_path}/data"
    settings = dict(data=data, prepare={data: "-c 1/0"}, llama="weights/smollm2-135m")
    with pytest.raises(InputError, match="tools/get_weights.py smollm2-135m. run?"):
        run(micro(world, tmp_path / "out", **settings))
