"""tools/evaluate.py: what fails, what is right, answers that are kept, the tables."""

import json
import os
import shutil
from pathlib import Path

import pytest

from plumbing.console import InputError
from tools import caption, evaluate, make_scenes

TESTS = Path(__file__).parent
TINY = TESTS.parent / "assets/tiny"
DESCRIPTION = (
    "The image shows a man riding a wave on a white surfboard. He is wearing a black "
    "wetsuit, and the wave is breaking behind him. In the distance, there is a beach "
    "with a few people on it."
)
POEM = (
    "The sea is calm tonight,\nthe waves are blue and bright,\n\n"
    "The sea is calm tonight,\nand home is out of sight"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with 7 pictures in photos/."""
    make_scenes.main(["test", str(tmp_path / "photos"), "--n=7"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_lines(path, *rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(*argv):
    """The result of a task, and the lines of its file of answers."""
    evaluate.main([*argv, "--save=saved.json"])
    kept = next(
        (x[10:] for x in argv if x.startswith("--answers=")), "out/answers.jsonl"
    )
    return json.loads(Path("saved.json").read_text()), Path(
        kept
    ).read_text().splitlines()


def pope_file(name="coco_pope_random.json"):
    """Three questions about each picture, one of them twice, under one question_id."""
    rows = [
        {"question_id": 1, "image": f"{i}.jpg", "text": text, "label": label}
        for i in range(7)
        for text, label in (
            ("Is there a red star in the image?", "yes"),
            ("Is there a dog?", "no"),
            ("Is there a dog?", "no"),
        )
    ]
    write_lines(name, *rows)


# ---- scenes --------------------------------------------------------------------------


WHOLE = "The image shows a red star. The background is gray."
TWICE = "A red star on the left and a red star on the right."


@pytest.mark.parametrize(
    "answer, ended, failed",
    [
        pytest.param(WHOLE, True, False, id="whole"),
        pytest.param(WHOLE, False, True, id="no end within the limit"),
        pytest.param("a red star on gray", True, True, id="fragment"),
        pytest.param(WHOLE[:-6], True, True, id="no full stop"),
        pytest.param(TWICE, True, True, id="four words twice"),
        pytest.param("", True, True, id="empty"),
    ],
)
def test_a_description_fails_that_breaks_off_or_repeats_itself(answer, ended, failed):
    assert evaluate.failed(answer, ended) == failed


@pytest.mark.slow
def test_the_table_of_a_few_scenes(folder, capsys):
    argv = [f"--data={folder}/photos", "--n=7"]
    saved, kept = run(*argv)
    rows = {row.pop("projection"): row for row in saved["rows"]}
    assert saved["scenes"] == 7 and list(rows) == [
        "random",
        "after stage 1",
        "after stage 2",
    ]
    columns = ["precision", "recall", "F1", "failures", "questions", "rhymes"]
    assert all(list(row) == columns for row in rows.values())
    assert rows["random"]["F1"] < 50 < rows["after stage 2"]["F1"]
    assert f"| random | {rows['random']['precision']:.1f} |" in capsys.readouterr().out
    assert len(kept) == 63 and len({json.loads(line)["model"] for line in kept}) == 3
    again, same = run("scenes", *argv, "--batch_size=1", "--answers=single.jsonl")
    assert [row | {"projection": label} for label, row in rows.items()] == again["rows"]
    assert set(same) == {line.replace("../photos", "photos") for line in kept}


def test_a_broken_list_of_scenes_is_refused(folder):
    for content in ("[", "{}x", '[{"objects": 3}]', '[{"background": "gray"}]', "3"):
        Path("photos/scenes.json").write_text(content)
        with pytest.raises(InputError, match="no valid scenes.json"):
            evaluate.main(["--data=photos", "--n=1"])


# ---- failures ------------------------------------------------------------------------


THRICE = f"It is red. {DESCRIPTION} It is red. The sky is blue. It is red."
BACK_TO_BACK = "There is a man and a tree and a tree and a tree in it."
APART = "There is a man and a tree and a bush and a tree in it."
ABBREVIATED = "Mr. Smith and Mr. Jones are standing beside Mr. Brown and a dog."
FRENCH = "Il y a un chien; l\u2019herbe est verte, et le ciel est bleu."


@pytest.mark.parametrize(
    "answer, kind, fragment, repeats",
    [
        pytest.param(DESCRIPTION, "description", False, False, id="whole"),
        pytest.param(
            DESCRIPTION + ' A sign reads "No dogs."',
            "description",
            False,
            False,
            id="ends with a quotation",
        ),
        pytest.param(
            DESCRIPTION[:-20], "description", True, False, id="stops in mid-sentence"
        ),
        pytest.param(
            DESCRIPTION + "\n\nIt is", "description", True, False, id="begun sentence"
        ),
        pytest.param("A man on a wave.", "description", True, False, id="short"),
        pytest.param("", "description", True, False, id="empty description"),
        pytest.param("", "poem", True, False, id="empty poem"),
        pytest.param(POEM, "poem", False, False, id="poem with a refrain"),
        pytest.param(POEM, "description", True, False, id="poem as a description"),
        pytest.param(
            POEM + "\nThe sea is calm tonight!", "poem", False, True, id="line 3 times"
        ),
        pytest.param(
            "A dog. " * 2 + DESCRIPTION, "description", False, False, id="twice"
        ),
        pytest.param(THRICE, "description", False, True, id="sentence 3 times"),
        pytest.param(
            DESCRIPTION + " It is very very very large.",
            "description",
            False,
            True,
            id="word 3 times",
        ),
        pytest.param(
            DESCRIPTION + " It is very, very large.",
            "description",
            False,
            False,
            id="word twice",
        ),
        pytest.param(BACK_TO_BACK, "description", False, True, id="words 3 times"),
        pytest.param(APART, "description", False, False, id="words apart"),
        pytest.param(ABBREVIATED, "description", False, False, id="abbreviations"),
        pytest.param(FRENCH, "description", False, False, id="apostrophe"),
    ],
)
def test_fragments_and_repetitions_by_the_rule(answer, kind, fragment, repeats):
    assert (evaluate.is_fragment(answer, kind), evaluate.repeats_itself(answer)) == (
        fragment,
        repeats,
    )


def test_the_shares_of_failures():
    given = [
        (DESCRIPTION, True, "description"),
        ("A dog.", True, "description"),
        (DESCRIPTION * 3, False, "description"),
        (DESCRIPTION[:-9], False, "description"),
    ]
    assert evaluate.failure_scores(given) == {
        "failures": 75.0,
        "fragment": 50.0,
        "repeats": 25.0,
        "no end": 50.0,
    }


def test_failures_of_pictures_beside_those_of_the_paper(folder, capsys):
    saved, kept = run("failures", "photos", "photos/0.jpg", "--max_new_tokens=5")
    assert [
        (row["answers to"], row["questions"], row["no end"]) for row in saved["rows"]
    ] == [("description", 7, 100.0), ("poem", 7, 100.0)]
    assert [row["failures"] for row in saved["published"]] == [35, 2, 32, 1] and len(
        kept
    ) == 14
    assert "| poem, after it | 100 | 1.0 |" in capsys.readouterr().out
    answer = json.loads(kept[0])
    assert (
        answer["image"] == "../photos/0.jpg"
        and answer["question"] in evaluate.PROMPTS.values()
    )
    assert tuple(answer) == evaluate.KEYS and answer["ended"] is False


# ---- pope ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, yes",
    [
        ("Yes, there is a snowboard.", True),
        ("No.", False),
        ("no, there is no dog", False),
        ("No, there is", False),
        ("There is not a dog.", False),
        ("", True),
        ("A dog. It is not red.", True),
        ("There isn't a dog.", True),
        ("NO", True),
        ("no!", True),
        ("Nothing", True),
        ("\nno", True),
    ],
)
def test_an_answer_is_read_by_the_official_rule(answer, yes):
    assert evaluate.says_yes(answer) == yes


def test_the_scores_of_pope():
    given = [
        (answer, True, [label])
        for answer, label in (
            ("Yes.", "yes"),
            ("Yes", "yes"),
            ("No.", "yes"),
            ("Yes.", "no"),
            ("no", "no"),
            ("no", "no"),
            ("no", "no"),
            ("", "no"),
        )
    ]
    assert evaluate.pope_scores(given) == {
        "accuracy": 62.5,
        "precision": 50.0,
        "recall": 66.67,
        "F1": 57.14,
        "yes": 50.0,
    }
    assert evaluate.pope_scores([("no", True, ["no"])]) == {
        "accuracy": 100.0,
        "precision": 0.0,
        "recall": 0.0,
        "F1": 0.0,
        "yes": 0.0,
    }


def test_every_line_of_pope_counts_and_every_question_is_asked_once(
    folder, monkeypatch
):
    pope_file()
    asked, encoded = [], []
    answers, encode = caption.answers, caption.encode
    monkeypatch.setattr(
        caption,
        "answers",
        lambda talk, prompts, x: asked.append(prompts) or answers(talk, prompts, x),
    )
    monkeypatch.setattr(
        caption, "encode", lambda talk, x: encoded.extend(x) or encode(talk, x)
    )
    saved, kept = run(
        "pope", "coco_pope_random.json", "--images=photos", "--batch_size=4"
    )
    assert saved["rows"][0]["questions"] == 21 and len(encoded) == 7
    assert len(kept) == 14 == sum(map(len, asked))
    assert saved["published"][0]["F1"] == 78.86
    said = [
        (row["question"], evaluate.says_yes(row["answer"]))
        for row in map(json.loads, kept)
    ]
    right = sum(yes if "star" in question else 2 * (not yes) for question, yes in said)
    assert saved["rows"][0]["accuracy"] == round(100 * right / 21, 2)


# ---- vqa -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, normal",
    [
        ("  The\tDog,  two;\nI don't know! ", "dog 2 i dont know"),
        ("A man and an apple.", "man and apple"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("t-shirt", "t shirt"),
        ("1,000 people", "1000 people"),
        ("3.5 m.", "3.5 m"),
        ("none", "0"),
        ("Ten", "10"),
        ("what?", "what"),
        ("dont", "dont"),
        ("o\u2019clock", "oclock"),
        ("the", ""),
        ("theory", "theory"),
        ("Yes, it is", "yes it is"),
    ],
)
def test_answers_are_normalized(answer, normal):
    assert evaluate.normalize(answer) == normal


@pytest.mark.parametrize(
    "n, soft", [(0, 0.0), (1, 30.0), (2, 60.0), (3, 90.0), (4, 100.0), (10, 100.0)]
)
def test_the_soft_accuracy_of_an_answer_that_n_of_ten_gave(n, soft):
    given = [("Red.", True, ["the red"] * n + [f"blue {i}" for i in range(10 - n)])]
    assert evaluate.vqa_scores(given) == {
        "exact match": 100.0 * (n > 0),
        "with ten answers": 1,
        "soft accuracy": soft,
    }


def test_one_answer_has_no_soft_accuracy(folder):
    write_lines(
        "a.jsonl",
        {"image": "0.jpg", "question": "How many?", "answer": "2"},
        {
            "image": str(folder / "photos/1.jpg"),
            "question": "{} {}",
            "answers": ["a", "b"],
        },
    )
    Path("a.jsonl").write_bytes(
        b"\xef\xbb\xbf" + Path("a.jsonl").read_bytes().replace(b"\n", b"\r\n\r\n")
    )
    saved, kept = run(
        "vqa", "a.jsonl", "--images=photos", "--prompt=Question: {} Short answer:"
    )
    assert (
        saved["rows"][0]["soft accuracy"] == "" and saved["rows"][0]["questions"] == 2
    )
    assert {json.loads(line)["question"] for line in kept} == {
        "Question: How many? Short answer:",
        "Question: {} {} Short answer:",
    }
    assert [row["exact match"] for row in saved["published"]] == [58.2, 32.2]


# ---- the answers that are kept -------------------------------------------------------


@pytest.mark.slow
def test_a_killed_run_continues(folder, monkeypatch):
    pope_file()
    argv = ["pope", "coco_pope_random.json", "--images=photos", "--batch_size=3"]
    whole, all_answers = run(*argv, "--answers=whole.jsonl")
    answers, calls = caption.answers, []
    with monkeypatch.context() as m:
        m.setattr(
            caption,
            "answers",
            lambda *a: calls.append(a) or answers(*a) if len(calls) < 2 else 1 / 0,
        )
        with pytest.raises(ZeroDivisionError):
            run(*argv, "--answers=part.jsonl")
    kept = Path("part.jsonl").read_bytes()
    assert kept.count(b"\n") == 6
    for rest in (
        b"",
        b"{",
        b'{"model": "proj',
        Path("whole.jsonl").read_bytes().split(b"\n")[7],
    ):
        Path("part.jsonl").write_bytes(kept + rest)
        calls.clear()
        with monkeypatch.context() as m:
            m.setattr(caption, "answers", lambda *a: calls.append(a) or answers(*a))
            assert run(*argv, "--answers=part.jsonl")[0] == whole
        assert sum(len(prompts) for _, prompts, _ in calls) == 8
        assert sorted(Path("part.jsonl").read_text().splitlines()) == sorted(
            all_answers
        )


@pytest.mark.slow
def test_other_weights_and_other_settings_are_asked_again(folder):
    shutil.copytree(TINY, "run")
    argv = ["failures", "photos/0.jpg", "--ckpt=run"]
    first, kept = run(*argv)
    assert run(*argv) == (first, kept) and len(kept) == 2
    for n, more in ((4, ["--max_new_tokens=7"]), (6, ["--dtype=bfloat16"]), (6, [])):
        assert len(run(*argv, *more)[1]) == n
    shutil.copy(TINY / "stage1/proj.safetensors", "run")
    other, kept = run(*argv)
    assert len(kept) == 8 and other["model"] != first["model"]
    shutil.copy("photos/1.jpg", "photos/0.jpg")  # another picture under the same name
    assert len(run(*argv)[1]) == 10


@pytest.mark.slow
def test_pictures_that_cannot_be_read_are_named_and_left_out(folder, capsys):
    Path("photos/2.jpg").write_bytes(b"no picture")
    Path("photos/3.jpg").unlink()
    pope_file()
    saved, kept = run("pope", "coco_pope_random.json", "--images=photos")
    warning = capsys.readouterr().err
    assert saved["rows"][0]["questions"] == 15 and len(kept) == 10
    assert (
        "2 pictures cannot be read" in warning
        and "6 of 21 questions are left out" in warning
    )
    assert (
        warning.count("photos/2.jpg: cannot be read")
        == warning.count("photos/3.jpg: there is no")
        == 1
    )
    assert run("scenes", "--data=photos", "--n=3")[0]["scenes"] == 3
    with pytest.raises(
        InputError, match="1 pictures cannot be read .*2.jpg.*no others"
    ):
        evaluate.main(["failures", "photos/2.jpg"])


@pytest.mark.parametrize(
    "task, line",
    [
        pytest.param("pope", "{", id="cut JSON"),
        pytest.param("pope", "[]", id="list"),
        pytest.param("pope", "3", id="number"),
        pytest.param("pope", "null", id="null"),
        pytest.param("pope", '{"image": "0.jpg", "text": "?"}', id="no label"),
        pytest.param(
            "pope", '{"image": "0.jpg", "text": "?", "label": "No"}', id="other label"
        ),
        pytest.param(
            "pope", '{"image": 3, "text": "?", "label": "no"}', id="image is a number"
        ),
        pytest.param("pope", "[" * 99999, id="deep JSON"),
        pytest.param("pope", b'{"image": "\xff"}', id="not UTF-8"),
        pytest.param("vqa", '{"image": "0.jpg", "question": "?"}', id="no answer"),
        pytest.param(
            "vqa", '{"image": "0.jpg", "question": "?", "answers": []}', id="no answers"
        ),
        pytest.param(
            "vqa",
            '{"image": "0.jpg", "question": "?", "answers": "red"}',
            id="answers are a text",
        ),
        pytest.param(
            "vqa",
            '{"image": "0.jpg", "question": "?", "answers": {"red": 3}}',
            id="answers are an object",
        ),
        pytest.param(
            "vqa",
            '{"image": "0.jpg", "question": "?", "answers": ["red", 3]}',
            id="answer is a number",
        ),
        pytest.param(
            "vqa",
            '{"image": "0.jpg", "question": "?", "answer": null}',
            id="answer is null",
        ),
    ],
)
def test_a_wrong_line_is_named(folder, monkeypatch, task, line):
    monkeypatch.setattr(evaluate, "load", None)
    write_lines(
        "a.jsonl",
        {
            "image": "0.jpg",
            "text": "?",
            "label": "no",
            "question": "?",
            "answer": "red",
        },
    )
    with open("a.jsonl", "ab") as f:
        f.write(b"\n" + (line if isinstance(line, bytes) else line.encode()))
    with pytest.raises(InputError, match=rf"a.jsonl:3: not a line of {task} "):
        evaluate.main([task, "a.jsonl", "--images=photos"])


@pytest.mark.parametrize(
    "argv, words",
    [
        pytest.param(["--n=0"], "at least 1", id="n of 0"),
        pytest.param(["extra"], "'extra': usage: scenes", id="file for scenes"),
        pytest.param(["scenes", "x"], "usage", id="scenes with a file"),
        pytest.param(
            ["--ckpt=out/stage2"],
            "not an option of scenes",
            id="option of another task",
        ),
        pytest.param(["pope"], "usage", id="pope without files"),
        pytest.param(
            ["failures", "photos", "--prompt={}"],
            "--prompt: not an option of failures",
            id="prompt of failures",
        ),
        pytest.param(
            ["failures", "photos", "--save=b.jsonl", "--answers=b.jsonl"],
            "not the same as --answers",
            id="save is answers",
        ),
        pytest.param(
            ["failures", "photos", "--answers="], "name a file", id="no answers file"
        ),
        pytest.param(
            ["--save=/none/table.json"], "a folder that exists", id="save in no folder"
        ),
        pytest.param(
            [f"--save={TESTS}"], "a folder that exists", id="save is a folder"
        ),
        pytest.param(
            [f"--data={TESTS}", "--n=1"], "no valid scenes.json", id="no scenes"
        ),
        pytest.param(["--data=photos", "--n=8"], "only 7 scenes", id="too few scenes"),
        pytest.param(
            [f"--stage1={TESTS}"], "tests: there is no proj.safetensors", id="no run"
        ),
        pytest.param(["failures", "nowhere"], "nowhere: no pictures", id="no pictures"),
        pytest.param(
            ["failures", "photos", "--batch_size=0"], "at least 1", id="batch_size of 0"
        ),
        pytest.param(
            ["vqa", "a.jsonl", "--images=photos", "--prompt=Why?"],
            "write {} where",
            id="prompt without question",
        ),
        pytest.param(
            ["vqa", "a.jsonl"], "none of their pictures", id="pictures elsewhere"
        ),
        pytest.param(
            ["vqa", "a.jsonl", "--images=none"],
            "images=none",
            id="no folder of pictures",
        ),
        pytest.param(
            ["vqa", "empty.jsonl", "--images=photos"],
            "empty.jsonl: no questions",
            id="no questions",
        ),
        pytest.param(
            ["failures", "photos", "--dtype=x"], "float32", id="unknown dtype"
        ),
        pytest.param(
            ["failures", "photos", "--ckpt=nowhere"],
            "nowhere: it has no config.json",
            id="unknown run",
        ),
        pytest.param(
            ["failures", "photos", "--answers=a.jsonl"],
            "a.jsonl:1: not a line of answers",
            id="answers are of another file",
        ),
    ],
)
def test_wrong_options_are_refused_before_the_work(folder, argv, words):
    line = '{"image": "0.jpg", "question": "?", "answer": "red"}'
    Path("a.jsonl").write_text(line)
    Path("empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match=words):
        evaluate.main(argv)
    assert Path("a.jsonl").read_text() == line


# ---- official files of VQA data sets -------------------------------------------------

QUESTION = {"question": "What is it?", "question_id": 7, "image_id": 42}
TEN = ["dog"] * 10
OFFICIAL = {
    "aokvqa": ({"a.json": [QUESTION | {"direct_answers": TEN}]}, f"{42:012d}.jpg", TEN),
    "vqav2": (
        {
            "a.json": {"questions": [QUESTION], "data_subtype": "val2014"},
            "b.json": {
                "annotations": [{"question_id": 7, "answers": [{"answer": "dog"}] * 10}]
            },
        },
        f"COCO_val2014_{42:012d}.jpg",
        TEN,
    ),
    "gqa": (
        {
            "a.json": {
                "9": {"imageId": "n1", "question": "What is it?", "answer": "dog"}
            }
        },
        "n1.jpg",
        ["dog"],
    ),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_files_are_read_as_they_are(tmp_path, name):
    files, picture, wanted = OFFICIAL[name]
    for file, content in files.items():
        (tmp_path / file).write_text(json.dumps(content))
    names = [f"{tmp_path}/{file}" for file in files]
    options = evaluate.Options(images="pictures")
    got = evaluate.read_questions(names[0], "vqa", options, names)
    pair = evaluate.Pair(os.path.join("pictures", picture), "What is it?")
    assert got == [(pair, wanted)]


@pytest.mark.parametrize(
    "content",
    [[QUESTION], {"questions": [QUESTION]}, [3]],
    ids=["no_answers", "no_annotations", "numbers"],
)
def test_an_official_file_without_answers_is_named(tmp_path, content):
    path = f"{tmp_path}/a.json"
    Path(path).write_text(json.dumps(content))
    with pytest.raises(InputError, match="a.json: no official file of A-OKVQA"):
        evaluate.read_questions(path, "vqa", evaluate.Options(), [path])


def test_answers_without_their_questions_are_named(tmp_path):
    path = f"{tmp_path}/a.json"
    Path(path).write_text(json.dumps({"annotations": []}))
    with pytest.raises(InputError, match="a.json: .* give the file of the questions"):
        evaluate.main(["vqa", path])


def test_lines_of_another_task_are_named_in_words(tmp_path):
    path = f"{tmp_path}/a.jsonl"
    line = {"image": "a.png", "question": "b"}
    for extra, words in (({}, "no 'answer'"), ({"answers": "a"}, "answers are a list")):
        Path(path).write_text(json.dumps(line | extra))
        with pytest.raises(InputError, match=rf"a.jsonl:1: not a line .*\({words}"):
            evaluate.main(["vqa", path])


def test_an_empty_answer_is_never_right():
    scores = evaluate.vqa_scores([("the", True, ["a"]), ("", True, [""] * 10)])
    assert scores["exact match"] == scores["soft accuracy"] == 0
