"""Options on the command line."""

import importlib
import re
from dataclasses import dataclass, fields, is_dataclass

import pytest

from configs.schema import Config, load_config
from plumbing.console import InputError
from plumbing.options import option, override, parse_args, read_options
from tests.common import ROOT, readable


def parsed(*words) -> Config:
    (path,), options = parse_args(
        [*words, str(ROOT / "configs/stage1.py")], "", "CONFIG", Config
    )
    return load_config(path, options)


@pytest.mark.parametrize(
    "words, name, value",
    [
        (["--lr=1"], "lr", 1.0),
        (["--lr", "1e-3"], "lr", 1e-3),
        (["--batch-size", "4"], "batch_size", 4),
        (["--resume"], "resume", True),
        (["--resume=TRUE"], "resume", True),
        (["--resume", "false"], "resume", False),
        (["--trainable=proj"], "trainable", ("proj",)),
        (["--trainable=proj,qformer"], "trainable", ("proj", "qformer")),
        (["--betas=0,0.95"], "betas", (0.0, 0.95)),
        (["--betas=(0.5, 0.6)"], "betas", (0.5, 0.6)),
        (["--data={'a': 1}"], "data", {"a": 1}),
        (["--out_dir=7"], "out_dir", "7"),
        (["--out_dir=a=b"], "out_dir", "a=b"),
        (["--max_steps=1e3", "--warmup_steps=0"], "max_steps", 1000),
        (["--template=none"], "template", ""),
    ],
    ids=readable,
)
def test_options_are_parsed_as_their_type(words, name, value):
    assert getattr(parsed(*words), name) == value
    assert override(Config(), {"betas": (0, 0.95)}).betas == (
        0.0,
        0.95,
    )  # as in a config file


@pytest.mark.parametrize(
    "option, words",
    [
        ("learning_rate=1", "'learning_rate'; did you mean lr"),
        ("max_steps=1.5", "max_steps = 1.5 is not of type int"),
        ("bath_size=4", "did you mean batch_size"),
        ("batch_size=many", "batch_size = 'many' is not of type int"),
        ("lr=True", "lr = True"),
        ("resume=yes", "resume = 'yes' is not of type bool"),
        ("trainable=7", "trainable = 7"),
        ("lr={[]: 1}", "lr = "),
        ("out_dir=", "out_dir = "),
        ("trainable=proj,proj", "trainable = "),
        ("betas=(0.9, 1.5)", "betas = "),
        (f"seed={2**70}", "seed = "),
        ("prepare={'a': 5}", "prepare = "),
        ("chat_share=2", "chat_share = "),
        ("template=alpaca", "vicuna, llama2"),
        ("lr=-1", "lr = -1.0: give at least 0"),
        ("grad_clip=nan", "grad_clip = "),
    ],
)
def test_wrong_options_are_refused(option, words):
    with pytest.raises(InputError, match=words):
        parsed(f"--{option}")


PROGRAMS = [
    "train",
    "chat",
    *sorted(f"tools.{path.stem}" for path in (ROOT / "tools").glob("*.py")),
]


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_lists_every_option_with_its_default_and_meaning(
    name, monkeypatch, capsys
):
    monkeypatch.setenv("COLUMNS", "1000")
    program = importlib.import_module(name)
    with pytest.raises(SystemExit) as end:
        program.main(["-h"])
    text, said = capsys.readouterr()
    assert end.value.code == 0 and not said and program.__doc__.splitlines()[0] in text
    options = dict(
        re.findall(r"^  --(\w+) \S+\s+(\S.*) \(default: .*\)$", text, re.MULTILINE)
    )
    assert len(options) == len(re.findall(r"^  --", text, re.MULTILINE))
    kinds = [
        kind
        for kind in vars(program).values()
        if is_dataclass(kind) and kind.__name__ == "Options"
    ]
    assert {f.name for kind in kinds for f in fields(kind)} <= options.keys()
    if name == "train":
        assert options.keys() == {f.name for f in fields(Config)}


@dataclass(frozen=True)
class Small:
    n: int = option(1, "number", least=1)


def test_read_options_checks_its_own_and_hands_on_the_rest():
    argv = ["a.py", "--n=2", "--lr=1"]
    assert read_options(argv, "", "CONFIG", Small(), Config) == (
        ["a.py"],
        Small(2),
        {"lr": "1"},
    )
    with pytest.raises(InputError, match="n = 0: give at least 1"):
        read_options(["--n=0"], "", "", Small())


def test_an_option_without_dashes_says_so(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="^max_steps=3: .* two dashes, --max_steps=3$"):
        parsed("max_steps=3")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "seed=3.png").touch()
    arguments, _ = parse_args(["seed=3.png"], "", "[IMAGE ...]", Config)
    assert arguments == ["seed=3.png"]
