"""The tiny world: seeded drawings of 1-3 colored shapes and texts about them, in the formats of real data.

    python tools/make_scenes.py KIND DST [--n=...] [--seed=...] [--heldout]
    python tools/make_scenes.py tokenizer DST --text=chat.jsonl [--vocab_size=...]

The kinds:
    stage1     tar shards like img2dataset's, with short and noisy captions
    clean      the same, with captions that tell the whole picture
    eyes       the same, with captions that are lists of 19 words
    names      the same with one object per picture; the caption is "red star"
    stage2     filter_cap.json and image/, with long clean descriptions
    test       pictures of held-out combinations and scenes.json, to score answers
    text       a .jsonl of each kind of `document` for language models, and *_heldout.jsonl of each
    tokenizer  a sentencepiece model, trained on such a .jsonl

A hash, independent of the seed, holds out a tenth of all sets of (color, shape): training data never shows
them. --heldout draws only from that tenth (text and test ignore it: they have held-out scenes of their own).
Sample i depends only on the kind, the seed, --heldout and i. Every `rng` is a random.Random.
"""

import io
import json
import math
import random
import re
import shutil
import sys
import tarfile
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import sentencepiece
from PIL import Image, ImageDraw
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configs.prompts import INSTRUCTIONS, SYSTEM
from plumbing.console import InputError, run_main
from plumbing.options import check_name, option, override, parse_args

SIZES = {"small": 0.26, "large": 0.38}  # diameter, as a share of the picture's width
COLORS = {
    "red": (215, 25, 30),
    "green": (50, 190, 40),
    "blue": (35, 60, 225),
    "yellow": (250, 225, 30),
    "purple": (135, 35, 175),
    "orange": (250, 135, 10),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}
MARKS = {
    c: tuple(v // 2 for v in rgb) for c, rgb in COLORS.items()
}  # of stripes and dots
MARKS |= {"black": (125, 125, 125), "white": (105, 105, 105)}
TEXTURES = {"plain": "", "striped": "with stripes", "dotted": "with dots"}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "ring", "diamond")
CELLS = (
    "at the top left",
    "at the top",
    "at the top right",
    "on the left",
    "in the center",
    "on the right",
    "at the bottom left",
    "at the bottom",
    "at the bottom right",
)
PLACES = [
    f"{row} {column}"
    for row in ("top", "center", "bottom")
    for column in ("left", "center", "right")
]
BACKGROUNDS = {
    "gray": (150, 150, 150),
    "pink": (245, 175, 195),
    "brown": (115, 75, 45),
    "teal": (20, 125, 130),
}


@dataclass(frozen=True)
class Object:
    size: str
    color: str
    texture: str
    shape: str
    cell: int  # 0..8, an index of CELLS and PLACES


@dataclass(frozen=True)
class Scene:
    objects: tuple[
        Object, ...
    ]  # 1-3, by cell: top to bottom, left to right; no (color, shape) twice
    background: str

    @property
    def pairs(self) -> set[tuple[str, str]]:
        return {(o.color, o.shape) for o in self.objects}

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, d: dict) -> "Scene":
        return cls(tuple(Object(**o) for o in d["objects"]), d["background"])


def is_heldout(scene: Scene) -> bool:
    """Whether the scene's set of (color, shape) belongs to the held-out tenth."""
    return zlib.crc32(repr(sorted(scene.pairs)).encode()) % 10 == 0


def random_scene(
    rng: random.Random, heldout: bool = False, n_objects: int = 0
) -> Scene:
    """A scene of training or held-out combinations, with n_objects; 0: 1 in 20 %, 2 in 45 %, 3 in 35 %."""
    n_objects = n_objects or rng.choices((1, 2, 3), (20, 45, 35))[0]
    while True:
        cells = sorted(rng.sample(range(9), n_objects))
        objects = tuple(
            Object(
                rng.choice(tuple(SIZES)),
                rng.choice(tuple(COLORS)),
                rng.choice(tuple(TEXTURES)),
                rng.choice(SHAPES),
                cell,
            )
            for cell in cells
        )
        scene = Scene(objects, rng.choice(tuple(BACKGROUNDS)))
        if len(scene.pairs) == n_objects and is_heldout(scene) == heldout:
            return scene


# ---- pictures ----------------------------------------------------------------------------------------------


def _around(n, inner=1.0, outer=1.0):
    """n points around the origin, clockwise from the top, every other one at the distance `inner`."""
    turns = [2 * math.pi * i / n for i in range(n)]
    return [
        (r * math.sin(t), -r * math.cos(t))
        for r, t in zip([outer, inner] * (n // 2), turns)
    ]


ANGLES = [2 * math.pi * i / 48 for i in range(48)]
OUTLINES = {  # polygons in [-1, 1] x [-1, 1], y downwards
    "circle": _around(48),
    "ring": _around(48),
    "diamond": _around(4),
    "star": _around(10, 0.45, 1.05),
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -0.95), (1, 0.8), (-1, 0.8)],
    "cross": [
        (-0.35, -0.95),
        (0.35, -0.95),
        (0.35, -0.35),
        (0.95, -0.35),
        (0.95, 0.35),
        (0.35, 0.35),
        (0.35, 0.95),
        (-0.35, 0.95),
        (-0.35, 0.35),
        (-0.95, 0.35),
        (-0.95, -0.35),
        (-0.35, -0.35),
    ],
    "heart": [
        (
            math.sin(t) ** 3,
            (
                -13 * math.cos(t)
                + 5 * math.cos(2 * t)
                + 2 * math.cos(3 * t)
                + math.cos(4 * t)
            )
            / 16,
        )
        for t in ANGLES
    ],
}
WIDTH, OVERSAMPLE = 128, 3  # pixels; drawn 3 times as large
JPEG = {"format": "JPEG", "quality": 92}
INK, EDGE = (
    (15, 15, 15),
    18,
)  # of outlines: color, and oversampled pixels of width, half of them inside


def _shade(color, delta):
    return tuple(min(255, max(0, c + delta)) for c in color)


def _patch(obj, d, rng):
    """The object as d x d pixels, and the mask of its outline."""
    fill = Image.new("RGB", (d, d), _shade(COLORS[obj.color], rng.randint(-14, 14)))
    pen, mark = ImageDraw.Draw(fill), MARKS[obj.color]
    step, phase = (17 if obj.texture == "striped" else 13) * OVERSAMPLE, rng.random()
    for i in range(-1, int(2 * d / step) + 1):
        at = (i + phase) * step
        if obj.texture == "striped":
            pen.line((at, 0, at - d, d), fill=mark, width=int(0.33 * step))
        elif obj.texture == "dotted":
            for j in range(-1, int(d / step) + 2):
                y, r = (j + phase + i % 2 / 2) * step, 0.29 * step
                pen.ellipse((at - r, y - r, at + r, y + r), fill=mark)
    mask = Image.new("L", (d, d))
    outline = [((x + 1) * d / 2, (y + 1) * d / 2) for x, y in OUTLINES[obj.shape]]
    ImageDraw.Draw(mask).polygon(outline, fill=255)
    pen.line(outline + outline[:2], fill=INK, width=EDGE)
    if obj.shape == "ring":
        near, far = 0.25 * d, 0.75 * d  # of the hole
        ImageDraw.Draw(mask).ellipse((near, near, far, far), fill=0)
        near, far = near - EDGE // 2, far + EDGE // 2
        pen.ellipse((near, near, far, far), outline=INK, width=EDGE // 2)
    return fill, mask


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """The scene as 128 x 128 RGB pixels; places, sizes and shades vary a little with `rng`."""
    width = WIDTH * OVERSAMPLE
    blotches = b"".join(
        bytes(_shade(BACKGROUNDS[scene.background], rng.randint(-16, 16)))
        for _ in range(16)
    )
    canvas = Image.frombytes("RGB", (4, 4), blotches).resize(
        (width, width), Image.Resampling.BILINEAR
    )
    for obj in scene.objects:
        d = int(SIZES[obj.size] * width * rng.uniform(0.95, 1.04))
        corner = []
        for at in (obj.cell % 3, obj.cell // 3):
            start = (at + 0.5) * width / 3 - d / 2 + rng.uniform(-0.025, 0.025) * width
            corner.append(int(min(max(start, 0), width - d)))
        fill, mask = _patch(obj, d, rng)
        canvas.paste(fill, tuple(corner), mask)
    return canvas.reduce(OVERSAMPLE)


# ---- words about a scene -----------------------------------------------------------------------------------

NUMBERS = ("no", "one", "two", "three")
DESCRIBE_PROMPTS = (
    *INSTRUCTIONS,
    "Describe the picture.",
    "What do you see in this image?",
    "What is in the picture?",
    "Tell me about this image.",
)
SIDES = ("to the left of", "above", "to the right of", "below")
COUNTS = ("is one object", "are two objects", "are three objects")
OPENINGS = (
    "The image shows {0}.",
    "In this picture there is {0}.",
    "I can see {0}.",
    "There {1}: {0}.",
)
BACKDROPS = (
    "The background is {}.",
    "The background is {}.",
    "Everything is on a {} background.",
)


def _join(*words):
    """The words separated by spaces, without empty ones and "plain", which only questions and answers say."""
    return " ".join(w for w in words if w not in ("", "plain"))


def _an(phrase):
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _listed(items):
    """["a", "b", "c"] -> "a, b and c"."""
    return " and ".join(", ".join(items).rsplit(", ", 1))


def _named(scene, obj):
    """ "the star", or "the red star" if there are several stars."""
    shapes = [o.shape for o in scene.objects]
    return (
        f"the {obj.shape}"
        if shapes.count(obj.shape) == 1
        else f"the {obj.color} {obj.shape}"
    )


def _noun(obj, form=0):
    """The object without its place, in one of three wordings: "large red striped star"."""
    return (
        _join(obj.size, obj.color, obj.texture, obj.shape),
        _join(obj.size, obj.texture, obj.color, obj.shape),
        _join(obj.size, obj.color, obj.shape, TEXTURES[obj.texture]),
    )[form]


def _words(text):
    return re.findall(r"[a-z]+|\d+", text.lower())


def repeats(text: str, n: int = 4) -> bool:
    """Whether any n consecutive words occur twice in the text."""
    words = _words(text)
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) < len(grams)


def named_objects(text: str) -> set[tuple[str, str]]:
    """The (color, shape) pairs that a text names, with only sizes, colors, textures between the two words."""
    found, color = set(), None
    for token in re.findall(r"[a-z]+|[^\sa-z]", text.lower()):
        if token in COLORS:
            color = token
        elif token not in SIZES and token not in TEXTURES:
            if token in SHAPES and color:
                found.add((color, token))
            color = None
    return found


def dense_caption(scene: Scene) -> str:
    """ "large red striped star at the top left, small blue circle in the center, gray background"."""
    items = [f"{_noun(o)} {CELLS[o.cell]}" for o in scene.objects]
    return ", ".join([*items, f"{scene.background} background"])


def told_list(scene: Scene) -> str:
    """All facts, one word each (two for the place), in a fixed order: "star red large striped top left gray".
    Always 19 words: the background's word fills the places of missing objects. The shape comes first, so that
    a causal model knows at each word whose fact it is."""
    objects = [
        f"{o.shape} {o.color} {o.size} {o.texture} {PLACES[o.cell]}"
        for o in scene.objects
    ]
    return " ".join(objects + [scene.background] * (19 - 6 * len(objects)))


def retold(scene: Scene, rng: random.Random) -> str:
    """Every object's shape and about half of its other facts, in any order: "ring yellow star large"."""
    words = []
    for o in rng.sample(scene.objects, len(scene.objects)):
        others = (o.color, o.size, o.texture, PLACES[o.cell])
        words += [o.shape, *(fact for fact in others if rng.random() < 0.5)]
    return " ".join(words)


def told(scene: Scene, rng: random.Random) -> str:
    """All facts, as told_list or in a loose wording: what a language model reads in place of a picture."""
    if rng.random() < 0.75:
        return told_list(scene)
    article, short_cell = (rng.random() < 0.4 for _ in range(2))
    parts = [
        f"{'a ' * article}{_noun(o)} {CELLS[o.cell].split(' the ')[1] if short_cell else CELLS[o.cell]}"
        for o in scene.objects
    ]
    background = rng.choice(
        ("{} background", "{} background", "background {}", "on {}")
    )
    parts.insert(rng.choice((0, len(parts))), background.format(scene.background))
    return rng.choice((", ", ", ", "; ", " and ", " ")).join(parts)


def noisy_caption(scene: Scene, rng: random.Random) -> str:
    """A short web-like caption: true but incomplete. About 60 % name every color and shape."""
    size, texture, cell, background, article, mixed, whole = (
        rng.random() < 0.45 for _ in range(7)
    )
    objects = list(scene.objects)
    if mixed:
        rng.shuffle(objects)
    if not whole and rng.random() < 0.5:
        objects = objects[: rng.randint(1, len(objects))]
    color = whole or rng.random() < 0.4
    items = []
    for o in objects:
        item = _join(o.size * size, o.color * color, o.texture * texture, o.shape)
        items.append(_join(_an(item) if article else item, CELLS[o.cell] * cell))
    text = rng.choice((", ".join(items), _listed(items), " and ".join(items)))
    start = rng.choice(
        ("", "", "", "a picture of ", "photo of ", "image: ", "drawing of ")
    )
    if len(objects) == len(scene.objects) > 1 and rng.random() < 0.15:
        start = f"{len(objects)} shapes: "
    if background:
        text += rng.choice((" on {}", " on a {} background", ", {} background")).format(
            scene.background
        )
    if rng.random() < 0.06:
        text += rng.choice(
            (
                " - free download",
                " (stock photo)",
                "!!",
                " clip art",
                " #art",
                " for sale",
            )
        )
    return (start + text).upper() if rng.random() < 0.04 else start + text


def _sides(a, b):
    """The one or two sides of b on which a is, the larger distance first; on a tie, left or right first."""
    columns, rows = a.cell % 3 - b.cell % 3, a.cell // 3 - b.cell // 3
    distances = {
        "to the left of" if columns < 0 else "to the right of": abs(columns),
        "above" if rows < 0 else "below": abs(rows),
    }
    return [
        side
        for side in sorted(distances, key=distances.get, reverse=True)
        if distances[side]
    ]


def description(scene: Scene, rng: random.Random) -> str:
    """All facts in reading order, then where the first and the third object are, seen from the second. Each
    object and relation has its own wording, so that even similar objects repeat no 4 words."""
    items = [
        f"a {_noun(obj, i)} {_join(('', 'placed', 'seen')[i], CELLS[obj.cell])}"
        for i, obj in enumerate(scene.objects)
    ]
    text = rng.choice(OPENINGS).format(_listed(items), COUNTS[len(items) - 1])
    text += " " + rng.choice(BACKDROPS).format(scene.background)
    if len(items) > 1:
        a, b, *others = scene.objects
        text += (
            f" {_named(scene, a).capitalize()} is {_sides(a, b)[0]} {_named(scene, b)}"
        )
        for c in others:
            text += f", and {_named(scene, c)} is {_sides(c, b)[0].removeprefix('to the ')} it"
        text += "."
    return text


# ---- questions and rhymes ----------------------------------------------------------------------------------

PHRASINGS = {
    "count": (
        "How many objects are there?",
        "How many shapes do you see?",
        "How many objects are in the picture?",
    ),
    "color": ("What color is {}?", "What is the color of {}?"),
    "shape": (
        "What shape is the {} object?",
        "What is the shape of the {} object?",
        "What is the {} object?",
    ),
    "exists": (
        "Is there {} in the picture?",
        "Can you see {}?",
        "Does the image show {}?",
    ),
    "background": (
        "What color is the background?",
        "What is the color of the background?",
    ),
    "size": ("Is {} small or large?", "What size is {}?", "How big is {}?"),
    "texture": ("Is {} plain, striped or dotted?", "What is the texture of {}?"),
    "where": ("Where is {}?", "Where in the picture is {}?", "Where can I find {}?"),
    "relation": ("What is {}?", "Which object is {}?", "What can you see {}?"),
}
DECIDING = {  # the words that make an answer right or wrong
    "count": set(NUMBERS),
    "color": set(COLORS),
    "shape": set(SHAPES),
    "exists": {"yes", "no"},
    "background": {*BACKGROUNDS, *COLORS},
    "size": set(SIZES),
    "texture": set(TEXTURES),
    "where": {"top", "bottom", "left", "right", "center"},
}


def _facts(scene, obj):
    """{kind of fact: (what a question about it names, the two parts of the answer)}. Left out are facts whose
    question would tell the answer or fit several objects."""
    name = _named(scene, obj)
    known = {
        kind: (name, f"The {kind} of {name} is", getattr(obj, kind))
        for kind in ("size", "texture")
    }
    known["where"] = name, f"{name.capitalize()} is located", CELLS[obj.cell]
    if obj.color not in name:
        known["color"] = name, f"The color of {name} is", obj.color
    if [o.color for o in scene.objects].count(obj.color) == 1:
        known["shape"] = obj.color, f"The {obj.color} object is", _an(obj.shape)
    return known


def _ask(scene, obj, kind, rng):
    """(what the question names, answer), or None if the scene does not allow such a question."""
    if kind == "count":
        return "", f"There {COUNTS[len(scene.objects) - 1]}."
    if kind == "background":
        return "", f"The background is {scene.background}."
    if kind == "exists":
        color, shape = obj.color, obj.shape
        if rng.random() < 0.5:
            return _an(f"{color} {shape}"), f"Yes, there is {_an(color)} {shape}."
        while (color, shape) in scene.pairs:
            color, shape = rng.choice(tuple(COLORS)), rng.choice(SHAPES)
            if rng.random() < 0.5:  # half of the absent ones are nearly there
                color, shape = rng.choice(((obj.color, shape), (color, obj.shape)))
        return _an(f"{color} {shape}"), f"No, there is no {color} {shape}."
    if kind == "relation":
        found = {
            side: [o for o in scene.objects if side in _sides(o, obj)] for side in SIDES
        }
        alone = [
            (side, objects[0]) for side, objects in found.items() if len(objects) == 1
        ]
        if not alone:
            return None
        side, there = rng.choice(alone)
        return f"{side} {_named(scene, obj)}", f"The {there.color} {there.shape}."
    fact = _facts(scene, obj).get(kind)
    return fact and (fact[0], f"{fact[1]} {fact[2]}.")


def qa(scene: Scene, rng: random.Random) -> tuple[str, str, str]:
    """A question about the scene, its true answer in one sentence, and the kind of the question."""
    while True:
        kind, obj = rng.choice(tuple(PHRASINGS)), rng.choice(scene.objects)
        if asked := _ask(scene, obj, kind, rng):
            return rng.choice(PHRASINGS[kind]).format(asked[0]), asked[1], kind


def facts(
    scene: Scene, rng: random.Random, n: int, terse: bool
) -> list[tuple[str, str]]:
    """n different facts of a scene of three objects, as terse questions and answers ("size star", "large") or
    as the two parts of a sentence ("The size of the star is", "large.")."""
    pairs = []
    for obj in scene.objects:
        for kind, (about, begun, end) in _facts(scene, obj).items():
            question = f"{kind} {about.removeprefix('the ')}"
            pairs.append(
                (question, end.removeprefix("a ")) if terse else (begun, f"{end}.")
            )
    return rng.sample(pairs, n)


def answer_is_right(
    scene: Scene, question: str, kind: str, answer: str, truth: str
) -> bool:
    """Whether the answer agrees with `truth`; only the DECIDING words are compared."""
    if kind == "relation":
        ((color, shape),) = named_objects(truth)
        if sum(o.shape == shape for o in scene.objects) == 1 and not DECIDING[
            "color"
        ] & set(_words(answer)):
            return DECIDING["shape"] & set(_words(answer)) == {shape}
        return named_objects(answer) == {(color, shape)}
    answer = re.sub(r"\b[1-3]\b", lambda digit: NUMBERS[int(digit[0])], answer)
    return DECIDING[kind] & set(_words(answer)) == DECIDING[kind] & set(_words(truth))


RHYME_PROMPTS = (
    "Write a rhyme about this image.",
    "Write a short poem about the picture.",
    "Can you write a poem about this image?",
    "Make a rhyme about what you see.",
)
RHYMES = (  # the ends of a couplet's two lines, and a second line that names no object
    ("shines all day", "likes to play", "and all it wants to do is play"),
    ("dreams all night", "waits for light", "until it sees the morning light"),
    ("sits in a tree", "looks at the sea", "and from up there it sees the sea"),
    ("looks at the sky", "wants to fly", "and only wishes it could fly"),
    ("sleeps in the sun", "starts to run", "then wakes up and begins to run"),
    ("stands by a house", "meets a mouse", "and shares its dinner with a mouse"),
    ("talks to a cat", "puts on a hat", "that wears a very funny hat"),
    ("smiles at the moon", "hums a tune", "and softly hums a little tune"),
    ("sings a song", "dances along", "and all its friends can sing along"),
    ("feels so tall", "leans on a wall", "but cannot climb the garden wall"),
)
RHYMING = {(first.split()[-1], second.split()[-1]) for first, second, _ in RHYMES}


def rhyme(scene: Scene, rng: random.Random) -> str:
    """A couplet for every two objects; each object is named once, by color and shape."""
    names = [_an(f"{o.color} {o.shape}") for o in scene.objects]
    couplets = []
    for i, (first, second, alone) in zip(
        range(0, len(names), 2), rng.sample(RHYMES, 2)
    ):
        end = f"and {names[i + 1]} {second}" if i + 1 < len(names) else alone
        couplets.append(f"{names[i].capitalize()} {first},\n{end}.")
    return "\n".join(couplets)


def rhyme_is_right(scene: Scene, text: str) -> bool:
    """Whether the text names exactly the scene's objects, and the two lines of each couplet rhyme."""
    ends = [words[-1] for line in text.splitlines() if (words := _words(line))]
    couplets = list(zip(ends[::2], ends[1::2]))
    return (
        named_objects(text) == scene.pairs
        and len(ends) % 2 == 0
        and RHYMING.issuperset(couplets)
    )


# ---- samples and files -------------------------------------------------------------------------------------

LIST_WORDS = (
    *SHAPES,
    *COLORS,
    *SIZES,
    *TEXTURES,
    "top",
    "center",
    "bottom",
    "left",
    "right",
    *BACKGROUNDS,
)
CAPTIONS = {
    "stage1": noisy_caption,
    "clean": lambda scene, rng: dense_caption(scene),
    "eyes": lambda scene, rng: told_list(scene),
    "names": lambda scene, rng: f"{scene.objects[0].color} {scene.objects[0].shape}",
}
N_OBJECTS = {
    "names": 1,
    "text retold": 3,
    "text pairs": 3,
    "text terse": 3,
    "text facts": 3,
}  # others: 1-3
# For the tokenizer. No punctuation before ###: ".###" would become one piece, and hide the end of an answer.
MARKUP = (
    SYSTEM,
    "###Human: <Img>",
    "</Img> ",
    "###Assistant: ",
    "Assistant: ",
    "Human: ",
    "###",
    "[INST] ",
    " [/INST] ",
)


def conversation(scene: Scene, rng: random.Random, kind: str) -> list[dict[str, str]]:
    """[{"user": ...}, {"assistant": ...}, ...]: a scene in words, then requests and answers in any order."""
    n_questions = {"chat": 4, "asked": 8}.get(kind, 0)  # 0: single facts
    exchanges = [qa(scene, rng)[:2] for _ in range(n_questions)] or facts(
        scene, rng, 8, kind == "terse"
    )
    if kind == "chat":
        exchanges += [
            (rng.choice(DESCRIBE_PROMPTS), description(scene, rng)),
            (rng.choice(RHYME_PROMPTS), rhyme(scene, rng)),
        ]
    rng.shuffle(exchanges)
    turns = [
        turn
        for request, answer in exchanges
        for turn in ({"user": request}, {"assistant": answer})
    ]
    scene_told = told(scene, rng) if n_questions else told_list(scene)
    turns[0]["user"] = f"<Img> {scene_told} </Img> {turns[0]['user']}"
    return turns


def document(scene: Scene, rng: random.Random, kind: str) -> dict:
    """One line of KIND.jsonl: a conversation, or a context and the text to be learned after it."""
    if kind in ("chat", "asked", "terse", "facts"):
        return {"conversation": conversation(scene, rng, kind)}
    if kind == "words":  # of no scene
        context = text = " ".join(rng.choices(LIST_WORDS, k=19))
    elif kind == "retold":
        context, text = told_list(scene), retold(scene, rng)
    elif (
        kind == "pairs"
    ):  # the color comes first, so that the model has to find the shape by it
        objects = rng.sample(scene.objects, len(scene.objects))
        context, text = (
            told_list(scene),
            " ".join(f"{o.color} {o.shape}" for o in objects),
        )
    elif kind == "dense":
        context, text = told(scene, rng), dense_caption(scene)
    else:  # "noisy": cleaned as in stage 1
        text = " ".join(
            re.sub(r'[.!"()*#:;~]', " ", noisy_caption(scene, rng).lower()).split()
        )
        context = told(scene, rng)
    return {"context": context, "text": f"{text}\n"}


@dataclass(frozen=True)
class Options:
    n: int = option(0, "samples; 0: the kind's own number")
    seed: int = option(0, "of all random draws")
    heldout: bool = option(False, "only pictures of held-out combinations")
    text: str = option("", "tokenizer: the .jsonl to train on")
    vocab_size: int = option(1024, "tokenizer: pieces, with bytes and control tokens")


def samples(kind: str, options: Options):
    """Yield n scenes, each with the rng for its picture and text."""
    for i in tqdm(range(options.n), desc=kind):
        rng = random.Random(f"{kind} {options.seed} {options.heldout} {i}")
        yield random_scene(rng, options.heldout, N_OBJECTS.get(kind, 0)), rng


def write_shards(kind: str, folder: Path, options: Options):
    """Tar shards of 1000 samples: KEY.jpg, KEY.txt, KEY.json side by side."""
    scenes = samples(kind, options)
    for shard in range(math.ceil(options.n / 1000)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i, (scene, rng) in zip(range(1000), scenes):
                key, picture = f"{shard:05d}{i:04d}", io.BytesIO()
                draw(scene, rng).save(picture, **JPEG)
                caption = CAPTIONS[kind](scene, rng)
                about = json.dumps(
                    {"caption": caption, "key": key, "width": WIDTH, "height": WIDTH}
                )
                members = {
                    "jpg": picture.getvalue(),
                    "txt": caption.encode(),
                    "json": about.encode(),
                }
                for ending, content in members.items():
                    member = tarfile.TarInfo(f"{key}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def write_stage2(kind: str, folder: Path, options: Options):
    """filter_cap.json and image/0.jpg ..."""
    (folder / "image").mkdir()
    annotations = []
    for i, (scene, rng) in enumerate(samples(kind, options)):
        draw(scene, rng).save(folder / "image" / f"{i}.jpg", **JPEG)
        annotations.append({"image_id": str(i), "caption": description(scene, rng)})
    (folder / "filter_cap.json").write_text(
        json.dumps({"annotations": annotations}, indent=1)
    )


def write_test(kind: str, folder: Path, options: Options):
    """0.jpg ... of held-out scenes, and scenes.json: a list of Scene.to_dict()."""
    drawn = list(samples(kind, replace(options, heldout=True)))
    for i, (scene, rng) in enumerate(drawn):
        draw(scene, rng).save(folder / f"{i}.jpg", **JPEG)
    (folder / "scenes.json").write_text(
        json.dumps([scene.to_dict() for scene, _ in drawn])
    )


def write_text(kind: str, folder: Path, options: Options):
    """A .jsonl of each kind of document, and one of a fiftieth as many held-out scenes."""
    for name in (
        "words",
        "retold",
        "pairs",
        "dense",
        "noisy",
        "terse",
        "facts",
        "chat",
        "asked",
    ):
        for ending, n, heldout in (
            ("", options.n, False),
            ("_heldout", max(1, options.n // 50), True),
        ):
            with open(folder / f"{name}{ending}.jsonl", "w") as f:
                for scene, rng in samples(
                    f"{kind} {name}", replace(options, n=n, heldout=heldout)
                ):
                    f.write(json.dumps(document(scene, rng, name)) + "\n")


def train_tokenizer(kind: str, path: Path, options: Options):
    """A sentencepiece BPE model with LLaMA's settings: bytes for rare characters, digits one by one."""
    lines, model = [], io.BytesIO()
    try:
        for line in Path(options.text).read_text("utf-8-sig").splitlines():
            entry = json.loads(line)
            for turn in [entry] if "text" in entry else entry["conversation"]:
                lines += [part for text in turn.values() for part in text.splitlines()]
        if not lines:
            raise ValueError("it has no text")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(
            f"--text={options.text}: not a .jsonl of the kind text ({e})"
        ) from e
    lines += MARKUP * max(1, len(lines) // 50)  # frequent enough to become pieces
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            byte_fallback=True,
            vocab_size=options.vocab_size,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            character_coverage=0.99995,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as e:
        raise InputError(
            f"--vocab_size={options.vocab_size}: {str(e).splitlines()[-1]}"
        ) from e
    path.write_bytes(model.getvalue())


KINDS = dict.fromkeys(
    CAPTIONS, (write_shards, 20_000)
) | {  # kind: (function, default of --n)
    "stage2": (write_stage2, 2000),
    "test": (write_test, 500),
    "text": (write_text, 50_000),
    "tokenizer": (train_tokenizer, 1),
}


def main(argv: list[str]):
    (kind, target), given = parse_args(argv, __doc__, f"{'|'.join(KINDS)} DST", Options)
    check_name(kind, KINDS, "command line")
    options, target = override(Options(), given), Path(target)
    if options.n < 0:
        raise InputError(f"--n={options.n}: give a number of samples")
    if target.exists():
        raise InputError(
            f"{target} exists already: give another name, or remove it first"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.make_scenes.part")  # renamed when complete
    shutil.rmtree(part, ignore_errors=True)
    if kind != "tokenizer":
        part.mkdir()
    write, n = KINDS[kind]
    try:
        write(kind, part, replace(options, n=options.n or n))
    except OSError as e:
        raise InputError(f"{target}: cannot be written ({e})") from e
    part.rename(target)


if __name__ == "__main__":
    run_main(main)
