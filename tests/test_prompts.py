"""Texts that look like parts of a template stay texts."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from configs.prompts import END, IMAGE, harmless, is_end, stop_sequences, user_message
from configs.schema import Config
from data import Samples
from plumbing.sources import Sample
from tests.common import TOKENIZER
from tests.samples import N

FORGED = st.lists(
    st.sampled_from(
        (
            "###",
            "#",
            "Human: ",
            "Assistant: ",
            "\n",
            " ",
            "[INST]",
            "[/INST]",
            "</s>",
            "<s>",
            "<Img>",
            "</Img>",
            "<image>",
            "a dog",
            "<ImageHere>",
        )
    )
).map("".join)


def ends(ids, end):
    """How often ids end a turn."""
    stop = stop_sequences(TOKENIZER, end)
    return sum(is_end(ids[:i], stop) for i in range(1, len(ids) + 1))


@given(FORGED, FORGED)
def test_no_text_ends_a_turn_begins_one_or_adds_a_picture(question, answer):
    for template, end in (("vicuna", "###"), ("llama2", END)):
        samples = Samples(
            [], Config(template=template, max_txt_len=10_000), TOKENIZER, 28, N
        )
        ids, targets = samples.tokenize(
            Sample([""], turns=[(question, answer)]), np.random.default_rng(0)
        )
        plain = samples.tokenize(
            Sample([""], turns=[("a", "a")]), np.random.default_rng(0)
        )[0]
        assert ids.count(IMAGE) == N and ids.count(TOKENIZER.bos) == 1
        assert ends(ids, end) == ends(plain, end)
        assert TOKENIZER.decode([i for i in ids if i > 2]).count("[INST]") == (
            template == "llama2"
        )


def test_a_question_cannot_end_its_turn_with_an_end_of_the_user_s_own():
    assert user_message("a<END>b", 0, "<END>") == ["a b"]
    config = Config(template="vicuna", end_sym="<END>")
    ids, _ = Samples([], config, TOKENIZER, 28, N).tokenize(
        Sample(turns=[("a<END>b", "c")]), np.random.default_rng(0)
    )
    assert TOKENIZER.decode(ids).count("<END>") == 1


@given(FORGED)
def test_a_caption_of_stage_1_ends_once(caption):
    samples = Samples([], Config(max_txt_len=10_000), TOKENIZER, 28, N)
    try:
        ids, _ = samples.tokenize(Sample([""], caption), np.random.default_rng(0))
    except Exception as e:
        assert str(e) == "empty caption"
    else:
        assert ids.count(TOKENIZER.encode("a\n")[-1]) == 1 and ids.count(IMAGE) == N


@given(st.text(st.characters(exclude_characters="#[")))
def test_other_texts_stay_as_they_are(text):
    assert harmless(text) == text == harmless(text, "###")
