"""The tiny world's eyes, second step: the ViT learns whole pictures, still without a Q-Former.

It plays EVA-CLIP's part: the ViT is finished before a Q-Former looks through it (configs/tiny_eyes.py).

python train.py configs/tiny_vision.py
"""

vision = "out/tiny_names/vision.safetensors"
llama = "out/tiny_names/llama"
proj = "out/tiny_names/proj.safetensors"
train = ("vision", "proj", "llama")

data = "data/tiny/eyes"
heldout_data = "data/tiny/eyes_heldout"
prepare = {
    "data/tiny/eyes": "tools/make_scenes.py eyes data/tiny/eyes --n=60000",
    "data/tiny/eyes_heldout": "tools/make_scenes.py eyes data/tiny/eyes_heldout --n=500 --heldout=True",
}
clean_captions = False
max_txt_len = 80

batch_size = 32
max_steps = 4000
lr = 1e-3
min_lr = 1e-4
warmup_steps = 100
betas = (0.9, 0.99)
grad_clip = 1.0

dtype = "float32"
num_workers = 1
out_dir = "out/tiny_vision"
eval_interval = 500
eval_samples = 256
save_interval = 250
save_dtype = "bfloat16"
