"""Training data: samples as ids and targets, their order, batches.

plumbing/sources.py reads files as `Sample`s: a list `images`, and a `caption`, or the
`turns` of a conversation, or a plain `text` with the `context` before it. Here they
become ids and targets. The ids have IMAGE (-1) once per image token; the targets are
the same ids where the model is to predict them, IGNORE elsewhere. As in the original,
each text and each answer is tokenized on its own, and an answer that is too long loses
its end symbol, too. Bad samples are left out and counted.

The batches of a run depend only on the seed and the step number: a resumed run needs no
other state.
"""

import math
from collections import defaultdict
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from itertools import pairwise, zip_longest
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
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
from llama import IGNORE
from plumbing.console import InputError, progress
from plumbing.processes import gather, n_processes, process_rank, start_workers
from plumbing.sources import (
    Account,
    BadSample,
    Fault,
    content_of,
    foreign_bytes,
    open_source,
)
from vision import load_image

# ---- samples -----------------------------------------------------------------------


class Key(NamedTuple):
    """The place of a sample, and what seeds its random choices."""

    source: int
    shard: int
    row: int
    draw: int  # in training, how many samples of the source were drawn before


class Example(NamedTuple):
    """A tokenized sample. Its images are files first, and then decoded."""

    images: list  # decoded: uint8 (3, S, S), or features (N, D)
    ids: list[int]
    targets: list[int]


class Samples(Dataset):
    """The samples of some sources, by Key."""

    def __init__(self, sources, config, tokenizer, image_size, n_image_tokens):
        self.sources = sources
        self.config: Config = config
        self.tokenizer = tokenizer
        self.image_size = image_size  # pixels, both sides
        self.n_image_tokens = n_image_tokens  # of one picture
        # precompute_features sets these: all features (pictures, N, D), and the rows
        # of a sample's pictures in them, by (source, shard, row).
        self.features: Tensor | None = None
        self.feature_rows = defaultdict(list)

    def all_keys(self):
        """Yield the keys of all samples, one of each source in turn."""
        places = [source.places() for source in self.sources]
        for draw, one_of_each in enumerate(zip_longest(*places)):
            for i, place in enumerate(one_of_each):
                if place:  # None: source i has no more
                    yield Key(i, *place, draw)

    def first(self, n: int):
        """The first n good samples, always the same, and the faults met before them."""
        good, faults = [], []
        for key in self.all_keys():
            if len(good) == n:
                break
            with self.noting(faults, key):
                good.append(self.read(key))
        return good, faults

    @contextmanager
    def noting(self, faults, key):
        """Note what is wrong with a bad sample, instead of raising BadSample."""
        try:
            yield
        except BadSample as error:
            faults.append(Fault(error.kind, f"{self.describe(key)} ({error})"))

    def describe(self, key):
        """Where a sample is, for messages."""
        source = self.sources[key.source]
        return source.describe(key.shard, key.row)

    def __getitem__(self, key):
        """A sample, or None for a bad one."""
        with suppress(BadSample):
            return self.read(key)

    def read(self, key):
        """A sample with decoded pictures, or with their features. Raises BadSample."""
        return self.decode(key, self.read_text(key))

    def read_text(self, key: Key) -> Example:
        """A sample with the files of its pictures. Raises BadSample."""
        source = self.sources[key.source]
        sample = source[key.shard, key.row]
        # Without pictures, only a language model can learn.
        if not sample.images and "llama" not in self.config.trainable:
            raise BadSample(
                "no picture, and only the way from pictures to text is trained"
            )
        seed = (self.config.seed, key.source, key.draw)
        ids, targets = self.tokenize(sample, np.random.default_rng(seed))
        if set(targets[1:]) <= {IGNORE}:  # nothing comes before the first id
            raise BadSample("nothing to predict")
        return Example(sample.images, ids, targets)

    def decode(self, key, text: Example) -> Example:
        """Replace files by pictures, or by their features. Raises BadSample."""
        if not text.images:
            return text
        if self.features is None:
            with foreign_bytes():  # whatever decoders raise becomes BadSample
                images = [self.load_image(file) for file in text.images]
        else:
            rows = self.feature_rows[key[:3]]
            if not rows:
                raise BadSample("picture cannot be read")
            images = [self.features[row] for row in rows]
        return text._replace(images=images)

    def load_image(self, file) -> Tensor:
        # A picture of one pixel is what trackers put on web pages.
        return load_image(content_of(file), self.image_size, smallest=2)

    def tokenize(self, sample, rng):
        """The ids and the targets of a sample."""
        template = self.config.template
        end = self.config.answer_end
        if sample.text is not None:
            template = end = ""
        turns = self.choose_turns(sample, template, rng)
        # Some conversations begin with the system text, as chat's do.
        as_chat = template and rng.random() < self.config.chat_share
        # Before each answer, a list of texts and of the markers IMAGE, BOS and END.
        prompts = training_segments(turns, len(sample.images), template, end, as_chat)

        ids, targets = [], []
        for prompt, (_, answer) in zip(prompts, turns):
            prompt_ids = encode_segments(self.tokenizer, prompt, self.n_image_tokens)
            if end:
                answer = harmless(answer, end)  # nothing in it may look like the end
            answer_ids = encode_answer(self.tokenizer, answer, end)
            answer_ids = answer_ids[: self.config.max_txt_len]
            ids += prompt_ids + answer_ids
            targets += [IGNORE] * len(prompt_ids) + answer_ids
        return ids, targets

    def choose_turns(self, sample, template, rng):
        """A sample's turns: (the user's message as text or segments, the answer)."""
        if sample.text is not None:
            return [(sample.context, sample.text)]
        # A caption, or a conversation of one turn that can also serve as a caption.
        if sample.turns is None or (sample.caption is not None and not template):
            message = str(rng.choice(INSTRUCTIONS)) if template else ""
            return [(message, self.caption_of(sample))]
        if sample.images and not template:
            raise BadSample(
                "a conversation about pictures needs a template, vicuna or llama2"
            )
        if sample.is_marked:  # by <image>, which becomes a segment
            return [(placed_message(user), answer) for user, answer in sample.turns]
        return sample.turns

    def caption_of(self, sample):
        """The caption, cleaned if the config says so. Raises BadSample."""
        caption = sample.caption
        if not caption.strip():
            raise BadSample("empty caption")
        if not sample.images:
            raise BadSample("a caption without a picture")
        return clean_caption(caption) if self.config.clean_captions else caption


def open_samples(data, *settings):
    """The Samples of a config's `data`, and {path: weight}.

    settings: the arguments of Samples after `sources`.
    """
    paths = [data] if isinstance(data, str) else data
    are_texts = all(isinstance(path, str) for path in paths)
    weights = data
    if are_texts and not isinstance(data, dict):
        weights = dict.fromkeys(paths, 1.0)
    if not weights or not are_texts or not all(map(is_positive, weights.values())):
        raise InputError(
            f"data = {data!r}: give a path, paths, or {{path: weight}} with weights "
            "above 0"
        )
    sources = [open_source(path) for path in weights]
    return Samples(sources, *settings), weights


def is_positive(weight) -> bool:
    return isinstance(weight, (int, float)) and weight > 0


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
        is_predicted = self.targets[:, 1:] != IGNORE
        return int(is_predicted.sum())

    @property
    def n_tokens(self) -> int:
        return int((self.tokens != 0).sum())  # 0 is padding

    def to(self, device) -> "Batch":
        moved = [t if t is None else t.to(device, non_blocking=True) for t in self]
        return Batch(*moved)


def collate(samples: list[Example]) -> Batch:
    """Stack samples; padding on the right needs no mask where attention is causal."""
    if not samples:
        return Batch(None, torch.tensor([[0]]), torch.tensor([[IGNORE]]))
    images, ids, targets = zip(*samples)
    pictures = [picture for pictures in images for picture in pictures]
    # default_collate stacks in shared memory where a data worker does it
    stacked = default_collate(pictures) if pictures else None
    return Batch(stacked, pad(ids, 0), pad(targets, IGNORE))


def pad(rows, value):
    """Rows of different lengths -> int64 (rows, the greatest length)."""
    length = max(map(len, rows))
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def split(items, n):
    """n consecutive parts whose lengths differ by at most 1."""
    cuts = [len(items) * i // n for i in range(n + 1)]
    return [items[start:end] for start, end in pairwise(cuts)]


# ---- the order of the samples ------------------------------------------------------

# An epoch of a source shuffles its shards, cuts their list into windows of `width`
# shards, and shuffles the samples of each window: few files are open at a time. `seed`
# is a tuple: the run's, and the number of the source.


@lru_cache(maxsize=16)
def shuffled_shards(source, seed, epoch):
    """The shards in an epoch's order, and how many samples come before each."""
    rng = np.random.default_rng((*seed, epoch))
    shards = rng.permutation(len(source.counts))
    counts = np.array(source.counts)[shards]
    return shards, np.cumsum([0, *counts])


@lru_cache(maxsize=16)
def shuffled_window(source, seed, epoch, window, width):
    """(shard, row) of the samples of a window, int64 (samples, 2)."""
    shards, _ = shuffled_shards(source, seed, epoch)
    first = window * width
    rows = []
    for shard in shards[first : first + width]:
        n_rows = source.counts[shard]
        rows += [(shard, row) for row in range(n_rows)]
    rng = np.random.default_rng((*seed, epoch, window))
    return rng.permutation(rows)


def draw_samples(source, seed, width, draws):
    """Yield (shard, row) for the numbers of draws: each sample once per epoch."""
    n_samples = sum(source.counts)
    for draw in draws:
        epoch, place = divmod(draw, n_samples)
        _, starts = shuffled_shards(source, seed, epoch)
        # place in the epoch -> its shard's position in the shuffled list -> the window
        position = int(np.searchsorted(starts, place, side="right")) - 1
        window = position // width
        rows = shuffled_window(source, seed, epoch, window, width)
        yield rows[place - starts[window * width]].tolist()


# ---- the steps of a run ------------------------------------------------------------

# The settings that batches depend on: --resume refuses to change them.
KEPT = "seed shuffle_shards length_group template clean_captions max_txt_len chat_share"


class TrainingSteps(Dataset):
    """One rank's batches of a run, a pure function of the seed and the step.

    Data workers make groups of `length_group` successive steps: self[group]. A group
    draws its source by weight, takes the source's next samples and sorts them by
    length, so that a step has similar ones: less padding. Groups count from 0, steps
    from 1.
    """

    def __init__(self, samples, weights: dict, config: Config, rank=0, world=1):
        self.samples = samples
        self.weights = weights
        self.config = config
        self.rank, self.world = rank, world
        self.samples_per_step = world * config.batch_size * config.grad_accum
        n_groups = math.ceil(config.max_steps / config.length_group)
        shares = np.array(list(weights.values())) / sum(weights.values())
        rng = np.random.default_rng(config.seed)
        self.source_of_group = rng.choice(len(shares), n_groups, p=shares).tolist()
        self.account = Account(list(weights), config.max_bad_fraction)

    @property
    def identity(self):
        """What must not change in a run, as JSON values."""
        data = [
            [source.digest(), sum(source.counts), weight]
            for source, weight in zip(self.samples.sources, self.weights.values())
        ]
        identity = {name: getattr(self.config, name) for name in KEPT.split()}
        identity["answer_end"] = format_end(self.config.answer_end)  # a text
        identity["processes x batch_size x grad_accum"] = self.samples_per_step
        identity["data"] = data
        # Earlier versions drew a source for each step; such a run cannot go on.
        if len(data) > 1 and self.config.length_group > 1:
            identity["order of samples"] = "one source per length_group steps"
        return identity

    def keys(self, group):
        """The samples of a group, for all ranks: its source's next ones."""
        i = self.source_of_group[group]
        n = self.samples_per_step * self.config.length_group
        # Each earlier group of this source drew as many.
        first = n * self.source_of_group[:group].count(i)
        draws = range(first, first + n)
        places = draw_samples(
            self.samples.sources[i],
            (self.config.seed, i),
            self.config.shuffle_shards,
            draws,
        )
        return [Key(i, *place, draw) for place, draw in zip(places, draws)]

    def arrange(self, group, read_text):
        """The samples of each step of a group, for all ranks.

        The numbers of good samples in two steps differ by at most one; those of bad
        ones likewise.
        """
        keys = self.keys(group)
        n_steps = self.config.length_group
        if n_steps == 1:
            return [keys]
        lengths = {}
        for key in keys:
            with suppress(BadSample):
                lengths[key] = len(read_text(key).ids)
        good = sorted(lengths, key=lengths.get)
        bad = [key for key in keys if key not in lengths]  # to be counted
        parts = zip(split(good, n_steps), split(bad, n_steps))
        steps = [good_part + bad_part for good_part, bad_part in parts]
        seed = (self.config.seed, group, self.source_of_group[group])
        np.random.default_rng(seed).shuffle(steps)
        return steps

    def describe(self, step):
        """The places of a step's samples, of all ranks, for messages."""
        group, i = divmod(step - 1, self.config.length_group)
        steps = self.arrange(group, cache(self.samples.read_text))
        return [self.samples.describe(key) for key in steps[i]]

    def __getitem__(self, group):
        """This rank's micro-batches of each step, the number of samples, the faults."""
        # Read each text once. Exceptions are not cached: a bad sample, which `arrange`
        # ignores, is read again below, and noted.
        read_text = cache(self.samples.read_text)
        n_read = 0
        steps, faults = [], []
        for keys in self.arrange(group, read_text):
            parts = split(keys, self.world * self.config.grad_accum)
            batches = []
            for part in parts[self.rank :: self.world]:
                good = []
                for key in part:
                    with self.samples.noting(faults, key):
                        good.append(self.samples.decode(key, read_text(key)))
                batches.append(collate(good))
                n_read += len(part)
            steps.append(batches)
        return steps, n_read, faults

    def read(self, start: int = 1):
        """Yield the steps from `start` on: (step, source, this rank's micro-batches).

        Raises InputError when too many samples are bad.
        """
        n_steps = self.config.length_group
        first = (start - 1) // n_steps
        order = range(first, len(self.source_of_group))
        # Data workers compute self[group] ahead, in this order.
        groups = start_workers(self, order, self.config.num_workers)
        for group, (steps, n_read, faults) in zip(order, groups):
            source = self.source_of_group[group]
            self.account.add(source, n_read, faults)
            # Raises InputError above max_bad_fraction, once enough samples were read,
            # and at the end of a whole run if all were bad.
            is_whole_run = start == 1 and group == order[-1]
            self.account.check(source, is_whole_run)
            # All were bad so far: is there a good one anywhere?
            if self.account.n_good == 0 and not self.samples.first(1)[0]:
                raise InputError(
                    "not one sample of the data can be used; the first is "
                    f"{faults[0].message}"
                )
            for step, batches in enumerate(steps, group * n_steps + 1):
                if start <= step <= self.config.max_steps:
                    yield step, source, batches


# ---- vision features ---------------------------------------------------------------


@torch.no_grad()
def precompute_features(samples: Samples, encode, config: Config, device):
    """Replace the pictures of `samples` by features, in one tensor for all workers.

    encode: uint8 (B, 3, S, S) -> (B, N, D). Each rank computes its share. Samples with
    unreadable pictures are left out.
    """
    rank = process_rank()
    keys = list(samples.all_keys())[rank :: n_processes()]
    loader = DataLoader(
        samples,
        config.batch_size,
        sampler=keys,
        collate_fn=list,
        num_workers=config.num_workers,
    )
    owners, features = [], []  # (source, shard, row) of each picture; (B, N, D)
    remaining = iter(keys)
    for batch in loader if rank else progress(loader, "features"):
        images = []
        # Pair samples and keys. zip asks `batch` first, and so loses none of the keys.
        for sample, key in zip(batch, remaining):
            if sample:
                images += sample.images
                owners += [key[:3]] * len(sample.images)
        if images:
            stacked = torch.stack(images).to(device)
            features.append(encode(stacked).cpu())

    all_owners, all_features = [], []
    for rank_owners, rank_features in gather((owners, features)):
        all_owners += rank_owners
        all_features += rank_features
    for row, owner in enumerate(all_owners):
        samples.feature_rows[owner].append(row)
    if all_features:  # else the first sample will say why its picture is of no use
        samples.features = torch.cat(all_features)
