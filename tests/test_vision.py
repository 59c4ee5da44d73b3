"""Pictures and the vision tower."""

import io
import os
import zlib

import pytest
import torch
from PIL import Image

from plumbing.console import InputError
from vision import VisionConfig, VisionTransformer, load_image


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
