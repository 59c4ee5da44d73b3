"""Draw the tiny world: 1 to 3 colored shapes per image, and texts about them.

    python tools/make_scenes.py KIND DST [--n=...] [--seed=...] [--heldout]
    python tools/make_scenes.py tokenizer DST --text=chat.jsonl [--vocab_size=...]

KIND is one of these; formats are those of the real data:
    stage1     tar shards as img2dataset writes them, with short, noisy captions
    clean      the same, with captions that describe the whole image
    eyes       the same, with captions that are lists of 19 words
    names      the same, with one object per image and captions such as "red star"
    stage2     filter_cap.json and image/, with long, clean descriptions
    test       images of held-out combinations and scenes.json, to score answers
    text       for language models: NAME.jsonl and NAME_heldout.jsonl; NAME is words,
               retold, pairs, dense, noisy, terse, facts, chat or asked
    tokenizer  a sentencepiece model, trained on such a .jsonl

A tenth of all sets of (color, shape) pairs, chosen by a hash that is independent of the
seed, is held out and never appears in training data. --heldout draws only from that
tenth (text and test ignore it: they have held-out scenes of their own). Sample i
depends only on the kind, the seed, --heldout and i.
"""

import io
import json
import re
import shutil
import sys
import tarfile
import zlib
from dataclasses import asdict, dataclass, replace
from math import ceil, cos, sin, tau
from pathlib import Path
from random import Random
from typing import NamedTuple

import sentencepiece
from PIL import Image, ImageColor, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configs.prompts import INSTRUCTIONS, SYSTEM
from plumbing.console import InputError, progress, run_main
from plumbing.options import check_name, option, read_options

# Every `scene` is a Scene, every `rng` a random.Random.

SIZES = {"small": 0.26, "large": 0.38}  # diameter, as a share of the picture's width
COLORS = {
    "red": "#d7191e",
    "green": "#32be28",
    "blue": "#233ce1",
    "yellow": "#fae11e",
    "purple": "#8723af",
    "orange": "#fa870a",
    "white": "#fafafa",
    "black": "#0f0f0f",
}
# of stripes and dots: half as bright as the object; gray on white and black
MARKS = {
    "red": "#6b0c0f",
    "green": "#195f14",
    "blue": "#111e70",
    "yellow": "#7d700f",
    "purple": "#431157",
    "orange": "#7d4305",
    "white": "#696969",
    "black": "#7d7d7d",
}
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
PLACE_WORDS = ("top", "center", "bottom", "left", "right")
BACKGROUNDS = {
    "gray": "#969696",
    "pink": "#f5afc3",
    "brown": "#734b2d",
    "teal": "#147d82",
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
    # 1-3, by cell: top to bottom, left to right; no (color, shape) appears twice
    objects: tuple[Object, ...]
    background: str

    @property
    def pairs(self):
        """The set of (color, shape)."""
        return {(o.color, o.shape) for o in self.objects}

    @classmethod
    def from_dict(cls, d):
        """The inverse of asdict."""
        objects = tuple(Object(**o) for o in d["objects"])
        return cls(objects, d["background"])


def is_heldout(scene):
    """Whether the scene's set of (color, shape) belongs to the held-out tenth."""
    pairs = repr(sorted(scene.pairs))
    return zlib.crc32(pairs.encode()) % 10 == 0


def _random_object(cell, rng):
    return Object(
        rng.choice(tuple(SIZES)),
        rng.choice(tuple(COLORS)),
        rng.choice(tuple(TEXTURES)),
        rng.choice(SHAPES),
        cell,
    )


def random_scene(rng, heldout=False, n_objects=0):
    """A scene of training combinations or of held-out ones.

    With n_objects=0, 20 % of the scenes have 1 object, 45 % have 2, 35 % have 3.
    """
    n_objects = n_objects or rng.choices((1, 2, 3), (20, 45, 35))[0]
    while True:
        cells = sorted(rng.sample(range(9), n_objects))
        objects = tuple(_random_object(cell, rng) for cell in cells)
        scene = Scene(objects, rng.choice(tuple(BACKGROUNDS)))
        if len(scene.pairs) == n_objects and is_heldout(scene) == heldout:
            return scene


# ---- pictures ------------------------------------------------------------------------

WIDTH = 128  # pixels of a picture
OVERSAMPLE = 3
CANVAS = WIDTH * OVERSAMPLE  # pixels, before the picture is reduced
JPEG = {"format": "JPEG", "quality": 92}
INK = "#0f0f0f"  # color of outlines
EDGE = 18  # width of outlines in pixels of the canvas, half of them inside


def _around(n, inner=1.0, outer=1.0):
    """n points around the origin, clockwise from the top, every other one inner."""
    points = []
    for i in range(n):
        angle = tau * i / n
        radius = inner if i % 2 else outer
        points.append((radius * sin(angle), -radius * cos(angle)))
    return points


def _heart_point(t):
    y = -13 * cos(t) + 5 * cos(2 * t) + 2 * cos(3 * t) + cos(4 * t)
    return sin(t) ** 3, y / 16


def _cross():
    points = [(-0.35, -0.95), (0.35, -0.95), (0.35, -0.35)]  # the upper arm
    for _ in range(3):
        points += [(-y, x) for x, y in points[-3:]]  # turned clockwise
    return points


OUTLINES = {  # polygons in [-1, 1] x [-1, 1], y downwards
    "circle": _around(48),
    "ring": _around(48),
    "diamond": _around(4),
    "star": _around(10, inner=0.45, outer=1.05),
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -0.95), (1, 0.8), (-1, 0.8)],
    "cross": _cross(),
    "heart": [_heart_point(tau * i / 48) for i in range(48)],
}


def _shade(color, delta):
    """The RGB values of a color, delta brighter."""
    channels = ImageColor.getrgb(color)
    return tuple(min(255, max(0, channel + delta)) for channel in channels)


def _box(x, y, radius):
    return x - radius, y - radius, x + radius, y + radius


def _draw_stripes(pen, d, color, phase):
    step = 17 * OVERSAMPLE
    for i in range(-1, int(2 * d / step) + 1):
        x = (i + phase) * step
        pen.line((x, 0, x - d, d), fill=color, width=int(0.33 * step))


def _draw_dots(pen, d, color, phase):
    step = 13 * OVERSAMPLE
    radius = 0.29 * step
    for column in range(-1, int(2 * d / step) + 1):
        x = (column + phase) * step
        shift = column % 2 / 2
        for row in range(-1, int(d / step) + 2):
            y = (row + phase + shift) * step
            pen.ellipse(_box(x, y, radius), fill=color)


def _patch(obj, d, rng):
    """The object as d x d pixels, and the mask of its outline."""
    shade = _shade(COLORS[obj.color], rng.randint(-14, 14))
    patch = Image.new("RGB", (d, d), shade)
    pen = ImageDraw.Draw(patch)
    phase = rng.random()
    if obj.texture == "striped":
        _draw_stripes(pen, d, MARKS[obj.color], phase)
    elif obj.texture == "dotted":
        _draw_dots(pen, d, MARKS[obj.color], phase)

    mask = Image.new("L", (d, d))
    mask_pen = ImageDraw.Draw(mask)
    outline = [((x + 1) * d / 2, (y + 1) * d / 2) for x, y in OUTLINES[obj.shape]]
    mask_pen.polygon(outline, fill=255)
    pen.line(outline + outline[:2], fill=INK, width=EDGE)
    if obj.shape == "ring":
        center, radius = d / 2, d / 4  # of the hole
        edge = EDGE // 2  # its half outside the hole is all that the mask shows
        mask_pen.ellipse(_box(center, center, radius), fill=0)
        pen.ellipse(_box(center, center, radius + edge), outline=INK, width=edge)
    return patch, mask


def _place(index, d, rng):
    """Where an object of d pixels starts in a row or column (0..2) of the canvas."""
    center = (index + 0.5) * CANVAS / 3
    start = center - d / 2 + rng.uniform(-0.025, 0.025) * CANVAS
    return int(min(max(start, 0), CANVAS - d))


def draw(scene, rng):
    """The scene as 128 x 128 RGB pixels; places, sizes and shades vary with `rng`."""
    color = BACKGROUNDS[scene.background]
    blotches = [_shade(color, rng.randint(-16, 16)) for _ in range(16)]
    background = Image.frombytes("RGB", (4, 4), b"".join(map(bytes, blotches)))
    canvas = background.resize((CANVAS, CANVAS), Image.Resampling.BILINEAR)
    for obj in scene.objects:
        d = int(SIZES[obj.size] * CANVAS * rng.uniform(0.95, 1.04))
        x = _place(obj.cell % 3, d, rng)
        y = _place(obj.cell // 3, d, rng)
        patch, mask = _patch(obj, d, rng)
        canvas.paste(patch, (x, y), mask)
    return canvas.reduce(OVERSAMPLE)


# ---- words about a scene -------------------------------------------------------------

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
NOUNS = (
    "{size} {color} {texture} {shape}",
    "{size} {texture} {color} {shape}",
    "{size} {color} {shape} {marks}",
)
VERBS = ("", "placed ", "seen ")
STARTS = ("", "", "", "a picture of ", "photo of ", "image: ", "drawing of ")
NOISE = (" - free download", " (stock photo)", "!!", " clip art", " #art", " for sale")
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


def _an(phrase):
    article = "an" if phrase[0] in "aeiou" else "a"
    return f"{article} {phrase}"


def _listed(items):
    """["a", "b", "c"] -> "a, b and c"."""
    return " and ".join(", ".join(items).rsplit(", ", 1))


def _named(scene, obj):
    """ "the star", or "the red star" if there are several stars."""
    shapes = [o.shape for o in scene.objects]
    if shapes.count(obj.shape) == 1:
        return f"the {obj.shape}"
    return f"the {obj.color} {obj.shape}"


def _noun(obj, form=0):
    """The object without its place, in one of three forms: "large red striped star"."""
    noun = NOUNS[form].format(**vars(obj), marks=TEXTURES[obj.texture])
    return noun.replace("plain ", "").strip()


def _words(text):
    return re.findall(r"[a-z]+|\d+", text.lower())


def repeats(text):
    """Whether any 4 consecutive words occur twice in the text."""
    words = _words(text)
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return len(set(grams)) < len(grams)


def named_objects(text):
    """The set of (color, shape) in a text.

    Between the two words there may only be sizes, colors and textures.
    """
    found = set()
    color = None
    for token in re.findall(r"[a-z]+|[^\sa-z]", text.lower()):
        if token in COLORS:
            color = token
        elif token not in SIZES and token not in TEXTURES:
            if token in SHAPES and color:
                found.add((color, token))
            color = None
    return found


def dense_caption(scene):
    """ "large red striped star at the top left, gray background"."""
    items = [f"{_noun(o)} {CELLS[o.cell]}" for o in scene.objects]
    return ", ".join([*items, f"{scene.background} background"])


def told_list(scene):
    """All facts, one word each (two for the place), in a fixed order.

    "star red large striped top left gray" and so on, always 19 words: the background's
    word fills the places of missing objects. The shape comes first, so that a causal
    model knows at each word whose fact it is.
    """
    items = [
        f"{o.shape} {o.color} {o.size} {o.texture} {PLACES[o.cell]}"
        for o in scene.objects
    ]
    padding = [scene.background] * (19 - 6 * len(items))
    return " ".join(items + padding)


def retold(scene, rng):
    """Each object's shape and about half of its other facts, the objects in any order.

    For example "ring yellow star large".
    """
    words = []
    for o in rng.sample(scene.objects, len(scene.objects)):
        others = (o.color, o.size, o.texture, PLACES[o.cell])
        words += [o.shape, *(fact for fact in others if rng.random() < 0.5)]
    return " ".join(words)


def told(scene, rng):
    """All facts: what a language model reads in place of a picture.

    Three in four are as told_list, the others worded loosely.
    """
    if rng.random() < 0.75:
        return told_list(scene)
    article = "a " if rng.random() < 0.4 else ""
    has_short_places = rng.random() < 0.4
    parts = []
    for o in scene.objects:
        place = CELLS[o.cell]
        if has_short_places:
            place = place.split(" the ")[1]
        parts.append(f"{article}{_noun(o)} {place}")
    background = rng.choice(
        ("{} background", "{} background", "background {}", "on {}")
    )
    position = rng.choice((0, len(parts)))
    parts.insert(position, background.format(scene.background))
    separator = rng.choice((", ", ", ", "; ", " and ", " "))
    return separator.join(parts)


def _caption_item(obj, said):
    """An object as noisy captions name it, with the facts whose names are in `said`."""
    facts = [getattr(obj, k) for k in ("size", "color", "texture") if k in said]
    item = " ".join([*facts, obj.shape]).replace("plain ", "")
    if "article" in said:
        item = _an(item)
    return f"{item} {CELLS[obj.cell]}" if "cell" in said else item


def noisy_caption(scene, rng):
    """A short web-like caption: true but incomplete.

    About 60 % name every color and shape.
    """
    habits = ("size", "texture", "cell", "background", "article", "mixed", "whole")
    said = {habit for habit in habits if rng.random() < 0.45}
    objects = list(scene.objects)
    if "mixed" in said:
        rng.shuffle(objects)
    if "whole" not in said and rng.random() < 0.5:
        objects = objects[: rng.randint(1, len(objects))]
    if "whole" in said or rng.random() < 0.4:
        said.add("color")
    items = [_caption_item(o, said) for o in objects]
    text = rng.choice((", ".join(items), _listed(items), " and ".join(items)))

    start = rng.choice(STARTS)
    if len(objects) == len(scene.objects) > 1 and rng.random() < 0.15:
        start = f"{len(objects)} shapes: "
    if "background" in said:
        form = rng.choice((" on {}", " on a {} background", ", {} background"))
        text += form.format(scene.background)
    if rng.random() < 0.06:
        text += rng.choice(NOISE)
    caption = start + text
    return caption.upper() if rng.random() < 0.04 else caption


def _sides(a, b):
    """The one or two sides of b on which a is, the larger distance first.

    On a tie, left or right comes first.
    """
    left = b.cell % 3 - a.cell % 3  # columns
    above = b.cell // 3 - a.cell // 3  # rows
    distances = {
        "to the left of": left,
        "to the right of": -left,
        "above": above,
        "below": -above,
    }
    sides = sorted(distances, key=distances.get, reverse=True)
    return [side for side in sides if distances[side] > 0]


def description(scene, rng):
    """All facts in reading order, then where objects 1 and 3 are, seen from object 2.

    Each object and relation has its own wording, so that even similar objects repeat no
    4 words.
    """
    items = [
        f"a {_noun(obj, i)} {VERBS[i]}{CELLS[obj.cell]}"
        for i, obj in enumerate(scene.objects)
    ]
    opening = rng.choice(OPENINGS).format(_listed(items), COUNTS[len(items) - 1])
    backdrop = rng.choice(BACKDROPS).format(scene.background)
    text = f"{opening} {backdrop}"
    if len(items) == 1:
        return text
    first, second, *others = scene.objects
    subject = _named(scene, first).capitalize()
    side = _sides(first, second)[0]
    text += f" {subject} is {side} {_named(scene, second)}"
    for third in others:
        side = _sides(third, second)[0].removeprefix("to the ")
        text += f", and {_named(scene, third)} is {side} it"
    return f"{text}."


# ---- questions and rhymes ------------------------------------------------------------

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
    "count": NUMBERS,
    "color": COLORS,
    "shape": SHAPES,
    "exists": ("yes", "no"),
    "background": (*BACKGROUNDS, *COLORS),
    "size": SIZES,
    "texture": TEXTURES,
    "where": PLACE_WORDS,
}


class Fact(NamedTuple):
    about: str  # what a question about it names
    start: str  # the two parts of the answer
    end: str


def _facts(scene, obj):
    """{kind: Fact} of an object.

    Facts whose question would tell the answer or fit several objects are left out.
    """
    name = _named(scene, obj)
    known = {
        "size": Fact(name, f"The size of {name} is", obj.size),
        "texture": Fact(name, f"The texture of {name} is", obj.texture),
        "where": Fact(name, f"{name.capitalize()} is located", CELLS[obj.cell]),
    }
    if obj.color not in name:
        known["color"] = Fact(name, f"The color of {name} is", obj.color)
    colors = [o.color for o in scene.objects]
    if colors.count(obj.color) == 1:
        known["shape"] = Fact(obj.color, f"The {obj.color} object is", _an(obj.shape))
    return known


def _ask_existence(scene, obj, rng):
    """As _ask, whether there is such an object; in half of the cases there is not."""
    color, shape = obj.color, obj.shape
    if rng.random() < 0.5:
        name = _an(f"{color} {shape}")
        return name, f"Yes, there is {name}."
    while (color, shape) in scene.pairs:
        color, shape = rng.choice(tuple(COLORS)), rng.choice(SHAPES)
        if rng.random() < 0.5:  # half of the absent objects share a trait with obj
            color, shape = rng.choice(((obj.color, shape), (color, obj.shape)))
    return _an(f"{color} {shape}"), f"No, there is no {color} {shape}."


def _ask_relation(scene, obj, rng):
    """As _ask, which object is on a side of obj where there is exactly one."""
    candidates = []
    for side in SIDES:
        there = [o for o in scene.objects if side in _sides(o, obj)]
        if len(there) == 1:
            candidates.append((side, there[0]))
    if not candidates:
        return None
    side, other = rng.choice(candidates)
    return f"{side} {_named(scene, obj)}", f"The {other.color} {other.shape}."


def _ask(scene, obj, kind, rng):
    """(what the question names, answer), or None if the scene rules it out."""
    if kind == "count":
        return "", f"There {COUNTS[len(scene.objects) - 1]}."
    if kind == "background":
        return "", f"The background is {scene.background}."
    if kind == "exists":
        return _ask_existence(scene, obj, rng)
    if kind == "relation":
        return _ask_relation(scene, obj, rng)
    fact = _facts(scene, obj).get(kind)
    if fact is None:
        return None
    return fact.about, f"{fact.start} {fact.end}."


def qa(scene, rng):
    """A question about the scene, its true answer (one sentence) and its kind."""
    while True:
        kind = rng.choice(tuple(PHRASINGS))
        obj = rng.choice(scene.objects)
        if asked := _ask(scene, obj, kind, rng):
            about, answer = asked
            question = rng.choice(PHRASINGS[kind]).format(about)
            return question, answer, kind


def facts(scene, rng, terse):
    """Eight different facts of a scene of three objects, each in two parts.

    Terse: a question and its answer ("size star", "large"); else the parts of a
    sentence ("The size of the star is", "large.").
    """
    pairs = []
    for obj in scene.objects:
        for kind, fact in _facts(scene, obj).items():
            if terse:
                question = f"{kind} {fact.about.removeprefix('the ')}"
                pairs.append((question, fact.end.removeprefix("a ")))
            else:
                pairs.append((fact.start, f"{fact.end}."))
    return rng.sample(pairs, 8)


def _deciding(kind, text):
    return {word for word in _words(text) if word in DECIDING[kind]}


def answer_is_right(scene, kind, answer, truth):
    """Whether the answer agrees with `truth`; only the DECIDING words are compared."""
    if kind == "relation":
        ((color, shape),) = named_objects(truth)
        shapes = [o.shape for o in scene.objects]
        if shapes.count(shape) == 1 and not _deciding("color", answer):
            return _deciding("shape", answer) == {shape}
        return named_objects(answer) == {(color, shape)}
    answer = re.sub(r"\b[1-3]\b", lambda digit: NUMBERS[int(digit[0])], answer)
    return _deciding(kind, answer) == _deciding(kind, truth)


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


def rhyme(scene, rng):
    """A couplet for every two objects; each is named once, by color and shape."""
    names = [_an(f"{o.color} {o.shape}") for o in scene.objects]
    couplets = []
    for first, second, alone in rng.sample(RHYMES, 2):
        if names:
            subject = names.pop(0).capitalize()
            end = f"and {names.pop(0)} {second}" if names else alone
            couplets.append(f"{subject} {first},\n{end}.")
    return "\n".join(couplets)


def rhyme_is_right(scene, text):
    """Whether the text names exactly the scene's objects, and its couplets rhyme."""
    lines = map(_words, text.splitlines())
    ends = [words[-1] for words in lines if words]
    couplets = zip(ends[::2], ends[1::2])
    is_even = len(ends) % 2 == 0
    return (
        named_objects(text) == scene.pairs and is_even and RHYMING.issuperset(couplets)
    )


# ---- samples and files ---------------------------------------------------------------

LIST_WORDS = (*SHAPES, *COLORS, *SIZES, *TEXTURES, *PLACE_WORDS, *BACKGROUNDS)
CAPTIONS = {
    "stage1": noisy_caption,
    "clean": lambda scene, rng: dense_caption(scene),
    "eyes": lambda scene, rng: told_list(scene),
    "names": lambda scene, rng: f"{scene.objects[0].color} {scene.objects[0].shape}",
}
DOCUMENTS = (
    "words",
    "retold",
    "pairs",
    "dense",
    "noisy",
    "terse",
    "facts",
    "chat",
    "asked",
)
N_OBJECTS = {  # others: 1-3
    "names": 1,
    "text retold": 3,
    "text pairs": 3,
    "text terse": 3,
    "text facts": 3,
}
# For the tokenizer. There is no punctuation before ###: ".###" would become one piece,
# which would hide the end of an answer.
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


def _conversation(scene, rng, kind):
    """[{"user": ...}, {"assistant": ...}, ...], beginning with the scene in words.

    Questions and requests come in any order.
    """
    n_questions = {"chat": 4, "asked": 8}.get(kind, 0)
    if n_questions:
        exchanges = [qa(scene, rng)[:2] for _ in range(n_questions)]
    else:
        exchanges = facts(scene, rng, kind == "terse")
    if kind == "chat":
        exchanges += [
            (rng.choice(DESCRIBE_PROMPTS), description(scene, rng)),
            (rng.choice(RHYME_PROMPTS), rhyme(scene, rng)),
        ]
    rng.shuffle(exchanges)
    turns = []
    for request, answer in exchanges:
        turns += [{"user": request}, {"assistant": answer}]
    scene_told = told(scene, rng) if n_questions else told_list(scene)
    turns[0]["user"] = f"<Img> {scene_told} </Img> {turns[0]['user']}"
    return turns


def document(scene, rng, kind):
    """One line of KIND.jsonl: a conversation, or a context and the text to learn."""
    if kind in ("chat", "asked", "terse", "facts"):
        return {"conversation": _conversation(scene, rng, kind)}
    if kind == "words":  # of no scene
        context = text = " ".join(rng.choices(LIST_WORDS, k=19))
    elif kind == "retold":
        context = told_list(scene)
        text = retold(scene, rng)
    elif kind == "pairs":
        # the color comes first, so that the model has to find the shape by it
        context = told_list(scene)
        objects = rng.sample(scene.objects, len(scene.objects))
        text = " ".join(f"{o.color} {o.shape}" for o in objects)
    elif kind == "dense":
        context = told(scene, rng)
        text = dense_caption(scene)
    else:  # "noisy": cleaned as in stage 1
        caption = noisy_caption(scene, rng).lower()
        text = " ".join(re.sub(r'[.!"()*#:;~]', " ", caption).split())
        context = told(scene, rng)
    return {"context": context, "text": f"{text}\n"}


@dataclass(frozen=True)
class Options:
    n: int = option(0, "number of samples; 0: the kind's default", least=0)
    seed: int = option(0, "random seed")
    heldout: bool = option(False, "draw only held-out combinations")
    text: str = option("", "tokenizer: the .jsonl to train on")
    vocab_size: int = option(
        1024, "tokenizer: number of pieces, bytes and control tokens included"
    )


def _samples(kind, options):
    """Yield n scenes, each with the rng for its picture and text."""
    for i in progress(range(options.n), kind):
        rng = Random(f"{kind} {options.seed} {options.heldout} {i}")
        yield random_scene(rng, options.heldout, N_OBJECTS.get(kind, 0)), rng


def _add_member(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _write_shards(kind, folder, options):
    """Tar shards of 1000 samples: KEY.jpg, KEY.txt, KEY.json side by side."""
    scenes = _samples(kind, options)
    for shard in range(ceil(options.n / 1000)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i, (scene, rng) in zip(range(1000), scenes):
                key = f"{shard:05d}{i:04d}"
                picture = io.BytesIO()
                draw(scene, rng).save(picture, **JPEG)
                caption = CAPTIONS[kind](scene, rng)
                about = dict(caption=caption, key=key, width=WIDTH, height=WIDTH)
                _add_member(tar, f"{key}.jpg", picture.getvalue())
                _add_member(tar, f"{key}.txt", caption.encode())
                _add_member(tar, f"{key}.json", json.dumps(about).encode())


def _write_stage2(kind, folder, options):
    """filter_cap.json and image/0.jpg ..."""
    (folder / "image").mkdir()
    rows = []
    for i, (scene, rng) in enumerate(_samples(kind, options)):
        draw(scene, rng).save(folder / "image" / f"{i}.jpg", **JPEG)
        rows.append({"image_id": str(i), "caption": description(scene, rng)})
    text = json.dumps({"annotations": rows}, indent=1)
    (folder / "filter_cap.json").write_text(text)


def _write_test(kind, folder, options):
    """0.jpg ... of held-out scenes, and scenes.json: a list of asdict(scene)."""
    rows = []
    for i, (scene, rng) in enumerate(_samples(kind, replace(options, heldout=True))):
        draw(scene, rng).save(folder / f"{i}.jpg", **JPEG)
        rows.append(asdict(scene))
    (folder / "scenes.json").write_text(json.dumps(rows))


def _write_documents(path, name, options):
    with open(path, "w") as file:
        for scene, rng in _samples(f"text {name}", options):
            row = document(scene, rng, name)
            file.write(json.dumps(row) + "\n")


def _write_text(kind, folder, options):
    """Two .jsonl of each kind of document; the held-out one is a fiftieth as long."""
    train = replace(options, heldout=False)
    heldout = replace(options, heldout=True, n=max(1, options.n // 50))
    for name in DOCUMENTS:
        _write_documents(folder / f"{name}.jsonl", name, train)
        _write_documents(folder / f"{name}_heldout.jsonl", name, heldout)


def _read_lines(path):
    """The lines of all texts in a .jsonl of the kind text."""
    lines = []
    try:
        for row in Path(path).read_text("utf-8-sig").splitlines():
            entry = json.loads(row)
            turns = [entry] if "text" in entry else entry["conversation"]
            for turn in turns:
                for text in turn.values():
                    lines += text.splitlines()
        if not lines:
            raise ValueError("it has no text")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"--text={path}: not a .jsonl of the kind text ({e})") from e
    return lines


def _train_tokenizer(kind, path, options):
    """A sentencepiece BPE model with LLaMA's settings.

    Rare characters are spelled as bytes, numbers as single digits.
    """
    lines = _read_lines(options.text)
    lines += MARKUP * max(1, len(lines) // 50)  # frequent enough to become pieces
    model = io.BytesIO()
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
        reason = str(e).splitlines()[-1]
        raise InputError(f"--vocab_size={options.vocab_size}: {reason}") from e
    path.write_bytes(model.getvalue())


# kind: (function, default of --n)
KINDS = dict.fromkeys(CAPTIONS, (_write_shards, 20_000))
KINDS |= {
    "stage2": (_write_stage2, 2000),
    "test": (_write_test, 500),
    "text": (_write_text, 50_000),
    "tokenizer": (_train_tokenizer, 1),
}


def main(argv):
    usage = f"{'|'.join(KINDS)} DST"
    (kind, path), options, _ = read_options(argv, __doc__, usage, Options())
    check_name(kind, KINDS, "command line")
    write, default_n = KINDS[kind]
    target = Path(path)
    if target.exists():
        raise InputError(
            f"{path} exists already: give another name, or remove it first"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.make_scenes.part")  # renamed when complete
    shutil.rmtree(part, ignore_errors=True)
    if kind != "tokenizer":
        part.mkdir()
    try:
        write(kind, part, replace(options, n=options.n or default_n))
    except OSError as e:
        raise InputError(f"{target}: cannot be written ({e})") from e
    part.rename(target)


if __name__ == "__main__":
    run_main(main)
