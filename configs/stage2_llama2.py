"""Stage 2 with LLaMA-2-chat and no Q-Former: 3,500 long, clean descriptions in LLaMA-2's chat template.

python train.py configs/stage2_llama2.py

Cost: a little more than stage2.py's 7 minutes on one A100 (64 image tokens instead of 32).
Expected: as stage2.py.
"""

vision = "weights/eva_vit_g.safetensors"
qformer = ""
llama = "weights/llama-2-7b-chat"
proj = "out/stage1_llama2/proj.safetensors"

data = "data/cc_sbu_align"
template = "llama2"
end_sym = "</s>"
max_txt_len = 160
clean_captions = False

batch_size = 12
max_steps = 1000  # 5 epochs of 200
lr = 3e-5
min_lr = 1e-5
warmup_lr = 1e-6
warmup_steps = 200
weight_decay = 0.05

dtype = "bfloat16"
num_workers = 4
length_group = 8
cache_features = True  # the same pictures come again: see them once
out_dir = "out/stage2_llama2"
save_interval = 200
