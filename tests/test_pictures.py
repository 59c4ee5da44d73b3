"""The pictures of the pages show what the programs show today."""

import pytest
from PIL import Image

from tests.common import ROOT
from tests.test_webchat import needs_browser

pictures = pytest.importorskip("tests.pictures")  # needs pseudo-terminals

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
    text, image = pictures.SHOW[name]()
    assert text == written(name)
    with Image.open(ROOT / f"docs/{name}.png") as committed:
        assert committed.size == image.size
    if name in TERMINALS:
        shown = {character for *_, character, _, _ in pictures.cells(text)}
        assert "\u2580" in shown and "\x1b" not in shown
        colors = image.getcolors(2**20)
        red = [n for n, color in colors if color[0] > 2 * sum(color[1:])]
        assert sum(red) > 1000


def test_pictures_are_small_and_pages_show_them():
    pages = (ROOT / "README.md", *ROOT.glob("docs/*.md"))
    texts = "".join(page.read_text() for page in pages)
    paths = list(ROOT.glob("docs/*.png"))
    assert {path.stem for path in paths} == {*pictures.SHOW, "training"}
    for path in paths:
        assert path.stat().st_size < 150_000, path
        assert path.name in texts
