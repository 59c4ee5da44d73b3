"""Stage 1 in the tiny world with a real language model: SmolLM2-135M-Instruct.

python train.py configs/smol_stage1.py
"""

from configs.tiny_stage1 import *

llama = "weights/smollm2-135m"
batch_size = 16
max_steps = 4000
lr = 3e-3
min_lr = 1e-4
dtype = "bfloat16"
length_group = 8
out_dir = "out/smol_stage1"
