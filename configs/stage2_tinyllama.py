"""Stage 2 with TinyLlama-1.1B: 3,500 long, clean descriptions, on one small GPU.

python train.py configs/stage2_tinyllama.py

The paper's recipe but for the language model: 12 samples a step, in two micro-batches. Expected: whole
descriptions; failures should fall as in the paper. Nobody has run it to its end yet.
"""

vision = "weights/eva_vit_g.safetensors"
qformer = "weights/qformer.safetensors"
llama = "weights/tinyllama-1.1b-chat"
proj = "out/stage1_tinyllama/proj.safetensors"

data = "data/cc_sbu_align"
template = "vicuna"
end_sym = "###"
max_txt_len = 160
clean_captions = False

batch_size = 6
grad_accum = 2
max_steps = 1000
lr = 3e-5
min_lr = 1e-5
warmup_lr = 1e-6
warmup_steps = 200
weight_decay = 0.05

dtype = "bfloat16"
num_workers = 4
length_group = 8
cache_features = True  # the same pictures come again: see them once
out_dir = "out/stage2_tinyllama"
save_interval = 200
