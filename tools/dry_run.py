"""What a run will need, computed on PyTorch's meta device: no weights, data or memory are needed.

    python tools/dry_run.py configs/stage1.py --world=4 --batch_size=32      training, with 4 processes
    python tools/dry_run.py out/stage2                                       chat with a run's model

Sizes come from the weight files' headers and LLaMA's config.json; the official ones if files are missing.
Peak memory is an estimate: weights, gradients, AdamW's moments and what autograd keeps for the backward pass.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configs.schema import Config, load_config, read_saved_config
from data import open_samples
from llama import CONTEXT, IGNORE, LlamaConfig, Tokenizer, read_json
from model import PARTS, MiniGPT4, PartFile, check_sources, read_part
from plumbing.console import InputError, run_main
from plumbing.options import check_options, option, override, parse_args


@dataclass(frozen=True)
class Options:
    world: int = option(1, "training processes", least=1)

    def __post_init__(self):
        check_options(self)


class MetaMiniGPT4(MiniGPT4):
    """The model on the meta device. Targets stay on the CPU: their values say how many logits to compute."""

    def cross_entropy(self, hidden, targets):
        return super().cross_entropy(hidden, targets.to(hidden.device))


def meta_model(
    config: Config, trainable: tuple[str, ...] = ()
) -> tuple[MetaMiniGPT4, list[str]]:
    """The model of a config on the meta device, and notes on the sizes that had to be assumed."""
    sources, files, notes = config.parts(), {}, []
    check_sources(sources, trainable, config.dtype, config.tokenizer)
    for name in ("vision", "qformer", "llama"):
        if (path := sources[name]) and isinstance(path, str):
            if name == "llama" and (sizes := Path(path) / "config.json").is_file():
                files[name] = PartFile(
                    path, {}, LlamaConfig.from_dict(read_json(sizes), str(sizes))
                )
            elif Path(path).is_file():
                files[name] = read_part(name, path)
            else:
                notes.append(
                    f"note: {path} is missing; official sizes are assumed for the {name} part"
                    + " (7B)" * (name == "llama")
                )
                sources[name] = asdict(LlamaConfig()) if name == "llama" else {}
    vocab_size = (
        Tokenizer(config.tokenizer).vocab_size
        if Path(config.tokenizer).is_file()
        else 32000
    )
    model = MetaMiniGPT4.on_meta(sources, files, vocab_size, config.image_size)
    model.to(getattr(torch, config.dtype)).requires_grad_(False)
    for name in (*trainable, "proj"):
        for _, module in model.part_modules(name):
            module.float().requires_grad_(name in trainable)
    return model, notes


def gib(tensors) -> float:
    return sum(t.nbytes for t in tensors) / 2**30


def describe_training(model: MetaMiniGPT4, config: Config, world: int):
    """Print FLOPs and memory of a step over samples of full length, and the samples of the whole run."""
    prompt, answer = 31 if config.template else 1, config.max_txt_len  # estimated
    B, T, S = (
        config.batch_size,
        prompt + model.n_image_tokens + answer,
        model.image_size,
    )
    targets = torch.tensor([[IGNORE] * (T - answer) + [0] * answer] * B)
    images = torch.empty(B, 3, S, S, dtype=torch.uint8, device="meta") if S else None
    if config.cache_features:  # as train.py does
        images, model.vision, model.bridge = model.image_features(images), None, None
    model.llama.grad_checkpoint, saved = (
        config.grad_checkpoint,
        {id(p): p for p in model.parameters()},
    )
    with (
        FlopCounterMode(display=False) as counter,
        saved_tensors_hooks(lambda t: saved.setdefault(id(t), t), lambda t: t),
    ):
        model(images, torch.zeros_like(targets, device="meta"), targets).backward()
    storages = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in saved.values()
    }
    weights, state = (
        gib(model.parameters()),
        3 * gib(p for p in model.parameters() if p.requires_grad),
    )
    activations = sum(storages.values()) / 2**30 - weights
    weights -= (
        gib(model.llama.layers.parameters()) * (1 - 1 / max(1, world)) * config.shard
    )
    n_drawn = world * B * config.grad_accum * config.max_steps
    print(f"""
tokens per sample     at most {T}: {prompt} prompt, {model.n_image_tokens} image, {answer} answer
FLOPs per step        {counter.get_total_flops() * config.grad_accum / 1e12:.3g} TFLOP per process
peak memory           about {weights + activations + state:.3g} GiB per process: {weights:.3g} weights, \
{activations:.3g} activations, {state:.3g} gradients and moments
samples               {n_drawn:,} with {world} process(es)""")
    try:
        samples, shares = open_samples(config.data, config, None, 0, 0)
        for source, (path, share) in zip(samples.sources, shares.items()):
            n, drawn = sum(source.counts), n_drawn * share / sum(shares.values())
            print(f"epochs                {drawn / n:.2f} of the {n:,} in {path}")
    except InputError as e:
        print(f"epochs                unknown: {e}")


def main(argv: list[str]):
    (path,), given = parse_args(argv, __doc__, "CONFIG|RUN_FOLDER", Options, Config)
    options, is_run = (
        override(Options(), {"world": given.pop("world", 1)}),
        Path(path).is_dir(),
    )
    config = (
        override(read_saved_config(path), given) if is_run else load_config(path, given)
    )
    model, notes = meta_model(config, () if is_run else config.trainable)
    print(
        *notes, f"{'part':<10}{'parameters':>16}{'trainable':>16}{'GiB':>9}", sep="\n"
    )
    parts = {name: list(model.part_parameters(name).values()) for name in PARTS}
    for name, tensors in (parts | {"all": list(model.parameters())}).items():
        print(
            f"{name:<10}{sum(t.numel() for t in tensors):>16,}"
            f"{sum(t.numel() for t in tensors if t.requires_grad):>16,}{gib(tensors):>9.3f}"
        )
    if is_run:
        sizes = model.llama.config
        cache = torch.empty(
            2,
            sizes.num_hidden_layers,
            sizes.num_key_value_heads,
            CONTEXT,
            sizes.head_dim,
            dtype=getattr(torch, config.dtype),
            device="meta",
        )
        total = gib((*model.parameters(), cache))
        print(
            f"\npeak memory           about {total:.3g} GiB, with keys and values of {CONTEXT} tokens"
        )
    else:
        describe_training(model, config, options.world)


if __name__ == "__main__":
    run_main(main)
