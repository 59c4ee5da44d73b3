"""tools/webchat.py, in a browser if gradio, playwright and Chromium are there."""

import importlib.util
import re
import sys
from types import SimpleNamespace

import pytest

import chat
from plumbing import console
from plumbing.console import InputError
from tests.common import EXAMPLE, ROOT
from tests.runs import CHROMIUM, web_page
from tools import webchat

needs_browser = pytest.mark.skipif(
    not (CHROMIUM and all(map(importlib.util.find_spec, ("gradio", "playwright")))),
    reason="needs Chromium, and the packages gradio and playwright",
)


@pytest.fixture
def address():
    """The address of a page with the tiny model."""
    with web_page() as url:
        yield url


@needs_browser
def test_a_conversation_in_a_browser(address, tmp_path):
    """A picture, answers, markup as text, a broken picture, a new conversation."""
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=30_000)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        requested, faults = [], []
        page.on("request", lambda request: requested.append(request.url))
        page.on("pageerror", lambda fault: faults.append(str(fault)))
        page.goto(address)
        box, log = (
            page.get_by_placeholder("Drop or paste a picture"),
            page.get_by_role("log"),
        )
        answers, thumbnails = log.get_by_test_id("bot"), page.locator(".thumbnails img")
        upload = page.locator("input[type=file]").first
        upload.set_input_files(ROOT / "assets/tiny/example.png")
        expect(thumbnails).to_have_count(1)
        box.press("Enter")  # the picture alone
        expect(log).to_contain_text("Describe this image in detail.")
        expect(log).to_contain_text("left of the ring.")
        expect(log.locator("img[src*='example']")).to_have_count(1)
        box.fill("How many <b>objects</b> are *there*?")
        expect(page.locator(".generating, .pending")).to_have_count(0)
        box.press("Enter")
        expect(answers).to_have_count(2)
        expect(answers.last).to_contain_text(re.compile("two objects.*[.]"))
        expect(log).to_contain_text("How many <b>objects</b> are *there*?")
        expect(page.locator(".generating, .pending")).to_have_count(0)
        upload.set_input_files(tmp_path / "broken.png")
        expect(thumbnails).to_have_count(1)
        box.press("Enter")
        expect(
            page.get_by_text("broken.png: cannot be read as a picture")
        ).to_be_visible()
        expect(answers).to_have_count(2)
        page.get_by_role("button", name="New conversation").click()
        expect(answers).to_have_count(0)
        browser.close()
    assert not faults and all(
        url.startswith((address, "data:", "blob:")) for url in requested
    )


def test_an_old_gradio_is_named(monkeypatch):
    old = SimpleNamespace(__version__="5.49.1")
    monkeypatch.setitem(sys.modules, "gradio", old)
    with pytest.raises(InputError, match="needs gradio 6 or later, not 5.49.1: pip"):
        webchat.main([])


def test_without_gradio_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(InputError, match="pip install gradio"):
        webchat.main([])


@pytest.mark.parametrize(
    "argv, words",
    [(["--port=0"], "port"), (["--prt=1"], "did you mean port"), (["x.png"], "usage")],
    ids=["no port", "unknown option", "an argument"],
)
def test_wrong_options_raise(argv, words):
    with pytest.raises(InputError, match=words):
        webchat.main(argv)


def test_plain_switches_progress_bars_off(monkeypatch):
    monkeypatch.setattr(console, "_plain", False)  # undone at the end
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(InputError):
        webchat.main(["--plain"])
    assert console._plain


class Gradio:
    """What Page.answer needs of gradio."""

    def __init__(self):
        self.warnings = []

    def skip(self):
        return "as it was"

    def Warning(self, text):
        self.warnings.append(text)


def test_the_page_answers_with_the_sliders_values(tmp_path):
    gradio, broken = Gradio(), tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    page = webchat.Page(gradio, *chat.load(webchat.Options(device="cpu")))
    values = (0, 1, 1.05, 12)  # ints too, as a slider sends them
    message = {"text": "", "files": [EXAMPLE]}
    first, *_, (box, talk, log) = page.answer(message, None, *values)
    assert first[0] is None and first[2][-1]["content"] == "..."
    assert box == "as it was" and log[0]["content"] == {"path": EXAMPLE}
    assert log[1]["content"] == "Describe this image in detail."
    assert log[2]["content"] == talk.turns[0].answer
    assert talk.stats["answer_tokens"] == 12 and not gradio.warnings
    assert [getattr(talk.options, name) for name in webchat.SLIDERS] == [*values]
    assert isinstance(talk.options.temperature, float)

    message = {"text": "And?", "files": [EXAMPLE, str(broken)]}
    ((box, same, log),) = page.answer(message, talk, *values)
    assert box == message and same is talk and len(log) == 3
    assert not talk.new_pictures
    (warning,) = gradio.warnings
    assert warning.startswith("broken.png: cannot be read") and "/" not in warning


def test_turns_are_shown_as_text_with_their_pictures():
    turn = chat.Turn("a < b?", "", (chat.Picture("x.png", 1, None),))
    assert [m["content"] for m in webchat.as_messages([turn])] == [
        {"path": "x.png"},
        "a &lt; b?",
        "...",
    ]
