"""The bridge from vision tokens to image tokens."""

import pytest
import torch

from model import MiniGPT4
from plumbing.console import InputError
from qformer import JoinPatches, QFormer, QFormerConfig
from tests.common import GOLDEN


@pytest.mark.parametrize("has_class_token", [True, False])
def test_four_patches_are_joined_and_a_class_token_is_dropped(has_class_token):
    bridge = JoinPatches(vision_width=2, has_class_token=has_class_token)
    bridge.ln_vision = torch.nn.Identity()
    bridge.ln_vision.weight = torch.zeros(2)
    patches = torch.arange(2 * 8 * 2.0).view(2, 8, 2)
    class_tokens = torch.full((2, 1, 2), -1.0)
    tokens = torch.cat((class_tokens, patches), 1) if has_class_token else patches
    assert bridge.n_image_tokens(n_patches=8) == 2
    assert torch.equal(bridge(tokens), patches.view(2, 2, 8))


@pytest.mark.parametrize("image_size, words", [(24, "9 patches"), (4, "0 patches")])
def test_patches_that_cannot_be_joined_are_refused_when_the_model_is_built(
    image_size, words
):
    vision = {"image_size": image_size, "patch_size": 8, "width": 16, "n_heads": 2}
    llama = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    tokenizer = str(GOLDEN / "tokenizer/tokenizer.model")
    with pytest.raises(InputError, match=f"{words} per picture: .*give an image_size"):
        MiniGPT4.from_files(vision, "", llama, tokenizer=tokenizer)


def test_the_default_sizes_are_those_of_blip2():
    with torch.device("meta"):
        qformer = QFormer(QFormerConfig())
    layer = qformer.layers[0]
    crossing = [i for i, each in enumerate(qformer.layers) if each.cross_attn]
    assert qformer.query_tokens.shape == (1, 32, 768)
    assert len(qformer.layers) == 12
    assert crossing == [0, 2, 4, 6, 8, 10]
    assert layer.self_attn.n_heads == layer.cross_attn.n_heads == 12
    assert layer.self_attn.key.weight.shape == (768, 768)
    assert layer.cross_attn.key.weight.shape == (768, 1408)
    assert layer.fc1.weight.shape == (3072, 768)
    assert qformer.ln_vision.eps == 1e-5
    assert qformer.norm.eps == layer.norm.eps == layer.cross_attn.norm.eps == 1e-12
    assert qformer.n_image_tokens(256) == 32
    assert sum(p.numel() for p in qformer.parameters()) == 105_165_056


def test_new_queries_differ_and_have_variance_1():
    torch.manual_seed(0)
    sizes = dict(n_queries=64, width=64, n_heads=4, ffn_hidden=128, vision_width=32)
    qformer = QFormer(QFormerConfig(**sizes, n_layers=2))
    qformer.reset_parameters()
    layer = qformer.layers[0]
    for tensor, std in (
        (qformer.query_tokens, 1),
        (layer.self_attn.query.weight, 64**-0.5),
        (layer.cross_attn.key.weight, 32**-0.5),
        (layer.fc2.weight, 128**-0.5),
    ):
        within = 5 / tensor.numel() ** 0.5
        assert tensor.mean().item() == pytest.approx(0, abs=within * std)
        assert tensor.std().item() == pytest.approx(std, rel=within)
    assert (qformer.norm.weight == 1).all() and (qformer.norm.bias == 0).all()
    assert (layer.fc1.bias == 0).all()
