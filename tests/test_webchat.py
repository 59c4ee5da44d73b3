"""tools/webchat.py, in a real browser: needs gradio, playwright, and Chromium on the PATH."""

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import chat
from plumbing.console import InputError
from tools import webchat

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    None,
)
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and all(map(importlib.util.find_spec, ("gradio", "playwright")))),
    reason="needs Chromium, and the packages gradio and playwright",
)


@pytest.fixture
def address():
    """The address of a page with the tiny model."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        sys.executable,
        str(ROOT / "tools/webchat.py"),
        f"--port={port}",
        "--temperature=0",
    ]
    server = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )
    assert any("Running on" in line for line in server.stdout)  # read until then
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    server.wait()


@needs_browser
def test_a_conversation_in_a_browser(address, tmp_path):
    """Picture in, answers out, markup is text, a broken picture is named, a new conversation is empty."""
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
        page.screenshot(path=tmp_path / "chat.png")
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


def test_without_gradio_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(InputError, match="pip install gradio"):
        webchat.main([])


@pytest.mark.parametrize(
    "argv, words",
    [(["--port=0"], "port"), (["--prt=1"], "did you mean port"), (["x.png"], "usage")],
)
def test_wrong_options_raise(argv, words):
    with pytest.raises(InputError, match=words):
        webchat.main(argv)


def test_turns_are_shown_as_text_with_their_pictures():
    turn = chat.Turn("a < b?", "", (chat.Picture("x.png", 1, None),))
    assert [m["content"] for m in webchat.as_messages([turn])] == [
        {"path": "x.png"},
        "a &lt; b?",
        "...",
    ]
