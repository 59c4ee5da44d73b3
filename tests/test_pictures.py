"""The pictures of the pages show what the programs show today."""

import pytest
from PIL import Image

from tests.common import ROOT
from tests.pictures import SHOW, cells
from tests.test_webchat import needs_browser

TERMINALS = ("chat", "data")


def written(name: str) -> str:
    """The text that docs/NAME.png was drawn from."""
    with Image.open(ROOT / f"docs/{name}.png") as image:
        image.load()
        return image.text["Description"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*TERMINALS, "stages", pytest.param("webchat", marks=needs_browser)]
)
def test_a_picture_holds_what_the_program_shows(name):
    text, image = SHOW[name]()
    assert text == written(name)
    with Image.open(ROOT / f"docs/{name}.png") as committed:
        assert committed.size == image.size


@pytest.mark.slow
@pytest.mark.parametrize("name", TERMINALS)
def test_a_terminal_is_drawn_in_color(name):
    text, image = SHOW[name]()
    shown = {character for *_, character, _, _ in cells(text)}
    assert "\u2580" in shown and "\x1b" not in shown
    red = [n for n, color in image.getcolors(2**20) if color[0] > 2 * sum(color[1:])]
    assert sum(red) > 1000


def test_pictures_are_small_and_pages_show_them():
    pages = (ROOT / "README.md", *ROOT.glob("docs/*.md"))
    texts = "".join(page.read_text() for page in pages)
    pictures = list(ROOT.glob("docs/*.png"))
    assert {path.stem for path in pictures} == {*SHOW, "training"}
    for path in pictures:
        assert path.stat().st_size < 150_000, path
        assert path.name in texts
