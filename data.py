"""Image-text data: sources on disk, and the batches of a training run.

A sequence is a list of token ids in which IMAGE (-1) stands once for each image token; it is padded on the
right, so causal attention needs no mask. The batches are a pure function of the seed and the step: a step is
one global batch of processes x batch_size x grad_accum samples, and each process takes a slice of it. So the
step number is all that a resumed run needs. `python tools/show_data.py CONFIG` shows the first samples.

Quirks kept from the original: each text segment and each answer is tokenized on its own and gets its own
leading space piece; an answer that is cut loses its end; `###` right after a text has other ids than alone.
"""

import functools
import glob
import hashlib
import json
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from configs.prompts import BOS, IMAGE, INSTRUCTIONS, training_segments
from configs.schema import Config, InputError
from llama import IGNORE, Tokenizer
from vision import load_image


class BadSample(Exception):
    """A sample that cannot be used. The message names the kind of fault; samples are counted by it."""


class Member(NamedTuple):
    """A file inside a tar file."""

    tar: str
    offset: int
    size: int

    def read(self) -> bytes:
        with open(self.tar, "rb") as f:
            f.seek(self.offset)
            content = f.read(self.size)
        if len(content) < self.size:
            raise BadSample("missing in its tar file")
        return content


class Sample(NamedTuple):
    """What a source holds: a caption of pictures, a conversation (perhaps about pictures), or plain text."""

    images: list[str | Member] = []
    caption: str | None = None
    turns: list[tuple[str, str]] | None = None    # (user, assistant)
    text: str | None = None
    context: str = ""                             # before the text; read, but not predicted


# ---- sources: random access to samples on disk -------------------------------------------------------------


class Shards:
    """Tar files as img2dataset writes them: KEY.jpg with KEY.json ({"caption": ...}) or KEY.txt beside it.

    The number of a shard's samples comes from the folder's index.json ({"samples": {"00000.tar": 9123}}) or
    img2dataset's *_stats.json; otherwise its headers are read at the start."""

    def __init__(self, paths: list[str]):
        self.paths, known = paths, {}
        for folder in {Path(p).parent for p in paths}:
            known |= {str(folder / name): n for name, n in _known_counts(folder).items()}
        unknown = tqdm([p for p in paths if str(Path(p)) not in known], desc="reading tar headers", delay=1)
        known |= {str(Path(p)): len(index_tar(p)) for p in unknown}
        self.counts = [known[str(Path(p))] for p in paths]
        self.fingerprint = digest([[Path(p).parts[-2:], n] for p, n in zip(paths, self.counts)])

    def describe(self, shard: int, row: int) -> str:
        """Where a sample is, for messages: "data/00000.tar:000001234"."""
        try:
            return f"{self.paths[shard]}:{index_tar(self.paths[shard])[row][0]}"
        except (InputError, IndexError):  # the shard is broken
            return f"{self.paths[shard]}:sample {row}"

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        table = index_tar(self.paths[place[0]])
        if place[1] >= len(table):
            raise BadSample("missing in its tar file")
        _, picture, text, is_json = table[place[1]]
        if not (picture and picture.size and text and text.size):
            raise BadSample("no caption" if picture and picture.size else "no picture")
        caption = json.loads(text.read())["caption"] if is_json else text.read().decode(errors="replace")
        return Sample([picture], caption)


def _known_counts(folder):
    """{shard's file name: its number of samples}, as far as the folder tells."""
    counts = {}
    for file in [*folder.glob("*_stats.json"), folder / "index.json"]:
        try:
            content = json.loads(file.read_text())
            found = (content["samples"] if file.name == "index.json" else
                     {file.name.replace("_stats.json", ".tar"): content["successes"]})
            counts |= {name: n for name, n in found.items() if type(n) is int and n >= 0}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
    return counts


@functools.lru_cache(maxsize=64)
def index_tar(path: str) -> list[tuple[str, Member | None, Member | None, bool]]:
    """A tar file's samples: (key, picture, caption, whether the caption is JSON), also behind damaged blocks.
    Raises InputError if it finds nothing."""
    samples: dict[str, dict[str, Member]] = {}
    try:
        with tarfile.open(path, "r:", ignore_zeros=True) as tar:
            for m in tar:
                key, _, kind = m.name.rpartition(".")
                samples.setdefault(key, {})[kind.lower()] = Member(path, m.offset_data, m.size)
    except (OSError, tarfile.TarError) as e:
        if not samples:
            raise InputError(f"{path}: not a readable tar file ({e}); fetch it again or take it out of "
                             "`data`") from e
    return [(key, next((files[k] for k in ("jpg", "jpeg", "png", "webp") if k in files), None),
             files.get("json") or files.get("txt"), "json" in files) for key, files in samples.items()]


def read_image(image: str | Member, image_size: int) -> torch.Tensor:
    """A Sample's picture -> uint8 (3, image_size, image_size)."""
    return load_image(image if isinstance(image, str) else image.read(), image_size, smallest=2)


class Rows:
    """The lines of a .jsonl, or the annotations of a folder like cc_sbu_align. A row is

    {"image_id": "2", "caption": ...} (image/2.jpg), or {"image": path, "caption": ...}; {"conversation":
    [{"user": ...}, {"assistant": ...}, ...], "image": path or paths}, the image optional; or {"text": ...,
    "context": ...}, of which the text is predicted. Paths are relative to the file."""

    def __init__(self, path: str):
        self.path = Path(path)
        if self.path.suffix == ".jsonl":
            numbered = enumerate(self.path.read_text("utf-8", "surrogateescape").split("\n"), 1)
            self.rows = [(f"line {number}", line) for number, line in numbered if line.strip()]
        else:
            try:
                annotations = json.loads(self.path.read_text())["annotations"][:]
            except (ValueError, KeyError, TypeError) as e:
                raise InputError(f"{path}: no JSON with `annotations` ({e}); fetch it again") from e
            self.rows = [(f"annotation {number}", a) for number, a in enumerate(annotations, 1)]
        self.counts, self.fingerprint = [len(self.rows)], digest(self.rows)

    def describe(self, shard: int, row: int) -> str:
        return f"{self.path}, {self.rows[row][0]}"

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        row = self.rows[place[1]][1]
        row = json.loads(row) if isinstance(row, str) else row
        images = f"image/{row['image_id']}.jpg" if "image_id" in row else row.get("image", [])
        images = [str(self.path.parent / p) for p in ([images] if isinstance(images, str) else images)]
        if "conversation" in row:
            roles, texts = zip(*(next(iter(turn.items())) for turn in row["conversation"]))
            if list(roles) != ["user", "assistant"] * (len(roles) // 2):
                raise BadSample("user and assistant do not alternate, the assistant last")
            return Sample(images, turns=list(zip(texts[::2], texts[1::2])))
        if row.get("text") is not None and images:
            raise BadSample("a text with a picture; if it is about the picture, name it caption")
        return Sample(images, row.get("caption"), text=row.get("text"), context=row.get("context", ""))


def digest(content) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def open_source(path: str) -> Shards | Rows:
    """The source at a path of the config's `data`."""
    braces = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", path)
    if path.endswith(".jsonl") and Path(path).is_file():
        source = Rows(path)
    elif (annotations := Path(path) / "filter_cap.json").is_file():
        source = Rows(annotations)
    else:
        if path.endswith(".txt") and Path(path).is_file():
            shards = [line.strip() for line in Path(path).read_text(errors="replace").splitlines()]
        elif braces:  # "a{08..10}.tar": a08.tar, a09.tar, a10.tar
            before, first, last, after = braces.groups()
            shards = [f"{before}{i:0{len(first)}d}{after}" for i in range(int(first), int(last) + 1)]
        else:
            shards = sorted(glob.glob(f"{path}/*.tar") if Path(path).is_dir() else glob.glob(path))
        missing = [shard for shard in shards if shard and not Path(shard).exists()]
        if missing and len(missing) < len(shards):  # downloads of LAION always have holes
            print(f"warning: {path}: {len(missing):,} of {len(shards):,} shards are missing and left out, "
                  f"the first is {missing[0]}", file=sys.stderr)
        left_out = {"", *missing}
        source = Shards([shard for shard in shards if shard not in left_out])
    if sum(source.counts) == 0:
        raise InputError(f"data {path}: no samples there; give *.tar shards, a folder of them, a .txt that "
                         "lists them, a folder with filter_cap.json, or a .jsonl file")
    return source


# ---- samples: from a source to pictures and token ids ------------------------------------------------------


class Key(NamedTuple):
    """Which sample to read. `draw` seeds what is random about it, so that each epoch draws again."""

    source: int
    shard: int
    row: int
    draw: int


class Samples(Dataset):
    """The samples of some sources: samples[key] is (pictures uint8 (3, S, S), ids, targets).

    A bad sample gives None, and adds (kind, where and why) to `bad`."""

    def __init__(self, sources: list, config: Config, tokenizer: Tokenizer, image_size: int,
                 n_image_tokens: int):
        self.sources, self.config, self.tokenizer = sources, config, tokenizer
        self.image_size, self.n_image_tokens = image_size, n_image_tokens
        self.features: dict[tuple, list[torch.Tensor]] = {}  # key[:3] -> what replaces its pictures
        self.bad: list[tuple[str, str]] = []

    def __getitem__(self, key: Key) -> tuple[list[torch.Tensor], list[int], list[int]] | None:
        row = self.attempt(self.read, key)
        return self.attempt(self._load, key, *row) if row else None

    def attempt(self, function, key: Key, *arguments):
        """The one net for bad samples: there is no end to what people's files hold."""
        try:
            return function(key, *arguments)
        except Exception as e:
            cause = e.__cause__ if isinstance(e, InputError) and e.__cause__ else e
            kind = str(cause) if isinstance(cause, BadSample) else type(cause).__name__
            self.bad.append((kind, f"{self.sources[key.source].describe(key.shard, key.row)} ({e})"))

    def read(self, key: Key) -> tuple[list[str | Member], list[int], list[int]]:
        """(places of the pictures, ids, targets); raises for a bad sample."""
        sample = self.sources[key.source][key.shard, key.row]
        if not sample.images and "llama" not in self.config.trainable:
            raise BadSample("no picture, and only the way from pictures to text is trained")
        ids, targets = self.tokenize(sample, np.random.default_rng((self.config.seed, key.source, key.draw)))
        if set(targets[1:]) <= {IGNORE}:
            raise BadSample("nothing to predict")
        return sample.images, ids, targets

    def _load(self, key, images, ids, targets):
        if self.features and images:
            if key[:3] not in self.features:
                raise BadSample("picture cannot be read")
            return self.features[key[:3]], ids, targets
        return [read_image(image, self.image_size) for image in images], ids, targets

    def keys(self) -> Iterator[Key]:
        """All samples in the order of the sources."""
        places = ((i, shard, row) for i, source in enumerate(self.sources)
                  for shard, count in enumerate(source.counts) for row in range(count))
        return (Key(*place, draw) for draw, place in enumerate(places))

    def first(self, n: int) -> Iterator[tuple]:
        """The first n good samples, always the same ones."""
        return islice((sample for key in self.keys() if (sample := self[key])), n)

    def tokenize(self, sample: Sample, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """A sample's ids and targets (the same ids where they are to be predicted, IGNORE elsewhere)."""
        ids, targets = [], []
        for prompt, answer in self._turns(sample, rng):
            prompt = self.tokenizer.encode_segments(prompt, self.n_image_tokens)
            ids += prompt + answer
            targets += [IGNORE] * len(prompt) + answer
        return ids, targets

    def _turns(self, sample, rng):
        """Yield (prompt segments, answer ids) of each turn."""
        config, turns = self.config, sample.turns
        if sample.text is not None:
            yield [BOS, sample.context], self.tokenizer.encode(sample.text)[:config.max_txt_len]
            return
        if turns is None:
            if not isinstance(sample.caption, str):
                raise BadSample("caption is not a text")
            if not sample.images or not sample.caption.strip():
                raise BadSample("a caption without a picture" if sample.caption.strip() else "empty caption")
            caption = clean_caption(sample.caption) if config.clean_captions else sample.caption
            turns = [(str(rng.choice(INSTRUCTIONS)) if config.template else "", caption)]
        if config.template:
            prompts = training_segments(turns, len(sample.images), config.template, config.answer_end,
                                        as_chat=rng.random() < config.chat_share)
        elif sample.turns is None:  # stage 1: the picture, then its caption
            prompts = [[BOS, *[IMAGE] * len(sample.images)]]
        elif sample.images:
            raise BadSample("a conversation about pictures needs a template, vicuna or llama2")
        else:  # plain turns: what a language model learns from before it chats
            prompts = [[BOS] * (i == 0) + [text] for i, (text, _) in enumerate(turns)]
        for prompt, (_, answer) in zip(prompts, turns):
            yield prompt, self.tokenizer.encode_answer(answer, config.answer_end)[:config.max_txt_len]


def clean_caption(text: str, max_words: int = 50) -> str:
    """A web caption -> lower case, less punctuation, white space folded, at most max_words words."""
    text = re.sub(r"[.!\"()*#:;~]", " ", text.lower())
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])


def open_samples(data: str | dict | list, config: Config, tokenizer: Tokenizer, image_size: int,
                 n_image_tokens: int) -> tuple[Samples, dict[str, float]]:
    """The config's `data` or `heldout_data` -> (Samples, {source's path: weight})."""
    data = [data] if isinstance(data, str) else data
    values = data.values() if isinstance(data, dict) else [1.0] * len(data)
    if not data or not all(isinstance(path, str) for path in data) or not all(
            isinstance(w, (int, float)) and w > 0 for w in values):
        raise InputError(f"data = {data!r}: give a path, a list of paths, or {{path: weight}}, with weights "
                         "above 0")
    weights = dict(zip(data, values))
    return Samples([open_source(p) for p in weights], config, tokenizer, image_size, n_image_tokens), weights


# ---- batches -----------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """images uint8 (pictures, 3, S, S), features (pictures, N, width) or None; tokens, targets int64 (B, T),
    padded on the right."""

    images: torch.Tensor | None
    tokens: torch.Tensor
    targets: torch.Tensor

    @property
    def n_targets(self) -> int:
        """Tokens that are predicted."""
        return int((self.targets[:, 1:] != IGNORE).sum())

    @property
    def n_tokens(self) -> int:
        """Tokens without padding."""
        return int((self.tokens != 0).sum())

    def to(self, device) -> "Batch":
        """The batch on the device, copied asynchronously."""
        return Batch(*(t if t is None else t.to(device, non_blocking=True) for t in self))


def collate(samples: list) -> Batch:
    """[(pictures, ids, targets), ...] -> a Batch, padded on the right to the longest."""
    images = [image for images, _, _ in samples for image in images]
    longest = max(len(ids) for _, ids, _ in samples)
    tokens = torch.tensor([ids + [0] * (longest - len(ids)) for _, ids, _ in samples])
    targets = torch.tensor([t + [IGNORE] * (longest - len(t)) for _, _, t in samples])
    # in a worker process, default_collate stacks right into shared memory
    return Batch(default_collate(images) if images else None, tokens, targets)


class SampleOrder:
    """A source's order in training: order[draw number] -> (shard, row), every sample once per epoch.

    Each epoch shuffles the shards, then the samples of each `window` successive shards: a shuffle buffer with
    random access."""

    def __init__(self, counts: list[int], seed: int, source: int, window: int):
        self.counts, self.seed, self.window = np.array(counts), (seed, source), window
        self.total, self.epoch, self.at = int(self.counts.sum()), None, None

    def __getitem__(self, draw: int) -> tuple[int, int]:
        epoch, place = divmod(draw, self.total)
        if epoch != self.epoch:
            self.epoch, self.at = epoch, None
            self.shards = np.random.default_rng((*self.seed, epoch)).permutation(len(self.counts))
            self.ends = self.counts[self.shards].cumsum()
        at = int(np.searchsorted(self.ends, place, side="right")) // self.window
        if at != self.at:
            self.at, first = at, at * self.window
            self.start = int(self.ends[first - 1]) if first else 0
            rows = [(s, row) for s in self.shards[first:first + self.window] for row in range(self.counts[s])]
            self.rows = np.random.default_rng((*self.seed, epoch, at)).permutation(rows)
        return tuple(self.rows[place - self.start].tolist())


class Groups(Dataset):
    """The batches of one rank's training run: groups[g] is (steps, bad samples), each step (source,
    micro-batches), a batch without a good sample None. A group is length_group steps.

    All samples of a step come from one source, drawn by weight. Within a group, samples of similar length
    share a step, so that there is less padding."""

    def __init__(self, samples: Samples, weights: dict[str, float], config: Config, rank: int = 0,
                 world: int = 1):
        self.samples, self.config, self.rank, self.world = samples, config, rank, world
        self.step_size = world * config.batch_size * config.grad_accum  # samples of a global batch
        shares = np.cumsum(list(weights.values())) / sum(weights.values())
        n_steps = -(-config.max_steps // config.length_group) * config.length_group
        draws = np.random.default_rng(config.seed).random(n_steps)
        self.sources = np.searchsorted(shares, draws, side="right")  # of each step
        self.orders = [SampleOrder(source.counts, config.seed, i, config.shuffle_shards)
                       for i, source in enumerate(samples.sources)]
        self.identity = {  # what must not change within a run
            "processes x batch_size x grad_accum": self.step_size, "seed": config.seed,
            "shuffle_shards": config.shuffle_shards, "length_group": config.length_group,
            "data": [[s.fingerprint, sum(s.counts), w] for s, w in zip(samples.sources, weights.values())]}

    def __len__(self):
        return len(self.sources) // self.config.length_group

    def keys(self, step: int) -> list[Key]:
        """The samples of a step's global batch."""
        source = int(self.sources[step])
        first = self.step_size * int((self.sources[:step] == source).sum())
        draws = range(first, first + self.step_size)
        return [Key(source, *self.orders[source][draw], draw) for draw in draws]

    def __getitem__(self, group: int) -> tuple[list, list[tuple[str, str]]]:
        L, parts = self.config.length_group, self.world * self.config.grad_accum
        keys = [self.keys(step) for step in range(group * L, (group + 1) * L)]
        sources = [step[0].source for step in keys]
        steps = []
        for source, step in zip(sources, self.by_length(keys, sources, group) if L > 1 else keys):
            rows = [[sample for key in part if (sample := self.samples[key])]
                    for part in split(step, parts)[self.rank::self.world]]
            steps.append((source, [collate(samples) if samples else None for samples in rows]))
        bad, self.samples.bad = self.samples.bad, []
        return steps, bad

    def by_length(self, steps: list[list[Key]], sources: list[int], group: int) -> list[list[Key]]:
        """The steps' samples dealt out again within each source, samples of similar length to one step."""
        lengths = {key: len(row[1]) for keys in steps for key in keys
                   if (row := self.samples.attempt(self.samples.read, key))}
        self.samples.bad, dealt = [], {}  # bad samples are read, and counted, once more
        for source in set(sources):
            keys, n = [key for keys in steps for key in keys if key.source == source], sources.count(source)
            bad = [key for key in keys if key not in lengths]
            good = sorted(filter(lengths.get, keys), key=lengths.get)
            parts = [a + b for a, b in zip(split(good, n), split(bad, n))]
            np.random.default_rng((self.config.seed, group, source)).shuffle(parts)
            dealt[source] = iter(parts)
        return [next(dealt[source]) for source in sources]


def split(items: list, n: int) -> list[list]:
    """n consecutive parts whose lengths differ by at most 1."""
    return [items[len(items) * i // n:len(items) * (i + 1) // n] for i in range(n)]


class Reader:
    """The steps of a run from `start` on, each (source, micro-batches), with an account of bad samples."""

    def __init__(self, groups: Groups, start: int = 0):
        self.groups, self.start, self.skipped, self.n_read = groups, start, Counter(), 0

    def __iter__(self) -> Iterator[tuple[int, list[Batch]]]:
        config, spare = self.groups.config, None
        group, passed = divmod(self.start, config.length_group)
        loader = DataLoader(self.groups, batch_size=None, sampler=range(group, len(self.groups)),
                            num_workers=config.num_workers, pin_memory=torch.cuda.is_available())
        for steps, bad in loader:
            self._count(bad, sum(len(b.tokens) for _, batches in steps for b in batches if b))
            for source, batches in steps[passed:]:
                if None in batches:  # replaced by the dataset's first good sample
                    spare = spare or [collate([sample]) for sample in self.groups.samples.first(1)]
                    if not spare:
                        raise InputError(f"not one sample of the data can be used; the first is {bad[0][1]}")
                yield source, [spare[0] if batch is None else batch for batch in batches]
            passed = 0

    def _count(self, bad, n_good):
        self.n_read += len(bad) + n_good
        for kind, where in bad:
            self.skipped[kind] += 1
            if self.skipped[kind] == 1:
                print(f"skipped, the first of its kind: {where}", file=sys.stderr)
        limit = self.groups.config.max_bad_fraction
        if self.n_read >= 200 and self.skipped.total() > limit * self.n_read:
            raise InputError(f"{self.account()}, more than max_bad_fraction {limit}; fix the data or raise "
                             "max_bad_fraction")

    def account(self) -> str:
        """How many samples were bad, and why."""
        kinds = ", ".join(f"{kind} {n}" for kind, n in self.skipped.most_common())
        return f"{self.skipped.total()} of {self.n_read} samples cannot be used ({kinds})"
