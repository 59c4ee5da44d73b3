"""Pictures and the vision tower."""

import io
import os
import zlib
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import model
import vision
from model import MiniGPT4
from plumbing.console import InputError
from tests.common import ROOT
from vision import (
    PatchEmbed,
    VisionConfig,
    VisionTransformer,
    load_image,
    normalize,
    to_rgb,
)

EXAMPLE = str(ROOT / "assets/tiny/example.png")


def test_a_pipe_is_not_waited_for_and_other_formats_start_no_program(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n%%EOF\n"
    )
    for name in "ab":
        with pytest.raises(
            InputError, match=f"{name}.jpg: cannot be read as a picture"
        ):
            load_image(str(tmp_path / f"{name}.jpg"), 28)


@pytest.mark.slow
def test_a_picture_that_would_take_gigabytes_is_refused(tmp_path):
    Image.new("1", (13000, 13000)).save(
        tmp_path / "a.png"
    )  # a large one of one bit a pixel is none
    assert load_image(str(tmp_path / "a.png"), 28).shape == (3, 28, 28)
    header = io.BytesIO()
    Image.new("RGBA", (8, 8)).save(header, "PNG")
    big = bytearray(header.getvalue())
    big[16:24] = (13000).to_bytes(4, "big") * 2
    big[29:33] = zlib.crc32(big[12:29]).to_bytes(4, "big")
    with pytest.raises(InputError, match="too large: 13000 x 13000 pixels"):
        load_image(bytes(big), 28)


def test_a_mistake_in_our_code_is_not_taken_for_a_broken_picture(monkeypatch):
    monkeypatch.setattr(vision, "to_rgb", lambda image: image.no_such_method())
    with pytest.raises(AttributeError, match="no_such_method"):
        load_image(EXAMPLE, 28)


@pytest.mark.parametrize(
    "name, content, words",
    [
        pytest.param("no.jpg", None, "no.jpg: there is no such picture", id="missing"),
        pytest.param("a.jpg", b"abc", "a.jpg: cannot be read as a picture", id="text"),
        pytest.param("dot.png", "1x1", "dot.png: only 1 x 1 pixels", id="a dot"),
    ],
)
def test_a_picture_that_cannot_be_used_is_named(tmp_path, name, content, words):
    if content == "1x1":
        Image.new("RGB", (1, 1)).save(tmp_path / name)
    elif content:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        load_image(str(tmp_path / name), 28, smallest=2)


@pytest.mark.parametrize(
    "values, white",
    [
        pytest.param([0.0, 0.5, 1.0], 1, id="floats to 1"),
        pytest.param([0.0, 100.0, 200.0], 255, id="floats to 255"),
        pytest.param([0.0, 100.0, 510.0], 510, id="larger floats"),
        pytest.param([-1.0, float("nan"), float("inf")], 1, id="no colors"),
    ],
)
def test_floats_become_gray(values, white):
    image = Image.fromarray(np.array([values], dtype=np.float32))
    colors = np.array(to_rgb(image))[0]
    finite = np.nan_to_num(values, posinf=0).clip(min=0)
    assert colors.tolist() == [[int(v * 255 / white)] * 3 for v in finite]


def test_the_tower_normalizes_and_counts_its_patches():
    sizes = dict(image_size=16, patch_size=8, width=4, n_heads=2, mlp_hidden=4)
    tower = VisionTransformer(VisionConfig(**sizes, n_layers=1))
    images = torch.zeros(1, 3, 24, 24, dtype=torch.uint8)
    images[:, 1] = 255
    normal = tower.normalize(images)
    assert normal[0, 0, 0, 0].item() == pytest.approx(-0.48145466 / 0.26862954)
    assert normal[0, 1, 0, 0].item() == pytest.approx((1 - 0.4578275) / 0.26130258)
    assert [tower.n_patches(size) for size in (16, 24)] == [4, 9]
    assert tower(normal).shape == (1, 1 + 9, 4) and tower.has_class_token


@dataclass(frozen=True)
class OtherConfig:
    image_size: int = 16
    patch_size: int = 8
    width: int = 8
    n_heads: int = 1


class OtherTower(nn.Module):
    """Without a class token, with another normalization and a final norm."""

    kind = "other"
    has_class_token = False

    def __init__(self, config: OtherConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.norm = nn.LayerNorm(config.width)

    def n_patches(self, image_size: int) -> int:
        return (image_size // self.config.patch_size) ** 2

    def normalize(self, images):
        return normalize(images, means=(0.5, 0.5, 0.5), stds=(0.5, 0.5, 0.5))

    def forward(self, images):
        return self.norm(self.patch_embed(images.to(self.norm.weight.dtype)))


@pytest.mark.parametrize("has_qformer", [True, False])
def test_another_tower_needs_its_class_and_an_entry_in_the_table(
    has_qformer, world, tmp_path, monkeypatch
):
    monkeypatch.setitem(model.TOWERS, OtherConfig, OtherTower)
    monkeypatch.setitem(model.KINDS["vision"], "other", OtherConfig)
    qformer = dict(n_queries=3, width=8, n_layers=1, n_heads=1, ffn_hidden=8)
    qformer = qformer if has_qformer else ""
    new = MiniGPT4.from_files({"kind": "other"}, qformer, world["llama"])
    black_and_white = torch.tensor([0, 255], dtype=torch.uint8).expand(1, 3, 1, 2)
    assert new.vision.normalize(black_and_white)[0, 0, 0].tolist() == [-1, 1]
    parts = [name for name in new.parts if name != "llama"]
    for name in parts:
        new.save_part(name, tmp_path)
    files = {name: f"{tmp_path}/{name}.safetensors" for name in parts}
    files = {"qformer": ""} | files
    loaded = MiniGPT4.from_files(**files, llama=world["llama"], dtype="float32")
    image = load_image(EXAMPLE, loaded.image_size)[None]
    embeds = loaded.encode_image(image)
    assert embeds.shape[1] == loaded.n_image_tokens == (3 if has_qformer else 1)
    assert torch.equal(embeds, new.encode_image(image))
    chatting = MiniGPT4.from_files(**files, llama=world["llama"], dtype="bfloat16")
    assert chatting.encode_image(image).isfinite().all()


def test_the_default_sizes_are_those_of_eva_vit_g():
    with torch.device("meta"):
        tower = VisionTransformer(VisionConfig())
    block = tower.blocks[-1]
    assert tower.pos_embed.shape == (1, 257, 1408)
    assert tower.patch_embed.proj.weight.shape == (1408, 3, 14, 14)
    assert tower.patch_embed.proj.stride == (14, 14)
    assert len(tower.blocks) == 39
    assert block.attn.n_heads == 16
    assert block.attn.qkv.weight.shape == (3 * 1408, 1408)
    assert block.mlp.fc1.weight.shape == (6144, 1408)
    assert block.norm1.eps == block.norm2.eps == 1e-6
    assert sum(p.numel() for p in tower.parameters()) == 985_894_528


def test_a_new_tower_tells_positions_apart_and_keeps_the_scale_of_its_input():
    torch.manual_seed(0)
    sizes = dict(image_size=64, patch_size=8, width=64, n_heads=4, mlp_hidden=128)
    tower = VisionTransformer(VisionConfig(**sizes, n_layers=8))
    tower.reset_parameters()
    block = tower.blocks[0]
    for tensor, std in (
        (tower.cls_token, 1),
        (tower.pos_embed, 1),
        (tower.patch_embed.proj.weight, (3 * 8 * 8) ** -0.5),
        (block.attn.qkv.weight, 64**-0.5),
        (block.mlp.fc1.weight, 64**-0.5),
        # 16 outputs are added to the residual stream
        (block.attn.proj.weight, (16 * 64) ** -0.5),
        (block.mlp.fc2.weight, (16 * 128) ** -0.5),
    ):
        within = 5 / tensor.numel() ** 0.5
        assert tensor.mean().item() == pytest.approx(0, abs=within * std)
        assert tensor.std().item() == pytest.approx(std, rel=within)
    assert (block.norm1.weight == 1).all()
    for bias in (block.norm1.bias, block.attn.q_bias, block.mlp.fc1.bias):
        assert (bias == 0).all()
