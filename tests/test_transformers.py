"""The vision tower, the Q-Former and the tokenizer against Hugging Face's InstructBLIP, BLIP-2 and LLaMA."""

import itertools

import torch
from transformers import (Blip2QFormerConfig, Blip2QFormerModel, InstructBlipVisionConfig,
                          InstructBlipVisionModel)
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from llama import Tokenizer
from qformer import QFormer, QFormerConfig
from tests.common import GOLDEN
from vision import VisionConfig, VisionTransformer

def randomized(module):
    """The module in eval mode, every tensor random, biases and norms included."""
    generator = torch.Generator().manual_seed(0)
    for name, p in module.named_parameters():
        with torch.no_grad():
            p.normal_(std=0.1, generator=generator)
            if "norm" in name.lower() and name.endswith("weight"):
                p += 1
    return module.eval()

@torch.no_grad()
def test_vision_tower_and_ln_vision_equal_instructblip():
    sizes = VisionConfig(image_size=56, patch_size=14, width=64, n_layers=3, n_heads=4, mlp_hidden=96)
    theirs = randomized(InstructBlipVisionModel(InstructBlipVisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, image_size=56,
        patch_size=14, layer_norm_eps=1e-6, qkv_bias=True)))
    tensors = {}
    for k, t in theirs.state_dict().items():
        k = k.removeprefix("embeddings.").replace("encoder.layers.", "blocks.")
        if k.endswith("qkv.bias"):  # theirs has a bias for the keys, zero in converted files
            t[64:128] = 0
            at = k.replace("self_attn.qkv.bias", "attn.")
            tensors |= {f"{at}q_bias": t[:64], f"{at}v_bias": t[128:]}
            continue
        for a, b in {"class_embedding": "cls_token", "position_embedding": "pos_embed", "layer_norm": "norm",
                     "patch_embedding": "patch_embed.proj", "self_attn.projection": "attn.proj",
                     "self_attn.qkv": "attn.qkv", "post_layernorm": "ln"}.items():
            k = k.replace(a, b)
        tensors[k] = t
    ln = torch.nn.LayerNorm(64, eps=1e-5)
    ln.load_state_dict({k: tensors.pop(f"ln.{k}") for k in ("weight", "bias")})
    ours = VisionTransformer(sizes)
    ours.load_state_dict(tensors)
    images = torch.randn(2, 3, 56, 56)
    torch.testing.assert_close(ln(ours(images)), theirs(images).last_hidden_state, atol=1e-4, rtol=0)

@torch.no_grad()
def test_qformer_equals_blip2():
    theirs = randomized(Blip2QFormerModel(Blip2QFormerConfig(
        hidden_size=48, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96,
        cross_attention_frequency=2, encoder_hidden_size=64, layer_norm_eps=1e-12)))
    ours = QFormer(QFormerConfig(n_queries=8, width=48, n_layers=4, n_heads=4, ffn_hidden=96,
                                 vision_width=64))
    queries = torch.randn(1, 8, 48)
    tensors = {"query_tokens": queries}
    for k, t in theirs.state_dict().items():
        for a, b in {"encoder.layer.": "layers.", "crossattention.attention": "cross_attn",
                     "crossattention.output.dense": "cross_attn.out",
                     "crossattention.output.LayerNorm": "cross_attn.norm",
                     "attention.attention": "self_attn", "attention.output.dense": "self_attn.out",
                     "attention.output.LayerNorm": "self_attn.norm", "intermediate_query.dense": "fc1",
                     "output_query.dense": "fc2", "output_query.LayerNorm": "norm",
                     "layernorm": "norm"}.items():
            k = k.replace(a, b)
        tensors[k] = t
    ours.load_state_dict(tensors | {f"ln_vision.{k}": torch.rand(64) for k in ("weight", "bias")})
    image = torch.randn(3, 17, 64)
    want = theirs(queries.expand(3, -1, -1), encoder_hidden_states=ours.ln_vision(image)).last_hidden_state
    torch.testing.assert_close(ours(image), want, atol=1e-4, rtol=0)

def test_tokenizer_equals_transformers_on_all_kinds_of_text():
    path = str(GOLDEN / "tokenizer/tokenizer.model")
    theirs = SentencePieceBackend(vocab_file=path, legacy=True, unk_token="<unk>", bos_token="<s>",
                                  eos_token="</s>", special_tokens_pattern="none")
    ours = Tokenizer(path)
    pieces = ("", " ", "   ", "\t", "\n", "\n\n", "the dog", "Émile", "naïve", "日本語", "😀👍🏽",
              "\x00", "\x07", "\u200b", "###", " ###", "</s>", "<s>", "<unk>", "1234", "a,b;c")
    strings = {a + b for a, b in itertools.product(pieces, repeat=2)}
    assert len(strings) > 200
    for text in sorted(strings):
        want = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.encode(text) == want, text
    assert ours.eos not in ours.encode("typed </s>") and ours.bos not in ours.encode("<s>")
