"""The first samples of a training config as they go into the model, and what the first n of them are like.

    python tools/show_data.py configs/stage2.py [--plain] [--show=3] [--n=1000] [--key=value of the config]

Draws each picture with colored half-blocks (--plain: only its size), then every token: trained ones green,
others gray, image tokens as <image x 32>. Of the first n samples it then prints what is wrong with the bad
ones, lengths, answers cut at max_txt_len, unknown tokens, and the padding with and without length_group.
Pictures are decoded as in training. If no sample can be used, it ends with status 2.
"""

import sys
from collections import Counter
from dataclasses import dataclass, fields, replace
from itertools import groupby, islice
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configs.prompts import IMAGE
from configs.schema import Config, load_config
from data import Groups, open_samples
from llama import IGNORE, Tokenizer
from plumbing.console import InputError, printable, run_main
from plumbing.options import option, override, parse_args
from plumbing.processes import make_missing
from tools.dry_run import meta_model

GREEN, GRAY, PLAIN = "\033[32m", "\033[90m", "\033[0m"


@dataclass(frozen=True)
class Options:
    plain: bool = option(False, "no colors and no pictures")
    show: int = option(3, "samples to show")
    n: int = option(1000, "samples to read; 0: all")


def half_blocks(image: np.ndarray, columns: int = 32) -> str:
    """uint8 (3, S, S) -> lines of text, two pixels a character."""
    step = max(1, image.shape[1] // columns)
    pixels = image[:, ::step, ::step].transpose(1, 2, 0).tolist()
    lines = []
    for above, below in zip(pixels[::2], pixels[1::2]):
        cells = (
            "\033[38;2;{};{};{};48;2;{};{};{}m\u2580".format(*a, *b)
            for a, b in zip(above, below)
        )
        lines.append("".join(cells) + PLAIN)
    return "\n".join(lines)


def tokens_as_text(
    ids: list[int], targets: list[int], tokenizer: Tokenizer, plain: bool
) -> str:
    """Every token between bars; trained ones are green, or in [[ ]] where there are no colors."""
    parts = []
    kinds = [(i == IMAGE, target != IGNORE) for i, target in zip(ids, targets)]
    for (is_image, trained), run in groupby(zip(kinds, ids), lambda pair: pair[0]):
        run = [i for _, i in run]
        pieces = (
            f"<image x {len(run)}>" if is_image else "|".join(map(tokenizer.piece, run))
        )
        text = printable(pieces)
        if plain:
            parts.append(f"[[{text}]]" if trained else text)
        else:
            parts.append(f"{GREEN if trained else GRAY}{text}{PLAIN}")
    return " ".join(parts)


def padding(groups: Groups) -> float:
    """The share of padding among the tokens of a run."""
    counts = [
        (b.n_tokens, b.tokens.numel())
        for group in range(len(groups))
        for _, step in groups[group][0]
        for b in step
        if b
    ]
    return 1 - sum(n for n, _ in counts) / max(1, sum(size for _, size in counts))


def main(argv: list[str]):
    (path,), given = parse_args(argv, __doc__, "CONFIG", Options, Config)
    own = {f.name: given.pop(f.name) for f in fields(Options) if f.name in given}
    options, config = override(Options(), own), load_config(path, given)
    if options.n < 0:
        raise InputError(f"--n={options.n}: give at least 0")
    make_missing(config.prepare, config.data_paths())
    model, notes = meta_model(config)
    print(*notes, sep="\n")
    tokenizer = Tokenizer(config.tokenizer or f"{config.llama}/tokenizer.model")
    samples, weights = open_samples(
        config.data, config, tokenizer, model.image_size, model.n_image_tokens
    )
    lengths, answers, unknown, unk = [], [], 0, tokenizer.unknown
    first = islice(samples.keys(), options.n or None)
    for images, ids, targets in filter(None, map(samples.__getitem__, first)):
        if len(lengths) < options.show:
            for image in images:
                print(
                    f"picture {tuple(image.shape)}"
                    if options.plain
                    else half_blocks(image.numpy())
                )
            print(tokens_as_text(ids, targets, tokenizer, options.plain), end="\n\n")
        lengths.append(len(ids))
        answers.append(sum(t != IGNORE for t in targets))
        unknown += ids.count(unk)
    for kind, count in Counter(kind for kind, _ in samples.bad).most_common():
        examples = [
            " ".join(where.split()) for other, where in samples.bad if other == kind
        ][:3]
        print(
            printable(
                "\n  ".join([f"cannot be used        {count:,}: {kind}", *examples])
            )
        )
    if not lengths:
        raise InputError(
            f"none of {len(samples.bad):,} samples can be used; the first: {samples.bad[0][1]}"
        )
    print(
        f"{len(lengths):,} good samples and {len(samples.bad):,} bad ones, the first of "
        f"{sum(sum(s.counts) for s in samples.sources):,}; {model.n_image_tokens} image tokens per picture"
    )
    for label, values in (
        ("tokens of a sample", lengths),
        ("of these, trained", answers),
    ):
        print(
            f"{label:<22}{np.mean(values):.1f} on average, {min(values)} to {max(values)}"
        )
    cut = np.mean([n >= config.max_txt_len for n in answers])
    print(
        f"at max_txt_len        {cut:.1%} of the samples: their answers are cut or just fit"
    )
    print(f"unknown tokens        {unknown}")
    group = max(8, config.length_group)
    n_steps = group * max(
        1, min(len(lengths), 1000) // (group * config.batch_size * config.grad_accum)
    )
    for size in (1, group):
        groups = Groups(
            samples, weights, replace(config, length_group=size, max_steps=n_steps)
        )
        print(
            f"padding               {padding(groups):.1%} of all tokens with length_group {size}"
        )


if __name__ == "__main__":
    run_main(main)
