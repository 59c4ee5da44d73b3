"""Small tokenizer.json files in the style of real families, trained on a paragraph."""

import json
import random
from pathlib import Path

import pytest
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from tests.common import ROOT

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}"
    "<|end_header_id|>\n\n{{ message.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    "{% endif %}"
)
# Each family: its control tokens; the first ends texts, the second ends answers.
CONTROLS = {
    "smollm2": ["<|endoftext|>", "<|im_end|>", "<|im_start|>"],
    "qwen2.5": ["<|endoftext|>", "<|im_end|>", "<|im_start|>"],
    "qwen3": ["<|endoftext|>", "<|im_end|>", "<|im_start|>", "<think>", "</think>"],
    "llama3": [
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
    ],
}
# In quick runs of the tests one family stands for all.
SMOLLM2, *OTHERS = CONTROLS
EACH_FAMILY = [
    SMOLLM2,
    *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS),
]


def by_words(digits: str) -> pre_tokenizers.PreTokenizer:
    pattern = Regex("|".join((CONTRACTIONS, WORDS, digits, REST)))
    split = pre_tokenizers.Split(pattern, "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, bytes_])


def train(family: str, vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if family == "smollm2":
        digits = pre_tokenizers.Digits(individual_digits=True)
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    elif family == "llama3":
        tokenizer.pre_tokenizer = by_words(r"\p{N}{1,3}")
    else:
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = by_words(r"\p{N}")
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(CONTROLS[family]),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    text = (ROOT / "assets/paragraph.txt").read_text()
    tokenizer.train_from_iterator([text, "user assistant system"] * 2, trainer)
    tokenizer.add_special_tokens(CONTROLS[family])
    if family == "llama3":
        bos = "<|begin_of_text|>"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def write_tokenizer(folder: Path, family: str, vocab_size: int = 400):
    """tokenizer.json and the files beside it, as in the family's folders."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train(family, vocab_size)
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        token["special"] = "think" not in token["content"]  # as Qwen3 has them
    (folder / "tokenizer.json").write_text(json.dumps(content))
    text_end, answer_end, *others = CONTROLS[family]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": answer_end}
    settings["chat_template"] = LLAMA3 if family == "llama3" else CHATML
    if family != "qwen3":
        thinking = "{% if enable_thinking is defined and not enable_thinking %}"
        start, _, end = settings["chat_template"].partition(thinking)
        settings["chat_template"] = start + end.partition("{% endif %}")[2]
    if family == "llama3":
        settings["bos_token"] = others[0]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ends = [tokenizer.token_to_id(name) for name in (text_end, answer_end)]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))


PIECES = (
    "abcdefgXYZ",
    "äöéñçœß",
    "Привет мир",
    "你好世界日本語",
    "שלום مرحبا",
    "नमस्ते",
    "0123456789",
    "   \t\n\r",
    ".,;:!?'\"()[]{}<>|#@%&*-_/\\",
    "\u00a0\u2003\u200d\ufe0f",
    ("🐕", "👩‍👩‍👧", "🇩🇪", "e\u0301", "\u0000"),
    ("'s", "'LL", "don't", " the", " a dog", "\n\n", "<Img>", "</Img>", "###"),
    sum(CONTROLS.values(), []),
)


def random_text(rng: random.Random) -> str:
    pieces = [rng.choice(rng.choice(PIECES)) for _ in range(rng.randrange(40))]
    return "".join(pieces)
