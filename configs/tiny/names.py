"""Vision tower, step 1: name single objects.

A small language model is trained with it. Without a Q-Former, a token is four patches.
"""

from configs.tiny.base import *

vision = dict(
    image_size=48, patch_size=8, width=128, n_layers=4, n_heads=4, mlp_hidden=512
)
llama = dict(
    hidden_size=96,
    num_hidden_layers=4,
    num_attention_heads=3,
    intermediate_size=256,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)
tokenizer = "data/tiny/tokenizer.model"
trainable = ("vision", "proj", "llama")
data = "data/tiny/names"
prepare = prepare | {data: f"tools/make_scenes.py names {data} --n=30000"}
max_txt_len = 32
max_steps = 1200
min_lr = 6e-4
out_dir = "out/tiny_names"
