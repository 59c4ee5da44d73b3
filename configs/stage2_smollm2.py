"""Stage 2 with SmolLM2-1.7B: 3,500 long, clean descriptions, in the model's template.

python train.py configs/stage2_smollm2.py

tools/dry_run.py estimates 10.3 GiB and 18.8 TFLOP per step: about 5 minutes on a GPU
that sustains 70 TFLOP/s. Nobody has run this config yet.
"""

from configs.stage2 import *

llama = "weights/smollm2-1.7b"
proj = "out/stage1_smollm2/proj.safetensors"
template = "chatml"
out_dir = "out/stage2_smollm2"
