"""tools/bench.py runs, and its last line is what DESIGN promises. Nothing here looks at a speed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run_bench(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/bench.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


def bench(folder, *arguments) -> list[dict]:
    """The rows that the benchmark prints last."""
    done = run_bench(*arguments, "--rounds=1", f"--folder={folder}", "--device=cpu")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["bench"] == arguments[0] and result["device"] == "cpu"
    for row in result["rows"]:
        assert min(row[k] for k in ("ours", "peer", "limit")) > 0
        assert row["vs_peer"] == pytest.approx(row["ours"] / row["peer"], rel=1e-3, abs=1e-4)
        assert row["vs_limit"] == pytest.approx(row["ours"] / row["limit"], rel=1e-3, abs=1e-4)
    return result["rows"]


def test_chat_beside_transformers(tmp_path):
    row, = bench(tmp_path, "chat", "--size=small")
    assert row["unit"] == "1/s" and row["peer_name"] == "transformers InstructBLIP"
    assert min(row["vs_peer"], row["peak_mib"], row["peer_peak_mib"]) > 0


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
