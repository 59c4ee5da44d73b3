"""Train the tiny world while a seeded script kills, stops and damages the run: the result is the quiet one's.

    python tests/chaos.py --minutes=20 [--seed=0]

A quiet run comes first. Then the same run is started again and again, and each start meets one fault. In the
end the weights and the optimizer's state must be equal bit for bit, and the log must hold each step once: no
sample was lost, none came twice. Not part of the test suite.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from plumbing.console import InputError, run_main
from plumbing.options import option, override, parse_args

STEPS_PER_MINUTE = 200  # of the whole test; a third of it is the quiet run


@dataclass(frozen=True)
class Options:
    minutes: float = option(20.0, "about as long as the test takes")
    seed: int = option(0, "of the faults")
    processes: int = option(
        1, "of each run; the sums of several are rounded in another way", least=1
    )
    folder: str = option("out/chaos", "for the two runs; emptied first")


def command(out: Path, steps: int, processes: int) -> list[str]:
    """The training run, on one or several processes."""
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        "train.py",
    ]
    return [
        sys.executable,
        *(launcher if processes > 1 else ["train.py"]),
        "configs/tiny_stage1.py",
        "--resume",
        f"--out_dir={out}",
        f"--max_steps={steps}",
        f"--batch_size={8 // processes}",
        "--num_workers=1",
        "--log_interval=1",
        "--save_interval=10",
        f"--eval_interval={steps}",
        "--show_samples=0",
    ]


def start(out: Path, steps: int, processes: int) -> subprocess.Popen:
    """The run in the background."""
    return subprocess.Popen(
        command(out, steps, processes),
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def rows(out: Path) -> list[dict]:
    """The rows of a run's log that tell a training step; a cut last line is none."""
    found = []
    for line in (
        (out / "log.jsonl").read_text().splitlines()
        if (out / "log.jsonl").exists()
        else ()
    ):
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in found if "loss" in row]


def children(pid: int) -> list[int]:
    """The processes below a process."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    direct = [int(child) for child in path.read_text().split()] if path.exists() else []
    return direct + [below for child in direct for below in children(child)]


def damage(path: Path, rng: random.Random, cut: bool):
    """Flip a bit of a file, or cut off its end."""
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content[:place] if cut else content)


FAULTS = (
    "SIGKILL",
    "SIGTERM",
    "SIGUSR1",
    "SIGINT",
    "all SIGTERM",
    "SIGSTOP",
    "killed worker",
    "flipped bit",
    "cut state",
    "half a row",
    "full disk",
    "leftover",
)


def meet(fault: str, out: Path, steps: int, processes: int, rng: random.Random):
    """Start the run, or go on with it, let it meet the fault, and see it end."""
    state, old = out / "state.pt", out / "state.old.pt"
    if fault in ("flipped bit", "cut state") and state.exists() and old.exists():
        damage(state, rng, fault == "cut state")
    elif fault == "half a row" and (out / "log.jsonl").exists():
        (out / "log.jsonl").open("ab").write(b'{"step": 99, "lo')
    elif fault == "leftover":
        (out / ".state.pt.tmp").write_bytes(b"half a file")
    run = start(out, steps, processes)
    before, end = len(rows(out)), time.time() + 60
    wanted = before + rng.randrange(2, 40)
    while run.poll() is None and len(rows(out)) < wanted and time.time() < end:
        time.sleep(0.01)
    below = children(run.pid)
    if run.poll() is None and fault.startswith("SIG") and fault != "SIGSTOP":
        os.kill(run.pid, getattr(signal, fault))
    elif fault == "all SIGTERM" and run.poll() is None:
        os.killpg(run.pid, signal.SIGTERM)
    elif fault == "full disk" and run.poll() is None:  # no file can grow beyond 20 kB
        resource.prlimit(
            run.pid, resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY)
        )
        time.sleep(2)
    elif fault == "SIGSTOP":
        os.kill(run.pid, signal.SIGSTOP)
        time.sleep(rng.random())
        os.kill(run.pid, signal.SIGCONT)
        time.sleep(1)
    elif fault == "killed worker" and below:
        os.kill(below[-1], signal.SIGKILL)
        time.sleep(1)
    try:
        said = run.communicate(timeout=15 if fault in FAULTS[1:5] else 1)[1]
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        said = run.communicate()[1]
    for pid in below:
        if Path(f"/proc/{pid}").exists():
            os.kill(pid, signal.SIGKILL)
    if (
        "Traceback" in said
        and "torch.distributed" not in said
        and run.returncode != -signal.SIGKILL
    ):
        raise AssertionError(f"{fault}: a traceback\n{said[-6000:]}")


def tensors(out: Path) -> list[torch.Tensor]:
    """The trained parameters and AdamW's moments of a run's state."""
    state = torch.load(out / "state.pt", weights_only=True)
    moments = [
        t for each in state["optimizer"]["state"].values() for t in each.values()
    ]
    return [*state["parameters"].values(), *moments]


def main(argv: list[str]):
    o = override(Options(), parse_args(argv, __doc__, "", Options)[1])
    folder, steps, rng = (
        Path(o.folder).resolve(),
        int(o.minutes * STEPS_PER_MINUTE),
        random.Random(o.seed),
    )
    shutil.rmtree(folder, ignore_errors=True)
    quiet, chaos, met = folder / "quiet", folder / "chaos", Counter()
    chaos.mkdir(parents=True)
    if subprocess.run(
        command(quiet, steps, o.processes), cwd=ROOT, capture_output=True
    ).returncode:
        raise InputError("the quiet run failed")
    with tqdm(total=steps, unit="step", desc="chaos") as bar:
        while (n := len(rows(chaos))) < steps:
            fault = rng.choice(FAULTS)
            meet(fault, chaos, steps, o.processes, rng)
            met[fault] += 1
            bar.update(max(0, len(rows(chaos)) - bar.n))
    subprocess.run(
        command(chaos, steps, o.processes), cwd=ROOT, capture_output=True
    )  # its end may be cut
    seen = Counter(row["step"] for row in rows(chaos))
    lost, repeated = steps - len(seen), sum(n - 1 for n in seen.values())
    same = all(map(torch.equal, tensors(quiet), tensors(chaos)))
    print(
        f"{met.total()} faults met: {', '.join(f'{fault} {n}' for fault, n in met.most_common())}\n"
        f"{steps} steps of 8 samples: {lost} lost, {repeated} repeated; weights and moments are "
        f"{'equal bit for bit' if same else 'NOT EQUAL'} to the quiet run's"
    )
    if lost or repeated or not same:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
