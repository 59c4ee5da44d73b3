"""Show the first samples of a training config as the model sees them; check the rest.

    python tools/show_data.py configs/stage2.py [--plain] [--show=3] [--n=1000]

Prints each image in colored half-blocks, then every token: green if it is trained, gray
if not, image tokens as <image x 32>. For the first n samples, it then reports what is
wrong with bad ones, lengths, answers cut at max_txt_len, unknown tokens, and padding
with and without length_group. Images are decoded as in training. Every field of the
config is an option; the defaults in --help are for fields that it leaves unset. The
exit status is 2 if no sample is usable.
"""

import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configs.prompts import IMAGE
from configs.schema import Config, load_config
from data import TrainingSteps, open_samples
from llama import IGNORE
from plumbing.console import InputError, printable, run_main
from plumbing.options import option, read_options
from plumbing.processes import make_missing
from plumbing.terminal import half_blocks
from plumbing.tokenizer import open_tokenizer
from tools.dry_run import meta_model

GREEN, GRAY, PLAIN = "\033[32m", "\033[90m", "\033[0m"
WIDTH = 32  # characters, of a picture
N_EXAMPLES = 3  # of each kind of fault
LEAST_GROUP = 8  # steps, to show what length_group saves
MOST_FOR_PADDING = 1000  # samples


@dataclass(frozen=True)
class Options:
    plain: bool = option(False, "no colors, and only the sizes of images")
    show: int = option(3, "number of samples to show")
    n: int = option(1000, "number of samples to read; 0: all", least=0)


def tokens_as_text(sample, tokenizer, plain):
    """Every token between bars; trained ones green, or in [[ ]] without colors."""

    def kind(token):
        i, target = token
        return i == IMAGE, target != IGNORE

    parts = []
    for (is_image, is_trained), run in groupby(zip(sample.ids, sample.targets), kind):
        ids = [i for i, _ in run]
        if is_image:
            text = f"<image x {len(ids)}>"
        else:
            text = printable("|".join(map(tokenizer.piece, ids)))
        if not plain:
            color = GREEN if is_trained else GRAY
            text = f"{color}{text}{PLAIN}"
        elif is_trained:
            text = f"[[{text}]]"
        parts.append(text)
    return " ".join(parts)


def show(sample, tokenizer, plain):
    """Print an Example: each picture as half-blocks or its shape, then the tokens."""
    for image in sample.images:
        if plain:
            print(f"picture {tuple(image.shape)}")
        else:
            step = max(1, image.shape[1] // WIDTH)
            print(half_blocks(image[:, ::step, ::step]))
    print(tokens_as_text(sample, tokenizer, plain), end="\n\n")


def report_faults(faults):
    """Print the kinds of faults, the most frequent first, with examples."""
    messages = defaultdict(list)
    for kind, message in faults:
        messages[kind].append(" ".join(message.split()))
    for kind, found in sorted(messages.items(), key=lambda item: -len(item[1])):
        lines = [f"cannot be used        {len(found):,}: {kind}", *found[:N_EXAMPLES]]
        print(printable("\n  ".join(lines)))


def report_range(label, values):
    mean = np.mean(values)
    print(f"{label:<22}{mean:.1f} on average, {min(values)} to {max(values)}")


def padding(steps):
    """The share of padding among the tokens of a run."""
    n_tokens, n_places = 0, 0
    for group in range(len(steps.source_of_group)):
        batches, _, _ = steps[group]
        for batch in sum(batches, []):
            if batch.n_targets:
                n_tokens += batch.n_tokens
                n_places += batch.tokens.numel()
    return 1 - n_tokens / max(1, n_places)


def report_padding(samples, weights, config, n_samples):
    """Print the padding as drawn, and where samples of similar length share a step."""
    group = max(LEAST_GROUP, config.length_group)
    group_size = group * config.batch_size * config.grad_accum
    n_groups = max(1, min(n_samples, MOST_FOR_PADDING) // group_size)
    for size in (1, group):
        grouped = replace(config, length_group=size, max_steps=n_groups * group)
        share = padding(TrainingSteps(samples, weights, grouped))
        print(
            f"padding               {share:.1%} of all tokens with length_group {size}"
        )


def report(good, config, unknown):
    """Print lengths and what is cut or unknown."""
    lengths = [len(sample.ids) for sample in good]
    answers = [len(sample.ids) - sample.targets.count(IGNORE) for sample in good]
    report_range("tokens of a sample", lengths)
    report_range("of these, trained", answers)
    cut = np.mean([n >= config.max_txt_len for n in answers])
    print(
        f"at max_txt_len        {cut:.1%} of the samples: "
        "their answers are cut or just fit"
    )
    n_unknown = sum(sample.ids.count(unknown) for sample in good)
    print(f"unknown tokens        {n_unknown}")


def main(argv):
    (path,), options, given = read_options(argv, __doc__, "CONFIG", Options(), Config)
    config = load_config(path, given)
    make_missing(config.prepare, config.data_paths())
    model = meta_model(config)
    tokenizer = open_tokenizer(config.tokenizer, config.llama)
    n_image_tokens = model.n_image_tokens
    samples, weights = open_samples(
        config.data, config, tokenizer, model.image_size, n_image_tokens
    )

    good, faults = [], []
    for key in islice(samples.all_keys(), options.n or None):
        with samples.noting(faults, key):
            sample = samples.read(key)
            if len(good) < options.show:
                show(sample, tokenizer, options.plain)
            good.append(sample._replace(images=[]))  # which would fill the memory

    report_faults(faults)
    if not good:
        raise InputError(
            f"none of {len(faults):,} samples can be used; the first: "
            f"{faults[0].message}"
        )
    n_all = sum(sum(source.counts) for source in samples.sources)
    print(
        f"{len(good):,} good samples and {len(faults):,} bad ones, the first of "
        f"{n_all:,}; {n_image_tokens} image tokens per picture"
    )
    report(good, config, tokenizer.unknown)
    report_padding(samples, weights, config, len(good))


if __name__ == "__main__":
    run_main(main)
