"""The tiny world's language model, from nothing: a small LLaMA that learns scenes told in words, as chat.

python train.py configs/tiny_llm.py
"""

llama = dict(hidden_size=128, num_hidden_layers=6, num_attention_heads=4, intermediate_size=384,
             rms_norm_eps=1e-5, tie_word_embeddings=True)
tokenizer = "data/tiny/tokenizer.model"
train = ("llama",)

data = {"data/tiny/text/dense.jsonl": 3, "data/tiny/text/noisy.jsonl": 1, "data/tiny/text/chat.jsonl": 3}
heldout_data = "data/tiny/text/chat_heldout.jsonl"
prepare = {
    "data/tiny/text": "tools/make_scenes.py text data/tiny/text --n=60000",
    "data/tiny/tokenizer.model": "tools/make_scenes.py tokenizer data/tiny/tokenizer.model "
                                 "--text=data/tiny/text/chat.jsonl",
}
template = "vicuna"
end_sym = "###"
max_txt_len = 160
chat_share = 0.3

batch_size = 64
max_steps = 1800
lr = 3e-3
min_lr = 1e-4
warmup_steps = 100
weight_decay = 0.05
betas = (0.9, 0.99)
grad_clip = 1.0

dtype = "float32"
num_workers = 1
out_dir = "out/tiny_llm"
eval_interval = 200
eval_samples = 256
show_samples = 4
save_interval = 200
save_dtype = "bfloat16"
