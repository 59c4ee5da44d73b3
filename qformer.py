"""The Q-Former of BLIP-2 (arXiv 2301.12597), query path only: a few learned queries look at the picture.

A BERT-base encoder, post-norm, whose input is not text but learned query tokens; every second layer also
attends to the image tokens. Its text branch is not needed here.

Axes: B images, Q queries, N image tokens, D width, H heads.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class QFormerConfig:
    """Sizes; the defaults are BLIP-2's, over EVA-ViT-g."""

    n_queries: int = 32
    width: int = 768
    n_layers: int = 12
    n_heads: int = 12
    ffn_hidden: int = 3072
    vision_width: int = 1408
    cross_attention_every: int = 2   # layers 0, 2, 4, ... look at the image
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
        # (B, Q or N, D) -> (B, H, Q or N, D/H)
        heads = lambda t: t.view(B, -1, self.n_heads, D // self.n_heads).transpose(1, 2)
        q, k, v = heads(self.query(x)), heads(self.key(context)), heads(self.value(context))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.norm(x + self.out(y.transpose(1, 2).reshape(B, Q, D)))


class Layer(nn.Module):
    """Post-norm: queries x (B, Q, D) look at each other, some layers at the image, then an MLP."""

    def __init__(self, config: QFormerConfig, looks: bool):
        super().__init__()
        self.self_attn = Attention(config, config.width)
        self.cross_attn = Attention(config, config.vision_width) if looks else None
        self.fc1 = nn.Linear(config.width, config.ffn_hidden)
        self.fc2 = nn.Linear(config.ffn_hidden, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, x, image):
        x = self.self_attn(x, x)
        if self.cross_attn is not None:
            x = self.cross_attn(x, image)
        return self.norm(x + self.fc2(F.gelu(self.fc1(x))))


class QFormer(nn.Module):
    """image tokens (B, N, vision_width), after `ln_vision` -> (B, Q, D)."""

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.config = config
        self.query_tokens = nn.Parameter(torch.zeros(1, config.n_queries, config.width))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.layers = nn.ModuleList(
            Layer(config, looks=i % config.cross_attention_every == 0) for i in range(config.n_layers))

    def forward(self, image):
        x = self.norm(self.query_tokens).expand(len(image), -1, -1)
        for layer in self.layers:
            x = layer(x, image)
        return x

    @torch.no_grad()
    def init_weights(self):
        """Random weights to train from nothing: normal with variance 1 / inputs, no biases, norms at one."""
        for name, p in self.named_parameters():
            if name == "query_tokens":
                nn.init.normal_(p)  # a norm comes next: small ones would be thrown about by each step
            elif p.dim() > 1:
                nn.init.normal_(p, std=p.shape[1] ** -0.5)
            else:
                p.fill_(1) if name.endswith("norm.weight") else p.zero_()
