"""Draw a chat in a terminal as PNG, from what chat.py writes to a pseudo-terminal.

python tests/draw_chat.py docs/chat.png
"""

import os
import pty
import re
import select
import sys
import time
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = (
    "Describe this image in detail.",
    "What color is the star?",
    "Write a rhyme about this image.",
)
COLUMNS = 80
SCALE, FONT_SIZE, MARGIN = 2, 14, 12  # pixels, twice as many on dense screens
BACKGROUND, TEXT = (24, 26, 31), (220, 223, 228)
ESCAPE = re.compile(r"\x1b\[([?0-9;]*)([a-zA-Z])")


def record(questions) -> str:
    """What a user sees who types these questions, with escape sequences."""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(ROOT)
        os.environ |= {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS)}
        os.environ.pop("NO_COLOR", None)
        arguments = ["chat.py", "assets/tiny/example.png", "--temperature=0"]
        os.execv(sys.executable, [sys.executable, *arguments, "--device=cpu"])
    shown = ""
    for question in (*questions, "/bye"):
        shown += read_until_prompt(terminal)
        os.write(terminal, f"{question}\n".encode())
    shown += read_until_prompt(terminal)
    os.waitpid(process, 0)
    return shown


def read_until_prompt(terminal) -> str:
    received = b""
    until = time.monotonic() + 60
    while not received.endswith(b"you> ") and time.monotonic() < until:
        if select.select([terminal], [], [], 1)[0]:
            try:
                received += os.read(terminal, 65536)
            except OSError:  # it has left
                break
    return received.decode()


def cells(text: str):
    """Yield (row, column, character, color, background) of each character."""
    row = column = 0
    color, background = TEXT, None
    for part in re.split(r"(\x1b\[[?0-9;]*[a-zA-Z])", text):
        if escape := ESCAPE.fullmatch(part):
            codes, letter = escape.groups()
            if letter == "m":
                color, background = colors(codes, color, background)
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
    """After ESC [ codes m, of which chat.py writes true colors and resets."""
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
    return color, background


def draw(text: str) -> Image.Image:
    import matplotlib

    path = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSansMono.ttf")
    font = ImageFont.truetype(str(path), SCALE * FONT_SIZE)
    width, height = round(font.getlength("m")), round(1.25 * SCALE * FONT_SIZE)
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
            canvas.text((x, y), character, color, font)
    return image


def main(target: str):
    text = record(QUESTIONS)
    draw(text).quantize(64).save(target, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
