"""The first samples of a training config as they go into the model, and what all of them are like.

    python data.py configs/stage2.py [--plain=True] [--show=3] [--n=1000] [--key=value of the config ...]

Each picture is drawn with coloured half-blocks (only its size with --plain=True), then every token: trained
ones green, the others grey, a row of image tokens as <image x 32>. Then, of the first n samples: lengths,
padding with and without length_group, captions cut at max_txt_len, and unknown tokens.
"""

import sys
from dataclasses import dataclass, fields
from itertools import groupby, islice
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configs.schema import Config, InputError, load_config, override, parse_args
from data import BadSample, Key, Reader, open_samples
from llama import IGNORE, IMAGE, Tokenizer
from tools.dry_run import meta_model
from train import prepare_data

GREEN, GREY, PLAIN = "\033[32m", "\033[90m", "\033[0m"


@dataclass(frozen=True)
class Options:
    plain: bool = False  # no colors and no pictures
    show: int = 3        # samples
    n: int = 1000        # samples for the statistics


def half_blocks(image: np.ndarray, columns: int = 32) -> str:
    """uint8 (3, S, S) -> lines of text, two pixels a character."""
    step = max(1, image.shape[1] // columns)
    pixels = image[:, ::step, ::step].transpose(1, 2, 0).tolist()
    lines = []
    for above, below in zip(pixels[::2], pixels[1::2]):
        cells = ["\033[38;2;{};{};{};48;2;{};{};{}m\u2580".format(*a, *b) for a, b in zip(above, below)]
        lines.append("".join(cells) + PLAIN)
    return "\n".join(lines)


def tokens_as_text(ids: list[int], targets: list[int], tokenizer: Tokenizer, plain: bool) -> str:
    """Every token between bars; trained ones are green, or stand in [[ ]] where there are no colors."""
    parts = []
    for kind, run in groupby(zip(ids, targets), key=lambda pair: (pair[0] == IMAGE, pair[1] != IGNORE)):
        image, trained = kind
        run = [i for i, _ in run]
        text = f"<image x {len(run)}>" if image else "|".join(tokenizer.sp.id_to_piece(i) for i in run)
        if plain:
            parts.append(f"[[{text}]]" if trained else text)
        else:
            parts.append(f"{GREEN if trained else GREY}{text}{PLAIN}")
    return " ".join(parts)


def padding(batches) -> float:
    """The share of a run's tokens that are padding: those behind the last one to be predicted."""
    return 1 - sum(b.n_tokens for b in batches) / sum(b.tokens.numel() for b in batches)


def main(argv: list[str]):
    positional, given = parse_args(argv)
    if len(positional) != 1:
        raise InputError("usage: python data.py CONFIG [--plain=True] [--show=3] [--n=1000] [--key=value]")
    own = {f.name for f in fields(Options)}
    options = override(Options(), {k: v for k, v in given.items() if k in own})
    config = load_config(positional[0], {k: v for k, v in given.items() if k not in own})
    prepare_data(config, rank=0)
    image_shape = meta_model(config)[0].image_shape
    tokenizer = Tokenizer(config.tokenizer or f"{config.llama}/tokenizer.model")
    samples, weights = open_samples(config.data, config, tokenizer, *image_shape)

    seen = list(samples.first(options.n))
    if not seen:
        try:
            samples.sample(Key(0, 0, 0, 0))
        except BadSample as e:
            raise InputError("none of the samples can be used; the first is "
                             f"{samples.sources[0].describe(0, 0)} ({e})") from e
        raise InputError(f"--n={options.n}: give at least 1")
    for images, ids, targets in seen[:options.show]:
        for image in images:
            print(f"picture {tuple(image.shape)}" if options.plain else half_blocks(image.numpy()))
        print(tokens_as_text(ids, targets, tokenizer, options.plain), end="\n\n")

    lengths, answers, cut, unknown = [], [], 0, 0
    unk = tokenizer.sp.unk_id()
    for _, ids, targets in seen:
        wanted = [t for t in targets if t != IGNORE]
        lengths.append(len(ids))
        answers.append(len(wanted))
        cut += len(wanted) >= config.max_txt_len
        unknown += sum(i == unk for i in ids)
    n = len(lengths)
    spread = lambda values: f"{np.mean(values):.1f} on average, {min(values)} to {max(values)}"
    total = sum(sum(s.counts) for s in samples.sources)
    print(f"{n} samples of {total:,}, {image_shape[1]} image tokens for each picture")
    print(f"tokens of a sample    {spread(lengths)}\nof these, trained     {spread(answers)}")
    print(f"at max_txt_len        {cut / n:.1%} of the samples: their answers are cut or just fit")
    print(f"unknown tokens        {unknown}")
    for group in (1, max(8, config.length_group)):
        reader = Reader(samples, weights, override(config, {"length_group": group, "num_workers": 0}))
        few = list(islice(reader, max(1, n // config.batch_size)))
        print(f"padding               {padding(few):.1%} of all tokens with length_group {group}")
    print(f"cannot be used        {reader.account() if reader.skipped else f'none of {reader.looked_at}'}")
