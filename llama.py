"""LLaMA (arXiv 2302.13971), MiniGPT-4's language model.

RMSNorm, rotary positions, SwiGLU, grouped-query attention, tied or separate output
embeddings: LLaMA 1 to 3, Vicuna, Mistral, SmolLM2. Qwen2 adds biases to q, k and v,
Qwen3 norms to q and k. Names of modules are those of Hugging Face without the leading
`model.`. Axes: B sequences, T tokens, S tokens with those in the cache, D width, H
query heads, K key/value heads, V vocabulary.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs.prompts import is_end
from plumbing.console import InputError, note
from plumbing.options import override
from plumbing.tokenizer import Tokenizer
from plumbing.weights import check_sizes, init_weights

IGNORE = -100  # in the targets: no prediction here
CONTEXT = 2000  # tokens of a long conversation, the original's limit
# Hugging Face's names: {model_type: the class to load it with}
FAMILIES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",  # Qwen 2 and 2.5
    "qwen3": "Qwen3ForCausalLM",
}
LLAMA3_SCALING = (  # the settings of rope_scaling
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes as in Hugging Face's config.json; the defaults are LLaMA-7B's."""

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
    model_type: str = "llama"  # or another of FAMILIES
    rope_scaling: dict = field(default_factory=dict)  # LLaMA 3.1's; {}: none
    quantization: str = ""  # of the matrices: int8 or int4
    rotated: bool = False  # whether those in int8 are; older files' are not
    fingerprint: str = ""  # of the weights before they were quantized

    @classmethod
    def from_dict(cls, sizes: dict, where: str = "config.json") -> "LlamaConfig":
        """From a Hugging Face config.json, old or new.

        Raises InputError, which names the file `where`, for unsupported models.
        """
        # If both are there, transformers takes the older one.
        rope = sizes.get("rope_scaling") or sizes.get("rope_parameters") or {}
        model_type = sizes.get("model_type") or "llama"
        window = sizes.get("sliding_window") or 0
        if not sizes.get("use_sliding_window", "qwen" not in str(model_type)):
            window = 0
        for name, value, type_ in (
            ("rope_scaling or rope_parameters", rope, dict),
            ("sliding_window", window, int),
            ("model_type", model_type, str),
        ):
            if not isinstance(value, type_):
                raise InputError(f"{where}: {name} is malformed; fetch it again")
        if feature := unsupported_feature(sizes, rope, window):
            raise InputError(f"{where}: {feature} is not supported; take another model")
        check_has_sizes(sizes, where)

        n_heads = sizes["num_attention_heads"]
        defaults = asdict(cls()) | {
            "num_key_value_heads": n_heads,
            "head_dim": sizes["hidden_size"] // n_heads,
        }
        # In old files, null or 0 means the default.
        read = {k: sizes.get(k) or default for k, default in defaults.items()}
        read["rope_theta"] = rope.get("rope_theta") or read["rope_theta"]
        read["rope_scaling"] = rope if rope_type(rope) == "llama3" else {}
        if model_type == "mistral":  # computes the same
            read["model_type"] = "llama"
        config = override(cls(), read, where)
        if window:
            context = min(config.max_position_embeddings, window)
            config = replace(config, max_position_embeddings=context)
        return check_sizes(config, where)

    def to_hub(self) -> dict:
        """The content of a Hugging Face config.json, the inverse of from_dict."""
        sizes = asdict(self)
        for name in ("rope_scaling", "quantization", "rotated", "fingerprint"):
            if not sizes[name]:  # no keys of Hugging Face's, or not in old files
                del sizes[name]
        return {"architectures": [FAMILIES[self.model_type]]} | sizes


def unsupported_feature(sizes: dict, rope: dict, window: int) -> str:
    """What a config.json asks for that this file does not compute, or ""."""
    model_type = sizes.get("model_type") or "llama"
    activation = sizes.get("hidden_act", "silu")
    if not is_known_rope(rope):
        return f"rotary scaling {rope}"
    if sizes.get("quantization_config"):
        return f"the quantization {sizes['quantization_config']}"
    if model_type not in (*FAMILIES, "mistral"):
        return f"the architecture {model_type}"
    # Attention looks at all tokens: the conversation has to fit into the window.
    if window and window < CONTEXT:
        return f"a sliding window of {window} tokens, below {CONTEXT},"
    if sizes.get("attention_bias") or sizes.get("mlp_bias"):
        return "a model with biases"
    if activation != "silu":
        return f"the activation {activation}"
    return ""


def rope_type(rope: dict) -> str:
    return rope.get("rope_type", rope.get("type", "default"))


def is_known_rope(rope: dict) -> bool:
    """Whether rotary positions are as in the paper, or LLaMA 3.1's."""
    if rope.get("partial_rotary_factor", 1) != 1:
        return False
    if rope_type(rope) != "llama3":
        are_numbers = not any(isinstance(value, dict) for value in rope.values())
        return rope_type(rope) == "default" and are_numbers
    given = [rope.get(name, 0) for name in LLAMA3_SCALING]
    return all(isinstance(x, (int, float)) and 0 < x < math.inf for x in given)


def check_has_sizes(sizes: dict, where: str):
    """Raise InputError unless the sizes that have no default are there."""
    wrong = []
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    ):
        size = sizes.get(name)
        if not isinstance(size, int) or size < 1:
            wrong.append(name)
    if wrong:
        raise InputError(
            f"{where}: no whole number above 0 for {', '.join(wrong)}; this is no LLaMA"
        )


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


def rotary_frequencies(config: LlamaConfig, device):
    """Radians per position of each pair, float32 (head_dim / 2,)."""
    even = torch.arange(0, config.head_dim, 2, device=device)
    freq = 1.0 / config.rope_theta ** (even.float() / config.head_dim)
    if not config.rope_scaling:
        return freq
    # LLaMA 3.1 slows down the pairs that turn less than `low` times in the original
    # context, leaves those that turn more than `high` times, and blends between.
    factor, low, high, context = map(config.rope_scaling.get, LLAMA3_SCALING)
    wavelength = 2 * math.pi / freq
    kept = ((context / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * freq / factor + kept * freq


def rotary_angles(positions, config: LlamaConfig, dtype: torch.dtype):
    """positions (T,) -> cos, sin (T, head_dim); both halves are equal."""
    freq = rotary_frequencies(config, positions.device)
    angles = torch.outer(positions.float(), freq)
    angles = angles.repeat(1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """Rotate each pair (x[i], x[i + head_dim/2]) of x (B, H, T, head_dim).

    This is Hugging Face's layout; the paper pairs x[2i] with x[2i + 1].
    """
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class KVCache:
    """Keys and values of the tokens so far, per layer (B, K, capacity, head_dim) each.

    The first `length` places are in use. Llama.forward advances it; set it lower to
    forget the last tokens.
    """

    def __init__(self):
        self.length = 0
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2] if self.keys else 0

    def append(self, layer: int, k, v):
        """Append k and v (B, K, T, head_dim); return all, (B, K, S, head_dim) each."""
        all_k = self.store(self.keys, layer, k)
        all_v = self.store(self.values, layer, v)
        return all_k, all_v

    def store(self, layers: dict[int, Tensor], layer: int, new):
        end = self.length + new.shape[2]
        stored = with_room(layers.get(layer, new[:, :, :0]), end)
        stored[:, :, self.length : end] = new
        layers[layer] = stored
        return stored[:, :, :end]

    def reserve(self, n_tokens: int):
        """Make room for n_tokens more, as much in all layers.

        A forward pass that failed may have made room in some of them.
        """
        stored = (*self.keys.values(), *self.values.values())
        capacity = max(tensor.shape[2] for tensor in stored)
        needed = max(capacity, self.length + n_tokens)
        for layers in (self.keys, self.values):
            for layer, tensor in layers.items():
                layers[layer] = with_room(tensor, needed)

    def mask(self, T: int, device):
        """Which tokens the next T see, bool (T, S); None: those up to themselves."""
        if T == 1 or not self.length:
            return None
        S = self.length + T
        return torch.ones(T, S, dtype=torch.bool, device=device).tril(self.length)

    def static(self) -> "StaticCache":
        """A copy for a CUDA graph."""
        return StaticCache(self)

    def select(self, rows: Tensor):
        """Keep these rows of the batch, in this order; rows may repeat."""
        for layers in (self.keys, self.values):
            for layer, stored in layers.items():
                layers[layer] = stored[rows]


def with_room(stored: Tensor, n_tokens: int) -> Tensor:
    """Keys or values with a capacity of 256, 512, 1,024 and so on that is enough."""
    capacity = stored.shape[2]
    if n_tokens <= capacity:
        return stored
    enough = max(256, 2 ** math.ceil(math.log2(n_tokens)))
    return F.pad(stored, (0, 0, 0, enough - capacity))


class StaticCache:
    """A KVCache for steps of one token, all with the same shapes: for a CUDA graph.

    It copies another cache. `length` is a tensor, int64 (1,); the places from there on
    are masked instead of cut off.
    """

    def __init__(self, cache: KVCache):
        self.keys = {layer: k.clone() for layer, k in cache.keys.items()}
        self.values = {layer: v.clone() for layer, v in cache.values.items()}
        self.length = torch.tensor([cache.length], device=self.keys[0].device)

    def append(self, layer: int, k, v):
        """Put k and v (B, K, 1, head_dim) in their place; return all places."""
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(2, self.length, k)
        values.index_copy_(2, self.length, v)
        return keys, values

    def copy_(self, cache: KVCache):
        """Take over the content of a cache with the same shapes."""
        for layer in self.keys:
            self.keys[layer].copy_(cache.keys[layer])
            self.values[layer].copy_(cache.values[layer])

    def clear(self, start: int):
        """Zero the places from `start` on: masked or not, NaN times 0 is NaN."""
        for tensor in (*self.keys.values(), *self.values.values()):
            tensor[:, :, start:] = 0

    def mask(self, T: int, device):
        """The places in use and the new one, bool (1, capacity)."""
        places = torch.arange(self.keys[0].shape[2], device=device)
        return (places <= self.length).unsqueeze(0)


def attend(q, k, v, mask=None):
    """Attention, causal without a mask (T, S) -> (B, H, T, head_dim).

    q (B, H, T, head_dim), k and v (B, K, S, head_dim). Query heads share key heads
    in groups of H / K.
    """
    is_grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None, enable_gqa=is_grouped
    )


def attend_last(q, k, v, mask=None):
    """The same for T = 1, faster; without a mask, the token sees all others.

    The query heads that share a key head take the place of T: one read of its keys.
    """
    B, H, _, head_dim = q.shape
    K = k.shape[1]
    q = q.reshape(B, K, H // K, head_dim)
    y = F.scaled_dot_product_attention(q, k, v, mask)
    return y.reshape(B, H, 1, head_dim)


class Attention(nn.Module):
    """Causal self-attention with rotary positions, x (B, T, D) -> (B, T, D)."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        D = config.hidden_size
        q_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        has_bias = config.model_type == "qwen2"
        self.q_proj = nn.Linear(D, q_width, bias=has_bias)
        self.k_proj = nn.Linear(D, kv_width, bias=has_bias)
        self.v_proj = nn.Linear(D, kv_width, bias=has_bias)
        self.o_proj = nn.Linear(q_width, D, bias=False)
        self.q_norm = self.k_norm = nn.Identity()
        if config.model_type == "qwen3":
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def qkv(self, x):
        """The three products; plumbing/quantized.py replaces them by one."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def split_heads(self, x):
        """(B, T, H * head_dim) -> (B, H, T, head_dim)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x, cos, sin, mask, cache):
        q, k, v = map(self.split_heads, self.qkv(x))
        q = rotate(self.q_norm(q), cos, sin)
        k = rotate(self.k_norm(k), cos, sin)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        attention = attend_last if x.shape[1] == 1 else attend
        y = attention(q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU, x (B, T, D) -> (B, T, D)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, hidden, bias=False)
        self.up_proj = nn.Linear(D, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, D, bias=False)

    def gate_up(self, x):
        """Both products; plumbing/quantized.py replaces them by one."""
        return self.gate_proj(x), self.up_proj(x)

    def forward(self, x):
        gate, up = self.gate_up(x)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm attention and MLP, x (B, T, D) -> (B, T, D)."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, mask, cache):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Embeddings (B, T, D) -> hidden states (B, T, D) after the final norm.

    It takes embeddings instead of ids because image tokens have no id.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        # Recompute the blocks' activations in the backward pass.
        self.grad_checkpoint = False
        # The dtype of the blocks' activations; None: that of the embeddings.
        self.compute_dtype: torch.dtype | None = None
        V, D = config.vocab_size, config.hidden_size
        # Without _weight, PyTorch would draw one: on the meta device that imports code
        # for a second.
        self.embed_tokens = nn.Embedding(V, D, _weight=torch.empty(V, D))
        self.layers = nn.ModuleList(
            Block(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(D, config.rms_norm_eps)
        is_tied = config.tie_word_embeddings
        self.lm_head = None if is_tied else nn.Linear(D, V, bias=False)

    def forward(self, x, cache: KVCache | None = None):
        """With a cache, x are the tokens that follow those in it."""
        x = x.to(self.compute_dtype or x.dtype)
        T = x.shape[1]
        start = 0 if cache is None else cache.length
        positions = torch.arange(T, device=x.device) + start
        cos, sin = rotary_angles(positions, self.config, x.dtype)
        mask = None if cache is None else cache.mask(T, x.device)
        for block in self.layers:
            if self.grad_checkpoint and x.requires_grad:
                x = checkpoint(block, x, cos, sin, mask, cache, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask, cache)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    def logits(self, hidden):
        """Hidden states (..., D) -> logits (..., V)."""
        if self.lm_head is None:
            weight = self.embed_tokens.weight
            return F.linear(hidden.to(weight.dtype), weight)
        return self.lm_head(hidden)

    def reset_parameters(self):
        init_weights(
            self,
            {"embed_tokens.weight": 0.02},
            residual=("o_proj.weight", "down_proj.weight"),
            depth=len(self.layers),
        )


def penalize(scores: Tensor, seen: Tensor, repetition_penalty: float) -> Tensor:
    """Lower the scores (..., V) of the ids where `seen`, bool (..., V).

    Raises InputError for scores that are NaN.
    """
    if scores.isnan().any():
        raise InputError(
            "the model computes NaN: weights are broken; fetch or train them again"
        )
    penalized = torch.where(
        scores < 0, scores * repetition_penalty, scores / repetition_penalty
    )
    return torch.where(seen, penalized, scores)


def sample(
    logits: Tensor,
    seen: Tensor,
    temperature: float,
    top_p: float,
    repetition_penalty: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw the next ids, int64 (..., 1), from logits float32 (..., V).

    In Hugging Face's order: repetition penalty on the ids where `seen`, bool (..., V),
    temperature (0 is greedy), then top_p.
    """
    logits = penalize(logits, seen, repetition_penalty)
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    probs, ids = (logits / temperature).softmax(-1).sort(descending=True)
    likelier = probs.cumsum(-1) - probs  # the total of the likelier ids
    excluded = likelier >= top_p
    excluded[..., 0] = False  # even with a top_p of 0
    nucleus = probs.masked_fill(excluded, 0)
    place = torch.multinomial(nucleus, 1, generator=generator)
    return ids.gather(-1, place)


class Beam(NamedTuple):
    """The beginning of an answer."""

    log_prob: float  # the sum over its ids
    ids: list[int]
    row: int  # of the ids before the last in the cache


@torch.no_grad()
def beam_search(
    llama: Llama,
    x: Tensor,
    seen: Tensor,
    max_new_tokens: int,
    ends: list[list[int]],
    stops: tuple[list[int], ...] = (),
    num_beams: int = 5,
    repetition_penalty: float = 1.05,
    min_length: int = 0,
    length_penalty: float = 1.0,
) -> list[int]:
    """The ids of the likeliest answer to a prompt x (1, T, D), as in Hugging Face's.

    An answer's score is the log-probability of its ids, over
    (its length with `<s>`, without its end) ** length_penalty. `seen`: see sample.
    `ends` of one id, which are not allowed among the first min_length - 1, and the id
    sequences `stops` end an answer.
    """
    early_ends = [id for (id,) in ends]
    stops = (*ends, *stops)
    cache = KVCache()
    beams = [Beam(0.0, [], 0)]
    finished: list[tuple[float, list[int]]] = []  # (score, ids), the best first
    for length in range(1, max_new_tokens + 1):
        hidden = llama(x, cache)[:, -1]
        log_probs = llama.logits(hidden).float().log_softmax(-1)
        log_probs = log_probs[:, : seen.shape[1]]  # the tokenizer's ids
        log_probs = penalize(log_probs, seen, repetition_penalty)
        if length < min_length:
            log_probs[:, early_ends] = -torch.inf

        candidates = continue_beams(beams, log_probs, (1 + len(stops)) * num_beams)
        for beam in candidates[:num_beams]:
            if is_end(beam.ids, stops):
                finished.append((beam.log_prob / length**length_penalty, beam.ids))
        finished = sorted(finished, reverse=True)[:num_beams]
        if len(finished) == num_beams:
            worst_finished = finished[-1][0]
            if worst_finished >= candidates[0].log_prob / length**length_penalty:
                return finished[0][1]

        beams = [beam for beam in candidates if not is_end(beam.ids, stops)][:num_beams]
        rows = torch.tensor([beam.row for beam in beams], device=x.device)
        ids = torch.tensor([beam.ids[-1:] for beam in beams], device=x.device)
        cache.select(rows)
        seen = seen[rows].scatter(1, ids, True)
        x = llama.embed_tokens(ids)

    for beam in beams:
        score = beam.log_prob / (max_new_tokens + 1) ** length_penalty
        finished.append((score, beam.ids))
    return max(finished)[1]


def continue_beams(beams: list[Beam], log_probs: Tensor, n: int) -> list[Beam]:
    """The n likeliest beams with one more id, given log_probs (len(beams), V)."""
    V = log_probs.shape[1]
    sums = torch.tensor([beam.log_prob for beam in beams], device=log_probs.device)
    totals = sums[:, None] + log_probs
    n = min(n, totals.numel())
    best, places = totals.flatten().topk(n)
    continued = []
    for log_prob, place in zip(best.tolist(), places.tolist()):
        row, id = divmod(place, V)
        continued.append(Beam(log_prob, [*beams[row].ids, id], row))
    return continued


@torch.no_grad()
def perplexity(llama: Llama, tokenizer: Tokenizer, text: str) -> float:
    """Per token of the text, which follows `<s>`."""
    ids = tokenizer.encode(text, bos=True)
    tokens = torch.tensor([ids], device=llama.norm.weight.device)
    hidden = llama(llama.embed_tokens(tokens))[0, :-1]
    logits = llama.logits(hidden).float()
    return F.cross_entropy(logits, tokens[0, 1:]).double().exp().item()


def check_english(llama: Llama, tokenizer: Tokenizer):
    """Print the perplexity on a paragraph of English, with a warning if it is bad."""
    paragraph = Path(__file__).parent / "assets/paragraph.txt"
    value = perplexity(llama, tokenizer, paragraph.read_text().strip())
    bound = 20 if llama.config.hidden_size > 1000 else 35  # SmolLM2-135M: 24
    healthy = f"(a healthy LLaMA: below {bound})"
    note(f"language model of the family {llama.config.model_type}")
    note(f"perplexity on a paragraph of English: {value:.1f} {healthy}")
    if value > 100:
        note("warning: these weights are broken or not English; fetch or convert again")
