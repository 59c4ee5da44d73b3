"""Commands, links, file tree, transcripts and figures of README and docs/ are true."""

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import chat
from configs.schema import Config, load_config, read_saved_config, write_saved_config
from plumbing.options import override, parse_args
from tests.common import EXAMPLE, ROOT
from tests.runs import (
    ENV,
    losses,
    read_log,
)
from tests.test_house import tokens
from tools import dry_run

README = (ROOT / "README.md").read_text()
PATHS = (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")))
PAGES = {path: path.read_text() for path in PATHS}
SPEED = (ROOT / "docs/speed.md").read_text().replace("\n", " ")
TINY_WORLD = (ROOT / "docs/tiny-world.md").read_text()
FOLDERS = ("*.py", "plumbing/*.py", "configs/**/*.py", "tools/*.py")
SOURCES = [path for folder in FOLDERS for path in ROOT.glob(folder)]


def commands():
    """Every command of the pages' code blocks and of the docstrings of files."""
    texts = [
        block
        for page in PAGES.values()
        for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    ]
    texts += [ast.get_docstring(ast.parse(p.read_text())) or "" for p in SOURCES]
    for text in texts:
        text = re.sub(r"\\\n\s*", " ", text)
        for line in re.split(r"\n| && ", text):
            is_command = re.match(r"\s*(python|torchrun) ", line)
            if is_command and "DST" not in line and "|" not in line:
                yield re.split(r"\s{3,}|  #", line.strip())[0]


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_every_command_is_one_that_the_program_takes(command):
    words = shlex.split(command)
    script = next((w for w in words if w.endswith(".py")), None)
    if script is None:
        assert words[:3] == ["python", "-m", "pytest"]
        return
    if not (ROOT / script).is_file():
        diffs = (path.read_text() for path in ROOT.glob("docs/changes/*.diff"))
        assert any(f"+++ b/{script}" in diff for diff in diffs)
        return
    arguments = words[words.index(script) + 1 :]
    if script == "train.py":
        positional, given = parse_args(arguments, "", "CONFIG", Config)
        load_config(str(ROOT / positional[0]), given)
    elif not script.startswith("tests/"):
        own = importlib.import_module(
            script.removesuffix(".py").replace("/", ".")
        ).Options
        takes_config = script in ("tools/show_data.py", "tools/dry_run.py")
        _, given = parse_args(arguments, "", "...", own, *[Config] * takes_config)
        known = own.__dataclass_fields__
        override(own(), {k: v for k, v in given.items() if k in known})


def test_the_file_tree_is_the_repository_s():
    section = re.search(r"## Read it in this order\n(.*?)\n## ", README, re.DOTALL)[1]
    ordered = re.findall(r"`(\w+\.py)`", section)
    assert sorted(ordered) == sorted(p.name for p in ROOT.glob("*.py"))
    tree = re.search(r"```\n(.*?)```", section, re.DOTALL)[1]
    named = [
        line.split()[0].rstrip("/") for line in tree.splitlines() if line[:1].strip()
    ]
    assert all((ROOT / name).exists() for name in named)
    assert {"plumbing", "configs", "tools", "tests", "assets", "docs"} <= set(named)
    files = [*ROOT.glob("plumbing/*.py"), *ROOT.glob("tools/*.py")]
    assert all(file.name in tree for file in files)


def test_the_configs_that_it_names_are_there():
    text = "".join(PAGES.values())
    named = set(re.findall(r"configs/\w+(?:/\w+)?\.py|\bstage[12]_?\w*\.py", text))
    assert len(named) > 5
    assert all(
        (ROOT / "configs" / name.removeprefix("configs/")).is_file() for name in named
    )


def test_the_readme_is_short_and_opens_with_the_example():
    lines = README.splitlines()
    assert len(lines) <= 200 and max(map(len, lines)) <= 120
    top = "\n".join(lines[:60])
    assert "docs/chat.png" in top and "**Not tested**" in top


def test_links_lead_to_pages_that_the_readme_names():
    for page, text in PAGES.items():
        for link in re.findall(r"(?:\]\(|src=\")([^)#\"]+)", text):
            assert link.startswith("http") or (page.parent / link).exists(), link
    docs = {page.relative_to(ROOT).as_posix() for page in PAGES} - {"README.md"}
    assert docs <= set(re.findall(r"\]\(([^)]+)\)", README))


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_links_to_sections_lead_to_headings():
    found = 0
    for page, text in PAGES.items():
        for link, section in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", text):
            target = page.parent / link if link else page
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert section in map(anchor, headings), section
            found += 1
    assert found


def test_each_fact_has_its_figures_on_the_page_that_it_links_to():
    facts = re.findall(r"^\* \*\*(.*?)\]\((docs/.*?)\)\)\.", README, re.M | re.S)
    assert len(facts) == 5
    for fact, page in facts:
        for figure in re.findall(r"\d[\d.,e-]*\d|\d+", fact.rpartition("(")[0]):
            assert figure in (ROOT / page).read_text(), f"{figure} in {page}"


def test_the_figure_tells_the_tokens_of_each_file():
    figure = re.search(r"    file (.*)\n    length (.*)\n", README)
    names, counts = (line.split() for line in figure.groups())
    assert len(names) == len(counts) == 4
    for name, count in zip(names, counts):
        count = int(count.replace(",", ""))
        assert abs(tokens([name]) / count - 1) < 0.03, name


def conversations():
    """The transcripts of the pages: [(question, answer), ...] of each."""
    for path, text in PAGES.items():
        for block in re.findall(r"```\n\$ python chat\.py (.*?)```", text, re.DOTALL):
            command, *parts = block.split("\nyou> ")
            turns = []
            for part in parts:
                question, *answer = part.splitlines()
                if not question.startswith("/"):
                    answer = [line for line in answer if "tokens/s" not in line]
                    turns.append((question, "\n".join(answer)))
            yield pytest.param(command, turns, id=path.name)


@pytest.mark.parametrize("command, turns", list(conversations()))
def test_the_transcripts_are_what_the_tiny_model_says(command, turns):
    assert command == "assets/tiny/example.png --temperature=0" and turns
    talk = chat.Chat(*chat.load(chat.Options(device="cpu", temperature=0.0)))
    talk.add_image(EXAMPLE)
    for question, answer in turns:
        assert "".join(talk.ask(question)).strip() == answer


def test_the_first_answer_of_the_readme_is_sampled_as_the_command_does():
    options = chat.Options(device="cpu")
    talk = chat.Chat(*chat.load(options))
    talk.add_image(EXAMPLE)
    answer = "".join(talk.ask("Describe this image in detail."))
    assert answer.strip() in README.replace("\n", " ")


def test_the_evaluation_table_is_the_saved_one():
    saved = json.loads((ROOT / "assets/tiny/evaluation.json").read_text())
    assert saved["scenes"] >= 500
    assert [r["projection"] for r in saved["rows"]] == [
        "random",
        "after stage 1",
        "after stage 2",
    ]
    for row in saved["rows"]:
        line = f"| {row['projection']} |" + "".join(
            f" {v:.1f} |" for v in list(row.values())[1:]
        )
        assert line in TINY_WORLD


def measured(name: str) -> dict[str, dict]:
    """The rows of docs/speed/NAME.json, the last line of tools/bench.py's output."""
    rows = json.loads((ROOT / f"docs/speed/{name}.json").read_text())["rows"]
    return {row["name"]: row for row in rows}


def test_the_speed_of_chat_is_the_saved_measurement():
    rows = measured("chat")
    for way, name, peer in (
        ("bf16", "bfloat16", "BF16"),
        ("int8", "int8", "Q8_0"),
        ("int4", "int4", "Q4_0"),
    ):
        decode, prompt = rows[f"1.1b {way} decode"], rows[f"1.1b {way} prompt"]
        cells = (
            f"| {name} | {decode['ours']:.1f} | {decode['vs_peer']:.2f}",
            f"{decode['vs_llamacpp']:.2f} ({peer})",
            f"{1 / prompt['ours']:.2f} s",
            f"{prompt['vs_peer']:.2f}",
            f"{decode['peak_mib'] / 1024:.1f} GiB |",
        )
        assert " | ".join(cells) in SPEED
    first, second = rows["1.1b first word"], rows["1.1b second turn"]
    assert f"Python: {1 / first['ours']:.1f} s" in SPEED
    assert f"InstructBLIP: {1 / first['peer']:.1f} s" in SPEED
    assert f"answer: {1 / second['ours']:.2f} s" in SPEED
    for way in ("batch 8", "int8 batch 8"):
        assert f"{rows[f'1.1b {way}']['vs_peer']:.1f} times" in SPEED


@pytest.mark.parametrize(
    "name, row, label, peer",
    [
        ("data", "224x224 w2", "`data`, 224x224, 2 workers", "webdataset "),
        ("data", "640x480 w2", "`data`, 640x480, 2 workers", "webdataset "),
        ("train", "medium bf16 b8", "`train`, medium, bf16, batch of 8", ""),
        ("train", "medium bf16 b8 compiled", "the same, compiled", ""),
        ("train", "medium bf16 b8 checkpointed", "checkpointed", ""),
    ],
)
def test_the_speed_of_training_is_the_saved_measurement(name, row, label, peer):
    found = measured(name)[row]
    digits = ",.0f" if name == "data" else ".3g"
    ours, other = (format(found[side], digits) for side in ("ours", "peer"))
    ratios = f"{found['vs_peer']:.2f} | {found['vs_limit']:.2f} |"
    assert f"| {label} | {ours} images/s | {peer}{other} | {ratios}" in SPEED


def test_the_committed_weights_are_small():
    assert (
        sum(p.stat().st_size for p in (ROOT / "assets/tiny").rglob("*") if p.is_file())
        <= 10e6
    )


def test_the_projections_for_smollm2_are_small_and_name_their_parts():
    folder = ROOT / "assets/smol"
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 1e6
    for run in (folder, folder / "stage1"):
        config = read_saved_config(str(run))
        assert Path(config.llama).resolve() == ROOT / "weights/smollm2-135m"
        for name in ("vision", "qformer", "proj"):
            assert Path(getattr(config, name)).is_file()


def test_the_diffs_are_as_long_as_the_readme_says():
    diffs = [path.read_text() for path in ROOT.glob("docs/changes/*.diff")]
    added = [len(re.findall(r"^\+(?!\+\+ )", diff, re.MULTILINE)) for diff in diffs]
    assert f"diffs of {min(added)} to {max(added)} lines" in README


def test_the_files_of_7b_are_as_large_as_the_page_says():
    page = PAGES[ROOT / "docs/weights.md"]
    model = dry_run.meta_model(load_config(str(ROOT / "configs/stage2.py"), {}))
    parts = {"vision": 4, "qformer": 4, "llama": 2, "proj": 4}  # bytes per weight
    sizes = {
        name: n_bytes * sum(t.numel() for t in model.part_tensors(name).values()) / 1e9
        for name, n_bytes in parts.items()
    }
    assert f"{sizes['llama']:.1f} GB, bfloat16" in page
    assert f"{sizes['vision']:.1f} GB, float32" in page
    assert f"{sizes['qformer']:.2f} GB, float32" in page
    assert f"{1000 * sizes['proj']:.0f} MB" in page
    assert f"{sum(sizes.values()):.1f} GB" in page
    assert f"{sum(sizes.values()):.1f} GB of disk space" in README


@pytest.mark.slow
def test_memory_is_what_dry_run_estimates(tmp_path, capsys):
    config = load_config(str(ROOT / "configs/stage2.py"), {"out_dir": str(tmp_path)})
    write_saved_config(config)
    data, weights = (PAGES[ROOT / f"docs/{name}.md"] for name in ("data", "weights"))
    for source, pages in (
        ("configs/finetune_7b.py", [data]),
        ("configs/stage1_smollm2.py", [weights]),
        (str(tmp_path), [weights, README]),
    ):
        dry_run.main([source])
        printed = capsys.readouterr().out
        memory = re.search(r"peak memory +about ([\d.]+ GiB)", printed)[1]
        assert all(memory in page for page in pages)


@pytest.mark.slow
def test_twenty_photographs_and_a_jsonl_train_and_answer(tmp_path):
    """As docs/data.md says; one conversation has two pictures."""
    lines = []
    for i in range(20):
        pixels = np.random.default_rng(i).integers(
            0, 255, (30 + i, 40, 3), dtype=np.uint8
        )
        Image.fromarray(pixels).resize((400, 300)).save(tmp_path / f"IMG_{i}.JPG")
        lines.append({"image": f"IMG_{i}.JPG", "caption": f"Our garden, number {i}."})
    talk = [{"user": "What changed?"}, {"assistant": "The cat left."}]
    lines.append({"image": ["IMG_0.JPG", "IMG_1.JPG"], "conversation": talk})
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )
    out = tmp_path / "my run"
    options = [
        "--max_steps=6",
        "--warmup_steps=1",
        "--log_interval=1",
        f"--out_dir={out}",
    ]
    done = subprocess.run(
        [
            sys.executable,
            "train.py",
            "configs/finetune_own.py",
            f"--data={tmp_path}/data.jsonl",
            *options,
        ],
        cwd=ROOT,
        env=ENV,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(losses(read_log(out))) == 6 and not any(
        "skipped" in row for row in read_log(out)
    )
    before, after = (
        load_file(folder / "proj.safetensors") for folder in (ROOT / "assets/tiny", out)
    )
    assert not torch.equal(before["proj.weight"], after["proj.weight"])
    python, *chat_command = shlex.split(
        done.stderr.splitlines()[-1]
    )  # how to chat with the result
    talked = subprocess.run(
        [sys.executable, *chat_command],
        cwd=ROOT,
        env=ENV,
        capture_output=True,
        text=True,
        input="What is it?\n",
    )
    assert python == "python" and talked.returncode == 0 and talked.stdout.strip(), (
        talked.stderr
    )


def test_requirements_name_the_least_versions_and_tests_run_with_one_of_torch():
    needed = (ROOT / "requirements.txt").read_text().splitlines()
    least = dict(line.split(">=") for line in needed if ">=" in line)
    assert "torch" in least
    for package, version in least.items():
        assert f"| {package}, {version} or later |" in README
    assert not any("==" in line for line in needed)
    tested = (ROOT / "requirements-dev.txt").read_text().splitlines()
    (pinned,) = (line for line in tested if line.startswith("torch=="))
    assert torch.__version__.split("+")[0] == pinned.removeprefix("torch==")
    assert pinned.removeprefix("torch==") in README
