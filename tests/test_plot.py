"""tools/plot.py: what it reads from a run's log, and that it draws."""

import json
import sys

import pytest

from configs.schema import Config
from plumbing.console import InputError
from plumbing.options import to_json
from tools import plot

ROWS = [
    {"step": 10, "seen": 640, "lr": 1e-3, "loss": 3.0, "images_per_s": 50.0},
    {"step": 10, "heldout_loss": 2.5, "samples": []},
    {"step": 10, "skipped": {"x": 1}, "of": 99},
]


def run_folder(path, rows, **settings):
    path.mkdir()
    (path / "config.json").write_text(to_json(Config(**settings)))
    (path / "log.jsonl").write_text(
        "".join(f"{json.dumps(row)}\n" for row in rows) + '{"step": 2'
    )  # cut
    return str(path)


def test_a_log_is_read_over_the_samples_of_all_processes(tmp_path):
    curves = plot.read_log(
        run_folder(tmp_path / "a", ROWS, batch_size=32)
    )  # 2 processes
    assert curves == {
        "loss": [(640, 3.0)],
        "lr": [(640, 1e-3)],
        "images_per_s": [(640, 50.0)],
        "heldout_loss": [(640, 2.5)],
    }
    old = [
        {"step": 5, "lr": 1e-3, "loss": 4.0, "images_per_s": 1.0}
    ]  # before the samples were logged
    assert plot.read_log(run_folder(tmp_path / "b", old, batch_size=8, grad_accum=2))[
        "loss"
    ] == [(80, 4.0)]


def test_damaged_rows_are_passed_over(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        {"step": 0, "loss": 9},
        {"step": 1, "loss": "x"},
        {"step": 2, "loss": None},
        [],
        3,
        {"loss": 1},
        {"step": 4, "loss": 2.0},
    ]
    assert plot.read_log(run_folder(tmp_path / "a", rows, batch_size=1))["loss"] == [
        (4, 2.0)
    ]
    plot.main(
        [str(tmp_path / "a"), f"--out={tmp_path}/loss.png"]
    )  # it has no learning rate


@pytest.mark.slow
def test_runs_are_drawn_into_one_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    runs = [run_folder(tmp_path / "a", ROWS), run_folder(tmp_path / "b", ROWS[:1])]
    plot.main([*runs, f"--out={tmp_path}/loss.svg"])
    assert (tmp_path / "loss.svg").stat().st_size > 10_000
    with pytest.raises(InputError, match="--out=.*loss.xyz"):
        plot.main([*runs, f"--out={tmp_path}/loss.xyz"])


def test_what_is_no_run_and_a_run_without_losses_are_refused(tmp_path, monkeypatch):
    for argv, words in (
        ([], "RUN_FOLDER: it has no config.json"),
        ([str(tmp_path)], "no config.json"),
        ([run_folder(tmp_path / "a", ROWS[1:])], "holds no losses yet"),
    ):
        with pytest.raises(InputError, match=words):
            plot.main(argv)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        plot.main([run_folder(tmp_path / "b", ROWS)])
