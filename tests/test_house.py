"""The shape of the repository: what imports what, and how long files and functions may be."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("*.py", "configs/**/*.py", "tools/*.py", "tests/*.py")
TEXTS = {path.relative_to(ROOT): path.read_text() for folder in FOLDERS for path in ROOT.glob(folder)}
TREES = {path: ast.parse(text) for path, text in TEXTS.items()}
MODULES = {".".join(path.with_suffix("").parts): path for path in TEXTS}
LIMITS = {"top": 2300, "configs": 680, "tools": 2800}  # lines

def place(path):
    """"top", or the top folder of a file."""
    return path.parts[0] if len(path.parts) > 1 else "top"

def imported(path):
    """The files of this repo that a file imports, also inside of functions."""
    names = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {MODULES[name] for name in names & MODULES.keys()}

def test_imports_run_one_way():
    graph = {path: imported(path) for path in TEXTS if place(path) != "tests"}
    TopologicalSorter(graph).prepare()  # raises CycleError
    allowed = {"top": {"top", "configs"}, "configs": {"configs"}, "tools": {"top", "configs", "tools"}}
    for path, others in graph.items():
        assert {place(other) for other in others} <= allowed[place(path)], path

@pytest.mark.parametrize("folder", LIMITS)
def test_files_are_short(folder):
    lengths = {str(path): len(text.splitlines()) for path, text in TEXTS.items() if place(path) == folder}
    assert sum(lengths.values()) <= LIMITS[folder], lengths
    if folder == "top":
        assert len(lengths) == 7 and max(lengths.values()) <= 440, lengths

def test_functions_fit_on_a_screen_lines_in_110_columns_and_no_lambda_has_a_name():
    faults = []
    for path, tree in TREES.items():
        faults += [f"{path}: two blank lines in a row"] * ("\n\n\n" in TEXTS[path])
        for number, line in enumerate(TEXTS[path].splitlines(), 1):
            faults += [f"{path}:{number}: {len(line)} columns"] * (len(line) > 110)
        for node in ast.walk(tree):
            where = f"{path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
                faults.append(f"{where}: {node.name} has more than 60 lines")
            assigned = isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)) and node.value
            if isinstance(assigned, ast.Lambda):
                faults.append(f"{where}: a lambda is assigned")
    assert faults == []
