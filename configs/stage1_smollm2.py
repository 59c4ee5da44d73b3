"""Stage 1 with SmolLM2-1.7B on LLaVA-Pretrain's 558,128 pairs, on one GPU of 24 GB.

python train.py configs/stage1_smollm2.py

tools/get_weights.py smollm2-1.7b fetches the model, stage1_llava558k.py says how to get
the data; --llama takes another small model. tools/dry_run.py estimates 14.4 GiB and 249
TFLOP per step: about 6 hours on a GPU that sustains 70 TFLOP/s. Nobody has run this
config yet.
"""

from configs.stage1_llava558k import *

llama = "weights/smollm2-1.7b"
grad_accum = 4  # keeps the global batch at 256
out_dir = "out/stage1_smollm2"
