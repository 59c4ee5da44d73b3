"""Settings shared by the pre-stages of the tiny world; see docs/tiny-world.md."""

prepare = {
    "data/tiny/text": "tools/make_scenes.py text data/tiny/text --n=60000",
    "data/tiny/tokenizer.model": (
        "tools/make_scenes.py tokenizer data/tiny/tokenizer.model "
        "--text=data/tiny/text/chat.jsonl"
    ),
}
trainable = ("llama",)
max_txt_len = 160
batch_size = 32
lr = 1e-3
min_lr = 1e-3
warmup_steps = 100
betas = (0.9, 0.99)
grad_clip = 1.0
dtype = "float32"
num_workers = 1
eval_interval = 200
eval_samples = 256
save_interval = 200
save_dtype = "bfloat16"
