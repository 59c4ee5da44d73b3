"""Your own pictures: stage 2 from an existing projection, on LLaVA's .json, or a .jsonl like this:
    {"image": "photos/cat.jpg", "caption": "A gray cat sleeps on a red sofa."}
    {"image": ["a.jpg", "b.jpg"], "conversation": [{"user": "What changed?"}, {"assistant": "The cat left."}]}

python tools/show_data.py configs/finetune_own.py --data=own/data.jsonl
python train.py configs/finetune_own.py --data=own/data.jsonl

Paths are relative to the file. For a real model, import configs.stage2 and give its proj.
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
