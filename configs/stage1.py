"""Stage 1 of MiniGPT-4 (arXiv 2304.10592): train the projection on noisy captions.

torchrun --nproc-per-node 4 train.py configs/stage1.py

Cost in the paper: about 10 hours on 4 A100 80GB. The model then names what it sees in
short, often broken or repeated phrases; stage 2 repairs that. With another number of
GPUs, keep the global batch, processes x batch_size x grad_accum, at 256.
"""

vision = "weights/eva_vit_g.safetensors"
qformer = "weights/qformer.safetensors"
llama = "weights/vicuna-7b"
data = {
    "data/laion_dataset/{00000..10488}.tar": 115,  # drawn in the ratio 115 : 14
    "data/cc_sbu_dataset/{00000..01255}.tar": 14,
}
clean_captions = True
max_txt_len = 32
batch_size = 64
max_steps = 20_000  # 4 epochs of 5,000
lr = 1e-4
min_lr = 8e-5
warmup_steps = 5000
num_workers = 4
length_group = 8  # the workers of 4 processes hold about 2.3 GiB of shared memory
out_dir = "out/stage1"
save_interval = 1000
