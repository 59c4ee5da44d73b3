"""The Q-Former's teacher: a language model that repeats 19 random words.

It is dropped afterwards, as BLIP-2's FlanT5 was; docs/tiny-world.md explains why.
"""

from configs.tiny.retold import *

llama = llama | dict(
    hidden_size=96, num_hidden_layers=1, num_attention_heads=3, intermediate_size=8
)
data = "data/tiny/text/words.jsonl"
heldout_data = "data/tiny/text/words_heldout.jsonl"
max_steps = 600
lr = 3e-3
min_lr = 1e-4
seed = 7
out_dir = "out/tiny_teacher"
eval_samples = 128
save_dtype = "float32"
