"""Fixtures of several tests; and how many cases hypothesis tries.

Some hundreds per property, or by HYPOTHESIS_PROFILE=nightly 200,000."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from model import MiniGPT4
from tests.common import GOLDEN
from tests.families import CONTROLS, write_tokenizer
from tests.runs import Run
from tools import make_scenes

settings.register_profile("default", max_examples=300, deadline=None)
settings.register_profile("nightly", max_examples=200_000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def seed():
    """Tests draw the same random numbers in any order."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def signals():
    """Training in this process catches them."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers):
        signal.signal(number, handler)


@pytest.fixture
def start():
    """A function that starts a run in the background; what is left of it is killed."""
    runs = []

    def call(config, processes=1) -> Run:
        runs.append(Run(config, processes))
        return runs[-1]

    yield call
    for run in runs:
        if run.process.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.process.wait()


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> dict:
    """The paths of a micro model with random weights, and of data for it."""
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


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """{family: a folder with its tokenizer.json}."""
    root = tmp_path_factory.mktemp("tokenizers")
    for family in CONTROLS:
        write_tokenizer(root / family, family)
    return {family: root / family for family in CONTROLS}
