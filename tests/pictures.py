"""Draw the pictures of README and docs/ from what the programs really show.

    python tests/pictures.py [chat] [data] [stages] [webchat]

Writes docs/NAME.png, all four by default. chat and data are what a program writes to a
pseudo-terminal, drawn in DejaVu Sans Mono; stages is the tiny model's answers before
and after stage 2; webchat is a screenshot of the page. They need requirements-dev.txt
and matplotlib, for its fonts; webchat needs gradio, playwright and Chromium. Each file
holds the text that it was drawn from, so that tests/test_pictures.py can compare.
"""

import argparse
import io
import json
import re
import sys
import tempfile
import textwrap
from itertools import chain
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import chat
from tests.common import ROOT
from tests.pseudo_terminal import Terminal
from tests.runs import CHROMIUM, web_page
from tools import make_scenes

EXAMPLE = "assets/tiny/example.png"
DESCRIBE = "Describe this image in detail."
QUESTIONS = (DESCRIBE, "What color is the star?", "Write a rhyme about this image.")
CHAT = ("chat.py", EXAMPLE, "--temperature=0")
DATA = (
    "tools/show_data.py",
    "configs/finetune_own.py",
    "--data=assets/tiny/example.jsonl",
    "--show=1",
)
COLUMNS = 80
SCALE, FONT_SIZE, MARGIN = 2, 14, 12  # pixels, twice as many on dense screens
BACKGROUND, TEXT = (24, 26, 31), (220, 223, 228)
COLORS = {32: (110, 190, 110), 90: (130, 134, 142)}  # green and gray, of 16 colors
ESCAPE = re.compile(r"(\x1b\[[?0-9;]*[a-zA-Z])")
N_SCENES = 4
WRAP = 44  # characters of an answer per line, in stages.png


# A terminal


def record(command, messages=()) -> str:
    """What a user sees of a program who types these, with escape sequences."""
    environment = {"NO_COLOR": "", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as home:
        terminal = Terminal(home, *command, env=environment, columns=COLUMNS)
        for message in messages:
            terminal.see("you> ", seconds=60)
            terminal.type(f"{message}\n")
        while terminal.read():
            pass
        assert terminal.end() == 0
    return terminal.all.decode()


def cells(text: str):
    """Yield (row, column, character, color, background) of each character."""
    row = column = 0
    color, background = TEXT, None
    for part in ESCAPE.split(text):
        if part.startswith("\x1b"):
            if part.endswith("m"):
                color, background = colors(part[2:-1], color, background)
            continue
        for character in part:
            if character == "\r":
                column = 0
            elif character == "\n":
                row += 1
            else:
                if column == COLUMNS:
                    row, column = row + 1, 0
                yield row, column, character, color, background
                column += 1


def colors(codes: str, color, background):
    """After ESC [ codes m: true colors, two of the 16 colors, and resets."""
    numbers = [int(code or 0) for code in codes.split(";")]
    while numbers:
        code = numbers.pop(0)
        if code in (38, 48):
            _, *rgb = numbers[:4]
            numbers = numbers[4:]
            if code == 38:
                color = tuple(rgb)
            else:
                background = tuple(rgb)
        elif code == 0:
            color, background = TEXT, None
        else:
            color = COLORS[code]
    return color, background


def font(name: str):
    import matplotlib

    path = Path(matplotlib.get_data_path(), "fonts/ttf", f"{name}.ttf")
    return ImageFont.truetype(str(path), SCALE * FONT_SIZE)


def draw_terminal(text: str) -> Image.Image:
    letters = font("DejaVuSansMono")
    width, height = round(letters.getlength("m")), round(1.25 * SCALE * FONT_SIZE)
    found = list(cells(text))
    n_rows = 1 + max(row for row, *_ in found)
    margin = SCALE * MARGIN
    size = (COLUMNS * width + 2 * margin, n_rows * height + 2 * margin)
    image = Image.new("RGB", size, BACKGROUND)
    canvas = ImageDraw.Draw(image)
    for row, column, character, color, background in found:
        x, y = margin + column * width, margin + row * height
        box = (x, y, x + width - 1, y + height - 1)
        if background:
            canvas.rectangle(box, background)
        if character == "\u2580":  # the upper half
            canvas.rectangle((x, y, x + width - 1, y + height // 2 - 1), color)
        elif character != " ":
            canvas.text((x, y), character, color, letters)
    return image


def show_terminal(command, messages=()):
    text = f"$ python {' '.join(command)}\r\n{record(command, messages)}"
    return text, draw_terminal(text)


# Before and after stage 2


def answers(ckpt: str, pictures) -> list[str]:
    """The greedy description of each picture."""
    options = chat.Options(ckpt=ckpt, temperature=0.0, device="cpu", template="vicuna")
    model, options = chat.load(options)
    found = []
    for picture in pictures:
        talk = chat.Chat(model, options)
        talk.add_image(picture)
        found.append("".join(talk.ask(DESCRIBE)).strip())
    return found


def draw_stages(pictures, columns) -> Image.Image:
    """A row per picture: the picture, and its answer in each of the columns.

    columns: {title: answers}.
    """
    letters, bold = font("DejaVuSans"), font("DejaVuSans-Bold")
    side, line, margin = SCALE * 132, round(1.4 * SCALE * FONT_SIZE), SCALE * MARGIN
    columns = {
        title: [textwrap.wrap(text, WRAP) for text in texts]
        for title, texts in columns.items()
    }
    lines = chain.from_iterable(chain.from_iterable(columns.values()))
    text_width = round(max(map(letters.getlength, lines)))
    lefts = [side + 2 * margin + i * (text_width + margin) for i in range(len(columns))]
    top = line + 2 * margin
    size = (lefts[-1] + text_width + margin, top + len(pictures) * (side + margin))
    image = Image.new("RGB", size, "white")
    canvas = ImageDraw.Draw(image)
    for left, (title, texts) in zip(lefts, columns.items()):
        canvas.text((left, margin), title, "black", bold)
        for row, lines in enumerate(texts):
            place = (left, top + row * (side + margin))
            canvas.multiline_text(place, "\n".join(lines), "black", letters)
    for row, path in enumerate(pictures):
        with Image.open(path) as picture:
            shown = picture.convert("RGB").resize((side, side), Image.Resampling.BOX)
        image.paste(shown, (margin, top + row * (side + margin)))
    return image


def show_stages():
    """The first held-out drawings; no training data shows their combinations."""
    with tempfile.TemporaryDirectory() as folder:
        make_scenes.main(["test", f"{folder}/test", f"--n={N_SCENES}"])
        pictures = [f"{folder}/test/{i}.jpg" for i in range(N_SCENES)]
        columns = {
            "after stage 1": answers(f"{ROOT}/assets/tiny/stage1", pictures),
            "after stage 2": answers(f"{ROOT}/assets/tiny", pictures),
        }
        return json.dumps(columns), draw_stages(pictures, columns)


# The page in a browser


def show_webchat():
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=30_000)
    with web_page() as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1100, "height": 800})
        page.goto(address)
        box = page.get_by_placeholder("Drop or paste a picture")
        texts = page.get_by_role("log").get_by_test_id("bot")
        page.locator("input[type=file]").first.set_input_files(ROOT / EXAMPLE)
        expect(page.locator(".thumbnails img")).to_have_count(1)
        for n, question in enumerate(QUESTIONS, start=1):
            box.fill(question)
            box.press("Enter")
            expect(texts).to_have_count(n)
            expect(texts.last).not_to_have_text("...")
            expect(page.locator(".generating, .pending")).to_have_count(0)
        shown = texts.all_inner_texts()
        page.mouse.move(0, 0)
        data = page.screenshot()
        browser.close()
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return json.dumps([text.strip() for text in shown]), image


SHOW = {
    "chat": lambda: show_terminal(CHAT, (*QUESTIONS, "/bye")),
    "data": lambda: show_terminal(DATA),
    "stages": show_stages,
    "webchat": show_webchat,
}


def main(argv):
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("names", nargs="*", metavar="NAME")
    names = parser.parse_args(argv).names
    for name in names:
        if name not in SHOW:
            parser.error(f"no picture is called {name}; give {', '.join(SHOW)}")
    for name in names or SHOW:
        text, image = SHOW[name]()
        about = PngInfo()
        about.add_itxt("Description", text, zip=True)
        target = ROOT / f"docs/{name}.png"
        image = image.quantize(256, Image.Quantize.MAXCOVERAGE)
        image.save(target, optimize=True, pnginfo=about)


if __name__ == "__main__":
    main(sys.argv[1:])
