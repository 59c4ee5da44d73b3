"""Q-Former: tell the teacher what the vision tower sees, as BLIP-2's told FlanT5."""

from configs.tiny.vision import *

vision = "out/tiny_vision/vision.safetensors"
qformer = dict(n_queries=19, width=128, n_layers=4, n_heads=4, ffn_hidden=256)
llama = "out/tiny_teacher/llama"
proj = ""
trainable = ("qformer", "proj")
max_steps = 5500
min_lr = 1e-5
warmup_steps = 200
out_dir = "out/tiny_eyes"
show_samples = 4
save_interval = 500
