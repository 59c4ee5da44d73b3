"""The language model that the Q-Former is trained with, and that is then thrown away, as FlanT5 was.

It repeats 19 random words and can do little else: one layer with next to no MLP, so it attends to exactly one
word for each that it says. The Q-Former's outputs then become like words, which a linear layer can carry over
to another language model."""
from configs.tiny.base import *

llama = dict(hidden_size=96, num_hidden_layers=1, num_attention_heads=3, intermediate_size=8,
             rms_norm_eps=1e-5, tie_word_embeddings=True)
tokenizer = "data/tiny/tokenizer.model"
trainable = ("llama",)
data = "data/tiny/text/words.jsonl"
heldout_data = "data/tiny/text/words_heldout.jsonl"
max_steps = 600
lr = 3e-3
min_lr = 1e-4
warmup_steps = 100
seed = 7
out_dir = "out/tiny_teacher"
eval_samples = 128
save_dtype = "float32"
