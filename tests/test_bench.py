"""tools/bench.py runs, and its last line is what DESIGN promises. Nothing here looks at a speed."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_chat_beside_transformers(tmp_path):
    done = subprocess.run([sys.executable, "tools/bench.py", "chat", "--size=small", "--runs=1",
                           f"--folder={tmp_path}"], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    row, = result["rows"]
    assert result["bench"] == "chat" and row["vs_peer"] > 0 and row["peak_mib"] > 0 and row["peer_peak_mib"] > 0
