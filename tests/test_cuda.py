"""What needs a GPU: CUDA graphs give the ids of eager decoding, and free memory."""

import gc

import pytest
import torch

import chat
from chat import Chat, Options, Turn
from configs.prompts import stop_sequences
from llama import KVCache
from plumbing.quantized import GraphedSteps
from tests.common import EXAMPLE
from tests.test_quantized import random_llama
from tests.test_static import decode, embeddings

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU for CUDA graphs"
)

QUESTIONS = (
    "Describe this image in detail.",
    "What color is the star?",
    "How many objects are there?",
)
DTYPES = ("float32", "bfloat16", "int8", "int4")


def start(dtype, with_graphs):
    options = Options(
        device="cuda", dtype=dtype, temperature=0.0, cuda_graphs=with_graphs
    )
    talk = Chat(*chat.load(options))
    assert (talk.model.graphed_steps is not None) == with_graphs
    return talk


def answer_ids(talk, question):
    """The ids of an answer, with those that end it."""
    ids = []
    generate = talk.generate

    def keep(*arguments):
        for id in generate(*arguments):
            ids.append(id)
            yield id

    talk.generate = keep
    "".join(talk.ask(question))
    del talk.generate
    talk.remember()
    return ids


def conversation(talk):
    """The ids of several turns, of one after /undo, and of a new conversation."""
    talk.add_image(EXAMPLE)
    answers = [answer_ids(talk, question) for question in QUESTIONS]
    talk.undo()
    answers.append(answer_ids(talk, QUESTIONS[0]))
    talk.reset()
    talk.add_image(EXAMPLE)
    answers.append(answer_ids(talk, QUESTIONS[1]))
    return answers


@pytest.mark.parametrize("dtype", DTYPES)
def test_graphs_say_the_same_in_conversations(dtype):
    graphed = start(dtype, True)
    assert conversation(graphed) == conversation(start(dtype, False))
    assert graphed.model.graphed_steps.steps


@pytest.mark.parametrize("dtype", DTYPES)
def test_graphs_say_the_same_in_batches(dtype):
    talk = start(dtype, False)
    talk.add_image(EXAMPLE)
    tokens, embeds = talk.prompt(Turn(QUESTIONS[0], pictures=talk.new_pictures))
    embeds = embeds.repeat(8, 1, 1)
    end = stop_sequences(talk.model.tokenizer, talk.template.end)
    options = {"stop": end, "temperature": 0}
    want = talk.model.generate_batch([tokens] * 8, embeds, **options)
    talk.model.graphed_steps = GraphedSteps(talk.model.llama)
    assert talk.model.generate_batch([tokens] * 8, embeds, **options) == want


def test_graphs_follow_a_cache_that_grows():
    model = random_llama().to("cuda")
    steps, x = GraphedSteps(model), embeddings(model, 3, 520)
    want = decode(model, model, x, 250, KVCache())
    got = decode(model, steps, x, 250, KVCache())
    assert torch.allclose(got, want, atol=1e-5)
    assert [capacity for _, capacity in steps.steps] == [256, 512, 1024]


def test_two_conversations_share_the_graphs():
    alone = start("float32", False)
    want = conversation(alone)[0]
    talk = start("float32", True)
    other = Chat(talk.model, talk.options)
    for each in (talk, other):
        each.add_image(EXAMPLE)
    pieces = zip(talk.ask(QUESTIONS[0]), other.ask(QUESTIONS[0]))
    texts = ["".join(text) for text in zip(*pieces)]
    ends = alone.model.tokenizer.ends
    said = alone.model.tokenizer.decode([id for id in want if id not in ends])
    assert texts[0] == texts[1] and said.startswith(texts[0][:20])


def test_graphs_free_their_memory():
    before = torch.cuda.memory_allocated()
    talk = start("bfloat16", True)
    conversation(talk)
    del talk
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + 2**20
