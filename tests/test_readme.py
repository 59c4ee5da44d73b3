"""The README is run: its commands, file tree and figures cannot drift from the program."""

import ast
import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

import chat
from configs.schema import load_config, parse_args
from data import INSTRUCTIONS
from tools import make_scenes

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
OPTIONAL = {("bench_chat.py", "transformers"), ("bench_train.py", "transformers"),
            ("bench_data.py", "webdataset"), ("prepare_stage1.py", "pyarrow")}
# which say so in one line where they are missing
SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("configs/*.py"), *ROOT.glob("tools/*.py")]


def commands():
    """Every command of the README's code blocks and of the config files' and modules' docstrings."""
    texts = [block for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)]
    texts += [ast.get_docstring(ast.parse(p.read_text())) or "" for p in SOURCES]
    for text in texts:
        for line in text.splitlines():
            if re.match(r"\s*(python|torchrun) ", line) and "DST" not in line and "|" not in line:
                yield re.split(r"\s{3,}|  #", line.strip())[0]


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_every_command_is_one_that_the_program_takes(command):
    words = shlex.split(command)
    script = next((w for w in words if w.endswith(".py")), None)
    if script is None:
        assert words[:3] == ["python", "-m", "pytest"]
        return
    assert (ROOT / script).is_file()
    positional, options = parse_args(words[words.index(script) + 1:])
    if script == "train.py":
        load_config(str(ROOT / positional[0]), options)
    elif script == "chat.py":
        assert set(options) <= {f.name for f in fields(chat.Options)}


def test_the_file_tree_is_the_repository_s():
    tree = re.search(r"## The files\n\n```\n(.*?)```", README, re.DOTALL)[1]
    named = [line.split()[0].rstrip("/") for line in tree.splitlines() if line[:1].strip()]
    assert all((ROOT / name).exists() for name in named)
    assert {p.name for p in ROOT.glob("*.py")} <= set(named)
    assert all(tool.name in tree for tool in ROOT.glob("tools/*.py"))


def test_the_configs_that_it_names_are_there():
    named = set(re.findall(r"\btiny_\w+|\bstage[12]_?\w*\.py", README))
    assert len(named) > 8
    assert all((ROOT / "configs" / name).with_suffix(".py").is_file() for name in named)


def test_the_evaluation_table_is_the_saved_one():
    saved = json.loads((ROOT / "assets/tiny/evaluation.json").read_text())
    assert saved["scenes"] >= 500
    assert [r["projection"] for r in saved["rows"]] == ["random", "after stage 1", "after stage 2"]
    for row in saved["rows"]:
        line = f"| {row['projection']} |" + "".join(f" {v:.1f} |" for v in list(row.values())[1:])
        assert line in README


def test_the_committed_weights_are_small():
    assert sum(p.stat().st_size for p in (ROOT / "assets/tiny").rglob("*") if p.is_file()) <= 10e6


def test_the_scenes_ask_with_the_instructions_of_stage_2():
    assert make_scenes.DESCRIBE_PROMPTS[:4] == INSTRUCTIONS


def test_nothing_outside_the_six_packages_is_imported():
    allowed = {"torch", "sentencepiece", "safetensors", "numpy", "PIL", "tqdm"}
    own = {p.stem for p in SOURCES} | {"configs", "tools"}
    import sys
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                top = name.split(".")[0]
                if (path.name, top) in OPTIONAL:
                    continue
                assert top in allowed | own or top in sys.stdlib_module_names, f"{path.name} imports {name}"
