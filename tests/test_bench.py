"""tools/bench.py runs, and its last line is what DESIGN promises. Nothing here looks at a speed."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from model import MiniGPT4
from tools.bench import TOKENIZER, WAYS, gguf_file

ROOT = Path(__file__).resolve().parent.parent

def run_bench(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/bench.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})

def bench(folder, *arguments) -> list[dict]:
    """The rows that the benchmark prints last."""
    done = run_bench(*arguments, "--rounds=1", f"--folder={folder}", "--device=cpu")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["bench"] == arguments[0] and result["device"] == "cpu"
    for row in result["rows"]:
        others = [k for k in ("peer", "limit", "llamacpp") if k in row]
        assert row["ours"] > 0 and "peer" in others
        for k in others:
            assert row[k] > 0 and row[f"vs_{k}"] == pytest.approx(row["ours"] / row[k], rel=1e-3, abs=1e-4)
    return result["rows"]

def test_chat_beside_transformers_and_llamacpp(tmp_path):
    rows = bench(tmp_path, "chat", "--size=small")
    assert {row["name"].removeprefix("small "): (row["unit"], row["peer_name"]) for row in rows} == {
        "first word": ("1/s", "transformers InstructBLIP"),
        **{f"{way.replace('loat', '')} decode": ("tokens/s", "transformers bf16") for way in WAYS},
        **{f"{way} prompt": ("1/s", "transformers bf16") for way in ("bf16", "int8", "int4")},
        "second turn": ("1/s", "its first turn"),
        "batch 8": ("pictures/min", "one at a time"), "int8 batch 8": ("pictures/min", "one at a time")}
    has_llamacpp = bool(find_spec("llama_cpp") and find_spec("gguf"))
    for row in rows:
        assert min(row["peak_mib"], row["peer_peak_mib"]) > 0
        assert ("limit" in row) == row["name"].endswith("word")
        assert ("llamacpp" in row) == (has_llamacpp and row["name"].endswith(("decode", "prompt")))

@pytest.mark.parametrize("kind, least", [("BF16", 0.999), ("Q8_0", 0.995), ("Q4_0", 0.85)])
def test_llamacpp_has_the_same_weights(tmp_path, kind, least):
    llama_cpp, _ = pytest.importorskip("llama_cpp"), pytest.importorskip("gguf")
    llama = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = MiniGPT4.from_files(None, None, llama, dtype="float32", tokenizer=TOKENIZER.path)
    model.save_part("llama", str(tmp_path))
    file = gguf_file(tmp_path / "llama", kind)
    peer = llama_cpp.Llama(str(file), logits_all=True, n_threads=1, verbose=False)
    tokens = list(range(300, 340))
    peer.eval(tokens)
    with torch.no_grad():
        logits = model.llama.logits(model.llama(model.embed(torch.tensor([tokens]), None)))[0]
    assert torch.cosine_similarity(logits, torch.tensor(peer.scores[:40]), dim=1).mean() > least

def test_train_beside_transformers_with_the_same_loss(tmp_path):
    eager, compiled, checkpointed = bench(tmp_path, "train", "--size=small", "--steps=1", "--batch_size=2")
    assert eager["name"] == "small bf16 b2" and compiled["name"].endswith("compiled")
    for row in (eager, compiled, checkpointed):
        assert row["loss"] == pytest.approx(row["peer_loss"], abs=0.01)
        assert min(row["peak_mib"], row["peer_peak_mib"]) > 0

def test_data_beside_webdataset(tmp_path):
    pytest.importorskip("webdataset")
    small, large = bench(tmp_path, "data", "--steps=1")
    assert small["name"] == "224x224 w2" and large["name"] == "640x480 w2"

@pytest.mark.parametrize("arguments, hint", [(["trian"], "train"), (["train", "--size=smal"], "small"),
                                             (["chat", "--rounds=0"], "at least 1")])
def test_a_wrong_argument_is_one_line(arguments, hint):
    done = run_bench(*arguments)
    assert done.returncode == 2 and hint in done.stderr and done.stderr.count("\n") == 1
