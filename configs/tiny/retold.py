"""Language model, step 1: repeat part of a scene, told as a list, in another order."""

from configs.tiny.base import *

llama = dict(
    hidden_size=128,
    num_hidden_layers=6,
    num_attention_heads=4,
    intermediate_size=384,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    max_position_embeddings=300,
)
tokenizer = "data/tiny/tokenizer.model"
data = "data/tiny/text/retold.jsonl"
heldout_data = "data/tiny/text/retold_heldout.jsonl"
max_steps = 2500
lr = 1.5e-3
out_dir = "out/tiny_retold"
