"""Vision tower, Q-Former and tokenizer against Hugging Face's BLIP-2 and LLaMA."""

import itertools
from pathlib import Path

import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration, T5Config
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from llama import Tokenizer
from model import MiniGPT4
from tests.common import GOLDEN
from tools import convert

ROOT = Path(__file__).resolve().parent.parent


@torch.no_grad()
def test_converted_vision_and_qformer_equal_blip2(tmp_path):
    theirs = Blip2ForConditionalGeneration(
        Blip2Config(
            vision_config=dict(
                hidden_size=64,
                num_hidden_layers=3,
                num_attention_heads=4,
                intermediate_size=96,
                image_size=56,
                patch_size=14,
            ),
            qformer_config=dict(
                hidden_size=48,
                num_hidden_layers=4,
                num_attention_heads=4,
                intermediate_size=96,
                encoder_hidden_size=64,
                vocab_size=50,
            ),
            text_config=T5Config(
                d_model=32, d_ff=64, num_layers=1, num_heads=2, d_kv=16
            ).to_dict(),
            num_query_tokens=8,
        )
    ).eval()
    generator = torch.Generator().manual_seed(0)
    for name, p in theirs.named_parameters():
        p.normal_(std=0.1, generator=generator)
        if "norm" in name.lower() and name.endswith("weight"):
            p += 1
        elif name.endswith("qkv.bias"):
            p.chunk(3)[1].zero_()  # EVA-ViT's keys have no bias
    theirs.save_pretrained(tmp_path / "hub", max_shard_size="100KB")
    assert len([*(tmp_path / "hub").glob("*.safetensors")]) > 5
    for part in ("vision", "qformer"):
        convert.main([part, str(tmp_path / "hub"), f"{tmp_path}/{part}"])
    files = (
        f"{tmp_path}/vision",
        f"{tmp_path}/qformer",
        str(ROOT / "assets/tiny/llama"),
    )
    ours = MiniGPT4.from_files(*files, dtype="float32")
    theirs.vision_model.post_layernorm.eps = (
        1e-5  # the original's, whatever the hub's config says
    )
    images = torch.randn(2, 3, 56, 56, generator=generator)
    seen = theirs.vision_model(images).last_hidden_state
    torch.testing.assert_close(
        ours.bridge.ln_vision(ours.vision(images)), seen, atol=1e-5, rtol=0
    )
    want = theirs.qformer(
        query_embeds=theirs.query_tokens.expand(2, -1, -1), encoder_hidden_states=seen
    )
    torch.testing.assert_close(
        ours.image_features(images), want.last_hidden_state, atol=1e-5, rtol=0
    )


def test_tokenizer_equals_transformers_on_all_kinds_of_text():
    path = str(GOLDEN / "tokenizer/tokenizer.model")
    theirs = SentencePieceBackend(
        vocab_file=path,
        legacy=True,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        special_tokens_pattern="none",
    )
    ours = Tokenizer(path)
    pieces = (
        "",
        " ",
        "   ",
        "\t",
        "\n",
        "\n\n",
        "the dog",
        "Émile",
        "naïve",
        "日本語",
        "😀👍🏽",
        "\x00",
        "\x07",
        "\u200b",
        "###",
        " ###",
        "</s>",
        "<s>",
        "<unk>",
        "1234",
        "a,b;c",
    )
    strings = {a + b for a, b in itertools.product(pieces, repeat=2)}
    assert len(strings) > 200
    for text in sorted(strings):
        want = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.encode(text) == want, text
    assert ours.eos not in ours.encode("typed </s>") and ours.bos not in ours.encode(
        "<s>"
    )
