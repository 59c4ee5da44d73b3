"""Random weights of the real shapes, in the official formats and under official names.

    python tests/random_weights.py vision weights/random/eva_vit_g.pth
    python tests/random_weights.py qformer weights/random/blip2_pretrained_flant5xxl.pth
    python tests/random_weights.py llama weights/random/vicuna-7b [--size=7b|1.1b|13b]
    python tests/random_weights.py proj weights/random/prerained_minigpt4_7b.pth

They rehearse conversion, chat and training before 30 GB are downloaded; the model talks
nonsense. Without --tokenizer=FILE the LLaMA folder gets a tokenizer of 32,000 made-up
pieces.
"""

import io
import random
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from llama import Llama, LlamaConfig
from plumbing.console import InputError, progress, run_main
from plumbing.files import replacing
from plumbing.options import option, override, parse_args
from plumbing.weights import PARTS, load_tensors
from qformer import QFormer, QFormerConfig
from tools import convert
from vision import VisionConfig, VisionTransformer

LLAMA = {
    "7b": LlamaConfig(),
    "13b": LlamaConfig(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
    ),
    "1.1b": LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=64,
        rms_norm_eps=1e-5,
    ),
}
OFFICIAL = {ours: theirs for theirs, ours in convert.NAMES.items()}


@dataclass(frozen=True)
class Options:
    size: str = option("7b", f"llama, proj: {', '.join(LLAMA)}")
    format: str = option("safetensors", "llama: safetensors or bin")
    tokenizer: str = option("", "llama: a tokenizer.model to copy; none: a made-up one")
    seed: int = option(0, "of the weights and the made-up tokenizer")

    def __post_init__(self):
        if self.tokenizer and not Path(self.tokenizer).is_file():
            raise InputError(f"--tokenizer={self.tokenizer}: there is no such file")
        if self.size not in LLAMA or self.format not in ("safetensors", "bin"):
            raise InputError(
                f"--size={self.size} --format={self.format}: "
                f"sizes are {', '.join(LLAMA)}, formats safetensors and bin"
            )


def random_tensor(
    name: str, shape: tuple, generator: torch.Generator, dtype=torch.float16
) -> torch.Tensor:
    """Norm weights are one, biases zero, others normal with standard deviation 0.02."""
    if len(shape) == 1:
        is_norm = "norm" in name.lower() and name.endswith("weight")
        return torch.full(shape, 1.0 if is_norm else 0.0, dtype=dtype)
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    return tensor.normal_(std=0.02, generator=generator).to(dtype)


def official_shapes(part: str, llama: LlamaConfig) -> dict[str, tuple]:
    """{official name: shape} of a part other than LLaMA, and of some unused tensors."""
    if part == "proj":
        return {
            "llama_proj.weight": (llama.hidden_size, QFormerConfig().width),
            "llama_proj.bias": (llama.hidden_size,),
            "llama_model.model.layers.0.self_attn.rotary_emb.inv_freq": (64,),
        }
    if part == "vision":  # one block more than BLIP-2 uses
        config = VisionConfig(n_layers=40)
        unused = dict.fromkeys(("norm.weight", "norm.bias"), (config.width,))
        return convert.parameter_shapes(VisionTransformer, config) | unused
    shapes = {
        "Qformer.bert.embeddings.word_embeddings.weight": (30523, 768),
        "t5_proj.weight": (4096, 768),
    }
    own = convert.parameter_shapes(QFormer, QFormerConfig())
    for name, shape in own.items():
        shapes[convert.rename(f"qformer.{name}", OFFICIAL)] = shape
    return shapes


def write_llama(folder: Path, options: Options, generator: torch.Generator):
    """Write a Hugging Face folder, .bin files from the .safetensors of convert.py."""
    config = LLAMA[options.size]
    shapes = convert.parameter_shapes(Llama, config)
    layout = {
        name: torch.empty(shape, dtype=torch.float16, device="meta")
        for name, shape in shapes.items()
    }

    def read(name):
        return random_tensor(name, shapes[name], generator)

    folder.mkdir()
    convert.write_llama(folder, convert.Source(config, layout, read))
    if options.format == "bin":
        pickle_shards(folder)
    tokenizer = folder / "tokenizer.model"
    if options.tokenizer:
        shutil.copyfile(options.tokenizer, tokenizer)
    else:
        tokenizer.write_bytes(made_up_tokenizer(config.vocab_size, options.seed))


def pickle_shards(folder: Path):
    """Replace a folder's .safetensors files and their index by .bin files."""
    index = folder / "model.safetensors.index.json"
    names = index.read_text().replace('"model-', '"pytorch_model-')
    names = names.replace(".safetensors", ".bin")
    (folder / "pytorch_model.bin.index.json").write_text(names)
    index.unlink()
    shards = sorted(folder.glob("*.safetensors"))
    for file in progress(shards, "bin", unit="file"):
        mapped, _ = load_tensors(file)
        tensors = {name: tensor.clone() for name, tensor in mapped.items()}
        torch.save(tensors, folder / f"pytorch_{file.stem}.bin")
        file.unlink()


def made_up_tokenizer(vocab_size: int, seed: int) -> bytes:
    """A sentencepiece model of random words, with LLaMA's settings."""
    rng = random.Random(seed)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    frequencies = range(26, 0, -1)
    words = []
    for _ in range(100_000):
        length = rng.randint(2, 9)
        words.append("".join(rng.choices(letters, weights=frequencies, k=length)))
    lines = [" ".join(words[i : i + 20]) for i in range(0, len(words), 20)]
    lines += ["###Human: <Img></Img> ###Assistant: "] * 9
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        byte_fallback=True,
        vocab_size=vocab_size,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def main(argv: list[str]):
    (part, path), given = parse_args(argv, __doc__, "PART DST", Options)
    options = override(Options(), given)
    target = Path(path)
    if part not in PARTS:
        raise InputError(
            f"usage: python tests/random_weights.py {'|'.join(PARTS)} DST "
            "[--key=value ...]"
        )
    if target.exists():
        raise InputError(
            f"{target} exists already: give another name, or remove it first"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(options.seed)
    if part == "llama":
        write_llama(target, options, generator)
        return
    dtype = torch.float16 if part == "vision" else torch.float32
    shapes = official_shapes(part, LLAMA[options.size])
    tensors = {}
    for name in progress(shapes, part):
        tensors[name] = random_tensor(name, shapes[name], generator, dtype)
    content = tensors if part == "vision" else {"model": tensors, "epoch": 0}
    with replacing(target) as temporary:
        torch.save(content, temporary)


if __name__ == "__main__":
    run_main(main)
