"""Texts that look like parts of a template stay texts."""

from itertools import cycle, zip_longest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from configs.prompts import (
    BOS,
    END,
    IMAGE,
    NO_THINKING,
    SYSTEM,
    TEMPLATES,
    Control,
    Template,
    chat_segments,
    check_template,
    encode_answer,
    encode_chat,
    encode_segments,
    format_end,
    harmless,
    is_end,
    parse_end,
    placed_message,
    settled_text,
    stop_sequences,
    suggest_template,
    training_segments,
    turn_marks,
    user_message,
    visible_answer,
)
from configs.schema import Config
from data import Samples
from llama import IGNORE
from plumbing.console import InputError
from plumbing.sources import Sample
from plumbing.tokenizer import open_tokenizer, read_chat_template
from tests.common import TOKENIZER
from tests.families import CONTROLS, EACH_FAMILY
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


def test_the_marks_of_a_new_template_are_defused_too():
    vicuna_1_1 = Template(
        system=("A chat.",), user=("USER: ",), assistant=(" ASSISTANT: ",), end=END
    )
    marks = turn_marks([*TEMPLATES.values(), vicuna_1_1])
    for mark in ("###", "[INST]", "[/INST]", "USER:", "ASSISTANT:"):
        assert marks.fullmatch(mark)
    for text in ("Human: a", "assistant", "user\n", "a user", "", "<|im_end|>"):
        assert not marks.search(text)


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


# ---- models with a tokenizer.json ----------------------------------------------------

# Without names of control tokens, which apply_chat_template takes for the tokens
MESSAGES = st.text().filter(lambda text: "<" not in text).map(lambda text: f"a{text}b")


@pytest.mark.parametrize("family", EACH_FAMILY)
@given(turns=st.lists(MESSAGES, min_size=1, max_size=5))
def test_chat_equals_the_model_s_own_template(folders, family, turns):
    """Questions and answers in turn."""
    tokenizer = open_tokenizer("", folders[family])
    if len(turns) % 2 == 0:
        turns.pop()
    pairs = zip_longest(turns[::2], turns[1::2])
    template = TEMPLATES[suggest_template(read_chat_template(tokenizer.path))]
    exchanges = [(question, 0, answer) for question, answer in pairs]
    ours = encode_chat(tokenizer, exchanges, template, 0)

    theirs = AutoTokenizer.from_pretrained(folders[family])
    roles = cycle(("user", "assistant"))
    messages = [{"role": r, "content": text} for r, text in zip(roles, turns)]
    text = theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert ours == theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_training_has_the_ids_of_chat(folders, family):
    """Of one turn; `###` and names of control tokens are not changed."""
    tokenizer = open_tokenizer("", folders[family])
    name = suggest_template(read_chat_template(tokenizer.path))
    template, question, answer = TEMPLATES[name], "a ### <|im_end|>", "b <|eot_id|>"
    (prompt,) = training_segments([(question, answer)], 1, name, template.end)
    ids = encode_segments(tokenizer, prompt, 2)
    assert ids == encode_chat(tokenizer, [(question, 1, None)], template, 2)
    assert ids.count(IMAGE) == 2
    answer_ids = encode_answer(tokenizer, answer, template.end)
    assert answer_ids[-1] == tokenizer.control(template.end.name)
    stops = stop_sequences(tokenizer, template.end)
    ended = [is_end(answer_ids[:n], stops) for n in range(1, len(answer_ids) + 1)]
    assert ended == [False] * (len(answer_ids) - 1) + [True]
    assert visible_answer(tokenizer, answer_ids, template.end) == answer


@pytest.mark.parametrize("family", EACH_FAMILY)
@given(data=st.data())
def test_control_tokens_in_data_are_text(folders, family, data):
    """In a caption, in a conversation and in LLaVA's rows, whatever they say."""
    tokenizer = open_tokenizer("", folders[family])
    name = suggest_template(read_chat_template(tokenizer.path))
    names = [*CONTROLS[family], "<image>", "user\n", " ", "a"]
    texts = st.lists(st.sampled_from(names), min_size=1).map("".join)
    said = data.draw(texts.filter(str.strip)), data.draw(texts.filter(str.strip))
    settings = Config(template=name, max_txt_len=10_000)
    samples = Samples([], settings, tokenizer, 28, N)
    controls = {tokenizer.control(name) for name in CONTROLS[family]}
    for sample in (
        Sample(["x.jpg"], caption=said[1]),
        Sample(["x.jpg"], turns=[said]),
        Sample(["x.jpg"], turns=[said], is_marked=True),
    ):
        ids, targets = samples.tokenize(sample, np.random.default_rng(0))
        plain = sample._replace(caption="a" if sample.caption else None)
        if sample.turns:
            plain = plain._replace(turns=[("a", "a")], is_marked=False)
        expected, _ = samples.tokenize(plain, np.random.default_rng(0))
        assert [i for i in ids if i in controls] == [
            i for i in expected if i in controls
        ]
        answer = [i for i in targets if i != IGNORE]
        *own, end = answer
        assert tokenizer.decode(own) == said[1]
        assert end == tokenizer.control(settings.answer_end.name)


def test_a_later_message_of_chatml_follows_a_new_line():
    start, end = Control("<|im_start|>"), Control("<|im_end|>")
    turns = [("Hi", "Hello"), ("And?", "Bye")]
    _, second = training_segments(turns, 0, "chatml", end)
    message = ["\n", start, "user\n", "And?"]
    assert second == [*message, end, "\n", start, "assistant\n", NO_THINKING]
    segments = chat_segments([(["Hi"], "Hello")], TEMPLATES["chatml"])
    assert segments[-3:] == ["Hello", end, "\n"]


@pytest.mark.parametrize("end", ["\n", "###", "<END>"], ids=["newline", "marks", "tag"])
@pytest.mark.parametrize("family", EACH_FAMILY)
def test_a_text_ends_answers_whatever_stands_before_it(folders, family, end):
    """A tokenizer.json may have a token for ".\\n" or ".###"."""
    tokenizer = open_tokenizer("", folders[family])
    stops = stop_sequences(tokenizer, end)
    for text in ("a dog", "a dog.", "a dog #", "dog \n"):
        text = harmless(text, end)
        ids = encode_answer(tokenizer, text, end)
        assert is_end(ids, stops)
        assert visible_answer(tokenizer, ids, end) == text.strip()


def test_the_first_end_is_the_tokenizer_s_own(folders):
    tokenizer = open_tokenizer("", folders["llama3"])
    end, answer_end = map(tokenizer.control, CONTROLS["llama3"][:2])
    assert stop_sequences(tokenizer, END) == ([answer_end], [end])
    assert stop_sequences(tokenizer, parse_end("<|eot_id|>")) == ([answer_end], [end])


@pytest.mark.parametrize("family", EACH_FAMILY)
@given(text=st.text())
def test_a_growing_answer_shows_no_half_characters(folders, family, text):
    tokenizer = open_tokenizer("", folders[family])
    end = parse_end("<|eot_id|>" if family == "llama3" else "<|im_end|>")
    ids = encode_answer(tokenizer, text, end)
    shown = ""
    for n in range(1, len(ids) + 1):
        answer = visible_answer(tokenizer, ids[:n], end)
        settled = settled_text(answer, end)
        assert settled.startswith(shown)
        shown = settled
    if "\ufffd" not in text:
        assert "\ufffd" not in shown


@pytest.mark.parametrize(
    "jinja, name",
    [
        ("{{ '<|im_start|>' + message['role'] }}", "chatml"),
        ("{{ '<|start_header_id|>' }}", "llama3"),
        ("{{ bos_token + '[INST] ' }}", "llama2"),
        ("", "vicuna"),
        ("{{ 'user: ' }}", "vicuna"),
    ],
    ids=["chatml", "llama3", "llama2", "none", "other"],
)
def test_a_model_s_own_template_is_recognized(jinja, name):
    assert suggest_template(jinja) == name


@pytest.mark.parametrize(
    "template, end",
    [("chatml", "###"), ("", Control("<|im_end|>"))],
    ids=["name", "end"],
)
def test_a_template_without_its_control_tokens_is_refused(template, end):
    with pytest.raises(
        InputError, match="it has no token <.im_.*take another template"
    ):
        check_template(TOKENIZER, template, end)
