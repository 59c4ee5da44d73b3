"""Fine-tune MiniGPT-4 with Vicuna-7B on your own images, on one GPU with 24 GB.

python tools/get_weights.py vicuna-7b
python train.py configs/finetune_7b.py --data=own/data.jsonl

The data is as for finetune_own.py. tools/dry_run.py estimates 17.3 GiB and 23.9 TFLOP
per step: about 3 minutes on a GPU that sustains 70 TFLOP/s. --grad_checkpoint saves
memory. 500 steps of 4 are four epochs of 500 images. Nobody has run this config yet.
"""

from configs.stage2 import *

proj = "out/vicuna-7b/proj.safetensors"
data = "own/data.jsonl"
batch_size = 4
max_steps = 500
warmup_steps = 50
out_dir = "out/own_7b"
save_interval = 100
