"""The eyes of the tiny world: a small EVA-ViT and Q-Former learn to see from captions, together with the
teacher.

The teacher is not the language model that MiniGPT-4 will talk with, as BLIP-2's was FlanT5. Only the eyes are
kept.

python train.py configs/tiny_eyes.py
"""

vision = dict(image_size=48, patch_size=8, width=128, n_layers=4, n_heads=4, mlp_hidden=512)
qformer = dict(n_queries=16, width=128, n_layers=4, n_heads=4, ffn_hidden=256)
llama = "out/tiny_teacher/llama"
train = ("vision", "qformer", "proj", "llama")

# one object at a time teaches colors and shapes fastest
data = {"data/tiny/eyes_single": 1, "data/tiny/eyes": 1}
heldout_data = "data/tiny/eyes_heldout"
prepare = {
    "data/tiny/eyes_single": "tools/make_scenes.py eyes data/tiny/eyes_single --n=20000 --objects=1",
    "data/tiny/eyes": "tools/make_scenes.py eyes data/tiny/eyes --n=40000",
    "data/tiny/eyes_heldout": "tools/make_scenes.py eyes data/tiny/eyes_heldout --n=500 --heldout=True",
}
clean_captions = False
max_txt_len = 80

batch_size = 32
max_steps = 4000
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
