"""Speed and memory beside what one would use instead, both measured in one run.

    python tools/bench.py data     reading tar shards, beside the webdataset library
    python tools/bench.py train    a training step, beside the same step of transformers' BLIP-2
    python tools/bench.py chat     until the first word about a picture, beside transformers' InstructBLIP

Each has options of its own, described in tools/bench_data.py and so on, and needs the package of its peer.
The last line printed is one JSON object: for each row what was measured of ours (higher is better), of the
peer, and of the limit.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configs.schema import InputError, override, parse_args, run_main
from tools import bench_chat, bench_data, bench_train

BENCHES = {"data": bench_data, "train": bench_train, "chat": bench_chat}


def main(argv: list[str]):
    positional, given = parse_args(argv)
    if len(positional) != 1 or positional[0] not in BENCHES:
        raise InputError(f"usage: python tools/bench.py {'|'.join(BENCHES)} [--key=value ...]")
    module = BENCHES[positional[0]]
    rows = module.bench(override(module.Options(), given))
    rows = [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    print(json.dumps({"bench": positional[0], "device": "cpu", "rows": rows}))


if __name__ == "__main__":
    run_main(main)
