"""The diffs of docs/changes/ apply, train, save, load and chat."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.common import EXAMPLE, ROOT
from tests.runs import ENV, losses, read_log

pytestmark = pytest.mark.slow
STEPS = 20
CHANGES = sorted(path.stem for path in ROOT.glob("docs/changes/*.diff"))
OPTIONS = {  # of train.py
    "mlp-projection": ["--proj="],
    "chat-template": ["--template=vicuna1.1"],
    "lora": ['--lora={"rank": 4}', "--trainable=proj,lora"],
    "siglip": ["--vision=siglip.safetensors", "--qformer=", "--proj="],
}
CONFIGS = {"train-the-qformer": "finetune_qformer"}
LEFT_OUT = shutil.ignore_patterns(
    ".git", "out", "data", "weights", "golden", "__pycache__", ".*_cache"
)


@pytest.fixture
def copy(tmp_path):
    """A checkout in which a change can be made, with 20 pictures to train on."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
    row = {"image": EXAMPLE, "caption": "A red star and a yellow ring."}
    (folder / "own.jsonl").write_text(20 * f"{json.dumps(row)}\n")
    return folder


def run(folder, *command):
    """The output of a command in the copy."""
    environment = ENV | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    environment["PYTHONPATH"] = str(folder)
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def apply(folder, change):
    run(folder, "git", "apply", f"{ROOT}/docs/changes/{change}.diff")


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_applies_trains_and_chats(copy, change):
    if change == "tensorboard":
        pytest.importorskip("tensorboard")
    apply(copy, change)
    if change == "siglip":
        make_siglip(copy)
    run(
        copy,
        sys.executable,
        "train.py",
        f"configs/{CONFIGS.get(change, 'finetune_own')}.py",
        "--data=own.jsonl",
        f"--max_steps={STEPS}",
        "--log_interval=1",
        "--warmup_steps=2",
        "--lr=1e-3",
        "--min_lr=1e-4",
        "--num_workers=0",
        "--device=cpu",
        "--out_dir=run",
        *OPTIONS.get(change, []),
    )
    rows = read_log(copy / "run")
    assert len(losses(rows)) == STEPS and losses(rows)[-1] < losses(rows)[0]
    question = "--prompt=Describe this image in detail."
    chat = (sys.executable, "chat.py", EXAMPLE, "--ckpt=run", "--device=cpu", question)
    assert run(copy, *chat).strip()
    check = CHECKS.get(change)
    if check:
        check(copy, rows)


def check_mlp(copy, rows):
    assert "proj.2.weight" in load_file(copy / "run/proj.safetensors")


def check_template(copy, rows):
    config = json.loads((copy / "run/config.json").read_text())
    assert config["template"] == "vicuna1.1"


def check_lora(copy, rows):
    """up was zero, and has learned; the part's file has no weights of LLaMA."""
    tensors = load_file(copy / "run/lora.safetensors")
    assert all(name.endswith(("down.weight", "up.weight")) for name in tensors)
    assert all(t.any() for name, t in tensors.items() if "up" in name)


def check_events(copy, rows):
    assert list((copy / "run").glob("events.out.tfevents*"))


def check_schedule(copy, rows):
    rates = [row["lr"] for row in rows if "loss" in row]
    assert rates[3] == rates[STEPS // 2] == max(rates) and rates[-1] < 0.8 * rates[3]


def check_qformer(copy, rows):
    before = load_file(ROOT / "assets/tiny/qformer.safetensors")
    after = load_file(copy / "run/qformer.safetensors")
    assert not torch.equal(before["query_tokens"], after["query_tokens"])


def check_layers(copy, rows):
    """The last layer may hold anything."""
    code = (
        "import torch; from qformer import *\n"
        "torch.manual_seed(0)\n"
        "bridge = QFormer(QFormerConfig(2, 8, 4, 1, 8, 8))\n"
        "image = torch.randn(1, 3, 8); y = bridge(image)\n"
        "torch.nn.init.normal_(bridge.layers[3].fc1.weight)\n"
        "assert torch.equal(bridge(image), y)\n"
    )
    run(copy, sys.executable, "-c", code)


CHECKS = {
    "mlp-projection": check_mlp,
    "chat-template": check_template,
    "lora": check_lora,
    "tensorboard": check_events,
    "learning-rate": check_schedule,
    "train-the-qformer": check_qformer,
    "fewer-layers": check_layers,
}


def make_siglip(copy):
    """A small random SigLIP of transformers, converted; its features are equal."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "image_size": 64,
        "patch_size": 8,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = transformers.SiglipVisionConfig(**sizes)
    theirs = transformers.SiglipVisionModel(config).eval()
    theirs.save_pretrained(copy / "hub")
    run(copy, sys.executable, "siglip.py", "hub", "siglip.safetensors")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        want = theirs(pixel_values=images).last_hidden_state
    torch.save({"images": images, "want": want}, copy / "features.pt")
    code = (
        "import json, torch; from safetensors import safe_open\n"
        "from siglip import *\n"
        "with safe_open('siglip.safetensors', 'pt') as file:\n"
        "    sizes = json.loads(file.metadata()['config'])\n"
        "tower = SiglipTower(SiglipConfig(**sizes))\n"
        "tower.load_state_dict(load_file('siglip.safetensors'))\n"
        "saved = torch.load('features.pt')\n"
        "assert torch.allclose(tower(saved['images']), saved['want'], atol=1e-5)\n"
    )
    run(copy, sys.executable, "-c", code)


def test_each_change_has_its_paragraph():
    text = (ROOT / "docs/changes/README.md").read_text()
    assert len(CHANGES) == 8
    for change in CHANGES:
        assert f"**[{change}.diff]({change}.diff)**" in text
    assert CHECKS.keys() | {"siglip"} == set(CHANGES)
