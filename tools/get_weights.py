"""Download real weights from the Hugging Face hub and convert them for chat.py.

    python tools/get_weights.py vicuna-7b
    python tools/get_weights.py vicuna-13b --proj=Downloads/pretrained_minigpt4.pth
    python tools/get_weights.py llama2-7b --llama=NousResearch/Llama-2-7b-chat-hf
    python tools/get_weights.py vicuna-7b --stage=1   to train stage 2 yourself
    python tools/get_weights.py smollm2-135m          for the tiny world
    python tools/get_weights.py smollm2-1.7b          for configs/stage1_smollm2.py

Needs huggingface_hub. Downloads go to its cache (HF_HOME), converted weights to
weights/, the run to out/NAME. Existing files are kept, so after an interruption the
same command continues. Any source can be a path or a repository of the hub. Nobody has
published a projection for the small language models; for these, the last lines of the
output are the commands that train one.
"""

import hashlib
import os
import re
import shutil
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from urllib.request import getproxies

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import chat
from configs.prompts import INSTRUCTIONS, suggest_template
from configs.schema import load_config, write_saved_config
from llama import perplexity
from model import KINDS
from plumbing.console import (
    InputError,
    note,
    optional_package,
    printable,
    run_main,
)
from plumbing.files import read_json, replacing, start_of
from plumbing.options import check_name, option, read_options
from plumbing.tokenizer import BESIDE_TOKENIZER, TOKENIZER_FILES, read_chat_template
from plumbing.weights import read_part, read_part_sizes, read_weight_map
from tools import convert
from tools.evaluate import is_fragment, repeats_itself
from train import open_folder

ROOT = Path(chat.__file__).parent
BLIP2 = "Salesforce/blip2-flan-t5-xxl"  # has MiniGPT-4's vision part and Q-Former
# Every `part` is a text such as "proj", `repo` one such as BLIP2, `path` a Path.

# A LLaMA's repo has one of these, preferred in this order; BLIP-2 has the first.
WEIGHTS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


PARTS = ("vision", "qformer", "llama", "proj")


class Recipe(NamedTuple):
    """What a model is made of."""

    config: str  # in configs/; it names the converted files
    llama: str  # repo
    proj: str = ""  # file name of the official projection
    drive: str = ""  # its id on Google Drive, the only official place
    mirror: str = ""  # a repo with a copy
    stage1_drive: str = ""  # the official projection before stage 2, on Google Drive
    settings: dict = {}  # override the config's
    stage2: str = ""  # in configs/; without a projection, the second one to train with

    @property
    def by_hand(self):
        """Where a projection that was downloaded by hand is looked for."""
        return f"weights/{self.proj}"

    @property
    def official(self):
        address = f"https://drive.google.com/file/d/{self.drive}"
        return f"{address}, to be saved as {self.by_hand}"


RECIPES = {
    "vicuna-7b": Recipe(
        "stage2",
        "Vision-CAIR/vicuna-7b",
        "prerained_minigpt4_7b.pth",  # spelled so
        "1RY9jV0dyqLX-o38LrumkKRh6Jtaop58R",
        "ckpt/minigpt4-7B",
        "1HihQtCEXUyBM1i9DQbaK934wW3TZi-h5",
    ),
    "vicuna-13b": Recipe(
        "stage2",
        "Vision-CAIR/vicuna",
        "pretrained_minigpt4.pth",
        "1a4zLvaiDBr-36pasffmgpvH5P7CKmpze",
        stage1_drive="1u9FRRBB3VovP1HxCAlpD9Lw4t4P6-Yq8",
        settings={"llama": "weights/vicuna-13b"},
    ),
    "llama2-7b": Recipe(
        "stage2_llama2",
        "meta-llama/Llama-2-7b-chat-hf",
        "pretrained_minigpt4_llama2_7b.pth",
        "11nAPjEok8eAGGEG1N2vXo3kBLCg0WgUk",
    ),
    "smollm2-135m": Recipe(
        "smol_stage1", "HuggingFaceTB/SmolLM2-135M-Instruct", stage2="smol_stage2"
    ),
}
# Language models without a projection: {name: repo}
UNTRAINED = {
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "tinyllama": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
}
for _name, _repo in UNTRAINED.items():
    RECIPES[_name] = Recipe(
        "stage1_smollm2",
        _repo,
        settings={"llama": f"weights/{_name}"},
        stage2="stage2_smollm2",
    )


@dataclass(frozen=True)
class Options:
    vision: str = option(
        "", ".pth, .safetensors, BLIP-2 folder or repository (default: the model's)"
    )
    qformer: str = option("", "same sources as --vision (default: the model's)")
    llama: str = option("", "folder or repository of a LLaMA (default: the model's)")
    proj: str = option("", "a .pth, .safetensors, or repository (default: the model's)")
    stage: int = option(
        2,
        "projection after this stage; 1 only for vicuna-7b and vicuna-13b",
        least=1,
        most=2,
    )


# ---- the hub ---------------------------------------------------------------------


def hub():
    """The package huggingface_hub."""
    package = optional_package("huggingface_hub", "downloading")
    if not hasattr(package, "DryRunFileInfo"):  # since 1.0
        raise InputError("huggingface_hub is too old: pip install -U huggingface_hub")
    package.logging.set_verbosity_error()  # it retries; explain() says why it gave up
    return package


def explain(error, repo):
    """What an exception of the hub's library means for the user."""
    errors = hub().errors
    reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
    if isinstance(error, errors.GatedRepoError):
        return (
            f"gated: accept the licence at https://huggingface.co/{repo}, "
            "then set HF_TOKEN or run `hf auth login`"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        hint = ", or your token is no longer valid" if hub().get_token() else ""
        return f"there is no such repo, or it is private{hint}"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        proxy = " through the proxy" if {"https", "all"} & getproxies().keys() else ""
        return f"not in the cache, and the hub is out of reach{proxy}: {reason}"
    if isinstance(error, errors.EntryNotFoundError):
        return "the repo has no such file"
    return f"interrupted, the same command continues: {reason}"


@contextmanager
def explained(part, repo, name):
    """Turn an exception of the hub's library into an InputError of one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as e:  # it lets through what its HTTP client raises
        raise InputError(
            f"{repo}/{name}: {explain(e, repo)}; another source can be given, --{part}="
        ) from e


def look_up(part, repo, name, optional=False):
    """A file's size, its place in the cache and whether it is there: a DryRunFileInfo.

    Returns None for an optional file if the repo (or, without connection, the cache)
    does not have it.
    """
    with explained(part, repo, name):
        try:
            return hub().hf_hub_download(repo, name, dry_run=True)
        except hub().errors.EntryNotFoundError:
            if not optional:
                raise


def fetch(part, repo, name):
    """Download a file to the hub's cache, unless it is there; return its path.

    hf_hub_download alone would restart an interrupted download from its first byte. A
    file that is not what the hub has is downloaded again, once.
    """
    info = look_up(part, repo, name)
    path = Path(info.local_path)
    begun = Path(f"{path}.incomplete")  # holds the beginning of a download
    if info.will_download:
        path.parent.mkdir(parents=True, exist_ok=True)
        with hub().utils.WeakFileLock(f"{path}.lock"), explained(part, repo, name):
            if not path.exists():  # else another process was faster
                download(repo, name, info, begun)
                begun.rename(path)
    with explained(part, repo, name):
        return Path(hub().hf_hub_download(repo, name))


def download(repo, name, info, begun):
    """Download the rest of a file. Raises InputError if it comes damaged twice."""
    from huggingface_hub.file_download import http_get

    url = hub().hf_hub_url(repo, name, revision=info.commit_hash)
    mark = hub().get_hf_file_metadata(url).etag
    for _ in range(2):
        with open(begun, "ab") as file:
            http_get(
                url,
                file,
                resume_size=file.tell(),
                headers=hub().utils.build_hf_headers(),
                expected_size=info.file_size,
                displayed_filename=name,
            )
        if is_intact(begun, mark):
            return
        note(f"{name}: damaged, its hash is not the hub's; it is downloaded again")
        begun.unlink()
    raise InputError(f"{repo}/{name}: damaged twice on its way; try another connection")


def is_intact(path, mark):
    """Whether a file has the hub's hash: SHA-256, or Git's for a small file."""
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", mark or ""):
        return True  # a mirror may have other marks
    digest = hashlib.sha256()
    if len(mark) == 40:
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest() == mark


# ---- where the parts come from ---------------------------------------------------


def names_in_index(part, index):
    """The files that hold a part's tensors; all files of a LLaMA."""
    own = re.compile(convert.OF_BLIP2.get(part, ""))
    weight_map = read_weight_map(index)
    return sorted({file for name, file in weight_map.items() if own.match(name)})


def find_projection(repo, official):
    """The projection's file in a repo: of the official name, or the only .pth file."""
    if look_up("proj", repo, official, optional=True):
        return official
    with explained("proj", repo, official):
        files = hub().list_repo_files(repo)
    names = [name for name in files if name.endswith(".pth")]
    if len(names) != 1:
        raise InputError(
            f"{repo}: {len(names)} .pth files, none named {official}; "
            "give a file, --proj=PATH"
        )
    return names[0]


def names_in_repo(part, repo, proj):
    """The files of a repo that a part needs; `proj` is the official projection's name.

    Downloads config.json and the index of the weights.
    """
    if part == "proj":
        return [find_projection(repo, proj)]
    config = read_json(fetch(part, repo, "config.json"))
    if part == "qformer":
        convert.refuse_other_qformers(Path(repo), config)
    choices = WEIGHTS if part == "llama" else WEIGHTS[:1]
    found = (name for name in choices if look_up(part, repo, name, optional=True))
    weights = next(found, choices[0])
    names = ["config.json", weights]
    if part == "llama":
        names += tokenizer_names(repo)
    if weights.endswith(".json"):
        names += names_in_index(part, fetch(part, repo, weights))
    return names


def tokenizer_names(repo):
    """The files of a repo that a language model's tokenizer needs."""

    def has(name):
        return look_up("llama", repo, name, optional=True)

    sentencepiece, json_file = TOKENIZER_FILES
    if has(sentencepiece) or not has(json_file):
        return [sentencepiece]
    return [json_file, *filter(has, BESIDE_TOKENIZER)]


class Size(NamedTuple):
    """Bytes of a file, and how many of them are still to be downloaded."""

    total: int
    missing: int = 0


class Source(NamedTuple):
    """Where a part comes from, and what it becomes."""

    part: str
    place: str  # a path or a repo
    target: str
    names: list  # of the files in the repo; none: `place` is a path
    files: dict  # {path: Size}


def check_local(part, path):
    """Raise InputError for a path that cannot become the part."""
    if part == "proj" and path.is_dir():
        raise InputError(f"--proj={path}: a folder; give the projection's file")
    if part == "llama":
        convert.open_llama(path)
    elif path.is_dir():
        convert.with_blip2_sizes(convert.Options(), path, part)
        convert.read_blip2(path, part)
    elif path.suffix == ".safetensors" and part != "proj":
        files = {part: read_part(part, str(path))}
        read_part_sizes(part, files, KINDS)  # raises InputError


def find_local(part, path, target):
    """A path as the Source of a part. Raises InputError if it holds something else."""
    files = [path]
    if path.is_dir():
        files = [file for file in path.iterdir() if file.is_file()]
    index = path / WEIGHTS[0]
    if index.is_file():
        needed = names_in_index(part, index)
        small = (".json", ".jinja", ".model")
        files = [f for f in files if f.name in needed or f.suffix in small]
    for file in files:
        start_of(file)  # raises InputError for a web page or a Git LFS pointer
    check_local(part, path)
    sizes = {file: Size(file.stat().st_size) for file in files}
    return Source(part, str(path), target, [], sizes)


def find_in_repo(part, repo, target, proj):
    """A repo as the Source of a part; `proj` is the official projection's name."""
    names = names_in_repo(part, repo, proj)
    sizes = {}
    for name in names:
        info = look_up(part, repo, name)
        path = Path(info.local_path)
        size = missing = info.file_size or 0
        begun = Path(f"{path}.incomplete")
        if begun.exists():
            missing -= begun.stat().st_size
        sizes[path] = Size(size, missing if info.will_download else 0)
    return Source(part, repo, target, names, sizes)


def find_sources(options, recipe, config):
    """The sources of all parts that are still to be made. Prints what is kept."""
    repos = {"llama": recipe.llama, "proj": recipe.mirror}
    sources = []

    def is_asked_of_the_hub(part):
        given = getattr(options, part)
        return not given or not os.path.exists(os.path.expanduser(given))

    for part in sorted(PARTS, key=is_asked_of_the_hub):  # what is wrong shows at once
        given, target = getattr(options, part), getattr(config, part)
        if not target:
            continue
        if os.path.exists(target):
            if given:  # perhaps by this very command, which was interrupted
                note(f"note: {target} exists: --{part}={given} is not read again")
            is_ours = Path(target).parts[0] == "assets"
            advice = "in this repository" if is_ours else "remove it to make it again"
            print(f"{part:8}{target}: kept; {advice}")
            continue
        if part == "proj" and not given:
            given = find_by_hand(recipe)
        place = given or repos.get(part, BLIP2)
        path = Path(os.path.expanduser(given))
        if not place:
            continue
        if given and path.exists():
            sources.append(find_local(part, path, target))
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", place):
            sources.append(find_in_repo(part, place, target, recipe.proj))
        else:
            raise InputError(
                f"--{part}={given}: there is no such path, and it is no repo, "
                "OWNER/NAME"
            )
    return sorted(sources, key=lambda source: PARTS.index(source.part))


def find_by_hand(recipe):
    """The path of a projection that was downloaded by hand; "" if there is none."""
    if os.path.exists(recipe.by_hand):
        print(f"proj    {recipe.by_hand}")
        return recipe.by_hand
    if find_spec("gdown"):
        return fetch_from_drive(recipe)
    way = "by hand, or with the package gdown"
    if recipe.mirror:
        way = f"from {recipe.mirror}, a mirror that is not official"
    print(f"proj    {way}; official: {recipe.official}")
    return ""


def fetch_from_drive(recipe):
    """Download the official projection from Google Drive; return its path."""
    gdown = optional_package("gdown", "Google Drive")
    print(f"proj    {recipe.by_hand} <- Google Drive, {recipe.drive}")
    Path(recipe.by_hand).parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(recipe.by_hand) as temporary:
            gdown.download(id=recipe.drive, output=str(temporary))
            start_of(temporary)  # raises InputError for a web page
    except Exception as e:  # it raises what its HTTP client raises
        reason = " ".join(str(e).split())
        raise InputError(f"Google Drive: {reason}; fetch {recipe.official}") from e
    return recipe.by_hand


# ---- making them -----------------------------------------------------------------


def as_text(n_bytes):
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.2f} MB"


def add_up(sizes):
    """The Size of all files together."""
    total = sum(size.total for size in sizes.values())
    return Size(total, sum(size.missing for size in sizes.values()))


def announce(sources):
    """Print what will be downloaded and made. InputError if a disk is too small."""
    files = {}
    for source in sources:
        size = add_up(source.files)
        place = source.place
        if source.names:
            cached = as_text(size.total - size.missing)
            place = f"{hub().constants.ENDPOINT}/{place}, {cached} cached"
        count = f"{len(source.files)} files, {as_text(size.total)}"
        print(printable(f"{source.part:8}{source.target} <- {count}: {place}"))
        files |= source.files  # vision and qformer share some
    size = add_up(files)
    needs = {"weights": size.total}  # a conversion is at most as large as its source
    if size.missing:
        needs[hub().constants.HF_HUB_CACHE] = size.missing
    check_room(needs)


def check_room(needs):
    """Print what each disk needs and has free. InputError if one has too little.

    needs: {folder: bytes}. Folders may share a disk, and need not exist yet.
    """
    disks = {}
    for name in needs:
        folder = Path(name).absolute()
        existing = next(p for p in (folder, *folder.parents) if p.exists())
        names, _ = disks.setdefault(existing.stat().st_dev, ([], existing))
        names.append(name)
    for names, folder in disks.values():
        uses = [f"at most {as_text(needs[name])} in {name}" for name in names]
        free = shutil.disk_usage(folder).free
        what = f"{' and '.join(uses)}; free: {as_text(free)}"
        if sum(needs[name] for name in names) > free:
            raise InputError(
                f"needed: {what}; make room, or put the cache on another disk with "
                "HF_HOME"
            )
        print(f"disk    {what}")


def make(source):
    """Download a part, and convert it unless it is converted already."""
    part, target, path = source.part, Path(source.target), Path(source.place)
    if source.names:
        files = [fetch(part, source.place, name) for name in source.names]
        path = files[0] if part == "proj" else files[0].parent
    target.parent.mkdir(parents=True, exist_ok=True)
    if part == "llama":
        convert.convert_llama(path, target, convert.Options(dtype="bfloat16"))
    elif path.suffix == ".safetensors":
        read_part(part, str(path))  # raises InputError for something else
        with replacing(target) as temporary:
            shutil.copyfile(path, temporary)
    else:
        convert.convert_part(part, path, target, convert.Options())
    print(f"{part:8}{target}: made")


def try_out(run, llama, stage=2):
    """Ask about a picture. A bad answer gets a warning with its likely cause."""
    talk = chat.Chat(*chat.load(chat.Options(ckpt=run, temperature=0.0, check=True)))
    talk.add_image(f"{ROOT}/assets/tiny/example.png")
    answer = "".join(talk.ask(INSTRUCTIONS[0]))
    print(f"{INSTRUCTIONS[0]} (assets/tiny/example.png)\n{printable(answer)}")
    is_broken = is_fragment(answer, "description") or repeats_itself(answer)
    if talk.turns[-1].ended and not is_broken:
        return
    if stage == 1:
        note("note: broken and repeated sentences are expected before stage 2")
        return
    text = (ROOT / "assets/paragraph.txt").read_text().strip()
    if perplexity(talk.model.llama, talk.model.tokenizer, text) > 100:
        cause = (
            f"broken LLaMA weights; remove {llama} and its download in the hub's cache"
        )
    else:
        cause = (
            "a projection of another LLaMA (Vicuna v1.1 or v1.5 instead of v0, "
            "7B with 13B)"
        )
    note(f"warning: this answer is a fragment or repeats itself: likely {cause}")


def finish(config, stage):
    """Try a run out, and print the commands that use it."""
    run = config.out_dir
    if not os.path.exists(f"{run}/config.json"):
        write_saved_config(config)
    try:
        try_out(run, config.llama, stage)
    except InputError as e:
        raise InputError(
            f"{e}; remove what was made from a wrong source, and start again"
        ) from e
    print(f"python {os.path.relpath(ROOT / 'chat.py')} PICTURE --ckpt={run}")
    if stage == 1:
        train = os.path.relpath(ROOT / "train.py")
        parts = f"--llama={config.llama} --proj={run}/proj.safetensors"
        print(f"python {train} {config_path('stage2')} {parts}")


def before_stage2(name, recipe):
    """The recipe of the model as it was before stage 2."""
    if not recipe.stage1_drive:
        raise InputError(f"--stage=1: {name} has no published one; leave it out")
    return recipe._replace(
        config="stage1",
        proj=f"minigpt4_{name}_stage1.pth",
        drive=recipe.stage1_drive,
        mirror="",
    )


def config_path(name):
    return os.path.relpath(f"{ROOT}/configs/{name}.py")


def print_training_commands(name, config):
    """Print how to train the projection of a language model, in two stages."""
    recipe = RECIPES[name]
    first, second = [], []  # options
    if config.llama != load_config(config_path(recipe.config), {}).llama:
        template = suggest_template(read_chat_template(f"{config.llama}/config.json"))
        run = f"out/stage1_{name}"
        first = [f"--llama={config.llama}", f"--out_dir={run}"]
        second = [
            f"--llama={config.llama}",
            f"--proj={run}/proj.safetensors",
            f"--out_dir=out/stage2_{name}",
            f"--template={template}",
        ]
    train = os.path.relpath(ROOT / "train.py")
    for stage, options in ((recipe.config, first), (recipe.stage2, second)):
        print(" ".join(("python", train, config_path(stage), *options)))


def main(argv):
    (name,), options, _ = read_options(argv, __doc__, "|".join(RECIPES), Options())
    recipe = RECIPES[check_name(name, RECIPES, "command line")]
    path = config_path(recipe.config)
    run = f"out/{name}"
    if options.stage == 1:
        recipe = before_stage2(name, recipe)
        path = config_path(recipe.config)
        run = f"{run}-stage1"
    proj = f"{run}/proj.safetensors" if recipe.proj else ""
    config = load_config(path, recipe.settings | {"out_dir": run, "proj": proj})
    for part in PARTS:
        if getattr(options, part) and not getattr(config, part):
            raise InputError(f"--{part}: {name} has no {part}; leave it out")
    if proj and not os.path.exists(proj):
        open_folder(config)  # refuses to overwrite another run
    sources = find_sources(options, recipe, config)
    if sources:
        announce(sources)
    for source in sources:
        make(source)
    if os.path.exists(proj):
        return finish(config, options.stage)
    convert.measure_perplexity(config.llama)
    if recipe.proj:
        raise InputError(
            f"the projection is missing: fetch {recipe.official}; "
            "the same command then continues"
        )
    print_training_commands(name, config)


if __name__ == "__main__":
    run_main(main)
