"""The training loop: what learns, exact resume, no effect of processes and accumulation, the run's folder."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import chat
import train
from configs.schema import Config, InputError, load_config, read_saved_config
from llama import IGNORE, IMAGE
from model import MiniGPT4
from tests.common import GOLDEN
from tools import make_scenes
from tools.dry_run import describe_training

ROOT = Path(__file__).resolve().parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1"}  # the runs below are too small for more


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> dict:
    """The paths of a micro model with random weights, and of stage-1 and stage-2 data for it."""
    root = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    model = MiniGPT4.from_files(
        dict(image_size=32, patch_size=8, width=16, n_layers=2, n_heads=2, mlp_hidden=32),
        dict(n_queries=4, width=16, n_layers=2, n_heads=2, ffn_hidden=32),
        dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2),
        tokenizer=str(GOLDEN / "tokenizer" / "tokenizer.model"))
    for part in ("vision", "qformer", "llama"):
        model.save_part(part, root)
    make_scenes.main(["stage1", str(root / "stage1"), "--n=64"])
    make_scenes.main(["stage2", str(root / "stage2"), "--n=24"])
    make_scenes.main(["stage1", str(root / "other"), "--n=16", "--heldout=True"])
    return {"vision": f"{root}/vision.safetensors", "qformer": f"{root}/qformer.safetensors",
            "llama": f"{root}/llama", "data": f"{root}/stage1", "stage2": f"{root}/stage2",
            "other": f"{root}/other"}


def micro(world, out, **changes) -> Config:
    parts = {k: v for k, v in world.items() if k not in ("stage2", "other")}
    settings = dict(dtype="float32", batch_size=4, max_steps=6, warmup_steps=2, lr=0.01, min_lr=0.001,
                    num_workers=0, log_interval=1, save_interval=2, eval_interval=100, device="cpu",
                    peak_tflops=1.0, out_dir=str(out))
    return Config(**parts | settings | changes)


def run(config: Config) -> list[dict]:
    """Train in this process; the lines of log.jsonl."""
    train.train(config, torch.device("cpu"))
    return [json.loads(line) for line in (Path(config.out_dir) / "log.jsonl").read_text().splitlines()]


def weights(out) -> dict:
    return load_file(Path(out) / "state.safetensors")


def same(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def command(config: Config, tmp_path, *options) -> list[str]:
    """The command line that runs `config` in a process of its own."""
    path = tmp_path / f"{Path(config.out_dir).name}.py"
    path.write_text("".join(f"{k} = {v!r}\n" for k, v in vars(config).items()))
    return [str(ROOT / "train.py"), str(path), *options]


def test_only_the_projection_learns(world, tmp_path):
    config = micro(world, tmp_path)
    model = train.build(config, torch.device("cpu"))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"proj.weight", "proj.bias"}
    before = {k: t.clone() for k, t in model.state_dict().items()}
    run(config)
    after = load_file(tmp_path / "proj.safetensors")
    assert not torch.equal(after["proj.weight"], before["proj.weight"])
    assert set(p.name for p in tmp_path.glob("*.safetensors")) == {"proj.safetensors", "state.safetensors"}


def test_the_loss_falls(world, tmp_path):
    log = run(micro(world, tmp_path, train=("proj", "llama"), max_steps=60, save_interval=60))
    assert sum(r["loss"] for r in log[-5:]) / 5 < log[0]["loss"] - 1


def test_every_part_can_learn_and_is_saved(world, tmp_path):
    config = micro(world, tmp_path, train=("vision", "qformer", "proj", "llama"), max_steps=2)
    run(config)
    saved = read_saved_config(str(tmp_path))
    assert all(str(tmp_path) in getattr(saved, part) for part in config.train)
    trained = MiniGPT4.from_files(saved.vision, saved.qformer, saved.llama, saved.proj, "float32")
    frozen = MiniGPT4.from_files(config.vision, config.qformer, config.llama, None, "float32")
    for part in ("vision", "qformer", "llama"):
        a, b = trained.part_parameters(part), frozen.part_parameters(part)
        assert all(not torch.equal(a[k], b[k]) for k in a if "k_proj" not in k and "key.bias" not in k), part


def test_a_run_can_go_on_from_stage_1_to_stage_2_by_its_folder(world, tmp_path):
    run(micro(world, tmp_path / "one"))
    stage2 = micro(world, tmp_path / "two", data=world["stage2"], proj=f"{tmp_path}/one/proj.safetensors",
                   template="vicuna", end_sym="###", max_txt_len=160, clean_captions=False, max_steps=2)
    run(stage2)
    saved = read_saved_config(str(tmp_path / "two"))
    assert Path(saved.proj).resolve() == (tmp_path / "two" / "proj.safetensors").resolve()
    assert Path(saved.llama).resolve() == Path(world["llama"]).resolve()


def test_accumulation_is_the_same_as_a_larger_batch(world, tmp_path):
    large = run(micro(world, tmp_path / "large", batch_size=8))
    small = run(micro(world, tmp_path / "small", batch_size=2, grad_accum=4))
    for a, b in zip(large, small):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    a, b = weights(tmp_path / "large"), weights(tmp_path / "small")
    torch.testing.assert_close(a["weight.proj.proj.weight"], b["weight.proj.proj.weight"], atol=2e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_training_is_near_float32(world, tmp_path, dtype):
    half = run(micro(world, tmp_path / "half", dtype=dtype))
    full = run(micro(world, tmp_path / "full"))
    assert all(a["loss"] == pytest.approx(b["loss"], rel=0.02) for a, b in zip(half, full))


def test_two_processes_give_the_curve_of_one(world, tmp_path):
    one = micro(world, tmp_path / "one", batch_size=8, max_steps=50, save_interval=50)
    two = replace(one, batch_size=4, out_dir=str(tmp_path / "two"))
    subprocess.run([sys.executable, *command(one, tmp_path)], check=True, env=ENV, capture_output=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                "--master-port", "29513"]
    subprocess.run([*torchrun, *command(two, tmp_path)], check=True, env=ENV, capture_output=True)
    curves = [[json.loads(line)["loss"] for line in (tmp_path / out / "log.jsonl").read_text().splitlines()]
              for out in ("one", "two")]
    assert len(curves[0]) == len(curves[1]) == 50
    assert max(abs(a - b) / a for a, b in zip(*curves)) < 1e-3


def test_a_run_killed_at_any_moment_ends_with_the_same_weights(world, tmp_path):
    unbroken = micro(world, tmp_path / "unbroken", max_steps=40, num_workers=1, save_interval=5)
    broken = replace(unbroken, out_dir=str(tmp_path / "broken"))
    subprocess.run([sys.executable, *command(unbroken, tmp_path)], check=True, env=ENV, capture_output=True)
    log = tmp_path / "broken" / "log.jsonl"
    for lines in (3, 13, 27):  # before the first checkpoint, and between others
        process = subprocess.Popen([sys.executable, *command(broken, tmp_path, "--resume=True")], env=ENV,
                                   stderr=subprocess.DEVNULL)
        while process.poll() is None and (not log.is_file() or len(log.read_text().splitlines()) < lines):
            time.sleep(0.002)
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    resume = command(broken, tmp_path, "--resume=True")
    subprocess.run([sys.executable, *resume], check=True, env=ENV, capture_output=True)
    same(weights(tmp_path / "broken"), weights(tmp_path / "unbroken"))
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, 41))


def test_a_kill_while_saving_leaves_the_last_checkpoint(world, tmp_path, monkeypatch):
    config = micro(world, tmp_path / "broken", max_steps=6, save_interval=3)
    replace_file, calls = os.replace, []

    def die_at_the_second_state(source, target):
        if str(target).endswith("state.safetensors"):
            calls.append(target)
            if len(calls) == 2:
                raise KeyboardInterrupt
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", die_at_the_second_state)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    monkeypatch.undo()
    run(replace(config, resume=True))
    run(replace(config, out_dir=str(tmp_path / "unbroken")))
    same(weights(tmp_path / "broken"), weights(tmp_path / "unbroken"))


def test_a_first_loss_of_mere_guessing_is_warned_of(world, tmp_path, capsys):
    run(micro(world, tmp_path / "random", max_steps=1))  # its language model is random
    assert "that of guessing among 600 tokens" in capsys.readouterr().err
    train.warn_of_chance(4.0, 600)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name", ["stage1", "stage2_llama2", "stage1_tinyllama"])
def test_a_dry_run_needs_no_weights_and_knows_the_official_sizes(name):
    config = load_config(str(ROOT / "configs" / f"{name}.py"), {"vision": "none", "llama": "none"})
    text = describe_training(config)
    assert re.search(r"vision +985,89\d,\d{3} ", text) and re.search(r"llama +6,738,415,616 ", text)
    assert "none is not here: official sizes are assumed" in text
    learn = "23,072,768" if "llama2" in name else "3,149,824"
    assert re.search(rf"all .* {learn}$", text, re.MULTILINE)


def test_a_dry_run_takes_the_language_model_s_sizes_from_its_config_json_alone(world, tmp_path):
    (tmp_path / "config.json").write_text((Path(world["llama"]) / "config.json").read_text())
    text = describe_training(micro(world, tmp_path / "out", llama=str(tmp_path)), world=2)
    count = sum(t.numel() for t in load_file(f"{world['llama']}/model.safetensors").values())
    assert re.search(rf"llama +{count:,} ", text) and "48 samples for 2 process" in text


def test_a_dry_run_counts_what_a_step_computes_and_keeps(world, tmp_path):
    """Its FLOPs are those that the counter sees in a real step over sequences of that length."""
    config = micro(world, tmp_path, template="vicuna", end_sym="###", max_txt_len=9, data=world["stage2"],
                   clean_captions=False)
    text = describe_training(config)
    model = train.build(config, torch.device("cpu"))
    length = int(re.search(r"at most (\d+)", text)[1])
    tokens = torch.full((4, length), 5)
    tokens[:, 1:5] = IMAGE
    targets = torch.full_like(tokens, IGNORE)
    targets[:, -9:] = 5
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # CPU's own is not counted
        model(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), tokens, targets).backward()
    said = float(re.search(r"([\d.e-]+) TFLOP", text)[1]) * 1e12
    assert said == pytest.approx(counter.get_total_flops(), rel=0.05)
    assert "epochs of the 24 in" in text


def test_an_earlier_run_is_never_overwritten(world, tmp_path):
    config = micro(world, tmp_path, max_steps=2)
    run(config)
    with pytest.raises(InputError, match="--resume=True"):
        run(config)
    (tmp_path / "state.safetensors").unlink()
    with pytest.raises(InputError, match="proj.safetensors.*--resume=True"):
        run(config)


def test_a_folder_of_something_else_is_not_made_a_run_s(world, tmp_path):
    shutil.copytree(world["llama"], tmp_path / "llama")
    with pytest.raises(InputError, match="config.json: unknown name"):
        run(micro(world, tmp_path / "llama"))
    assert (tmp_path / "llama/config.json").read_text() == (Path(world["llama"]) / "config.json").read_text()


@pytest.mark.parametrize("save_interval, words", [
    (8, "step 5: the loss is nan"), (4, "step 4: the weights have become infinite")])
def test_a_run_that_diverges_stops_and_keeps_its_last_checkpoint(world, tmp_path, save_interval, words):
    run(micro(world, tmp_path, max_steps=2))
    before = (tmp_path / "state.safetensors").read_bytes()
    with pytest.raises(InputError, match=words):
        run(micro(world, tmp_path, lr=1e30, min_lr=1e30, resume=True, save_interval=save_interval))
    assert (tmp_path / "state.safetensors").read_bytes() == before


def test_a_damaged_log_does_not_stop_a_resume(world, tmp_path):
    run(micro(world, tmp_path, max_steps=2))
    with open(tmp_path / "log.jsonl", "ab") as f:
        f.write(b'5\n[]\n{"a": 1}\n{"step": "x"}\n\xff\n{"st')
    log = run(micro(world, tmp_path, max_steps=4, resume=True))
    assert [line["step"] for line in log] == [1, 2, 3, 4]


def other_llama(world, root) -> str:
    """A language model of the same sizes as the world's, with other weights."""
    model = MiniGPT4.from_files("", "", world["llama"], train=("llama",))
    model.llama.norm.weight.data += 1
    model.save_part("llama", root / "other")
    return str(root / "other" / "llama")


def test_a_run_is_saved_before_its_first_step_changed_anything(world, tmp_path, monkeypatch):
    overflowing = partialmethod(torch.amp.GradScaler.__init__, init_scale=2.0**100)  # steps are skipped
    monkeypatch.setattr(torch.amp.GradScaler, "__init__", overflowing)
    run(micro(world, tmp_path, dtype="float16", max_steps=1))
    state = load_file(tmp_path / "state.safetensors")
    assert [v.item() for k, v in state.items() if k.startswith("step.")] == [0, 0]
    log = run(micro(world, tmp_path, dtype="float16", max_steps=3, resume=True))
    assert [r["step"] for r in log] == [1, 2, 3]


def test_heldout_data_without_a_good_sample_is_refused_at_the_start(world, tmp_path):
    (tmp_path / "own.jsonl").write_text(json.dumps({"image": "missing.jpg", "caption": "a star"}) + "\n")
    with pytest.raises(InputError, match="not one of its samples"):
        run(micro(world, tmp_path / "out", heldout_data=str(tmp_path / "own.jsonl")))
    assert not (tmp_path / "out").exists()


def test_a_run_behind_a_link_leads_to_its_parts(world, tmp_path):
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "far" / "away")
    run(micro(world, tmp_path / "out", max_steps=2))
    saved = read_saved_config(str(tmp_path / "out"))
    assert all(Path(getattr(saved, part)).exists() for part in ("vision", "qformer", "llama", "proj"))


def test_a_state_of_another_run_is_refused(world, tmp_path):
    run(micro(world, tmp_path, max_steps=2))
    before = (tmp_path / "config.json").read_text()
    for message, changed in (("other parts", {"train": ("proj", "qformer")}),
                             ("another dtype than float16", {"dtype": "float16"}),
                             ("now they are .42, 8, 1, 1.", {"data": {world["data"]: 1, world["stage2"]: 1}}),
                             ("now they are .7, 8, 1.0.", {"seed": 7}),
                             ("now they are .42, 2, 1.0.", {"shuffle_shards": 2}),
                             ("another llama", {"llama": other_llama(world, tmp_path)})):
        with pytest.raises(InputError, match=message):
            run(micro(world, tmp_path, max_steps=4, resume=True, **changed))
        assert (tmp_path / "config.json").read_text() == before
    run(micro(world, tmp_path, max_steps=4, resume=True, force=True, **changed))


def test_a_learning_language_model_keeps_the_projection_that_it_learnt_beside(world, tmp_path):
    """A frozen projection, random or from another run, goes into the run's folder, as its own."""
    run(micro(world, tmp_path / "one", train=("proj",), max_steps=2))
    for proj in ("", f"{tmp_path}/one/proj.safetensors"):
        out = tmp_path / f"two{bool(proj)}"
        config = micro(world, out, train=("llama",), proj=proj, max_steps=2)
        run(config)
        model, _ = chat.load(chat.Options(ckpt=str(out), device="cpu"))
        assert torch.equal(model.proj.weight, train.build(config, torch.device("cpu")).proj.weight)
    with pytest.raises(InputError, match="another proj"):
        run(micro(world, out, train=("llama",), proj="", seed=42, max_steps=4, resume=True))


def test_two_processes_wait_for_no_gradient_that_a_text_cannot_give(world, tmp_path):
    """Where texts are mixed with pictures, a batch may leave the projection out."""
    (tmp_path / "own.jsonl").write_text(json.dumps({"text": "a star"}) + "\n")
    mixed = {world["data"]: 1, str(tmp_path / "own.jsonl"): 1}
    one = micro(world, tmp_path / "one", data=mixed, train=("proj", "llama"), batch_size=8)
    run(one)
    two = replace(one, batch_size=4, out_dir=str(tmp_path / "two"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                "--master-port", "29514"]
    subprocess.run([*torchrun, *command(two, tmp_path)], check=True, env=ENV, capture_output=True)
    for k, v in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[k], v, rtol=0, atol=2e-3)


def test_a_folder_with_a_field_of_another_version_names_it(tmp_path):
    for content, words in (('{"bath_size": 3}', "unknown name 'bath_size'; did you mean batch_size"),
                           ("[]", "should hold a JSON object"), ("{", "not valid JSON")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(InputError, match=words):
            read_saved_config(str(tmp_path))


def test_long_answers_can_be_evaluated(world, tmp_path):
    log = run(micro(world, tmp_path, heldout_data=world["stage2"], max_txt_len=2048, max_steps=1))
    assert len(log) == 2


def test_heldout_loss_and_sample_answers_are_logged(world, tmp_path):
    log = run(micro(world, tmp_path, heldout_data=world["stage2"], eval_interval=3, eval_samples=10,
                    show_samples=1))
    rows = [r for r in log if "heldout_loss" in r]
    assert [r["step"] for r in rows] == [3, 6] and all(r["heldout_loss"] > 0 and r["samples"] for r in rows)


def test_missing_data_is_made_on_first_use(world, tmp_path):
    path = str(tmp_path / "data")
    config = micro(world, tmp_path / "out", data=path, max_steps=2,
                   prepare={path: f"{ROOT}/tools/make_scenes.py stage1 {path} --n=8"})
    run(config)
    assert Path(path, "00000.tar").is_file()
    shutil.rmtree(path)
    run(replace(config, data=world["data"], out_dir=str(tmp_path / "other")))
    assert not Path(path).exists()  # not used, not made


def test_missing_data_that_other_missing_data_is_made_from_is_made_too(tmp_path):
    text, tokenizer, make = tmp_path / "text", tmp_path / "tokenizer.model", f"{ROOT}/tools/make_scenes.py"
    prepare = {str(text): f"{make} text {text} --n=300",
               str(tokenizer): f"{make} tokenizer {tokenizer} --text={text}/chat.jsonl --vocab_size=500"}
    config = Config(llama="none", data=str(tmp_path), tokenizer=str(tokenizer), prepare=prepare)
    train.prepare_data(config, rank=0)
    assert tokenizer.is_file()
    shutil.rmtree(text)
    train.prepare_data(config, rank=0)
    assert not text.exists()  # what it was for is there


@pytest.mark.parametrize("name", sorted(
    p.stem for p in (ROOT / "configs").glob("*.py") if p.stem not in ("schema", "__init__")))
def test_every_config_is_valid(name):
    config = load_config(str(ROOT / "configs" / f"{name}.py"), {})
    assert config.llama and config.data and config.warmup_steps <= config.max_steps


@pytest.mark.parametrize("options, words", [
    ({"learning_rate": "1"}, "'learning_rate'"), ({"bath_size": "4"}, "did you mean batch_size"),
    ({"batch_size": "many"}, "batch_size = 'many' is not of type int"), ({"lr": "True"}, "lr = True"),
    ({"resume": "yes"}, "resume = 'yes' is not of type bool"), ({"train": "7"}, "train = 7"),
    ({"lr": "{[]: 1}"}, "lr = "), ({"out_dir": ""}, "out_dir = "), ({"end_sym": ""}, "end_sym = "),
    ({"train": "('proj', 'proj')"}, "train = "), ({"betas": "(0.9, 1.5)"}, "betas = "),
    ({"seed": str(2**70)}, "seed = "),
    ({"lr": "-1"}, "lr = -1.0: give at least 0"), ({"grad_clip": "nan"}, "grad_clip = ")])
def test_wrong_options_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        load_config(str(ROOT / "configs" / "stage1.py"), options)


@pytest.mark.parametrize("program", ["train.py", "chat.py", "data.py", "tools/convert.py"])
def test_help_tells_what_a_program_does(program):
    done = subprocess.run([sys.executable, program, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and f"python {program}" in done.stdout and not done.stderr


def test_options_are_parsed_as_their_type():
    config = load_config(str(ROOT / "configs" / "stage1.py"),
                         {"lr": "1", "resume": "True", "data": "{'a': 1}", "betas": "(0.5, 0.6)",
                          "out_dir": "7"})
    assert (config.lr, config.resume, config.data) == (1.0, True, {"a": 1})
    assert (config.betas, config.out_dir) == ((0.5, 0.6), "7")


@pytest.mark.parametrize("changes, words", [
    (dict(vision="nowhere.safetensors"), "nowhere.safetensors: there is no such weight file"),
    (dict(llama="nowhere"), "nowhere: not a LLaMA folder"),
    (dict(data="nowhere"), "data nowhere: no samples"),
    (dict(train=("head",)), "'head' is no part"),
])
def test_wrong_paths_and_parts_are_refused(world, tmp_path, changes, words):
    with pytest.raises(InputError, match=words):
        run(micro(world, tmp_path, **changes))


def test_a_projection_of_another_language_model_is_refused(world, tmp_path):
    other = MiniGPT4.from_files(world["vision"], world["qformer"], dict(
        hidden_size=16, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4),
        tokenizer=str(GOLDEN / "tokenizer" / "tokenizer.model"))
    other.save_part("proj", tmp_path)
    with pytest.raises(InputError, match="was trained with llama"):
        run(micro(world, tmp_path / "out", proj=f"{tmp_path}/proj.safetensors"))


@pytest.mark.parametrize("arguments", [
    ["train.py"], ["train.py", "configs/none.py"], ["train.py", "configs/stage1.py"],
    ["train.py", "configs/stage1.py", "--stpes=3"],
    ["chat.py", "none.jpg"], ["chat.py", "--ckpt=nowhere"], ["chat.py", "--prompt"],
])
def test_mistakes_give_one_line_and_status_2(arguments):
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=ENV, capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr


def test_twenty_photographs_and_a_jsonl_train_with_no_other_step(tmp_path):
    """As the README says, from the tiny weights: captions, and a conversation about two pictures."""
    lines = []
    for i in range(20):
        pixels = np.random.default_rng(i).integers(0, 255, (30 + i, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((400, 300)).save(tmp_path / f"IMG_{i}.JPG")
        lines.append({"image": f"IMG_{i}.JPG", "caption": f"Our garden, number {i}."})
    talk = [{"user": "What changed?"}, {"assistant": "The cat left."}]
    lines.append({"image": ["IMG_0.JPG", "IMG_1.JPG"], "conversation": talk})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--max_steps=6", "--warmup_steps=1", "--log_interval=1", f"--out_dir={tmp_path}/out"]
    done = subprocess.run([sys.executable, "train.py", "configs/finetune_own.py",
                           f"--data={tmp_path}/data.jsonl", *options], cwd=ROOT, capture_output=True,
                           text=True)
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6] and not any("skipped" in row for row in log)
    before = load_file(ROOT / "assets/tiny/proj.safetensors")
    after = load_file(tmp_path / "out/proj.safetensors")
    assert not torch.equal(before["proj.weight"], after["proj.weight"])
