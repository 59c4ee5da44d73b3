"""Stage 1 on LLaVA-Pretrain: 558,128 pairs of LAION, CC and SBU in one archive.

torchrun --nproc-per-node 4 train.py configs/stage1_llava558k.py

Many of LAION's links are dead by now; this archive holds the images themselves. From
liuhaotian/LLaVA-Pretrain on the Hugging Face hub, put blip_laion_cc_sbu_558k.json into
data/llava_pretrain, and unpack images.zip into data/llava_pretrain/images.

In Table 8 of the paper, a model trained on 10 % of its 5 million pairs covers 1.62 of 5
objects, on 30 % 2.15, on all 2.22. So this run sees as many samples as 30 %: 2.75
epochs, with stage 1's learning rate and a proportional warm-up. We assume that repeated
pairs do as well as new ones; nobody has run this config yet. tools/dry_run.py --world=4
estimates 144 TFLOP per step and 34 GiB per process: 30 % of stage 1's cost, about 3
hours on 4 A100 80GB.
"""

from configs.stage1 import *

data = "data/llava_pretrain/blip_laion_cc_sbu_558k.json"
max_steps = 6000
warmup_steps = 1500
out_dir = "out/stage1_llava558k"
