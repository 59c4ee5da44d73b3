"""Image-text data: sources on disk, and the batches of a training run.

A sample's ids are a list in which IMAGE (-1) stands once for each image token. As in the original, each text
and each answer is tokenized on its own, and an answer that is cut loses its end. The batches are a pure
function of the seed and the step, so the step number is all that a resumed run needs.
"""

import hashlib
import json
import signal
from collections import Counter, namedtuple
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from configs.prompts import (
    BOS,
    IMAGE,
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
from plumbing.console import InputError, note, printable
from plumbing.processes import ignore_signals
from plumbing.sources import BadSample, Sample, open_source
from vision import load_image

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
        if sample.is_marked:
            turns = [(placed_message(user), answer) for user, answer in turns]
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
            prompt = encode_segments(self.tokenizer, prompt, self.n_image_tokens)
            answer = harmless(answer, end) if end else answer
            answer = encode_answer(self.tokenizer, answer, end)[
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
        kept = "seed shuffle_shards length_group template clean_captions max_txt_len chat_share"
        self.identity = {
            k: getattr(config, k) for k in kept.split()
        } | {  # what must not change in a run
            "answer_end": format_end(config.answer_end),
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
