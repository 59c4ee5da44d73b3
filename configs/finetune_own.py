"""Your own pictures: stage 2 on a .jsonl of captions or conversations, from a projection that exists.

    {"image": "photos/cat.jpg", "caption": "A gray cat sleeps on a red sofa."}
    {"image": ["a.jpg", "b.jpg"], "conversation": [{"user": "What changed?"}, {"assistant": "The cat left."}]}

Paths are relative to the file; the loss is on the assistant's words alone. See what the model will be given
with `python data.py configs/finetune_own.py`.

python train.py configs/finetune_own.py --data=own/data.jsonl

As it stands it begins at the tiny model of this repo, to try the road. For a real one, put the paths of
configs/stage2.py here, and its projection.
"""

vision = "assets/tiny/vision.safetensors"
qformer = "assets/tiny/qformer.safetensors"
llama = "assets/tiny/llama"
proj = "assets/tiny/proj.safetensors"

data = "own/data.jsonl"
template = "vicuna"
end_sym = "###"
max_txt_len = 160
clean_captions = False

batch_size = 4
max_steps = 200
lr = 3e-5
min_lr = 1e-5
warmup_steps = 20

dtype = "float32"
num_workers = 1
out_dir = "out/own"
save_interval = 100
