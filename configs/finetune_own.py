"""Fine-tune the tiny model's projection on your own images, as in stage 2.

python tools/show_data.py configs/finetune_own.py --data=own/data.jsonl
python train.py configs/finetune_own.py --data=own/data.jsonl

The data is LLaVA's .json, or a .jsonl with one sample per line:
    {"image": "photos/cat.jpg", "caption": "A gray cat sleeps on a red sofa."}
    {"image": ["a.jpg", "b.jpg"], "conversation":
        [{"user": "What changed?"}, {"assistant": "The cat left."}]}
Image paths are relative to the file. finetune_7b.py fine-tunes a real model.
"""

from configs.tiny_stage2 import *

proj = "assets/tiny/proj.safetensors"
data = "own/data.jsonl"
heldout_data = ""
prepare = {}
batch_size = 4
max_steps = 200
lr = 3e-5
min_lr = 1e-5
out_dir = "out/own"
save_interval = 100
