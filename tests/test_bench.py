"""tools/bench.py runs, and its last line is what DESIGN promises.

Nothing here looks at a speed.
"""

import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from model import MiniGPT4
from tools.bench import TOKENIZER, WAYS, gguf_file

pytestmark = pytest.mark.slow  # each starts processes

ROOT = Path(__file__).resolve().parent.parent


def start(*arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "tools/bench.py", *arguments],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A function of a benchmark's name: the rows that it prints last.

    All benchmarks run side by side. What is left of them in the end is killed.
    """
    options = {
        "chat": ["--size=small"],
        "data": ["--steps=1"],
        "train": ["--size=small", "--steps=1", "--batch_size=2"],
    }
    running = {}
    for name, own in options.items():
        folder = tmp_path_factory.mktemp(name)
        common = ("--rounds=1", "--device=cpu", f"--folder={folder}")
        running[name] = start(name, *own, *common)

    def rows(name: str) -> list[dict]:
        out, err = running[name].communicate(timeout=600)
        assert running[name].returncode == 0, err
        result = json.loads(out.splitlines()[-1])
        assert result["bench"] == name and result["device"] == "cpu"
        for row in result["rows"]:
            check_row(row)
        return result["rows"]

    yield rows
    for process in running.values():
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def check_row(row: dict):
    """Each other side has a rate above 0, and how much faster ours is."""
    others = [side for side in ("peer", "limit", "llamacpp") if side in row]
    assert row["ours"] > 0 and "peer" in others
    for side in others:
        assert row[side] > 0
        ratio = row["ours"] / row[side]
        assert row[f"vs_{side}"] == pytest.approx(ratio, rel=1e-3, abs=1e-4)


def test_chat_beside_transformers_and_llamacpp(bench):
    rows = bench("chat")
    expected = {
        "first word": ("1/s", "transformers InstructBLIP"),
        "second turn": ("1/s", "its first turn"),
        "batch 8": ("pictures/min", "one at a time"),
        "int8 batch 8": ("pictures/min", "one at a time"),
    }
    for way in WAYS:
        name = way.replace("loat", "")
        expected[f"{name} decode"] = ("tokens/s", "transformers bf16")
        expected[f"{name} prompt"] = ("1/s", "transformers bf16")
    found = {}
    for row in rows:
        name = row["name"].removeprefix("small ")
        found[name] = (row["unit"], row["peer_name"])
    assert found == expected
    has_llamacpp = find_spec("llama_cpp") and find_spec("gguf")
    for row in rows:
        assert min(row["peak_mib"], row["peer_peak_mib"]) > 0
        assert ("limit" in row) == row["name"].endswith(("word", "decode"))
        is_llama_alone = row["name"].endswith(("decode", "prompt"))
        assert ("llamacpp" in row) == bool(has_llamacpp and is_llama_alone)


@pytest.mark.parametrize(
    "kind, least", [("BF16", 0.999), ("Q8_0", 0.995), ("Q4_0", 0.85)]
)
def test_llamacpp_has_the_same_weights(tmp_path, kind, least):
    llama_cpp = pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    llama = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    torch.manual_seed(0)
    model = MiniGPT4.from_files(
        None, None, llama, dtype="float32", tokenizer=TOKENIZER.path
    )
    model.save_part("llama", str(tmp_path))
    file = gguf_file(tmp_path / "llama", kind)
    peer = llama_cpp.Llama(str(file), logits_all=True, n_threads=1, verbose=False)
    tokens = list(range(300, 340))
    peer.eval(tokens)
    with torch.no_grad():
        hidden = model.llama(model.embed(torch.tensor([tokens]), None))
        logits = model.llama.logits(hidden)[0]
    scores = torch.tensor(peer.scores[:40])
    assert torch.cosine_similarity(logits, scores, dim=1).mean() > least


def test_train_beside_transformers_with_the_same_loss(bench):
    eager, compiled, checkpointed = bench("train")
    assert eager["name"] == "small bf16 b2" and compiled["name"].endswith("compiled")
    for row in (eager, compiled, checkpointed):
        assert row["loss"] == pytest.approx(row["peer_loss"], abs=0.01)
        assert min(row["peak_mib"], row["peer_peak_mib"]) > 0


def test_data_beside_webdataset(bench):
    pytest.importorskip("webdataset")
    small, large = bench("data")
    assert small["name"] == "224x224 w2" and large["name"] == "640x480 w2"


def test_a_started_process_reports_its_own_peak_memory():
    """Linux keeps ru_maxrss over exec: a small process reported its parent's peak."""
    program = (
        "import subprocess, sys\n"
        "from plumbing.processes import peak_mib\n"
        "if sys.argv[1:]:\n"
        "    block = b'1' * (600 << 20)\n"
        "    subprocess.run([sys.executable, '-c', sys.argv[1]])\n"
        "print(peak_mib('cpu'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, program],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=120,
    )
    child, parent = map(float, done.stdout.split())
    assert child < 600 < parent


@pytest.mark.parametrize(
    "arguments, hint",
    [
        pytest.param(["trian"], "train", id="benchmark"),
        pytest.param(["train", "--size=smal"], "small", id="size"),
        pytest.param(["chat", "--rounds=0"], "at least 1", id="rounds"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments, hint):
    program = start(*arguments)
    _, err = program.communicate(timeout=60)
    assert program.returncode == 2 and hint in err and err.count("\n") == 1
