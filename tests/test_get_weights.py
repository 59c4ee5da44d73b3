"""tools/get_weights.py from start to end, against a server that answers as the hub."""

import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import chat
from configs.schema import load_config
from model import MiniGPT4
from plumbing.console import InputError
from plumbing.weights import check_fetched
from tests import hub as fake
from tests.common import EXAMPLE, ROOT, TINY
from tests.hub import BLIP2, LLAMA2, MIRROR, PROJ, QWEN3, TINYLLAMA, VICUNA
from tools import get_weights

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("huggingface_hub"), reason="needs huggingface_hub"
)
DEADLINE = 300  # seconds for a start; it takes 10
PROGRAM = """
import shutil, sys
from tools import get_weights
get_weights.run_main(get_weights.main)
"""
WITHOUT_THE_PACKAGE = """
import sys
sys.modules['huggingface_hub'] = None
"""
SMALL_CHUNKS = """
import huggingface_hub.constants
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1000
"""
FULL_DISK = """
import huggingface_hub.file_download
def http_get(*_, **__):
    raise OSError(28, 'No space left on device')
huggingface_hub.file_download.http_get = http_get
"""
# All folders are on one disk.
SMALL_DISK = """
import collections, shutil
Usage = collections.namedtuple('Usage', 'free')
shutil.disk_usage = lambda path: Usage(300_000)
"""
# The cache's folders say that they are on another disk, a smaller one.
SMALL_CACHE = """
import collections, os, pathlib, shutil
Usage = collections.namedtuple('Usage', 'free')
shutil.disk_usage = lambda path: Usage(10_000 if 'hf' in str(path) else 10**12)
stat = pathlib.Path.stat
def other(path, **more):
    fields = list(stat(path, **more))
    if path.name in ('hf', 'hub'):
        fields[2] += 1
    return os.stat_result(fields)
pathlib.Path.stat = other
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


def start(hub, folder, *argv, before="", **env):
    """Run the tool in `folder`, with a cache of its own there, after `before`."""
    clean = {name: v for name, v in os.environ.items() if not name.startswith("HF_")}
    own = {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": f"{folder}/hf",
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "TQDM_DISABLE": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", before + PROGRAM, *argv],
        cwd=folder,
        env=clean | own | env,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )


def fails(*args, **options):
    """The one-line error of a start."""
    done = start(*args, **options)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    return [line for line in lines if line.startswith("error: ")][-1]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """--vision= and --qformer= with official .pth files."""
    folder = tmp_path_factory.mktemp("local")
    torch.save(fake.official("vision"), folder / "eva_vit_g.pth")
    torch.save({"model": fake.official("qformer")}, folder / "blip2.pth")
    return f"--vision={folder}/eva_vit_g.pth", f"--qformer={folder}/blip2.pth"


def megabytes(hub, repo, *names):
    """The size of files in a repo, as the tool writes it."""
    size = sum((hub.root / repo / name).stat().st_size for name in names)
    return f"{size / 1e6:.2f} MB"


# ---- what it makes ---------------------------------------------------------------


@pytest.mark.slow
def test_vicuna_7b_from_nothing_then_again_then_offline_then_chat(hub, tmp_path):
    """With BLIP-2 from the hub."""
    done = start(hub, tmp_path, "vicuna-7b")
    assert done.returncode == 0, done.stderr
    small = ("config.json", "model.safetensors.index.json")
    first, second = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
    llama = (
        "config.json",
        "tokenizer.model",
        "pytorch_model.bin.index.json",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model-00002-of-00002.bin",
    )
    wanted = [f"{BLIP2}/{name}" for name in (*small, first, second)]
    wanted += [f"{VICUNA}/{name}" for name in llama]
    # Each once, and no third shard
    assert sorted(hub.fetched()) == sorted([*wanted, f"{MIRROR}/{PROJ}"])
    size = megabytes(hub, BLIP2, *small, first)
    cached = megabytes(hub, BLIP2, *small)
    vision = f"weights/eva_vit_g.safetensors <- 3 files, {size}: {hub.address}/{BLIP2}"
    assert f"{vision}, {cached} cached" in done.stdout
    assert "in weights and at most" in done.stdout
    assert f"in {tmp_path}/hf/hub; free: " in done.stdout
    assert f"from {MIRROR}, a mirror that is not official" in done.stdout
    assert "official: https://drive.google.com/file/d/1RY9" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("chat.py PICTURE --ckpt=out/vicuna-7b")
    assert "perplexity on a paragraph of English" in done.stderr
    # They are random.
    assert "likely broken LLaMA weights; remove weights/vicuna-7b" in done.stderr
    made = load_file(tmp_path / "weights/eva_vit_g.safetensors")
    # Otherwise llama2-7b, which has no Q-Former, would use BLIP-2's.
    assert "ln_vision.weight" not in made
    for file in (tmp_path / "weights/vicuna-7b").glob("*.safetensors"):
        dtypes = {tensor.dtype for tensor in load_file(file).values()}
        assert dtypes == {torch.bfloat16}

    hub.requests.clear()
    again = start(hub, tmp_path, "vicuna-7b")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("kept") == 4
    assert not hub.requests

    for name in ("weights", "out"):
        shutil.rmtree(tmp_path / name)
    hub.__exit__()
    offline = start(hub, tmp_path, "vicuna-7b", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert f"{vision}, {size} cached" in offline.stdout
    assert "hf/hub" not in offline.stdout  # nothing is to be downloaded
    new = load_file(tmp_path / "weights/eva_vit_g.safetensors")
    assert all(torch.equal(tensor, made[name]) for name, tensor in new.items())

    options = ["--ckpt=out/vicuna-7b", "--prompt=Hm?", "--json"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "chat.py"), EXAMPLE, *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=DEADLINE,
    )
    assert done.returncode == 0, done.stderr
    assert "answer" in json.loads(done.stdout)


@pytest.mark.slow
def test_llama2_needs_a_licence_then_a_projection_that_is_fetched_by_hand(
    hub, tmp_path, local
):
    vision = local[0]
    hub.gated.add(LLAMA2)
    address = f"https://huggingface.co/{LLAMA2}"
    for token in ({}, {"HF_TOKEN": "hf_other"}):
        message = fails(hub, tmp_path, "llama2-7b", vision, **token)
        gated = f"{LLAMA2}/config.json: gated: accept the licence at {address},"
        assert gated in message
        for word in ("HF_TOKEN", "hf auth login", "--llama="):
            assert word in message
    assert not hub.fetched()
    assert not (tmp_path / "weights").exists()

    done = start(hub, tmp_path, "llama2-7b", vision, HF_TOKEN="hf_good")
    assert done.returncode == 2, done.stderr
    assert "perplexity" in done.stderr
    last = done.stderr.splitlines()[-1]
    by_hand = "weights/pretrained_minigpt4_llama2_7b.pth"
    drive = "drive.google.com/file/d/11nAPjEok8eAGGEG1N2vXo3kBLCg0WgUk"
    assert last.startswith("error: the projection is missing")
    assert f"{drive}, to be saved as {by_hand}" in last
    made = {path.name for path in (tmp_path / "weights").iterdir()}
    assert made == {"eva_vit_g.safetensors", "llama-2-7b-chat"}

    page = "<!DOCTYPE html><html>Google Drive cannot scan this file"
    (tmp_path / by_hand).write_text(page)
    assert f"{by_hand}: a saved web page" in fails(hub, tmp_path, "llama2-7b")

    proj = {
        "llama_proj.weight": torch.randn(32, 64),
        "llama_proj.bias": torch.zeros(32),
    }
    torch.save({"model": proj}, tmp_path / by_hand)
    hub.requests.clear()
    done = start(hub, tmp_path, "llama2-7b")
    assert done.returncode == 0, done.stderr
    assert not hub.requests
    config = json.loads((tmp_path / "out/llama2-7b/config.json").read_text())
    assert config["template"] == "llama2"
    assert not config["qformer"]
    assert config["llama"] == "../../weights/llama-2-7b-chat"


@pytest.mark.slow
def test_an_interrupted_download_continues_where_it_stopped(hub, tmp_path, local):
    """The server breaks off, then is down; the second start asks for the rest alone."""
    file = f"{TINYLLAMA}/model.safetensors"
    half = (hub.root / file).stat().st_size // 2
    hub.cut[file] = half
    message = fails(hub, tmp_path, "tinyllama", *local, before=SMALL_CHUNKS)
    assert f"{file}: interrupted, the same command continues" in message
    assert "503" in message
    assert not (tmp_path / "weights/tinyllama").exists()

    hub.cut.clear()
    hub.requests.clear()
    done = start(hub, tmp_path, "tinyllama")
    assert done.returncode == 0, done.stderr
    got = [request[:3] for request in hub.requests if request[0] == "GET"]
    first = half // 1000 * 1000
    assert got == [("GET", file, first), ("GET", f"{TINYLLAMA}/tokenizer.model", 0)]
    assert done.stdout.count("kept") == 2
    folder = f"models--{TINYLLAMA.replace('/', '--')}/snapshots/{fake.COMMIT}"
    cached = tmp_path / "hf/hub" / folder
    assert (cached / "model.safetensors").read_bytes() == (hub.root / file).read_bytes()
    assert not list(cached.glob("*.incomplete"))
    *_, first, second = done.stdout.splitlines()
    assert re.search(r"train\.py \S*configs/stage1_smollm2\.py --llama=\S+", first)
    assert second.endswith("--template=vicuna")
    assert not (tmp_path / "out").exists()  # no projection, so no run


@pytest.mark.slow
def test_a_model_with_a_tokenizer_json_comes_with_the_commands_that_train_it(
    hub, tmp_path, local
):
    done = start(hub, tmp_path, "qwen3-1.7b", *local)
    assert done.returncode == 0, done.stderr
    names = [name.rpartition("/")[2] for name in hub.fetched() if QWEN3 in name]
    assert sorted(names) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert "family qwen3" in done.stderr
    llama = "weights/qwen3-1.7b"
    model = MiniGPT4.from_files(None, None, str(tmp_path / llama))
    assert model.llama.config.vocab_size == 420  # padded ids are kept
    assert model.tokenizer.no_thinking and len(model.tokenizer.ends) == 2

    *_, first, second = done.stdout.splitlines()
    stages = []
    for command in (first, second):
        _, _, path, *options = command.split()
        given = dict(option.removeprefix("--").split("=") for option in options)
        stages.append(load_config(tmp_path / path, given))
    stage1, stage2 = stages
    assert stage1.llama == stage2.llama == llama
    assert stage2.proj == f"{stage1.out_dir}/proj.safetensors"
    assert (stage1.template, stage2.template) == ("", "chatml")
    assert stage1.out_dir != stage2.out_dir


@pytest.mark.slow
def test_a_damaged_download_is_found_and_fetched_again(hub, tmp_path, local):
    """Zeros in its middle, as a power cut leaves them; the length is right."""
    file = f"{TINYLLAMA}/model.safetensors"
    half = (hub.root / file).stat().st_size // 2
    hub.cut[file] = half
    fails(hub, tmp_path, "tinyllama", *local, before=SMALL_CHUNKS)
    (begun,) = (tmp_path / "hf").rglob("*.incomplete")
    content = begun.read_bytes()
    begun.write_bytes(content[:-500] + bytes(500))
    hub.cut.clear()
    done = start(hub, tmp_path, "tinyllama")
    assert done.returncode == 0, done.stderr
    assert "model.safetensors: damaged, its hash is not the hub's" in done.stderr
    (cached,) = (tmp_path / "hf").rglob("snapshots/*/model.safetensors")
    assert cached.read_bytes() == (hub.root / file).read_bytes()


def test_a_hash_of_git_or_of_the_whole_content(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"hello")
    git = "b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0"  # git hash-object
    sha256 = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    for mark in (git, sha256, "of another kind", None):
        assert get_weights.is_intact(path, mark)
    path.write_bytes(b"hallo")
    assert not get_weights.is_intact(path, git)
    assert not get_weights.is_intact(path, sha256)


GDOWN = """
import sys, types
def download(id, output):
    assert id == '1HihQtCEXUyBM1i9DQbaK934wW3TZi-h5'
    import shutil
    shutil.copyfile('drive.pth', output)
sys.modules['gdown'] = types.SimpleNamespace(download=download)
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name: name == 'gdown' or find_spec(name)
"""


@pytest.mark.slow
def test_the_projection_before_stage_2_comes_with_the_command_that_trains_it(
    hub, tmp_path, local
):
    torch.save({"model": fake.official("proj")}, tmp_path / "drive.pth")
    done = start(hub, tmp_path, "vicuna-7b", *local, "--stage=1", before=GDOWN)
    assert done.returncode == 0, done.stderr
    run = "out/vicuna-7b-stage1"
    config = json.loads((tmp_path / run / "config.json").read_text())
    assert (config["template"], config["proj"]) == ("", "proj.safetensors")
    assert not [name for name in hub.fetched() if MIRROR in name]
    *_, talk, train = done.stdout.splitlines()
    assert talk.endswith(f"PICTURE --ckpt={run}")
    *_, path, llama, proj = train.split()
    given = {"llama": llama.partition("=")[2], "proj": proj.partition("=")[2]}
    config = load_config(tmp_path / path, given)
    assert (config.template, config.proj) == ("vicuna", f"{run}/proj.safetensors")
    assert config.llama == "weights/vicuna-7b"
    message = fails(hub, tmp_path, "llama2-7b", "--stage=1")
    assert "--stage=1: llama2-7b has no published one" in message


def test_nobody_is_told_to_remove_what_is_in_the_repository(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    config = load_config("configs/tiny_stage1.py", {})
    recipe = get_weights.RECIPES["smollm2-135m"]
    assert not get_weights.find_sources(get_weights.Options(), recipe, config)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(line.endswith("kept; in this repository") for line in lines)


@pytest.mark.slow
def test_what_is_given_is_checked_before_the_hub_is_asked(hub, tmp_path):
    (tmp_path / "llama").mkdir()
    message = fails(hub, tmp_path, "vicuna-7b", "--llama=llama")
    assert "llama" in message and not hub.requests


@pytest.mark.parametrize("name", get_weights.RECIPES)
def test_every_recipe_has_a_config_for_its_parts(name):
    recipe = get_weights.RECIPES[name]
    config = load_config(get_weights.config_path(recipe.config), recipe.settings)
    assert config.llama.startswith("weights/")
    assert bool(recipe.proj) != bool(recipe.stage2)


@pytest.mark.slow
def test_every_source_can_be_given(hub, tmp_path, local):
    """Paths need neither the hub nor its package; the projection can be in a repo."""
    own, run = tmp_path / "own", tmp_path / "out/vicuna-13b"
    own.mkdir()
    torch.save({"model": fake.official("proj")}, own / "proj.pth")
    llama = f"--llama={hub.root / VICUNA}"
    given = [*local, llama, "--proj=own/proj.pth"]
    done = start(hub, tmp_path, "vicuna-13b", *given, before=WITHOUT_THE_PACKAGE)
    assert done.returncode == 0, done.stderr
    assert not hub.requests
    assert (tmp_path / "weights/vicuna-13b/config.json").is_file()

    made = {
        "vision": tmp_path / "weights/eva_vit_g.safetensors",
        "qformer": tmp_path / "weights/qformer.safetensors",
        "proj": run / "proj.safetensors",
    }
    for path in made.values():
        shutil.move(path, own)
    given = [f"--{part}=own/{path.name}" for part, path in made.items()]
    done = start(hub, tmp_path, "vicuna-13b", *given)
    assert done.returncode == 0, done.stderr
    assert not hub.requests
    for path in made.values():
        assert path.read_bytes() == (own / path.name).read_bytes()

    made["proj"].unlink()
    # The repo's only .pth has another name.
    done = start(hub, tmp_path, "vicuna-13b", f"--proj={MIRROR}")
    assert done.returncode == 0, done.stderr
    assert hub.fetched() == [f"{MIRROR}/{PROJ}"]


# ---- what can go wrong -----------------------------------------------------------


@pytest.mark.slow
def test_a_missing_file_or_repo_is_named_with_the_option_that_replaces_it(
    hub, tmp_path, local
):
    hub.missing.add(f"{VICUNA}/tokenizer.model")
    what = f"{VICUNA}/tokenizer.model: the repo has no such file"
    message = fails(hub, tmp_path, "vicuna-7b", *local)
    assert message == f"error: {what}; another source can be given, --llama="
    message = fails(hub, tmp_path, "vicuna-7b", *local, "--llama=nobody/nothing")
    what = "nobody/nothing/config.json: there is no such repo, or it is private"
    assert message == f"error: {what}; another source can be given, --llama="
    given = (f"--llama={hub.root / VICUNA}", f"--proj={BLIP2}")
    message = fails(hub, tmp_path, "vicuna-7b", *local, *given)
    assert f"{BLIP2}: 0 .pth files, none named {PROJ}" in message
    assert not (tmp_path / "weights").exists()


@pytest.mark.slow
def test_without_connection_and_without_cache(hub, tmp_path, local):
    message = fails(hub, tmp_path, "vicuna-7b", *local, HF_HUB_OFFLINE="1")
    what = f"{VICUNA}/config.json: not in the cache, and the hub is out of reach"
    for words in (what, "HF_HUB_OFFLINE", "--llama="):
        assert words in message
    assert not hub.requests


def test_the_library_does_not_talk_of_its_retries():
    hub = get_weights.hub()
    assert hub.logging.get_verbosity() >= logging.ERROR


def test_an_unreachable_proxy_is_named(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    error = get_weights.hub().errors.LocalEntryNotFoundError("refused")
    assert "out of reach through the proxy: " in get_weights.explain(error, "a/b")


@pytest.mark.slow
@pytest.mark.parametrize("disk", ["one", "cache"])
def test_too_small_a_disk_is_found_before_anything_large_is_downloaded(
    hub, tmp_path, local, disk
):
    """One disk for both; or the cache on another one, which is too small."""
    (tmp_path / "hf").mkdir()
    before = SMALL_DISK if disk == "one" else SMALL_CACHE
    message = fails(hub, tmp_path, "vicuna-7b", *local, before=before)
    assert message.startswith("error: needed: at most ")
    assert ("free: 0.30 MB" if disk == "one" else "free: 0.01 MB") in message
    assert ("in weights and at most" in message) == (disk == "one")
    assert "HF_HOME" in message
    assert not any(name.endswith((".bin", ".pth")) for name in hub.fetched())


@pytest.mark.slow
def test_a_full_disk_in_the_middle_is_one_line(hub, tmp_path, local):
    message = fails(hub, tmp_path, "tinyllama", *local, before=FULL_DISK)
    assert "No space left on device" in message


def test_what_is_no_weight_file_is_named(repos, tmp_path, local, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    Path("page.pth").write_text("<!DOCTYPE html>\n<html>")
    Path("pointer.pth").write_text(pointer)
    vicuna = repos / VICUNA
    for part in ("proj", "vision"):
        for name, what in (
            ("page.pth", "a saved web page"),
            ("pointer.pth", "a Git LFS pointer"),
        ):
            given = [*local, f"--llama={vicuna}", f"--{part}={name}"]
            with pytest.raises(InputError, match=f"^{name}: {what}"):
                get_weights.main(["vicuna-7b", *given])
    for name in ("config.json", "tokenizer.model", "pytorch_model-00001-of-00002.bin"):
        shutil.copytree(vicuna, tmp_path / name)
        Path(name, name).write_text(pointer)
        with pytest.raises(InputError, match=f"^{name}/{name}: a Git LFS pointer"):
            get_weights.main(["vicuna-7b", *local, f"--llama={name}"])
    given = [*local, f"--llama={vicuna}", f"--proj={vicuna}"]
    what = f"--proj={vicuna}: a folder; give the projection's file"
    with pytest.raises(InputError, match=f"^{re.escape(what)}"):
        get_weights.main(["vicuna-7b", *given])
    assert not Path("weights").exists()


@pytest.mark.parametrize(
    "argv, words",
    [
        pytest.param([], "usage: ", id="nothing"),
        pytest.param(["vicuna-7"], "did you mean vicuna-7b", id="model"),
        pytest.param(["vicuna-7b", "--lama=x"], "did you mean llama", id="option"),
        pytest.param(
            ["vicuna-7b", "--vision=no_such.pth"],
            "--vision=no_such.pth: there is no such path, and it is no repo",
            id="path",
        ),
        pytest.param(
            ["llama2-7b", "--qformer=x.pth"], "llama2-7b has no qformer", id="qformer"
        ),
        pytest.param(["tinyllama", "--proj=x.pth"], "tinyllama has no proj", id="proj"),
    ],
)
def test_wrong_names_raise(argv, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=re.escape(words)):
        get_weights.main(argv)


def test_without_the_package_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="pip install huggingface_hub"):
        get_weights.main(["vicuna-7b"])


def test_a_run_of_the_same_name_is_not_overwritten(tmp_path, monkeypatch, local):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out/vicuna-7b").mkdir(parents=True)
    (tmp_path / "out/vicuna-7b/state.pt").write_bytes(b"")
    with pytest.raises(InputError, match="already holds a run"):
        get_weights.main(["vicuna-7b", *local])


def test_only_what_the_hub_s_library_raises_becomes_a_message(monkeypatch, tmp_path):
    """A mistake of somebody who edits the code shows its traceback."""

    def raise_name_error(*_):
        raise NameError("typo")

    info = SimpleNamespace(
        local_path=tmp_path / "x", will_download=True, commit_hash="0", file_size=1
    )
    monkeypatch.setattr(get_weights, "look_up", lambda *_: info)
    monkeypatch.setattr(get_weights, "Path", raise_name_error)
    with pytest.raises(NameError):
        get_weights.fetch("llama", VICUNA, "config.json")


@pytest.mark.parametrize(
    "perplexity, answer_is_bad, cause",
    [
        pytest.param(10, False, "", id="good"),
        pytest.param(10, True, "a projection of another LLaMA (Vicuna v1.1", id="proj"),
        pytest.param(
            101, True, "broken LLaMA weights; remove LLAMA and its download", id="llama"
        ),
    ],
)
def test_a_bad_answer_gets_its_likeliest_cause(
    perplexity, answer_is_bad, cause, monkeypatch, capsys
):
    monkeypatch.setattr(get_weights, "perplexity", lambda *_: perplexity)
    if answer_is_bad:
        monkeypatch.setattr(chat.Chat, "ask", stammer)
    get_weights.try_out(str(TINY), "LLAMA")
    out, err = capsys.readouterr()
    assert "Describe this image in detail." in out
    warning = f"a fragment or repeats itself: likely {cause}"
    assert (warning in err) == answer_is_bad


def stammer(talk, question):
    talk.turns.append(chat.Turn(question, "the image of the image of the", (), True))
    yield talk.turns[-1].answer


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("stage*.py")), ids=lambda path: path.stem
)
def test_missing_weights_name_the_command_that_fetches_them(
    path, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config = load_config(str(path), {})
    for source in filter(None, (config.vision, config.qformer, config.llama)):
        with pytest.raises(InputError, match="there is no such weight file") as e:
            check_fetched(source)
        name = re.search(r"get_weights.py (\S+)`", str(e.value))[1]
        assert name in get_weights.RECIPES
        Path(source).parent.mkdir(exist_ok=True)
        Path(source).touch()
        check_fetched(source)


@pytest.mark.parametrize("path", ["my_weights/llama", "weights/mine.safetensors"])
def test_other_missing_files_name_no_recipe(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_fetched(path)
