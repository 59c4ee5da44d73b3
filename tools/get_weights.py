"""Fetch the real MiniGPT-4 from the Hugging Face hub, convert it, and make it ready for chat.py.

    python tools/get_weights.py vicuna-7b
    python tools/get_weights.py vicuna-13b --proj=Downloads/pretrained_minigpt4.pth
    python tools/get_weights.py llama2-7b --llama=NousResearch/Llama-2-7b-chat-hf
    python tools/get_weights.py tinyllama        what configs/stage1_tinyllama.py trains on; no projection

Needs huggingface_hub. Downloads go to its cache (HF_HOME), conversions to weights/, the run to out/NAME. What
exists is kept, so the same command continues a stopped start. Any source can be a path, or a repo of the hub.
"""

import os
import re
import shutil
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import chat
from configs.prompts import INSTRUCTIONS
from configs.schema import load_config
from model import KINDS, MiniGPT4, check_english
from plumbing.console import InputError, printable, run_main
from plumbing.files import read_json, replacing, start_of
from plumbing.options import check_name, option, override, parse_args
from plumbing.weights import read_part, read_sizes, read_weight_map
from tools import convert
from tools.evaluate import is_fragment, repeats_itself
from train import refuse_to_overwrite, start_folder

BLIP2 = "Salesforce/blip2-flan-t5-xxl"  # has MiniGPT-4's vision part and Q-Former
WEIGHTS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)  # the first that a LLaMA's repo has; BLIP-2 has the first


class Recipe(NamedTuple):
    """What a model is made of."""

    config: str  # in configs/; it names the converted files
    llama: str  # repo
    proj: str = ""  # the official projection's file name
    drive: str = ""  # its id on Google Drive, the only official place
    mirror: str = ""  # a repo that has it too
    settings: dict = {}  # over the config's


RECIPES = {
    "vicuna-7b": Recipe(
        "stage2",
        "Vision-CAIR/vicuna-7b",
        "prerained_minigpt4_7b.pth",  # spelled so
        "1RY9jV0dyqLX-o38LrumkKRh6Jtaop58R",
        "ckpt/minigpt4-7B",
    ),
    "vicuna-13b": Recipe(
        "stage2",
        "Vision-CAIR/vicuna",
        "pretrained_minigpt4.pth",
        "1a4zLvaiDBr-36pasffmgpvH5P7CKmpze",
        settings={"llama": "weights/vicuna-13b"},
    ),
    "llama2-7b": Recipe(
        "stage2_llama2",
        "meta-llama/Llama-2-7b-chat-hf",
        "pretrained_minigpt4_llama2_7b.pth",
        "11nAPjEok8eAGGEG1N2vXo3kBLCg0WgUk",
    ),
    "tinyllama": Recipe("stage1_tinyllama", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
}


@dataclass(frozen=True)
class Options:
    vision: str = option(
        "", "a .pth, a converted .safetensors, or BLIP-2's folder or repo"
    )
    qformer: str = option("", "the same")
    llama: str = option("", "a LLaMA's folder or repo")
    proj: str = option("", "a .pth, a converted .safetensors, or a repo")


def hub():
    """The package huggingface_hub."""
    try:
        import huggingface_hub

        huggingface_hub.DryRunFileInfo  # since 1.0
    except (ImportError, AttributeError) as e:
        raise InputError(
            "huggingface_hub is missing or too old: pip install -U huggingface_hub"
        ) from e
    return huggingface_hub


@contextmanager
def explained(part: str, repo: str, name: str):
    """Turn what the hub's library raises about a file into an InputError of one line."""
    errors = hub().errors
    try:
        yield
    except Exception as e:  # the library lets its HTTP client's errors through
        reason = " ".join(str(e.__cause__ or e).split()) or type(e).__name__
        what = next(
            text
            for kind, text in (
                (
                    errors.GatedRepoError,
                    f"gated: accept the licence at https://huggingface.co/{repo}, then set "
                    "HF_TOKEN or run `hf auth login`",
                ),
                (
                    errors.RepositoryNotFoundError,
                    "there is no such repo, or it is private",
                ),
                (
                    (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled),
                    f"not in the cache, and the hub is out of reach: {reason}",
                ),
                (errors.EntryNotFoundError, "the repo has no such file"),
                (Exception, f"interrupted, the same command continues: {reason}"),
            )
            if isinstance(e, kind)
        )
        raise InputError(
            f"{repo}/{name}: {what}; another source can be given, --{part}="
        ) from e


def look_up(part: str, repo: str, name: str, optional=False):
    """A file's size, its place in the cache and whether it is there: a DryRunFileInfo. An optional file that
    the repo has not, or while the hub is out of reach the cache, gives None."""
    with explained(part, repo, name):
        try:
            return hub().hf_hub_download(repo, name, dry_run=True)
        except hub().errors.EntryNotFoundError:
            if not optional:
                raise


def fetch(part: str, repo: str, name: str) -> Path:
    """The path of a file in the hub's cache, to which it is downloaded. hf_hub_download alone would begin a
    download that was killed from its start again; its own http_get continues it."""
    info = look_up(part, repo, name)
    begun = Path(f"{info.local_path}.incomplete")
    with explained(part, repo, name):
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import WeakFileLock, build_hf_headers

        if info.will_download:
            Path(info.local_path).parent.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(f"{info.local_path}.lock"):
                if not os.path.exists(
                    info.local_path
                ):  # else another process was faster
                    with open(begun, "ab") as f:
                        http_get(
                            hub().hf_hub_url(repo, name, revision=info.commit_hash),
                            f,
                            resume_size=f.tell(),
                            headers=build_hf_headers(),
                            expected_size=info.file_size,
                            displayed_filename=name,
                        )
                    begun.rename(info.local_path)
        return Path(hub().hf_hub_download(repo, name))


def names_in_index(part: str, index: Path) -> list[str]:
    """The files that hold a part's tensors; all of a LLaMA."""
    own = re.compile(convert.OF_BLIP2.get(part, ""))
    return sorted({file for k, file in read_weight_map(index).items() if own.match(k)})


def names_in_repo(part: str, repo: str, proj: str) -> list[str]:
    """The files of a repo that a part needs. Fetches the small ones that tell which."""
    if part == "proj":
        if look_up(part, repo, proj, optional=True):
            return [proj]
        with explained(part, repo, proj):
            names = [
                name for name in hub().list_repo_files(repo) if name.endswith(".pth")
            ]
        if len(names) != 1:
            raise InputError(
                f"{repo}: {len(names)} .pth files, none named {proj}; give a file, --proj=PATH"
            )
        return names
    config = read_json(fetch(part, repo, "config.json"))
    if part == "qformer":
        convert.refuse_other_qformers(Path(repo), config)
    choices = WEIGHTS if part == "llama" else WEIGHTS[:1]
    name = next(
        (name for name in choices if look_up(part, repo, name, optional=True)),
        choices[0],
    )
    shards = (
        names_in_index(part, fetch(part, repo, name)) if name.endswith(".json") else []
    )
    return ["config.json", name, *["tokenizer.model"] * (part == "llama"), *shards]


class Source(NamedTuple):
    """Where a part comes from, and what it becomes."""

    part: str
    place: str  # a path or a repo
    target: str
    names: list[str]  # of the files in the repo; none: `place` is a path
    files: dict[
        Path, tuple[int, int]
    ]  # bytes of what it needs, and how many are still to be downloaded


def check_local(part: str, path: Path):
    """Raise InputError for a path that cannot become the part, before anything is downloaded."""
    if part == "proj" and path.is_dir():
        raise InputError(f"--proj={path}: a folder; give the projection's file")
    if part == "llama":
        convert.open_llama(path)
    elif path.is_dir():
        convert.with_blip2_sizes(convert.Options(), path, part)
        convert.read_blip2(path, part)
    elif path.suffix == ".safetensors" and part != "proj":
        read_sizes(part, str(path), read_part(part, str(path)), KINDS[part])


def find(part: str, given: str, default: str, target: str, proj: str) -> Source:
    """The source of a part: a path, or a repo whose files are looked up."""
    path = Path(os.path.expanduser(given))
    if given and path.exists():
        shards = (
            names_in_index(part, path / WEIGHTS[0])
            if (path / WEIGHTS[0]).is_file()
            else []
        )
        files = [
            f
            for f in (path.iterdir() if path.is_dir() else [path])
            if f.is_file()
            and (not shards or f.name in shards or f.suffix in (".json", ".model"))
        ]
        for file in files:
            start_of(
                file
            )  # raises InputError for a web page or a Git LFS pointer in its place
        check_local(part, path)
        return Source(
            part, str(path), target, [], {f: (f.stat().st_size, 0) for f in files}
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo := given or default):
        raise InputError(
            f"--{part}={given}: there is no such path, and it is no repo, OWNER/NAME"
        )
    names, files = names_in_repo(part, repo, proj), {}
    for info in (look_up(part, repo, name) for name in names):
        begun, size = Path(f"{info.local_path}.incomplete"), info.file_size or 0
        left = size - (begun.stat().st_size if begun.exists() else 0)
        files[Path(info.local_path)] = size, left if info.will_download else 0
    return Source(part, repo, target, names, files)


def as_text(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.2f} MB"


def total(files: dict[Path, tuple[int, int]], which: int = 0) -> int:
    return sum(sizes[which] for sizes in files.values())


def announce(sources: list[Source]):
    """Print what will be fetched and made. Raises InputError if a disk is too small for it."""
    files = {}
    for s in sources:
        size, cached = total(s.files), total(s.files) - total(s.files, 1)
        where = (
            f"{hub().constants.ENDPOINT}/{s.place}, {as_text(cached)} cached"
            if s.names
            else s.place
        )
        print(
            printable(
                f"{s.part:8}{s.target} <- {len(s.files)} files, {as_text(size)}: {where}"
            )
        )
        files |= s.files  # vision and qformer share some
    needs, disks = (
        {"weights": total(files)},
        {},
    )  # a conversion is at most as large as its source
    if missing := total(files, 1):
        needs[hub().constants.HF_HUB_CACHE] = missing
    for name, n in needs.items():
        folder = Path(name).absolute()
        existing = next(p for p in (folder, *folder.parents) if p.exists())
        disks.setdefault(existing.stat().st_dev, []).append(
            (f"at most {as_text(n)} in {name}", n, existing)
        )
    for uses in disks.values():
        texts, sizes, (folder, *_) = zip(*uses)
        free = shutil.disk_usage(folder).free
        what = f"{' and '.join(texts)}; free: {as_text(free)}"
        if sum(sizes) > free:
            raise InputError(
                f"needed: {what}; make room, or put the cache on another disk with HF_HOME"
            )
        print(f"disk    {what}")


def make(source: Source):
    """Fetch a part, and convert it where it is not converted."""
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


def try_out(run: str, llama: str):
    """Measure the perplexity and ask about a picture. A bad answer gets a warning, with a likely cause."""
    talk = chat.Chat(*chat.load(chat.Options(ckpt=run, temperature=0.0, check=True)))
    talk.add_image(str(ROOT / "assets/tiny/example.png"))
    answer = "".join(talk.ask(INSTRUCTIONS[0]))
    print(f"{INSTRUCTIONS[0]} (assets/tiny/example.png)\n{printable(answer)}")
    if (
        is_fragment(answer, "description")
        or repeats_itself(answer)
        or not talk.turns[-1].ended
    ):
        broken = (
            talk.model.perplexity((ROOT / "assets/paragraph.txt").read_text().strip())
            > 100
        )
        cause = (
            f"broken LLaMA weights; remove {llama} and its download in the hub's cache"
            if broken
            else "a projection of another LLaMA (Vicuna v1.1 or v1.5 instead of v0, 7B with 13B)"
        )
        print(
            f"warning: this answer is a fragment or repeats itself: likely {cause}",
            file=sys.stderr,
        )


def main(argv: list[str]):
    (name,), given = parse_args(argv, __doc__, "|".join(RECIPES), Options)
    o, recipe = (
        override(Options(), given),
        RECIPES[check_name(name, RECIPES, "command line")],
    )
    path, run = os.path.relpath(ROOT / f"configs/{recipe.config}.py"), f"out/{name}"
    proj, by_hand = (
        f"{run}/proj.safetensors" if recipe.proj else "",
        f"weights/{recipe.proj}",
    )
    config = load_config(path, recipe.settings | {"out_dir": run, "proj": proj})
    official = (
        f"https://drive.google.com/file/d/{recipe.drive}, to be saved as {by_hand}"
    )
    repos = {
        "vision": BLIP2,
        "qformer": BLIP2,
        "llama": recipe.llama,
        "proj": recipe.mirror,
    }
    if surplus := [
        part for part, place in vars(o).items() if place and not getattr(config, part)
    ]:
        raise InputError(f"--{surplus[0]}: {name} has no {surplus[0]}; leave it out")
    if proj and not os.path.exists(proj):
        refuse_to_overwrite(config)
    sources = []
    for part, place in vars(o).items():
        target = getattr(config, part)
        if os.path.exists(target):
            if place:  # perhaps of this very command, which was stopped
                print(
                    f"note: {target} exists: --{part}={place} is not read again",
                    file=sys.stderr,
                )
            print(f"{part:8}{target}: kept; remove it to have it made again")
            continue
        if part == "proj" and target and not place:
            place = by_hand * os.path.exists(by_hand)
            way = (
                f"from {recipe.mirror}, a mirror that is not official"
                if recipe.mirror
                else "by hand"
            )
            print(f"proj    {by_hand if place else f'{way}; official: {official}'}")
        if target and (place or repos[part]):
            sources.append(find(part, place, repos[part], target, recipe.proj))
    if sources:
        announce(sources)
    for source in sources:
        make(source)
    if os.path.exists(proj):
        if not os.path.exists(f"{run}/config.json"):
            start_folder(config)
        try:
            try_out(run, config.llama)
        except InputError as e:
            raise InputError(
                f"{e}; remove what was made from a wrong source, and start again"
            ) from e
        return print(f"python {os.path.relpath(ROOT / 'chat.py')} PICTURE --ckpt={run}")
    check_english(MiniGPT4.from_files(None, None, config.llama))
    if recipe.proj:
        raise InputError(
            f"the projection is missing: fetch {official}; the same command then continues"
        )
    print(f"python {os.path.relpath(ROOT / 'train.py')} {path}")


if __name__ == "__main__":
    run_main(main)
