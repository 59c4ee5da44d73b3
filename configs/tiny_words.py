"""The tiny world's language model, first step: from a scene told in words to its caption and terse facts.

Here it learns to look back and copy, on the shortest of texts. Which object a fact belongs to it finds late:
colors and shapes first, then textures, sizes, places. Next comes configs/tiny_facts.py.

python train.py configs/tiny_words.py
"""

llama = dict(hidden_size=128, num_hidden_layers=6, num_attention_heads=4, intermediate_size=384,
             rms_norm_eps=1e-5, tie_word_embeddings=True)
tokenizer = "data/tiny/tokenizer.model"
train = ("llama",)

data = {"data/tiny/text/dense.jsonl": 1, "data/tiny/text/terse.jsonl": 3}
heldout_data = "data/tiny/text/terse_heldout.jsonl"
prepare = {
    "data/tiny/text": "tools/make_scenes.py text data/tiny/text --n=60000",
    "data/tiny/tokenizer.model": "tools/make_scenes.py tokenizer data/tiny/tokenizer.model "
                                 "--text=data/tiny/text/chat.jsonl",
}
max_txt_len = 160

batch_size = 32
max_steps = 6000
lr = 1.5e-3
min_lr = 1e-3
warmup_steps = 100
betas = (0.9, 0.99)
grad_clip = 1.0

dtype = "float32"
num_workers = 1
out_dir = "out/tiny_words"
eval_interval = 200
eval_samples = 256
save_interval = 200
save_dtype = "bfloat16"
