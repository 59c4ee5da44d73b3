"""Stage 1 with TinyLlama-1.1B instead of Vicuna: MiniGPT-4 for one small GPU.

python train.py configs/stage1_tinyllama.py

This config has not been run to its end yet.
"""

from configs.stage1 import *

llama = "weights/tinyllama-1.1b-chat"  # the hub's folder, unchanged
batch_size = 32
grad_accum = 8  # keeps the global batch at 256
out_dir = "out/stage1_tinyllama"
