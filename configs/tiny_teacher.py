"""The language model that the eyes of the tiny world learn with, as BLIP-2's learnt with FlanT5.
Thrown away after that. It repeats 19 words, and can do little else: it has one layer with next to no MLP, and
its words come at random, so that it has to look at exactly one for each that it says. The Q-Former's outputs
then become like words, one each, which one linear layer can carry to another language model.

python train.py configs/tiny_teacher.py
"""

llama = dict(hidden_size=96, num_hidden_layers=1, num_attention_heads=3, intermediate_size=8,
             rms_norm_eps=1e-5, tie_word_embeddings=True)
tokenizer = "data/tiny/tokenizer.model"
train = ("llama",)

data = "data/tiny/text/words.jsonl"
heldout_data = "data/tiny/text/words_heldout.jsonl"
prepare = {
    "data/tiny/text": "tools/make_scenes.py text data/tiny/text --n=60000",
    "data/tiny/tokenizer.model": "tools/make_scenes.py tokenizer data/tiny/tokenizer.model "
                                 "--text=data/tiny/text/chat.jsonl",
}
max_txt_len = 160

batch_size = 32
max_steps = 600
lr = 3e-3
min_lr = 1e-4
warmup_steps = 100
betas = (0.9, 0.99)
grad_clip = 1.0
seed = 7

dtype = "float32"
num_workers = 1
out_dir = "out/tiny_teacher"
eval_interval = 200
save_interval = 200
