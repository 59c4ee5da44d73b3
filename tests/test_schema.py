"""Config files."""

from pathlib import Path

import pytest

from configs.schema import Config, load_config, read_saved_config
from plumbing.console import InputError
from tests.common import ROOT


@pytest.mark.parametrize(
    "path",
    sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "configs").rglob("*.py")
        if path.stem not in ("schema", "prompts", "base")
    ),
)
def test_every_config_is_valid(path):
    config = load_config(str(ROOT / path), {})
    assert config.llama and config.data and config.warmup_steps <= config.max_steps


@pytest.mark.parametrize(
    "content, words",
    [
        ('{"bath_size": 3}', "unknown name 'bath_size'; did you mean batch_size"),
        ("[]", "should hold a JSON object"),
        ("{", "not valid JSON"),
    ],
)
def test_an_unreadable_config_json_is_named(tmp_path, content, words):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=f"config.json.*{words}"):
        read_saved_config(str(tmp_path))


def test_graphs_of_a_sharded_model_are_refused():
    with pytest.raises(InputError, match="cuda_graphs = True: not with shard"):
        Config(cuda_graphs=True, shard=True, llama="llama")


def test_a_config_may_import_and_define_helpers(tmp_path):
    lines = ["from pathlib import Path", "import math", "_root = Path('data')"]
    lines += [
        "root = Path()",
        "def half(x): return x / 2",
        "lr = half(2e-4)",
        "data = str(_root / 'a')",
    ]
    (tmp_path / "c.py").write_text("\n".join(lines))
    config = load_config(str(tmp_path / "c.py"), {})
    assert (config.lr, Path(config.data)) == (1e-4, Path("data/a"))
    (tmp_path / "c.py").write_text("from pathlib import Path; out_dir = Path('a/b')")
    assert Path(load_config(str(tmp_path / "c.py"), {}).out_dir) == Path("a/b")
    for value in ("b'out'", "{1}", "1j", "print", "object()"):
        (tmp_path / "c.py").write_text(f"out_dir = {value}")
        with pytest.raises(InputError, match="c.py: out_dir = .* is not of type str"):
            load_config(str(tmp_path / "c.py"), {})
    (tmp_path / "c.py").write_text("root = 'data'")
    with pytest.raises(
        InputError, match="'root'; begin names of your own with an underscore"
    ):
        load_config(str(tmp_path / "c.py"), {})


@pytest.mark.parametrize(
    "text", ["exit()", "raise SystemExit(0)", "1 / 0", "import nothing_of_this_name"]
)
def test_a_config_that_ends_early_is_a_mistake_of_the_user(tmp_path, text):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(InputError, match=r"config file \S+c.py: \w+"):
        load_config(str(tmp_path / "c.py"), {})


def test_a_config_that_is_not_there_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "c.py"):
        with pytest.raises(InputError, match=f"{path}: there is no such file"):
            load_config(str(path), {})


def test_an_out_dir_that_is_a_file_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="out_dir = .*file.: name a folder"):
        Config(out_dir=str(tmp_path / "file"))


def test_a_learning_rate_that_would_rise_after_the_warm_up_is_refused(tmp_path):
    path = str(ROOT / "configs/tiny_stage1.py")  # its min_lr is 1e-3
    assert load_config(path, {"lr": "1e-3"}).lr == 1e-3
    with pytest.raises(InputError, match="lr = 0.0005 .* min_lr = 0.001.*--min_lr"):
        load_config(path, {"lr": "5e-4"})
    assert load_config(path, {"lr": "5e-4", "min_lr": "0"}).lr == 5e-4
    # earlier runs, to which this happened, can still be chatted with
    (tmp_path / "config.json").write_text('{"lr": 5e-4, "min_lr": 1e-3}')
    assert read_saved_config(str(tmp_path)).lr == 5e-4
