"""The tiny world's language model, last step: it learns to talk, as chat, about scenes told in words.

It never sees a picture. This step begins where configs/tiny_facts.py ended.

python train.py configs/tiny_llm.py
"""

llama = "out/tiny_facts/llama"
train = ("llama",)

data = {"data/tiny/text/dense.jsonl": 1, "data/tiny/text/noisy.jsonl": 1, "data/tiny/text/chat.jsonl": 4,
        "data/tiny/text/asked.jsonl": 4}
heldout_data = "data/tiny/text/chat_heldout.jsonl"
prepare = {"data/tiny/text": "tools/make_scenes.py text data/tiny/text --n=60000"}
template = "vicuna"
end_sym = "###"
max_txt_len = 160
chat_share = 0.3

batch_size = 16
max_steps = 6000
lr = 1.2e-3
min_lr = 1e-4
warmup_steps = 1500  # long: a template that is all new makes it forget the facts at a higher rate
betas = (0.9, 0.99)
grad_clip = 1.0

dtype = "float32"
num_workers = 1
out_dir = "out/tiny_llm"
eval_interval = 1000
eval_samples = 256
show_samples = 4
save_interval = 200
save_dtype = "bfloat16"
