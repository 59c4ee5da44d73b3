"""The tiny world's language model, first step: from a scene told as a list, to some of it in another order.

It is here that it learns to look a fact up by the object that it belongs to. Asked for single facts from the
start, it may guess for thousands of steps; here it has found it after 1,000 to 1,500 of them. Next comes
configs/tiny_pairs.py.

python train.py configs/tiny_retold.py
"""

llama = dict(hidden_size=128, num_hidden_layers=6, num_attention_heads=4, intermediate_size=384,
             rms_norm_eps=1e-5, tie_word_embeddings=True)
tokenizer = "data/tiny/tokenizer.model"
train = ("llama",)

data = "data/tiny/text/retold.jsonl"
heldout_data = "data/tiny/text/retold_heldout.jsonl"
prepare = {
    "data/tiny/text": "tools/make_scenes.py text data/tiny/text --n=60000",
    "data/tiny/tokenizer.model": "tools/make_scenes.py tokenizer data/tiny/tokenizer.model "
                                 "--text=data/tiny/text/chat.jsonl",
}
max_txt_len = 160

batch_size = 32
max_steps = 2500
lr = 1.5e-3
min_lr = 1e-3
warmup_steps = 100
betas = (0.9, 0.99)
grad_clip = 1.0

dtype = "float32"
num_workers = 1
out_dir = "out/tiny_retold"
eval_interval = 200
eval_samples = 256
save_interval = 200
save_dtype = "bfloat16"
