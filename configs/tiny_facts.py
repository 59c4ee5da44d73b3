"""The tiny world's language model, third step: single facts, asked tersely ("size star" -> "large") and
in the sentences of chat ("The size of the star is" -> "large."). A third of the text is captions, retold
lists and pairs. Next comes configs/tiny_llm.py.

python train.py configs/tiny_facts.py
"""

llama = "out/tiny_pairs/llama"
train = ("llama",)

data = {"data/tiny/text/dense.jsonl": 1, "data/tiny/text/retold.jsonl": 1, "data/tiny/text/pairs.jsonl": 1,
        "data/tiny/text/terse.jsonl": 3, "data/tiny/text/facts.jsonl": 3}
heldout_data = "data/tiny/text/facts_heldout.jsonl"
prepare = {"data/tiny/text": "tools/make_scenes.py text data/tiny/text --n=60000"}
max_txt_len = 160

batch_size = 32
max_steps = 1200
lr = 1e-3
min_lr = 1e-3
warmup_steps = 400  # long: a new form of text at a high rate makes it forget what it found
betas = (0.9, 0.99)
grad_clip = 1.0

dtype = "float32"
num_workers = 1
out_dir = "out/tiny_facts"
eval_interval = 200
eval_samples = 256
save_interval = 200
save_dtype = "bfloat16"
