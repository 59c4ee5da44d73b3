"""tools/get_weights.py from start to end, against a server on the loopback that answers as the hub does."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import chat
from model import MiniGPT4
from plumbing.console import InputError
from tests import hub as fake
from tests.hub import BLIP2, LLAMA2, MIRROR, PROJ, TINYLLAMA, VICUNA
from tools import get_weights

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("huggingface_hub"), reason="needs huggingface_hub"
)
ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import shutil, sys
from tools import get_weights
get_weights.run_main(get_weights.main)
"""


@pytest.fixture(scope="module")
def repos(tmp_path_factory):
    root = tmp_path_factory.mktemp("repos")
    fake.write_repos(root)
    return root


@pytest.fixture
def hub(repos):
    with fake.Hub(repos) as server:
        yield server


def start(hub, folder, *argv, program=PROGRAM, **env):
    """Run the tool in `folder`, with a cache of its own there."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env = (
        clean
        | {
            "HF_ENDPOINT": hub.address,
            "HF_HOME": f"{folder}/hf",
            "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "TQDM_DISABLE": "1",
        }
        | env
    )
    return subprocess.run(
        [sys.executable, "-c", program, *argv],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
    )


def fails(*args, **options):
    """The one-line error of a start."""
    done = start(*args, **options)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")][-1]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """--vision= and --qformer= with official .pth files."""
    folder = tmp_path_factory.mktemp("local")
    torch.save(fake.official("vision"), folder / "eva_vit_g.pth")
    torch.save({"model": fake.official("qformer")}, folder / "blip2.pth")
    return f"--vision={folder}/eva_vit_g.pth", f"--qformer={folder}/blip2.pth"


# ---- what it makes -------------------------------------------------------------------


@pytest.mark.slow
def test_vicuna_7b_from_nothing_then_again_then_offline_then_chat(hub, tmp_path):
    """With BLIP-2 from the hub."""
    done = start(hub, tmp_path, "vicuna-7b")
    assert done.returncode == 0, done.stderr
    index, shard = "model.safetensors.index.json", "model-0000{}-of-00003.safetensors"
    wanted = [
        f"{BLIP2}/{name}"
        for name in ("config.json", index, shard.format(1), shard.format(2))
    ]
    wanted += [
        f"{VICUNA}/{name}"
        for name in (
            "config.json",
            "tokenizer.model",
            "pytorch_model.bin.index.json",
            "pytorch_model-00001-of-00002.bin",
            "pytorch_model-00002-of-00002.bin",
        )
    ]
    assert sorted(hub.fetched()) == sorted(
        [*wanted, f"{MIRROR}/{PROJ}"]
    )  # each once, and no third shard
    size = sum(
        (hub.root / BLIP2 / name).stat().st_size
        for name in ("config.json", index, shard.format(1))
    )
    said = f"weights/eva_vit_g.safetensors <- 3 files, {{:.2f}} MB: {{}}/{BLIP2}, {{:.2f}} MB cached"
    cached = sum(
        (hub.root / BLIP2 / name).stat().st_size for name in ("config.json", index)
    )
    assert said.format(size / 1e6, hub.address, cached / 1e6) in done.stdout
    assert (
        "in weights and at most" in done.stdout
        and f"in {tmp_path}/hf/hub; free: " in done.stdout
    )
    assert (
        f"from {MIRROR}, a mirror that is not official; official: https://drive.google.com/file/d/1RY9"
        in done.stdout
    )
    assert done.stdout.splitlines()[-1].endswith("chat.py PICTURE --ckpt=out/vicuna-7b")
    assert "perplexity on a paragraph of English" in done.stderr
    assert (
        "likely broken LLaMA weights; remove weights/vicuna-7b" in done.stderr
    )  # they are random
    vision = load_file(tmp_path / "weights/eva_vit_g.safetensors")
    assert (
        "ln_vision.weight" not in vision
    )  # else llama2-7b, without Q-Former, would use BLIP-2's
    assert {
        t.dtype
        for file in (tmp_path / "weights/vicuna-7b").glob("*.safetensors")
        for t in load_file(file).values()
    } == {torch.bfloat16}

    hub.requests.clear()
    again = start(hub, tmp_path, "vicuna-7b")
    assert (
        again.returncode == 0 and again.stdout.count("kept") == 4 and not hub.requests
    )

    for name in ("weights", "out"):
        shutil.rmtree(tmp_path / name)
    hub.__exit__()
    offline = start(hub, tmp_path, "vicuna-7b", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert said.format(size / 1e6, hub.address, size / 1e6) in offline.stdout
    assert "hf/hub" not in offline.stdout  # nothing is to be downloaded
    new = load_file(tmp_path / "weights/eva_vit_g.safetensors")
    assert all(torch.equal(t, vision[k]) for k, t in new.items())

    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "chat.py"),
            str(ROOT / "assets/tiny/example.png"),
            "--ckpt=out/vicuna-7b",
            "--prompt=Hm?",
            "--json",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0 and "answer" in json.loads(done.stdout), done.stderr


@pytest.mark.slow
def test_llama2_needs_a_licence_then_a_projection_that_is_fetched_by_hand(
    hub, tmp_path, local
):
    hub.gated.add(LLAMA2)
    for token in ({}, {"HF_TOKEN": "hf_other"}):
        message = fails(hub, tmp_path, "llama2-7b", local[0], **token)
        assert (
            f"{LLAMA2}/config.json: gated: accept the licence at https://huggingface.co/{LLAMA2},"
            in message
        )
        assert (
            "HF_TOKEN" in message
            and "hf auth login" in message
            and "--llama=" in message
        )
    assert not hub.fetched() and not (tmp_path / "weights").exists()
    done = start(hub, tmp_path, "llama2-7b", local[0], HF_TOKEN="hf_good")
    by_hand = "weights/pretrained_minigpt4_llama2_7b.pth"
    assert done.returncode == 2 and "perplexity" in done.stderr
    last = done.stderr.splitlines()[-1]
    assert (
        last.startswith("error: the projection is missing")
        and "the same command then continues" in last
    )
    assert (
        "drive.google.com/file/d/11nAPjEok8eAGGEG1N2vXo3kBLCg0WgUk, to be saved as "
        + by_hand
        in last
    )
    assert {path.name for path in (tmp_path / "weights").iterdir()} == {
        "eva_vit_g.safetensors",
        "llama-2-7b-chat",
    }
    (tmp_path / by_hand).write_text(
        "<!DOCTYPE html><html>Google Drive cannot scan this file"
    )
    assert f"{by_hand}: a saved web page" in fails(hub, tmp_path, "llama2-7b")
    torch.save(
        {
            "model": {
                "llama_proj.weight": torch.randn(32, 64),
                "llama_proj.bias": torch.zeros(32),
            }
        },
        tmp_path / by_hand,
    )
    hub.requests.clear()
    done = start(hub, tmp_path, "llama2-7b")
    assert done.returncode == 0 and not hub.requests, done.stderr
    config = json.loads((tmp_path / "out/llama2-7b/config.json").read_text())
    assert config["template"] == "llama2" and not config["qformer"]
    assert config["llama"] == "../../weights/llama-2-7b-chat"


@pytest.mark.slow
def test_a_download_that_breaks_off_goes_on_where_it_stopped(hub, tmp_path, local):
    """The server breaks off, then is down; the second start asks for the rest alone."""
    file = f"{TINYLLAMA}/model.safetensors"
    size = (hub.root / file).stat().st_size
    hub.cut[file] = size // 2
    small_chunks = (
        "import huggingface_hub.constants as c\nc.DOWNLOAD_CHUNK_SIZE = 1000\n"
        + PROGRAM
    )
    message = fails(hub, tmp_path, "tinyllama", *local, program=small_chunks)
    assert (
        f"{file}: interrupted, the same command continues" in message
        and "503" in message
    )
    assert not (tmp_path / "weights/tinyllama-1.1b-chat").exists()
    hub.cut.clear()
    hub.requests.clear()
    done = start(hub, tmp_path, "tinyllama")
    assert done.returncode == 0, done.stderr
    got = [request[:3] for request in hub.requests if request[0] == "GET"]
    first = size // 2 // 1000 * 1000
    assert got == [("GET", file, first), ("GET", f"{TINYLLAMA}/tokenizer.model", 0)]
    assert done.stdout.count("kept") == 2
    cached = (
        tmp_path
        / "hf/hub"
        / f"models--{TINYLLAMA.replace('/', '--')}"
        / "snapshots"
        / fake.COMMIT
    )
    assert (cached / "model.safetensors").read_bytes() == (hub.root / file).read_bytes()
    assert not list(cached.glob("*.incomplete"))
    assert re.search(r"train\.py \S*configs/stage1_tinyllama\.py$", done.stdout.strip())
    assert not (tmp_path / "out").exists()  # there is no projection, so there is no run


@pytest.mark.slow
def test_every_source_can_be_given(hub, tmp_path, local):
    """Paths: converted files and a folder, which need neither hub nor package; a repo for the projection."""
    (tmp_path / "own").mkdir()
    torch.save({"model": fake.official("proj")}, tmp_path / "own/proj.pth")
    given = [*local, f"--llama={hub.root / VICUNA}", "--proj=own/proj.pth"]
    without = "import sys\nsys.modules['huggingface_hub'] = None\n" + PROGRAM
    done = start(hub, tmp_path, "vicuna-13b", *given, program=without)
    assert done.returncode == 0 and not hub.requests, done.stderr
    assert (tmp_path / "weights/vicuna-13b/config.json").is_file()
    for name in ("eva_vit_g", "qformer"):
        shutil.move(tmp_path / f"weights/{name}.safetensors", tmp_path / "own")
    shutil.move(tmp_path / "out/vicuna-13b/proj.safetensors", tmp_path / "own")
    given = [
        f"--{part}=own/{file}.safetensors"
        for part, file in (
            ("vision", "eva_vit_g"),
            ("qformer", "qformer"),
            ("proj", "proj"),
        )
    ]
    done = start(hub, tmp_path, "vicuna-13b", *given)
    assert done.returncode == 0 and not hub.requests, done.stderr
    for path in (tmp_path / "own").glob("*.safetensors"):
        folder = "out/vicuna-13b" if path.stem == "proj" else "weights"
        assert (tmp_path / folder / path.name).read_bytes() == path.read_bytes()
    (tmp_path / "out/vicuna-13b/proj.safetensors").unlink()
    done = start(
        hub, tmp_path, "vicuna-13b", f"--proj={MIRROR}"
    )  # its only .pth, of another name
    assert done.returncode == 0 and hub.fetched() == [f"{MIRROR}/{PROJ}"], done.stderr


# ---- what can go wrong ---------------------------------------------------------------


@pytest.mark.slow
def test_a_file_or_repo_that_is_missing_is_named_with_the_option_that_replaces_it(
    hub, tmp_path, local
):
    hub.missing.add(f"{VICUNA}/tokenizer.model")
    assert fails(hub, tmp_path, "vicuna-7b", *local) == (
        f"error: {VICUNA}/tokenizer.model: the repo has no such file; another source can be given, --llama="
    )
    assert (
        "nobody/nothing/config.json: there is no such repo, or it is private; another source can be "
        "given, --llama="
        in fails(hub, tmp_path, "vicuna-7b", *local, "--llama=nobody/nothing")
    )
    assert f"{BLIP2}: 0 .pth files, none named {PROJ}" in fails(
        hub,
        tmp_path,
        "vicuna-7b",
        *local,
        f"--llama={hub.root / VICUNA}",
        f"--proj={BLIP2}",
    )
    assert not (tmp_path / "weights").exists()


@pytest.mark.slow
def test_without_connection_and_without_cache(hub, tmp_path, local):
    message = fails(hub, tmp_path, "vicuna-7b", *local, HF_HUB_OFFLINE="1")
    assert (
        f"{VICUNA}/config.json: not in the cache, and the hub is out of reach"
        in message
    )
    assert "HF_HUB_OFFLINE" in message and "--llama=" in message and not hub.requests


@pytest.mark.slow
@pytest.mark.parametrize("free, folder", [(300_000, "weights"), (10_000, "hub")])
def test_too_small_a_disk_is_found_before_anything_large_is_downloaded(
    hub, tmp_path, local, free, folder
):
    """One disk for both; or the cache on another one, which is too small."""
    fake_disks = (
        f"import shutil, pathlib, os\nfrom collections import namedtuple\n"
        f"shutil.disk_usage = lambda path: namedtuple('U', 'free')({free} if {folder == 'weights'} "
        f"or 'hf' in str(path) else 10**12)\n"
    )
    if folder == "hub":  # the cache's folder says that it is on another disk
        (tmp_path / "hf").mkdir()
        fake_disks += (
            "stat = pathlib.Path.stat\n"
            "def other(p, **k):\n    s = list(stat(p, **k)); s[2] += p.name in ('hf', 'hub')\n"
            "    return os.stat_result(s)\npathlib.Path.stat = other\n"
        )
    message = fails(hub, tmp_path, "vicuna-7b", *local, program=fake_disks + PROGRAM)
    assert (
        message.startswith("error: needed: at most ")
        and f"free: {free / 1e6:.2f} MB" in message
    )
    assert ("in weights and at most" in message) == (
        folder == "weights"
    ) and "HF_HOME" in message
    assert not any(name.endswith((".bin", ".pth")) for name in hub.fetched())


@pytest.mark.slow
def test_a_full_disk_in_the_middle_is_one_line(hub, tmp_path, local):
    full = PROGRAM.replace(
        "from tools",
        "import huggingface_hub.file_download as d\n"
        "def http_get(*_, **__): raise OSError(28, 'No space left on device')\n"
        "d.http_get = http_get\nfrom tools",
        1,
    )
    assert "No space left on device" in fails(
        hub, tmp_path, "tinyllama", *local, program=full
    )


def test_what_is_no_weight_file_is_named(repos, tmp_path, local, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page, pointer = (
        "<!DOCTYPE html>\n<html>",
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    )
    for name, text in (("page.pth", page), ("pointer.pth", pointer)):
        Path(name).write_text(text)
        for part in ("proj", "vision"):
            argv = [
                "vicuna-7b",
                *local,
                f"--llama={repos / VICUNA}",
                f"--{part}={name}",
            ]
            with pytest.raises(
                InputError, match=f"^{name}: a (saved web page|Git LFS pointer)"
            ):
                get_weights.main(argv)
    for name in ("config.json", "tokenizer.model", "pytorch_model-00001-of-00002.bin"):
        shutil.copytree(repos / VICUNA, tmp_path / name)
        Path(name, name).write_text(pointer)
        with pytest.raises(InputError, match=f"^{name}/{name}: a Git LFS pointer"):
            get_weights.main(["vicuna-7b", *local, f"--llama={name}"])
    folder = repos / VICUNA
    with pytest.raises(
        InputError, match=f"^--proj={folder}: a folder; give the projection's file"
    ):
        get_weights.main(["vicuna-7b", *local, f"--llama={folder}", f"--proj={folder}"])
    assert not Path("weights").exists()


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "usage: "),
        (["vicuna-7"], "did you mean vicuna-7b"),
        (["vicuna-7b", "--lama=x"], "did you mean llama"),
        (
            ["vicuna-7b", "--vision=no_such.pth"],
            "--vision=no_such.pth: there is no such path, and it is no repo",
        ),
        (["llama2-7b", "--qformer=x.pth"], "llama2-7b has no qformer"),
        (["tinyllama", "--proj=x.pth"], "tinyllama has no proj"),
    ],
)
def test_wrong_names_raise(argv, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=re.escape(words)):
        get_weights.main(argv)


def test_without_the_package_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="pip install -U huggingface_hub"):
        get_weights.main(["vicuna-7b"])


def test_a_run_of_the_same_name_is_not_overwritten(tmp_path, monkeypatch, local):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out/vicuna-7b").mkdir(parents=True)
    (tmp_path / "out/vicuna-7b/state.pt").write_bytes(b"")
    with pytest.raises(InputError, match="already holds a run"):
        get_weights.main(["vicuna-7b", *local])


@pytest.mark.parametrize(
    "perplexity, said",
    [
        (10, ""),
        (10, "likely a projection of another LLaMA (Vicuna v1.1"),
        (101, "likely broken LLaMA weights; remove LLAMA and its download"),
    ],
)
def test_a_bad_answer_gets_its_likeliest_cause(perplexity, said, monkeypatch, capsys):
    monkeypatch.setattr(MiniGPT4, "perplexity", lambda *_: perplexity)
    if said:
        monkeypatch.setattr(chat.Chat, "ask", stammer)
    get_weights.try_out(str(ROOT / "assets/tiny"), "LLAMA")
    out, err = capsys.readouterr()
    assert "Describe this image in detail." in out and said in err
    assert ("a fragment or repeats itself" in err) == bool(said)


def stammer(talk, question):
    talk.turns.append(chat.Turn(question, "the image of the image of the", (), True))
    yield talk.turns[-1].answer
