"""tools/bench.py runs, and its last line is what DESIGN promises. Nothing here looks at a speed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def bench(*arguments) -> dict:
    """The JSON object that the benchmark prints last."""
    done = subprocess.run([sys.executable, "tools/bench.py", *arguments], cwd=ROOT, capture_output=True,
                          text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_chat_beside_transformers(tmp_path):
    result = bench("chat", "--size=small", "--runs=1", f"--folder={tmp_path}")
    row, = result["rows"]
    assert result["bench"] == "chat" and min(row["vs_peer"], row["peak_mib"], row["peer_peak_mib"]) > 0


def test_train_beside_transformers_with_the_same_loss(tmp_path):
    result = bench("train", "--size=small", "--steps=2", "--rounds=1", f"--folder={tmp_path}")
    eager, compiled = result["rows"]
    assert result["bench"] == "train" and compiled["name"].endswith("compiled")
    for row in (eager, compiled):
        assert row["loss"] == pytest.approx(row["peer_loss"], abs=0.01)
        assert min(row["ours"], row["peer"], row["limit"], row["peak_mib"], row["peer_peak_mib"]) > 0


def test_data_beside_webdataset(tmp_path):
    pytest.importorskip("webdataset")
    result = bench("data", "--pictures=24", "--samples=16", "--runs=1", "--batch_size=4",
                   "--memory_samples=200", f"--folder={tmp_path}")
    small, large = result["rows"]
    assert result["bench"] == "data" and "rss_growth_percent" in small and small["memory_samples"] >= 200
    for row in (small, large):
        assert min(row[k] for k in ("ours", "peer", "uint8_peer", "limit", "ours_cpu_ms")) >= 0
        assert row["vs_peer"] == pytest.approx(row["ours"] / row["peer"], rel=1e-3)
