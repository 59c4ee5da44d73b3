"""The eyes of the tiny world: a small EVA-ViT and Q-Former learn to see from captions, with the teacher's words.

The language model is frozen and is not the one that MiniGPT-4 will talk with.

python train.py configs/tiny_eyes.py
"""

vision = dict(image_size=64, patch_size=8, width=128, n_layers=6, n_heads=4, mlp_hidden=512)
qformer = dict(n_queries=16, width=128, n_layers=4, n_heads=4, ffn_hidden=256)
llama = "out/tiny_teacher/llama"
train = ("vision", "qformer", "proj")

data = "data/tiny/eyes"
heldout_data = "data/tiny/eyes_heldout"
prepare = {
    "data/tiny/eyes": "tools/make_scenes.py eyes data/tiny/eyes --n=40000",
    "data/tiny/eyes_heldout": "tools/make_scenes.py eyes data/tiny/eyes_heldout --n=500 --heldout=True",
}
clean_captions = False
max_txt_len = 80

batch_size = 32
max_steps = 5000
lr = 1e-3
min_lr = 1e-5
warmup_steps = 200
betas = (0.9, 0.99)
grad_clip = 1.0

dtype = "float32"
num_workers = 1
out_dir = "out/tiny_eyes"
eval_interval = 500
eval_samples = 256
show_samples = 4
save_interval = 500
save_dtype = "bfloat16"
