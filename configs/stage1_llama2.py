"""Stage 1 with LLaMA-2-chat and no Q-Former: 64 image tokens of 4 joined patches each.

torchrun --nproc-per-node 4 train.py configs/stage1_llama2.py

The original states no cost. Expect more than for stage1.py, because an image takes 64
tokens instead of 32.
"""

from configs.stage1 import *

qformer = ""
llama = "weights/llama-2-7b-chat"
out_dir = "out/stage1_llama2"
