"""Stage 1 with LLaMA-2-chat and no Q-Former: 64 image tokens, each of 4 neighbouring patches joined.

torchrun --nproc-per-node 4 train.py configs/stage1_llama2.py

The numbers are those of stage1.py. The original gives no cost; expect more than stage1.py's 10 hours on 4
A100 80GB, since each picture takes 64 places in the language model instead of 32. Expected: as stage1.py.
"""

vision = "weights/eva_vit_g.safetensors"
qformer = ""
llama = "weights/llama-2-7b-chat"

data = {  # drawn per batch, 115 : 14
    "data/laion_dataset/{00000..10488}.tar": 115,
    "data/cc_sbu_dataset/{00000..01255}.tar": 14,
}
end_sym = "\n"
max_txt_len = 32
clean_captions = True

batch_size = 64
max_steps = 20_000  # 4 epochs of 5,000
lr = 1e-4
min_lr = 8e-5
warmup_lr = 1e-6
warmup_steps = 5000
weight_decay = 0.05

dtype = "bfloat16"
num_workers = 4
length_group = 8
out_dir = "out/stage1_llama2"
save_interval = 1000
