"""Stage 1 in the tiny world with a real language model: SmolLM2-135M-Instruct.

python train.py configs/smol_stage1.py

tools/get_weights.py smollm2-135m fetches it. On 2 CPU cores: about an hour. The
held-out loss, per token on noisy captions, ends at 1.29.
"""

from configs.tiny_stage1 import *

llama = "weights/smollm2-135m"
batch_size = 16
max_steps = 1700
lr = 1e-2
min_lr = 1e-4
warmup_steps = 50
dtype = "bfloat16"
length_group = 8
out_dir = "out/smol_stage1"
eval_interval = 500
