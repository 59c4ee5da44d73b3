"""The bridge from vision tokens to image tokens: BLIP-2's Q-Former, or JoinPatches.

The Q-Former (arXiv 2301.12597) is a BERT-base encoder, post-norm. Its input is not text
but learned query tokens; every second layer also attends to the vision tokens. Its text
branch is left out. The LLaMA-2 variant of MiniGPT-4 joins patches instead. Both bridges
begin with `ln_vision`, the LayerNorm of the vision tower's output.
Axes: B images, Q queries, N vision tokens, D width, H heads.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from plumbing.console import InputError
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
    """Attention from x (B, Q, D) to context (B, N, context_width) -> (B, Q, D).

    A projection, the residual and a LayerNorm follow, as in BERT.
    """

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
        q = self.heads(self.query(x))
        k = self.heads(self.key(context))
        v = self.heads(self.value(context))
        y = F.scaled_dot_product_attention(q, k, v)
        y = y.transpose(1, 2).reshape(B, Q, D)
        return self.norm(x + self.out(y))

    def heads(self, x):
        """(B, Q or N, D) -> (B, H, Q or N, D/H)."""
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)


class Layer(nn.Module):
    """Self-attention of x (B, Q, D), cross-attention in some layers, MLP; post-norm."""

    def __init__(self, config: QFormerConfig, has_cross_attention: bool):
        super().__init__()
        self.self_attn = Attention(config, config.width)
        self.cross_attn = None
        if has_cross_attention:
            self.cross_attn = Attention(config, config.vision_width)
        self.fc1 = nn.Linear(config.width, config.ffn_hidden)
        self.fc2 = nn.Linear(config.ffn_hidden, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, x, image):
        x = self.self_attn(x, x)
        if self.cross_attn is not None:
            x = self.cross_attn(x, image)
        y = self.fc2(F.gelu(self.fc1(x)))
        return self.norm(x + y)


class QFormer(nn.Module):
    """Vision tokens (B, N, vision_width) -> image tokens (B, Q, D)."""

    kind = "qformer"  # in the metadata of its file

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.config = config
        self.width = config.width  # of an image token
        self.ln_vision = nn.LayerNorm(config.vision_width, eps=1e-5)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.n_queries, config.width))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.layers = nn.ModuleList()
        for i in range(config.n_layers):
            has_cross_attention = i % config.cross_attention_every == 0
            self.layers.append(Layer(config, has_cross_attention))

    def forward(self, image):
        image = self.ln_vision(image.to(self.query_tokens.dtype))
        x = self.norm(self.query_tokens).expand(len(image), -1, -1)
        for layer in self.layers:
            x = layer(x, image)
        return x

    def n_image_tokens(self, n_patches: int) -> int:
        return self.config.n_queries

    def reset_parameters(self):
        """Random weights. Small queries would take too large steps: a norm follows."""
        init_weights(self, {"query_tokens": 1})


class JoinPatches(nn.Module):
    """Vision tokens (B, N, D) -> image tokens (B, P / 4, 4 * D), of 4 patches each.

    P patches follow the class token, which is dropped if the vision tower has one.
    """

    def __init__(self, vision_width: int, has_class_token: bool = True):
        super().__init__()
        self.width = 4 * vision_width  # of an image token
        self.has_class_token = has_class_token
        self.ln_vision = nn.LayerNorm(vision_width, eps=1e-5)

    def forward(self, image):
        image = self.ln_vision(image.to(self.ln_vision.weight.dtype))
        patches = image[:, 1:] if self.has_class_token else image
        return patches.reshape(len(image), -1, self.width)

    def n_image_tokens(self, n_patches: int) -> int:
        """Raise InputError for patches that cannot be joined by fours."""
        if n_patches == 0 or n_patches % 4:
            raise InputError(
                f"{n_patches} patches per picture: without a Q-Former, 4 are joined; "
                "give an image_size with an even number of patches per side"
            )
        return n_patches // 4
