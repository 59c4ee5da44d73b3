"""Vision tower, step 2: whole images. It has EVA-CLIP's role; no Q-Former yet."""

from configs.tiny.base import *

vision = "out/tiny_names/vision.safetensors"
llama = "out/tiny_names/llama"
proj = "out/tiny_names/proj.safetensors"
trainable = ("vision", "proj", "llama")
data = "data/tiny/eyes"
heldout_data = "data/tiny/eyes_heldout"
prepare = {
    data: f"tools/make_scenes.py eyes {data} --n=60000",
    heldout_data: f"tools/make_scenes.py eyes {heldout_data} --n=500 --heldout",
}
max_txt_len = 80
max_steps = 4000
min_lr = 1e-4
out_dir = "out/tiny_vision"
eval_interval = 500
save_interval = 250
