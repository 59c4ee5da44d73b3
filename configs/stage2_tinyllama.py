"""Stage 2 with TinyLlama-1.1B on one small GPU: two micro-batches of 6 samples.

python train.py configs/stage2_tinyllama.py

This config has not been run yet.
"""

from configs.stage2 import *

llama = "weights/tinyllama-1.1b-chat"
proj = "out/stage1_tinyllama/proj.safetensors"
batch_size = 6
grad_accum = 2
out_dir = "out/stage2_tinyllama"
