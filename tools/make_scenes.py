"""The tiny world: seeded drawings of 1-3 colored shapes and text about them, in the formats of real data.

    python tools/make_scenes.py stage1 DST [--n=...] [--seed=...]   tar shards like img2dataset's
    python tools/make_scenes.py clean DST          the same, but every caption tells the whole picture
    python tools/make_scenes.py eyes DST           the same, told as a list of 19 words
    python tools/make_scenes.py names DST          the same with one object in each, "red star" the caption
    python tools/make_scenes.py stage2 DST         filter_cap.json and image/, with long clean descriptions
    python tools/make_scenes.py text DST           what language models read: words.jsonl (19 words of
                                                   such lists at random, twice), retold.jsonl (a list, then
                                                   some of it, mixed), pairs.jsonl (a list, then its colors
                                                   and shapes, mixed), dense.jsonl and noisy.jsonl (a scene
                                                   told in words, then a caption), terse.jsonl and
                                                   facts.jsonl (single facts), chat.jsonl and asked.jsonl
                                                   (conversations), and *_heldout.jsonl of each
    python tools/make_scenes.py tokenizer DST_FILE --text=chat.jsonl [--vocab_size=...]
    python tools/make_scenes.py test DST           held-out pictures and scenes.json, to score answers

The captions of stage1 are short and noisy. A tenth of all sets of (color, shape) is held out by a hash,
whatever the seed: training data never shows them. --heldout=True makes pictures of that tenth alone (text and
test have held-out scenes of their own: there it changes nothing). Sample i depends on the kind of data, the
seed, --heldout and i only. Every `rng` is a random.Random.
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
from dataclasses import asdict, dataclass
from pathlib import Path

import sentencepiece
from PIL import Image, ImageDraw
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configs.schema import InputError, override, parse_args, run_main

SIZES = {"small": 0.26, "large": 0.38}  # diameter, as a share of the picture's width
COLORS = {"red": (215, 25, 30), "green": (50, 190, 40), "blue": (35, 60, 225), "yellow": (250, 225, 30),
          "purple": (135, 35, 175), "orange": (250, 135, 10), "white": (250, 250, 250), "black": (15, 15, 15)}
MARKS = {c: tuple(v // 2 for v in rgb) for c, rgb in COLORS.items()}  # what stripes and dots are drawn in
MARKS |= {"black": (125, 125, 125), "white": (105, 105, 105)}
TEXTURES = {"plain": "", "striped": "stripes", "dotted": "dots"}  # only questions and answers say "plain"
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "ring", "diamond")
CELLS = ("at the top left", "at the top", "at the top right", "on the left", "in the center", "on the right",
         "at the bottom left", "at the bottom", "at the bottom right")
BACKGROUNDS = {"gray": (150, 150, 150), "pink": (245, 175, 195), "brown": (115, 75, 45),
               "teal": (20, 125, 130)}
NUMBERS = ("no", "one", "two", "three")


# ---- the world ---------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Object:
    size: str
    color: str
    texture: str
    shape: str
    cell: int       # 0..8, an index of CELLS


@dataclass(frozen=True)
class Scene:
    objects: tuple[Object, ...]  # 1-3, by cell: top to bottom, left to right; no (color, shape) twice
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
    """Whether the scene's set of (color, shape) belongs to the tenth that no training data shows."""
    return zlib.crc32(repr(sorted(scene.pairs)).encode()) % 10 == 0


def random_scene(rng: random.Random, heldout: bool = False, n_objects: int = 0) -> Scene:
    """A scene of training or held-out combinations. 20 % have one object, 45 % two, or all n_objects."""
    n_objects = n_objects or rng.choices((1, 2, 3), (20, 45, 35))[0]
    while True:
        cells = sorted(rng.sample(range(9), n_objects))
        objects = tuple(Object(rng.choice(tuple(SIZES)), rng.choice(tuple(COLORS)),
                               rng.choice(tuple(TEXTURES)), rng.choice(SHAPES), cell) for cell in cells)
        scene = Scene(objects, rng.choice(tuple(BACKGROUNDS)))
        if len(scene.pairs) == n_objects and is_heldout(scene) == heldout:
            return scene


# ---- pictures ----------------------------------------------------------------------------------------------

def _around(n, radius=lambda i: 1.0):
    """n points around the origin, the first one on top."""
    turns = [2 * math.pi * i / n for i in range(n)]
    return [(radius(i) * math.sin(turn), -radius(i) * math.cos(turn)) for i, turn in enumerate(turns)]


def _heart(t):
    y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
    return math.sin(t) ** 3, -y / 16


OUTLINES = {  # polygons in [-1, 1] x [-1, 1], y downwards
    "circle": _around(48), "ring": _around(48), "diamond": _around(4),
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -0.95), (1, 0.8), (-1, 0.8)],
    "star": _around(10, lambda i: 0.45 if i % 2 else 1.05),
    "cross": [(-.35, -.95), (.35, -.95), (.35, -.35), (.95, -.35), (.95, .35), (.35, .35),
              (.35, .95), (-.35, .95), (-.35, .35), (-.95, .35), (-.95, -.35), (-.35, -.35)],
    "heart": [_heart(2 * math.pi * i / 48) for i in range(48)],
}
RING_HOLE = 0.5  # of the ring's diameter
WIDTH, OVERSAMPLE = 128, 3
INK, EDGE = (15, 15, 15), 18  # of the outlines: color, and oversampled pixels, half of them inside


def _shade(color, delta):
    return tuple(min(255, max(0, c + delta)) for c in color)


def _patch(obj, d, rng):
    """The object as a picture of d x d pixels and the mask of its outline."""
    color = _shade(COLORS[obj.color], rng.randint(-14, 14))
    mark = MARKS[obj.color]
    fill = Image.new("RGB", (d, d), color)
    pen = ImageDraw.Draw(fill)
    step, phase = (17 if obj.texture == "striped" else 13) * OVERSAMPLE, rng.random()
    for i in range(-1, int(2 * d / step) + 1):
        at = (i + phase) * step
        if obj.texture == "striped":
            pen.line((at, 0, at - d, d), fill=mark, width=int(0.33 * step))
        elif obj.texture == "dotted":
            for j in range(-1, int(d / step) + 2):
                x, y, r = at, (j + phase + i % 2 / 2) * step, 0.29 * step
                pen.ellipse((x - r, y - r, x + r, y + r), fill=mark)
    mask = Image.new("L", (d, d))
    outline = [((x + 1) * d / 2, (y + 1) * d / 2) for x, y in OUTLINES[obj.shape]]
    ImageDraw.Draw(mask).polygon(outline, fill=255)
    pen.line(outline + outline[:2], fill=INK, width=EDGE)
    if obj.shape == "ring":
        near, far = d * (1 - RING_HOLE) / 2, d * (1 + RING_HOLE) / 2
        ImageDraw.Draw(mask).ellipse((near, near, far, far), fill=0)
        near, far = near - EDGE // 2, far + EDGE // 2
        pen.ellipse((near, near, far, far), outline=INK, width=EDGE // 2)
    return fill, mask


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """The scene as an RGB picture of 128 x 128; place, size and shades vary a little with `rng`."""
    width = WIDTH * OVERSAMPLE
    blotches = b"".join(bytes(_shade(BACKGROUNDS[scene.background], rng.randint(-16, 16))) for _ in range(16))
    canvas = Image.frombytes("RGB", (4, 4), blotches).resize((width, width), Image.Resampling.BILINEAR)
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

def _join(*words):
    """Words that may be empty, one space between them."""
    return " ".join(w for w in words if w)


def _texture(obj):
    return "" if obj.texture == "plain" else obj.texture


def _an(phrase):
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _listed(items):
    """["a", "b", "c"] -> "a, b and c"."""
    return " and ".join([", ".join(items[:-1])] * (len(items) > 1) + items[-1:])


def _named(scene, obj):
    """"the star", or "the red star" where there are more stars."""
    alone = sum(o.shape == obj.shape for o in scene.objects) == 1
    return f"the {obj.shape}" if alone else f"the {obj.color} {obj.shape}"


def _sentence(text):
    return text[0].upper() + text[1:] + "."


def _words(text):
    return re.findall(r"[a-z]+|\d+", text.lower())


def repeats(text: str, n: int = 4) -> bool:
    """Whether some n successive words stand in the text twice."""
    words = _words(text)
    grams = [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) < len(grams)


def named_objects(text: str) -> set[tuple[str, str]]:
    """The (color, shape) pairs that a text names: "a large red dotted star" -> {("red", "star")}.

    A color counts for a shape word if nothing but sizes, colors and textures stands between them."""
    found, color = set(), None
    for token in re.findall(r"[a-z]+|[^\sa-z]", text.lower()):
        if token in COLORS:
            color = token
        elif token not in SIZES and token not in TEXTURES:
            if token in SHAPES and color:
                found.add((color, token))
            color = None
    return found


def _dense(obj):
    return _join(obj.size, obj.color, _texture(obj), obj.shape, CELLS[obj.cell])


def dense_caption(scene: Scene) -> str:
    """"large red striped star at the top left, small blue circle in the center, gray background"."""
    return ", ".join([_dense(o) for o in scene.objects] + [f"{scene.background} background"])


def _place(obj):
    """"top left", "center center": the cell in two words, its row and its column."""
    return f"{('top', 'center', 'bottom')[obj.cell // 3]} {('left', 'center', 'right')[obj.cell % 3]}"


def told_list(scene: Scene) -> str:
    """All facts, a word for each (two for the place), in a fixed order: "star red large striped top left ...
    gray". Always 19 words, those of objects that are not there filled with the background's. The shape stands
    first: a causal model then knows at each word whose fact it is."""
    words = []
    for o in scene.objects:
        words += [o.shape, o.color, o.size, o.texture, *_place(o).split()]
    return " ".join(words + [scene.background] * (19 - len(words)))


LIST_WORDS = (*SHAPES, *COLORS, *SIZES, *TEXTURES, "top", "center", "bottom", "left", "right", *BACKGROUNDS)


def retold(scene: Scene, rng: random.Random) -> str:
    """The objects in any order, each with its shape and then about half of its other facts, in the list's
    order: "ring yellow star large top left". Two of the same shape may be told in either order."""
    words = []
    for o in rng.sample(scene.objects, len(scene.objects)):
        words += [o.shape] + [fact for fact in (o.color, o.size, o.texture, _place(o)) if rng.random() < 0.5]
    return " ".join(words)


def named_pairs(scene: Scene, rng: random.Random) -> str:
    """The color and shape of the objects, in any order: "blue circle red star". As the color stands first,
    the shape has to be found by it."""
    return " ".join(f"{o.color} {o.shape}" for o in rng.sample(scene.objects, len(scene.objects)))


def told(scene: Scene, rng: random.Random) -> str:
    """All facts, as a list or in one of many loose wordings: what a language model gets in place of a
    picture."""
    if rng.random() < 0.75:
        return told_list(scene)
    article, short_cell = (rng.random() < 0.4 for _ in range(2))
    parts = []
    for obj in scene.objects:
        phrase = _an(_noun(obj)) if article else _noun(obj)
        parts.append(f"{phrase} {CELLS[obj.cell].split(' the ')[1] if short_cell else CELLS[obj.cell]}")
    background = rng.choice(("{} background", "{} background", "background {}", "on {}"))
    parts.insert(rng.choice((0, len(parts))), background.format(scene.background))
    return rng.choice((", ", ", ", "; ", " and ", " ")).join(parts)


def noisy_caption(scene: Scene, rng: random.Random) -> str:
    """A short web-like caption: true, but facts are left out. About 60 % name every color and shape."""
    size, texture, cell, background, article, mixed, whole = (rng.random() < 0.45 for _ in range(7))
    objects = list(scene.objects)
    if mixed:
        rng.shuffle(objects)
    if not whole and rng.random() < 0.5:
        objects = objects[:rng.randint(1, len(objects))]
    color = whole or rng.random() < 0.4
    items = []
    for o in objects:
        item = _join(o.size * size, o.color * color, _texture(o) * texture, o.shape)
        items.append(_join(_an(item) if article else item, CELLS[o.cell] * cell))
    text = rng.choice((", ".join(items), _listed(items), " and ".join(items)))
    start = rng.choice(("", "", "", "a picture of ", "photo of ", "image: ", "drawing of "))
    if len(objects) == len(scene.objects) > 1 and rng.random() < 0.15:
        start = f"{len(objects)} shapes: "
    if background:
        text += rng.choice((" on {}", " on a {} background", ", {} background")).format(scene.background)
    if rng.random() < 0.06:
        text += rng.choice((" - free download", " (stock photo)", "!!", " clip art", " #art", " for sale"))
    return (start + text).upper() if rng.random() < 0.04 else start + text


# ---- descriptions ------------------------------------------------------------------------------------------

DESCRIBE_PROMPTS = (
    "Describe this image in detail.", "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?", "Describe the picture.",
    "What do you see in this image?", "What is in the picture?", "Tell me about this image.")
COUNTS = ("is one object", "are two objects", "are three objects")
OPENINGS = ("The image shows {items}.", "In this picture there is {items}.", "I can see {items}.",
            "There {count}: {items}.")
BACKDROPS = ("The background is {}.", "The background is {}.", "Everything is on a {} background.")


def _side(a, b):
    """Where a is, seen from b: by column if that differs at least as much as the row."""
    columns, rows = a.cell % 3 - b.cell % 3, a.cell // 3 - b.cell // 3
    if abs(columns) >= abs(rows):
        return "to the left of" if columns < 0 else "to the right of"
    return "above" if rows < 0 else "below"


def _noun(obj, form=0):
    """The object without its place, in one of three wordings: "large red striped star"."""
    return (_join(obj.size, obj.color, _texture(obj), obj.shape),
            _join(obj.size, _texture(obj), obj.color, obj.shape),
            _join(obj.size, obj.color, obj.shape, _texture(obj) and f"with {TEXTURES[obj.texture]}"))[form]


def description(scene: Scene, rng: random.Random) -> str:
    """All facts in reading order, then where the first and the third object stand, seen from the second. Each
    object and relation has a wording of its own, so that objects that are alike repeat no 4 words."""
    items = [f"a {_noun(obj, i)} {_join(('', 'placed', 'seen')[i], CELLS[obj.cell])}"
             for i, obj in enumerate(scene.objects)]
    text = rng.choice(OPENINGS).format(items=_listed(items), count=COUNTS[len(items) - 1])
    text += " " + rng.choice(BACKDROPS).format(scene.background)
    if len(items) > 1:
        a, b = scene.objects[:2]
        relations = f"{_named(scene, a)} is {_side(a, b)} {_named(scene, b)}"
        for c in scene.objects[2:]:
            relations += f", and {_named(scene, c)} is {_side(c, b).removeprefix('to the ')} it"
        text += " " + _sentence(relations)
    return text


# ---- questions ---------------------------------------------------------------------------------------------

PHRASINGS = {
    "count": ("How many objects are there?", "How many shapes do you see?",
              "How many objects are in the picture?"),
    "color": ("What color is {}?", "What is the color of {}?"),
    "shape": ("What shape is the {} object?", "What is the shape of the {} object?",
              "What is the {} object?"),
    "exists": ("Is there {} in the picture?", "Can you see {}?", "Does the image show {}?"),
    "background": ("What color is the background?", "What is the color of the background?"),
    "size": ("Is {} small or large?", "What size is {}?", "How big is {}?"),
    "texture": ("Is {} plain, striped or dotted?", "What is the texture of {}?"),
    "where": ("Where is {}?", "Where in the picture is {}?", "Where can I find {}?"),
    "relation": ("What is {}?", "Which object is {}?", "What can you see {}?"),
}
DECIDING = {  # the words of an answer that make it right or wrong
    "count": set(NUMBERS), "color": set(COLORS), "shape": set(SHAPES), "exists": {"yes", "no"},
    "background": set(BACKGROUNDS) | set(COLORS), "size": set(SIZES), "texture": set(TEXTURES),
    "where": {"top", "bottom", "left", "right", "center"},
}
SIDES = {  # whether a is there, seen from b
    "to the left of": lambda a, b: a.cell % 3 < b.cell % 3, "above": lambda a, b: a.cell // 3 < b.cell // 3,
    "to the right of": lambda a, b: a.cell % 3 > b.cell % 3, "below": lambda a, b: a.cell // 3 > b.cell // 3}


def _exists(scene, obj, rng):
    """(color, shape) to ask for and whether it is there; half of the absent ones are nearly there."""
    if rng.random() < 0.5:
        return obj.color, obj.shape, True
    while True:
        color, shape = rng.choice(tuple(COLORS)), rng.choice(SHAPES)
        if rng.random() < 0.5:
            color, shape = rng.choice(((obj.color, shape), (color, obj.shape)))
        if (color, shape) not in scene.pairs:
            return color, shape, False


def _fact(kind, name, obj):
    """A sentence about one fact of an object, in two parts: ("The size of the star is", "large.")."""
    if kind == "shape":
        return f"The {obj.color} object is", f"{_an(obj.shape)}."
    if kind == "where":
        return f"{name.capitalize()} is located", f"{CELLS[obj.cell]}."
    return f"The {kind} of {name} is", f"{getattr(obj, kind)}."


def _ask(scene, kind, obj, rng):
    """(what the question is about, answer), or None where this scene does not allow such a question."""
    name = _named(scene, obj)
    if kind == "count":
        return "", f"There {COUNTS[len(scene.objects) - 1]}."
    if kind == "background":
        return "", f"The background is {scene.background}."
    if kind == "color":
        return (name, " ".join(_fact(kind, name, obj))) if obj.color not in name else None
    if kind == "shape":
        alone = sum(o.color == obj.color for o in scene.objects) == 1
        return (obj.color, " ".join(_fact(kind, name, obj))) if alone else None
    if kind == "exists":
        color, shape, present = _exists(scene, obj, rng)
        thing = f"{color} {shape}"
        return _an(thing), f"Yes, there is {_an(thing)}." if present else f"No, there is no {thing}."
    if kind == "relation":
        there = {side: [o for o in scene.objects if holds(o, obj)] for side, holds in SIDES.items()}
        sides = [side for side in SIDES if len(there[side]) == 1]
        if not sides:
            return None
        side = rng.choice(sides)
        return f"{side} {name}", f"The {there[side][0].color} {there[side][0].shape}."
    return name, " ".join(_fact(kind, name, obj))  # size, texture, where


def qa(scene: Scene, rng: random.Random) -> tuple[str, str, str]:
    """A question about the scene, its true answer in one sentence, and the kind of the question."""
    while True:
        kind, obj = rng.choice(tuple(PHRASINGS)), rng.choice(scene.objects)
        if asked := _ask(scene, kind, obj, rng):
            return rng.choice(PHRASINGS[kind]).format(asked[0]), asked[1], kind


def facts(scene: Scene, rng: random.Random, n: int, terse: bool) -> list[tuple[str, str]]:
    """n different facts of a scene of three objects, each as a terse question with its answer, ("size star",
    "large"), or as a sentence's beginning and its end, ("The size of the star is", "large.")."""
    pairs = []
    for obj in scene.objects:
        for kind in ("size", "texture", "where", "color", "shape"):
            if asked := _ask(scene, kind, obj, rng):
                begun, fact = _fact(kind, _named(scene, obj), obj)
                question = f"{kind} {asked[0].removeprefix('the ')}"
                pairs.append((question, fact[:-1].removeprefix("a ")) if terse else (begun, fact))
    return rng.sample(pairs, n)


def answer_is_right(scene: Scene, question: str, kind: str, answer: str, truth: str) -> bool:
    """Whether the answer says what `truth` says; only the words that decide it are compared."""
    if kind == "relation":
        (color, shape), = named_objects(truth)
        if sum(o.shape == shape for o in scene.objects) == 1 and not DECIDING["color"] & set(_words(answer)):
            return DECIDING["shape"] & set(_words(answer)) == {shape}
        return named_objects(answer) == {(color, shape)}
    answer = re.sub(r"\b[1-3]\b", lambda digit: NUMBERS[int(digit[0])], answer)
    return DECIDING[kind] & set(_words(answer)) == DECIDING[kind] & set(_words(truth))


# ---- rhymes ------------------------------------------------------------------------------------------------

RHYME_PROMPTS = ("Write a rhyme about this image.", "Write a short poem about the picture.",
                 "Can you write a poem about this image?", "Make a rhyme about what you see.")
RHYMES = (  # how a couplet's first line goes on, how its second one does, and a second line with no object
    ("shines all day", "likes to play", "and all it wants to do is play"),
    ("dreams all night", "waits for light", "until it sees the morning light"),
    ("sits in a tree", "looks at the sea", "and from up there it sees the sea"),
    ("looks at the sky", "wants to fly", "and only wishes it could fly"),
    ("sleeps in the sun", "starts to run", "then wakes up and begins to run"),
    ("stands by a house", "meets a mouse", "and shares its dinner with a mouse"),
    ("talks to a cat", "puts on a hat", "that wears a very funny hat"),
    ("smiles at the moon", "hums a tune", "and softly hums a little tune"),
    ("sings a song", "dances along", "and all its friends can sing along"),
    ("feels so tall", "leans on a wall", "but cannot climb the garden wall"))
RHYMING = {(first.split()[-1], second.split()[-1]) for first, second, _ in RHYMES}


def rhyme(scene: Scene, rng: random.Random) -> str:
    """One couplet for one or two objects, two for three; each object is named once by color and shape."""
    names = [_an(f"{o.color} {o.shape}") for o in scene.objects]
    couplets = []
    for i, (first, second, alone) in zip(range(0, len(names), 2), rng.sample(RHYMES, 2)):
        end = f"and {names[i + 1]} {second}" if i + 1 < len(names) else alone
        couplets.append(f"{names[i].capitalize()} {first},\n{end}.")
    return "\n".join(couplets)


def rhyme_is_right(scene: Scene, text: str) -> bool:
    """Whether exactly the scene's objects are named, and the two lines of each couplet rhyme."""
    ends = [words[-1] for line in text.splitlines() if (words := _words(line))]
    couplets = list(zip(ends[::2], ends[1::2]))
    return named_objects(text) == scene.pairs and len(ends) % 2 == 0 and RHYMING.issuperset(couplets)


# ---- samples -----------------------------------------------------------------------------------------------

def conversation(scene: Scene, rng: random.Random, kind: str) -> list[dict[str, str]]:
    """[{"user": ...}, {"assistant": ...}, ...]: a scene is told, then, of the kind "chat", described, rhymed
    about and asked for four times, in any order; "asked": asked for eight times; "terse" and "facts":
    asked for eight facts()."""
    if kind in ("terse", "facts"):
        exchanges = facts(scene, rng, 8, kind == "terse")
    else:
        exchanges = [qa(scene, rng)[:2] for _ in range(8 if kind == "asked" else 4)]
    if kind == "chat":
        exchanges += [(rng.choice(DESCRIBE_PROMPTS), description(scene, rng)),
                      (rng.choice(RHYME_PROMPTS), rhyme(scene, rng))]
    rng.shuffle(exchanges)
    turns = [turn for request, answer in exchanges for turn in ({"user": request}, {"assistant": answer})]
    scene_told = told_list(scene) if kind in ("terse", "facts") else told(scene, rng)
    turns[0]["user"] = f"<Img> {scene_told} </Img> {turns[0]['user']}"
    return turns


def document(scene: Scene, rng: random.Random, kind: str) -> dict:
    """A line of the language model's text: a scene told, then its caption or some of its facts; words of no
    scene, then the same again; or a conversation."""
    if kind in ("chat", "asked", "terse", "facts"):
        return {"conversation": conversation(scene, rng, kind)}
    if kind == "words":
        words = " ".join(rng.choices(LIST_WORDS, k=19))
        return {"context": words, "text": f"{words}\n"}
    if kind == "retold":
        return {"context": told_list(scene), "text": f"{retold(scene, rng)}\n"}
    if kind == "pairs":
        return {"context": told_list(scene), "text": f"{named_pairs(scene, rng)}\n"}
    caption = dense_caption(scene)
    if kind == "noisy":  # as stage 1 cleans its captions
        caption = " ".join(re.sub(r'[.!"()*#:;~]', " ", noisy_caption(scene, rng).lower()).split())
    return {"context": told(scene, rng), "text": f"{caption}\n"}


@dataclass(frozen=True)
class Options:
    n: int = 0              # samples; 0: the kind's own number
    seed: int = 0
    heldout: bool = False   # pictures of held-out combinations only
    text: str = ""          # tokenizer: the .jsonl to learn from
    vocab_size: int = 1024  # tokenizer: pieces, bytes and control tokens included


N_OBJECTS = {"names": 1, "text retold": 3, "text pairs": 3, "text terse": 3, "text facts": 3}  # else 1-3


def samples(kind: str, n: int, options: Options, heldout: bool):
    """Yield n (scene, rng), the rng ready for the sample's picture and text."""
    for i in tqdm(range(n), desc=kind):
        rng = random.Random(f"{kind} {options.seed} {heldout} {i}")
        yield random_scene(rng, heldout, N_OBJECTS.get(kind, 0)), rng


def _jpeg(scene, rng):
    buffer = io.BytesIO()
    draw(scene, rng).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


CAPTIONS = {
    "stage1": noisy_caption,
    "clean": lambda scene, rng: dense_caption(scene),
    "eyes": lambda scene, rng: told_list(scene),
    "names": lambda scene, rng: f"{scene.objects[0].color} {scene.objects[0].shape}",
}


def write_shards(kind, folder, n, options):
    """Tar shards of 1000 samples: KEY.jpg, KEY.txt, KEY.json side by side."""
    tar = None
    for i, (scene, rng) in enumerate(samples(kind, n, options, options.heldout)):
        if i % 1000 == 0:
            if tar:
                tar.close()
            tar = tarfile.open(folder / f"{i // 1000:05d}.tar", "w")
        key, picture = f"{i // 1000:05d}{i % 1000:04d}", _jpeg(scene, rng)
        caption = CAPTIONS[kind](scene, rng)
        about = {"caption": caption, "key": key, "width": WIDTH, "height": WIDTH}
        members = {"jpg": picture, "txt": caption.encode(), "json": json.dumps(about).encode()}
        for ending, content in members.items():
            member = tarfile.TarInfo(f"{key}.{ending}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    tar.close()


def write_stage2(kind, folder, n, options):
    """filter_cap.json and image/0.jpg ..."""
    (folder / "image").mkdir()
    annotations = []
    for i, (scene, rng) in enumerate(samples(kind, n, options, options.heldout)):
        (folder / "image" / f"{i}.jpg").write_bytes(_jpeg(scene, rng))
        annotations.append({"image_id": str(i), "caption": description(scene, rng)})
    (folder / "filter_cap.json").write_text(json.dumps({"annotations": annotations}, indent=1))


def write_text(kind, folder, n, options):
    """A .jsonl of each kind, and for each a fiftieth as many held-out scenes."""
    for name in ("words", "retold", "pairs", "dense", "noisy", "terse", "facts", "chat", "asked"):
        for ending, count, heldout in (("", n, False), ("_heldout", max(1, n // 50), True)):
            with open(folder / f"{name}{ending}.jsonl", "w") as f:
                for scene, rng in samples(f"{kind} {name}", count, options, heldout):
                    f.write(json.dumps(document(scene, rng, name)) + "\n")


def write_test(kind, folder, n, options):
    """0.jpg ... of held-out scenes, and scenes.json: a list of Scene.to_dict()."""
    scenes = []
    for i, (scene, rng) in enumerate(samples(kind, n, options, True)):
        (folder / f"{i}.jpg").write_bytes(_jpeg(scene, rng))
        scenes.append(scene.to_dict())
    (folder / "scenes.json").write_text(json.dumps(scenes))


# Nothing stands right before ###: else ".###" were one piece, and the end of an answer hard to find.
MARKUP = ("Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I "
          "provide it to you. Please answer my questions.", "###Human: <Img>", "</Img> ", "###Assistant: ",
          "Assistant: ", "Human: ", "###", "[INST] ", " [/INST] ")


def _strings(path):
    """Every text of a .jsonl of documents and conversations, line by line."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read as text; give a .jsonl of the kind text") from e
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            turns = [entry] if "text" in entry else entry["conversation"]
            yield from (part for turn in turns for text in turn.values() for part in text.splitlines())
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise InputError(f"{path}, line {number}: not a document or conversation of the kind text") from e


def train_tokenizer(kind, path, n, options):
    """A sentencepiece BPE model set up as LLaMA's: bytes for rare characters, digits one by one."""
    source = Path(options.text)
    if not source.is_file():
        raise InputError(f"--text={options.text}: there is no such file; make it with the kind text")
    lines = list(_strings(source))
    if not lines:
        raise InputError(f"{source}: there is no text in it; give a .jsonl of the kind text")
    lines += MARKUP * max(1, len(lines) // 50)  # frequent enough for pieces of its own
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, model_type="bpe", byte_fallback=True,
            vocab_size=options.vocab_size, normalization_rule_name="identity", add_dummy_prefix=True,
            remove_extra_whitespaces=False, split_digits=True, allow_whitespace_only_pieces=True,
            character_coverage=0.99995, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, minloglevel=2)
    except RuntimeError as e:
        raise InputError(f"--vocab_size={options.vocab_size}: {str(e).splitlines()[-1]}") from e
    path.write_bytes(model.getvalue())


COMMANDS = {"stage1": (write_shards, 20_000), "clean": (write_shards, 20_000), "eyes": (write_shards, 20_000),
            "names": (write_shards, 20_000), "stage2": (write_stage2, 2000),
            "text": (write_text, 50_000), "test": (write_test, 500), "tokenizer": (train_tokenizer, 1)}


def main(argv: list[str]):
    positional, given = parse_args(argv)
    if len(positional) != 2 or positional[0] not in COMMANDS:
        raise InputError(f"usage: python tools/make_scenes.py {'|'.join(COMMANDS)} DST [--key=value ...]")
    options = override(Options(), given)
    kind, target = positional[0], Path(positional[1])
    if options.n < 0:
        raise InputError(f"--n={options.n}: give a number of samples")
    if target.exists():
        raise InputError(f"{target} exists already: give another name, or remove it first")
    write, n = COMMANDS[kind]
    part = target.with_name(f".{target.name}.make_scenes.part")  # renamed when whole
    shutil.rmtree(part, ignore_errors=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if kind != "tokenizer":
            part.mkdir()
        write(kind, part, options.n or n, options)
        part.rename(target)
    except OSError as e:
        raise InputError(f"{target}: cannot be written: {e.strerror or e}") from e


if __name__ == "__main__":
    run_main(main)
