"""Language model, step 4: chat about scenes described in words, without images."""

from configs.tiny.base import *

llama = "out/tiny_facts/llama"
data = {
    "data/tiny/text/dense.jsonl": 1,
    "data/tiny/text/noisy.jsonl": 1,
    "data/tiny/text/chat.jsonl": 4,
    "data/tiny/text/asked.jsonl": 4,
}
heldout_data = "data/tiny/text/chat_heldout.jsonl"
template = "vicuna"
chat_share = 0.3
batch_size = 16
max_steps = 6000
lr = 1.2e-3
min_lr = 1e-4
warmup_steps = 1500  # long: a new template at a high rate makes it forget the facts
out_dir = "out/tiny_llm"
eval_interval = 1000
show_samples = 4
