"""Random weights of the true shapes, in the official formats and names: rehearse conversion, chat and
training before fetching 30 GB.

    python tests/random_weights.py vision weights/random/eva_vit_g.pth
    python tests/random_weights.py qformer weights/random/blip2_pretrained_flant5xxl.pth
    python tests/random_weights.py llama weights/random/vicuna-7b [--size=7b|1.1b|13b] [--format=bin]
    python tests/random_weights.py proj weights/random/prerained_minigpt4_7b.pth [--size=7b]

Nothing sensible will come out of them. Without --tokenizer=FILE the LLaMA folder gets a tokenizer of 32,000
made-up pieces.
"""

import io
import json
import random
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configs.schema import InputError, option, override, parse_args, run_main
from llama import LlamaConfig
from model import MiniGPT4
from qformer import QFormerConfig
from vision import VisionConfig

LLAMA = {
    "7b": LlamaConfig(),
    "13b": LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
                       num_attention_heads=40, num_key_value_heads=40),
    "1.1b": LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
                        num_attention_heads=32, num_key_value_heads=4, head_dim=64, rms_norm_eps=1e-5),
}
SHARD = 4 * 2**30  # bytes of a LLaMA shard, about
OFFICIAL = (  # our Q-Former names -> the official file's
    (r"query_tokens$", "query_tokens"),
    (r"norm\.", "Qformer.bert.embeddings.LayerNorm."),
    (r"layers\.(\d+)\.self_attn\.out\.", r"Qformer.bert.encoder.layer.\1.attention.output.dense."),
    (r"layers\.(\d+)\.self_attn\.norm\.", r"Qformer.bert.encoder.layer.\1.attention.output.LayerNorm."),
    (r"layers\.(\d+)\.self_attn\.", r"Qformer.bert.encoder.layer.\1.attention.self."),
    (r"layers\.(\d+)\.cross_attn\.out\.", r"Qformer.bert.encoder.layer.\1.crossattention.output.dense."),
    (r"layers\.(\d+)\.cross_attn\.norm\.", r"Qformer.bert.encoder.layer.\1.crossattention.output.LayerNorm."),
    (r"layers\.(\d+)\.cross_attn\.", r"Qformer.bert.encoder.layer.\1.crossattention.self."),
    (r"layers\.(\d+)\.fc1\.", r"Qformer.bert.encoder.layer.\1.intermediate_query.dense."),
    (r"layers\.(\d+)\.fc2\.", r"Qformer.bert.encoder.layer.\1.output_query.dense."),
    (r"layers\.(\d+)\.norm\.", r"Qformer.bert.encoder.layer.\1.output_query.LayerNorm."),
    (r"ln_vision\.", "ln_vision."),
)


@dataclass(frozen=True)
class Options:
    size: str = option("7b", "llama, proj: 7b, 13b or 1.1b")
    format: str = option("safetensors", "llama: safetensors or bin")
    tokenizer: str = option("", "llama: a tokenizer.model to put beside; none: a made-up one")
    seed: int = option(0, "of the weights")

    def __post_init__(self):
        if self.tokenizer and not Path(self.tokenizer).is_file():
            raise InputError(f"--tokenizer={self.tokenizer}: there is no such file")
        if self.size not in LLAMA or self.format not in ("safetensors", "bin"):
            raise InputError(f"--size={self.size} --format={self.format}: sizes are {', '.join(LLAMA)}, "
                             "formats safetensors and bin")


def random_tensor(name: str, shape: tuple, generator: torch.Generator, dtype=torch.float16) -> torch.Tensor:
    """Norm weights are one, biases zero, all else is normal with standard deviation 0.02."""
    if len(shape) == 1:
        return torch.full(shape, float("norm" in name.lower() and name.endswith("weight")), dtype=dtype)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator).to(dtype)


def shapes_of(part: str, size: str) -> dict[str, tuple]:
    """{our name: shape} of an official part."""
    with torch.device("meta"):
        model = MiniGPT4(VisionConfig(n_layers=40 if part == "vision" else 1), QFormerConfig(), LLAMA[size])
    return {k: tuple(p.shape) for k, p in model.part_parameters(part).items()}


def write_vision(path, options, make):
    shapes = shapes_of("vision", options.size)
    shapes |= dict.fromkeys(("norm.weight", "norm.bias"), shapes["cls_token"][-1:])
    torch.save({k: make(k, shape) for k, shape in tqdm(shapes.items(), desc="vision")}, path)


def write_qformer(path, options, make):
    tensors = {}
    for k, shape in tqdm(shapes_of("qformer", options.size).items(), desc="qformer"):
        pattern, theirs = next(row for row in OFFICIAL if re.match(row[0], k))
        name = re.sub("^" + pattern, theirs, k)
        tensors[name] = make(name, shape, dtype=torch.float32)
    tensors["Qformer.bert.embeddings.word_embeddings.weight"] = torch.zeros(30523, 768)  # the text branch
    tensors["t5_proj.weight"] = torch.zeros(4096, 768)
    torch.save({"model": tensors}, path)


def write_proj(path, options, make):
    shapes = shapes_of("proj", options.size)
    tensors = {f"llama_{k}": make(k, shape, dtype=torch.float32) for k, shape in shapes.items()}
    tensors["llama_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(64)  # a stray buffer
    torch.save({"model": tensors, "epoch": 0}, path)


def write_llama(folder, options, make):
    folder.mkdir()
    config, shards, n_bytes = LLAMA[options.size], [[]], 0
    shapes = {k if k.startswith("lm_head") else f"model.{k}": shape
              for k, shape in shapes_of("llama", options.size).items()}
    for k, shape in shapes.items():
        if n_bytes > SHARD:
            shards, n_bytes = [*shards, []], 0
        shards[-1].append(k)
        n_bytes += 2 * torch.Size(shape).numel()
    stem = "model" if options.format == "safetensors" else "pytorch_model"
    weight_map, bar = {}, tqdm(total=len(shapes), desc="llama")
    for i, names in enumerate(shards, 1):
        file = f"{stem}-{i:05d}-of-{len(shards):05d}.{options.format}"

        tensors = {k: make(k, shapes[k]) for k in names}
        bar.update(len(names))
        if options.format == "bin":
            torch.save(tensors, folder / file)
        else:
            save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.{options.format}.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config.to_hub(), indent=1))
    if options.tokenizer:
        shutil.copyfile(options.tokenizer, folder / "tokenizer.model")
    else:
        (folder / "tokenizer.model").write_bytes(made_up_tokenizer(config.vocab_size, options.seed))


def made_up_tokenizer(vocab_size: int, seed: int) -> bytes:
    """A sentencepiece model set up as LLaMA's, of pieces of random words."""
    rng = random.Random(seed)
    letters = "etaoinshrdlucmfwypvbgkjqxz"

    def word():
        return "".join(rng.choices(letters, weights=range(26, 0, -1), k=rng.randint(2, 9)))

    words = [word() for _ in range(100_000)]
    lines = [" ".join(words[i:i + 20]) for i in range(0, len(words), 20)]
    lines += ["###Human: <Img></Img> ###Assistant: "] * 9
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", byte_fallback=True,
        vocab_size=vocab_size, normalization_rule_name="identity", remove_extra_whitespaces=False,
        split_digits=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2)
    return model.getvalue()


WRITE = {"vision": write_vision, "qformer": write_qformer, "llama": write_llama, "proj": write_proj}


def main(argv: list[str]):
    positional, given = parse_args(argv, __doc__, "PART DST", Options)
    if positional[0] not in WRITE:
        raise InputError(f"usage: python tests/random_weights.py {'|'.join(WRITE)} DST [--key=value ...]")
    options, target = override(Options(), given), Path(positional[1])
    if target.exists():
        raise InputError(f"{target} exists already: give another name, or remove it first")
    generator = torch.Generator().manual_seed(options.seed)
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        WRITE[positional[0]](part, options, lambda k, shape, **kw: random_tensor(k, shape, generator, **kw))
        part.rename(target)
    except (OSError, RuntimeError) as e:
        raise InputError(f"{target}: cannot be written: {str(e).splitlines()[0]}") from e
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if part.is_file():
            part.unlink()


if __name__ == "__main__":
    run_main(main)
