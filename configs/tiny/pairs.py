"""Language model, step 2: find a shape by its color, in a list with shapes first."""

from configs.tiny.base import *

llama = "out/tiny_retold/llama"
data = {"data/tiny/text/retold.jsonl": 1, "data/tiny/text/pairs.jsonl": 2}
heldout_data = "data/tiny/text/pairs_heldout.jsonl"
max_steps = 2000
warmup_steps = 200
out_dir = "out/tiny_pairs"
