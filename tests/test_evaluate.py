"""tools/evaluate.py: what counts as a failure, and that the committed weights' table can be made again."""

import json
from pathlib import Path

import pytest

from configs.schema import InputError
from tools import evaluate, make_scenes

TESTS = Path(__file__).parent

@pytest.mark.parametrize("answer, ended, failed", [
    ("The image shows a red star. The background is gray.", True, False),
    ("The image shows a red star. The background is gray.", False, True),   # no end within the limit
    ("a red star on gray", True, True),                                     # a fragment
    ("The image shows a red star. The background is", True, True),
    ("A red star on the left and a red star on the right.", True, True),    # "red star on the" twice
    ("", True, True)])
def test_a_description_fails_that_breaks_off_or_repeats_itself(answer, ended, failed):
    assert evaluate.failed(answer, ended) == failed

def test_the_table_of_a_few_scenes(tmp_path, capsys):
    make_scenes.main(["test", str(tmp_path / "test"), "--n=8"])
    evaluate.main([f"--data={tmp_path}/test", "--n=8", f"--save={tmp_path}/table.json"])
    saved = json.loads((tmp_path / "table.json").read_text())
    rows = {row.pop("projection"): row for row in saved["rows"]}
    assert saved["scenes"] == 8 and list(rows) == ["random", "after stage 1", "after stage 2"]
    assert all(tuple(row) == evaluate.COLUMNS for row in rows.values())
    assert rows["random"]["F1"] < 50 < rows["after stage 2"]["F1"]
    assert f"| random | {rows['random']['precision']:.1f} |" in capsys.readouterr().out

@pytest.mark.parametrize("argv, words", [
    (["--n=0"], "at least 1"), (["extra"], "usage"), (["--save=/none/table.json"], "a folder that exists"),
    ([f"--save={TESTS}"], "a folder that exists"), ([f"--data={TESTS}", "--n=1"], "no valid scenes.json"),
    ([f"--stage1={TESTS}"], "tests: there is no proj.safetensors")])
def test_wrong_options_are_refused_before_the_work(argv, words):
    with pytest.raises(InputError, match=words):
        evaluate.main(argv)

def test_a_broken_list_of_scenes_is_refused(tmp_path):
    for content in ("[", "{}x", '[{"objects": 3}]', '[{"background": "gray"}]', "3"):
        (tmp_path / "scenes.json").write_text(content)
        with pytest.raises(InputError, match="no valid scenes.json"):
            evaluate.main([f"--data={tmp_path}", "--n=1"])
