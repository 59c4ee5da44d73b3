"""Image-text data: sources on disk, and the batches of a training run.

A sample's ids are a list in which IMAGE (-1) stands once for each image token. As in the original, each text
and each answer is tokenized on its own, and an answer that is cut loses its end. The batches are a pure
function of the seed and the step, so the step number is all that a resumed run needs.
"""

import glob
import hashlib
import json
import os
import re
import signal
import tarfile
from collections import Counter, namedtuple
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info
from tqdm import tqdm

from configs.prompts import (
    BOS,
    IMAGE,
    INSTRUCTIONS,
    clean_caption,
    harmless,
    placed_message,
    training_segments,
)
from configs.schema import Config
from llama import IGNORE, Tokenizer
from plumbing.console import InputError, note, printable
from plumbing.files import start_of
from plumbing.processes import ignore_signals
from vision import load_image


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
    turns: list[tuple] | None = (
        None  # (user: a text, or segments with pictures; assistant)
    )
    text: str | None = None
    context: str = ""  # before the text; read, but not predicted


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
        users = [placed_message(user) for user in users]
        if sum(user.count(IMAGE) for user in users) != len(images):
            raise BadSample("not as many <image> as pictures")
        return Sample(
            images,
            answers[0] if images and len(answers) == 1 else None,
            list(zip(users, answers)),
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


Key = namedtuple(
    "Key", "source shard row draw"
)  # `draw` seeds what is random about a sample


class Samples(Dataset):
    """The samples of some sources, by Key. Each bad sample read adds (kind, where and why) to `bad`."""

    def __init__(
        self,
        sources,
        config: Config,
        tokenizer: Tokenizer,
        image_size: int,
        n_image_tokens: int,
    ):
        self.sources, self.config, self.tokenizer = sources, config, tokenizer
        self.image_size, self.n_image_tokens = image_size, n_image_tokens
        self.features: dict[
            tuple, list[torch.Tensor]
        ] = {}  # key[:3] -> what replaces its pictures
        self.bad: list[tuple[str, str]] = []

    def read(self, key: Key, with_images: bool = True) -> tuple | None:
        """(pictures uint8 (3, S, S), ids, targets: list[int]), or None for a bad sample."""
        try:  # the one net for bad samples: there is no end to what people's files hold
            sample = self.sources[key.source][key.shard, key.row]
            if not sample.images and "llama" not in self.config.trainable:
                raise BadSample(
                    "no picture, and only the way from pictures to text is trained"
                )
            rng = np.random.default_rng((self.config.seed, key.source, key.draw))
            ids, targets = self.tokenize(sample, rng)
            if set(targets[1:]) <= {IGNORE}:
                raise BadSample("nothing to predict")
            images = sample.images if with_images else []
            if self.features and images:
                if key[:3] not in self.features:
                    raise BadSample("picture cannot be read")
                return self.features[key[:3]], ids, targets
            encoded = [
                image if isinstance(image, str) else image.read() for image in images
            ]
            return (
                [load_image(image, self.image_size, smallest=2) for image in encoded],
                ids,
                targets,
            )
        except Exception as e:
            cause = e.__cause__ if isinstance(e, InputError) and e.__cause__ else e
            kind = str(cause) if isinstance(cause, BadSample) else type(cause).__name__
            why = (
                e
                if isinstance(e, (BadSample, InputError, OSError))
                else f"malformed, {kind}: {e}"
            )
            self.bad.append(
                (
                    kind,
                    f"{self.sources[key.source].describe(key.shard, key.row)} ({why})",
                )
            )

    __getitem__ = read

    def keys(self) -> Iterator[Key]:
        """All samples in the order of the sources."""
        places = (
            (i, shard, row)
            for i, source in enumerate(self.sources)
            for shard, count in enumerate(source.counts)
            for row in range(count)
        )
        return (Key(*place, draw) for draw, place in enumerate(places))

    def first(self, n: int) -> Iterator[tuple]:
        """The first n good samples, always the same ones."""
        return islice(filter(None, map(self.read, self.keys())), n)

    def tokenize(
        self, sample: Sample, rng: np.random.Generator
    ) -> tuple[list[int], list[int]]:
        """A sample's ids and targets (the same ids where they are to be predicted, IGNORE elsewhere)."""
        template, end, turns = (
            self.config.template,
            self.config.answer_end,
            sample.turns,
        )
        if sample.text is not None:
            template, end, turns = "", "", [(sample.context, sample.text)]
        elif turns is None or sample.caption is not None and not template:
            if not isinstance(sample.caption, str):
                raise BadSample("caption is not a text")
            if not sample.images or not sample.caption.strip():
                raise BadSample(
                    "a caption without a picture"
                    if sample.caption.strip()
                    else "empty caption"
                )
            caption = (
                clean_caption(sample.caption)
                if self.config.clean_captions
                else sample.caption
            )
            turns = [(str(rng.choice(INSTRUCTIONS)) if template else "", caption)]
        elif sample.images and not template:
            raise BadSample(
                "a conversation about pictures needs a template, vicuna or llama2"
            )
        if template:
            prompts = training_segments(
                turns,
                len(sample.images),
                template,
                end,
                as_chat=rng.random() < self.config.chat_share,
            )
        else:  # stage 1, where a picture is all the prompt; or what a language model learns before it chats
            prompts = [text if isinstance(text, list) else [text] for text, _ in turns]
            prompts[0][:0] = [BOS, *[IMAGE] * len(sample.images)]
        ids, targets = [], []
        for prompt, (_, answer) in zip(prompts, turns):
            prompt = self.tokenizer.encode_segments(prompt, self.n_image_tokens)
            answer = harmless(answer, end) if end else answer
            answer = self.tokenizer.encode_answer(answer, end)[
                : self.config.max_txt_len
            ]
            ids += prompt + answer
            targets += [IGNORE] * len(prompt) + answer
        return ids, targets


def open_samples(
    data, config: Config, tokenizer: Tokenizer, image_size: int, n_image_tokens: int
) -> tuple:
    """The config's `data` or `heldout_data` -> (Samples, {source's path: weight})."""
    data = [data] if isinstance(data, str) else data
    pairs = (
        list(data.items()) if isinstance(data, dict) else [(path, 1.0) for path in data]
    )
    if not pairs or not all(
        isinstance(p, str) and isinstance(w, (int, float)) and w > 0 for p, w in pairs
    ):
        raise InputError(
            f"data = {data!r}: give a path, paths, or {{path: weight}} with weights above 0"
        )
    sources = [open_source(path) for path in dict(pairs)]
    return Samples(sources, config, tokenizer, image_size, n_image_tokens), dict(pairs)


class Batch(namedtuple("Batch", "images tokens targets")):
    """images: uint8 (pictures, 3, S, S), features (pictures, N, width) or None; the others: int64 (B, T)."""

    @property
    def n_targets(self) -> int:
        return int((self.targets[:, 1:] != IGNORE).sum())

    @property
    def n_tokens(self) -> int:
        return int((self.tokens != 0).sum())

    def to(self, device) -> "Batch":
        return Batch(
            *(t if t is None else t.to(device, non_blocking=True) for t in self)
        )


def collate(samples: list) -> Batch:
    """[(pictures, ids, targets), ...] -> a Batch, padded on the right, so causal attention needs no mask."""
    images = [image for images, _, _ in samples for image in images]
    longest = max(len(ids) for _, ids, _ in samples)
    tokens = torch.tensor([ids + [0] * (longest - len(ids)) for _, ids, _ in samples])
    targets = torch.tensor([t + [IGNORE] * (longest - len(t)) for _, _, t in samples])
    return Batch(
        default_collate(images) if images else None, tokens, targets
    )  # stacks in shared memory


class SampleOrder:
    """A source's order in training: order[draw number] -> (shard, row), every sample once per epoch. An epoch
    shuffles the shards, then the samples of each `window` successive shards."""

    def __init__(self, counts: list[int], seed: int, source: int, window: int):
        self.counts, self.seed, self.window = np.array(counts), (seed, source), window
        self.start, self.rows = (
            0,
            [],
        )  # the samples of one window, and the draw number of its first

    def __getitem__(self, draw: int) -> tuple[int, int]:
        if not 0 <= draw - self.start < len(self.rows):
            epoch, place = divmod(draw, int(self.counts.sum()))
            shards = np.random.default_rng((*self.seed, epoch)).permutation(
                len(self.counts)
            )
            starts = np.cumsum(np.append(0, self.counts[shards]))
            window = (
                int(np.searchsorted(starts, place, side="right")) - 1
            ) // self.window
            first = window * self.window
            rows = [
                (s, row)
                for s in shards[first : first + self.window]
                for row in range(self.counts[s])
            ]
            self.rows = np.random.default_rng((*self.seed, epoch, window)).permutation(
                rows
            )
            self.start = draw - place + int(starts[first])
        return tuple(self.rows[draw - self.start].tolist())


class Groups(Dataset):
    """One rank's batches: groups[g] is (length_group steps, bad samples), a step (source, micro-batches, None
    for one without a good sample). Samples of similar length share a step of the group: less padding."""

    def __init__(
        self,
        samples: Samples,
        weights: dict,
        config: Config,
        rank: int = 0,
        world: int = 1,
    ):
        self.samples, self.config, self.rank, self.world = samples, config, rank, world
        self.step_size = (
            world * config.batch_size * config.grad_accum
        )  # samples of a global batch
        n_steps = -(-config.max_steps // config.length_group) * config.length_group
        shares = np.array(list(weights.values())) / sum(weights.values())
        self.sources = np.random.default_rng(config.seed).choice(
            len(shares), n_steps, p=shares
        )
        self.orders = [
            SampleOrder(source.counts, config.seed, i, config.shuffle_shards)
            for i, source in enumerate(samples.sources)
        ]
        digests = [
            hashlib.sha256(json.dumps(s.content).encode()).hexdigest()[:12]
            for s in samples.sources
        ]
        kept = "seed shuffle_shards length_group template answer_end clean_captions max_txt_len chat_share"
        self.identity = {
            k: getattr(config, k) for k in kept.split()
        } | {  # what must not change in a run
            "processes x batch_size x grad_accum": self.step_size,
            "data": [
                [d, sum(s.counts), w]
                for d, s, w in zip(digests, samples.sources, weights.values())
            ],
        }

    def __len__(self):
        return len(self.sources) // self.config.length_group

    def keys(self, step: int) -> list[Key]:
        """The samples of a step's global batch."""
        source = int(self.sources[step])
        first = self.step_size * int((self.sources[:step] == source).sum())
        return [
            Key(source, *self.orders[source][i], i)
            for i in range(first, first + self.step_size)
        ]

    def describe(self, step: int) -> list[str]:
        """Where the samples of a step's global batch are."""
        source, keys = self.steps(step // self.config.length_group)[
            step % self.config.length_group
        ]
        return [
            self.samples.sources[source].describe(key.shard, key.row) for key in keys
        ]

    def steps(self, group: int) -> list[tuple[int, list[Key]]]:
        """The source and the samples of each step of a group."""
        L = self.config.length_group
        steps = [
            (int(self.sources[i]), self.keys(i))
            for i in range(group * L, (group + 1) * L)
        ]
        for source in (
            {source for source, _ in steps} if L > 1 else ()
        ):  # sort by length
            mine = [i for i, step in enumerate(steps) if step[0] == source]
            rows = {
                key: self.samples.read(key, with_images=False)
                for i in mine
                for key in steps[i][1]
            }
            good = sorted(
                (key for key in rows if rows[key]), key=lambda key: len(rows[key][1])
            )
            bad = [key for key in rows if not rows[key]]
            parts = [
                a + b for a, b in zip(split(good, len(mine)), split(bad, len(mine)))
            ]
            np.random.default_rng((self.config.seed, group, source)).shuffle(parts)
            for i, part in zip(mine, parts):
                steps[i] = source, part
        return steps

    def __getitem__(self, group: int) -> tuple[list, list[tuple[str, str]]]:
        steps = self.steps(group)
        self.samples.bad = []  # of this group, bad samples are read, and counted, below
        for i, (source, keys) in enumerate(steps):
            mine = split(keys, self.world * self.config.grad_accum)[
                self.rank :: self.world
            ]
            rows = [list(filter(None, map(self.samples.read, part))) for part in mine]
            steps[i] = (
                source,
                [collate(samples) if samples else None for samples in rows],
            )
        bad, self.samples.bad = self.samples.bad, []
        return steps, bad


def split(items: list, n: int) -> list[list]:
    """n consecutive parts whose lengths differ by at most 1."""
    return [items[len(items) * i // n : len(items) * (i + 1) // n] for i in range(n)]


class Reader:
    """The steps of a run from `start` on, each (source, micro-batches), with an account of bad samples."""

    def __init__(self, groups: Groups, start: int = 0):
        self.groups, self.start, self.skipped, self.n_read = groups, start, Counter(), 0

    def __iter__(self) -> Iterator[tuple[int, list[Batch]]]:
        config, spare = self.groups.config, None
        group, passed = divmod(self.start, config.length_group)
        loader = DataLoader(
            self.groups,
            batch_size=None,
            sampler=range(group, len(self.groups)),
            num_workers=config.num_workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=ignore_signals,
        )
        received = enumerate(loader, group)  # starts the workers
        if hasattr(
            signal, "SIGCHLD"
        ):  # PyTorch's handler would raise anywhere, also while a file is written
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for group, (steps, bad) in received:
            self.n_read += len(bad) + sum(
                len(b.tokens) for _, batches in steps for b in batches if b
            )
            for kind, where in bad:
                if kind not in self.skipped:
                    note(f"skipped, the first of its kind: {where}")
                self.skipped[kind] += 1
            n_bad, n, is_end = (
                self.skipped.total(),
                self.n_read,
                group == len(self.groups) - 1,
            )
            if n_bad > config.max_bad_fraction * n and (
                n >= 200 or is_end and n_bad == n and not self.start
            ):
                raise InputError(
                    f"{self.account()}, more than max_bad_fraction; fix the data or raise it"
                )
            for source, batches in steps[passed:]:
                if None in batches:  # replaced by the dataset's first good sample
                    spare = spare or [
                        collate([sample]) for sample in self.groups.samples.first(1)
                    ]
                    if not spare:
                        raise InputError(
                            f"not one sample of the data can be used; the first is {bad[0][1]}"
                        )
                yield (
                    source,
                    [spare[0] if batch is None else batch for batch in batches],
                )
            passed = 0

    def account(self) -> str:
        kinds = ", ".join(f"{kind} {n}" for kind, n in self.skipped.most_common())
        return printable(
            f"{self.skipped.total()} of {self.n_read} samples cannot be used ({kinds})"
        )
