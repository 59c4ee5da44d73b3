"""The bridge from vision tokens to image tokens."""

import pytest
import torch

from model import MiniGPT4
from plumbing.console import InputError
from qformer import JoinPatches
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
