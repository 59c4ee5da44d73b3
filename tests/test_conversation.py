"""A conversation's cache and context: what is computed again, what is left out."""

from pathlib import Path

import pytest

import chat
from chat import Chat, Options
from configs.prompts import IMAGE
from plumbing.console import InputError

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = str(ROOT / "assets" / "tiny" / "example.png")
QUESTIONS = [
    "Describe this image in detail.",
    "What color is the star?",
    "How many objects are there?",
    "Write a rhyme about this image.",
    "What is to the left of the ring?",
]


@pytest.fixture(scope="module")
def tiny():
    return chat.load(Options(device="cpu", temperature=0.0))


def talk_with(tiny, **options):
    model, defaults = tiny
    return Chat(model, Options(**vars(defaults) | options))


def ask(talk, question):
    """The answer, with the number of prompt tokens that the cache did not hold."""
    answer = "".join(talk.ask(question))
    return answer, talk.stats["prompt_tokens"] - talk.stats["cached_tokens"]


def test_answers_are_the_same_with_and_without_the_cache(tiny):
    cached, fresh = talk_with(tiny), talk_with(tiny)
    for talk in (cached, fresh):
        talk.add_image(EXAMPLE)
    for i, question in enumerate(QUESTIONS):
        fresh.cached = []
        answer, n_computed = ask(cached, question)
        assert (answer, cached.stats["prompt_tokens"]) == ask(fresh, question)
        cached.remember()
        if i:  # the question with what stands around it
            assert n_computed <= len(cached.model.tokenizer.encode(question)) + 10


def test_without_remembering_the_last_answer_is_computed_with_the_next_question(tiny):
    talk = talk_with(tiny)
    talk.add_image(EXAMPLE)
    ask(talk, QUESTIONS[0])
    first = talk.stats
    _, n_computed = ask(talk, QUESTIONS[1])
    assert (
        n_computed
        < first["answer_tokens"] + 20
        < first["prompt_tokens"] + first["answer_tokens"]
    )


def test_another_picture_in_the_same_place_is_computed_again(tiny, tmp_path):
    from PIL import Image

    Image.new("RGB", (48, 48), "blue").save(tmp_path / "blue.png")
    talk, fresh = talk_with(tiny), talk_with(tiny)
    talk.add_image(str(tmp_path / "blue.png"))
    ask(talk, QUESTIONS[0])
    talk.undo()
    talk.new_pictures = ()
    for each in (talk, fresh):
        each.add_image(EXAMPLE)
    answer, n_computed = ask(talk, QUESTIONS[0])
    assert (
        answer == ask(fresh, QUESTIONS[0])[0]
        and n_computed >= talk.model.n_image_tokens
    )


def test_a_stopped_answer_stays_and_the_next_answer_follows_it(tiny):
    talk, fresh = talk_with(tiny), talk_with(tiny)
    talk.add_image(EXAMPLE)
    pieces = talk.ask(QUESTIONS[0])
    next(pieces), next(pieces)
    pieces.close()
    assert not talk.turns[-1].ended and talk.turns[0].answer
    fresh.turns = list(talk.turns)
    assert ask(talk, QUESTIONS[1])[0] == ask(fresh, QUESTIONS[1])[0]


def test_undo_gives_the_turn_and_its_picture_back(tiny):
    talk = talk_with(tiny)
    talk.add_image(EXAMPLE)
    answer = ask(talk, QUESTIONS[1])[0]
    assert (
        talk.undo().answer == answer and not talk.turns and len(talk.new_pictures) == 1
    )
    assert ask(talk, QUESTIONS[1])[0] == answer


@pytest.mark.slow
def test_a_full_context_drops_the_oldest_turns_and_never_the_picture_or_the_system_text(
    tiny, capsys
):
    talk = talk_with(tiny)
    talk.add_image(EXAMPLE)
    start = talk.ids([chat.Turn("")], 0)[:20]  # with the system text
    for _ in range(4):
        for question in QUESTIONS[:4]:
            answer, _ = ask(talk, question)
            talk.remember()
            assert talk.stats["prompt_tokens"] <= talk.context - 100
            ids, _ = talk.prompt(None)
            assert ids[:20] == start and ids.count(IMAGE) == talk.model.n_image_tokens
        assert (
            "red star" in answer and "yellow ring" in answer
        )  # after 16 turns as well as in the first
    err = capsys.readouterr().err
    assert (
        "context of 300 tokens is full" in err
        and talk.n_dropped > 5
        and len(talk.turns) == 16
    )


def test_pictures_make_room_for_newer_ones(tiny):
    talk = talk_with(tiny)
    for _ in range(12):
        talk.add_image(EXAMPLE)
        answer, _ = ask(talk, "What color is the star?")
        assert talk.stats["prompt_tokens"] <= 200
    assert "red" in answer


def test_a_question_that_is_too_long_is_refused_and_nothing_is_lost(tiny):
    talk = talk_with(tiny)
    talk.add_image(EXAMPLE)
    with pytest.raises(InputError, match="the question takes 9"):
        ask(talk, "word " * 3000)
    assert not talk.turns and len(talk.new_pictures) == 1
    assert "red" in ask(talk, QUESTIONS[1])[0]


def test_beam_search_answers_in_the_chat(tiny):
    talk = talk_with(tiny, num_beams=3)
    talk.add_image(EXAMPLE)
    assert "red" in ask(talk, QUESTIONS[1])[0] and talk.turns[-1].ended
    assert "two" in ask(talk, QUESTIONS[2])[0]


def test_turns_that_a_long_question_pushed_out_return_when_it_is_taken_back(tiny):
    talk = talk_with(tiny)
    talk.add_image(EXAMPLE)
    before = [ask(talk, question)[0] for question in QUESTIONS[1:3]]
    n_before = len(talk.prompt(None)[0])
    ask(talk, "star " * 120)
    assert talk.n_dropped
    talk.undo()
    assert (
        len(talk.prompt(None)[0]) == n_before
        and [turn.answer for turn in talk.turns] == before
    )
