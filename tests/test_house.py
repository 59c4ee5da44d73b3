"""The shape of the repository: what imports what."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("*.py", "plumbing/*.py", "configs/**/*.py", "tools/*.py", "tests/*.py")
TEXTS = {
    path.relative_to(ROOT): path.read_text()
    for folder in FOLDERS
    for path in ROOT.glob(folder)
}
TREES = {path: ast.parse(text) for path, text in TEXTS.items()}
MODULES = {".".join(path.with_suffix("").parts): path for path in TEXTS}


def place(path):
    """ "top", or the top folder of a file."""
    return path.parts[0] if len(path.parts) > 1 else "top"


def imported(path):
    """The files of this repo that a file imports, also inside of functions."""
    names = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {
                node.module,
                *(f"{node.module}.{alias.name}" for alias in node.names),
            }
    return {MODULES[name] for name in names & MODULES.keys()}


def test_imports_run_one_way():
    graph = {path: imported(path) for path in TEXTS if place(path) != "tests"}
    TopologicalSorter(graph).prepare()  # raises CycleError
    allowed = {
        "plumbing": {"plumbing"},
        "configs": {"plumbing", "configs"},
        "top": {"plumbing", "configs", "top"},
        "tools": {"plumbing", "configs", "top", "tools"},
    }
    for path, others in graph.items():
        assert {place(other) for other in others} <= allowed[place(path)], path


def test_imports_leave_the_environment_alone():
    code = "import os; before = dict(os.environ); import train, chat; assert dict(os.environ) == before"
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]},
        check=True,
    )


def test_windows_modules_are_enough():
    code = (
        "import sys\n"
        "absent = ('fcntl', 'resource', 'readline', 'termios')\n"
        "sys.modules |= dict.fromkeys(absent)\n"
        "import chat, train\n"
        "from tools import bench, caption, convert, show_data\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
