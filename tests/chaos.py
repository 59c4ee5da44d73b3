"""Train the tiny world while a seeded script kills, stops and damages the run.

    python tests/chaos.py --minutes=20 [--seed=0]

A quiet run comes first. Then the same run is started again and again, and each start
meets one fault. At the end, weights and optimizer state must be bit-identical to the
quiet run's, and the log must hold each step once: no sample was lost or repeated.
Not part of the test suite.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plumbing.console import InputError, run_main
from plumbing.options import option, override, parse_args

ROOT = Path(__file__).resolve().parent.parent
STEPS_PER_MINUTE = 200  # of the whole test; a third of it is the quiet run
SIGNALS = ("SIGKILL", "SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP")
FAULTS = (
    *SIGNALS,
    "all SIGTERM",
    "SIGSTOP",
    "killed worker",
    "flipped bit",
    "cut state",
    "half a row",
    "full disk",
    "leftover",
)
SAVING = (
    "SIGTERM",
    "SIGUSR1",
    "SIGINT",
    "SIGHUP",
    "all SIGTERM",
)  # end a run after its step


@dataclass(frozen=True)
class Options:
    minutes: float = option(20.0, "about as long as the test takes")
    seed: int = option(0, "of the faults")
    processes: int = option(
        1, "of each run; the sums of several are rounded in another way", least=1
    )
    folder: str = option("out/chaos", "for the two runs; emptied first")


# ---- runs ----------------------------------------------------------------------------


def command(out: Path, steps: int, processes: int) -> list[str]:
    """The training run, in one or several processes."""
    launcher = []
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc-per-node={processes}"]
    return [
        sys.executable,
        *launcher,
        "train.py",
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
    log = out / "log.jsonl"
    if not log.exists():
        return []
    found = []
    for line in log.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if "loss" in row:
            found.append(row)
    return found


def children(pid: int) -> list[int]:
    """The processes below a process."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    if not path.exists():
        return []
    direct = [int(child) for child in path.read_text().split()]
    below = [children(child) for child in direct]
    return sum(below, direct)


def tensors(out: Path) -> list[torch.Tensor]:
    """The trained parameters and AdamW's moments of a run's state."""
    state = torch.load(out / "state.pt", weights_only=True)
    found = [*state["parameters"].values()]
    for moments in state["optimizer"]["state"].values():
        found += moments.values()
    return found


# ---- faults --------------------------------------------------------------------------


def damage(path: Path, rng: random.Random, cut: bool):
    """Flip a bit of a file, or cut off its end."""
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content[:place] if cut else content)


def damage_files(fault: str, out: Path, rng: random.Random):
    """What a fault does before the run starts."""
    state, old, log = out / "state.pt", out / "state.old.pt", out / "log.jsonl"
    if fault in ("flipped bit", "cut state"):
        if state.exists() and old.exists():
            damage(state, rng, fault == "cut state")
    elif fault == "half a row" and log.exists():
        with log.open("ab") as file:
            file.write(b'{"step": 99, "lo')
    elif fault == "leftover":
        (out / ".state.pt.tmp").write_bytes(b"half a file")


def strike(fault: str, pid: int, below: list[int], rng: random.Random):
    """What a fault does to the running process."""
    if fault in SIGNALS:
        os.kill(pid, getattr(signal, fault))
    elif fault == "all SIGTERM":
        os.killpg(pid, signal.SIGTERM)
    elif fault == "SIGSTOP":
        os.kill(pid, signal.SIGSTOP)
        time.sleep(rng.random())
        os.kill(pid, signal.SIGCONT)
        time.sleep(1)
    elif fault == "killed worker" and below:
        os.kill(below[-1], signal.SIGKILL)
        time.sleep(1)
    elif fault == "full disk":  # no file can grow beyond 20 kB
        limits = (20_000, resource.RLIM_INFINITY)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
        time.sleep(2)


def end(run: subprocess.Popen, below: list[int], seconds: float) -> str:
    """Wait for the run, or kill it; what it wrote to stderr."""
    try:
        _, said = run.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        _, said = run.communicate()
    for pid in below:
        if Path(f"/proc/{pid}").exists():
            os.kill(pid, signal.SIGKILL)
    return said


def meet(fault: str, out: Path, steps: int, processes: int, rng: random.Random):
    """Start or continue the run, let it meet the fault, and see it end."""
    damage_files(fault, out, rng)
    run = start(out, steps, processes)
    wanted = len(rows(out)) + rng.randrange(2, 40)
    deadline = time.monotonic() + 60
    while run.poll() is None and len(rows(out)) < wanted:
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    below = children(run.pid)
    if run.poll() is None:
        strike(fault, run.pid, below, rng)
    said = end(run, below, seconds=15 if fault in SAVING else 1)
    is_traceback = "Traceback" in said and "torch.distributed" not in said
    if is_traceback and run.returncode != -signal.SIGKILL:
        raise AssertionError(f"{fault}: a traceback\n{said[-6000:]}")


# ---- the whole test ------------------------------------------------------------------


def main(argv: list[str]):
    _, given = parse_args(argv, __doc__, "", Options)
    options = override(Options(), given)
    folder = Path(options.folder).resolve()
    steps = int(options.minutes * STEPS_PER_MINUTE)
    rng = random.Random(options.seed)
    quiet, chaos = folder / "quiet", folder / "chaos"
    shutil.rmtree(folder, ignore_errors=True)
    chaos.mkdir(parents=True)
    run = command(quiet, steps, options.processes)
    if subprocess.run(run, cwd=ROOT, capture_output=True).returncode:
        raise InputError("the quiet run failed")
    met = Counter()
    with tqdm(total=steps, unit="step", desc="chaos") as bar:
        while len(rows(chaos)) < steps:
            fault = rng.choice(FAULTS)
            meet(fault, chaos, steps, options.processes, rng)
            met[fault] += 1
            bar.update(max(0, len(rows(chaos)) - bar.n))
    # the last run may have been killed before it saved its end
    run = command(chaos, steps, options.processes)
    subprocess.run(run, cwd=ROOT, capture_output=True)
    report(met, steps, quiet, chaos)


def report(met: Counter, steps: int, quiet: Path, chaos: Path):
    """Print the result; exit with status 1 if anything differs."""
    seen = Counter(row["step"] for row in rows(chaos))
    lost = steps - len(seen)
    repeated = seen.total() - len(seen)
    same = all(map(torch.equal, tensors(quiet), tensors(chaos)))
    faults = ", ".join(f"{fault} {n}" for fault, n in met.most_common())
    print(
        f"{met.total()} faults met: {faults}\n"
        f"{steps} steps of 8 samples: {lost} lost, {repeated} repeated; "
        f"weights and moments are {'bit-identical to' if same else 'NOT EQUAL to'} "
        "the quiet run's"
    )
    if lost or repeated or not same:
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
