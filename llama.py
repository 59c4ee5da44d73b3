"""LLaMA (arXiv 2302.13971), MiniGPT-4's language model, with its KV cache, sampling and tokenizer.

For LLaMA 1 and 2, Vicuna and their like: RMSNorm, rotary positions, SwiGLU, no biases, grouped-query
attention, tied or separate output embeddings. Names are Hugging Face's without the leading `model.`. Axes:
B sequences, T tokens, S tokens with the cache's, D width, H query heads, K key/value heads, V vocabulary.
"""

import math
import os
import re
import shutil
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from sentencepiece import SentencePieceProcessor
from torch import nn
from torch.utils.checkpoint import checkpoint

from configs.prompts import is_end
from plumbing.console import InputError, note
from plumbing.files import read_json, start_of
from plumbing.options import override
from plumbing.weights import check_sizes, indexed_files, init_weights

IGNORE = -100  # in the targets: no prediction here
CONTEXT = 2000  # most tokens of a conversation


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
    max_position_embeddings: int = 2048  # most tokens of a conversation
    quantization: str = ""  # of the matrices: int8 or int4
    fingerprint: str = ""  # of the weights before they were quantized

    @classmethod
    def from_dict(cls, sizes: dict, where: str = "config.json") -> "LlamaConfig":
        """From a Hugging Face config.json, old or new. Raises InputError for unsupported models."""
        rope = sizes.get("rope_parameters") or sizes.get("rope_scaling") or {}
        window = sizes.get("sliding_window")
        if not isinstance(rope, dict) or not isinstance(window or 0, int):
            raise InputError(
                f"{where}: rope_scaling or sliding_window is malformed; fetch it again"
            )
        for is_supported, what in (
            (
                rope.get("rope_type", rope.get("type", "default")) == "default",
                f"rotary scaling {rope}",
            ),
            (
                (kind := sizes.get("model_type")) in (None, "llama", "mistral"),
                f"the architecture {kind}",
            ),
            (
                not window or window >= CONTEXT,
                f"a sliding window of {window} tokens, below {CONTEXT},",
            ),
            (
                not (sizes.get("attention_bias") or sizes.get("mlp_bias")),
                "a model with biases",
            ),
            (
                (kind := sizes.get("hidden_act", "silu")) == "silu",
                f"the activation {kind}",
            ),
        ):
            if not is_supported:
                raise InputError(
                    f"{where}: {what} is not supported; take another model"
                )
        needed = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        )
        if wrong := [
            k for k in needed if not isinstance(sizes.get(k), int) or sizes[k] < 1
        ]:
            raise InputError(
                f"{where}: no whole number above 0 for {', '.join(wrong)}; this is no LLaMA"
            )
        heads = sizes["num_attention_heads"]
        defaults = asdict(cls()) | {
            "num_key_value_heads": heads,
            "head_dim": sizes["hidden_size"] // heads,
        }
        defaults["rope_theta"] = rope.get("rope_theta") or cls.rope_theta
        read = {k: sizes.get(k) or v for k, v in defaults.items()}
        read["max_position_embeddings"] = min(
            read["max_position_embeddings"], window or math.inf
        )
        return check_sizes(override(cls(), read, where), where)

    def to_hub(self) -> dict:
        """The content of a Hugging Face config.json, the inverse of from_dict."""
        sizes = {k: v for k, v in asdict(self).items() if v != ""}
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | sizes


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


def rotary_angles(
    positions: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype
):
    """positions (T,) -> cos, sin (T, head_dim), both halves equal (Hugging Face's layout)."""
    inv_freq = 1.0 / theta ** (
        torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    )
    angles = torch.outer(positions.float(), inv_freq).repeat(1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """Rotate each pair (x[i], x[i + head_dim/2]) of x (B, H, T, head_dim) by its position's angle."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class KVCache:
    """Keys and values of the tokens so far: per layer two (B, K, capacity, head_dim) that grow as needed."""

    def __init__(self):
        self.layers: dict[int, list[torch.Tensor]] = {}
        self.length = 0  # tokens stored; advanced by Llama.forward. Set it lower to forget the last ones

    def select(self, rows: torch.Tensor):
        """Keep these rows of the batch, in this order; a row may come more than once."""
        self.layers = {
            layer: [t[rows] for t in stored] for layer, stored in self.layers.items()
        }

    def append(self, layer: int, *new: torch.Tensor) -> list[torch.Tensor]:
        """Append keys and values (B, K, T, head_dim); returns all of them, (B, K, S, head_dim) each."""
        stored, end = self.layers.get(layer), self.length + new[0].shape[2]
        if stored is None or end > stored[0].shape[2]:
            old = stored or [t[:, :, :0] for t in new]
            stored = self.layers[layer] = [
                F.pad(t, (0, 0, 0, max(256, 2 * end) - t.shape[2])) for t in old
            ]
        for whole, t in zip(stored, new):
            whole[:, :, self.length : end] = t
        return [whole[:, :, :end] for whole in stored]


class Attention(nn.Module):
    """Causal self-attention with rotary positions, x (B, T, D) -> (B, T, D)."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        D, q_width = config.hidden_size, config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(D, q_width, bias=False)
        self.k_proj = nn.Linear(D, kv_width, bias=False)
        self.v_proj = nn.Linear(D, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, D, bias=False)
        self.qkv_proj = None  # these three in one, when quantized
        self.quantized = {
            "qkv_proj": ["q_proj", "k_proj", "v_proj"],
            "o_proj": ["o_proj"],
        }

    def forward(self, x, cos, sin, cache):
        B, T, D = x.shape
        qkv = (
            self.qkv_proj(x)
            if self.qkv_proj
            else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        q, k, v = (
            t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in qkv
        )  # (B, H, T, head_dim)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        S = k.shape[
            2
        ]  # a single new token attends to everything, several ones each to those before it
        mask = (
            torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
            if 1 < T < S
            else None
        )
        if (
            cache is not None and T == 1
        ):  # a key head's query heads become its queries: one read of its keys
            q = q.reshape(B, k.shape[1], -1, self.head_dim)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            mask,
            is_causal=cache is None or S == T > 1,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return self.o_proj(
            y.reshape(B, -1, T, self.head_dim).transpose(1, 2).reshape(B, T, -1)
        )


class MLP(nn.Module):
    """SwiGLU, x (B, T, D) -> (B, T, D)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(
            config.hidden_size, config.intermediate_size, bias=False
        )
        self.up_proj = nn.Linear(
            config.hidden_size, config.intermediate_size, bias=False
        )
        self.down_proj = nn.Linear(
            config.intermediate_size, config.hidden_size, bias=False
        )
        self.gate_up_proj = None  # these two in one, when quantized
        self.quantized = {
            "gate_up_proj": ["gate_proj", "up_proj"],
            "down_proj": ["down_proj"],
        }

    def forward(self, x):
        gate, up = (
            self.gate_up_proj(x)
            if self.gate_up_proj
            else (self.gate_proj(x), self.up_proj(x))
        )
        return self.down_proj(F.silu(gate) * up)


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
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Embeddings (B, T, D), as image tokens have no id -> hidden states (B, T, D) after the final norm."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.grad_checkpoint = (
            False  # recompute the blocks' activations in the backward pass
        )
        V, D = config.vocab_size, config.hidden_size
        # _weight: to draw a random one on the meta device, PyTorch would import code for a second
        self.embed_tokens = nn.Embedding(V, D, _weight=torch.empty(V, D))
        self.layers = nn.ModuleList(
            Block(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = (
            None if config.tie_word_embeddings else nn.Linear(D, V, bias=False)
        )
        self.quantized = {"lm_head": ["lm_head"]} if self.lm_head else {}
        self.reset_parameters()

    def forward(self, x, cache: KVCache | None = None):
        """With a cache, x are the tokens that follow those in it."""
        T, seen = x.shape[1], cache.length if cache is not None else 0
        positions = torch.arange(seen, seen + T, device=x.device)
        cos, sin = rotary_angles(
            positions, self.config.head_dim, self.config.rope_theta, x.dtype
        )
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
        return (
            self.lm_head(hidden)
            if self.lm_head
            else F.linear(hidden, self.embed_tokens.weight)
        )

    def compile_rows(self):
        """Compile the product with a single token: twice as fast as PyTorch's own in bfloat16 on a CPU."""
        if not self.norm.weight.is_cpu or not shutil.which(
            os.environ.get("CXX", "g++")
        ):
            return note(
                "note: compiling needs a C++ compiler and a CPU; it goes on without"
            )

        @torch.compile(dynamic=False)
        def row_product(w, x):
            return (w.float() * x.float()).sum(-1).to(x.dtype).view(*x.shape[:-1], -1)

        def forward(w, x):
            return row_product(w, x) if x.numel() == x.shape[-1] else F.linear(x, w)

        for linear in self.modules():
            if isinstance(linear, nn.Linear):
                linear.weight.data = (
                    linear.weight.clone()
                )  # from the mapped file to huge pages: faster
                linear.forward = partial(forward, linear.weight)

    def reset_parameters(self):
        init_weights(
            self,
            {"embed_tokens.weight": 0.02},
            ("o_proj.weight", "down_proj.weight"),
            len(self.layers),
        )


def sample(
    logits: torch.Tensor,
    seen: torch.Tensor,
    temperature: float,
    top_p: float,
    repetition_penalty: float,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Draw the next ids, int64 (..., 1), from logits float32 (..., V): repetition penalty on the ids where
    `seen`, bool (..., V), temperature, then top_p. 0 is greedy. Order and penalty as in Hugging Face's."""
    logits = penalize(logits, seen, repetition_penalty)
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    probs, order = (logits / temperature).softmax(-1).sort(descending=True)
    beyond = (
        probs.cumsum(-1) - probs >= top_p
    )  # the token that reaches top_p is kept, and always the first
    beyond[..., 0] = False
    return order.gather(
        -1, torch.multinomial(probs.masked_fill(beyond, 0), 1, generator=generator)
    )


def penalize(
    scores: torch.Tensor, seen: torch.Tensor, repetition_penalty: float
) -> torch.Tensor:
    """Lower the scores (..., V) of the ids where `seen`. Raises InputError for scores that are NaN."""
    if scores.isnan().any():
        raise InputError(
            "the model computes NaN: weights are broken; fetch or train them again"
        )
    penalized = torch.where(
        scores < 0, scores * repetition_penalty, scores / repetition_penalty
    )
    return torch.where(seen, penalized, scores)


@torch.no_grad()
def beam_search(
    llama: Llama,
    tokenizer: "Tokenizer",
    x: torch.Tensor,
    seen: torch.Tensor,
    max_new_tokens: int,
    repetition_penalty: float,
    stop: tuple[list[int], ...],
    min_length: int,
    num_beams: int,
    length_penalty: float,
) -> list[int]:
    """The ids of the likeliest answer to a prompt x (1, T, D), as in Hugging Face's: by the sum of its ids'
    log-probabilities, over (its length with `<s>`, without its end) ** length_penalty."""
    cache, beams, finished = (
        KVCache(),
        [(0.0, [])],
        [],
    )  # (sum of log-probabilities, ids)
    for length in range(1, max_new_tokens + 1):
        logp = llama.logits(llama(x, cache)[:, -1]).float().log_softmax(-1)
        logp = penalize(logp, seen, repetition_penalty)
        if length < min_length:
            logp[:, tokenizer.eos] = -torch.inf
        sums = torch.tensor([[total] for total, _ in beams], device=x.device) + logp
        best, index = sums.flatten().topk(
            4 * num_beams
        )  # enough for num_beams that have not ended
        candidates = [
            (
                total,
                [*beams[i // logp.shape[1]][1], i % logp.shape[1]],
                i // logp.shape[1],
            )
            for total, i in zip(best.tolist(), index.tolist())
        ]
        finished += [
            (total / length**length_penalty, ids)
            for total, ids, _ in candidates[:num_beams]
            if is_end(ids, stop)
        ]
        finished = sorted(finished, reverse=True)[:num_beams]
        if (
            len(finished) == num_beams
            and finished[-1][0] >= candidates[0][0] / length**length_penalty
        ):
            return finished[0][1]
        kept = [c for c in candidates if not is_end(c[1], stop)][:num_beams]
        beams, rows = (
            [c[:2] for c in kept],
            torch.tensor([c[2] for c in kept], device=x.device),
        )
        token = torch.tensor([ids[-1:] for _, ids in beams], device=x.device)
        cache.select(rows)
        seen, x = seen[rows].scatter(1, token, True), llama.embed_tokens(token)
    return max(
        finished
        + [(total / (length + 1) ** length_penalty, ids) for total, ids in beams]
    )[1]


class Tokenizer:
    """A sentencepiece `tokenizer.model`. In a text, the letters `<s>` and `</s>` are plain text."""

    def __init__(self, path: str):
        try:
            if not os.path.isfile(path):  # a device would be read without end
                raise OSError("no regular file")
            start_of(path)
            self._processor = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as e:
            raise InputError(
                f"{path}: no sentencepiece model; it is a LLaMA folder's tokenizer.model"
            ) from e
        self.path = str(path)
        self.vocab_size = self._processor.vocab_size()
        self.bos = self._processor.bos_id()
        self.eos = self._processor.eos_id()
        self.unknown = self._processor.unk_id()

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """ "a dog" -> [263, 11203]. Sentencepiece adds a leading space; `bos` prepends `<s>`."""
        ids = self._processor.encode(text)
        return [self.bos, *ids] if bos else ids

    def decode(self, ids: list[int]) -> str:
        """[263, 11203] -> "a dog", without the leading space; control tokens give no text."""
        return self._processor.decode(ids)

    def piece(self, id: int) -> str:
        """263 -> "\u2581a"."""
        return self._processor.id_to_piece(id)


def read_llama_folder(folder: str) -> tuple[LlamaConfig, list[Path]]:
    """The sizes and safetensors files of a Hugging Face folder."""
    root, index = Path(folder), Path(folder) / "model.safetensors.index.json"
    if not (root / "config.json").is_file():
        raise InputError(
            f"{folder}: not a LLaMA folder, it has no config.json; see the README"
        )
    config = LlamaConfig.from_dict(
        read_json(root / "config.json"), f"{folder}/config.json"
    )
    shards = (
        indexed_files(index)
        if index.is_file()
        else sorted(root.glob("[!.]*.safetensors"))
    )
    if not shards:
        raise InputError(
            f"{folder}: no *.safetensors file; see the README on getting the weights"
        )
    names = {shard.name for shard in shards}
    for name, n in re.findall(r"(.+)-\d+-of-(\d{5})\.safetensors", "\n".join(names)):
        if (
            missing := {
                f"{name}-{i:05d}-of-{n}.safetensors" for i in range(1, int(n) + 1)
            }
            - names
        ):
            raise InputError(
                f"{folder}/{min(missing)}: no such weight file, of {int(n)}; fetch it too"
            )
    return config, shards
