"""Score a model on drawn scenes, by the paper's failure count, on POPE, or on VQA.

    python tools/evaluate.py                           assets/tiny, on drawings
    python tools/evaluate.py --stage1=out/tiny_stage1 --stage2=out/tiny_stage2 --n=100
    python tools/evaluate.py failures photos --ckpt=out/stage2 --save=out/table.json
    python tools/evaluate.py pope coco_pope_random.json --images=val2014
    python tools/evaluate.py vqa questions.jsonl --images=val2017 \\
        --prompt="Question: {} Short answer:"

Answers are greedy, with the repetition penalty of chat.py, each in a new conversation.
They are kept in --answers together with weights and settings, and a stopped run
continues there. Tasks, and their columns in percent:

scenes      500 held-out scenes. Training never sees their sets of colored shapes, and
            neither stage trains on questions or rhymes.
  precision, recall, F1   (color, shape) pairs in the description and in the scene
  failures                descriptions that break off or repeat themselves: no end
                          within the limit, no capital at the start, no period at the
                          end, or the same 4 consecutive words twice
  questions               correct answers to one question per scene (count, color, ...)
  rhymes                  poems that rhyme and name exactly the scene's objects
failures    the paper's Table 3: descriptions and poems. The authors judged by eye; here
            an answer fails as
  fragment                with fewer than 8 words, or a description whose last sentence
                          is not complete
  repeats                 a sentence or line (of 2 words or more) 3 times, or any words
                          3 times back to back
  no end                  cut at max_new_tokens
pope        lines of {"image": ..., "text": ..., "label": "yes" or "no"}. By
            RUCAIBox/POPE's rule, an answer with "no", "No" or "not" before its first
            period counts as no, any other as yes; `yes` is the share of yes
vqa         lines of {"image": ..., "question": ..., "answers": [...]}, or with one
            "answer"; or the official files of A-OKVQA, GQA, and, each with questions
            and annotations, OK-VQA and VQAv2. Exact match is with any answer, after
            VQA's normalization; soft accuracy is VQA's, for questions with ten answers
"""

import json
import os
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import chat
from configs.prompts import INSTRUCTIONS
from plumbing.console import InputError, note, printable, progress, run_main
from plumbing.files import append_row, lock, read_rows, replacing
from plumbing.options import check_options, option, override, parse_args
from plumbing.weights import fingerprint
from tools import caption
from tools import make_scenes as world
from vision import load_image

ROOT = Path(chat.__file__).parent
PROMPTS = {
    "description": "Describe the image in detail.",
    "poem": "Can you write a beautiful poem about this image?",
}
# rows below ours: Tables 3 and 5 of the paper; Table 3 of POPE's (arXiv 2305.10355)
PUBLISHED = {
    "failures": [
        ("description, before stage 2 in the paper", 100, 35.0),
        ("description, after it", 100, 2.0),
        ("poem, before stage 2 in the paper", 100, 32.0),
        ("poem, after it", 100, 1.0),
    ],
    "pope": [
        ("random, MiniGPT-4 in POPE's paper", 3000, 77.83, 75.38, 82.67, 78.86, 54.83),
        ("popular, the same", 3000, 68.3, 64.27, 82.4, 72.21, 64.1),
        ("adversarial, the same", 3000, 66.6, 62.45, 83.27, 71.37, 66.67),
    ],
    "vqa": [
        ("AOK-VQA in the paper, scored in its own way", "", 58.2),
        ("GQA, the same", "", 32.2),
    ],
}
NUMBERS = "zero one two three four five six seven eight nine ten"


@dataclass(frozen=True)
class Options:
    ckpt: str = option("", "a run's folder (default: the tiny model in assets/)")
    images: str = option("", "pope, vqa: folder of the images")
    prompt: str = option("{}", "pope, vqa: the prompt; {} stands for the question")
    stage2: str = option(f"{ROOT}/assets/tiny", "scenes: the run after stage 2")
    stage1: str = option(f"{ROOT}/assets/tiny/stage1", "scenes: the run after stage 1")
    data: str = option(
        f"{ROOT}/data/tiny/test", "scenes: their folder, generated if missing"
    )
    n: int = option(
        500,
        "scenes, questions per file, or images (default: 500 scenes, else all)",
        least=1,
    )
    max_new_tokens: int = option(
        0, "longest answer; 0: scenes 160, failures 500, pope 100, vqa 50", least=0
    )
    batch_size: int = option(8, "questions answered together", least=1)
    device: str = option("", "PyTorch device (default: cuda if available, else cpu)")
    dtype: str = option("", "dtype of the weights, as in chat.py (default: the run's)")
    cuda_graphs: bool = option(False, "decode with CUDA graphs (untested on GPUs)")
    answers: str = option(
        "out/answers.jsonl",
        "file to write, or to continue; remove it to start over",
    )
    save: str = option("", "also write the table to this JSON file")


# ---- answers -------------------------------------------------------------------------

KEYS = ("model", "image", "stamp", "question", "answer", "ended")  # of --answers
ROW_START = b'{"model": '


class Pair(NamedTuple):
    picture: str  # a path
    question: str


def load(run, options):
    chat_options = chat.Options(
        ckpt=run,
        temperature=0.0,
        max_new_tokens=options.max_new_tokens,
        device=options.device,
        dtype=options.dtype,
        cuda_graphs=options.cuda_graphs,
    )
    return caption.start_chat(chat_options)


def identity(talk):
    """The weights and settings that an answer depends on, in words."""
    model = talk.model
    proj = model.part_tensors("proj")
    # row by row, as a fingerprint takes only some values of each tensor
    rows = {f"{k} {i}": row for k, p in proj.items() for i, row in enumerate(p)}
    known = {k: mark for k, mark in model.fingerprints.items() if k != "proj"}
    known["proj"] = fingerprint(rows)
    known["image_size"] = model.image_size
    for name in ("template", "answer_end", "repetition_penalty", "max_new_tokens"):
        known[name] = getattr(talk.options, name)
    known["dtype"] = model.llama.config.quantization or talk.options.dtype
    return " ".join(f"{k}={v}" for k, v in known.items())


def stamp(picture):
    """Size and time of a picture's file.

    A picture that another one has replaced is asked about again.
    """
    if not os.path.isfile(picture):
        return ""
    info = os.stat(picture)
    return f"{info.st_size} {info.st_mtime_ns}"


def read_answers(path):
    """{(model, picture, stamp, question): (answer, whether it is complete)}.

    A last row that was cut while it was written is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.open("ab").close()  # raises OSError before the work
    rows, rest = read_rows(path)
    if rest and ROW_START.startswith(rest[: len(ROW_START)]):
        os.truncate(path, path.stat().st_size - len(rest))
    elif rest.strip():
        rows.append((path.read_bytes().count(b"\n") + 1, rest))
    known = {}
    for number, line in rows:
        try:
            row = json.loads(line)
            *key, answer, ended = [row[name] for name in KEYS]
            known[tuple(key)] = answer, ended
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise InputError(
                f"{path}:{number}: not a line of answers; "
                "give another file as --answers"
            ) from e
    return known


def _encode_pictures(talk, paths, batch_size, unreadable):
    """{path: (N, d_llama)}; what is wrong with the others is added to `unreadable`."""
    images = {}
    for path in paths:
        try:
            images[path] = load_image(path, talk.model.image_size)
        except InputError as e:
            unreadable.append(str(e))
    embeds = {}
    for batch in caption.batches([*images], batch_size):
        encoded = caption.encode(talk, [images[path] for path in batch])
        embeds.update(zip(batch, encoded))
    return embeds


def _new_answers(talk, pairs, batch_size, unreadable):
    """Yield (Pair, (answer, whether it is complete)), but for unreadable pictures."""
    questions = {}  # of each picture
    for picture, question in pairs:
        questions.setdefault(picture, []).append(question)
    # many pictures at a time, as only prompts of one length are answered together
    for paths in caption.batches([*questions], 8 * batch_size):
        embeds = _encode_pictures(talk, paths, batch_size, unreadable)
        by_length = {}
        for picture in embeds:
            for question in questions[picture]:
                ids = caption.prompt_ids(talk, question)
                prompt = (ids, Pair(picture, question))
                by_length.setdefault(len(ids), []).append(prompt)
        for length in sorted(by_length):
            for batch in caption.batches(by_length[length], batch_size):
                prompts, asked = zip(*batch)
                images = torch.stack([embeds[pair.picture] for pair in asked])
                yield from zip(asked, caption.answers(talk, [*prompts], images))


def ask(talk, options, pairs, label):
    """{Pair: (answer, whether it is complete)}, from --answers or new.

    Pairs whose picture cannot be read are left out. Raises InputError if all are.
    """
    path = Path(options.answers)
    known = read_answers(path)
    model = identity(talk)
    keys = {}  # of each pair in `known`
    for pair in pairs:
        picture = caption.written_path(pair.picture, path.parent)
        keys[pair] = (model, picture, stamp(pair.picture), pair.question)

    missing = [pair for pair, key in keys.items() if key not in known]
    unreadable = []
    new = _new_answers(talk, missing, options.batch_size, unreadable)
    with path.open("a") as file:
        lock(file, f"{path}: another process writes to it; give another --answers")
        for pair, answer in progress(new, label, total=len(missing)):
            known[keys[pair]] = answer
            append_row(file, **dict(zip(KEYS, keys[pair] + answer)))

    answers = {pair: known[key] for pair, key in keys.items() if key in known}
    if unreadable:
        names = "; ".join(unreadable[:10])
        dots = "; ..." if unreadable[10:] else ""
        what = f"{len(unreadable)} pictures cannot be read ({names}{dots})"
        if not answers:
            raise InputError(f"{what}, and there are no others; give pictures")
        n = sum(pair not in answers for pair in pairs)
        note(f"warning: {what}; {n} of {len(pairs)} questions are left out")
    return answers


def percent(part, whole, digits=1):
    return round(100 * part / max(whole, 1), digits)


# ---- scenes --------------------------------------------------------------------------


def _draw_questions(drawn, folder):
    """[(scene, three Pairs: description, question, rhyme; kind of question, truth)]."""
    rows = []
    for i, scene in enumerate(drawn):
        rng = random.Random(i)
        picture = f"{folder}/{i}.jpg"
        description = Pair(picture, rng.choice(INSTRUCTIONS))
        text, truth, kind = world.qa(scene, rng)
        question = Pair(picture, text)
        rhyme = Pair(picture, rng.choice(world.RHYME_PROMPTS))
        rows.append((scene, description, question, rhyme, kind, truth))
    return rows


def failed(answer, ended):
    """Whether a scene's description breaks off or repeats itself."""
    is_whole = ended and re.match(r"[A-Z].*\.$", answer, re.DOTALL)
    return not is_whole or world.repeats(answer)


def evaluate(talk, drawn, options, label):
    """One row of the table of scenes."""
    rows = _draw_questions(drawn, options.data)
    pairs = [pair for row in rows for pair in row[1:4]]
    answers = ask(talk, options, pairs, label)
    counts = Counter()
    for scene, description, question, rhyme, kind, truth in rows:
        if description not in answers:
            continue
        text, ended = answers[description]
        named = world.named_objects(text)
        counts.update(
            scenes=1,
            named=len(named),
            wanted=len(scene.pairs),
            right=len(named & scene.pairs),
            failures=failed(text, ended),
            questions=world.answer_is_right(scene, kind, answers[question][0], truth),
            rhymes=world.rhyme_is_right(scene, answers[rhyme][0]),
        )
    right, named, wanted = counts["right"], counts["named"], counts["wanted"]
    row = {
        "projection": label,
        "precision": percent(right, named),
        "recall": percent(right, wanted),
        "F1": percent(2 * right, named + wanted),
    }
    for column in ("failures", "questions", "rhymes"):
        row[column] = percent(counts[column], counts["scenes"])
    return row


def _read_scenes(folder, n):
    """The first n scenes of a folder, which is made if it is missing."""
    if not folder.exists():
        world.main(["test", str(folder), f"--n={max(n, 500)}"])
    try:
        rows = json.loads((folder / "scenes.json").read_bytes())
        drawn = [world.Scene.from_dict(row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(
            f"{folder}: no valid scenes.json ({e}); "
            "give a folder of make_scenes.py test"
        ) from e
    if len(drawn) < n:
        raise InputError(
            f"{folder}: only {len(drawn)} scenes; "
            "lower --n, or remove the folder to remake it"
        )
    return drawn[:n]


def evaluate_scenes(options):
    """The table of scenes."""
    runs = {
        "random": options.stage2,
        "after stage 1": options.stage1,
        "after stage 2": options.stage2,
    }
    for run in runs.values():
        if not os.path.isfile(f"{run}/proj.safetensors"):
            raise InputError(
                f"{run}: there is no proj.safetensors; give the folder of a run"
            )
    drawn = _read_scenes(Path(options.data), options.n)
    rows = []
    for label, run in runs.items():
        talk = load(run, options)
        if label == "random":
            torch.manual_seed(0)
            talk.model.init_part("proj")
        rows.append(evaluate(talk, drawn, options, label))
    return {"scenes": options.n, "rows": rows}


# ---- failures ------------------------------------------------------------------------


def words(text):
    return re.findall(r"\w+(?:['’]\w+)*", text.lower())


def is_fragment(answer, kind):
    """Whether a description or poem is too short, or a description breaks off."""
    if len(words(answer)) < 8:
        return True
    return kind != "poem" and not re.search(r"[.!?…][\"'”’)\]*]*$", answer)


def repeats_itself(answer):
    """Whether a sentence or line comes 3 times, or words come 3 times back to back."""
    pieces = re.split(r"[.!?…]+\s|\n", answer)
    counts = Counter(tuple(words(piece)) for piece in pieces)
    if any(count > 2 and len(piece) > 1 for piece, count in counts.items()):
        return True
    all_words = words(answer)
    for n in range(1, len(all_words) // 3 + 1):
        for i in range(len(all_words) - 3 * n + 1):
            if all_words[i : i + n] * 3 == all_words[i : i + 3 * n]:
                return True
    return False


def failure_scores(given):
    """[(answer, whether it is complete, kind)] -> shares.

    An answer may fail in several ways.
    """
    counts = Counter()
    for answer, ended, kind in given:
        fragment = is_fragment(answer, kind)
        repeats = repeats_itself(answer)
        counts["failures"] += fragment or repeats or not ended
        counts["fragment"] += fragment
        counts["repeats"] += repeats
        counts["no end"] += not ended
    return {name: percent(n, len(given)) for name, n in counts.items()}


# ---- POPE ----------------------------------------------------------------------------


def says_yes(answer):
    """By POPE's official rule; an empty answer is a yes, too."""
    sentence = answer.split(".")[0].replace(",", "")
    return {"no", "No", "not"}.isdisjoint(sentence.split(" "))


def pope_scores(given):
    """[(answer, whether it is complete, [label])] -> shares; a yes is a positive."""
    n = Counter((says_yes(answer), label == "yes") for answer, _, (label,) in given)
    right_yes, right_no = n[True, True], n[False, False]
    said_yes = right_yes + n[True, False]
    are_yes = right_yes + n[False, True]
    return {
        "accuracy": percent(right_yes + right_no, len(given), 2),
        "precision": percent(right_yes, said_yes, 2),
        "recall": percent(right_yes, are_yes, 2),
        "F1": percent(2 * right_yes, said_yes + are_yes, 2),
        "yes": percent(said_yes, len(given), 2),
    }


# ---- VQA -----------------------------------------------------------------------------

DIGITS = {word: str(i) for i, word in enumerate(NUMBERS.split())} | {"none": "0"}


def normalize(answer):
    """("The dog, two; I don't know!") -> "dog 2 i dont know".

    VQA's evaluation writes dont as don't; here no apostrophe stays, which makes the
    same answers equal.
    """
    text = result = " ".join(answer.lower().split())
    has_thousands = re.search(r"\d,\d", text)
    for sign in ';/[]"{}()=+\\_-><@`,?!':
        is_beside_space = f"{sign} " in text or f" {sign}" in text
        separator = "" if is_beside_space or has_thousands else " "
        result = result.replace(sign, separator)
    result = re.sub(r"['’]|\.(?!\d)", "", result)
    kept = [word for word in result.split() if word not in ("a", "an", "the")]
    return " ".join(DIGITS.get(word, word) for word in kept)


def soft_accuracy(same):
    """Of an answer that equals these of ten people's.

    The mean over the ten of min(1, a third of the other nine who gave it).
    """
    n = same.count(True)
    others = [n - 1 if is_same else n for is_same in same]
    return sum(min(1, count / 3) for count in others) / 10


def vqa_scores(given):
    """[(answer, whether it is complete, people's answers)] -> shares."""
    matches = []
    for answer, _, wanted in given:
        text = normalize(answer)
        # an empty answer, or one of articles alone, is never right
        matches.append([bool(text) and text == normalize(x) for x in wanted])
    soft = [soft_accuracy(same) for same in matches if len(same) == 10]
    return {
        "exact match": percent(sum(map(any, matches)), len(matches), 2),
        "with ten answers": len(soft),
        "soft accuracy": percent(sum(soft), len(soft), 2) if soft else "",
    }


# ---- tasks with pictures of one's own ------------------------------------------------


def _parse_question(line, task):
    """(picture, question, [label] or people's answers). Raises for other lines."""
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("no object; give one per line, without a list around them")
    if task == "pope":
        question, wanted = row["text"], [row["label"]]
        if wanted not in (["yes"], ["no"]):
            raise ValueError("a label is yes or no")
    else:
        question = row["question"]
        wanted = row["answers"] if "answers" in row else [row["answer"]]
    if not isinstance(wanted, list) or not wanted:
        raise ValueError("answers are a list of texts")
    if not all(isinstance(x, str) for x in (row["image"], question, *wanted)):
        raise ValueError("all values are texts")
    return row["image"], question, wanted


@lru_cache(maxsize=2)  # questions and annotations
def _read_whole(file):
    """The list or object that a whole file is; {} for lines."""
    try:
        content = json.loads(Path(file).read_bytes())
    except (ValueError, RecursionError):
        return {}
    if isinstance(content, dict) and not {"questions", "annotations"} & content.keys():
        are_questions = all(isinstance(value, dict) for value in content.values())
        return content if are_questions else {}
    return content


def _read_official(file, names):
    """The official file of a VQA data set -> rows of our own; None for another file.

    A-OKVQA's is a list, GQA's {id: question}. VQAv2's and OK-VQA's has `questions`,
    whose answers are in another of the files `names`.
    """
    content = _read_whole(file)
    if not content:
        return None
    try:
        if isinstance(content, list):
            return [_coco_row(row, row["direct_answers"]) for row in content]
        if "questions" in content:
            answers = _official_answers(names)
            subset = content.get("data_subtype", "")
            rows = content["questions"]
            return [_coco_row(q, answers[q["question_id"]], subset) for q in rows]
        return [_gqa_row(row) for row in content.values()]
    except (KeyError, TypeError) as e:
        raise InputError(
            f"{file}: no official file of A-OKVQA, OK-VQA, VQAv2 or GQA: no {e}; "
            "OK-VQA and VQAv2 need the questions and the annotations, two files"
        ) from e


def _official_answers(names):
    """{question's id: people's answers} of all files with `annotations`."""
    answers = {}
    for name in names:
        content = _read_whole(name)
        if "annotations" in content:
            for row in content["annotations"]:
                given = [answer["answer"] for answer in row["answers"]]
                answers[row["question_id"]] = given
    return answers


def _gqa_row(row):
    return f"{row['imageId']}.jpg", row["question"], [row["answer"]]


def _coco_row(row, answers, subset=""):
    """A question about a picture of COCO, whose file names hold its id."""
    name = f"{int(row['image_id']):012d}.jpg"
    name = f"COCO_{subset}_{name}" if subset else name
    return name, row["question"], answers


def read_questions(file, task, options, names):
    """A file of questions -> [(Pair, [label] or people's answers)]."""
    rows = _read_official(file, names) if task == "vqa" else None
    rows = _read_lines(file, task) if rows is None else rows
    questions = []
    for picture, question, wanted in rows:
        path = os.path.join(options.images, picture)
        prompt = options.prompt.replace("{}", question)
        questions.append((Pair(path, prompt), wanted))
    if not questions:
        raise InputError(f"{file}: no questions in it; give files of {task}")
    return questions[: options.n]


def _read_lines(file, task):
    """A file with one JSON object a line -> (picture, question, wanted) of each."""
    rows = []
    for number, line in enumerate(Path(file).read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            rows.append(_parse_question(line, task))
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            reason = f"no {e}" if isinstance(e, KeyError) else e
            raise InputError(
                f"{file}:{number}: not a line of {task} ({reason}); --help shows one"
            ) from e
    return rows


def _prompts_about(names, n):
    """{kind of text: [(Pair, kind)]} for the first n pictures."""
    found = [path for name in names for path in caption.list_pictures(name)]
    pictures = [*dict.fromkeys(found)][:n]
    questions = {}
    for kind, prompt in PROMPTS.items():
        questions[kind] = [(Pair(picture, prompt), kind) for picture in pictures]
    return questions


def evaluate_pictures(task, options, names):
    """The table of failures, pope or vqa."""
    if task == "failures":
        questions = _prompts_about(names, options.n)
    else:
        asked = [name for name in names if "annotations" not in _read_whole(name)]
        if not asked:
            raise InputError(
                f"{names[0]}: these are the answers alone; give the file of the "
                "questions, too"
            )
        questions = {name: read_questions(name, task, options, names) for name in asked}
    pairs = [pair for rows in questions.values() for pair, _ in rows]
    if not any(os.path.isfile(pair.picture) for pair in pairs):
        raise InputError(
            f"{len(pairs)} questions, and none of their pictures is in "
            f"--images={options.images}"
        )
    talk = load(options.ckpt, options)
    answers = ask(talk, options, pairs, task)
    rows = []
    for name, asked in questions.items():
        given = [(*answers[p], wanted) for p, wanted in asked if p in answers]
        if given:
            row = {"answers to": name, "questions": len(given)}
            rows.append(row | TASKS[task].scores(given))
    published = [dict(zip(rows[0], values)) for values in PUBLISHED[task]]
    return {"model": identity(talk), "rows": rows, "published": published}


# ---- the command ---------------------------------------------------------------------


class Task(NamedTuple):
    scores: object  # a function of the answers; scenes have their own
    max_new_tokens: int
    options: set  # names, of those that not all tasks have


OF_SCENES = {"stage1", "stage2", "data"}
OF_FILES = {"ckpt", "images", "prompt"}
TASKS = {
    "scenes": Task(None, 160, OF_SCENES),
    "failures": Task(failure_scores, 500, {"ckpt"}),
    "pope": Task(pope_scores, 100, OF_FILES),
    "vqa": Task(vqa_scores, 50, OF_FILES),
}


def _parse_command(argv):
    """(task, its files, options)."""
    usage = "[scenes|failures|pope|vqa] [FILE ...]"
    arguments, given = parse_args(argv, __doc__, usage, Options)
    name, *files = arguments or ["scenes"]
    if name not in TASKS or bool(files) == (name == "scenes"):
        raise InputError(
            f"{name!r}: usage: scenes [--stage1=], "
            "or failures|pope|vqa FILE ... [--ckpt=]"
        )
    task = TASKS[name]
    others = given.keys() & (OF_FILES | OF_SCENES) - task.options
    if others:
        raise InputError(f"--{min(others)}: not an option of {name}; --help lists them")
    options = override(Options(), given)
    save, answers = Path(options.save), Path(options.answers)
    is_file = save.parent.is_dir() and not save.is_dir()
    check_options(
        options,
        ("prompt", "{}" in options.prompt, "write {} where the question stands"),
        ("answers", options.answers and not answers.is_dir(), "name a file"),
        (
            "save",
            not options.save or is_file,
            "give a file name in a folder that exists",
        ),
        ("save", save.resolve() != answers.resolve(), "not the same as --answers"),
    )
    max_new_tokens = options.max_new_tokens or task.max_new_tokens
    n = options.n if name == "scenes" or "n" in given else sys.maxsize
    return name, files, replace(options, max_new_tokens=max_new_tokens, n=n)


def _print_row(cells):
    print(printable(f"| {' | '.join(map(str, cells))} |"))


def main(argv):
    task, files, options = _parse_command(argv)
    read_answers(Path(options.answers))  # raises for a wrong file before the work
    try:
        if task == "scenes":
            result = evaluate_scenes(options)
        else:
            result = evaluate_pictures(task, options, files)
    except torch.OutOfMemoryError as e:
        raise InputError(
            f"--batch_size={options.batch_size}: too much for the GPU; lower it"
        ) from e
    columns = [*result["rows"][0]]
    _print_row(columns)
    print("|---" * len(columns) + "|")
    for row in result["rows"] + result.get("published", []):
        _print_row([row.get(column, "") for column in columns])
    if options.save:
        with replacing(options.save) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
