"""Stage 1 in the tiny world: train the projection on noisy and clean captions.

python train.py configs/tiny_stage1.py

On 2 CPU cores: 2 min 31 s, including the time to draw the images. The held-out loss,
on noisy captions, ends at 0.76.
"""

vision = "assets/tiny/vision.safetensors"
qformer = "assets/tiny/qformer.safetensors"
llama = "assets/tiny/llama"
data = {"data/tiny/stage1": 1, "data/tiny/stage1_clean": 1}
heldout_data = "data/tiny/stage1_heldout"
prepare = {
    "data/tiny/stage1": "tools/make_scenes.py stage1 data/tiny/stage1 --n=10000",
    "data/tiny/stage1_clean": (
        "tools/make_scenes.py clean data/tiny/stage1_clean --n=10000"
    ),
    heldout_data: f"tools/make_scenes.py stage1 {heldout_data} --n=500 --heldout",
}
clean_captions = True
max_txt_len = 48
batch_size = 32
max_steps = 1100
lr = 2e-2
min_lr = 1e-3
warmup_steps = 20
dtype = "float32"
num_workers = 1
out_dir = "out/tiny_stage1"
eval_interval = 200
save_interval = 200
