"""What makes training faster, smaller or parallel changes no number: checkpointing, compiling, cached
features, several processes, sharding; and what the log says about loss and speed."""

import json
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

import train
from data import Groups, Reader
from model import MiniGPT4
from plumbing.console import InputError
from tests.test_train import (
    CPU,
    assert_same,
    by_torchrun,
    losses,
    micro,
    run,
    weights,
    world,  # noqa: F401 (a fixture)
)

STAGE2 = dict(template="vicuna", max_txt_len=160)


@pytest.mark.parametrize("switch", ["grad_checkpoint", "cache_features", "compile"])
def test_a_switch_changes_no_number(world, tmp_path, switch):  # noqa: F811
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
    if (
        switch == "compile"
    ):  # few graphs for many lengths: ViT, Q-Former's two kinds of layers, LLaMA
        assert (
            not counters["graph_break"] and 0 < counters["stats"]["unique_graphs"] <= 8
        )


def test_cached_features_are_the_same_bits_and_are_computed_once(
    world, tmp_path, monkeypatch
):  # noqa: F811
    """Each batch holds all 24 pictures, so that the vision side sees the same batches."""
    seen, image_features = [], MiniGPT4.image_features
    monkeypatch.setattr(
        MiniGPT4,
        "image_features",
        lambda self, images: seen.append(len(images)) or image_features(self, images),
    )
    sizes = dict(
        n_queries=4, width=16, n_layers=2, n_heads=2, ffn_hidden=32
    )  # of new, random parts
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


def test_features_of_a_part_that_learns_are_refused(world, tmp_path):  # noqa: F811
    for changes in (
        dict(trainable=("qformer", "proj")),
        dict(vision="", qformer="", trainable=("llama",)),
    ):
        with pytest.raises(InputError, match="cache_features"):
            micro(world, tmp_path, cache_features=True, **changes)


def test_a_bad_picture_is_counted_beside_cached_ones(world, tmp_path):  # noqa: F811
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
):  # noqa: F811
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


def test_switches_say_what_they_need(world, tmp_path, monkeypatch):  # noqa: F811
    with pytest.raises(InputError, match="torchrun"):
        run(micro(world, tmp_path, shard=True))
    with pytest.raises(InputError, match="frozen"):
        micro(world, tmp_path, shard=True, trainable=("proj", "llama"))
    with pytest.raises(InputError, match="compiler"):
        monkeypatch.setenv("CXX", "/nonexistent")
        run(micro(world, tmp_path, compile=True))


def read_steps(config):
    """The model of a run, and its steps, each (source, micro-batches)."""
    model = train.build(config, CPU)
    samples, sources, _ = train.open_data(config, model, CPU)
    return model, list(Reader(Groups(samples, sources, config)))


def test_the_log_has_the_mean_loss_per_token_of_its_interval_for_each_source(
    world, tmp_path
):  # noqa: F811
    mixed = {world["data"]: 1, world["stage2"]: 1}
    each, total = (
        run(micro(world, tmp_path / str(n), data=mixed, log_interval=n)) for n in (1, 6)
    )
    _, steps = read_steps(micro(world, tmp_path, data=mixed))
    counts = [
        (list(mixed)[source], sum(b.n_targets for b in batches))
        for source, batches in steps
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


def test_the_log_tells_the_speed_and_with_peak_tflops_mfu(world, tmp_path):  # noqa: F811
    for peak in (0.0, 1e-3):
        for row in run(micro(world, tmp_path / str(peak), peak_tflops=peak)):
            assert (
                row["tokens_per_s"] > row["images_per_s"] > 0
                and 0 <= row["data_wait"] <= 1
            )
            assert row["mfu"] > 0 if peak else "mfu" not in row
            assert "losses" not in row  # there is only one source


def test_flops_are_those_that_a_step_computes(world, tmp_path):  # noqa: F811
    """Against PyTorch's counter on a real step, less padding and the logits that are computed again."""
    llama = dict(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    config = micro(
        world, tmp_path, llama=llama, tokenizer=f"{world['llama']}/tokenizer.model"
    )
    model, steps = read_steps(config)
    (batch,) = steps[0][1]
    with FlopCounterMode(display=False) as counter:
        model(*batch).backward()
    per_picture, per_token = train.flops_per_position(model, config.trainable)
    again = 2 * batch.n_targets * model.llama.embed_tokens.weight.numel()
    counted = (
        counter.get_total_flops()
        - (batch.tokens.numel() - batch.n_tokens) * per_token
        - again
    )
    assert len(
        batch.images
    ) * per_picture + batch.n_tokens * per_token == pytest.approx(counted, rel=0.1)
