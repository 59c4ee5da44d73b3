"""Training data: samples as ids and targets, their order, batches.

A sample's ids are a list with IMAGE (-1) once per image token; its targets are the same
ids where the model is to predict them, IGNORE elsewhere. As in the original, each text
and each answer is tokenized on its own, and an answer that is cut loses its end.
The batches depend only on the seed and the step number: a resumed run needs no other
state. Bad samples are left out and counted.
"""

import hashlib
import json
from collections import Counter, deque
from functools import cache, lru_cache
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, default_collate

from configs.prompts import (
    INSTRUCTIONS,
    clean_caption,
    encode_answer,
    encode_segments,
    format_end,
    harmless,
    placed_message,
    training_segments,
)
from configs.schema import Config
from llama import IGNORE, Tokenizer
from plumbing.console import InputError, note, printable, progress
from plumbing.processes import ignore_signals, start_workers
from plumbing.sources import BadSample, Member, Sample, foreign_bytes, open_source
from vision import load_image

# ---- samples -----------------------------------------------------------------------


class Key(NamedTuple):
    """A sample of the data."""

    source: int
    shard: int
    row: int
    draw: int  # seeds what is random about the sample


class Example(NamedTuple):
    """A sample for the model."""

    images: list[str | Member] | list[Tensor]  # files; decoded: uint8 (3, S, S)
    ids: list[int]
    targets: list[int]


class Fault(NamedTuple):
    """What is wrong with a bad sample."""

    kind: str
    message: str  # where the sample is, and why it cannot be used


class Samples(Dataset):
    """The samples of some sources, by Key."""

    def __init__(
        self,
        sources: list,
        config: Config,
        tokenizer: Tokenizer,
        image_size: int,
        n_image_tokens: int,
    ):
        self.sources, self.config, self.tokenizer = sources, config, tokenizer
        self.image_size, self.n_image_tokens = image_size, n_image_tokens
        # instead of pictures: (pictures, N, D), and where those of a sample are
        self.features: Tensor | None = None
        self.feature_places: dict[tuple, range] = {}  # by key[:3]

    def all_keys(self):
        """All samples, one of each source in turn."""
        turns = zip_longest(*map(places, self.sources))
        for draw, turn in enumerate(turns):
            for source, place in enumerate(turn):
                if place:
                    yield Key(source, *place, draw)

    def first(self, n: int) -> tuple[list[Example], list[Fault]]:
        """The first n good samples, always the same ones, and the bad ones before."""
        good, faults, keys = [], [], self.all_keys()
        while len(good) < n and (key := next(keys, None)):
            found = self.read(key)
            (faults if isinstance(found, Fault) else good).append(found)
        return good, faults

    def read(self, key: Key) -> Example | Fault:
        """A sample with decoded pictures, or with their features."""
        return self.decode(key, self.read_text(key))

    __getitem__ = read

    def read_text(self, key: Key) -> Example | Fault:
        """A sample with the files of its pictures."""
        try:
            sample = self.sources[key.source][key.shard, key.row]
            if not sample.images and "llama" not in self.config.trainable:
                raise BadSample(
                    "no picture, and only the way from pictures to text is trained"
                )
            rng = np.random.default_rng((self.config.seed, key.source, key.draw))
            ids, targets = self.tokenize(sample, rng)
            if set(targets[1:]) <= {IGNORE}:
                raise BadSample("nothing to predict")
        except BadSample as e:
            return self.fault(key, e)
        return Example(sample.images, ids, targets)

    def decode(self, key: Key, text: Example | Fault) -> Example | Fault:
        """Replace the files of pictures by what they hold."""
        if isinstance(text, Fault) or not text.images:
            return text
        try:
            if self.features is None:
                images = [self.load_image(image) for image in text.images]
            elif key[:3] in self.feature_places:
                images = [self.features[i] for i in self.feature_places[key[:3]]]
            else:
                raise BadSample("picture cannot be read")
        except BadSample as e:
            return self.fault(key, e)
        return text._replace(images=images)

    def load_image(self, image: str | Member) -> Tensor:
        with foreign_bytes():
            source = image if isinstance(image, str) else image.read()
            return load_image(source, self.image_size, smallest=2)

    def fault(self, key: Key, error: BadSample) -> Fault:
        place = self.sources[key.source].describe(key.shard, key.row)
        return Fault(error.kind, f"{place} ({error})")

    def tokenize(self, sample: Sample, rng) -> tuple[list[int], list[int]]:
        """A sample's ids and targets."""
        template, end = self.config.template, self.config.answer_end
        if sample.text is not None:
            template, end = "", ""
        turns = self.choose_turns(sample, rng)
        as_chat = template and rng.random() < self.config.chat_share
        prompts = training_segments(turns, len(sample.images), template, end, as_chat)

        ids, targets = [], []
        for prompt, (_, answer) in zip(prompts, turns):
            prompt_ids = encode_segments(self.tokenizer, prompt, self.n_image_tokens)
            answer = harmless(answer, end) if end else answer
            answer_ids = encode_answer(self.tokenizer, answer, end)
            answer_ids = answer_ids[: self.config.max_txt_len]
            ids += prompt_ids + answer_ids
            targets += [IGNORE] * len(prompt_ids) + answer_ids
        return ids, targets

    def choose_turns(self, sample: Sample, rng) -> list[tuple]:
        """A sample's turns: (the user's message as text or segments, the answer)."""
        template = self.config.template
        if sample.text is not None:
            return [(sample.context, sample.text)]
        if sample.turns is None or (sample.caption is not None and not template):
            message = str(rng.choice(INSTRUCTIONS)) if template else ""
            return [(message, self.check_caption(sample))]
        if sample.images and not template:
            raise BadSample(
                "a conversation about pictures needs a template, vicuna or llama2"
            )
        if sample.is_marked:
            return [(placed_message(user), answer) for user, answer in sample.turns]
        return sample.turns

    def check_caption(self, sample: Sample) -> str:
        caption = sample.caption
        if not caption.strip():
            raise BadSample("empty caption")
        if not sample.images:
            raise BadSample("a caption without a picture")
        return clean_caption(caption) if self.config.clean_captions else caption


def places(source):
    """(shard, row) of all samples of a source."""
    for shard, n_rows in enumerate(source.counts):
        for row in range(n_rows):
            yield shard, row


def open_samples(data: str | dict | list, *settings) -> tuple[Samples, dict]:
    """The samples of a config's `data`, and {path: weight}.

    settings: the arguments of Samples after `sources`.
    """
    paths = [data] if isinstance(data, str) else data
    weights = paths if isinstance(paths, dict) else dict.fromkeys(paths, 1.0)
    valid = [isinstance(w, (int, float)) and w > 0 for w in weights.values()]
    if not weights or not all(valid):
        raise InputError(
            f"data = {data!r}: give a path, paths, or {{path: weight}} with weights "
            "above 0"
        )
    return Samples([open_source(path) for path in weights], *settings), weights


# ---- batches -----------------------------------------------------------------------


class Batch(NamedTuple):
    """A micro-batch of B samples, padded on the right to T tokens.

    A batch without a good sample has one token and no target; its loss is 0.
    """

    images: Tensor | None  # uint8 (pictures, 3, S, S), or features (pictures, N, D)
    tokens: Tensor  # int64 (B, T)
    targets: Tensor  # int64 (B, T)

    @property
    def n_targets(self) -> int:
        return int((self.targets[:, 1:] != IGNORE).sum())

    @property
    def n_tokens(self) -> int:
        return int((self.tokens != 0).sum())

    def to(self, device) -> "Batch":
        tensors = (t if t is None else t.to(device, non_blocking=True) for t in self)
        return Batch(*tensors)


def collate(samples: list[Example]) -> Batch:
    """Stack samples; padding on the right needs no mask where attention is causal."""
    images = [image for images, _, _ in samples for image in images]
    tokens = [torch.tensor(ids) for _, ids, _ in samples]
    targets = [torch.tensor(targets) for _, _, targets in samples]
    return Batch(
        default_collate(images) if images else None,  # a data worker's: shared memory
        pad_sequence(tokens or [torch.tensor([0])], batch_first=True),
        pad_sequence(targets or [torch.tensor([IGNORE])], True, IGNORE),
    )


def split(items: list, n: int) -> list[list]:
    """n consecutive parts whose lengths differ by at most 1."""
    return [items[len(items) * i // n : len(items) * (i + 1) // n] for i in range(n)]


# ---- the order of the samples ------------------------------------------------------


@lru_cache(maxsize=16)
def shuffled_shards(source, seed: tuple, epoch: int):
    """A source's shards in an epoch's order, and how many samples come before each."""
    counts = np.array(source.counts)
    shards = np.random.default_rng((*seed, epoch)).permutation(len(counts))
    return shards, np.cumsum(np.append(0, counts[shards]))


@lru_cache(maxsize=16)
def shuffled_rows(source, seed: tuple, epoch: int, window: int, n_shards: int):
    """(shard, row) of the samples of a window of shards, int64 (samples, 2)."""
    shards, _ = shuffled_shards(source, seed, epoch)
    rows = []
    for shard in shards[window * n_shards :][:n_shards]:
        rows += [(shard, row) for row in range(source.counts[shard])]
    return np.random.default_rng((*seed, epoch, window)).permutation(rows)


def draw_samples(source, seed: tuple, n_shards: int, draws: range):
    """Yield (shard, row) of these draws of a source, each sample once per epoch.

    An epoch shuffles the shards, then the samples of each window of n_shards shards.
    """
    n_samples = sum(source.counts)
    for draw in draws:
        epoch, place = divmod(draw, n_samples)
        _, starts = shuffled_shards(source, seed, epoch)
        shard = int(np.searchsorted(starts, place, side="right")) - 1
        window = shard // n_shards
        rows = shuffled_rows(source, seed, epoch, window, n_shards)
        yield rows[place - starts[window * n_shards]].tolist()


# ---- the steps of a run ------------------------------------------------------------

# settings that must not change in a run
KEPT = "seed shuffle_shards length_group template clean_captions max_txt_len chat_share"
FEW = 200  # samples; the share of bad ones among fewer says little
RECENT = 1000  # samples of a source, to notice that it has vanished


class Account:
    """Counts the samples that a process has read, the bad ones by kind."""

    def __init__(self, n_sources: int):
        self.n_read, self.skipped = 0, Counter()
        # for each source, whether its last samples were bad
        self.recent = [deque(maxlen=RECENT) for _ in range(n_sources)]

    def add(self, source: int, n_read: int, faults: list[Fault]):
        """Count samples, and print the first fault of each kind."""
        for kind, message in faults:
            if kind not in self.skipped:
                note(f"skipped, the first of its kind: {message}")
            self.skipped[kind] += 1
        self.n_read += n_read
        n_good = n_read - len(faults)
        self.recent[source].extend([True] * len(faults) + [False] * n_good)

    @property
    def text(self) -> str:
        kinds = ", ".join(f"{kind} {n}" for kind, n in self.skipped.most_common())
        n_bad = self.skipped.total()
        return printable(f"{n_bad} of {self.n_read} samples cannot be used ({kinds})")


class TrainingSteps(Dataset):
    """One rank's batches of a run, a pure function of the seed and the step.

    A group is `length_group` successive steps. Each group draws a source by weight, and
    samples of similar length share a step of the group: less padding. Groups count
    from 0, steps from 1.
    """

    def __init__(self, samples, weights: dict, config: Config, rank=0, world=1):
        self.samples, self.weights, self.config = samples, weights, config
        self.rank, self.world = rank, world
        self.step_size = world * config.batch_size * config.grad_accum  # samples
        n_groups = -(-config.max_steps // config.length_group)  # rounded up
        shares = np.array(list(weights.values())) / sum(weights.values())
        rng = np.random.default_rng(config.seed)
        self.sources = rng.choice(len(shares), n_groups, p=shares).tolist()
        self.account = Account(len(shares))

    @property
    def identity(self) -> dict:
        """What must not change in a run."""
        data = []
        for source, weight in zip(self.samples.sources, self.weights.values()):
            digest = hashlib.sha256(json.dumps(source.content).encode()).hexdigest()
            data.append([digest[:12], sum(source.counts), weight])
        identity = {name: getattr(self.config, name) for name in KEPT.split()} | {
            "answer_end": format_end(self.config.answer_end),
            "processes x batch_size x grad_accum": self.step_size,
            "data": data,
        }
        if len(data) > 1 and self.config.length_group > 1:  # each step drew one before
            identity["order of samples"] = "one source per length_group steps"
        return identity

    def __len__(self) -> int:
        return len(self.sources)

    def keys(self, group: int) -> list[Key]:
        """The samples of a group, for all ranks, in the order of their source."""
        config, source = self.config, self.sources[group]
        n = self.step_size * config.length_group
        first = n * self.sources[:group].count(source)
        drawn = draw_samples(
            self.samples.sources[source],
            (config.seed, source),
            config.shuffle_shards,
            range(first, first + n),
        )
        return [Key(source, *place, draw) for draw, place in enumerate(drawn, first)]

    def arrange(self, group: int, read_text) -> list[list[Key]]:
        """The samples of each step of a group, for all ranks."""
        keys, n_steps = self.keys(group), self.config.length_group
        if n_steps == 1:
            return [keys]
        texts = {key: read_text(key) for key in keys}
        bad = [key for key in keys if isinstance(texts[key], Fault)]
        good = [key for key in keys if isinstance(texts[key], Example)]
        good.sort(key=lambda key: len(texts[key].ids))
        steps = [a + b for a, b in zip(split(good, n_steps), split(bad, n_steps))]
        seed = (self.config.seed, group, self.sources[group])
        np.random.default_rng(seed).shuffle(steps)
        return steps

    def describe(self, step: int) -> list[str]:
        """The places of a step's samples, of all ranks."""
        group, i = divmod(step - 1, self.config.length_group)
        source = self.samples.sources[self.sources[group]]
        keys = self.arrange(group, self.samples.read_text)[i]
        return [source.describe(key.shard, key.row) for key in keys]

    def __getitem__(self, group: int) -> tuple[list[list[Batch]], int, list[Fault]]:
        """This rank's micro-batches of each step, the number of samples, the faults."""
        read_text = cache(self.samples.read_text)  # once per sample
        steps, found = [], []
        for keys in self.arrange(group, read_text):
            parts = split(keys, self.world * self.config.grad_accum)
            batches = []
            for part in parts[self.rank :: self.world]:
                read = [self.samples.decode(key, read_text(key)) for key in part]
                batches.append(collate([x for x in read if isinstance(x, Example)]))
                found += read
            steps.append(batches)
        return steps, len(found), [x for x in found if isinstance(x, Fault)]

    def read(self, start: int = 1):
        """Yield the steps from `start` on: (step, source, this rank's micro-batches).

        Raises InputError when too many samples are bad.
        """
        n_steps = self.config.length_group
        first = (start - 1) // n_steps
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=range(first, len(self)),
            num_workers=self.config.num_workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=ignore_signals,
        )
        for group, (steps, n_read, faults) in enumerate(start_workers(loader), first):
            source = self.sources[group]
            self.account.add(source, n_read, faults)
            self.check_account(source, faults, start == 1 and group == len(self) - 1)
            for step, batches in enumerate(steps, group * n_steps + 1):
                if start <= step <= self.config.max_steps:
                    yield step, source, batches

    def check_account(self, source: int, faults: list[Fault], is_whole_run: bool):
        """Raise InputError if too many samples are bad: of all, or a source's last."""
        account, limit = self.account, self.config.max_bad_fraction
        n_read, n_bad = account.n_read, account.skipped.total()
        is_enough = n_read >= FEW or (is_whole_run and n_bad == n_read)
        if is_enough and n_bad > limit * n_read:
            raise InputError(
                f"{account.text}, more than max_bad_fraction; fix the data or raise it"
            )
        n_recent = account.recent[source].count(True)
        if n_recent > (1 + limit) / 2 * RECENT:
            path = list(self.weights)[source]
            raise InputError(
                f"{n_recent} of the last {RECENT} samples of {path} cannot be used, "
                f"such as {faults[-1].message}; fix the data or raise max_bad_fraction"
            )
        if n_bad == n_read and not self.samples.first(1)[0]:
            raise InputError(
                "not one sample of the data can be used; the first is "
                f"{faults[0].message}"
            )


# ---- vision features ---------------------------------------------------------------


@torch.no_grad()
def cache_features(samples: Samples, encode, config: Config, device):
    """Replace the pictures of `samples` by features, in one tensor for all workers.

    encode: uint8 (B, 3, S, S) -> (B, N, D). Each rank computes its share. Samples with
    unreadable pictures are left out.
    """
    is_alone = not dist.is_initialized()
    rank, world = (0, 1) if is_alone else (dist.get_rank(), dist.get_world_size())
    keys = list(samples.all_keys())[rank::world]
    loader = DataLoader(
        samples,
        config.batch_size,
        sampler=keys,
        collate_fn=list,
        num_workers=config.num_workers,
    )
    counts, features = [], []
    for rows in loader if rank else progress(loader, "features"):
        images = [row.images if isinstance(row, Example) else [] for row in rows]
        counts += map(len, images)
        if any(images):
            stacked = torch.stack(sum(images, [])).to(device)
            features.append(encode(stacked).cpu())

    shares = [(keys, counts, features)] * world
    if not is_alone:
        dist.all_gather_object(shares, shares[0])
    end, all_features = 0, []
    for keys, counts, features in shares:
        all_features += features
        for key, n_images in zip(keys, counts):
            if n_images:
                samples.feature_places[key[:3]] = range(end, end + n_images)
                end += n_images
    samples.features = torch.cat(all_features) if end else torch.empty(0)
