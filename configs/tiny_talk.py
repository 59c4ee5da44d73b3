"""The tiny world's language model, last step: more questions, the hardest thing that it has to look up.

It goes on from configs/tiny_llm.py; what it then is, stages 1 and 2 leave as it is.

python train.py configs/tiny_talk.py
"""

llama = "out/tiny_llm/llama"
train = ("llama",)

data = {"data/tiny/text/dense.jsonl": 1, "data/tiny/text/noisy.jsonl": 1, "data/tiny/text/chat.jsonl": 2,
        "data/tiny/text/asked.jsonl": 4}
heldout_data = "data/tiny/text/asked_heldout.jsonl"
prepare = {"data/tiny/text": "tools/make_scenes.py text data/tiny/text --n=60000"}
template = "vicuna"
end_sym = "###"
max_txt_len = 160
chat_share = 0.3

batch_size = 16
max_steps = 1500
lr = 1.5e-3
min_lr = 1e-4
warmup_steps = 100
betas = (0.9, 0.99)
grad_clip = 1.0

dtype = "float32"
num_workers = 1
out_dir = "out/tiny_talk"
eval_interval = 250
eval_samples = 256
show_samples = 4
save_interval = 250
save_dtype = "bfloat16"
