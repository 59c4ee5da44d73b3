"""Estimate memory and FLOPs of training or chat, without weights or data.

    python tools/dry_run.py configs/stage1.py --world=4 --batch_size=32    training
    python tools/dry_run.py out/stage2                                     chat

Runs on PyTorch's meta device. Sizes come from the headers of weight files and from
LLaMA's config.json; where files are missing, the official sizes are assumed. Every
field of the config is an option; the defaults in --help are for fields that it leaves
unset. Peak memory is an estimate: weights, gradients, AdamW's moments, and activations
for the backward pass.
"""

import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configs.schema import Config, load_config, read_saved_config
from data import open_samples
from llama import IGNORE, LlamaConfig
from model import KINDS, MiniGPT4
from plumbing.console import InputError, run_main
from plumbing.files import read_json
from plumbing.options import option, override, read_options
from plumbing.tokenizer import open_tokenizer
from plumbing.weights import PARTS, PartFile, check_sources, read_part, read_sizes

PROMPT = 31  # tokens of a template with an instruction, estimated
# config.json of tools/get_weights.py's models. LlamaConfig's first sizes: ids, width,
# MLP, layers, heads, key/value heads, head_dim
tied = partial(LlamaConfig, tie_word_embeddings=True)
LLAMA = {
    "vicuna-13b": LlamaConfig(32000, 5120, 13824, 40, 40, 40),
    "tinyllama": LlamaConfig(32000, 2048, 5632, 22, 32, 4, 64),
    "smollm2-135m": tied(49152, 576, 1536, 30, 9, 3, 64),
    "smollm2-360m": tied(49152, 960, 2560, 32, 15, 5, 64),
    "smollm2-1.7b": tied(49152, 2048, 8192, 24, 32, 32, 64),
    "qwen2.5-1.5b": tied(151936, 1536, 8960, 28, 12, 2, 128),
    "qwen3-1.7b": tied(151936, 2048, 6144, 28, 16, 8, 128),
    "llama3.2-1b": tied(128256, 2048, 8192, 16, 32, 8, 64),
}


@dataclass(frozen=True)
class Options:
    world: int = option(1, "number of training processes", least=1)


class MetaMiniGPT4(MiniGPT4):
    """The model on the meta device, but its targets: their values are needed."""

    def cross_entropy(self, hidden, targets):
        return super().cross_entropy(hidden, targets.to(hidden.device))


def meta_model(config, trainable=()):
    """The model of a config on the meta device. Prints which sizes are assumed."""
    sources = config.parts()
    check_sources(sources, trainable, config.dtype, config.tokenizer)
    files = {}
    for name in ("vision", "qformer", "llama"):
        source = sources[name]
        if isinstance(source, str) and source:
            files[name] = read_headers(name, Path(source))
            if files[name]:
                continue
            source = official_sizes(name, source)
        if isinstance(source, dict):
            files[name] = PartFile("the run's config", None, source)
    vocab_size = LlamaConfig().vocab_size
    if Path(config.tokenizer).is_file():
        vocab_size = open_tokenizer(config.tokenizer).vocab_size
    sizes = read_sizes(files, KINDS, vocab_size, config.image_size)
    with torch.device("meta"):
        model = MetaMiniGPT4(*sizes, config.image_size)
    model.to(getattr(torch, config.dtype)).requires_grad_(False)
    for name in model.parts.keys() & {*trainable, "proj"}:
        for module in model.parts[name].modules.values():
            module.float().requires_grad_(name in trainable)
    return model


def official_sizes(name, path):
    """The sizes of a part whose file is missing; prints which."""
    note = f"note: {path} is missing; official sizes are assumed for the {name} part"
    if name != "llama":
        print(note)
        return {}
    model = Path(path).name
    print(f"{note} ({model if model in LLAMA else '7B'})")
    return asdict(LLAMA.get(model, LlamaConfig()))


def read_headers(name, path):
    """A PartFile, LLaMA's without its weights; None if the file is missing."""
    if name == "llama":
        sizes = path / "config.json"
        if not sizes.is_file():
            return None
        config = LlamaConfig.from_dict(read_json(sizes), str(sizes))
        return PartFile(str(path), None, config)
    return read_part(name, str(path)) if path.is_file() else None


def gib(tensors):
    return sum(t.nbytes for t in tensors) / 2**30


def count_parameters(model):
    """Print a table of the parts: parameters, trainable ones, memory."""
    print(f"{'part':<10}{'parameters':>16}{'trainable':>16}{'GiB':>9}")
    names = dict.fromkeys((*PARTS, *model.parts))  # a new part stands at the end
    rows = {name: list(model.part_tensors(name).values()) for name in names}
    rows["all"] = list(model.parameters())
    for name, tensors in rows.items():
        total = sum(t.numel() for t in tensors)
        trainable = sum(t.numel() for t in tensors if t.requires_grad)
        print(f"{name:<10}{total:>16,}{trainable:>16,}{gib(tensors):>9.3f}")


def describe_training(model, config, world):
    """Print FLOPs and memory of a step over full-length samples, and the epochs."""
    prompt = PROMPT if config.template else 1
    answer = config.max_txt_len
    B, S = config.batch_size, model.image_size
    T = prompt + model.n_image_tokens + answer
    targets = torch.tensor([[IGNORE] * (T - answer) + [0] * answer] * B)
    images = torch.empty(B, 3, S, S, dtype=torch.uint8, device="meta") if S else None
    if config.cache_features:  # as train.py does
        images = model.image_features(images)
        model.drop_vision()
    model.llama.grad_checkpoint = config.grad_checkpoint

    saved = list(model.parameters())

    def keep(tensor):
        saved.append(tensor)
        return tensor

    counter = FlopCounterMode(display=False)
    with counter, saved_tensors_hooks(keep, lambda t: t):
        tokens = torch.zeros_like(targets, device="meta")
        model(images, tokens, targets).backward()
    storages = {}
    for tensor in saved:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()

    weights = gib(model.parameters())
    activations = sum(storages.values()) / 2**30 - weights
    state = 3 * gib(p for p in model.parameters() if p.requires_grad)
    if config.shard:
        kept_elsewhere = 1 - 1 / world
        weights -= gib(model.llama.layers.parameters()) * kept_elsewhere
    total = weights + activations + state
    tflop = counter.get_total_flops() * config.grad_accum / 1e12
    n_drawn = world * B * config.grad_accum * config.max_steps
    print(
        f"\ntokens per sample     at most {T}: {prompt} prompt, "
        f"{model.n_image_tokens} image, {answer} answer\n"
        f"FLOPs per step        {tflop:.3g} TFLOP per process\n"
        f"peak memory           about {total:.3g} GiB per process: "
        f"{weights:.3g} weights, {activations:.3g} activations, "
        f"{state:.3g} gradients and moments\n"
        f"samples               {n_drawn:,} with {world} process(es)"
    )
    print_epochs(config, n_drawn)


def print_epochs(config, n_drawn):
    """Print how often a run draws each sample of its sources."""
    try:
        samples, shares = open_samples(config.data, config, None, 0, 0)
    except InputError as e:
        print(f"epochs                unknown: {e}")
        return
    for source, (path, share) in zip(samples.sources, shares.items()):
        n = sum(source.counts)
        epochs = n_drawn * share / sum(shares.values()) / n
        print(f"epochs                {epochs:.2f} of the {n:,} in {path}")


def describe_chat(model, config):
    """Print the memory of a chat that fills the model's context."""
    sizes = model.llama.config
    n_tokens = sizes.max_position_embeddings
    heads = (sizes.num_hidden_layers, sizes.num_key_value_heads)
    shape = (2, *heads, n_tokens, sizes.head_dim)
    cache = torch.empty(shape, dtype=getattr(torch, config.dtype), device="meta")
    total = gib((*model.parameters(), cache))
    print(
        f"\npeak memory           about {total:.3g} GiB, "
        f"with keys and values of {n_tokens} tokens"
    )


def main(argv):
    usage = "CONFIG|RUN_FOLDER"
    (path,), options, given = read_options(argv, __doc__, usage, Options(), Config)
    if Path(path).is_dir():
        config = override(read_saved_config(path), given)
        model = meta_model(config)
        count_parameters(model)
        describe_chat(model, config)
    else:
        config = load_config(path, given)
        model = meta_model(config, config.trainable)
        count_parameters(model)
        describe_training(model, config, options.world)


if __name__ == "__main__":
    run_main(main)
