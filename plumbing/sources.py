"""Data on disk -> samples: tar shards, files of JSON rows, lists of paths."""

import hashlib
import json
import os
import re
import tarfile
from collections import Counter, deque
from contextlib import contextmanager, suppress
from functools import lru_cache
from glob import escape, glob
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import UnidentifiedImageError
from torch.utils.data import get_worker_info

from plumbing.console import InputError, note, printable, progress
from plumbing.files import read_json, start_of

FEW = 200  # samples; the share of bad ones among fewer says little
RECENT = 1000  # samples of a source, to notice that it has vanished
# What malformed rows make our readers raise. A NameError or an AttributeError is ours.
MALFORMED = (ValueError, TypeError, LookupError, StopIteration, RecursionError)


class BadSample(Exception):
    """A sample that cannot be used. It is counted by the `kind` of its fault."""

    def __init__(self, kind: str, message: str = ""):
        super().__init__(message or kind)
        self.kind = kind


# Kinds of faults by the exceptions that tell of them
KINDS = (
    (FileNotFoundError, "missing file"),
    (PermissionError, "file without permission"),
    (UnidentifiedImageError, "not a picture"),
    (json.JSONDecodeError, "not valid JSON"),
    (UnicodeError, "not valid text"),
    (KeyError, "missing key"),
)


def kind_of(error: BaseException, other: str) -> str:
    """The kind of an error; `other` if it has none of its own."""
    kinds = [kind for class_, kind in KINDS if isinstance(error, class_)]
    return kinds[0] if kinds else other


@contextmanager
def foreign_bytes():
    """Report errors of other people's files as BadSample."""
    try:
        yield
    except (InputError, OSError) as e:
        kind = kind_of(e.__cause__ or e, "unreadable file")
        raise BadSample(kind, str(e)) from e


class Fault(NamedTuple):
    """What is wrong with a bad sample."""

    kind: str
    message: str  # where the sample is, and why it cannot be used


class Account:
    """Counts the samples that a process has read, the bad ones by kind."""

    def __init__(self, paths: list[str], max_bad_fraction: float):
        self.paths = paths  # of the sources
        self.max_bad_fraction = max_bad_fraction
        self.n_read = self.n_good = 0
        self.skipped = Counter()
        # for each source, whether its last samples were bad
        self.recent = [deque(maxlen=RECENT) for _ in paths]

    def add(self, source: int, n_read: int, faults: list[Fault]):
        """Count samples of a source, and print the first fault of each kind."""
        for kind, message in faults:
            if kind not in self.skipped:
                note(f"skipped, the first of its kind: {message}")
            self.skipped[kind] += 1
        n_good = n_read - len(faults)
        self.n_read += n_read
        self.n_good += n_good
        recent = self.recent[source]
        recent.extend([True] * len(faults))
        recent.extend([False] * n_good)

    @property
    def text(self) -> str:
        n_bad = self.skipped.total()
        kinds = ", ".join(f"{kind} {n}" for kind, n in self.skipped.most_common())
        return printable(f"{n_bad} of {self.n_read} samples cannot be used ({kinds})")

    def check(self, source: int, is_whole_run: bool):
        """Raise InputError if too many are bad: of all, or of a source's last ones."""
        n_bad = self.skipped.total()
        is_enough = self.n_read >= FEW or (is_whole_run and self.n_good == 0)
        if is_enough and n_bad > self.max_bad_fraction * self.n_read:
            raise InputError(
                f"{self.text}, more than max_bad_fraction; fix the data or raise it"
            )
        n_recent = self.recent[source].count(True)
        if n_recent > (1 + self.max_bad_fraction) / 2 * RECENT:
            raise InputError(
                f"{n_recent} of the last {RECENT} samples of {self.paths[source]} "
                "cannot be used; fix the data or raise max_bad_fraction"
            )


class Member(NamedTuple):
    """A file inside a tar file."""

    tar: str
    offset: int  # of its content, in bytes
    size: int  # bytes

    def read(self) -> bytes:
        tar = open_tar(self.tar, os.getpid())
        tar.seek(self.offset)
        content = tar.read(self.size)
        if len(content) < self.size:
            raise BadSample("missing in its tar file")
        return content


@lru_cache(maxsize=64)
def open_tar(path, process):
    """Open a tar file once per process: a child would share its parent's position."""
    return open(path, "rb", buffering=0)


def content_of(image: str | Member) -> str | bytes:
    """A picture for load_image: its path, or the bytes of a file in a tar file."""
    return image if isinstance(image, str) else image.read()


class Sample(NamedTuple):
    """A caption of pictures, a conversation (perhaps about pictures), or plain text."""

    images: list[str | Member] = []
    caption: str | None = None
    turns: list[tuple[str, str]] | None = None  # (user, assistant)
    text: str | None = None
    context: str = ""  # before the text; read, but not predicted
    is_marked: bool = False  # <image> in the turns marks the place of each picture


class Source:
    """A source of samples, of which source[shard, row] is one.

    counts: the number of rows of each shard. content: changes when the samples do.
    read_sample(shard, row): the Sample, of a subclass; may raise any of MALFORMED.
    """

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        """Raises BadSample."""
        try:
            with foreign_bytes():
                return self.read_sample(*place)
        except MALFORMED as e:
            kind = kind_of(e, "malformed row")
            raise BadSample(kind, f"{kind}: {e}") from e

    def places(self):
        """Yield (shard, row) of all samples."""
        for shard, n_rows in enumerate(self.counts):
            for row in range(n_rows):
                yield shard, row

    def digest(self) -> str:
        """12 letters that identify the samples."""
        content = json.dumps(self.content).encode()
        return hashlib.sha256(content).hexdigest()[:12]


def check_text(text):
    """Raise TypeError or UnicodeEncodeError for what no tokenizer accepts."""
    if not isinstance(text, str):
        raise TypeError(f"{text!r:.50} is not a text")
    text.encode()  # raises for half a surrogate pair


def check_caption(caption):
    if not isinstance(caption, str):
        raise BadSample("caption is not a text")
    check_text(caption)


# ---- tar shards --------------------------------------------------------------------

PICTURES = ("jpg", "jpeg", "png", "webp")
SUFFIXES = (*PICTURES, "json", "txt")
NO_FILE = (0, 0)  # offset and size
# A tar file ends with at least one block of zeros, padded to a whole record.
BLOCK, MOST_PADDING = 512, 20_480  # bytes
MOST_SAMPLES = 1_000_000  # of a shard; an index that says more is wrong


class TarTable:
    """The samples of a tar file, compactly: a data worker keeps 64 tables of 10,000.

    table[row] is (key, {suffix: Member}).
    """

    def __init__(self, path, files):
        self.path = path
        self.keys = list(files)
        # offset and size of the file with each suffix: (samples, 6, 2)
        self.spans = np.array(list(files.values()), dtype=np.int64)

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, row):
        files = {}
        for suffix, (offset, size) in zip(SUFFIXES, self.spans[row].tolist()):
            if size:
                files[suffix] = Member(self.path, offset, size)
        return self.keys[row], files


@lru_cache(maxsize=64)
def index_tar(path: str) -> TarTable:
    """The samples of a tar file, also those after damaged blocks.

    Raises InputError where there are none.
    """
    start_of(path)
    n_bytes = os.path.getsize(path)
    files = {}
    end = 0
    has_gap = False
    try:
        with tarfile.open(path, "r:", ignore_zeros=True) as tar:
            for member in tar:
                if member.offset - end > MOST_PADDING:
                    has_gap = True
                end = member.offset_data + member.size
                add_member(files, member, n_bytes)
    except (OSError, tarfile.TarError) as e:
        if not files:
            raise InputError(
                f"{path}: not a readable tar file ({e}); fetch it again or leave it out"
            ) from e
    if not files:
        raise InputError(f"{path}: no samples in it; if it is compressed, unpack it")
    is_whole = not has_gap and BLOCK <= n_bytes - end <= MOST_PADDING
    if not is_whole and not get_worker_info():
        note(f"warning: {path}: cut or damaged, samples may be missing; fetch it again")
    return TarTable(path, files)


def add_member(files, member: tarfile.TarInfo, n_bytes):
    """Add a member of a tar file to {key: (offset, size) for each of SUFFIXES}.

    An empty file is the same as none.
    """
    key, _, suffix = member.name.rpartition(".")
    is_note_of_mac = os.path.basename(key).startswith("._")
    if not member.isfile() or is_note_of_mac:
        return
    spans = files.setdefault(key, [NO_FILE] * len(SUFFIXES))
    suffix = suffix.lower()
    # A damaged header may say any size.
    if suffix in SUFFIXES and 0 < member.size <= n_bytes:
        spans[SUFFIXES.index(suffix)] = (member.offset_data, member.size)


def split_files(files: dict[str, Member]):
    """A sample's picture and the file of its caption, None for a missing one."""
    picture = next((files[suffix] for suffix in PICTURES if suffix in files), None)
    return picture, files.get("json") or files.get("txt")


class Shards(Source):
    """Tar files as img2dataset writes them.

    A sample is KEY.jpg with KEY.json ({"caption": ...}) or KEY.txt beside it. The
    numbers of samples come from a folder's index.json or *_stats.json, or else from
    the tar headers.
    """

    def __init__(self, paths: list[str]):
        self.paths = paths
        self.counts, self.content = [], []
        known = known_counts({Path(path).parent for path in paths})
        faults = []
        for path in progress(paths, "reading tar headers", delay=1):
            try:
                count = known.get(Path(path)) or len(index_tar(path))
            except InputError as e:
                count = 0
                faults.append(e)
            self.counts.append(count)
            self.content.append([Path(path).parts[-2:], count])
        if faults and not any(self.counts):
            raise faults[0]
        if faults:
            note(
                f"warning: {len(faults):,} of {len(paths):,} shards are left out, "
                f"the first is {faults[0]}"
            )

    def describe(self, shard, row) -> str:
        """The place of a sample, for messages: "data/00000.tar:000001234"."""
        name = f"sample {row}"
        with suppress(InputError, OSError, IndexError):  # if the shard is broken
            name, _ = index_tar(self.paths[shard])[row]
        return f"{self.paths[shard]}:{name}"

    def read_sample(self, shard, row):
        table = index_tar(self.paths[shard])
        if row >= len(table):
            raise BadSample("missing in its tar file")
        _, files = table[row]
        return read_tar_sample(files)


def known_counts(folders):
    """{shard: number of its samples}, as far as files in their folders say."""
    known = {}
    for folder in folders:
        for file in [*folder.glob("*_stats.json"), folder / "index.json"]:
            with suppress(InputError, OSError, *MALFORMED):  # missing, or odd
                content = read_json(file)
                shard = file.name.replace("_stats.json", ".tar")
                counts = content.get("samples", {shard: content.get("successes")})
                known |= {
                    folder / name: count
                    for name, count in dict(counts).items()
                    if type(count) is int and 0 < count < MOST_SAMPLES
                }
    return known


def read_tar_sample(files):
    """A picture with its caption: `caption` of the .json, or else the .txt."""
    picture, source = split_files(files)
    if not picture:
        raise BadSample("no picture")
    if not source:
        raise BadSample("no caption")
    caption = None
    if "json" in files:
        # dict() raises for what is no JSON object
        caption = dict(json.loads(source.read())).get("caption")
    if "txt" in files and caption is None:
        caption = files["txt"].read().decode("utf-8-sig", "replace")
    check_caption(caption)
    return Sample([picture], caption)


# ---- files of JSON rows ------------------------------------------------------------


class Rows(Source):
    """A .jsonl file's lines, or the list in LLaVA's .json or cc_sbu_align's JSON.

    `read_row` says which rows there are. Pictures are relative to the file's folder.
    """

    def __init__(self, path: Path):
        start_of(path)
        self.path = path
        # (place in the file, JSON or the object)
        self.rows = read_lines(path) if path.suffix == ".jsonl" else read_list(path)
        self.counts = [len(self.rows)]
        self.content = self.rows

    def describe(self, shard, row) -> str:
        """The place of a sample, for messages: "own/data.jsonl, line 7"."""
        place, _ = self.rows[row]
        return f"{self.path}, {place}"

    def read_sample(self, shard, row):
        _, content = self.rows[row]
        if isinstance(content, str):
            content = json.loads(content)
        return read_row(content, self.path.parent)


def read_lines(path: Path):
    """[(place, line)] of the lines of a text file that are not blank."""
    lines = path.read_text("utf-8-sig", "surrogateescape").split("\n")
    numbered = enumerate(lines, 1)
    return [(f"line {i}", line) for i, line in numbered if line.strip()]


def read_list(path: Path):
    """[(place, row)] of a JSON list, as JSON to save memory, or of `annotations`."""
    try:
        content = json.loads(path.read_bytes())
        if isinstance(content, list):
            rows = [json.dumps(row) for row in content]
        else:
            rows = content["annotations"]
        if not isinstance(rows, list):
            raise TypeError("`annotations` is no list")
    except MALFORMED as e:
        raise InputError(
            f"{path}: no JSON list or `annotations` ({e}); JSON lines: .jsonl"
        ) from e
    return [(f"annotation {i}", row) for i, row in enumerate(rows, 1)]


# One at least is in every row.
KEYS = {"image", "image_id", "caption", "text", "conversation", "conversations"}


def read_row(row, folder) -> Sample:
    """Read a row in the format that its keys tell."""
    if not isinstance(row, dict):
        raise TypeError(f"{row!r:.50} is not a JSON object")
    if not row.keys() & KEYS or "file_name" in row:  # the latter is ImageFolder's
        names = ", ".join(map(str, row))
        raise BadSample(
            "unknown keys",
            f"unknown keys {names:.80}; needed: image and caption, or conversation",
        )
    if "conversations" in row:
        return read_llava(row, folder)
    if "conversation" in row:
        return read_conversation(row, folder)
    if row.get("text") is not None:
        return read_plain_text(row, folder)
    return read_caption(row, folder)


def read_caption(row, folder):
    """{"image": path or paths, "caption": ...}, or cc_sbu_align's "image_id"."""
    images = find_images(row, folder)
    check_caption(row.get("caption"))
    return Sample(images, row["caption"])


def read_plain_text(row, folder):
    """{"text": ..., "context": ...}: the text is to be predicted after its context."""
    if find_images(row, folder):
        raise BadSample("a text with a picture (name it caption)")
    context = row.get("context", "")
    check_text(row["text"])
    check_text(context)
    return Sample(text=row["text"], context=context)


def read_conversation(row, folder):
    """{"conversation": [{"user": ...}, {"assistant": ...}, ...]}, perhaps "image"."""
    messages = []
    for message in row["conversation"]:
        items = dict(message).items()  # raises for what is no JSON object
        messages.append(next(iter(items)))
    turns = pair_up(messages, ("user", "assistant"))
    return Sample(find_images(row, folder), turns=turns)


def read_llava(row, folder):
    """{"conversations": [{"from": "human", "value": "<image>\\nWhat?"}, ...]}.

    The other speaker is "gpt". A single turn about pictures can also be used as their
    caption.
    """
    messages = [(each["from"], each["value"]) for each in row["conversations"]]
    turns = pair_up(messages, ("human", "gpt"))
    images = find_images(row, folder, ("images", "image", ""))
    n_marks = sum(user.count("<image>") for user, _ in turns)
    if images and n_marks == 0:
        user, answer = turns[0]
        turns[0] = (f"<image>{user}", answer)
        n_marks = 1
    if n_marks != len(images):
        raise BadSample("not as many <image> as pictures")
    caption = turns[0][1] if images and len(turns) == 1 else None
    return Sample(images, caption, turns, is_marked=True)


def pair_up(messages, speakers):
    """[("user", "Hi"), ("assistant", "Hello")] -> [("Hi", "Hello")]."""
    roles, texts = zip(*messages)
    if roles != speakers * (len(texts) // 2):
        raise BadSample("user and assistant do not alternate, the assistant last")
    for text in texts:
        check_text(text)
    return list(zip(texts[::2], texts[1::2]))


def find_images(row, folder, places=("",)):
    """The paths of a row's pictures; of several possible ones, the first that exists.

    places: folders beside the file. cc_sbu_align's "image_id": "2" means image/2.jpg
    (or .png, .jpeg).
    """
    if "image_id" in row:
        stem = f"image/{row['image_id']}"
        return [first_existing(folder, f"{stem}.jpg", f"{stem}.png", f"{stem}.jpeg")]
    names = row.get("image") or []
    if isinstance(names, str):
        names = [names]
    images = []
    for name in names:
        candidates = [Path(place, name) for place in places]
        images.append(first_existing(folder, *candidates))
    return images


def first_existing(folder, *names):
    """The path of the first file that exists, or else of the first one."""
    paths = [str(folder / name) for name in names]
    return next(filter(os.path.exists, paths), paths[0])


# ---- the paths of a config's `data` ------------------------------------------------


def open_source(path: str) -> Shards | Rows:
    """The source at a path of the config's `data`. Raises InputError for no samples."""
    file = Path(path)
    rows = file if file.suffix in (".jsonl", ".json") else file / "filter_cap.json"
    source = Rows(rows) if rows.is_file() else Shards(existing_shards(path))
    if sum(source.counts) == 0:
        there = "" if file.exists() else ", for nothing is there"
        raise InputError(
            f"data {path}: no samples{there}; give *.tar, a .txt or folder of them, "
            "a folder with filter_cap.json, a .jsonl, or LLaVA's .json"
        )
    return source


def existing_shards(path):
    """The tar files that a path names, with a warning for missing ones."""
    shards = shard_paths(path)
    existing = list(filter(os.path.exists, shards))
    missing = sorted(set(shards) - set(existing))
    if existing and missing:  # downloads of LAION always have holes
        note(
            f"warning: {path}: {len(missing):,} of {len(shards):,} shards are missing "
            f"and left out, the first is {missing[0]}"
        )
    return existing


def shard_paths(path) -> list[str]:
    """A tar file, a .txt list, a{08..10}.tar, a folder or a glob -> paths."""
    file = Path(path)
    if file.is_dir():
        return sorted(glob(f"{escape(path)}/*.tar"))
    if file.is_file():
        is_list = file.suffix == ".txt"
        return [line.strip() for _, line in read_lines(file)] if is_list else [path]
    braces = re.fullmatch(r"(.*)\{(\d{1,7})\.\.(\d{1,7})\}(.*)", path)
    if not braces:
        return sorted(glob(path))
    before, first, last, after = braces.groups()
    numbers = range(int(first), int(last) + 1)
    return [f"{before}{number:0{len(first)}d}{after}" for number in numbers]
