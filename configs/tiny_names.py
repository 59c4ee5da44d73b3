"""The tiny world's eyes, first step: the ViT learns shapes and colors from one object and its name at a time.

Without a Q-Former: a language model of its own, thrown away later, reads the patches, four to a token.
Next comes configs/tiny_vision.py.

python train.py configs/tiny_names.py
"""

vision = dict(image_size=48, patch_size=8, width=128, n_layers=4, n_heads=4, mlp_hidden=512)
llama = dict(hidden_size=96, num_hidden_layers=4, num_attention_heads=3, intermediate_size=256,
             rms_norm_eps=1e-5, tie_word_embeddings=True)
tokenizer = "data/tiny/tokenizer.model"
train = ("vision", "proj", "llama")

data = "data/tiny/names"
prepare = {
    "data/tiny/names": "tools/make_scenes.py names data/tiny/names --n=30000",
    "data/tiny/text": "tools/make_scenes.py text data/tiny/text --n=60000",
    "data/tiny/tokenizer.model": "tools/make_scenes.py tokenizer data/tiny/tokenizer.model "
                                 "--text=data/tiny/text/chat.jsonl",
}
clean_captions = False

batch_size = 32
max_steps = 1200
lr = 1e-3
min_lr = 6e-4
warmup_steps = 100
betas = (0.9, 0.99)
grad_clip = 1.0

dtype = "float32"
num_workers = 1
out_dir = "out/tiny_names"
save_interval = 200
save_dtype = "bfloat16"
