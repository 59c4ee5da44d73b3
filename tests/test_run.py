"""A run's folder: what it refuses, exact resume, damaged files."""

import json
import math
import re
import shutil
from dataclasses import replace
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import train
from data import Example, TrainingSteps, collate
from plumbing.console import InputError
from plumbing.run import Meter, RunLog
from tests.runs import (
    CPU,
    assert_same,
    changed_llama,
    losses,
    micro,
    run,
    run_until_killed,
    weights,
)

# ---- the folder ----------------------------------------------------------------------


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


@pytest.mark.slow
def test_a_second_run_in_a_folder_is_refused_and_changes_nothing(
    world, tmp_path, start
):
    out = tmp_path / "out"
    run(micro(world, out, max_steps=2))
    config = micro(world, out, max_steps=6, resume=True)
    before = [(out / name).read_bytes() for name in ("log.jsonl", "config.json")]
    # to open and close the file in this process again would end the lock
    with RunLog(train.open_folder(config), 6, 2, is_silent=False):
        status, err = start(replace(config, lr=0.5)).wait()
    assert status == 2 and f"{out}: another run writes to it" in err
    after = [(out / name).read_bytes() for name in ("log.jsonl", "config.json")]
    assert after == before
    assert [row["step"] for row in run(config)] == [1, 2, 3, 4, 5, 6]


def test_notes_that_are_no_log_of_ours_are_not_overwritten(world, tmp_path):
    (tmp_path / "log.jsonl").write_text("my notes\n")
    with pytest.raises(InputError, match="log.jsonl: already holds a run"):
        run(micro(world, tmp_path, max_steps=2))
    assert (tmp_path / "log.jsonl").read_text() == "my notes\n"


def test_a_finished_run_without_its_state_is_not_resumed_over(world, tmp_path):
    run(micro(world, tmp_path, max_steps=2))
    for name in ("state.pt", "state.old.pt"):
        (tmp_path / name).unlink(missing_ok=True)
    kept = ("log.jsonl", "proj.safetensors")
    before = [(tmp_path / name).read_bytes() for name in kept]
    with pytest.raises(InputError, match="without state.pt.* cannot be resumed"):
        run(micro(world, tmp_path, max_steps=4, resume=True))
    assert [(tmp_path / name).read_bytes() for name in kept] == before


def test_a_run_killed_between_its_first_state_and_its_weights_is_resumed(
    world, tmp_path
):
    config = micro(world, tmp_path, max_steps=2, save_interval=2, resume=True)
    run(config)
    before = load_file(tmp_path / "proj.safetensors")
    (tmp_path / "proj.safetensors").unlink()
    run(config)  # it is at its end, and writes what is missing
    assert_same(load_file(tmp_path / "proj.safetensors"), before)


# ---- resume --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_with_the_same_weights(
    world, tmp_path, monkeypatch, start
):
    settings = dict(max_steps=40, num_workers=1, save_interval=5)
    unbroken = micro(world, tmp_path / "unbroken", **settings)
    broken = replace(unbroken, out_dir=f"{tmp_path}/broken", resume=True)
    for steps in (3, 18):  # before the first checkpoint, and after the third
        process = start(broken)
        process.wait_for_steps(steps)
        process.process.kill()
        process.wait()
        if steps == 3:
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
        ({"seed": 7}, "seed was 42"),
        ({"grad_accum": 2}, "processes x batch_size x grad_accum was 4, now it is 8"),
        ({"shuffle_shards": 2}, "shuffle_shards was"),
        ({"length_group": 2}, "length_group was"),
        ({"data": "disk.jsonl"}, "data was"),
        ({"template": "llama2"}, "template was"),
        ({"end_sym": "END"}, "answer_end was"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
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


# ---- damaged files -------------------------------------------------------------------


@pytest.mark.parametrize("cut", [False, True], ids=["flipped", "cut"])
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


def test_a_damaged_state_never_takes_the_place_of_the_whole_one(world, tmp_path):
    config = micro(world, tmp_path, max_steps=4, save_interval=2, resume=True)
    run(config)
    (tmp_path / "state.pt").write_bytes(b"damaged")
    run(config)
    for name, step in (("state.pt", 4), ("state.old.pt", 2)):
        assert torch.load(tmp_path / name, weights_only=True)["step"] == step


def odd_moments(state: dict, value: float, *size: int):
    for moments in state["optimizer"]["state"].values():
        moments["exp_avg"] = torch.full(size or moments["exp_avg"].shape, value)


def infinite_weights(state: dict):
    state["parameters"]["proj.proj.weight"].fill_(math.inf)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda state: state.clear(), id="empty"),
        pytest.param(lambda state: state.update(step="x"), id="step-a-text"),
        pytest.param(lambda state: state.update(step=-5), id="step-negative"),
        pytest.param(lambda state: state.update(optimizer={}), id="no-moments"),
        pytest.param(lambda state: state.update(identity=[1]), id="identity-a-list"),
        pytest.param(lambda state: odd_moments(state, 0.0, 3), id="moments-misshaped"),
        pytest.param(lambda state: odd_moments(state, math.nan), id="moments-nan"),
        pytest.param(infinite_weights, id="weights-infinite"),
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


# ---- losses and speed in the log -----------------------------------------------------


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
