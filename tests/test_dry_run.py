"""tools/dry_run.py: what a run will need."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from configs.prompts import IMAGE
from configs.schema import load_config
from llama import IGNORE
from plumbing.console import InputError
from tests.common import ROOT, readable
from tools import dry_run
from tools.get_weights import RECIPES


@pytest.fixture
def config_path(world, tmp_path) -> Path:
    """A config file of the micro model and its stage-2 data."""
    parts = {part: world[part] for part in ("vision", "qformer", "llama")}
    settings = dict(
        data=world["stage2"],
        template="vicuna",
        max_txt_len=9,
        dtype="float32",
        batch_size=4,
        max_steps=6,
        warmup_steps=2,
    )
    path = tmp_path / "config.py"
    lines = [f"{k} = {v!r}\n" for k, v in (parts | settings).items()]
    path.write_text("".join(lines))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stage1", "stage2_llama2", "stage1_smollm2"])
def test_a_dry_run_needs_no_weights_and_knows_the_official_sizes(name, capsys):
    dry_run.main(
        [str(ROOT / "configs" / f"{name}.py"), "--vision=none", "--llama=none"]
    )
    text = capsys.readouterr().out
    assert re.search(r"vision +985,89\d,\d{3} ", text) and re.search(
        r"llama +6,738,415,616 ", text
    )
    assert "none is missing; official sizes are assumed" in text
    trainable = "23,072,768" if "llama2" in name else "3,149,824"
    assert re.search(rf"all .* {trainable} ", text)


@pytest.mark.slow
def test_a_dry_run_knows_the_sizes_of_the_models_that_get_weights_fetches(capsys):
    parameters = {
        "vicuna-13b": 13_015_864_320,
        "tinyllama": 1_100_048_384,
        "smollm2-135m": 134_515_008,
        "smollm2-360m": 361_821_120,
        "smollm2-1.7b": 1_711_376_384,
        "llama3.2-1b": 1_235_814_400,
    }
    names = RECIPES.keys() - {"vicuna-7b", "llama2-7b"}
    assert names == dry_run.LLAMA.keys() >= parameters.keys()
    for name, count in parameters.items():
        path = str(ROOT / "configs/stage1_smollm2.py")
        dry_run.main([path, f"--llama=missing/{name}"])
        text = capsys.readouterr().out
        assert f"({name})" in text and re.search(rf"llama +{count:,} ", text)


def test_a_dry_run_takes_the_language_model_s_sizes_from_its_config_json_alone(
    world, config_path, tmp_path, capsys
):
    (tmp_path / "config.json").write_text(
        Path(world["llama"], "config.json").read_text()
    )
    dry_run.main([str(config_path), f"--llama={tmp_path}", "--world=2"])
    text = capsys.readouterr().out
    count = sum(
        t.numel() for t in load_file(Path(world["llama"], "model.safetensors")).values()
    )
    assert re.search(rf"llama +{count:,} ", text) and "48 with 2 process" in text


def test_a_dry_run_counts_what_a_step_computes(config_path, capsys):
    """PyTorch's counter sees the same in a step over sequences of that length."""
    dry_run.main([str(config_path)])
    text = capsys.readouterr().out
    model = train.build(load_config(str(config_path), {}), torch.device("cpu"))
    length = int(re.search(r"at most (\d+)", text)[1])
    tokens = torch.full((4, length), 5)
    tokens[:, 1:5] = IMAGE
    targets = torch.full_like(tokens, IGNORE)
    targets[:, -9:] = 5
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):  # CPU's own is not counted
        model(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), tokens, targets).backward()
    said = float(re.search(r"([\d.e-]+) TFLOP", text)[1]) * 1e12
    assert said == pytest.approx(counter.get_total_flops(), rel=0.05)
    assert "epochs                1.00 of the 24 in" in text


def test_what_cached_features_recomputed_activations_and_sharding_save(
    config_path, capsys
):
    said = {}
    for options in ("", "--cache_features", "--grad_checkpoint", "--shard --world=2"):
        dry_run.main([str(config_path), *options.split()])
        text = capsys.readouterr().out
        said[options] = [
            float(re.search(rf"([\d.e-]+) {what}", text)[1])
            for what in ("TFLOP", "weights", "activations")
        ]
    flops, weights, activations = zip(*said.values())
    assert flops[1] < flops[0] < flops[2] and activations[2] < activations[0]
    assert weights[1] < weights[0] and weights[3] < weights[0]


def test_a_dry_run_of_a_run_s_folder_says_what_chat_needs(capsys):
    dry_run.main([str(ROOT / "assets/tiny"), "--dtype=bfloat16"])
    text = capsys.readouterr().out
    assert (
        re.search(r"proj +16,512 +0 ", text) and "keys and values of 300 tokens" in text
    )
    assert "FLOPs" not in text and "missing" not in text


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "usage"),
        (["nowhere.py"], "nowhere.py"),
        (["configs"], "no config.json"),
        (["configs/stage1.py", "--wrld=2"], "did you mean world"),
        (["configs/stage1.py", "--llama="], "llama: no language model is given"),
    ],
    ids=readable,
)
def test_a_wrong_command_is_one_line(argv, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError, match=words) as error:
        dry_run.main(argv)
    assert "\n" not in str(error.value)
