"""EVA-ViT, MiniGPT-4's vision tower, and the image transform of training and chat.

BLIP-2's vision tower (arXiv 2301.12597) is EVA-CLIP ViT-g/14 (arXiv 2211.07636) without
its last block and final norm: a plain pre-norm vision transformer with learned absolute
positions. Modules and tensors are named as in the official `eva_vit_g.pth`.
Axes: B images, N tokens (class token + patches), D width, H heads, S pixels of a side.
Quirks kept: queries and values have a bias, keys have none; pictures are resized to a
square without a crop.
"""

import io
import math
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from torch import nn

from plumbing.console import InputError
from plumbing.files import HEIF_SUFFIXES
from plumbing.weights import init_weights

# CLIP's, of RGB values from 0 to 1
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

# of PIL's formats; for EPS, PIL would start Ghostscript
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
HEIF = ("HEIF", "AVIF")  # formats that the package pillow-heif adds
PLAIN_MODES = ("1", "L", "RGB", "CMYK", "YCbCr")  # without transparency, 8 bits
TRANSPARENT_MODES = ("RGBA", "LA", "PA", "La", "RGBa")
MOST_BYTES = 1_200_000_000  # of memory to decode a picture


def load_image(source: str | bytes, image_size: int, smallest: int = 1) -> torch.Tensor:
    """A picture's path or bytes -> uint8 (3, image_size, image_size), RGB.

    It is turned as EXIF says; transparent pixels become white. Raises InputError for an
    unreadable picture, or one with a side of fewer pixels than `smallest`.
    """
    name = source if isinstance(source, str) else "picture"
    try:
        image = decode(source)
    except FileNotFoundError as e:
        raise InputError(f"{name}: there is no such picture on this computer") from e
    except Exception as e:  # PIL's decoders raise nearly anything
        what = f"cannot be read as a picture ({e})"
        advice = "give a JPEG, PNG or the like"
        if name.lower().endswith(HEIF_SUFFIXES):
            advice = f"{advice}, or try pip install pillow-heif"
        raise InputError(f"{name}: {what}; {advice}") from e
    if min(image.size) < smallest:
        size = f"{image.width} x {image.height}"
        raise InputError(f"{name}: only {size} pixels; give a larger picture")
    return preprocess(to_rgb(image), image_size)


def decode(source: str | bytes) -> Image.Image:
    """A picture in any mode, turned upright. Raises any exception for a broken one."""
    file = source if isinstance(source, str) else io.BytesIO(source)
    if file is source and os.path.exists(file) and not os.path.isfile(file):
        raise ValueError("no regular file")  # reading a pipe could wait forever
    with Image.open(file, formats=(*FORMATS, *installed_heif())) as image:
        # before anything is decoded; the copies made by to_rgb count as well
        is_plain = image.mode in PLAIN_MODES and "transparency" not in image.info
        bytes_per_pixel = 6 if is_plain else 20
        if image.width * image.height * bytes_per_pixel > MOST_BYTES:
            raise ValueError(f"too large: {image.width} x {image.height} pixels")
        image.load()
        with suppress(Exception):  # a broken EXIF block spoils no picture
            keep_only_orientation(image.getexif())
            ImageOps.exif_transpose(image, in_place=True)
        return image


@cache
def installed_heif() -> tuple[str, ...]:
    """Those of HEIF that can be read."""
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    return tuple(name for name in HEIF if name in Image.OPEN)


def keep_only_orientation(exif: Image.Exif):
    """Drop the tags that exif_transpose would write back; it fails at odd values."""
    for tag in list(exif):
        if tag != ExifTags.Base.Orientation:
            del exif[tag]


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode -> RGB, transparent pixels on white."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = to_8_bits(image)
    if "transparency" in image.info or image.mode in TRANSPARENT_MODES:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    if image.mode == "RGB":
        return image  # convert would copy it
    return image.convert("RGB")


def to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit gray (modes I), or floats from 0 to 1 or 255 (mode F) -> 8-bit gray."""
    pixels = np.asarray(image, dtype=np.float32)
    pixels = np.nan_to_num(pixels, posinf=0).clip(min=0)
    largest = pixels.max()
    if image.mode != "F":
        white = 65535
    elif largest <= 1:
        white = 1
    else:
        white = 255
    scaled = pixels * (255 / max(white, largest))
    return Image.fromarray(scaled.astype(np.uint8))


def preprocess(image: Image.Image, image_size: int) -> torch.Tensor:
    """RGB -> uint8 (3, image_size, image_size) by PIL's bicubic resize to a square."""
    size = (image_size, image_size)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalize(images: torch.Tensor, means=IMAGE_MEAN, stds=IMAGE_STD) -> torch.Tensor:
    """uint8 (B, 3, S, S) -> float32: (RGB from 0 to 1 - means) / stds."""
    constants = torch.tensor((means, stds), device=images.device)
    mean, std = constants.view(2, 3, 1, 1)
    # in place, because memory traffic dominates
    return images.float().div_(255).sub_(mean).div_(std)


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
        H = self.n_heads
        no_bias = torch.zeros_like(self.q_bias)
        bias = torch.cat((self.q_bias, no_bias, self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias)
        qkv = qkv.view(B, N, 3, H, D // H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, N, D/H)
        y = F.scaled_dot_product_attention(q, k, v)
        y = y.transpose(1, 2).reshape(B, N, D)
        return self.proj(y)


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
    """One vector per patch, in reading order: (B, 3, S, S) -> (B, patches, D)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        size = config.patch_size
        self.proj = nn.Conv2d(3, config.width, kernel_size=size, stride=size)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """Normalized images (B, 3, S, S) -> class token and patches (B, N, D).

    The output has the weights' dtype. S may be any multiple of patch_size: positions
    are interpolated for another S than in training.
    """

    kind = "eva_vit"  # in the metadata of its file
    has_class_token = True  # the first of the output's tokens

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        n_tokens = 1 + self.n_patches(config.image_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, n_tokens, config.width))
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))

    def n_patches(self, image_size: int) -> int:
        return (image_size // self.config.patch_size) ** 2

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, S, S) -> what `forward` takes, float32."""
        return normalize(images, IMAGE_MEAN, IMAGE_STD)

    def forward(self, images):
        x = self.patch_embed(images.to(self.pos_embed.dtype))
        cls_token = self.cls_token.expand(len(x), -1, -1)
        x = torch.cat((cls_token, x), dim=1)
        x = x + self.positions(x.shape[1])
        for block in self.blocks:
            x = block(x)
        return x  # no final norm

    def positions(self, n_tokens: int) -> torch.Tensor:
        """pos_embed, its square grid resized for n_tokens -> (1, n_tokens, D)."""
        if n_tokens == self.pos_embed.shape[1]:
            return self.pos_embed
        cls_token = self.pos_embed[:, :1]
        patches = self.pos_embed[:, 1:]
        old_side = math.isqrt(patches.shape[1])
        new_side = math.isqrt(n_tokens - 1)
        grid = patches.float().unflatten(1, (old_side, old_side))
        grid = grid.permute(0, 3, 1, 2)  # (1, D, side, side)
        grid = F.interpolate(grid, size=(new_side, new_side), mode="bicubic")
        patches = grid.flatten(2).transpose(1, 2)
        return torch.cat((cls_token, patches.to(cls_token.dtype)), dim=1)

    def reset_parameters(self):
        """Random weights. Positions get variance 1: attention can tell them apart."""
        init_weights(
            self,
            stds={"cls_token": 1, "pos_embed": 1},
            residual=("attn.proj.weight", "fc2.weight"),
            depth=len(self.blocks),
        )
