"""LLaMA (arXiv 2302.13971) with its KV cache and tokenizer: the voice of MiniGPT-4.

One decoder for LLaMA 1 and 2, Vicuna and every model of that architecture: RMSNorm, rotary positions, SwiGLU,
no biases, grouped-query attention, tied or separate output embeddings, as the folder's `config.json` says.
Module and tensor names are Hugging Face's without the leading `model.`.

Axes: B sequences, T tokens, S tokens seen so far (cache included), D width, H query heads, K key/value heads,
V vocabulary.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from sentencepiece import SentencePieceProcessor
from torch import nn
from torch.utils.checkpoint import checkpoint

from configs.schema import InputError, override

IMAGE = -1     # in a sequence of ids: the place of one image token
IGNORE = -100  # in the targets: nothing is to be predicted here
CONTEXT = 2000  # tokens of a conversation, at most


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes, under the names of Hugging Face's config.json; the defaults are LLaMA-7B's."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False

    @classmethod
    def from_dict(cls, sizes: dict, where: str = "config.json") -> "LlamaConfig":
        """From the content of a Hugging Face config.json, old (`rope_theta`) or new (`rope_parameters`).

        Raises InputError for what this file cannot compute: another architecture, scaled rotary positions."""
        rope = sizes.get("rope_parameters") or sizes.get("rope_scaling") or {}
        if not isinstance(rope, dict) or not isinstance(sizes.get("sliding_window") or 0, int):
            raise InputError(f"{where}: rope_scaling or sliding_window is not a LLaMA's; fetch it again")
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise InputError(f"{where}: rotary scaling {rope} is not supported; take a model without it")
        if sizes.get("model_type", "llama") not in ("llama", "mistral"):
            raise InputError(f"{where}: {sizes['model_type']} is not of LLaMA's architecture; take a model "
                             "that is")
        if (sizes.get("sliding_window") or CONTEXT) < CONTEXT:  # a wider window makes no difference here
            raise InputError(f"{where}: a sliding window of {sizes['sliding_window']} tokens is not "
                             f"supported, only those of {CONTEXT} and more; take another model")
        if sizes.get("attention_bias") or sizes.get("mlp_bias") or sizes.get("hidden_act", "silu") != "silu":
            raise InputError(f"{where}: biases or an activation other than silu are not LLaMA's; "
                             "take another model")
        needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                  "num_attention_heads")
        if wrong := [k for k in needed if not isinstance(sizes.get(k), int) or sizes[k] < 1]:
            raise InputError(f"{where}: no whole number above 0 for {', '.join(wrong)}; it must be the "
                             "config.json of a LLaMA")
        heads = sizes["num_attention_heads"]
        read = dict(
            vocab_size=sizes["vocab_size"],
            hidden_size=sizes["hidden_size"],
            intermediate_size=sizes["intermediate_size"],
            num_hidden_layers=sizes["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=sizes.get("num_key_value_heads") or heads,
            head_dim=sizes.get("head_dim") or sizes["hidden_size"] // heads,
            rms_norm_eps=sizes.get("rms_norm_eps") or 1e-6,
            rope_theta=sizes.get("rope_theta") or rope.get("rope_theta") or 10000.0,
            tie_word_embeddings=sizes.get("tie_word_embeddings") or False,
        )
        return override(cls(), read, where)

    def to_hub(self) -> dict:
        """The content of a Hugging Face config.json; from_dict is its inverse."""
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | asdict(self)


class RMSNorm(nn.Module):
    """x (..., D) over its root mean square, in float32, times a weight."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


def rotary_angles(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """positions (T,) -> cos, sin float32 (T, head_dim), halves alike (Hugging Face's half-split layout)."""
    inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angles = torch.outer(positions.float(), inv_freq).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + head_dim/2]) of x (B, H, T, head_dim) by its position's angle."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class KVCache:
    """Keys and values of the tokens seen so far, allocated once: per layer (B, K, max_tokens, head_dim)."""

    def __init__(self, config: LlamaConfig, batch: int, max_tokens: int, device, dtype):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, max_tokens, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # tokens stored; Llama.forward moves it on

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor):
        """Store k, v (B, K, T, head_dim) behind the others; returns all of them, (B, K, S, head_dim) each."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length:end] = k
        self.values[layer, :, :, self.length:end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    """Causal self-attention with rotary positions, x (B, T, D) -> (B, T, D)."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.grouped = config.num_key_value_heads != config.num_attention_heads
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x, cos, sin, cache):
        B, T, D = x.shape
        heads = lambda t: t.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H or K, T, head_dim)
        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        # a single new token may look at everything; otherwise the sequence starts here and is causal
        causal = cache is None or T > 1
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=self.grouped)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU, x (B, T, D) -> (B, T, D)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm attention and MLP, x (B, T, D) -> (B, T, D)."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, cache):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class Llama(nn.Module):
    """Embeddings (B, T, D) in the weights' dtype -> hidden states (B, T, D) after the final norm.

    The model takes embeddings, not ids, because image tokens have no id: `embed_tokens` makes those of the
    text. `logits` reads the hidden states out."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.grad_checkpoint = False  # keep only the inputs of the blocks for the backward pass
        # without a weight nn.Embedding draws one, for which the meta device imports a second of code
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size,
                                         _weight=torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, x, cache: KVCache | None = None):
        """With a cache, x holds the whole prompt (cache empty) or the single token that comes next."""
        T, seen = x.shape[1], cache.length if cache is not None else 0
        assert seen == 0 or T == 1, "after the prompt, the cache takes one token at a time"
        positions = torch.arange(seen, seen + T, device=x.device)
        angles = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        cos, sin = (t.to(x.dtype) for t in angles)
        for block in self.layers:
            if self.grad_checkpoint and x.requires_grad:
                x = checkpoint(block, x, cos, sin, cache, use_reentrant=False)
            else:
                x = block(x, cos, sin, cache)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    def logits(self, hidden):
        """Hidden states (..., D) -> logits (..., V) in the same dtype."""
        return F.linear(hidden, (self.lm_head or self.embed_tokens).weight)

    @torch.no_grad()
    def init_weights(self):
        """Random weights for training from nothing: normal with variance 1 / inputs, residual outputs smaller
        with depth, embeddings 0.02, norms at one."""
        for name, p in self.named_parameters():
            if p.dim() == 1:
                p.fill_(1)
            elif name == "embed_tokens.weight":
                nn.init.normal_(p, std=0.02)
            else:
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=(p.shape[1] * (2 * len(self.layers) if deep else 1)) ** -0.5)


class Tokenizer:
    """A sentencepiece `tokenizer.model`. `<s>` and `</s>` are ids 1 and 2; typed as letters, plain text."""

    def __init__(self, path: str):
        try:
            self.sp = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as e:
            raise InputError(f"{path}: no sentencepiece model; it belongs to the LLaMA folder as "
                             "tokenizer.model") from e
        self.path = str(path)
        self.bos, self.eos, self.vocab_size = self.sp.bos_id(), self.sp.eos_id(), self.sp.vocab_size()

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """"a dog" -> [263, 11203]. Sentencepiece adds its leading space piece; bos puts `<s>` before it."""
        return [self.bos] * bos + self.sp.encode(text)

    def decode(self, ids: list[int]) -> str:
        """[263, 11203] -> "a dog". The leading space piece is dropped again; control tokens give no text."""
        return self.sp.decode(ids)


def read_llama_folder(folder: str) -> tuple[LlamaConfig, list[Path]]:
    """The sizes and safetensors files of a Hugging Face folder. Raises InputError if something is missing."""
    root, index = Path(folder), Path(folder) / "model.safetensors.index.json"
    if not (root / "config.json").is_file():
        raise InputError(f"{folder}: not a LLaMA folder, it has no config.json; see the README on getting "
                         "the weights")
    config = LlamaConfig.from_dict(read_json(root / "config.json"), f"{folder}/config.json")
    shards = sorted(root.glob("*.safetensors"))
    if index.is_file():
        shards = indexed_files(index)
    if not shards:
        raise InputError(f"{folder}: no *.safetensors file; see the README on getting the weights")
    return config, shards


def indexed_files(index: Path) -> list[Path]:
    """The weight files that a Hugging Face *.index.json names. Raises InputError if one is not there."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise InputError(f"{index}: it has no weight_map; fetch it again")
    files = [index.parent / name for name in sorted(set(names.values()))]
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: there is no such weight file, but {index.name} names it; fetch it too")
    return files


def read_json(path: Path) -> dict:
    """A JSON file that holds an object. Raises InputError for another."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as e:
        raise InputError(f"{path}: there is no such file") from e
    except ValueError as e:
        raise InputError(f"{path}: not valid JSON ({e}); fetch it again") from e
    if not isinstance(content, dict):
        raise InputError(f"{path}: it should hold a JSON object; fetch it again")
    return content
