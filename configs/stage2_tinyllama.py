"""Stage 2 with TinyLlama-1.1B, on one small GPU: 12 samples per step, in two micro-batches. Not yet run.

python train.py configs/stage2_tinyllama.py
"""

from configs.stage2 import *

llama = "weights/tinyllama-1.1b-chat"
proj = "out/stage1_tinyllama/proj.safetensors"
batch_size = 6
grad_accum = 2
out_dir = "out/stage2_tinyllama"
