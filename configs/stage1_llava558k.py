"""Stage 1 on LLaVA-Pretrain: 558,128 pairs of LAION, CC and SBU in one archive, while LAION's addresses rot.
From liuhaotian/LLaVA-Pretrain on the Hugging Face hub, put blip_laion_cc_sbu_558k.json into
data/llava_pretrain, and unpack images.zip into data/llava_pretrain/images.

torchrun --nproc-per-node 4 train.py configs/stage1_llava558k.py

In the paper's Table 8, a tenth of its 5 million pairs covers 1.62 of 5 objects, 30 % cover 2.15, all 2.22. So
this run sees as many samples as 30 %: 2.75 epochs, at stage 1's rate, with the warm-up in proportion. That
repeated pairs serve as well is an assumption: nobody has made this run. tools/dry_run.py --world=4 estimates
144 TFLOP a step and 34 GiB per process; that is 30 % of stage 1's cost, about 3 hours on 4 A100 80GB.
"""

from configs.stage1 import *

data = "data/llava_pretrain/blip_laion_cc_sbu_558k.json"
max_steps = 6000
warmup_steps = 1500
out_dir = "out/stage1_llava558k"
