"""Image-text data: sources on disk, the prompt templates, and the batches that the model is trained on.

A sequence is a plain list of ids in which IMAGE (-1) stands once for each image token; training and chat
build theirs here and nowhere else. Sequences are padded on the right, so causal attention needs no mask.

The order of the samples is a function of the seed alone: worker processes only fetch what it names, ranks
take disjoint slices of the same global batch, and a resumed run goes on where it was without reading from the
start.

    python data.py configs/stage2.py        shows the first samples as the model gets them

Quirks kept from the original: each text segment and each answer is tokenised on its own and so gets its own
leading space piece; an answer that is cut loses its end symbol; `###` directly after a text is other ids than
after a space.
"""

import functools
import glob
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from tqdm import tqdm

from configs.schema import Config, InputError
from llama import IGNORE, IMAGE, Tokenizer
from vision import load_image

# Large tensors then come from Linux in huge pages: a batch of pictures becomes float32 in half the time.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# ---- prompts -----------------------------------------------------------------------------------------------

SYSTEM = ("Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I "
          "provide it to you. Please answer my questions.")
INSTRUCTIONS = (  # one is drawn for each sample of stage 2
    "Describe this image in detail.",
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?",
)
BOS, EOS = 1, 2


@dataclass(frozen=True)
class Template:
    """How a conversation is written down. A segment is a text, BOS (a control token) or IMAGE (a picture)."""

    training: tuple[str, str]         # around the user's message in stage 2
    chat_start: tuple[str | int, ...]  # before the first message in chat
    user: tuple[str | int, ...]       # before each message of the user
    assistant: str                    # between the message and the answer
    end: str                          # after each answer; it is what the model learns to end with


TEMPLATES = {
    "vicuna": Template(("###Human: ", " ###Assistant: "), (SYSTEM, "###"), ("Human: ",),
                       "###Assistant: ", "###"),
    "llama2": Template(("[INST] ", " [/INST] "), (SYSTEM,), (BOS, "[INST] "), " [/INST] ", "</s>"),
}


def user_message(text: str, n_images: int) -> list[str | int]:
    """A user's words with pictures before them, as segments: ["<Img>", IMAGE, "</Img> ", text]."""
    return ["<Img>", IMAGE, "</Img> "] * n_images + [text]


def encode_segments(segments: list[str | int], tokenizer: Tokenizer, n_image_tokens: int) -> list[int]:
    """Segments -> ids. Texts that meet are one segment; IMAGE becomes n_image_tokens places."""
    ids, text = [], ""
    for segment in [*segments, None]:
        if isinstance(segment, str):
            text += segment
            continue
        ids += tokenizer.encode(text) if text else []
        text = ""
        if segment is not None:
            ids += [IMAGE] * n_image_tokens if segment == IMAGE else [segment]
    return ids


def chat_segments(turns: list[tuple[list[str | int], str | None]], template: Template) -> list[str | int]:
    """Turns of (user message, answer), the last answer None -> segments, laid out as in chat."""
    segments = [BOS, *template.chat_start]
    for message, answer in turns:
        segments += [*template.user, *message, template.assistant]
        if answer is not None:
            end = template.end.replace("</s>", "")  # the original writes no </s> into the history
            segments += [answer, end]
    return segments


def stop_sequences(tokenizer: Tokenizer, end: str) -> tuple[list[int], ...]:
    """The ids of an answer's end, at a segment's start and after text: "###" -> [835], [2277, 29937]."""
    if end == "</s>":
        return ([tokenizer.eos],)
    after_text = tokenizer.encode("a" + end)[len(tokenizer.encode("a")):]
    return tokenizer.encode(end), after_text


def answer_text(text: str, end: str) -> str:
    """What the user is shown of a decoded answer: all before its first end symbol."""
    return text.split(end)[0].strip()


def clean_caption(text: str, max_words: int = 50) -> str:
    """A web caption -> lower case, some punctuation out, white space folded, at most max_words words."""
    text = re.sub(r"[.!\"()*#:;~]", " ", text.lower())
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])


# ---- sources: random access to samples on disk -------------------------------------------------------------


class Sample(NamedTuple):
    """What a source holds at one place: either a caption, or a conversation, or a plain text."""

    images: list[str | bytes] = []                # paths or encoded pictures
    caption: str | None = None
    turns: list[tuple[str, str]] | None = None    # (user, assistant)
    text: str | None = None
    context: str = ""                             # stands before the text and is not learnt


class BadSample(InputError):
    """A sample that cannot be trained on. `cause` is one of a few short texts, to be counted by."""

    def __init__(self, cause: str, detail: str = ""):
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause = cause


class Shards:
    """Tar files as img2dataset writes them: KEY.jpg with KEY.json ({"caption": ...}) or KEY.txt beside it.

    A shard's headers are read when its first sample is asked for. How many samples it holds, which the order
    of an epoch needs at once, is in the folder's index.json ({"samples": {"00000.tar": 9123}}) or in
    img2dataset's own *_stats.json; where neither is, the headers of all shards are read at the start.

    With `commands`, one for each path, a shard that is missing is what its command prints, and only the
    `keep` that were used last stay on disk. Any number of processes can share them."""

    def __init__(self, paths: list[str], commands: list[str] | None = None, keep: int = 0):
        self.name, self.paths = paths[0] if paths else "no shards", paths
        self.commands, self.keep, self.failed = commands, keep, {}
        known = {str(folder): _known_counts(folder) for folder in {Path(p).parent for p in paths}}
        counts = [known[str(Path(p).parent)].get(Path(p).name) for p in paths]
        bar = tqdm(total=counts.count(None), desc="reading tar headers", unit="shard", delay=1)
        for i, path in enumerate(paths):
            if counts[i] is None:
                counts[i] = len(index_tar(path))
                bar.update()
        bar.close()
        self.counts = counts

    def describe(self, shard: int, row: int) -> str:
        """Where a sample is, for messages: "data/00000.tar:000001234"; every source has one."""
        try:
            key = index_tar(self.paths[shard])[row][0]
        except (InputError, IndexError):  # the shard is broken
            key = f"sample {row}"
        return f"{self.paths[shard]}:{key}"

    def __getitem__(self, place):
        while True:
            if self.commands:
                self._have(place[0])
            try:
                return self._read(*place)
            except BadSample as e:  # a shard that another process has cleared away meanwhile is fetched again
                if not self.commands or not isinstance(e.__cause__, FileNotFoundError):
                    raise

    def _read(self, shard, row):
        try:
            table = index_tar(self.paths[shard])
        except InputError as e:
            raise BadSample("lost in a broken tar file", str(e)) from e.__cause__
        if row >= len(table):
            raise BadSample("lost in a broken tar file")
        _, picture, text, is_json = table[row]
        try:
            with open(self.paths[shard], "rb") as f:
                image, text = _read_member(f, picture, "picture"), _read_member(f, text, "caption")
        except OSError as e:
            raise BadSample("unreadable file", str(e)) from e
        try:
            caption = json.loads(text)["caption"] if is_json else text.decode("utf-8", "replace")
        except (ValueError, KeyError, TypeError) as e:
            raise BadSample("no caption in its .json", repr(e)) from e
        return Sample(images=[image], caption=caption)

    def _have(self, shard):
        """Fetch a shard if it is not on disk. One that failed is not asked for again."""
        import fcntl  # Windows has none; all else here runs without
        path = Path(self.paths[shard])
        if shard in self.failed:
            raise self.failed[shard].with_traceback(None)
        try:
            os.utime(path)  # it was used now
            return
        except FileNotFoundError:
            pass
        with open(f"{path}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():  # another process was faster
                return
            for part in path.parent.glob(f"{path.name}.*.part"):  # of a process that was killed
                part.unlink()
            try:
                fetch(self.commands[shard], path)
                if (found := len(index_tar(str(path)))) < self.counts[shard]:
                    raise InputError(f"`{self.commands[shard]}` gave {found} samples of {self.counts[shard]}")
            except InputError as e:
                index_tar.cache_clear()
                path.unlink(missing_ok=True)
                self.failed[shard] = BadSample("shard cannot be fetched", str(e))
                raise self.failed[shard] from e
        try:
            for old in sorted(path.parent.glob("*.tar"), key=os.path.getmtime)[:-self.keep]:
                old.unlink()
        except FileNotFoundError:  # another process is clearing up
            pass


def fetch(command: str, path: Path):
    """A command's stdout -> a file, whole or not at all. Raises BadSample with its last words."""
    part = Path(f"{path}.{os.getpid()}.part")
    with open(part, "wb") as f:
        done = subprocess.run(command, shell=True, stdin=subprocess.DEVNULL, stdout=f, stderr=subprocess.PIPE)
    if done.returncode:
        part.unlink()
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise BadSample("shard cannot be fetched", f"`{command}` ended with {done.returncode}, saying: "
                        f"{said[-1] if said else 'nothing'}")
    part.replace(path)


def open_pipe(command: str, keep: int) -> Shards:
    """Shards that a command prints: `aws s3 cp s3://bucket/{00000..00099}.tar -`.

    The same command with index.json in the place of the shard's name has to print their index. They are kept
    in the system's folder for temporary files (TMPDIR); empty it if shards have changed in the store."""
    name = re.compile(r"[\w.-]+\.tar(?![\w.])")
    commands = expand_braces(command)
    names = [m[0] for m in map(name.search, commands) if m]
    if len(names) < len(commands) or not commands:
        raise InputError(f"data pipe:{command}: the command has to name a .tar file, for instance "
                         "`pipe:aws s3 cp s3://bucket/{00000..00099}.tar -`")
    key = hashlib.sha256(command.encode()).hexdigest()[:12]
    cache = Path(tempfile.gettempdir(), f"nanominigpt4-{os.getuid()}", key)
    cache.mkdir(parents=True, exist_ok=True)
    try:
        fetch(name.sub("index.json", commands[0]), cache / "index.json")
    except BadSample as e:
        raise InputError(f"data pipe:{command}: no index.json beside the shards ({e}); "
                         "`python tools/prepare_stage1.py check FOLDER` writes one, upload it") from e
    unknown = set(names) - _known_counts(cache).keys()
    if unknown:
        raise InputError(f"data pipe:{command}: index.json beside the shards does not tell how many samples "
                         f"{min(unknown)} has")
    return Shards([str(cache / n) for n in names], commands, keep)


def expand_braces(text: str) -> list[str]:
    """"a{08..10}.tar" -> ["a08.tar", "a09.tar", "a10.tar"]."""
    braces = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", text)
    if not braces:
        return [text]
    before, first, last, after = braces.groups()
    return [f"{before}{i:0{len(first)}d}{after}" for i in range(int(first), int(last) + 1)]


def _known_counts(folder):
    """{shard's file name: its number of samples}, as far as the folder tells."""
    try:
        index = json.loads((folder / "index.json").read_text())["samples"]
        index = {name: n for name, n in index.items() if type(n) is int and n >= 0}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        index = {}
    for stats in folder.glob("*_stats.json"):
        try:
            name = stats.name.replace("_stats.json", ".tar")
            index.setdefault(name, int(json.loads(stats.read_text())["successes"]))
        except (OSError, ValueError, KeyError, TypeError):
            pass
    return index


@functools.lru_cache(maxsize=64)
def index_tar(path: str) -> list[tuple]:
    """A tar file's samples, from its headers: (key, (picture at, bytes), (text at, bytes), is it json).

    Damaged blocks are stepped over, so what lies behind them is found. Raises InputError if nothing is."""
    members: dict[str, dict] = {}
    try:
        with tarfile.open(path, "r:", ignore_zeros=True) as tar:
            for m in tar:
                key, _, kind = m.name.rpartition(".")
                members.setdefault(key, {})[kind.lower()] = (m.offset_data, m.size)
    except (OSError, tarfile.TarError) as e:
        if not members:
            raise InputError(f"{path}: not a readable tar file ({e}); fetch it again or take it out of "
                             "`data`") from e
    return [(key, next((files[k] for k in PICTURES if k in files), None),
             files.get("json") or files.get("txt"), "json" in files) for key, files in members.items()]


PICTURES = ("jpg", "jpeg", "png", "webp")


def _read_member(f, member, what):
    if member is None or member[1] == 0:
        raise BadSample(f"no {what}")
    at, size = member
    f.seek(at)
    content = f.read(size)
    if len(content) < size:
        raise BadSample("lost in a broken tar file")
    return content


class CaptionFolder:
    """Like cc_sbu_align: image/ID.jpg, and filter_cap.json ({"annotations": [{"image_id", "caption"}]})."""

    def __init__(self, folder: str):
        self.name, self.folder = folder, Path(folder) / "image"
        try:
            self.annotations = json.loads((Path(folder) / "filter_cap.json").read_text())["annotations"]
            self.counts = [len(self.annotations[:])]
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(f"{folder}/filter_cap.json: no JSON with `annotations` ({e}); "
                             "fetch it again") from e

    def describe(self, shard: int, row: int) -> str:
        return f"{self.folder.parent}/filter_cap.json, annotation {row + 1}"

    def __getitem__(self, place):
        a = self.annotations[place[1]]
        return Sample(images=[str(self.folder / f"{a['image_id']}.jpg")], caption=a["caption"])


class Conversations:
    """A .jsonl: {"conversation": [{"user": ...}, {"assistant": ...}, ...], "image": path or paths}, the image
    optional and relative to the file; {"image": path, "caption": ...}; or {"text": ..., "context": ...}, the
    text to be learnt as it stands after its context, if it has one."""

    def __init__(self, path: str):
        self.name = path
        numbered = enumerate(Path(path).read_bytes().splitlines(), 1)
        self.lines = [(number, line) for number, line in numbered if line.strip()]
        self.counts = [len(self.lines)]

    def describe(self, shard: int, row: int) -> str:
        return f"{self.name}, line {self.lines[row][0]}"

    def __getitem__(self, place):
        try:
            row = json.loads(self.lines[place[1]][1])
            images = row.get("image", [])
            images = [images] if isinstance(images, str) else images
            images = [str(Path(self.name).parent / p) for p in images]
            if "conversation" in row:
                words = [next(iter(turn.items())) for turn in row["conversation"]]
                if not words or [who for who, _ in words] != ["user", "assistant"] * (len(words) // 2):
                    raise BadSample("a conversation has to alternate user and assistant, the assistant last")
                texts = [text for _, text in words]
                if not all(isinstance(text, str) for text in texts):
                    raise BadSample("a turn is not a text")
                return Sample(images=images, turns=list(zip(texts[::2], texts[1::2])))
            if row.get("text") is not None and (images or not isinstance(row.get("context", ""), str)):
                raise BadSample("a text has no picture; if it is about one, call it caption")
            return Sample(images, row.get("caption"), text=row.get("text"), context=row.get("context", ""))
        except (ValueError, AttributeError, TypeError, StopIteration) as e:
            raise e if isinstance(e, BadSample) else BadSample("not a sample", str(e)) from e


def open_source(path: str, keep: int = 16) -> Shards | CaptionFolder | Conversations:
    """The source at a path of the config's `data`. Raises InputError when there is none, or nothing in it.

    So many shards of a pipe are kept on disk."""
    if path.startswith("pipe:"):
        source = open_pipe(path.removeprefix("pipe:").strip(), keep)
    elif path.endswith(".jsonl") and Path(path).is_file():
        source = Conversations(path)
    elif (Path(path) / "filter_cap.json").is_file():
        source = CaptionFolder(path)
    elif path.endswith(".txt") and Path(path).is_file():  # a list of shards, one a line
        lines = Path(path).read_text(errors="replace").splitlines()
        source = Shards([line.strip() for line in lines if line.strip()])
    elif (shards := expand_braces(path)) != [path]:
        source = Shards(shards)
    else:
        source = Shards(sorted(glob.glob(f"{path}/*.tar") if Path(path).is_dir() else glob.glob(path)))
    if sum(source.counts) == 0:
        raise InputError(f"data {path}: no samples there; give *.tar shards, a folder of them, a .txt that "
                         "lists them, a pipe:COMMAND that prints them, a folder with filter_cap.json, or a "
                         ".jsonl file")
    return source


# ---- batches -----------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """images uint8 (pictures, 3, S, S), features (pictures, N, width) or None; tokens, targets int64 (B, T),
    padded on the right."""

    images: torch.Tensor | None
    tokens: torch.Tensor
    targets: torch.Tensor

    @property
    def n_targets(self) -> int:
        """Answer tokens, those that the loss is the mean of."""
        return int((self.targets[:, 1:] != IGNORE).sum())

    @property
    def n_tokens(self) -> int:
        """Tokens without padding: a sequence ends with a target."""
        ends = torch.arange(1, self.targets.shape[1] + 1) * (self.targets != IGNORE)
        return int(ends.amax(dim=1).sum())


class Order:
    """In which order training goes through a source: draw number -> (shard, row), every sample once an epoch.

    Each epoch shuffles the shards, then the samples of each `window` shards that come next: what a shuffle
    buffer is for, but any draw is found without those before it."""

    def __init__(self, counts: list[int], seed: int, source: int, window: int):
        self.counts, self.key, self.window = np.array(counts), (seed, source), window
        self.total, self.epoch, self.at = int(self.counts.sum()), None, None

    def __getitem__(self, draw: int) -> tuple[int, int]:
        epoch, place = divmod(draw, self.total)
        if epoch != self.epoch:
            self.epoch, self.at = epoch, None
            self.shards = np.random.default_rng((*self.key, epoch)).permutation(len(self.counts))
            self.ends = self.counts[self.shards].cumsum()  # of the shards, in this epoch's order
        at = int(np.searchsorted(self.ends, place, side="right")) // self.window
        if at != self.at:
            self.at, first = at, at * self.window
            self.start = int(self.ends[first - 1]) if first else 0
            inside = self.shards[first:first + self.window]
            rows = np.concatenate([np.stack((np.full(self.counts[s], s), np.arange(self.counts[s])), axis=1)
                                   for s in inside])
            self.rows = np.random.default_rng((*self.key, epoch, at)).permutation(rows)
        shard, row = self.rows[place - self.start].tolist()
        return shard, row


class Key(NamedTuple):
    """Which sample to fetch. `draw` seeds what is random about it, so that every epoch draws anew."""

    source: int
    shard: int
    row: int
    draw: int


class Groups(Sampler):
    """Which samples make up the batches: without end, lists of `config.length_group` batches of Keys.

    A global batch of world x batch_size samples comes from one source, drawn by weight; rank r takes its r-th
    slice. `drawn` samples of each source are passed over: those of the run that is resumed."""

    def __init__(self, counts: list[list[int]], weights: list[float], config: Config, rank: int = 0,
                 world: int = 1, drawn: list[int] | None = None, choices: int = 0):
        self.counts, self.shares = counts, np.cumsum(weights) / sum(weights)
        self.config, self.rank, self.world = config, rank, world
        self.drawn, self.choices = drawn or [0] * len(counts), choices

    def __iter__(self) -> Iterator[list[tuple[int, list[Key]]]]:
        config, drawn = self.config, list(self.drawn)
        orders = [Order(c, config.seed, i, config.shuffle_shards) for i, c in enumerate(self.counts)]
        rng = np.random.default_rng(config.seed)
        rng.random(self.choices)
        number = self.choices // config.length_group
        while True:
            group = []
            for _ in range(config.length_group):
                source = int(np.searchsorted(self.shares, rng.random(), side="right"))
                first = drawn[source] + self.rank * config.batch_size
                drawn[source] += self.world * config.batch_size
                draws = range(first, first + config.batch_size)
                group.append((number, [Key(source, *orders[source][draw], draw) for draw in draws]))
            number += 1
            yield group


class FeatureCache:
    """On disk, the features (N, width) that a frozen vision side makes of a picture, found by its bytes.

    `maker` names the vision side, dtype and picture size. An entry gets its name when it is whole; one that
    cannot be read is as good as none."""

    def __init__(self, folder: str, maker: str):
        self.folder = Path(folder) / maker
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise InputError(f"cache_dir {folder}: cannot be made ({e}); choose another --cache_dir") from e

    def path(self, picture: str | bytes) -> Path:
        """Where the features of a picture, given as a path or as its bytes, are or will be."""
        content = picture if isinstance(picture, bytes) else Path(picture).read_bytes()
        name = hashlib.sha256(content).hexdigest()
        return self.folder / name[:2] / name[2:]

    def get(self, path: Path) -> torch.Tensor | None:
        """The features (N, width), or None if they are not there or cannot be read."""
        try:
            return load_file(path)["features"]
        except (OSError, SafetensorError, KeyError):
            return None

    def put(self, path: Path, features: torch.Tensor):
        """Save the features of one picture; any number of processes may do so at once."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        save_file({"features": features}, temporary)
        os.replace(temporary, path)


class Samples(Dataset):
    """The samples of a run, ready for the model: (pictures uint8 (n, 3, S, S), ids, targets).

    With a `cache`, features stand in place of pictures."""

    def __init__(self, sources: list, config: Config, tokenizer: Tokenizer, image_size: int,
                 n_image_tokens: int):
        self.sources, self.config, self.tokenizer = sources, config, tokenizer
        self.image_size, self.n_image_tokens = image_size, n_image_tokens
        self.cache: FeatureCache | None = None

    def __getitem__(self, batch: tuple[int, list[Key]]):
        """The samples of one batch -> (its group, source, good samples, [(cause, where)] of the others)."""
        group, keys = batch
        good, bad = [], []
        for key in keys:
            try:
                good.append(self.sample(key))
            except BadSample as e:
                bad.append((e.cause, f"{self.sources[key.source].describe(key.shard, key.row)} ({e})"))
        return group, keys[0].source, good, bad

    def sample(self, key: Key) -> tuple:
        """One sample. Raises BadSample, whatever is wrong with it."""
        try:
            return self._sample(key)
        except InputError:
            raise
        except Exception as e:  # what people's files hold has no end, and a run must outlive it
            raise BadSample("not a sample", repr(e)) from e

    def _sample(self, key):
        sample = self.sources[key.source][key.shard, key.row]
        if not sample.images and "llama" not in self.config.train:
            raise BadSample("no picture, but only the way from pictures to words learns")
        images = [self.picture(image) for image in sample.images]
        rng = np.random.default_rng((self.config.seed, key.source, key.draw))
        ids, targets = self.tokenize(sample, rng)
        if set(targets[1:]) <= {IGNORE}:
            raise BadSample("nothing to learn")
        return images, ids, targets

    def picture(self, image: str | bytes) -> torch.Tensor:
        """uint8 (3, S, S), or with a cache the features (N, width). Raises BadSample."""
        try:
            if self.cache and (features := self.cache.get(self.cache.path(image))) is not None:
                return features
            pixels = load_image(image, self.image_size, smallest=2)
        except (InputError, OSError) as e:
            causes = {type(None): "picture too small", FileNotFoundError: "picture is missing",
                      Image.DecompressionBombError: "picture too large"}
            cause = e if isinstance(e, OSError) else e.__cause__
            raise BadSample(causes.get(type(cause), "picture cannot be read"), str(e)) from e
        if self.cache:
            raise BadSample("picture has changed since its features were cached")
        return pixels

    def places(self) -> Iterator[Key]:
        """All samples in the order of the sources."""
        for source, shards in enumerate(self.sources):
            for shard, count in enumerate(shards.counts):
                yield from (Key(source, shard, row, 0) for row in range(count))

    def first(self, n: int) -> Iterator[tuple]:
        """The first n samples that can be read, always the same ones."""
        for draw, key in enumerate(self.places()):
            if n <= 0:
                return
            try:
                yield self.sample(key._replace(draw=draw))
                n -= 1
            except BadSample:
                pass

    def tokenize(self, sample: Sample, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """A sample's ids and targets (the same ids where they are to be predicted, IGNORE elsewhere)."""
        ids, targets = [], []
        for prompt, answer in self._turns(sample, rng):
            prompt = encode_segments(prompt, self.tokenizer, self.n_image_tokens)
            ids += prompt + answer
            targets += [IGNORE] * len(prompt) + answer
        return ids, targets

    def _turns(self, sample, rng):
        """Yield (prompt segments, answer ids), as the template says."""
        config = self.config
        if sample.text is not None:
            yield [BOS, sample.context], self.tokenizer.encode(sample.text)[:config.max_txt_len]
            return
        if sample.turns is None:
            if not isinstance(sample.caption, str):
                raise BadSample("caption is not a text", repr(sample.caption))
            if not sample.images or not sample.caption.strip():
                raise BadSample("a caption without a picture" if sample.caption.strip() else "empty caption")
            caption = clean_caption(sample.caption) if config.clean_captions else sample.caption
            if not config.template:  # stage 1: the picture, then its caption
                yield [BOS, *[IMAGE] * len(sample.images)], self._answer(caption)
                return
            turns = [(str(rng.choice(INSTRUCTIONS)), caption)]
        else:
            turns = sample.turns
        if not config.template and sample.images:
            raise InputError("a conversation needs a template; set template to vicuna or llama2")
        if not config.template:  # plain turns: what a language model learns from before it chats
            for i, (text, answer) in enumerate(turns):
                yield [BOS] * (i == 0) + [text], self._answer(answer)
            return
        template = TEMPLATES[config.template]
        before, after = template.training
        as_chat = rng.random() < config.chat_share
        for i, (text, answer) in enumerate(turns):
            message = user_message(text, len(sample.images) if i == 0 else 0)
            if as_chat:
                start = [BOS, *template.chat_start] if i == 0 else []
                yield [*start, *template.user, *message, template.assistant], self._answer(answer)
            else:
                start = [BOS, before] if i == 0 else [before.removeprefix(config.end_sym)]
                yield [*start, *message, after], self._answer(answer)

    def _answer(self, text):
        end = self.config.end_sym
        ids = self.tokenizer.encode(text) + [EOS] if end == "</s>" else self.tokenizer.encode(text + end)
        return ids[:self.config.max_txt_len]


def collate(samples: list) -> Batch:
    """Samples -> a Batch, padded on the right to the longest."""
    images = [image for images, _, _ in samples for image in images]
    longest = max(len(ids) for _, ids, _ in samples)
    tokens = torch.tensor([ids + [0] * (longest - len(ids)) for _, ids, _ in samples])
    targets = torch.tensor([wanted + [IGNORE] * (longest - len(wanted)) for _, _, wanted in samples])
    # default_collate stacks them right in the memory that a worker process shares with the main one
    return Batch(default_collate(images) if images else None, tokens, targets)


def collate_group(parts: list) -> tuple[list[Batch], list[tuple[str, str]], int]:
    """The batches of a group, none if all its samples are bad; the bad samples; how many were looked at.

    Samples of like length come together, within each source: less of a batch is padding then. Which batch is
    how long, chance decides, the same on all ranks."""
    batches: list[list] = [[] for _ in parts]
    for source in {source for _, source, _, _ in parts}:
        places = [i for i, part in enumerate(parts) if part[1] == source]
        good = sorted((sample for i in places for sample in parts[i][2]), key=lambda sample: len(sample[1]))
        np.random.default_rng((parts[0][0], source)).shuffle(places)
        for n, place in enumerate(places):
            start, end = (len(good) * k // len(places) for k in (n, n + 1))
            batches[place] = good[start:end]
    bad = [b for _, _, _, some in parts for b in some]
    looked_at = len(bad) + sum(len(good) for _, _, good, _ in parts)
    if not any(batches):
        return [], bad, looked_at
    spare = next(batch for batch in batches if batch)[:1]  # no batch may be empty
    return [collate(batch or spare) for batch in batches], bad, looked_at


class Uncached(Dataset):
    """Every world-th sample's pictures that the cache lacks: [(path of the entry, uint8 (3, S, S)), ...].

    Entries are read to know that they are whole."""

    def __init__(self, samples: Samples, cache: FeatureCache, rank: int = 0, world: int = 1):
        self.samples, self.cache, self.keys = samples, cache, list(samples.places())[rank::world]

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, i: int) -> list[tuple[Path, torch.Tensor]]:
        key, found = self.keys[i], []
        try:
            for image in self.samples.sources[key.source][key.shard, key.row].images:
                if self.cache.get(path := self.cache.path(image)) is None:
                    found.append((path, self.samples.picture(image)))
        except Exception:  # the reader will count it
            pass
        return found


def flatten(lists: list[list]) -> list:
    """[[1], [2, 3]] -> [1, 2, 3]: the collate function for Uncached."""
    return [item for one in lists for item in one]


def open_samples(data: str | dict | list, config: Config, tokenizer: Tokenizer, image_size: int,
                 n_image_tokens: int):
    """The config's `data` or `heldout_data` -> (Samples, weight of each source)."""
    data = [data] if isinstance(data, str) else data
    if not all(isinstance(path, str) for path in data):
        raise InputError(f"data = {data!r}: give a path, a list of paths, or {{path: weight}}")
    weights = data if isinstance(data, dict) else dict.fromkeys(data, 1.0)
    if not weights or not all(isinstance(w, (int, float)) and w > 0 for w in weights.values()):
        raise InputError(f"data = {data!r}: give at least one path, and weights above 0")
    # the window in use, and the one that is being fetched
    sources = [open_source(path, keep=2 * config.shuffle_shards) for path in weights]
    return Samples(sources, config, tokenizer, image_size, n_image_tokens), list(weights.values())


class Reader:
    """The endless batches of a training run for one rank, with an account of the samples that are bad.

    `state` is what `state()` gave when the run was saved: reading goes on behind it, without touching what
    came before. With another number of processes than then, it goes on behind the group of batches in which
    it was saved: no sample comes twice in its epoch, but some of that group may be left out."""

    def __init__(self, samples: Samples, weights: list[float], config: Config, rank: int = 0, world: int = 1,
                 state: dict | None = None):
        self.samples, self.weights, self.config, self.rank, self.world = samples, weights, config, rank, world
        self.order = [config.seed, config.shuffle_shards, *weights]
        if state and state["order"] != self.order:
            raise InputError("the run was saved with seed, shuffle_shards and weights of the data "
                             f"{state['order']}, now they are {self.order}; give that run's, or another "
                             "--out_dir")
        self.shape = [world, config.batch_size, config.length_group]
        self.base, self.passed = state or {"drawn": [0] * len(weights), "choices": 0, "batches": 0}, 0
        if state and state["shape"] == self.shape:
            self.passed = state["batches"] % config.length_group
            self.base = self._groups(state["batches"] // config.length_group, *state["shape"])
        elif state:
            behind = -(-state["batches"] // state["shape"][2])
            self.base = self._groups(behind, *state["shape"])
            if rank == 0:
                before, size, group = state["shape"]
                print(f"note: {before} processes of batches of {size} have become {world} of "
                      f"{config.batch_size}: no sample comes twice, up to {group - 1} batches are left out",
                      file=sys.stderr)
        self.batches = self.passed
        self.skipped, self.looked_at = Counter(), 0

    def _groups(self, n, world, batch_size, length_group):
        """What has been drawn when n groups more than at the base have been read."""
        rng = np.random.default_rng(self.config.seed)
        rng.random(self.base["choices"])
        shares = np.cumsum(self.weights) / sum(self.weights)
        chosen = np.searchsorted(shares, rng.random(n * length_group), side="right")
        drawn = np.array(self.base["drawn"]) + world * batch_size * np.bincount(chosen, minlength=len(shares))
        return {"drawn": drawn.tolist(), "choices": self.base["choices"] + n * length_group, "batches": 0}

    def state(self) -> dict:
        """Where it is, to be saved with a checkpoint: all that a resumed run needs."""
        return self.base | {"batches": self.batches, "shape": self.shape, "order": self.order}

    def __iter__(self) -> Iterator[Batch]:
        config = self.config
        groups = Groups([s.counts for s in self.samples.sources], self.weights, config, self.rank, self.world,
                        self.base["drawn"], self.base["choices"])
        loader = DataLoader(self.samples, batch_sampler=groups, collate_fn=collate_group,
                            num_workers=config.num_workers, pin_memory=torch.cuda.is_available())
        passed = self.passed
        for batches, bad, looked_at in loader:
            self._account(bad, looked_at)
            if not batches:
                if not (spare := list(self.samples.first(1))):
                    raise InputError(f"not one sample of the data can be used; the first is {bad[0][1]}")
                batches = [collate(spare)] * config.length_group
            for batch in batches[passed:]:
                self.batches += 1
                yield batch
            passed = 0

    def _account(self, bad, looked_at):
        self.looked_at += looked_at
        for cause, where in bad:
            self.skipped[cause] += 1
            if self.skipped[cause] == 1:
                print(f"skipped, the first of its kind: {where}", file=sys.stderr)
        n = self.skipped.total()
        if self.looked_at >= 200 and n > self.config.max_bad_fraction * self.looked_at:
            raise InputError(f"{self.account()}, more than max_bad_fraction {self.config.max_bad_fraction}; "
                             "mend the data or raise max_bad_fraction")

    def account(self) -> str:
        """How many samples were bad, and why."""
        causes = ", ".join(f"{k} {v}" for k, v in self.skipped.most_common())
        return f"{self.skipped.total()} of {self.looked_at} samples cannot be used ({causes})"


if __name__ == "__main__":  # python data.py CONFIG shows what the model will be given
    from configs.schema import run_main
    from tools.show_data import main
    run_main(main)
