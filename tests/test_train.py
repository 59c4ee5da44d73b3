"""The training loop: what learns, what stops it, evaluation, switches."""

import json
import math
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch._dynamo.utils import counters

import chat
import train
from configs.schema import read_saved_config
from model import MiniGPT4
from plumbing.console import InputError
from tests.common import EXAMPLE
from tests.families import EACH_FAMILY, write_tokenizer
from tests.runs import CPU, assert_same, losses, micro, run, weights

# ---- what learns ---------------------------------------------------------------------


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


FAMILY_SIZES = dict(
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_a_model_with_a_tokenizer_json_trains_resumes_and_chats(
    world, tmp_path, family, capsys
):
    model_type = {"qwen2.5": "qwen2", "qwen3": "qwen3"}.get(family, "llama")
    template = "llama3" if family == "llama3" else "chatml"
    write_tokenizer(tmp_path, family)
    sizes = FAMILY_SIZES | {"model_type": model_type}
    path = f"{tmp_path}/tokenizer.json"
    new = MiniGPT4.from_files(None, None, sizes, tokenizer=path)
    new.save_part("llama", str(tmp_path))
    llama = f"{tmp_path}/llama"
    first = micro(world, tmp_path / "one", llama=llama, num_workers=1)
    run(first)
    second = replace(
        first,
        proj=f"{tmp_path}/one/proj.safetensors",
        data=world["stage2"],
        template=template,
        heldout_data=world["stage2"],
        out_dir=f"{tmp_path}/two",
    )
    run(replace(second, max_steps=2))
    run(replace(second, resume=True))
    run(whole := replace(second, out_dir=f"{tmp_path}/whole"))
    assert_same(weights(second.out_dir), weights(whole.out_dir))

    options = chat.Options(ckpt=second.out_dir, max_new_tokens=5, num_beams=2)
    for dtype in ("int8", "int4"):
        talk = chat.Chat(*chat.load(replace(options, dtype=dtype)))
        talk.add_image(str(EXAMPLE))
        answers = ["".join(talk.ask(text)) for text in ("Hi", "<|im_end|>")]
        assert answers == [turn.answer for turn in talk.turns]
    assert talk.options.template == template
    chat.load(replace(options, ckpt=first.out_dir))
    assert f"--template={template} is used" in capsys.readouterr().err

    other = replace(whole, out_dir=f"{tmp_path}/x", llama=f"{tmp_path}/other")
    sizes["model_type"] = "qwen2" if model_type != "qwen2" else "qwen3"
    MiniGPT4.from_files(None, None, sizes, tokenizer=path).save_part(
        "llama", f"{tmp_path}/save"
    )
    os.rename(f"{tmp_path}/save/llama", other.llama)
    for changed in (other, replace(other, out_dir=second.out_dir, resume=True)):
        run(changed)
        assert "was trained with another llama" in capsys.readouterr().err

    with pytest.raises(InputError, match="has no token .*take another template"):
        run(replace(whole, out_dir=f"{tmp_path}/y", llama=world["llama"], proj=""))


@pytest.mark.slow
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
        a, b = trained.part_tensors(part), frozen.part_tensors(part)
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
        pytest.param({"dtype": "bfloat16"}, 0.02, id="bfloat16"),
        pytest.param({"dtype": "float16"}, 0.02, id="float16"),
        pytest.param({"batch_size": 1, "grad_accum": 4}, 1e-5, id="accumulated"),
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
    config = micro(world, tmp_path, cache_features=True)
    model = train.build(config, CPU)
    train.open_data(config, model, CPU)
    assert model.vision is None and (model.image_size, model.n_image_tokens) == (32, 4)


@pytest.mark.parametrize(
    "save_interval, words",
    [
        pytest.param(99, "step 24: the last 20 losses", id="losses"),
        pytest.param(4, "step 4: the weights", id="weights"),
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
    # steps 3 and 4 have nothing else to report
    assert [row["step"] for row in log if "loss" in row] == [1, 2, 5, 6]
    assert all(t.isfinite().all() for t in weights(tmp_path).values())


@pytest.fixture
def one_step():
    """Take a step on the sum of a parameter plus `extra`: (parameter, loss, finite)."""
    p = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.AdamW([p], 0.1)
    batch = train.Batch(torch.zeros(1), torch.zeros(1, 2), torch.zeros(1, 2))

    def step(extra=0.0, scaler=None):
        scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
        loss, is_finite = train.train_step(
            lambda *_: p.sum() + extra, [batch], optimizer, scaler, 0.1
        )
        return p.detach().clone(), loss.item(), is_finite

    return step


def test_an_infinite_loss_skips_the_step_although_its_gradient_is_finite(one_step):
    before, loss, is_finite = one_step()
    assert loss == 4 and is_finite and not torch.equal(before, torch.ones(2, 2))
    after, loss, is_finite = one_step(extra=torch.inf)
    assert math.isinf(loss) and not is_finite
    assert torch.equal(after, before)


@pytest.mark.parametrize("enabled", [False, True], ids=["bfloat16", "float16"])
def test_a_step_is_skipped_when_another_rank_s_loss_is_not_finite(
    one_step, monkeypatch, enabled
):
    sums = []

    def with_a_broken_rank(value):
        sums.append(value)
        is_loss = len(sums) == 2  # after the number of targets
        return value + torch.nan if is_loss else value

    monkeypatch.setattr(train, "all_sum", with_a_broken_rank)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, enabled=enabled)
    after, _, is_finite = one_step(scaler=scaler)
    assert len(sums) == 2 and not is_finite
    assert torch.equal(after, torch.ones(2, 2))


def test_a_step_without_any_target_has_loss_0(world, tmp_path):
    config = micro(world, tmp_path)
    model = train.build(config, CPU)
    checkpoint = train.make_checkpoint(None, model, config, {}, CPU)
    loss, is_finite = train.train_step(
        model, [train.collate([])], checkpoint.optimizer, checkpoint.scaler, 0.1
    )
    assert loss == 0 and is_finite


def test_trained_parts_compute_in_the_dtype_of_the_frozen_ones(world, tmp_path):
    trainable = ("qformer", "proj")
    config = micro(world, tmp_path, dtype="bfloat16", trainable=trainable)
    model = train.build(config, CPU)
    train.mix_precision(model, config, CPU)  # as build does on a GPU
    seen = []
    fc1 = model.bridge.layers[0].fc1
    fc1.register_forward_hook(lambda module, x, y: seen.append(y.dtype))
    samples, weights, _ = train.open_data(config, model, CPU)
    (batch,) = next(train.TrainingSteps(samples, weights, config).read())[2]
    model(*batch).backward()
    assert seen == [torch.bfloat16]
    assert fc1.weight.dtype == fc1.weight.grad.dtype == torch.float32


def test_the_checkpoint_is_saved_before_an_evaluation_that_fails(
    world, tmp_path, monkeypatch
):
    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(train, "evaluate", fail)
    config = micro(world, tmp_path, heldout_data=world["data"], eval_interval=2)
    with pytest.raises(ZeroDivisionError):
        run(config)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 2


def test_a_signal_cuts_an_evaluation_short(world, tmp_path):
    config = micro(world, tmp_path, heldout_data=world["data"])
    model = train.build(config, CPU)
    _, _, heldout = train.open_data(config, model, CPU)
    stop = train.StopSignals(CPU)
    forward = model.forward

    def forward_and_signal(*batch):
        os.kill(os.getpid(), signal.SIGTERM)
        return forward(*batch)

    model.forward = forward_and_signal
    assert train.evaluate(model, heldout, config, CPU, stop) is None
    assert len(stop.received) == 1  # after one batch


def test_a_held_out_conversation_may_have_its_picture_in_a_later_turn(world, tmp_path):
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    spoken = ["Hi", "Hello.", "<image>What is it?", "A star."]
    speakers = ["human", "gpt"] * 2
    turns = [{"from": who, "value": text} for who, text in zip(speakers, spoken)]
    rows = [{"image": "a.png", "conversations": turns}]
    (tmp_path / "heldout.json").write_text(json.dumps(rows))
    config = micro(
        world,
        tmp_path / "run",
        template="vicuna",
        max_steps=1,
        heldout_data=str(tmp_path / "heldout.json"),
    )
    (row,) = [row for row in run(config) if "heldout_loss" in row]
    assert row["samples"][0]["data"].startswith("Hello.")


def test_a_new_part_that_is_not_trained_is_saved(world, tmp_path):
    sizes = dict(n_queries=4, width=16, n_layers=2, n_heads=2, ffn_hidden=32)
    config = micro(world, tmp_path, qformer=sizes, max_steps=1)
    run(config)
    model, _ = chat.load(chat.Options(ckpt=config.out_dir, device="cpu"))
    drawn = train.build(config, CPU).bridge.query_tokens
    assert torch.equal(model.bridge.query_tokens, drawn.to(torch.float32))


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


# ---- evaluation ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "max_txt_len, steps",
    [
        pytest.param(160, [3, 6], id="short"),
        pytest.param(2048, [1], id="beyond-the-context", marks=pytest.mark.slow),
    ],
)
def test_heldout_loss_and_first_answers_are_logged(world, tmp_path, max_txt_len, steps):
    talk = [
        {"user": "Hello"},
        {"assistant": "A dog."},
        {"user": "And?"},
        {"assistant": "A cat."},
    ]
    line = {"image": f"{world['stage2']}/image/0.jpg", "conversation": talk}
    (tmp_path / "own.jsonl").write_text(json.dumps(line))
    config = micro(
        world,
        tmp_path / "run",
        heldout_data=f"{tmp_path}/own.jsonl",
        template="vicuna",
        max_txt_len=max_txt_len,
        eval_interval=3,
        max_steps=steps[-1],
    )
    rows = [row for row in run(config) if "heldout_loss" in row]
    assert [row["step"] for row in rows] == steps
    assert all(row["heldout_loss"] > 0 for row in rows)
    (shown,) = rows[0]["samples"]
    assert shown["data"].removesuffix("###") == "A dog."


def test_heldout_data_with_no_usable_sample_is_refused_at_the_start(world, tmp_path):
    with pytest.raises(InputError, match="not one of its samples"):
        # they are texts without pictures
        run(micro(world, tmp_path / "out", heldout_data=world["texts"]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes, words",
    [
        pytest.param(
            dict(vision="nowhere.safetensors"),
            "nowhere.safetensors: there is no such weight file",
            id="vision",
        ),
        pytest.param(dict(llama="nowhere"), "nowhere: not a LLaMA folder", id="llama"),
        pytest.param(dict(llama=""), "no language model is given", id="no-llama"),
        pytest.param(dict(data="nowhere"), "data nowhere: no samples", id="data"),
        pytest.param(dict(trainable=("head",)), "'head' is no part", id="part"),
    ],
)
def test_wrong_paths_and_parts_are_refused(world, tmp_path, changes, words):
    with pytest.raises(InputError, match=words):
        run(micro(world, tmp_path, **changes))


# ---- switches that change no number --------------------------------------------------


STAGE2 = dict(template="vicuna", max_txt_len=160)


@pytest.mark.parametrize(
    "switch",
    [
        "grad_checkpoint",
        "cache_features",
        pytest.param("compile", marks=pytest.mark.slow),
    ],
)
def test_a_switch_changes_no_number(world, tmp_path, switch):
    plain = micro(
        world,
        tmp_path / "plain",
        data=world["stage2"],
        batch_size=2,
        max_steps=10,
        **STAGE2,
    )
    switched = replace(plain, out_dir=f"{tmp_path}/switched", **{switch: True})
    counters.clear()
    assert losses(run(switched)) == pytest.approx(losses(run(plain)), rel=1e-5)
    a, b = weights(tmp_path / "plain"), weights(tmp_path / "switched")
    torch.testing.assert_close(
        a["proj.proj.weight"], b["proj.proj.weight"], atol=1e-4, rtol=0
    )
    if switch == "compile":
        # few graphs for many lengths: ViT, Q-Former's two kinds of layers, LLaMA
        assert not counters["graph_break"]
        assert 0 < counters["stats"]["unique_graphs"] <= 8


def test_cached_features_are_the_same_bits_and_are_computed_once(
    world, tmp_path, monkeypatch
):
    """Each batch holds all 24 pictures: the vision side sees the same batches."""
    seen, image_features = [], MiniGPT4.image_features
    monkeypatch.setattr(
        MiniGPT4,
        "image_features",
        lambda self, images: seen.append(len(images)) or image_features(self, images),
    )
    # a new part with random weights
    sizes = dict(n_queries=4, width=16, n_layers=2, n_heads=2, ffn_hidden=32)
    config = micro(
        world,
        tmp_path / "cached",
        data=world["stage2"],
        batch_size=24,
        max_steps=3,
        qformer=sizes,
        cache_features=True,
        **STAGE2,
    )
    run(config)
    assert sum(seen) == 24
    run(replace(config, cache_features=False, out_dir=f"{tmp_path}/fresh"))
    assert sum(seen) == 24 * 4
    assert_same(weights(tmp_path / "cached"), weights(tmp_path / "fresh"))


def test_features_of_a_part_that_learns_are_refused(world, tmp_path):
    for changes in (
        dict(trainable=("qformer", "proj")),
        dict(vision="", qformer="", trainable=("llama",)),
    ):
        with pytest.raises(InputError, match="cache_features"):
            micro(world, tmp_path, cache_features=True, **changes)


def test_a_bad_picture_is_counted_beside_cached_ones(world, tmp_path):
    lines = [
        {"image": f"{world['stage2']}/image/{i}.jpg", "caption": "a star"}
        for i in range(5)
    ]
    lines += [
        {"image": name, "caption": "a star"} for name in ("broken.jpg", "none.jpg", 7)
    ]
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    log = run(
        micro(
            world,
            tmp_path / "run",
            data=f"{tmp_path}/own.jsonl",
            cache_features=True,
            batch_size=8,
            max_bad_fraction=0.5,
        )
    )
    assert sum(log[-1]["skipped"].values()) == 18 and log[-1]["of"] == 48


def test_switches_say_what_they_need(world, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="torchrun"):
        run(micro(world, tmp_path, shard=True))
    with pytest.raises(InputError, match="frozen"):
        micro(world, tmp_path, shard=True, trainable=("proj", "llama"))
    with pytest.raises(InputError, match="compiler"):
        monkeypatch.setenv("CXX", "/nonexistent")
        run(micro(world, tmp_path, compile=True))
