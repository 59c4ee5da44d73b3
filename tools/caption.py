"""Captions for many pictures, in a .jsonl that configs/finetune_own.py reads.

    python tools/caption.py photos --out=captions.jsonl
    python tools/caption.py a.png "photos/**/*.jpg" more.txt --ckpt=out/stage2 --prompt="What is this?"

PICTURE is a picture, a folder (the pictures directly inside), a glob (** takes subfolders) or a .txt that
lists pictures, one path a line. A line of --out is {"image": path from the folder of --out, "caption": ...}.
A stopped run continues: pictures with a line are skipped. To start over, remove the file. Failures go, as
{"image": ..., "error": ...}, to captions.errors.jsonl beside it; --retry tries these pictures again.
"""

import glob
import json
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import chat
from configs.prompts import is_end, stop_sequences, visible_answer
from plumbing.console import InputError, printable, run_main
from plumbing.files import SUFFIXES, append_row
from plumbing.options import option, override, parse_args
from vision import load_image


@dataclass(frozen=True)
class Options(chat.Options):
    prompt: str = option("Describe this image in detail.", "asked about each picture")
    temperature: float = option(0.0, "0: greedy", least=0)
    out: str = option("captions.jsonl", "the file to write, or to continue")
    batch_size: int = option(8, "pictures captioned together", least=1)
    retry: bool = option(False, "try the pictures that failed again")


def find_pictures(name: str) -> list[str]:
    """The paths that an argument stands for. Raises InputError if none of them exists."""
    paths, pattern = (
        [name],
        os.path.join(glob.escape(name), "*") if os.path.isdir(name) else name,
    )
    if not os.path.isfile(name):
        paths = sorted(
            p
            for p in glob.glob(pattern, recursive=True)
            if p.lower().endswith(SUFFIXES)
        )
    elif name.endswith(".txt"):
        paths = [
            p
            for p in Path(name).read_text("utf-8-sig", "surrogateescape").splitlines()
            if p.strip()
        ]
    if not any(map(os.path.isfile, paths)):
        raise InputError(
            f"{name}: no pictures; give a picture, a folder, a glob, or a .txt that lists them"
        )
    return paths


def written_path(path: str, folder: Path) -> str:
    """A picture's path from `folder`, with slashes; absolute if it is on another drive."""
    path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    with suppress(ValueError):  # another drive
        path = os.path.relpath(path, os.path.realpath(folder))
    return Path(path).as_posix()


def read_lines(path: Path) -> dict[str, bytes]:
    """{picture: its line} of a .jsonl, if there is one. The last is completed, or removed if it was cut."""
    if not path.is_file():
        return {}
    lines, rows = path.read_bytes().split(b"\n"), {}
    for line in lines:
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            rows[str(json.loads(line)["image"])] = line
    if lines[-1] in rows.values():
        path.open("ab").write(b"\n")
    elif lines[-1].rstrip().endswith(b"}"):
        raise InputError(f"{path}: its last line is not JSON; mend it")
    else:
        os.truncate(path, path.stat().st_size - len(lines[-1]))
    return rows


def prompt_ids(talk: chat.Chat, question: str) -> list[int]:
    """The ids of a question about one picture, in a conversation of its own."""
    question = question.encode(
        "utf-8", "replace"
    ).decode()  # a terminal may send what is no text
    return talk.prompt(
        chat.Turn(question, pictures=(chat.Picture("", 1, torch.zeros(0)),))
    )[0]


@torch.no_grad()
def encode(talk: chat.Chat, images: list[torch.Tensor]) -> torch.Tensor:
    """B pictures, uint8 (3, S, S) -> (B, N, d_llama)."""
    return talk.model.encode_image(torch.stack(images).to(talk.options.device))


def answers(
    talk: chat.Chat, prompts: list[list[int]], embeds: torch.Tensor
) -> list[tuple[str, bool]]:
    """B prompts of one length and their pictures, (B, N, d_llama) -> [(answer, whether it is complete)]."""
    o, model, end = talk.options, talk.model, talk.template.end
    stop = stop_sequences(model.tokenizer, end)
    options = {
        "max_new_tokens": o.max_new_tokens,
        "repetition_penalty": o.repetition_penalty,
        "stop": stop,
        "min_length": o.min_length,
    }
    if o.num_beams > 1:
        options |= {"num_beams": o.num_beams, "length_penalty": o.length_penalty}
        rows = [
            model.beam_search(ids, x.unsqueeze(0), **options)
            for ids, x in zip(prompts, embeds)
        ]
    else:
        options |= {"temperature": o.temperature, "top_p": o.top_p}
        rows = model.generate_batch(
            prompts, embeds, generator=talk.generator, **options
        )
    return [
        (visible_answer(model.tokenizer, ids, end), is_end(ids, stop)) for ids in rows
    ]


def main(argv: list[str]):
    names, given = parse_args(argv, __doc__, "PICTURE ...", Options)
    o = override(Options(), given)
    out, errors, n_cut = Path(o.out), Path(o.out).with_suffix(".errors.jsonl"), 0
    pictures = {
        written_path(path, out.parent): path
        for name in names
        for path in find_pictures(name)
    }
    if not pictures or out.suffix != ".jsonl":
        raise InputError(
            f"{len(pictures)} pictures, --out={o.out}: give pictures, and a .jsonl to write to"
        )
    if not out.parent.is_dir():
        raise InputError(f"{out.parent}: there is no such folder for --out; make it")
    new = sorted(
        pictures.keys()
        - read_lines(out).keys()
        - (set() if o.retry else read_lines(errors).keys())
    )
    if not new:
        n_failed = len(pictures.keys() & read_lines(errors).keys())
        done = f"{out}: nothing is left to do; {n_failed} have failed, --retry tries them again"
        return print(printable(done))
    talk = chat.Chat(*chat.load(o))
    if talk.model.vision is None:
        raise InputError(f"{o.ckpt}: this run sees no pictures; give one with vision")
    if o.retry and (
        failed := read_lines(errors)
    ):  # the failures of other pictures stay
        errors.write_bytes(
            b"".join(
                line + b"\n" for image, line in failed.items() if image not in pictures
            )
        )
    with open(out, "a") as good, open(errors, "a") as bad:
        tokens = prompt_ids(talk, o.prompt)
        for start in tqdm(
            range(0, len(new), o.batch_size), f"{len(new):,} pictures", unit="batch"
        ):
            loaded = {}
            for image in new[start : start + o.batch_size]:
                try:
                    loaded[image] = load_image(
                        pictures[image], talk.model.image_size, smallest=2
                    )
                except InputError as e:
                    append_row(bad, image=image, error=str(e))
            try:
                embeds = encode(talk, [*loaded.values()]) if loaded else ()
                captions = (
                    answers(talk, [tokens] * len(loaded), embeds) if loaded else ()
                )
            except torch.OutOfMemoryError as e:
                raise InputError(
                    f"--batch_size={o.batch_size}: too much for the GPU; lower it"
                ) from e
            for image, (text, ended) in zip(loaded, captions):
                result = {"caption": text} if text else {"error": "the answer is empty"}
                append_row(good if text else bad, image=image, **result)
                n_cut += not ended
    print(
        f"{len(read_lines(out))} captions ({n_cut} new ones cut off), {len(read_lines(errors))} failures"
    )


if __name__ == "__main__":
    run_main(main)
