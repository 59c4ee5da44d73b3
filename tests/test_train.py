"""The training loop: what learns, exact resume, the run's folder, and the command line."""

import importlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, is_dataclass, replace
from functools import partial, partialmethod
from math import log
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import chat
import train
from configs.schema import Config, load_config, read_saved_config
from model import MiniGPT4
from plumbing.console import InputError, run_main
from plumbing.options import override, parse_args
from plumbing.processes import make_missing
from tests.common import GOLDEN
from tools import make_scenes

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
ENV = os.environ | {"OMP_NUM_THREADS": "1"}  # the runs below are too small for more


@pytest.fixture(autouse=True)
def signals():
    """Training in this process catches them."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers):
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> dict:
    """The paths of a micro model with random weights, and of stage-1 and stage-2 data for it."""
    root = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    model = MiniGPT4.from_files(
        dict(
            image_size=32, patch_size=8, width=16, n_layers=2, n_heads=2, mlp_hidden=32
        ),
        dict(n_queries=4, width=16, n_layers=2, n_heads=2, ffn_hidden=32),
        dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
        tokenizer=str(GOLDEN / "tokenizer" / "tokenizer.model"),
    )
    for part in ("vision", "qformer", "llama"):
        model.save_part(part, root)
    make_scenes.main(["stage1", str(root / "stage1"), "--n=64"])
    make_scenes.main(["stage2", str(root / "stage2"), "--n=24"])
    (root / "texts.jsonl").write_text(json.dumps({"text": "a star"}))
    return {
        "vision": f"{root}/vision.safetensors",
        "qformer": f"{root}/qformer.safetensors",
        "llama": f"{root}/llama",
        "data": f"{root}/stage1",
        "stage2": f"{root}/stage2",
        "texts": f"{root}/texts.jsonl",
    }


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

# ---- what learns -------------------------------------------------------------------------------------------


def test_only_the_projection_learns(world, tmp_path):
    config = micro(world, tmp_path)
    model = train.build(config, CPU)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "proj.weight",
        "proj.bias",
    }
    run(config)
    assert not torch.equal(
        load_file(tmp_path / "proj.safetensors")["proj.weight"], model.proj.weight
    )
    files = ["config.json", "log.jsonl", "proj.safetensors", "state.old.pt", "state.pt"]
    assert sorted(os.listdir(tmp_path)) == files


def test_every_part_can_learn_and_is_saved(world, tmp_path):
    config = micro(
        world,
        tmp_path,
        trainable=("vision", "qformer", "proj", "llama"),
        max_steps=60,
        save_interval=60,
    )
    loss = losses(run(config))
    assert sum(loss[-5:]) / 5 < loss[0] - 1
    saved = read_saved_config(str(tmp_path))
    assert all(str(tmp_path) in getattr(saved, part) for part in config.trainable)
    trained, frozen = (
        MiniGPT4.from_files(**c.parts(), dtype="float32") for c in (saved, config)
    )
    for part in ("vision", "qformer", "llama"):
        a, b = trained.part_parameters(part), frozen.part_parameters(part)
        assert all(
            not torch.equal(a[k], b[k])
            for k in a
            if "k_proj" not in k and "key.bias" not in k
        ), part


def test_stage_2_starts_from_stage_1_and_its_folder_leads_to_all_parts(world, tmp_path):
    run(micro(world, tmp_path / "one"))
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "two").symlink_to(tmp_path / "far" / "away")
    run(
        micro(
            world,
            tmp_path / "two",
            data=world["stage2"],
            proj=f"{tmp_path}/one/proj.safetensors",
            template="vicuna",
            max_txt_len=160,
            max_steps=2,
        )
    )
    saved = read_saved_config(str(tmp_path / "two"))
    assert Path(saved.proj).resolve() == tmp_path / "far" / "away" / "proj.safetensors"
    for part in ("vision", "qformer", "llama"):
        assert Path(getattr(saved, part)).resolve() == Path(world[part]).resolve()


def test_a_run_that_trains_llama_saves_its_frozen_projection_too(world, tmp_path):
    run(micro(world, tmp_path / "one", max_steps=2))
    for proj in ("", f"{tmp_path}/one/proj.safetensors"):
        config = micro(
            world,
            tmp_path / f"two{bool(proj)}",
            trainable=("llama",),
            proj=proj,
            max_steps=2,
        )
        run(config)
        model, _ = chat.load(chat.Options(ckpt=config.out_dir, device="cpu"))
        assert torch.equal(model.proj.weight, train.build(config, CPU).proj.weight)


@pytest.mark.parametrize(
    "changes, tolerance",
    [
        ({"dtype": "bfloat16"}, 0.02),
        ({"dtype": "float16"}, 0.02),
        ({"batch_size": 1, "grad_accum": 4}, 1e-5),
    ],
)
def test_half_precision_and_accumulation_follow_the_plain_run(
    world, tmp_path, changes, tolerance
):
    plain, other = (
        run(micro(world, tmp_path / str(len(c)), **c)) for c in ({}, changes)
    )
    assert losses(other) == pytest.approx(losses(plain), rel=tolerance)


def test_cached_features_leave_the_model_s_sizes(world, tmp_path):
    model = train.build(config := micro(world, tmp_path, cache_features=True), CPU)
    train.open_data(config, model, CPU)
    assert model.vision is None and (model.image_size, model.n_image_tokens) == (32, 4)


# ---- several processes, and resume -------------------------------------------------------------------------


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


def test_a_run_killed_at_any_moment_ends_with_the_same_weights(
    world, tmp_path, monkeypatch
):
    unbroken = micro(
        world, tmp_path / "unbroken", max_steps=40, num_workers=1, save_interval=5
    )
    broken, path = (
        replace(unbroken, out_dir=f"{tmp_path}/broken", resume=True),
        tmp_path / "broken/log.jsonl",
    )
    for lines in (3, 18):  # before the first checkpoint, and after the third
        process = subprocess.Popen(
            [sys.executable, *command(broken)], env=ENV, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and (
            not path.is_file() or len(path.read_text().splitlines()) < lines
        ):
            time.sleep(0.002)
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        if lines == 3:
            run_until_killed(broken, monkeypatch)
    assert [row["step"] for row in run(broken)] == list(range(1, 41))
    run(unbroken)
    assert_same(weights(tmp_path / "broken"), weights(tmp_path / "unbroken"))


def test_a_float16_run_resumes_although_its_first_steps_overflowed(
    world, tmp_path, monkeypatch
):
    overflowing = partialmethod(
        torch.amp.GradScaler.__init__, init_scale=2.0**100
    )  # steps are skipped
    monkeypatch.setattr(torch.amp.GradScaler, "__init__", overflowing)
    run(micro(world, tmp_path, dtype="float16", max_steps=1))
    assert (
        torch.load(tmp_path / "state.pt", weights_only=True)["optimizer"]["state"] == {}
    )
    resumed = run(micro(world, tmp_path, dtype="float16", max_steps=3, resume=True))
    assert [row["step"] for row in resumed] == [1, 2, 3]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"trainable": ("proj", "qformer")}, "trainable was .*, now it is .*qformer"),
        ({"dtype": "float16"}, "float16 was False, now it is True"),
        ({"seed": 7}, "seed was 42, now it is 7"),
        ({"grad_accum": 2}, "processes x batch_size x grad_accum was 4, now it is 8"),
        ({"shuffle_shards": 2}, "shuffle_shards was 8, now it is 2"),
        ({"length_group": 2}, "length_group was 1, now it is 2"),
        ({"data": "disk.jsonl"}, "data was"),
        ({"template": "llama2"}, "template was .*, now it is llama2"),
        ({"end_sym": "END"}, "answer_end was"),
    ],
)
def test_a_run_with_other_settings_or_data_is_not_resumed(
    world, tmp_path, monkeypatch, changes, words
):
    monkeypatch.chdir(tmp_path)
    for name in ("star", "disk"):
        lines = [
            {"image": f"{world['stage2']}/image/{i}.jpg", "caption": f"a {name}"}
            for i in range(24)
        ]
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run(micro(world, "out", data="star.jsonl", max_steps=2))
    before = Path("out/config.json").read_text()
    with pytest.raises(InputError, match=f"^out/state.pt: .*{words}"):
        run(
            micro(
                world,
                "out",
                **{"data": "star.jsonl", "max_steps": 4, "resume": True} | changes,
            )
        )
    assert Path("out/config.json").read_text() == before


def test_a_finished_run_stays_as_it_is_when_resumed(world, tmp_path, capsys):
    run(micro(world, tmp_path, max_steps=2))
    before = (tmp_path / "config.json").read_text()
    assert len(run(micro(world, tmp_path, max_steps=1, resume=True))) == 2
    assert (
        "already at step 2" in capsys.readouterr().err
        and (tmp_path / "config.json").read_text() == before
    )


def test_resume_beside_another_frozen_llama_only_warns(world, tmp_path, capsys):
    run(micro(world, tmp_path / "out", max_steps=2))
    assert "warning" not in capsys.readouterr().err
    llama = changed_llama(world, tmp_path, "norm.weight", 1.1)
    assert (
        len(run(micro(world, tmp_path / "out", max_steps=4, resume=True, llama=llama)))
        == 4
    )
    assert re.search("warning: .*another llama", capsys.readouterr().err)


# ---- the run's folder --------------------------------------------------------------------------------------


def test_an_earlier_run_or_a_folder_of_something_else_is_not_overwritten(
    world, tmp_path
):
    config = micro(world, tmp_path / "out", max_steps=2)
    run(config)
    for file in ("state.pt", "proj.safetensors"):
        with pytest.raises(InputError, match=f"{file}.*--resume"):
            run(config)
        (tmp_path / "out" / file).unlink()
    shutil.copytree(world["llama"], tmp_path / "llama")
    with pytest.raises(InputError, match="a language model's folder"):
        run(micro(world, tmp_path / "llama"))
    assert (tmp_path / "llama/config.json").read_text() == (
        Path(world["llama"]) / "config.json"
    ).read_text()


@pytest.mark.parametrize(
    "save_interval, words",
    [
        (99, "step 24: the last 20 losses or gradients were not finite"),
        (4, "step 4: the weights have become infinite"),
    ],
)
def test_a_run_that_diverges_stops_and_keeps_its_last_checkpoint(
    world, tmp_path, save_interval, words
):
    run(micro(world, tmp_path, max_steps=2))
    before = (tmp_path / "state.pt").read_bytes()
    changes = dict(
        lr=1e30, min_lr=1e30, resume=True, save_interval=save_interval, max_steps=99
    )
    with pytest.raises(InputError, match=words):
        run(micro(world, tmp_path, **changes))
    assert (tmp_path / "state.pt").read_bytes() == before


def test_a_step_that_is_not_finite_is_skipped_and_its_samples_are_named(
    world, tmp_path, monkeypatch
):
    forward, calls = MiniGPT4.forward, []

    def broken_once(self, *args):
        calls.append(args)
        return forward(self, *args) * (float("nan") if len(calls) in (3, 4) else 1)

    monkeypatch.setattr(MiniGPT4, "forward", broken_once)
    log = run(micro(world, tmp_path, max_steps=6, length_group=2))
    failed = [row for row in log if "not_finite" in row]
    assert [
        (row["step"], row["not_finite"], len(row["samples"])) for row in failed
    ] == [(3, 1, 4), (4, 2, 4)]
    assert all(
        re.search(r"stage1/\d+\.tar:\d+$", where)
        for row in failed
        for where in row["samples"]
    )
    assert [row["step"] for row in log if "loss" in row] == [
        1,
        2,
        5,
        6,
    ]  # nothing else to report
    assert all(t.isfinite().all() for t in weights(tmp_path).values())


def test_an_infinite_loss_skips_the_step_although_its_gradient_is_finite(monkeypatch):
    p = torch.nn.Parameter(torch.ones(2, 2))
    optimizer, scaler = (
        torch.optim.AdamW([p], 0.1),
        torch.amp.GradScaler("cpu", enabled=False),
    )
    batch = train.Batch(torch.zeros(1), torch.zeros(1, 2), torch.zeros(1, 2))
    assert (
        train.train_step(lambda *_: p.sum(), [batch], optimizer, scaler, 0.1).item()
        == 4
    )
    before = p.detach().clone()
    assert train.train_step(
        lambda *_: p.sum() + torch.inf, [batch], optimizer, scaler, 0.1
    ).isnan()
    assert torch.equal(p, before) and not torch.equal(p, torch.ones(2, 2))


@pytest.mark.parametrize("cut", [False, True])
def test_a_damaged_state_is_passed_over_for_the_one_before(
    world, tmp_path, capsys, cut
):
    whole = run(micro(world, tmp_path / "whole"))
    run(micro(world, tmp_path / "run", max_steps=6))
    state = tmp_path / "run/state.pt"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content[: len(content) // 2] if cut else content)
    assert losses(run(micro(world, tmp_path / "run", resume=True))) == losses(whole)
    assert re.search(
        r"warning: .*state.pt: damaged .*goes on from .*state.old.pt",
        capsys.readouterr().err,
    )
    assert_same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    for name in ("state.pt", "state.old.pt"):
        (tmp_path / "run" / name).write_bytes(b"PK")
    with pytest.raises(InputError, match="state.old.pt: damaged"):
        run(micro(world, tmp_path / "run", resume=True))


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


def test_a_second_run_in_a_folder_is_refused_and_changes_nothing(world, tmp_path):
    run(micro(world, tmp_path, max_steps=2))
    config = micro(world, tmp_path, max_steps=6, resume=True)
    before = [(tmp_path / name).read_bytes() for name in ("log.jsonl", "config.json")]
    with train.open_log(
        config, 2
    ):  # to open and close the file in this process again would end the lock
        other = [sys.executable, *command(replace(config, lr=0.5))]
        done = subprocess.run(other, env=ENV, capture_output=True, text=True)
    assert (
        done.returncode == 2 and f"{tmp_path}: another run writes to it" in done.stderr
    )
    assert [
        (tmp_path / name).read_bytes() for name in ("log.jsonl", "config.json")
    ] == before
    assert [row["step"] for row in run(config)] == [1, 2, 3, 4, 5, 6]


def test_messages_that_nobody_reads_do_not_end_a_run(world, tmp_path):
    config = micro(world, tmp_path / "run", max_steps=50)
    process = subprocess.Popen(
        [sys.executable, *command(config)], env=ENV, stderr=subprocess.PIPE
    )
    process.stderr.read(10)
    process.stderr.close()
    assert process.wait() == 0 and read_log(tmp_path / "run")[-1]["step"] == 50


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


def test_a_damaged_state_never_takes_the_place_of_the_whole_one(world, tmp_path):
    config = micro(world, tmp_path, max_steps=4, save_interval=2, resume=True)
    run(config)
    (tmp_path / "state.pt").write_bytes(b"damaged")
    run(config)
    for name, step in (("state.pt", 4), ("state.old.pt", 2)):
        assert torch.load(tmp_path / name, weights_only=True)["step"] == step


def test_notes_that_are_no_log_of_ours_are_not_overwritten(world, tmp_path):
    (tmp_path / "log.jsonl").write_text("my notes\n")
    with pytest.raises(InputError, match="log.jsonl: already holds a run"):
        run(micro(world, tmp_path, max_steps=2))
    assert (tmp_path / "log.jsonl").read_text() == "my notes\n"


def test_options_of_the_optimizer_may_change_when_resumed(world, tmp_path):
    run(micro(world, tmp_path, max_steps=2))
    for name, changes in (
        ("a", {}),
        ("b", dict(weight_decay=50.0)),
        ("c", dict(betas=(0.1, 0.1))),
    ):
        shutil.copytree(tmp_path, tmp_path.parent / name)
        run(micro(world, tmp_path.parent / name, max_steps=4, resume=True, **changes))
    a, b, c = (
        load_file(tmp_path.parent / name / "proj.safetensors")["proj.weight"]
        for name in "abc"
    )
    assert not torch.equal(a, b) and not torch.equal(a, c)


def test_bad_samples_of_the_heldout_data_are_mentioned(world, tmp_path, capsys):
    rows = [
        {"image": str(tmp_path / "0.png"), "caption": "a"},
        {"image": "gone.png", "caption": "b"},
    ]
    Image.new("RGB", (28, 28)).save(tmp_path / "0.png")
    (tmp_path / "h.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    run(
        micro(
            world, tmp_path / "run", max_steps=1, heldout_data=str(tmp_path / "h.jsonl")
        )
    )
    assert "1 held-out samples cannot be used, such as " in capsys.readouterr().err


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


def odd_moments(state: dict, value: float, *size: int):
    for moments in state["optimizer"]["state"].values():
        moments["exp_avg"] = torch.full(size or moments["exp_avg"].shape, value)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.clear(),
        lambda state: state.update(step="x"),
        lambda state: state.update(step=-5),
        lambda state: state.update(optimizer={}),
        lambda state: state.update(identity=[1]),
        lambda state: odd_moments(state, 0.0, 3),
        lambda state: odd_moments(state, math.nan),
        lambda state: state["parameters"]["proj.proj.weight"].fill_(math.inf),
    ],
)
def test_a_state_of_odd_content_is_passed_over_for_the_one_before(
    world, tmp_path, capsys, change
):
    config = micro(world, tmp_path, max_steps=4, save_interval=2)
    run(config)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    change(state)
    torch.save(state, tmp_path / "state.pt")
    assert [row["step"] for row in run(replace(config, resume=True))] == [1, 2, 3, 4]
    assert re.search(
        r"warning: \S+state.pt: damaged .* the run goes on from \S+state.old.pt",
        capsys.readouterr().err,
    )


def test_a_damaged_log_does_not_stop_a_resume_but_a_damaged_state_does(world, tmp_path):
    run(micro(world, tmp_path, max_steps=2))
    with open(tmp_path / "log.jsonl", "ab") as f:
        f.write(b'5\n[]\n{"a": 1}\n{"step": "x"}\n\xff\n{"st')
    assert [
        row["step"] for row in run(micro(world, tmp_path, max_steps=4, resume=True))
    ] == [1, 2, 3, 4]
    for name in ("state.pt", "state.old.pt"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:1000])
    with pytest.raises(InputError, match="state.old.pt: damaged"):
        run(micro(world, tmp_path, max_steps=6, resume=True))


@pytest.mark.parametrize(
    "content, words",
    [
        ('{"bath_size": 3}', "unknown name 'bath_size'; did you mean batch_size"),
        ("[]", "should hold a JSON object"),
        ("{", "not valid JSON"),
    ],
)
def test_an_unreadable_config_json_is_named(tmp_path, content, words):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=f"config.json.*{words}"):
        read_saved_config(str(tmp_path))


# ---- evaluation --------------------------------------------------------------------------------------------


def test_heldout_loss_and_first_answers_are_logged(world, tmp_path):
    talk = [
        {"user": "Hello"},
        {"assistant": "A dog."},
        {"user": "And?"},
        {"assistant": "A cat."},
    ]
    line = {"image": f"{world['stage2']}/image/0.jpg", "conversation": talk}
    (tmp_path / "own.jsonl").write_text(json.dumps(line))
    for max_txt_len, steps in ((160, [3, 6]), (2048, [1])):  # also beyond CONTEXT
        config = micro(
            world,
            tmp_path / str(max_txt_len),
            heldout_data=f"{tmp_path}/own.jsonl",
            template="vicuna",
            max_txt_len=max_txt_len,
            eval_interval=3,
            max_steps=steps[-1],
        )
        rows = [row for row in run(config) if "heldout_loss" in row]
        assert [row["step"] for row in rows] == steps and all(
            row["heldout_loss"] > 0 for row in rows
        )
        assert [shown["data"].removesuffix("###") for shown in rows[0]["samples"]] == [
            "A dog."
        ]


def test_heldout_data_with_no_usable_sample_is_refused_at_the_start(world, tmp_path):
    with pytest.raises(InputError, match="not one of its samples"):
        run(
            micro(world, tmp_path / "out", heldout_data=world["texts"])
        )  # without pictures
    assert not (tmp_path / "out").exists()


def test_a_first_loss_clearly_above_a_uniform_guess_is_warned_of(
    world, tmp_path, capsys
):
    (loss,) = losses(run(micro(world, tmp_path / "random", max_steps=1)))
    assert log(600) < loss < log(600) + 1 and "warning" not in capsys.readouterr().err
    llama = changed_llama(world, tmp_path, "lm_head.weight", 30)
    (loss,) = losses(run(micro(world, tmp_path / "broken", max_steps=1, llama=llama)))
    assert (
        loss > log(600) + 1
        and f"warning: the first loss, {loss:.2f}, is worse" in capsys.readouterr().err
    )


# ---- configs and the command line --------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "path",
    sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "configs").rglob("*.py")
        if path.stem not in ("schema", "prompts", "base")
    ),
)
def test_every_config_is_valid(path):
    config = load_config(str(ROOT / path), {})
    assert config.llama and config.data and config.warmup_steps <= config.max_steps


def parsed(*words) -> Config:
    (path,), options = parse_args(
        [*words, str(ROOT / "configs/stage1.py")], "", "CONFIG", Config
    )
    return load_config(path, options)


@pytest.mark.parametrize(
    "words, name, value",
    [
        (["--lr=1"], "lr", 1.0),
        (["--lr", "1e-3"], "lr", 1e-3),
        (["--batch-size", "4"], "batch_size", 4),
        (["--resume"], "resume", True),
        (["--resume=TRUE"], "resume", True),
        (["--resume", "false"], "resume", False),
        (["--trainable=proj"], "trainable", ("proj",)),
        (["--trainable=proj,qformer"], "trainable", ("proj", "qformer")),
        (["--betas=0,0.95"], "betas", (0.0, 0.95)),
        (["--betas=(0.5, 0.6)"], "betas", (0.5, 0.6)),
        (["--data={'a': 1}"], "data", {"a": 1}),
        (["--out_dir=7"], "out_dir", "7"),
        (["--out_dir=a=b"], "out_dir", "a=b"),
    ],
)
def test_options_are_parsed_as_their_type(words, name, value):
    assert getattr(parsed(*words), name) == value
    assert override(Config(), {"betas": (0, 0.95)}).betas == (
        0.0,
        0.95,
    )  # as in a config file


@pytest.mark.parametrize(
    "option, words",
    [
        ("learning_rate=1", "'learning_rate'"),
        ("bath_size=4", "did you mean batch_size"),
        ("batch_size=many", "batch_size = 'many' is not of type int"),
        ("lr=True", "lr = True"),
        ("resume=yes", "resume = 'yes' is not of type bool"),
        ("trainable=7", "trainable = 7"),
        ("lr={[]: 1}", "lr = "),
        ("out_dir=", "out_dir = "),
        ("trainable=proj,proj", "trainable = "),
        ("betas=(0.9, 1.5)", "betas = "),
        (f"seed={2**70}", "seed = "),
        ("prepare={'a': 5}", "prepare = "),
        ("chat_share=2", "chat_share = "),
        ("template=alpaca", "vicuna, llama2"),
        ("lr=-1", "lr = -1.0: give at least 0"),
        ("grad_clip=nan", "grad_clip = "),
    ],
)
def test_wrong_options_are_refused(option, words):
    with pytest.raises(InputError, match=words):
        parsed(f"--{option}")


PROGRAMS = [
    "train",
    "chat",
    *sorted(f"tools.{path.stem}" for path in (ROOT / "tools").glob("*.py")),
]


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_lists_every_option_with_its_default_and_meaning(
    name, monkeypatch, capsys
):
    monkeypatch.setenv("COLUMNS", "1000")
    program = importlib.import_module(name)
    with pytest.raises(SystemExit) as end:
        program.main(["-h"])
    text, said = capsys.readouterr()
    assert end.value.code == 0 and not said and program.__doc__.splitlines()[0] in text
    options = dict(
        re.findall(r"^  --(\w+) \S+\s+(\S.*) \(default: .*\)$", text, re.MULTILINE)
    )
    assert len(options) == len(re.findall(r"^  --", text, re.MULTILINE))
    kinds = [
        kind
        for kind in vars(program).values()
        if is_dataclass(kind) and kind.__name__ == "Options"
    ]
    assert {f.name for kind in kinds for f in fields(kind)} <= options.keys()
    if name == "train":
        assert options.keys() == {f.name for f in fields(Config)}


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            dict(vision="nowhere.safetensors"),
            "nowhere.safetensors: there is no such weight file",
        ),
        (dict(llama="nowhere"), "nowhere: not a LLaMA folder"),
        (dict(llama=""), "no language model is given"),
        (dict(data="nowhere"), "data nowhere: no samples"),
        (dict(trainable=("head",)), "'head' is no part"),
    ],
)
def test_wrong_paths_and_parts_are_refused(world, tmp_path, changes, words):
    with pytest.raises(InputError, match=words):
        run(micro(world, tmp_path, **changes))


def test_a_projection_of_another_language_model_is_warned_of(world, tmp_path, capsys):
    llama = changed_llama(world, tmp_path, "norm.weight", 1.1)
    run(micro(world, tmp_path / "one", max_steps=1, llama=llama))
    assert "was trained with another" not in capsys.readouterr().err
    run(
        micro(
            world,
            tmp_path / "two",
            max_steps=1,
            proj=f"{tmp_path}/one/proj.safetensors",
        )
    )
    assert "proj.safetensors was trained with another llama" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["train.py"],
        ["train.py", "configs/none.py"],
        ["train.py", "configs/stage1.py"],
        ["train.py", "configs/stage1.py", "--stpes=3"],
        ["chat.py", "none.jpg"],
        ["chat.py", "--ckpt=nowhere"],
        ["chat.py", "--prompt"],
    ],
)
def test_a_mistake_of_the_user_gives_one_line_and_status_2(
    arguments, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        run_main({"train.py": train, "chat.py": chat}[arguments[0]].main)
    errors = [
        line
        for line in capsys.readouterr().err.splitlines()
        if line.startswith("error: ")
    ]
    assert end.value.code == 2 and len(errors) == 1


def test_a_mistake_of_ours_gives_a_traceback():
    with pytest.raises(ValueError):
        run_main(lambda argv: int("ours"))
    assert not issubclass(
        InputError, ValueError
    )  # or `except ValueError` would swallow it


def test_imports_leave_the_environment_alone():
    code = "import os; before = dict(os.environ); import train, chat; assert dict(os.environ) == before"
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]},
        check=True,
    )


def test_twenty_photographs_and_a_jsonl_train_and_answer(tmp_path):
    """As the README says, from the tiny weights: captions, and a conversation about two pictures."""
    lines = []
    for i in range(20):
        pixels = np.random.default_rng(i).integers(
            0, 255, (30 + i, 40, 3), dtype=np.uint8
        )
        Image.fromarray(pixels).resize((400, 300)).save(tmp_path / f"IMG_{i}.JPG")
        lines.append({"image": f"IMG_{i}.JPG", "caption": f"Our garden, number {i}."})
    talk = [{"user": "What changed?"}, {"assistant": "The cat left."}]
    lines.append({"image": ["IMG_0.JPG", "IMG_1.JPG"], "conversation": talk})
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )
    out = tmp_path / "my run"
    options = [
        "--max_steps=6",
        "--warmup_steps=1",
        "--log_interval=1",
        f"--out_dir={out}",
    ]
    done = subprocess.run(
        [
            sys.executable,
            "train.py",
            "configs/finetune_own.py",
            f"--data={tmp_path}/data.jsonl",
            *options,
        ],
        cwd=ROOT,
        env=ENV,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(losses(read_log(out))) == 6 and not any(
        "skipped" in row for row in read_log(out)
    )
    before, after = (
        load_file(folder / "proj.safetensors") for folder in (ROOT / "assets/tiny", out)
    )
    assert not torch.equal(before["proj.weight"], after["proj.weight"])
    python, *chat_command = shlex.split(
        done.stderr.splitlines()[-1]
    )  # how to chat with the result
    talked = subprocess.run(
        [sys.executable, *chat_command],
        cwd=ROOT,
        env=ENV,
        capture_output=True,
        text=True,
        input="What is it?\n",
    )
    assert python == "python" and talked.returncode == 0 and talked.stdout.strip(), (
        talked.stderr
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
