"""Stage 1 with LLaMA-2-chat and no Q-Former: 64 image tokens, each of 4 neighboring patches joined.
The original gives no cost; expect more than stage1.py's, since a picture takes 64 tokens instead of 32.

torchrun --nproc-per-node 4 train.py configs/stage1_llama2.py
"""

from configs.stage1 import *

qformer = ""
llama = "weights/llama-2-7b-chat"
out_dir = "out/stage1_llama2"
