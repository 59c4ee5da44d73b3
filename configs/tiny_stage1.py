"""Stage 1 in the tiny world: the projection alone learns from short, noisy captions.
On 2 CPU cores 500 steps took 1 min 50 s.

python train.py configs/tiny_stage1.py
"""

vision = "assets/tiny/vision.safetensors"
qformer = ""  # until the committed eyes have one
llama = "assets/tiny/llama"

data = "data/tiny/stage1"
heldout_data = "data/tiny/stage1_heldout"
prepare = {
    "data/tiny/stage1": "tools/make_scenes.py stage1 data/tiny/stage1 --n=10000",
    "data/tiny/stage1_heldout": "tools/make_scenes.py stage1 data/tiny/stage1_heldout --n=500 --heldout=True",
}

batch_size = 32
max_steps = 800
lr = 3e-3
min_lr = 3e-4
warmup_steps = 50

dtype = "float32"
num_workers = 1
out_dir = "out/tiny_stage1"
eval_interval = 200
save_interval = 200
