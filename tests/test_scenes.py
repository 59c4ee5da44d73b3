"""The tiny world: texts are true, and training shows no held-out combination."""

import json
import random
import re
import tarfile
from dataclasses import asdict, replace
from itertools import combinations, permutations, product

import pytest
import sentencepiece
from PIL import Image

from plumbing.console import InputError
from tools import make_scenes as world


def draws(n, heldout=False):
    for i in range(n):
        rng = random.Random(f"test {i}")
        yield world.random_scene(rng, heldout), rng


def test_training_and_held_out_combinations_are_disjoint():
    train = {frozenset(scene.pairs) for scene, _ in draws(5000)}
    heldout = {frozenset(scene.pairs) for scene, _ in draws(1000, heldout=True)}
    assert not train & heldout
    assert {len(pairs) for pairs in heldout} == {1, 2, 3}


def test_a_scene_survives_json_and_is_drawn_alike_from_the_same_seed():
    for scene, _ in draws(20):
        again = world.Scene.from_dict(json.loads(json.dumps(asdict(scene))))
        assert again == scene
        first, second = (world.draw(s, random.Random(7)) for s in (scene, again))
        assert (
            first.size == (128, 128)
            and first.mode == "RGB"
            and first.tobytes() == second.tobytes()
        )


def test_every_fact_is_told():
    for scene, rng in draws(1000):
        for text in (
            world.told(scene, rng),
            world.dense_caption(scene),
            world.description(scene, rng),
        ):
            for obj in scene.objects:
                texture = {"plain": "", "striped": "strip", "dotted": "dot"}[
                    obj.texture
                ]
                place = world.CELLS[obj.cell].split(" the ")[1]
                facts = (
                    obj.size,
                    obj.color,
                    texture,
                    obj.shape,
                    place,
                    scene.background,
                )
                assert all(fact in text for fact in facts), text


SCENE = world.Scene(
    (
        world.Object("large", "red", "striped", "star", 0),
        world.Object("small", "blue", "plain", "circle", 4),
        world.Object("large", "blue", "dotted", "heart", 5),
    ),
    "gray",
)


def test_the_texts_of_one_scene_word_for_word():
    assert world.dense_caption(SCENE) == (
        "large red striped star at the top left, small blue circle in the "
        "center, large blue dotted heart on the right, gray background"
    )
    assert world.told_list(SCENE) == (
        "star red large striped top left circle blue small plain center center "
        "heart blue large dotted center right gray"
    )
    pair = world.Scene(SCENE.objects[:2], "gray")
    facts = {
        "star": ("red", "large", "striped", "top left"),
        "circle": ("blue", "small", "plain", "center center"),
    }
    told = {
        shape: [
            (shape, *some) for n in range(5) for some in combinations(facts[shape], n)
        ]
        for shape in facts
    }
    assert {world.retold(pair, random.Random(i)) for i in range(10_000)} == {
        " ".join(a + b)
        for first, then in permutations(facts)
        for a, b in product(told[first], told[then])
    }
    texts = {world.description(SCENE, random.Random(i)) for i in range(50)}
    assert (
        "There are three objects: a large red striped star at the top left, a small "
        "blue circle placed in the center and a large blue heart with dots seen on the "
        "right. The background is gray. The star is to the left of the circle, and the "
        "heart is right of it."
    ) in texts
    asked = {world.qa(SCENE, random.Random(i))[:2] for i in range(2000)}
    assert {
        ("How many objects are there?", "There are three objects."),
        ("What color is the background?", "The background is gray."),
        ("What color is the star?", "The color of the star is red."),
        ("What shape is the red object?", "The red object is a star."),
        ("How big is the circle?", "The size of the circle is small."),
        (
            "Is the heart plain, striped or dotted?",
            "The texture of the heart is dotted.",
        ),
        ("Where is the circle?", "The circle is located in the center."),
        ("Which object is to the right of the circle?", "The blue heart."),
        ("What is above the heart?", "The red star."),
    } <= asked
    assert not any(
        "shape" in question and "blue" in question for question, _ in asked
    )  # two are blue


def test_answers_about_counts_presence_and_relations_follow_from_the_cells():
    axis = {
        "to the left of": (0, -1),
        "to the right of": (0, 1),
        "above": (1, -1),
        "below": (1, 1),
    }

    def at(obj):
        return obj.cell % 3, obj.cell // 3

    for scene, rng in draws(3000):
        question, answer, kind = world.qa(scene, rng)
        if kind == "count":
            assert answer.split()[2] == ("one", "two", "three")[len(scene.objects) - 1]
        if kind == "exists":
            (pair,) = world.named_objects(question)
            assert answer.startswith("Yes" if pair in scene.pairs else "No")
        if kind == "relation":
            words = question.rstrip("?").split()
            (seen_from,) = (
                o
                for o in scene.objects
                if o.shape == words[-1] and words[-2] in ("the", o.color)
            )
            ((along, sign),) = (
                axis[side] for side in axis if f" {side} the " in question
            )
            there = {
                (o.color, o.shape)
                for o in scene.objects
                if (at(o)[along] - at(seen_from)[along]) * sign > 0
            }
            assert world.named_objects(answer) == there


def test_captions_and_descriptions_name_no_wrong_object():
    for scene, rng in draws(1000):
        assert world.named_objects(world.noisy_caption(scene, rng)) <= scene.pairs
        assert world.named_objects(world.description(scene, rng)) == scene.pairs


def test_descriptions_are_short_and_never_repeat_four_words():
    for scene, rng in draws(3000):
        text = world.description(scene, rng)
        assert not world.repeats(text) and len(text.split()) <= 62, text
    alike = tuple(
        world.Object("large", color, "striped", "star", cell)
        for cell, color in enumerate(("red", "blue", "green"))
    )
    assert not world.repeats(
        world.description(world.Scene(alike, "gray"), random.Random(0))
    )
    assert world.repeats("A star at the top. A star at the top.")


def test_a_rhyme_is_right_only_with_the_right_objects_and_rhyming_ends():
    for scene, rng in draws(300):
        text = world.rhyme(scene, rng)
        assert world.rhyme_is_right(scene, text), text
        obj = scene.objects[0]
        shape = next(s for s in world.SHAPES if (obj.color, s) not in scene.pairs)
        other = replace(scene, objects=(replace(obj, shape=shape), *scene.objects[1:]))
        assert not world.rhyme_is_right(other, text)
        assert not world.rhyme_is_right(scene, text[:-1] + " again.")


def test_true_answers_are_right_and_altered_ones_wrong():
    swaps = {
        "one": "two",
        "two": "three",
        "three": "one",
        "Yes": "No",
        "No": "Yes",
        "small": "large",
        "large": "small",
        "plain": "dotted",
        "striped": "plain",
        "dotted": "striped",
        "gray": "pink",
    }
    for names in (list(world.COLORS), list(world.SHAPES), list(world.BACKGROUNDS)):
        swaps |= dict(zip(names, names[1:] + names[:1]))
    swaps |= {
        "top": "bottom",
        "bottom": "top",
        "left": "right",
        "right": "left",
        "center": "left",
    }
    for scene, rng in draws(2000):
        question, truth, kind = world.qa(scene, rng)
        assert world.answer_is_right(scene, kind, truth.lower().rstrip("."), truth)
        wrong = " ".join(
            swaps.get(word, word)
            for word in truth.replace(".", "").replace(",", "").split()
        )
        assert not world.answer_is_right(scene, kind, wrong, truth), (
            question,
            wrong,
        )
        assert not world.answer_is_right(scene, kind, "", truth)


def test_single_facts_are_true_and_none_comes_twice():
    begun = {
        "color": "The color of the {} is",
        "size": "The size of the {} is",
        "where": "The {} is located",
        "texture": "The texture of the {} is",
        "shape": "The {} object is",
    }
    asked = {True: set(), False: set()}
    for i in range(300):
        rng = random.Random(i)
        scene = world.random_scene(rng, n_objects=3)
        truths = {}
        for obj in scene.objects:
            same = {
                trait: sum(
                    getattr(o, trait) == getattr(obj, trait) for o in scene.objects
                )
                > 1
                for trait in ("color", "shape")
            }
            name = f"{obj.color} {obj.shape}" if same["shape"] else obj.shape
            for kind in begun:
                about = obj.color if kind == "shape" else name
                fact = {
                    **vars(obj),
                    "where": world.CELLS[obj.cell],
                    "shape": f"a {obj.shape}",
                }[kind]
                if not (
                    kind == "shape"
                    and same["color"]
                    or kind == "color"
                    and same["shape"]
                ):
                    truths |= {
                        f"{kind} {about}": fact.removeprefix("a "),
                        begun[kind].format(about): f"{fact}.",
                    }
        for terse in (True, False):
            told = dict(world.facts(scene, rng, terse))
            assert len(told) == 8 and told.items() <= truths.items()
            assert not any(terse == question.startswith("The ") for question in told)
            asked[terse] |= told.keys()
    for kind in begun:
        assert any(question.startswith(f"{kind} ") for question in asked[True])
        form = begun[kind].replace("{}", r"[a-z ]+")
        assert any(re.fullmatch(form, question) for question in asked[False])


def test_shards_have_the_members_of_img2dataset(tmp_path):
    world.main(["stage1", str(tmp_path / "shards"), "--n=3"])
    with tarfile.open(tmp_path / "shards" / "00000.tar") as tar:
        endings = ("jpg", "txt", "json")
        assert tar.getnames() == [
            f"00000000{i}.{ending}" for i in range(3) for ending in endings
        ]
        assert Image.open(tar.extractfile("000000001.jpg")).size == (128, 128)
        caption = json.load(tar.extractfile("000000001.json"))["caption"]
        assert tar.extractfile("000000001.txt").read().decode() == caption


@pytest.mark.slow
def test_text_and_its_tokenizer(tmp_path):
    world.main(["text", str(tmp_path / "text"), "--n=3000"])

    def read(name):
        return [
            json.loads(line)
            for line in (tmp_path / "text" / f"{name}.jsonl").read_text().splitlines()
        ]

    for line in read("chat"):
        first = line["conversation"][0]["user"]
        assert (
            first.startswith("<Img> ")
            and first.count(" </Img> ") == 1
            and len(line["conversation"]) == 12
        )
    assert all(len(line["conversation"]) == 16 for line in read("asked"))
    assert all(
        len(line["conversation"]) == 16 for line in read("terse") + read("facts")
    )
    assert all(
        line["context"] and line["text"].endswith("\n")
        for line in read("dense") + read("noisy")
    )
    for line in read("retold"):
        told, again = line["context"].split(), line["text"].split()
        assert sorted(set(again) & set(world.SHAPES)) == sorted(
            {told[0], told[6], told[12]}
        )
        assert (
            len(told) == 19 and again[0] in world.SHAPES and line["text"].endswith("\n")
        )
    for line in read("pairs"):
        told, again = line["context"].split(), line["text"].split()
        assert sorted(zip(again[::2], again[1::2])) == sorted(
            (told[i + 1], told[i]) for i in (0, 6, 12)
        )
    assert any(
        line["text"].split()[1] != line["context"].split()[0] for line in read("pairs")
    )  # any order
    assert all(line["text"] == line["context"] + "\n" for line in read("words"))
    listed = {word for line in read("retold") for word in line["context"].split()}
    for place in (0, 9, 18):  # of such a list; at random, any word is anywhere
        assert {line["context"].split()[place] for line in read("words")} == listed
    assert len(read("dense")) == 3000 and len(read("dense_heldout")) == 60
    model = tmp_path / "tokenizer.model"
    world.main(["tokenizer", str(model), f"--text={tmp_path / 'text' / 'chat.jsonl'}"])
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert all(
        len(tokenizer.encode(word)) == 1
        for word in (*world.COLORS, *world.SHAPES, "striped")
    )
    assert {
        len(tokenizer.encode(line["context"]))
        for line in read("words") + read("retold")
    } == {19}
    assert tokenizer.encode("a star.###", out_type=str)[-2:] == [".", "###"]
    assert tokenizer.decode(tokenizer.encode("A star.\n~é~")) == "A star.\n~é~"


def test_existing_data_is_never_overwritten(tmp_path):
    world.main(["test", str(tmp_path / "test"), "--n=2"])
    scenes = [
        world.Scene.from_dict(d)
        for d in json.loads((tmp_path / "test" / "scenes.json").read_text())
    ]
    assert all(world.is_heldout(scene) for scene in scenes) and not list(
        tmp_path.glob("*.part")
    )
    with pytest.raises(InputError, match="exists already"):
        world.main(["test", str(tmp_path / "test"), "--n=2"])
