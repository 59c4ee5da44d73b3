"""What a run will need, computed on PyTorch's meta device: no weights, no data and no memory are needed.

    python train.py configs/stage1.py --dry_run=True
    python chat.py --ckpt=out/stage2 --dry_run=True

Sizes are read from the headers of the weight files and from LLaMA's config.json; where these are not there,
the official sizes (EVA-ViT-g, BLIP-2's Q-Former, LLaMA-7B) are taken, and it says so. Memory is an estimate:
the weights, what autograd keeps for the backward pass (measured by its hooks), gradients and AdamW's moments.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configs.schema import Config, InputError, read_saved_config
from data import open_source
from llama import CONTEXT, LlamaConfig, read_json
from model import PARTS, File, MiniGPT4, check_parts, read_part

GIB = 2**30
OFFICIAL_LLAMA = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
PROMPT_TOKENS = 30  # of a template and an instruction with LLaMA's tokenizer, beside image and answer


def meta_model(config: Config, train: tuple[str, ...] = ()) -> tuple[MiniGPT4, list[str]]:
    """The model of a config on the meta device, the parts in `train` learning, and notes on sizes that had to
    be assumed."""
    if not config.llama:
        raise InputError("llama: no language model is given; set llama")
    sources = {name: getattr(config, name) for name in ("vision", "qformer", "llama")}
    files, notes = {}, []
    for name, source in sources.items():
        if isinstance(source, dict) or not source:
            continue
        if name == "llama" and (Path(source) / "config.json").is_file():
            sizes = Path(source) / "config.json"  # is enough
            files[name] = File(source, {}, LlamaConfig.from_dict(read_json(sizes), str(sizes)))
        elif Path(source).is_file():
            files[name] = read_part(name, source)
        else:
            notes.append(f"{source} is not here: official sizes are assumed for the {name} part")
            sources[name] = OFFICIAL_LLAMA if name == "llama" else {}
    model = MiniGPT4.on_meta(**sources, files=files, vocab_size=32000, image_size=config.image_size)
    for name in PARTS:
        if getattr(model, name) is not None:
            for p in model.part_parameters(name).values():
                p.data = p.data.to(torch.float32 if name in train else getattr(torch, config.dtype))
                p.requires_grad_(name in train)
    return model, notes


def describe_parts(model: MiniGPT4) -> list[str]:
    """A table: parameters, bytes and trainable parameters of each part."""
    lines = [f"{'part':<10}{'parameters':>16}{'GiB':>9}{'dtype':>10}{'learn':>14}"]
    total = [0, 0, 0]
    for name in PARTS:
        if getattr(model, name) is None:
            continue
        tensors = list(model.part_parameters(name).values())
        row = [sum(t.numel() for t in tensors), sum(t.nbytes for t in tensors),
               sum(t.numel() for t in tensors if t.requires_grad)]
        total = [a + b for a, b in zip(total, row)]
        dtype = str(tensors[0].dtype).removeprefix("torch.")
        lines.append(f"{name:<10}{row[0]:>16,}{row[1] / GIB:>9.3f}{dtype:>10}{row[2]:>14,}")
    lines.append(f"{'all':<10}{total[0]:>16,}{total[1] / GIB:>9.3f}{'':>10}{total[2]:>14,}")
    return lines


def describe_training(config: Config, world: int = 1) -> str:
    """The whole answer for train.py, for `world` processes."""
    check_parts(config.train, config.vision, config.qformer)
    model, notes = meta_model(config, config.train)
    table, n_image = describe_parts(model), model.image_shape[1]
    prompt = 1 + (PROMPT_TOKENS if config.template else 0)
    B, T = config.batch_size, prompt + n_image + config.max_txt_len
    tokens = torch.zeros(B, T, dtype=torch.int64, device="meta")
    images = None
    model.llama.grad_checkpoint = config.grad_checkpoint
    if config.cache_features:
        notes.append("once the features are cached, vision and qformer are not in memory, nor counted below")
        images = torch.empty(B, n_image, model.proj.in_features, device="meta")
        model.vision = model.ln_vision = model.qformer = None
    elif n_image:
        images = torch.empty(B, 3, model.image_size, model.image_size, dtype=torch.uint8, device="meta")
    kept: dict[int, int] = {}  # storage -> bytes
    weights = {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(t):
        storage = t.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return t

    with FlopCounterMode(display=False) as counter, saved_tensors_hooks(keep, lambda t: t):
        x = model.llama.embed_tokens(tokens)  # as in MiniGPT4.forward, whose indexing needs real ids
        if images is not None:
            x = torch.cat((model.encode_image(images).to(x.dtype), x[:, n_image:]), dim=1)
        answers = model.llama(x)[:, -config.max_txt_len:]
        model.cross_entropy(answers.flatten(0, 1), tokens[:, -config.max_txt_len:].flatten()).backward()
    flops = counter.get_total_flops() * config.grad_accum
    weight_bytes = sum(p.nbytes for p in model.parameters())
    learn_bytes = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    peak = weight_bytes + sum(kept.values()) + 3 * learn_bytes
    lines = [*table, "", f"tokens per sample     at most {T}: {prompt} of prompt, {n_image} of image, "
                  f"{config.max_txt_len} of answer",
              f"FLOPs per step        {flops / 1e12:.3g} TFLOP for {B} x {config.grad_accum} samples in each "
              "process",
              f"peak memory           about {peak / GIB:.1f} GiB a process: "
              f"{weight_bytes / GIB:.1f} weights, {sum(kept.values()) / GIB:.1f} activations, "
              f"{3 * learn_bytes / GIB:.2f} gradients, moments",
              f"samples and epochs    {_epochs(config, world)}"]
    return "\n".join([f"note: {n}" for n in notes] + lines)


def _epochs(config, world):
    drawn = world * config.batch_size * config.grad_accum * config.max_steps
    data = [config.data] if isinstance(config.data, str) else config.data
    weights = data if isinstance(data, dict) else dict.fromkeys(data, 1.0)
    found = []
    for path, weight in weights.items():
        share = drawn * weight / sum(weights.values())
        try:
            n = sum(open_source(path).counts)
            found.append(f"{share / n:.2f} epochs of the {n:,} in {path}")
        except InputError:
            found.append(f"{share:,.0f} draws from {path}, which is not here")
    return f"{drawn:,} samples for {world} process(es): " + "; ".join(found)


def describe_chat(options) -> str:
    """The whole answer for chat.py."""
    folder = options.ckpt or str(Path(__file__).resolve().parent.parent / "assets/tiny")
    config = read_saved_config(folder)
    model, notes = meta_model(replace(config, dtype=options.dtype or config.dtype), train=("proj",))
    weights = sum(p.nbytes for p in model.parameters())
    llama = model.llama.config
    cache = 2 * llama.num_hidden_layers * llama.num_key_value_heads * llama.head_dim * CONTEXT * 2
    lines = describe_parts(model)
    lines += ["", f"peak memory           about {(weights + cache) / GIB:.1f} GiB: the weights, and "
                  f"{cache / GIB:.2f} for keys and values of {CONTEXT} tokens"]
    return "\n".join(lines + [f"note: {n}" for n in notes])
