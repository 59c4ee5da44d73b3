"""Stage 2 of MiniGPT-4 (arXiv 2304.10592): 3,500 long, clean descriptions, as in chat.

python train.py configs/stage2.py

Cost in the paper: about 7 minutes on one A100. The paper trains for 400 steps
(--max_steps=400), the published code for 1,000. The model then gives complete, fluent
descriptions: in the paper, failures fall from about 35 % to 2 %.
"""

from configs.stage1 import *

proj = "out/stage1/proj.safetensors"
data = "data/cc_sbu_align"
template = "vicuna"
clean_captions = False
max_txt_len = 160
batch_size = 12
max_steps = 1000  # 5 epochs of 200
lr = 3e-5
min_lr = 1e-5
warmup_steps = 200
cache_features = True  # each epoch has the same pictures
out_dir = "out/stage2"
save_interval = 200
