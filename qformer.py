"""The bridge from vision tokens to image tokens: BLIP-2's Q-Former, or plain joining of patches.

The Q-Former (arXiv 2301.12597) is a BERT-base encoder, post-norm, whose input is not text but learned query
tokens; every second layer also attends to the vision tokens. Only its query path is here, not the text
branch. The LLaMA-2 variant of MiniGPT-4 uses JoinPatches instead. Both begin with `ln_vision`, the LayerNorm
of the vision tower's output. Axes: B images, Q queries, N vision tokens, D width, H heads.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from plumbing.weights import init_weights


@dataclass(frozen=True)
class QFormerConfig:
    """Sizes; the defaults are BLIP-2's, over EVA-ViT-g."""

    n_queries: int = 32
    width: int = 768
    n_layers: int = 12
    n_heads: int = 12
    ffn_hidden: int = 3072
    vision_width: int = 1408
    cross_attention_every: int = 2  # layers 0, 2, 4, ... attend to the vision tokens
    norm_eps: float = 1e-12


class Attention(nn.Module):
    """Attention from x (B, Q, D) to context (B, N, context_width), then projection, residual, LayerNorm."""

    def __init__(self, config: QFormerConfig, context_width: int):
        super().__init__()
        self.n_heads = config.n_heads
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(context_width, config.width)
        self.value = nn.Linear(context_width, config.width)
        self.out = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, x, context):
        B, Q, D = x.shape
        q, k, v = (
            self.heads(self.query(x)),
            self.heads(self.key(context)),
            self.heads(self.value(context)),
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return self.norm(x + self.out(y.transpose(1, 2).reshape(B, Q, D)))

    def heads(self, x):
        """(B, Q or N, D) -> (B, H, Q or N, D/H)."""
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)


class Layer(nn.Module):
    """Post-norm: self-attention of the queries x (B, Q, D), cross-attention in some layers, MLP."""

    def __init__(self, config: QFormerConfig, has_cross_attention: bool):
        super().__init__()
        self.self_attn = Attention(config, config.width)
        self.cross_attn = (
            Attention(config, config.vision_width) if has_cross_attention else None
        )
        self.fc1 = nn.Linear(config.width, config.ffn_hidden)
        self.fc2 = nn.Linear(config.ffn_hidden, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, x, image):
        x = self.self_attn(x, x)
        if self.cross_attn is not None:
            x = self.cross_attn(x, image)
        return self.norm(x + self.fc2(F.gelu(self.fc1(x))))


class QFormer(nn.Module):
    """Vision tokens (B, N, vision_width) -> image tokens (B, Q, D)."""

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.config = config
        self.width = config.width  # of an image token
        self.ln_vision = nn.LayerNorm(config.vision_width, eps=1e-5)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.n_queries, config.width))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.layers = nn.ModuleList(
            Layer(config, i % config.cross_attention_every == 0)
            for i in range(config.n_layers)
        )

    def forward(self, image):
        image = self.ln_vision(image.to(self.query_tokens.dtype))
        x = self.norm(self.query_tokens).expand(len(image), -1, -1)
        for layer in self.layers:
            x = layer(x, image)
        return x

    def n_image_tokens(self, n_patches: int) -> int:
        return self.config.n_queries

    def reset_parameters(self):
        """A norm follows the queries, in which steps on small ones would be too large."""
        init_weights(self, {"query_tokens": 1})


class JoinPatches(nn.Module):
    """Vision tokens (B, 1 + P, D) -> image tokens (B, P / 4, 4 * D): 4 patches each, no class token."""

    def __init__(self, vision_width: int):
        super().__init__()
        self.width = 4 * vision_width  # of an image token
        self.ln_vision = nn.LayerNorm(vision_width, eps=1e-5)

    def forward(self, image):
        image = self.ln_vision(image.to(self.ln_vision.weight.dtype))
        return image[:, 1:].reshape(len(image), -1, self.width)

    def n_image_tokens(self, n_patches: int) -> int:
        return n_patches // 4
