"""Texts that look like parts of a template stay texts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.prompts import (
    BOS,
    END,
    IMAGE,
    SYSTEM,
    TEMPLATES,
    chat_segments,
    encode_answer,
    encode_segments,
    format_end,
    harmless,
    is_end,
    parse_end,
    placed_message,
    stop_sequences,
    training_segments,
    user_message,
    visible_answer,
)
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


# ---- the end of an answer ------------------------------------------------------------

EOS = [TOKENIZER.eos]
ENDS = pytest.mark.parametrize("end", ["###", "STOP", END], ids=["###", "STOP", "END"])


@pytest.mark.parametrize("text", ["###", "</s>", "x</s>", "\n"])
def test_only_the_whole_text_names_the_control_token(text):
    end = parse_end(text)
    assert end == (END if text == "</s>" else text)
    assert format_end(end) == text


@ENDS
@pytest.mark.parametrize("text", ["", "a dog", "a dog.", "#", "a </s> typed"])
def test_an_encoded_answer_ends_once_and_shows_its_text(text, end):
    ids = encode_answer(TOKENIZER, harmless(text, end), end)
    stops = stop_sequences(TOKENIZER, end)
    ended = [is_end(ids[:n], stops) for n in range(1, len(ids) + 1)]
    assert ended.count(True) == 1 and ended[-1]
    assert visible_answer(TOKENIZER, ids, end) == text


@ENDS
def test_the_control_token_ends_every_answer(end):
    stops = stop_sequences(TOKENIZER, end)
    assert stops[0] == EOS
    assert is_end([*TOKENIZER.encode("a dog"), *EOS], stops)
    assert not is_end([*EOS, *TOKENIZER.encode("a dog")], stops)


def test_an_answer_is_cut_at_its_first_end_and_a_typed_control_token_stays():
    ids = TOKENIZER.encode("a dog </s> here###Human: b###")
    assert visible_answer(TOKENIZER, ids, "###") == "a dog </s> here"
    assert visible_answer(TOKENIZER, ids, END) == "a dog </s> here###Human: b###"


# ---- segments ------------------------------------------------------------------------


def test_markers_become_ids_and_adjacent_texts_are_encoded_as_one():
    segments = [BOS, "a d", "og", IMAGE, "", IMAGE, END, "b"]
    want = [TOKENIZER.bos, *TOKENIZER.encode("a dog"), *[IMAGE] * 4]
    want += [TOKENIZER.eos, *TOKENIZER.encode("b")]
    assert encode_segments(TOKENIZER, segments, n_image_tokens=2) == want


def test_a_chat_keeps_answers_with_their_end_but_without_the_control_token():
    turns = [(["Hi"], "Hello"), (["And?"], None)]
    assert chat_segments(turns, TEMPLATES["vicuna"]) == [
        *(BOS, SYSTEM, "###"),
        *("Human: ", "Hi", "###Assistant: ", "Hello", "###"),
        *("Human: ", "And?", "###Assistant: "),
    ]
    assert chat_segments(turns, TEMPLATES["llama2"]) == [
        *(BOS, SYSTEM),
        *(BOS, "[INST] ", "Hi", " [/INST] ", "Hello"),
        *(BOS, "[INST] ", "And?", " [/INST] "),
    ]


@pytest.mark.parametrize(
    "template, end, as_chat, later",
    [
        ("vicuna", "###", False, ["Human: ", "And?", " ###Assistant: "]),
        ("vicuna", END, False, ["###Human: ", "And?", " ###Assistant: "]),
        ("llama2", END, False, ["[INST] ", "And?", " [/INST] "]),
        ("vicuna", "###", True, ["Human: ", "And?", "###Assistant: "]),
        ("llama2", END, True, [BOS, "[INST] ", "And?", " [/INST] "]),
    ],
    ids=["vicuna", "vicuna_END", "llama2", "vicuna_chat", "llama2_chat"],
)
def test_a_later_message_follows_the_end_of_the_answer(template, end, as_chat, later):
    """Pictures are in the first one; ### is not repeated."""
    turns = [("Hi", "Hello"), ("And?", "Bye")]
    first, second = training_segments(turns, 1, template, end, as_chat)
    assert second == later
    assert first[0] == BOS and first.count(IMAGE) == 1
    assert (SYSTEM in first) == as_chat


@pytest.mark.parametrize(
    "text, segments",
    [
        ("Look:\n<image>", ["Look:", " ", "<Img>", IMAGE, "</Img>"]),
        ("<image>\nWhat?", ["<Img>", IMAGE, "</Img>", " ", "What?"]),
        ("no picture", ["no picture"]),
        ("", []),
        (
            "<image><image>",
            ["<Img>", IMAGE, "</Img>", " ", "<Img>", IMAGE, "</Img>"],
        ),
    ],
    ids=["last", "first", "none", "empty", "two"],
)
def test_pictures_stand_where_a_message_places_them(text, segments):
    assert placed_message(text) == segments
    assert user_message(segments, n_images=7) == segments
