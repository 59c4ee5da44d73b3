"""Language model, step 2: from a scene told as a list to its colors and shapes.

A list tells an object's shape first; here the model learns to find the shape by the color."""
from configs.tiny.base import *

llama = "out/tiny_retold/llama"
trainable = ("llama",)
data = {"data/tiny/text/retold.jsonl": 1, "data/tiny/text/pairs.jsonl": 2}
heldout_data = "data/tiny/text/pairs_heldout.jsonl"
max_steps = 2000
warmup_steps = 200
out_dir = "out/tiny_pairs"
