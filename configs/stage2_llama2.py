"""Stage 2 with LLaMA-2-chat and no Q-Former, in LLaMA-2's chat template.

python train.py configs/stage2_llama2.py
"""

from configs.stage2 import *

qformer = ""
llama = "weights/llama-2-7b-chat"
proj = "out/stage1_llama2/proj.safetensors"
template = "llama2"
out_dir = "out/stage2_llama2"
