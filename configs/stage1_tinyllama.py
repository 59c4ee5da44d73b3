"""Stage 1 with TinyLlama-1.1B in Vicuna's place: MiniGPT-4 for one small GPU.

python train.py configs/stage1_tinyllama.py

The paper's recipe but for the language model. The global batch is still 256, by accumulation. See the memory
with --dry_run=True, for which config.json in weights/tinyllama-1.1b-chat is enough. Expected: like stage 1,
with the shorter memory and knowledge of a model of 1.1B. Nobody has run it to its end yet.
"""

vision = "weights/eva_vit_g.safetensors"
qformer = "weights/qformer.safetensors"
llama = "weights/tinyllama-1.1b-chat"  # the folder from the hub, read as it is

data = {  # drawn per batch, 115 : 14
    "data/laion_dataset/{00000..10488}.tar": 115,
    "data/cc_sbu_dataset/{00000..01255}.tar": 14,
}
end_sym = "\n"
max_txt_len = 32
clean_captions = True

batch_size = 32
grad_accum = 8
max_steps = 20_000
lr = 1e-4
min_lr = 8e-5
warmup_lr = 1e-6
warmup_steps = 5000
weight_decay = 0.05

dtype = "bfloat16"
num_workers = 4
length_group = 8
out_dir = "out/stage1_tinyllama"
save_interval = 1000
