"""Caption many images into a .jsonl that configs/finetune_own.py can train on.

    python tools/caption.py photos --out=captions.jsonl
    python tools/caption.py a.png "photos/**/*.jpg" more.txt --ckpt=out/stage2

PICTURE is an image, a folder (only the images directly in it), a glob (** includes
subfolders) or a .txt file with one path per line. Each line of --out is {"image": ...,
"caption": ...}, with the path relative to the folder of --out. The same command
continues a stopped run: images that already have a line are skipped. It needs the same
model and options, which are kept in captions.settings.json. Remove the file to start
over. Images that fail are listed in captions.errors.jsonl; --retry tries them again.
"""

import glob
import json
import os
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import chat
from configs.prompts import is_end, stop_sequences, visible_answer
from plumbing.console import InputError, note, printable, progress, run_main, set_plain
from plumbing.files import SUFFIXES, append_row, lock, read_json, read_rows, replacing
from plumbing.options import option, read_options
from vision import load_image


@dataclass(frozen=True)
class Options(chat.Options):
    prompt: str = option("Describe this image in detail.", "question about each image")
    temperature: float = option(0.0, "sampling temperature; 0: greedy", least=0)
    out: str = option("captions.jsonl", "file to write, or to continue")
    batch_size: int = option(8, "images captioned together", least=1)
    retry: bool = option(False, "retry images that failed")


ROW_START = b'{"image": '
# The options that captions depend on
RECORDED = (
    "prompt",
    "template",
    "answer_end",
    "dtype",
    "temperature",
    "top_p",
    "repetition_penalty",
    "num_beams",
    "length_penalty",
    "min_length",
    "max_new_tokens",
    "seed",
)

# Every `talk` is a chat.Chat, every `o` the Options.

# ---- files ---------------------------------------------------------------------------


def list_pictures(name):
    """The paths of an argument PICTURE. Raises InputError if none of them exists."""
    if os.path.isfile(name) and name.endswith(".txt"):
        text = Path(name).read_text("utf-8-sig", "surrogateescape")
        paths = [line for line in text.splitlines() if line.strip()]
    elif os.path.isfile(name):
        paths = [name]
    else:
        is_folder = os.path.isdir(name)
        pattern = os.path.join(glob.escape(name), "*") if is_folder else name
        found = sorted(glob.glob(pattern, recursive=True))
        paths = [path for path in found if path.lower().endswith(SUFFIXES)]
        if is_folder:
            note_left_out(name, set(found) - set(paths))
    if not any(map(os.path.isfile, paths)):
        raise InputError(
            f"{name}: no pictures; give a picture, a folder, a glob, or a .txt that "
            "lists them"
        )
    return paths


def note_left_out(folder, others):
    """Say what else is in a folder of pictures."""
    kinds = Counter(Path(path).suffix for path in others if os.path.isfile(path))
    left_out = [f"{n} {suffix or 'without suffix'}" for suffix, n in kinds.items()]
    n_folders = sum(map(os.path.isdir, others))
    if n_folders:
        pattern = os.path.join(folder, "**")
        left_out.append(f'{n_folders} subfolders ("{pattern}" takes their pictures)')
    if left_out:
        note(f"note: {folder}: left out: {', '.join(left_out)}")


def written_path(path, folder):
    """A picture's path from `folder`, with slashes; absolute if on another drive."""
    parent, name = os.path.split(path)
    path = os.path.join(os.path.realpath(parent), name)
    with suppress(ValueError):  # another drive
        path = os.path.relpath(path, os.path.realpath(folder))
    return Path(path).as_posix()


def read_lines(path):
    """{picture: its line} of a .jsonl; {} if there is no file.

    A last line without its newline gets it, or is removed if it was cut.
    """
    if not path.is_file():
        return {}
    rows, rest = read_rows(path)
    lines = {_picture_of(line): line for _, line in rows}
    if _picture_of(rest):
        lines[_picture_of(rest)] = rest
        with path.open("ab") as file:
            file.write(b"\n")
    elif rest.rstrip().endswith(b"}"):
        raise InputError(f"{path}: its last line is not JSON; mend it")
    elif not ROW_START.startswith(rest[: len(ROW_START)]):
        raise InputError(f"{path}: not a file of captions; give another --out")
    elif rest:
        os.truncate(path, path.stat().st_size - len(rest))
    lines.pop("", None)
    return lines


def _picture_of(line):
    """The picture that a line is about; "" for any other line."""
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        return str(json.loads(line)["image"])
    return ""


def forget_failures(errors, pictures):
    """Remove the lines of these pictures; those of others stay."""
    failed = read_lines(errors)
    kept = [line + b"\n" for image, line in failed.items() if image not in pictures]
    if failed:
        errors.write_bytes(b"".join(kept))


# ---- answers -------------------------------------------------------------------------


def start_chat(options):
    """A conversation with a run. Raises InputError if it sees no pictures."""
    talk = chat.Chat(*chat.load(options))
    if talk.model.vision is None:
        raise InputError(
            f"{options.ckpt}: this run sees no pictures; give one with vision"
        )
    return talk


def batches(items, size):
    """The items in lists of `size`; the last may be shorter."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def prompt_ids(talk, question):
    """The ids of a question about one picture, in a conversation of its own."""
    question = question.encode("utf-8", "replace").decode()  # it may be no UTF-8
    picture = chat.Picture("", 1, torch.zeros(0))
    tokens, _ = talk.prompt(chat.Turn(question, pictures=(picture,)))
    return tokens


@torch.no_grad()
def encode(talk, images):
    """A list of B pictures, uint8 (3, S, S) -> (B, N, d_llama)."""
    return talk.model.encode_image(torch.stack(images).to(talk.options.device))


def answers(talk, prompts, embeds):
    """Answer B prompts (ids) of one length, each about one picture, (B, N, d_llama).

    Returns [(answer, whether it is complete)].
    """
    o, model, end = talk.options, talk.model, talk.template.end
    stop = stop_sequences(model.tokenizer, end)
    if o.num_beams > 1:
        rows = []
        for ids, picture in zip(prompts, embeds.split(1)):
            rows.append(list(talk.generate(ids, picture, stop)))
    else:
        rows = model.generate_batch(
            prompts,
            embeds,
            stop,
            max_new_tokens=o.max_new_tokens,
            repetition_penalty=o.repetition_penalty,
            min_length=o.min_length,
            temperature=o.temperature,
            top_p=o.top_p,
            generator=talk.generator,
        )
    return [
        (visible_answer(model.tokenizer, ids, end), is_end(ids, stop)) for ids in rows
    ]


# ---- main ----------------------------------------------------------------------------


def load_images(paths, image_size, bad):
    """{name: picture} of [(name, path)]; unreadable ones go to the file `bad`."""
    images = {}
    for name, path in paths:
        try:
            images[name] = load_image(path, image_size, smallest=2)
        except InputError as e:
            append_row(bad, image=name, error=str(e))
    return images


def caption_all(talk, o, paths, good, bad):
    """Append the captions of {name: path} to the file `good`, failures to `bad`.

    Returns the number of captions that were cut off.
    """
    prompt = prompt_ids(talk, o.prompt)
    n_cut = 0
    groups = batches([*paths.items()], o.batch_size)
    for group in progress(groups, f"{len(paths):,} pictures", unit="batch"):
        images = load_images(group, talk.model.image_size, bad)
        if not images:
            continue
        try:
            embeds = encode(talk, [*images.values()])
            captions = answers(talk, [prompt] * len(images), embeds)
        except torch.OutOfMemoryError as e:
            raise InputError(
                f"--batch_size={o.batch_size}: too much for the GPU; lower it"
            ) from e
        for name, (text, ended) in zip(images, captions):
            if text:
                append_row(good, image=name, caption=text)
            else:
                append_row(bad, image=name, error="the answer is empty")
            if not ended:
                n_cut += 1
    return n_cut


def check_settings(talk, out, is_new):
    """Record beside a file of captions what they depend on.

    Raises InputError if captions of something else are in it.
    """
    settings = {"model": talk.model.fingerprints}
    settings |= {name: getattr(talk.options, name) for name in RECORDED}
    path = out.with_suffix(".settings.json")
    if path.is_file() and not is_new:
        known = read_json(path)
        for name, value in settings.items():
            if known.get(name, value) != value:
                raise InputError(
                    f"{out}: written with {name} = {known[name]!r}, not {value!r}; "
                    "give another --out"
                )
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(settings, indent=1))


def main(argv):
    names, o, _ = read_options(argv, __doc__, "PICTURE ...", Options())
    set_plain(o.plain)
    out = Path(o.out)
    errors = out.with_suffix(".errors.jsonl")
    pictures = {}
    for name in names:
        for path in list_pictures(name):
            pictures[written_path(path, out.parent)] = path
    if not pictures or out.suffix != ".jsonl":
        raise InputError(
            f"{len(pictures)} pictures, --out={o.out}: "
            "give pictures, and a .jsonl to write to"
        )
    if not out.parent.is_dir():
        raise InputError(f"{out.parent}: there is no such folder for --out; make it")

    failed = read_lines(errors).keys()
    done = read_lines(out).keys()
    names = pictures.keys() - done - (set() if o.retry else failed)
    new = {name: pictures[name] for name in sorted(names)}
    if not new:
        n_failed = len(pictures.keys() & failed)
        what = f"nothing is left to do; {n_failed} have failed"
        print(printable(f"{out}: {what}, --retry tries them again"))
        return
    talk = start_chat(o)
    with open(out, "a") as good:
        lock(good, f"{out}: another process writes to it; give another --out")
        check_settings(talk, out, is_new=not done)
        if o.retry:
            forget_failures(errors, pictures)
        with open(errors, "a") as bad:
            n_cut = caption_all(talk, o, new, good, bad)
    print(
        f"{len(read_lines(out))} captions ({n_cut} new ones cut off), "
        f"{len(read_lines(errors))} failures"
    )


if __name__ == "__main__":
    run_main(main)
