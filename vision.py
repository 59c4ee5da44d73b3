"""EVA-ViT, MiniGPT-4's vision tower, and the image transform that training, chat and tests share.

BLIP-2's vision tower (arXiv 2301.12597) is EVA-CLIP ViT-g/14 (arXiv 2211.07636) without its last block and
final norm: a plain pre-norm vision transformer with learned absolute positions. Module and tensor names are
those of the official `eva_vit_g.pth`. Axes: B images, N tokens (class token + patches), D width, H heads.
Quirks kept: queries and values have a bias, keys have none; pictures are resized to a square without a crop.
"""

import io
import math
import os
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from torch import nn

from plumbing.console import InputError
from plumbing.weights import init_weights

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "BMP",
    "GIF",
    "TIFF",
)  # no others: PIL would start Ghostscript for EPS
MOST_BYTES = 1_200_000_000  # that decoding a picture may take


def load_image(source: str | bytes, image_size: int, smallest: int = 1) -> torch.Tensor:
    """A picture's path or bytes -> uint8 (3, image_size, image_size), RGB; turned as EXIF says, transparent
    pixels on white. Raises InputError for an unreadable one, or a side of fewer pixels than `smallest`."""
    name = source if isinstance(source, str) else "picture"
    try:
        if name is source and not os.path.isfile(source) and os.path.exists(source):
            raise ValueError("no regular file")  # a pipe would be waited for
        with Image.open(
            source if name is source else io.BytesIO(source), formats=FORMATS
        ) as image:
            plain = (
                image.mode in ("1", "L", "RGB", "CMYK", "YCbCr")
                and "transparency" not in image.info
            )
            if (
                image.width * image.height * (6 if plain else 20) > MOST_BYTES
            ):  # with the copies made below
                raise ValueError(f"too large: {image.width} x {image.height} pixels")
            if min(image.size) >= smallest:
                exif = image.getexif()
                for tag in [tag for tag in exif if tag != ExifTags.Base.Orientation]:
                    del exif[
                        tag
                    ]  # exif_transpose would write them back, and fail at odd values
                ImageOps.exif_transpose(image, in_place=True)
                return preprocess(to_rgb(image), image_size)
    except FileNotFoundError as e:
        raise InputError(f"{name}: there is no such picture") from e
    except Exception as e:  # PIL's decoders raise nearly anything
        raise InputError(
            f"{name}: cannot be read as a picture ({e}); give a JPEG, PNG or the like"
        ) from e
    raise InputError(
        f"{name}: only {image.width} x {image.height} pixels; give a larger picture"
    )


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode -> RGB, transparent pixels on white."""
    if (
        image.mode.startswith("I") or image.mode == "F"
    ):  # 16-bit gray, or float from 0 to 1 or to 255
        pixels = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0).clip(
            min=0
        )
        top = max(
            65535 if image.mode != "F" else 1 if pixels.max() <= 1 else 255,
            pixels.max(),
        )
        image = Image.fromarray((pixels * (255 / top)).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return (
        image if image.mode == "RGB" else image.convert("RGB")
    )  # convert always copies


def preprocess(image: Image.Image, image_size: int) -> torch.Tensor:
    """RGB picture -> uint8 (3, image_size, image_size) by PIL's bicubic resize to a square."""
    if image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 3, S, S), 0..255 -> float32 (B, 3, S, S) normalized by CLIP's mean and standard deviation."""
    mean, std = torch.tensor((IMAGE_MEAN, IMAGE_STD), device=images.device).view(
        2, 3, 1, 1
    )
    return (
        images.float().div_(255).sub_(mean).div_(std)
    )  # in place: memory traffic dominates


@dataclass(frozen=True)
class VisionConfig:
    """Sizes; the defaults are EVA-ViT-g/14 as BLIP-2 uses it."""

    image_size: int = 224  # pixels, both sides
    patch_size: int = 14  # pixels
    width: int = 1408
    n_layers: int = 39  # the official file has a 40th block, which is not used
    n_heads: int = 16
    mlp_hidden: int = 6144  # int(1408 * 4.3637)
    norm_eps: float = 1e-6


class Attention(nn.Module):
    """Self-attention over all tokens, x (B, N, D) -> (B, N, D)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.n_heads = config.n_heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(config.width))
        self.v_bias = nn.Parameter(torch.zeros(config.width))
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x):
        B, N, D = x.shape
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias).view(
            B, N, 3, self.n_heads, D // self.n_heads
        )
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, N, D/H)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(B, N, D))


class MLP(nn.Module):
    """Two linear layers and an exact GELU, x (B, N, D) -> (B, N, D)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_hidden)
        self.fc2 = nn.Linear(config.mlp_hidden, config.width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm attention and MLP, x (B, N, D) -> (B, N, D)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """One vector per patch, in reading order: (B, 3, S, S) -> (B, (S / patch_size)^2, D)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.proj = nn.Conv2d(
            3, config.width, kernel_size=config.patch_size, stride=config.patch_size
        )

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """Normalized images (B, 3, S, S) -> class token and patches (B, N, D), in the weights' dtype.
    S may be any multiple of patch_size; positions are interpolated for another S than in training."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        n_patches = (config.image_size // config.patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + n_patches, config.width))
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))

    def forward(self, images):
        x = self.patch_embed(images.to(self.pos_embed.dtype))
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        x = x + self.positions(x.shape[1])
        for block in self.blocks:
            x = block(x)
        return x  # all tokens, no final norm

    def positions(self, n_tokens):
        """pos_embed (1, n_tokens, D), its square grid of patches resized bicubically if n_tokens differs."""
        if n_tokens == self.pos_embed.shape[1]:
            return self.pos_embed
        cls, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        old, new = math.isqrt(patches.shape[1]), math.isqrt(n_tokens - 1)
        grid = patches.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
        return torch.cat((cls, grid.flatten(2).transpose(1, 2).to(cls.dtype)), dim=1)

    def reset_parameters(self):
        """Positions get variance 1, so that they can be told apart from the first step on."""
        init_weights(
            self,
            {"cls_token": 1, "pos_embed": 1},
            ("attn.proj.weight", "fc2.weight"),
            len(self.blocks),
        )
