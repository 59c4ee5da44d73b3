"""Loss, held-out loss (dots), learning rate and images/s of some runs over the samples seen, in one picture.

    python tools/plot.py out/tiny_stage1 out/tiny_stage2 [--out=loss.png]

A run may still be going on. --out may also end in .svg or .pdf. matplotlib is a separate package.
"""

import json
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configs.schema import read_saved_config
from plumbing.console import InputError, run_main
from plumbing.options import option, override, parse_args

PANELS = {
    "loss": "loss",
    "lr": "learning rate",
    "images_per_s": "images/s",
}  # keys of log.jsonl


@dataclass(frozen=True)
class Options:
    out: str = option("loss.png", "the picture to write")


def read_log(run: str) -> dict[str, list[tuple]]:
    """{key: [(samples seen, value), ...]} of a run's log.jsonl. Raises InputError if it holds no loss."""
    config, path, curves = read_saved_config(run), Path(run) / "log.jsonl", {}
    per_step = config.batch_size * config.grad_accum  # of one process; newer logs tell
    for line in (
        path.read_text("utf-8", "replace").splitlines() if path.is_file() else ()
    ):
        with suppress(Exception):  # the line is cut, or damaged
            row = json.loads(line)
            per_step = row.get("seen", per_step * row["step"]) / row["step"]
            for key in {*PANELS, "heldout_loss"} & row.keys():
                curves.setdefault(key, []).append(
                    (per_step * row["step"], float(row[key]))
                )
    if "loss" not in curves:
        raise InputError(
            f"{run}: its log.jsonl holds no losses yet; give the out_dir of a training run"
        )
    return curves


def main(argv: list[str]):
    runs, given = parse_args(argv, __doc__, "RUN_FOLDER ...", Options)
    out, logs = (
        override(Options(), given).out,
        [read_log(run) for run in runs or ["RUN_FOLDER"]],
    )
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise InputError(
            "plotting needs the package matplotlib: pip install matplotlib"
        ) from e
    figure = Figure((9, 7), layout="constrained")
    for axes, (key, label) in zip(
        figure.subplots(len(PANELS), sharex=True), PANELS.items()
    ):
        for i, (run, curves) in enumerate(zip(runs, logs)):
            axes.plot(*zip(*curves.get(key, [(0, 0)])), color=f"C{i}", label=run)
            if key == "loss" and "heldout_loss" in curves:
                axes.plot(
                    *zip(*curves["heldout_loss"]),
                    "o",
                    color=f"C{i}",
                    label=f"{run}, held out",
                )
        axes.set(ylabel=label, ylim=(0, None))
    axes.set(xlabel="samples")
    figure.axes[0].legend()
    try:
        figure.savefig(out, dpi=100)
    except ValueError as e:  # an unknown format
        raise InputError(f"--out={out}: {e}") from e
    print(out)


if __name__ == "__main__":
    run_main(main)
