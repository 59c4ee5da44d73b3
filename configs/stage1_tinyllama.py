"""Stage 1 with TinyLlama-1.1B instead of Vicuna: MiniGPT-4 for one small GPU. Not yet run to its end.

python train.py configs/stage1_tinyllama.py
"""

from configs.stage1 import *

llama = "weights/tinyllama-1.1b-chat"  # the folder from the hub as it is
batch_size = 32
grad_accum = 8  # so the global batch is still 256
out_dir = "out/stage1_tinyllama"
