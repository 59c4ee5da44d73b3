"""What lies on disk -> samples: tar shards, JSON rows, lists of paths."""

import glob
import json
import os
import re
import tarfile
from collections import namedtuple
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from torch.utils.data import get_worker_info
from tqdm import tqdm

from plumbing.console import InputError, note
from plumbing.files import start_of


class BadSample(Exception):
    """A sample that cannot be used. The message names the kind of fault; samples are counted by it."""


class Member(namedtuple("Member", "tar offset size")):
    """A file inside a tar file."""

    def read(self) -> bytes:
        tar = open_tar(self.tar, os.getpid())
        tar.seek(self.offset)
        content = tar.read(self.size)
        if len(content) < self.size:
            raise BadSample("missing in its tar file")
        return content


@lru_cache(maxsize=64)
def open_tar(path: str, process: int):
    return open(
        path, "rb", buffering=0
    )  # once per process: a child would share its parent's position


class Sample(NamedTuple):
    """What a source holds: a caption of pictures, a conversation (perhaps about pictures), or plain text."""

    images: list[str | Member] = []
    caption: str | None = None
    turns: list[tuple[str, str]] | None = None  # (user, assistant)
    text: str | None = None
    context: str = ""  # before the text; read, but not predicted
    is_marked: bool = False  # <image> in the turns says where each picture stands


class Shards:
    """Tar files as img2dataset writes them: KEY.jpg with KEY.json ({"caption": ...}) or KEY.txt beside it.
    Sample counts come from the folder's index.json or *_stats.json, or else from the tar headers."""

    def __init__(self, paths: list[str]):
        self.paths, known = paths, {}
        for folder in {Path(p).parent for p in paths}:
            for file in [*folder.glob("*_stats.json"), folder / "index.json"]:
                with suppress(Exception):  # there is none, or it is of another form
                    content = start_of(file) and json.loads(file.read_bytes())
                    found = content.get(
                        "samples", {f"{file.stem[:-6]}.tar": content.get("successes")}
                    )
                    known |= {
                        folder / name: n
                        for name, n in found.items()
                        if type(n) is int and 0 < n < 1e6
                    }
        self.counts, faults = [], []
        for p in tqdm(paths, desc="reading tar headers", delay=1):
            try:
                self.counts.append(known.get(Path(p)) or len(index_tar(p)))
            except InputError as e:
                self.counts.append(0)
                faults.append(e)
        if faults and not sum(self.counts):
            raise faults[0]
        if faults:
            note(
                f"warning: {len(faults):,} of {len(paths):,} shards are left out, the first is {faults[0]}"
            )
        self.content = [[Path(p).parts[-2:], n] for p, n in zip(paths, self.counts)]

    def describe(self, shard: int, row: int) -> str:
        """Where a sample is, for messages: "data/00000.tar:000001234"."""
        name = f"sample {row}"
        with suppress(InputError, IndexError):  # if the shard is broken
            name = index_tar(self.paths[shard])[row][0]
        return f"{self.paths[shard]}:{name}"

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        shard, row = place
        table = index_tar(self.paths[shard])
        if row >= len(table):
            raise BadSample("missing in its tar file")
        _, picture, text, plain = table[row]
        if not (picture and picture.size and text and text.size):
            raise BadSample("no caption" if picture and picture.size else "no picture")
        content = {} if text is plain else json.loads(text.read())
        if plain and content.get("caption") is None:
            content = {"caption": plain.read().decode("utf-8-sig", "replace")}
        return Sample([picture], content["caption"])


@lru_cache(maxsize=64)
def index_tar(
    path: str,
) -> list[tuple[str, Member | None, Member | None, Member | None]]:
    """A tar's samples (key, picture, .json or else .txt, .txt), also behind damaged blocks."""
    start_of(path)
    samples: dict[str, dict[str, Member]] = {}
    end, is_damaged = 0, False
    try:
        with tarfile.open(path, "r:", ignore_zeros=True) as tar:
            for m in tar:
                is_damaged, end = (
                    is_damaged or m.offset - end > 20480,
                    m.offset_data + m.size,
                )
                key, _, kind = m.name.rpartition(".")
                if not m.isfile() or os.path.basename(key).startswith(
                    "._"
                ):  # a folder, or a Mac's notes
                    continue
                samples.setdefault(key, {})[kind.lower()] = Member(
                    path, m.offset_data, m.size
                )
    except (OSError, tarfile.TarError) as e:
        if not samples:
            raise InputError(
                f"{path}: not a readable tar file ({e}); fetch it again or leave it out"
            ) from e
    if not samples:
        raise InputError(f"{path}: no samples in it; if it is compressed, unpack it")
    if (
        is_damaged or not 512 <= os.path.getsize(path) - end <= 20480
    ) and not get_worker_info():
        note(f"warning: {path}: cut or damaged, samples may be missing; fetch it again")
    return [
        (
            key,
            next(
                (files[k] for k in ("jpg", "jpeg", "png", "webp") if k in files), None
            ),
            files.get("json") or files.get("txt"),
            files.get("txt"),
        )
        for key, files in samples.items()
    ]


class Rows:
    """A .jsonl's lines, LLaVA's .json, or a cc_sbu_align's annotations: {"image_id": "2", "caption": ...} for
    image/2.jpg, {"image": path, "caption": ...}, {"conversation": [{"user": ...}, {"assistant": ...}, ...]}
    or LLaVA's {"conversations": [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", ...}, ...]}
    with or without "image": path or paths, or {"text": ..., "context": ...}, to predict the text."""

    def __init__(self, path: Path):
        self.path = path
        start_of(path)
        if path.suffix == ".jsonl":
            lines = path.read_text("utf-8-sig", "surrogateescape").split("\n")
            self.rows = [
                (f"line {i}", line) for i, line in enumerate(lines, 1) if line.strip()
            ]
        else:
            try:
                rows = json.loads(path.read_bytes())
                is_llava = path.name != "filter_cap.json" and isinstance(rows, list)
                rows = map(json.dumps, rows) if is_llava else rows["annotations"][:]
            except (ValueError, KeyError, TypeError, RecursionError) as e:
                raise InputError(
                    f"{path}: no JSON list or `annotations` ({e}); JSON lines: .jsonl"
                ) from e
            self.rows = [(f"annotation {i}", row) for i, row in enumerate(rows, 1)]
        self.counts, self.content = [len(self.rows)], self.rows

    def describe(self, shard: int, row: int) -> str:
        return f"{self.path}, {self.rows[row][0]}"

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        row = self.rows[place[1]][1]
        row = json.loads(row) if isinstance(row, str) else row
        is_llava, folder, names = (
            "conversations" in row,
            self.path.parent,
            row.get("image") or [],
        )
        places = ("images", "image", "") if is_llava else ("",)
        paths = [
            [str(folder / place / name) for place in places]
            for name in ([names] if isinstance(names, str) else names)
        ]
        if "image_id" in row:
            paths = [
                [
                    f"{folder}/image/{row['image_id']}.{suffix}"
                    for suffix in ("jpg", "png", "jpeg")
                ]
            ]
        images = [
            next(filter(os.path.exists, some), some[0]) if some[1:] else some[0]
            for some in paths
        ]
        if not is_llava and "conversation" not in row:
            if row.get("text") is not None and (
                images or type(row.get("context", "")) is not str
            ):
                raise BadSample(
                    "a text with a picture (name it caption), or a context that is no text"
                )
            return Sample(
                images,
                row.get("caption"),
                text=row.get("text"),
                context=row.get("context", ""),
            )
        spoken = (
            [
                ({"human": "user", "gpt": "assistant"}.get(turn["from"]), turn["value"])
                for turn in row["conversations"]
            ]
            if is_llava
            else [next(iter(turn.items())) for turn in row["conversation"]]
        )
        roles, texts = zip(*spoken)
        if list(roles) != ["user", "assistant"] * (len(roles) // 2):
            raise BadSample("user and assistant do not alternate, the assistant last")
        users, answers = list(texts[::2]), texts[1::2]
        if not is_llava:
            return Sample(images, turns=list(zip(users, answers)))
        if images and not any("<image>" in user for user in users):
            users[0] = f"<image>{users[0]}"
        if sum(user.count("<image>") for user in users) != len(images):
            raise BadSample("not as many <image> as pictures")
        return Sample(
            images,
            answers[0] if images and len(answers) == 1 else None,
            list(zip(users, answers)),
            is_marked=True,
        )


def open_source(path: str) -> Shards | Rows:
    """The source at a path of the config's `data`."""
    file, braces = Path(path), re.fullmatch(r"(.*)\{(\d{1,7})\.\.(\d{1,7})\}(.*)", path)
    rows = file if file.suffix in (".jsonl", ".json") else file / "filter_cap.json"
    if rows.is_file():
        source = Rows(rows)
    else:
        if file.suffix == ".txt" and file.is_file():
            lines = file.read_text("utf-8-sig", "surrogateescape").splitlines()
            shards = [line.strip() for line in lines if line.strip()]
        elif braces:  # "a{08..10}.tar": a08.tar, a09.tar, a10.tar
            before, first, last, after = braces.groups()
            shards = [
                f"{before}{i:0{len(first)}d}{after}"
                for i in range(int(first), int(last) + 1)
            ]
        else:
            shards = sorted(glob.glob(f"{path}/*.tar" if file.is_dir() else path))
        missing = dict.fromkeys(shard for shard in shards if not Path(shard).exists())
        if 0 < len(missing) < len(shards):  # downloads of LAION always have holes
            what = f"{len(missing):,} of {len(shards):,} shards are missing and left out, the first is"
            note(f"warning: {path}: {what} {next(iter(missing))}")
        source = Shards([shard for shard in shards if shard not in missing])
    if sum(source.counts) == 0:
        there = "" if file.exists() else ", for nothing is there"
        raise InputError(
            f"data {path}: no samples{there}; give *.tar, a .txt or folder of them, a folder "
            "with filter_cap.json, a .jsonl, or LLaVA's .json"
        )
    return source
