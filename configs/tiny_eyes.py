"""The tiny world's eyes, last step: a Q-Former learns to tell the teacher what the finished ViT sees.

As BLIP-2's learnt between EVA-CLIP and FlanT5: ViT and language model are frozen. The teacher is not the
language model that MiniGPT-4 will talk with, and is thrown away after this.

python train.py configs/tiny_eyes.py
"""

vision = "out/tiny_vision/vision.safetensors"
qformer = dict(n_queries=19, width=128, n_layers=4, n_heads=4, ffn_hidden=256)
llama = "out/tiny_teacher/llama"
train = ("qformer", "proj")

data = "data/tiny/eyes"
heldout_data = "data/tiny/eyes_heldout"
prepare = {
    "data/tiny/eyes": "tools/make_scenes.py eyes data/tiny/eyes --n=60000",
    "data/tiny/eyes_heldout": "tools/make_scenes.py eyes data/tiny/eyes_heldout --n=500 --heldout=True",
}
clean_captions = False
max_txt_len = 80

batch_size = 32
max_steps = 5500
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
