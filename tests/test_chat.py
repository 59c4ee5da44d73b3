"""The terminal chat: kinds of pictures, streaming, commands, options, errors."""

import io
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import chat
from chat import Chat, Options
from configs.prompts import END, settled_text, visible_answer
from plumbing.console import InputError
from tests.common import readable
from tools.make_scenes import named_objects
from vision import load_image

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = str(ROOT / "assets" / "tiny" / "example.png")


@pytest.fixture(scope="module")
def tiny():
    return chat.load(Options(device="cpu"))


def answer_to(tiny, question, *pictures, **options):
    model, defaults = tiny
    talk = Chat(model, Options(**vars(defaults) | options))
    for picture in pictures:
        talk.add_image(picture)
    return "".join(talk.ask(question)), talk


def test_the_tiny_model_describes_its_example_correctly(tiny):
    for seed in range(3):  # sampled as in the demo, not greedy
        answer, talk = answer_to(
            tiny, "Describe this image in detail.", EXAMPLE, seed=seed
        )
        assert talk.turns[-1].ended and named_objects(answer) == {
            ("red", "star"),
            ("yellow", "ring"),
        }
        assert "large red striped star at the top left" in answer
        assert "small yellow ring placed on the right" in answer and "gray" in answer


def test_answers_repeat_with_the_same_seed_and_greedy_ignores_it(tiny):
    rhyme = "Write a rhyme about this image."
    assert (
        answer_to(tiny, rhyme, EXAMPLE, seed=3)[0]
        == answer_to(tiny, rhyme, EXAMPLE, seed=3)[0]
    )
    greedy = {
        answer_to(tiny, rhyme, EXAMPLE, seed=s, temperature=0.0)[0] for s in (1, 2)
    }
    assert len(greedy) == 1


def test_a_second_turn_remembers_the_first(tiny):
    _, talk = answer_to(tiny, "How many objects are there?", EXAMPLE)
    "".join(talk.ask("What color is the star?"))
    assert len(talk.turns) == 2 and talk.n_pictures == 1
    talk.reset()
    assert not talk.turns and not talk.new_pictures


def test_streamed_pieces_add_up_to_the_answer_without_its_end(tiny):
    model, options = tiny
    talk = Chat(model, options)
    talk.add_image(EXAMPLE)
    pieces = list(talk.ask("Describe this image in detail."))
    assert len(pieces) > 5 and "#" not in "".join(pieces)
    assert "".join(pieces) == talk.turns[0][1]
    ids = model.tokenizer.encode("".join(pieces) + "### Human: x")
    assert visible_answer(model.tokenizer, ids, "###") == "".join(pieces)


SETTLED = {
    "half an end": ("It is red ##", "###", "It is red"),
    "the longest half": ("xaa", "aab", "x"),
    "only the longest half": ("baaaa", "aab", "baa"),
    "a half inside": ("# of C# is 2", "###", "# of C# is 2"),
    "the end's first letter": ("It is S", "STOP", "It is"),
    "an end of one letter": ("It is red", "\n", "It is red"),
    "half a character": ("caf\ufffd\ufffd", "###", "caf"),
    "half a character after a space": ("a \ufffd", "###", "a"),
    "a control token as end": ("1 <", END, "1 <"),
    "all of it": ("##", "###", ""),
}


@pytest.mark.parametrize("answer, end, settled", SETTLED.values(), ids=SETTLED)
def test_the_settled_part_of_an_answer(answer, end, settled):
    assert settled_text(answer, end) == settled


@pytest.fixture
def said_by_the_model(tiny, monkeypatch):
    """A function: the model's answer -> its Turn; Chat.ask's pieces, one per id."""

    def call(text, template="vicuna"):
        model, options = tiny
        talk = Chat(model, Options(**vars(options) | {"template": template}))
        pieces = []

        def generate(*args, **options):
            for id in model.tokenizer.encode(text):
                pieces.append("")  # of this id
                yield id

        monkeypatch.setattr(model, "generate", generate)
        for piece in talk.ask("Hi"):
            assert piece
            pieces[-1] += piece
        return pieces, talk.turns[-1]

    return call


def test_text_that_may_begin_the_end_waits_for_the_next_id(said_by_the_model):
    pieces, turn = said_by_the_model("A # B ## C###")
    shown = [piece for piece in pieces if piece]
    assert shown[0] == "A" and turn.ended
    assert "".join(pieces) == turn.answer == "A # B ## C"
    for i in range(len(pieces)):  # nothing shown ends in a mark that may be an end
        assert not "".join(pieces[:i]).endswith(("#", " "))
    assert pieces.count("") > 3


def test_text_that_waited_is_shown_when_no_end_follows(said_by_the_model):
    pieces, turn = said_by_the_model("In C#")
    assert pieces[-1].endswith("#") and "".join(pieces) == turn.answer == "In C#"
    assert not turn.ended


def test_text_waits_only_as_long_as_it_has_to(said_by_the_model):
    """Each id's text appears with it, but for the white space at its end."""
    pieces, turn = said_by_the_model("The star is red")
    assert "".join(pieces) == turn.answer and all(pieces)


def test_an_answer_cut_at_max_new_tokens_is_not_ended(tiny):
    _, talk = answer_to(
        tiny, "Describe this image in detail.", EXAMPLE, max_new_tokens=3
    )
    assert not talk.turns[-1].ended


@pytest.mark.parametrize(
    "options, words",
    [
        ({"temperature": 1e-45}, "temperature = 1e-45: give 0 or"),
        ({"repetition_penalty": 1e-300}, "give one from 0.01 to 100"),
        ({"seed": 2**70}, "seed = "),
        ({"max_new_tokens": 2000}, "give one from 1 to 1999"),
    ],
    ids=readable,
)
def test_options_out_of_range_raise(options, words):
    with pytest.raises(InputError, match=words):
        Options(**options)


def test_both_templates_and_several_pictures_run(tiny):
    for template in ("vicuna", "llama2"):
        talk = answer_to(
            tiny,
            "What do you see?",
            EXAMPLE,
            EXAMPLE,
            template=template,
            max_new_tokens=8,
        )[1]
        assert len(talk.turns[0].pictures) == 2


def test_an_answer_ends_as_the_run_was_trained(tmp_path):
    """With its own `end_sym`, unless another template or end is asked for."""
    parts = {
        "llama": str(ROOT / "assets/tiny/llama"),
        "template": "vicuna",
        "end_sym": "END",
    }
    (tmp_path / "config.json").write_text(json.dumps(parts))
    for options, end in (
        ({}, "END"),
        ({"template": "llama2"}, END),
        ({"answer_end": "</s>"}, END),
        ({"answer_end": "."}, "."),
    ):
        talk = Chat(*chat.load(Options(ckpt=str(tmp_path), device="cpu", **options)))
        assert talk.template.end == end


def test_a_language_model_alone_answers_but_takes_no_pictures(tmp_path, capsys):
    (tmp_path / "config.json").write_text(
        json.dumps({"llama": str(ROOT / "assets/tiny/llama")})
    )
    talk = Chat(*chat.load(Options(ckpt=str(tmp_path), device="cpu", max_new_tokens=8)))
    assert "trained without a template" in capsys.readouterr().err
    "".join(talk.ask("Hello"))
    assert talk.turns[0][1]
    with pytest.raises(InputError, match="sees no pictures"):
        talk.add_image(EXAMPLE)


def pictures():
    rgb = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    )
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    yield "jpeg", rgb, "JPEG", {}
    yield "gray jpeg", rgb.convert("L"), "JPEG", {}
    yield "cmyk jpeg", rgb.convert("CMYK"), "JPEG", {}
    yield "rotated jpeg", rgb, "JPEG", {"exif": exif}
    yield "png with alpha", rgb.convert("RGBA"), "PNG", {}
    yield "gray with alpha", rgb.convert("LA"), "PNG", {}
    yield "palette", rgb.convert("P"), "PNG", {}
    yield "palette with transparency", rgb.convert("P"), "PNG", {"transparency": 3}
    yield "one bit", rgb.convert("1"), "PNG", {}
    yield (
        "16 bit",
        Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) * 20),
        "PNG",
        {},
    )
    yield "32 bit float", rgb.convert("F"), "TIFF", {}
    yield "gif", rgb.convert("P"), "GIF", {}
    yield "webp", rgb, "WEBP", {}
    yield "1x1", rgb.resize((1, 1)), "PNG", {}
    yield "10,000 wide", rgb.resize((10_000, 30)), "JPEG", {}


@pytest.mark.parametrize(
    "picture, kind, options",
    [p[1:] for p in pictures()],
    ids=[p[0] for p in pictures()],
)
def test_every_kind_of_picture_is_read(tiny, tmp_path, picture, kind, options):
    path = tmp_path / f"picture.{kind.lower()}"
    picture.save(path, kind, **options)
    _, talk = answer_to(tiny, "What is this?", str(path), max_new_tokens=4)
    assert load_image(str(path), 64).shape == (3, 64, 64) and len(talk.turns) == 1


def test_exif_rotation_transparency_and_16_bits_are_respected(tmp_path):
    half = Image.new("RGB", (64, 64), "black")
    half.paste("white", (0, 0, 64, 32))  # the upper half is white
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    half.save(tmp_path / "a.png", exif=exif)
    odd = (
        b"Exif\0\0II*\0"
        + struct.pack("<IH", 8, 2)
        + struct.pack("<HHIi", 0x0100, 9, 1, -5)  # width -5
        + struct.pack("<HHII", 0x0112, 3, 1, 3)
        + bytes(4)
    )
    half.save(tmp_path / "a.jpg", exif=odd, quality=95)
    for name in ("a.png", "a.jpg"):
        image = load_image(str(tmp_path / name), 64)
        assert image[:, 60, 5].tolist() == [255, 255, 255] and image[
            :, 3, 5
        ].tolist() == [0, 0, 0]
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "b.png")
    assert load_image(str(tmp_path / "b.png"), 8).min() == 255
    Image.fromarray(np.full((8, 8), 32768, dtype=np.uint16)).save(tmp_path / "c.png")
    assert load_image(str(tmp_path / "c.png"), 8).unique().tolist() == [127]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_broken_exif_block_spoils_no_picture(tmp_path, kind):
    exif = b"Exif\0\0" + b"\0\x08\0\x02\x01\x12\0\x03" + bytes(30)
    Image.open(EXAMPLE).convert("RGB").save(tmp_path / "a", kind, exif=exif, quality=99)
    seen = load_image(str(tmp_path / "a"), 56).float()
    assert (seen - load_image(str(EXAMPLE), 56)).abs().mean() < 3


@pytest.mark.parametrize(
    "content", [None, b"", b"no picture", b"\x89PNG\r\n\x1a\nbroken"]
)
def test_missing_and_broken_pictures_are_named(tmp_path, content):
    path = tmp_path / "x.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match="x.png"):
        load_image(str(path), 64)


def test_a_picture_of_a_telephone_names_the_package_that_reads_it(tmp_path):
    (tmp_path / "a.HEIC").write_bytes(b"\0\0\0 ftypheic" + bytes(20))
    with pytest.raises(InputError, match="a.HEIC: .*pip install pillow-heif"):
        load_image(str(tmp_path / "a.HEIC"), 64)


def test_a_truncated_picture_is_named(tmp_path):
    buffer = io.BytesIO()
    Image.effect_noise((200, 200), 50).save(buffer, "JPEG")
    (tmp_path / "half.jpg").write_bytes(buffer.getvalue()[:3000])
    with pytest.raises(InputError, match="half.jpg"):
        load_image(str(tmp_path / "half.jpg"), 64)


def test_prompt_prints_only_the_answer(capsys):
    chat.main([EXAMPLE, "--prompt=What color is the star?", "--temperature=0"])
    out, err = capsys.readouterr()
    assert out.endswith(".\n") and len(out.splitlines()) == 1 and "#" not in out
    assert len(err.splitlines()) == 1 and err.startswith("note: this is the tiny")


def test_commands(capsys, monkeypatch):
    lines = [
        "/help",
        f"/image {EXAMPLE}",
        "What color is the star?",
        "/image nowhere.png",
        "/dance",
        "/reset",
        "/quit",
        "x",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    chat.main(["--temperature=0"])
    out, err = capsys.readouterr()
    for words in (
        "seen. What would you like to know?",
        "/image PATH",
        "/dance: unknown command",
        "A new conversation",
    ):
        assert words in out
    assert "nowhere.png: there is no such picture" in err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--temprature=1"], "did you mean temperature"),
        (["--temperature=hot"], "not of type float"),
        (["--template=alpaca"], "alpaca"),
        (["--top_p=0"], "top_p"),
        (["--dtype=int3"], "int3"),
        (["--ckpt=nowhere"], "nowhere"),
        (["nowhere.png"], "nowhere.png"),
    ],
    ids=readable,
)
def test_wrong_arguments_raise(arguments, words):
    with pytest.raises(InputError, match=words):
        chat.main([*arguments, "--prompt=x"])


def test_bare_booleans_and_values_after_a_space(capsys):
    """A bare --check does not take the picture's path after it as its value."""
    answers = []
    for arguments in (
        [
            "--check",
            EXAMPLE,
            "--prompt",
            "What color is the star?",
            "--temperature",
            "0",
        ],
        [
            "--check=True",
            "--temperature=0",
            "--prompt=What color is the star?",
            EXAMPLE,
        ],
    ):
        chat.main(arguments)
        out, err = capsys.readouterr()
        assert (
            "perplexity on a paragraph" in err
            and "red" in out
            and len(out.splitlines()) == 1
        )
        answers.append(out)
    assert answers[0] == answers[1]


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        chat.main(["-h"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and chat.__doc__.strip() in shown
    assert all(f"--{name} " in shown for name in Options.__dataclass_fields__)
