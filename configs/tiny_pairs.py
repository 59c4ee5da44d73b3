"""The tiny world's language model, second step: from a scene told as a list, to its colors and shapes.

A list tells an object's shape first, so its color is found by its shape; here it learns to find the shape by
the color. Next comes configs/tiny_facts.py.

python train.py configs/tiny_pairs.py
"""

llama = "out/tiny_retold/llama"
train = ("llama",)

data = {"data/tiny/text/retold.jsonl": 1, "data/tiny/text/pairs.jsonl": 2}
heldout_data = "data/tiny/text/pairs_heldout.jsonl"
prepare = {"data/tiny/text": "tools/make_scenes.py text data/tiny/text --n=60000"}
max_txt_len = 160

batch_size = 32
max_steps = 2000
lr = 1e-3
min_lr = 1e-3
warmup_steps = 200
betas = (0.9, 0.99)
grad_clip = 1.0

dtype = "float32"
num_workers = 1
out_dir = "out/tiny_pairs"
eval_interval = 200
eval_samples = 256
save_interval = 200
save_dtype = "bfloat16"
