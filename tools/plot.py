"""Plot loss, held-out loss (dots), learning rate and images/s of runs.

    python tools/plot.py out/tiny_stage1 out/tiny_stage2 [--out=loss.png]

The x axis counts samples. Runs may still be training. --out may also end in .svg or
.pdf. Needs matplotlib.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configs.schema import read_saved_config
from plumbing.console import InputError, optional_package, run_main
from plumbing.files import read_rows
from plumbing.options import option, read_options

# Keys of log.jsonl
PANELS = {"loss": "loss", "lr": "learning rate", "images_per_s": "images/s"}
CURVES = {*PANELS, "heldout_loss"}


@dataclass(frozen=True)
class Options:
    out: str = option("loss.png", "file to write")


def parse_row(line):
    """The numbers of a row; {} for a damaged one."""
    try:
        items = json.loads(line).items()
    except (ValueError, RecursionError, AttributeError):
        return {}
    return {key: value for key, value in items if isinstance(value, int | float)}


def read_log(run):
    """{key: [(samples seen, value), ...]} of a run's log.jsonl.

    Raises InputError if it holds no loss.
    """
    config = read_saved_config(run)
    path = Path(run) / "log.jsonl"
    rows, _ = read_rows(path) if path.is_file() else ([], b"")
    per_step = config.batch_size * config.grad_accum  # of one process; newer logs tell
    curves = {}
    for _, line in rows:
        row = parse_row(line)
        step = row.get("step", 0)
        if step <= 0:
            continue
        per_step = row.get("seen", per_step * step) / step
        for key in row.keys() & CURVES:
            curves.setdefault(key, []).append((per_step * step, row[key]))
    if "loss" not in curves:
        raise InputError(
            f"{run}: its log.jsonl holds no losses yet; "
            "give the out_dir of a training run"
        )
    return curves


def main(argv):
    runs, options, _ = read_options(argv, __doc__, "RUN_FOLDER ...", Options())
    logs = [read_log(run) for run in runs or ["RUN_FOLDER"]]
    figures = optional_package("matplotlib.figure", "plotting")
    figure = figures.Figure((9, 7), layout="constrained")
    panels = figure.subplots(len(PANELS), sharex=True)
    for panel, (key, label) in zip(panels, PANELS.items()):
        for i, (run, curves) in enumerate(zip(runs, logs)):
            color = f"C{i}"
            # matplotlib leaves out labels that begin with _, and reads $ as a formula
            name = " " + run.replace("$", r"\$")
            panel.plot(*zip(*curves.get(key, [(0, 0)])), color=color, label=name)
            if key == "loss" and "heldout_loss" in curves:
                dots = zip(*curves["heldout_loss"])
                panel.plot(*dots, "o", color=color, label=f"{name}, held out")
        panel.set(ylabel=label, ylim=(0, None))
    panels[-1].set(xlabel="samples")
    panels[0].legend()
    try:
        figure.savefig(options.out, dpi=100)
    except ValueError as e:  # an unknown format
        raise InputError(f"--out={options.out}: {e}") from e
    print(options.out)


if __name__ == "__main__":
    run_main(main)
