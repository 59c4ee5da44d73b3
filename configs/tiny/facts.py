"""Language model, step 3: learn single facts.

They are asked tersely ("size star" -> "large") and in chat's sentences ("The size of
the star is" -> "large."). A third of the text is captions, retold lists and pairs.
"""

from configs.tiny.base import *

llama = "out/tiny_pairs/llama"
data = {
    "data/tiny/text/dense.jsonl": 1,
    "data/tiny/text/retold.jsonl": 1,
    "data/tiny/text/pairs.jsonl": 1,
    "data/tiny/text/terse.jsonl": 3,
    "data/tiny/text/facts.jsonl": 3,
}
heldout_data = "data/tiny/text/facts_heldout.jsonl"
max_steps = 1200
warmup_steps = 400  # long: a new form of text at a high rate makes it forget
out_dir = "out/tiny_facts"
