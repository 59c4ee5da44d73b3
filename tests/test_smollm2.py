"""The real SmolLM2-135M-Instruct against transformers.

It needs the folder that `python tests/smollm2.py weights/smollm2-135m` makes.
"""

import os
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import chat
from configs.prompts import TEMPLATES, encode_chat
from llama import perplexity
from model import MiniGPT4
from plumbing.tokenizer import open_tokenizer
from tests.common import EXAMPLE, ROOT
from tests.families import random_text
from tools.make_scenes import named_objects

FOLDER = Path(os.environ.get("SMOLLM2", ROOT / "weights/smollm2-135m"))
TEXT = (ROOT / "assets/paragraph.txt").read_text().strip()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER.is_dir(), reason=f"there is no {FOLDER}"),
]


@pytest.fixture(scope="module")
def theirs():
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module")
def their_tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER, split_special_tokens=True)


def load(dtype="float32"):
    return MiniGPT4.from_files(None, None, str(FOLDER), dtype=dtype)


def test_ids_of_texts_equal_transformers(their_tokenizer):
    tokenizer = open_tokenizer("", FOLDER)
    rng = random.Random(1)
    texts = [random_text(rng) for _ in range(20_000)]
    want = their_tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert [tokenizer.encode(text) for text in texts] == want
    assert [tokenizer.decode(ids) for ids in want] == texts


@torch.no_grad()
def test_perplexity_equals_transformers(theirs, their_tokenizer):
    ids = their_tokenizer(TEXT, return_tensors="pt")["input_ids"]
    want = theirs(ids, labels=ids).loss.double().exp().item()
    got = {}
    for dtype in ("float32", "int8", "int4"):
        model = load(dtype)
        got[dtype] = perplexity(model.llama, model.tokenizer, TEXT)
    assert got["float32"] == pytest.approx(want, rel=1e-5)
    assert got["int8"] == pytest.approx(want, rel=0.03)
    assert got["int4"] == pytest.approx(want, rel=0.36)


def test_chat_and_greedy_answers_equal_transformers(theirs, their_tokenizer):
    """But for the system text that their template puts first."""
    model = load()
    turns = [("What is the capital of France?", "Paris."), ("And of Italy?", None)]
    exchanges = [(question, 0, answer) for question, answer in turns]
    prompt = encode_chat(model.tokenizer, exchanges, TEMPLATES["chatml"], 0)
    messages = [
        {"role": "user", "content": turns[0][0]},
        {"role": "assistant", "content": turns[0][1]},
        {"role": "user", "content": turns[1][0]},
    ]
    text = their_tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    system, start, rest = text.partition("<|im_start|>user")
    assert "You are a helpful AI assistant named SmolLM" in system
    their_tokenizer.split_special_tokens = False
    ids = their_tokenizer(start + rest, add_special_tokens=False)["input_ids"]
    assert prompt == ids

    want = theirs.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=60, pad_token_id=2
    )
    options = dict(temperature=0, repetition_penalty=1.0, max_new_tokens=60)
    got = list(model.generate(prompt, **options))
    assert got == want[0, len(prompt) :].tolist()
    assert "Rome" in model.tokenizer.decode(got)


@pytest.mark.skipif(
    FOLDER.resolve() != (ROOT / "weights/smollm2-135m").resolve(),
    reason="the run names weights/smollm2-135m",
)
def test_the_shipped_projection_shows_it_the_example():
    options = chat.Options(ckpt=str(ROOT / "assets/smol"), temperature=0.0)
    talk = chat.Chat(*chat.load(options))
    talk.add_image(EXAMPLE)
    answer = "".join(talk.ask("Describe this image in detail."))
    assert named_objects(answer) == {("red", "star"), ("yellow", "ring")}
