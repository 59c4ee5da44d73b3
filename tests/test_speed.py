"""What makes training faster, smaller or parallel moves no number: checkpointing, compiling, cached features,
several processes, sharding; and what the log says about speed."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import data
import train
from configs.schema import InputError
from model import MiniGPT4
from tests.test_train import ENV, command, micro, run, same, weights, world  # noqa: F401  (world: a fixture)
from tools.meter import Meter, model_flops


def losses(log):
    return [r["loss"] for r in log if "loss" in r]


def by_torchrun(config, tmp_path, processes, port):
    """Train in several processes; the lines of log.jsonl."""
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes),
             "--master-port", str(port)]
    done = subprocess.run([*start, *command(config, tmp_path)], env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (Path(config.out_dir) / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("switch", ["grad_checkpoint", "compile", "cache_features"])
def test_a_switch_moves_no_number(world, tmp_path, switch):  # noqa: F811
    settings = dict(data=world["stage2"], template="vicuna", end_sym="###", max_txt_len=160,
                    clean_captions=False)
    plain = run(micro(world, tmp_path / "plain", **settings))
    switched = run(micro(world, tmp_path / "switched", **settings, **{switch: True},
                         cache_dir=str(tmp_path / "features")))
    assert losses(switched) == pytest.approx(losses(plain), rel=1e-5)
    a, b = weights(tmp_path / "plain"), weights(tmp_path / "switched")
    torch.testing.assert_close(a["weight.proj.proj.weight"], b["weight.proj.proj.weight"], atol=1e-4, rtol=0)


def test_few_recompiles_for_many_lengths(world, tmp_path):  # noqa: F811
    from torch._dynamo.utils import counters
    counters.clear()
    torch._dynamo.reset()
    run(micro(world, tmp_path, compile=True, max_steps=20, batch_size=2))
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 8  # ViT, Q-Former with and without a look, LLaMA: twice each


# ---- cached features ---------------------------------------------------------------------------------------


def cached(world, out, cache_dir, **changes):
    """A run whose every batch holds all 24 pictures, so that cached and fresh batches are the same."""
    return micro(world, out, data=world["stage2"], template="vicuna", end_sym="###", max_txt_len=160,
                 clean_captions=False, batch_size=24, cache_features=True, cache_dir=str(cache_dir),
                 **{"max_steps": 3} | changes)


def test_cached_features_give_the_same_bits_for_the_same_batch(world, tmp_path):  # noqa: F811
    config = cached(world, tmp_path / "cached", tmp_path / "features")
    run(config)
    run(replace(config, cache_features=False, out_dir=str(tmp_path / "fresh")))
    same(weights(tmp_path / "cached"), weights(tmp_path / "fresh"))


def test_the_towers_run_once_and_leave(world, tmp_path, monkeypatch):  # noqa: F811
    seen = []
    look = MiniGPT4.image_features
    monkeypatch.setattr(MiniGPT4, "image_features", lambda self, x: seen.append(len(x)) or look(self, x))
    config = cached(world, tmp_path / "a", tmp_path / "features")
    run(config)
    assert sum(seen) == 24
    run(replace(config, out_dir=str(tmp_path / "b")))
    assert sum(seen) == 24
    same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_other_eyes_and_broken_entries_are_never_used(world, tmp_path):  # noqa: F811
    config = cached(world, tmp_path / "a", tmp_path / "features")
    run(config)
    entries = sorted(p for p in (tmp_path / "features").rglob("*") if p.is_file())
    assert len(entries) == 24
    entries[0].write_bytes(entries[0].read_bytes()[:100])  # half-written
    entries[1].write_bytes(b"")
    run(replace(config, out_dir=str(tmp_path / "b")))
    same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    torch.manual_seed(1)
    other = MiniGPT4.from_files(world["vision"], dict(n_queries=4, width=16, n_layers=2, n_heads=2,
                                                      ffn_hidden=32), world["llama"], dtype="float32")
    other.save_part("qformer", tmp_path)
    changed = replace(config, qformer=f"{tmp_path}/qformer.safetensors", out_dir=str(tmp_path / "c"))
    run(changed)
    run(replace(changed, cache_features=False, out_dir=str(tmp_path / "d")))
    same(weights(tmp_path / "c"), weights(tmp_path / "d"))


def test_new_random_towers_have_features_of_their_own(world, tmp_path):  # noqa: F811
    sizes = dict(n_queries=4, width=16, n_layers=2, n_heads=2, ffn_hidden=32)
    for seed in (1, 2):
        config = cached(world, tmp_path / f"cached{seed}", tmp_path / "features", qformer=sizes, seed=seed)
        run(config)
        run(replace(config, cache_features=False, out_dir=str(tmp_path / f"fresh{seed}")))
        same(weights(tmp_path / f"cached{seed}"), weights(tmp_path / f"fresh{seed}"))


def test_features_of_a_part_that_learns_are_refused(world, tmp_path):  # noqa: F811
    for changes in (dict(train=("qformer", "proj")), dict(vision="", qformer="", train=("llama",))):
        with pytest.raises(InputError, match="cache_features"):
            micro(world, tmp_path, cache_features=True, **changes)
    with pytest.raises(InputError, match="cache_dir"):
        (tmp_path / "file").write_text("")
        run(micro(world, tmp_path / "run", cache_features=True, cache_dir=str(tmp_path / "file")))


def test_a_bad_picture_is_counted_beside_cached_ones(world, tmp_path):  # noqa: F811
    folder = tmp_path / "data"
    folder.mkdir()
    source = Path(world["stage2"])
    lines = [{"image": str(source / f"image/{i}.jpg"), "caption": "a star"} for i in range(5)]
    (folder / "broken.jpg").write_bytes(b"no picture")
    lines.append({"image": "broken.jpg", "caption": "a star"})
    lines += [{"image": "nul\0.jpg", "caption": "a star"}, {"image": 7}]
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    log = run(micro(world, tmp_path / "run", data=str(folder / "own.jsonl"), cache_features=True,
                    batch_size=8, cache_dir=str(tmp_path / "features"), max_bad_fraction=0.5))
    assert log[-1]["skipped"] == {"picture cannot be read": 6, "not a sample": 12}


# ---- several processes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes, changes, port", [
    (2, {"shard": True}, 29521), (4, {}, 29522), (2, {"grad_accum": 2, "batch_size": 2}, 29523),
    (2, {"cache_features": True}, 29524)])
def test_processes_give_the_curve_of_one(world, tmp_path, processes, changes, port):  # noqa: F811
    heldout = dict(heldout_data=world["other"], eval_interval=3, eval_samples=8)
    one = micro(world, tmp_path / "one", batch_size=8, **heldout)
    many = replace(one, out_dir=str(tmp_path / "many"), cache_dir=str(tmp_path / "features"),
                   **{"batch_size": 8 // processes} | changes)
    a, b = run(one), by_torchrun(many, tmp_path, processes, port)
    assert losses(b) == pytest.approx(losses(a), rel=1e-4)
    assert [r["heldout_loss"] for r in b if "heldout_loss" in r] == pytest.approx(
        [r["heldout_loss"] for r in a if "heldout_loss" in r], rel=1e-4)


def test_switches_say_what_they_need(world, tmp_path, monkeypatch):  # noqa: F811
    with pytest.raises(InputError, match="torchrun"):
        run(micro(world, tmp_path, shard=True))
    with pytest.raises(InputError, match="frozen"):
        micro(world, tmp_path, shard=True, train=("proj", "llama"))
    with pytest.raises(InputError, match="compiler"):
        monkeypatch.setenv("CXX", "/nonexistent")
        run(micro(world, tmp_path, compile=True))


# ---- what the log says -------------------------------------------------------------------------------------


def test_the_log_tells_speed_padding_waiting_and_utilisation(world, tmp_path):  # noqa: F811
    log = run(micro(world, tmp_path))
    assert {"images_per_s", "tokens_per_s", "padding", "data_wait", "mfu"} <= log[0].keys()
    assert all(0 <= r["padding"] < 1 and 0 <= r["data_wait"] <= 1 for r in log)


def test_tokens_are_counted_without_padding():
    samples = [([], [1, 5, 6, 7], [-100, -100, 6, 7]), ([], [1, 5], [-100, 5])]
    batch = data.collate(samples)
    assert (batch.n_tokens, batch.n_targets, batch.tokens.numel()) == (6, 3, 8)


def test_flops_are_those_that_a_step_computes(world, tmp_path):  # noqa: F811
    """Against PyTorch's counter on a real step, less padding and the logits that are computed again."""
    from torch.utils.flop_counter import FlopCounterMode
    config = micro(world, tmp_path)
    model = train.build(config, torch.device("cpu"))
    samples, weights = data.open_samples(config.data, config, model.tokenizer, *model.image_shape)
    batch = next(iter(data.Reader(samples, weights, config)))
    with FlopCounterMode(display=False) as counter:
        model(*batch).backward()
    meter = Meter(model, config, torch.device("cpu"), 1)
    meter.add([batch], 0.0)
    per_token = model_flops(model, config.train)[1]
    padded = (batch.tokens.numel() - batch.n_tokens) * per_token
    logits = 2 * batch.n_targets * model.llama.embed_tokens.weight.numel()
    assert meter.flops == pytest.approx(counter.get_total_flops() - padded - logits, rel=0.1)


def test_a_profile_is_written(world, tmp_path, capsys):  # noqa: F811
    with pytest.raises(InputError, match="profile"):
        run(micro(world, tmp_path / "short", profile=True, max_steps=5))
    run(micro(world, tmp_path, profile=True))
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    table = capsys.readouterr().err
    assert "Self CPU" in table and table.count("aten::") >= 5
