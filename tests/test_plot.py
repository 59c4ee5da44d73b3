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
CUT = '{"step": 2'


def run_folder(path, rows, **settings):
    path.mkdir()
    (path / "config.json").write_text(to_json(Config(**settings)))
    lines = [json.dumps(row) for row in rows]
    (path / "log.jsonl").write_text("\n".join([*lines, CUT]))
    return str(path)


def test_a_log_is_read_over_the_samples_of_all_processes(tmp_path):
    two_processes = run_folder(tmp_path / "a", ROWS, batch_size=32)
    assert plot.read_log(two_processes) == {
        "loss": [(640, 3.0)],
        "lr": [(640, 1e-3)],
        "images_per_s": [(640, 50.0)],
        "heldout_loss": [(640, 2.5)],
    }


def test_older_logs_do_not_say_how_many_samples_were_seen(tmp_path):
    rows = [{"step": 5, "lr": 1e-3, "loss": 4.0, "images_per_s": 1.0}]
    run = run_folder(tmp_path / "a", rows, batch_size=8, grad_accum=2)
    assert plot.read_log(run)["loss"] == [(80, 4.0)]


def test_damaged_rows_are_left_out(tmp_path):
    rows = [
        {"step": 0, "loss": 9},
        {"step": 1, "loss": "x"},
        {"step": 2, "loss": None},
        {"step": "3", "loss": 1},
        [],
        3,
        {"loss": 1},
        {"step": 4, "loss": 2.0},
    ]
    run = run_folder(tmp_path / "a", rows, batch_size=1)
    assert plot.read_log(run) == {"loss": [(4, 2.0)]}
    log = tmp_path / "a/log.jsonl"
    damaged = b'{"step": 3, "lo\xff\xfe\n' + b"[" * 100_000 + b"\n"
    log.write_bytes(damaged + log.read_bytes())
    assert plot.read_log(run) == {"loss": [(4, 2.0)]}


def test_a_mistake_in_the_code_shows_its_traceback(tmp_path, monkeypatch):
    def raise_name_error(line):
        raise NameError("typo")

    monkeypatch.setattr(plot, "parse_row", raise_name_error)
    with pytest.raises(NameError):
        plot.read_log(run_folder(tmp_path / "a", ROWS))


@pytest.mark.slow
def test_runs_are_drawn_into_one_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    only_loss = [{"step": 10, "loss": 3.0}]
    runs = [run_folder(tmp_path / "a", ROWS), run_folder(tmp_path / "b", only_loss)]
    picture = tmp_path / "loss.svg"
    plot.main([*runs, f"--out={picture}"])
    assert capsys.readouterr().out == f"{picture}\n"
    assert picture.stat().st_size > 10_000
    with pytest.raises(InputError, match="--out=.*loss.xyz"):
        plot.main([*runs, f"--out={tmp_path}/loss.xyz"])


def test_what_is_no_run_and_a_run_without_losses_are_refused(tmp_path):
    for argv, words in (
        ([], "RUN_FOLDER: it has no config.json"),
        ([str(tmp_path)], "no config.json"),
        ([run_folder(tmp_path / "a", ROWS[1:])], "holds no losses yet"),
    ):
        with pytest.raises(InputError, match=words):
            plot.main(argv)


def test_without_the_package_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        plot.main([run_folder(tmp_path / "a", ROWS)])
