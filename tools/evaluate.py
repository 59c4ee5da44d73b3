"""How good a model is: on drawn scenes, by the paper's count of failed answers, on POPE, on VQA.

    python tools/evaluate.py                           the weights in assets/tiny, on drawings
    python tools/evaluate.py --stage1=out/tiny_stage1 --stage2=out/tiny_stage2 --n=100 --save=out/table.json
    python tools/evaluate.py failures photos --ckpt=out/stage2
    python tools/evaluate.py pope coco_pope_random.json coco_pope_popular.json --images=val2014
    python tools/evaluate.py vqa questions.jsonl --images=val2017 --prompt="Question: {} Short answer:"

Each answer is greedy, with chat's repetition penalty, in a conversation of its own. --answers keeps all, with
the weights and settings that gave them; a stopped run continues there. Columns, in percent:

scenes      500 held-out scenes. Neither stage sees a question, a rhyme, or a scene's set of colored shapes.
  precision, recall, F1   (color, shape) pairs named in the description, against those of the scene
  failures                descriptions that break off or repeat themselves: no end within the limit, no
                          capital at the start or full stop at the end, or the same 4 consecutive words twice
  questions               correct answers to one question per scene (count, color, shape, place, ...)
  rhymes                  rhymes that rhyme and name exactly the objects of the scene
failures    the paper's Table 3: descriptions and poems. Its authors judged by eye; here an answer fails as
  fragment                with fewer than 8 words, or a description whose last sentence is not complete
  repeats                 a sentence or line (of 2 words or more) 3 times, or any words 3 times back to back
  no end                  max_new_tokens came first
pope        {"image": ..., "text": ..., "label": "yes" or "no"} lines. By RUCAIBox/POPE's rule, an answer with
            "no", "No" or "not" before its first full stop is a no, any other a yes; `yes` is their share
vqa         {"image": ..., "question": ..., "answers": [...]} lines, or with one "answer". Exact match is with
            any of them, after VQA's normalization; soft accuracy is VQA's, of questions with ten answers
"""

import json
import os
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import chat
from configs.prompts import INSTRUCTIONS
from plumbing.console import InputError, note, printable, run_main
from plumbing.files import append_row, replacing
from plumbing.options import check_options, option, override, parse_args
from plumbing.weights import fingerprint
from tools import caption
from tools import make_scenes as world
from vision import load_image

COLUMNS = ("precision", "recall", "F1", "failures", "questions", "rhymes")
PROMPTS = {
    "description": "Describe the image in detail.",
    "poem": "Can you write a beautiful poem about this image?",
}
PUBLISHED = {  # rows below ours: the paper's Tables 3 and 5, and Table 3 of POPE's paper, arXiv 2305.10355
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
KEYS = (
    "model",
    "image",
    "stamp",
    "question",
    "answer",
    "ended",
)  # of a line of --answers
NUMBERS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
]
DIGITS = {word: str(i) for i, word in enumerate(NUMBERS)} | {"none": "0"}


@dataclass(frozen=True)
class Options:
    ckpt: str = option("", "a run's folder; none: the tiny model of this repo")
    images: str = option("", "pope, vqa: the folder of the pictures")
    prompt: str = option("{}", "pope, vqa: what is asked; {} is the question")
    stage2: str = option(str(ROOT / "assets/tiny"), "scenes: a run's folder")
    stage1: str = option(
        str(ROOT / "assets/tiny/stage1"), "scenes: the run that it started from"
    )
    data: str = option(
        str(ROOT / "data/tiny/test"), "scenes: their folder; made if missing"
    )
    n: int = option(
        500,
        "scenes, or the first questions of each file, or pictures; else all",
        least=1,
    )
    max_new_tokens: int = option(
        0, "of an answer; 0: scenes 160, failures 500, pope 100, vqa 50", least=0
    )
    batch_size: int = option(8, "questions answered together", least=1)
    device: str = option("", "none: cuda if there is one, else cpu")
    dtype: str = option("", "none: the run's, but not float16 on a CPU")
    answers: str = option(
        "out/answers.jsonl",
        "the file to write, or to continue; remove it to start over",
    )
    save: str = option("", "a JSON file to write the table to")


def percent(part: float, whole: int, digits: int = 1) -> float:
    return round(100 * part / max(whole, 1), digits)


def load(run: str, o: Options) -> chat.Chat:
    talk = chat.Chat(
        *chat.load(
            chat.Options(
                ckpt=run,
                temperature=0.0,
                max_new_tokens=o.max_new_tokens,
                device=o.device,
                dtype=o.dtype,
            )
        )
    )
    if talk.model.vision is None:
        raise InputError(f"{run}: this run sees no pictures; give one with vision")
    return talk


def identity(talk: chat.Chat) -> str:
    """The weights and settings that the words of an answer depend on."""
    o, model, proj = talk.options, talk.model, talk.model.part_tensors("proj")
    rows = {
        f"{k} {i}": row for k, p in proj.items() for i, row in enumerate(p)
    }  # some values of each count
    known = model.fingerprints | {
        "proj": fingerprint(rows),
        "image_size": model.image_size,
    }
    known |= {
        k: getattr(o, k)
        for k in ("template", "answer_end", "repetition_penalty", "max_new_tokens")
    }
    known["dtype"] = model.llama.config.quantization or o.dtype
    return " ".join(f"{k}={v}" for k, v in known.items())


def stamp(picture: str) -> str:
    """Size and time of a picture's file: another one under its name is asked about again."""
    return (
        "{0.st_size} {0.st_mtime_ns}".format(os.stat(picture))
        if os.path.isfile(picture)
        else ""
    )


def read_answers(path: Path) -> dict[tuple[str, ...], tuple[str, bool]]:
    """{(model, picture, stamp, question): (answer, whether it is complete)}. A cut last line is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.open("ab").close()  # raises OSError before the work
    lines, known = path.read_bytes().splitlines(keepends=True), {}
    if (
        lines
        and not lines[-1].endswith(b"\n")
        and lines[-1][:10] == b'{"model": '[: len(lines[-1])]
    ):
        os.truncate(path, path.stat().st_size - len(lines.pop()))
    for number, line in enumerate(lines, 1):
        try:
            if not line.strip():
                continue
            *key, answer, ended = map(json.loads(line).__getitem__, KEYS)
            known[tuple(key)] = answer, ended
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise InputError(
                f"{path}:{number}: not a line of answers; give another file as --answers"
            ) from e
    return known


def batches(items: list, size: int, key=bool) -> list[list]:
    """Lists of at most `size` items with the same key; by default, of any that are not empty."""
    groups = [[*group] for _, group in groupby(sorted(items, key=key), key)]
    return [group[i : i + size] for group in groups for i in range(0, len(group), size)]


def ask(
    talk: chat.Chat, o: Options, pairs: list[tuple[str, str]], label: str
) -> dict[tuple, tuple]:
    """[(picture's path, question)] -> {pair: (answer, whether it is complete)}, of --answers or new. Pairs
    whose picture cannot be read are left out; InputError if that is all of them."""
    path, model, missing, unreadable = Path(o.answers), identity(talk), {}, []
    names = {p: (caption.written_path(p, path.parent), stamp(p)) for p, _ in pairs}
    keys, known = (
        {(p, q): (model, *names[p], q) for p, q in dict.fromkeys(pairs)},
        read_answers(path),
    )
    for picture, question in (pair for pair, key in keys.items() if key not in known):
        missing.setdefault(picture, []).append(question)
    with (
        path.open("a") as file,
        tqdm(total=sum(map(len, missing.values())), desc=label) as bar,
    ):
        for some in batches(
            [*missing], 8 * o.batch_size
        ):  # many, as prompts are batched by their length
            loaded, embeds = {}, {}
            for picture in some:
                try:
                    loaded[picture] = load_image(picture, talk.model.image_size)
                except InputError as e:
                    unreadable.append(str(e))
            for batch in batches([*loaded], o.batch_size):
                embeds |= zip(
                    batch, caption.encode(talk, [loaded[picture] for picture in batch])
                )
            prompts = [
                (caption.prompt_ids(talk, q), (p, q))
                for p in loaded
                for q in missing[p]
            ]
            for batch in batches(prompts, o.batch_size, lambda prompt: len(prompt[0])):
                tokens, asked = zip(*batch)
                new = caption.answers(
                    talk,
                    [*tokens],
                    torch.stack([embeds[picture] for picture, _ in asked]),
                )
                for pair, answer in zip(asked, new):
                    known[keys[pair]] = answer
                    append_row(file, **dict(zip(KEYS, keys[pair] + answer)))
                bar.update(len(batch))
    answers = {pair: known[key] for pair, key in keys.items() if key in known}
    if unreadable:
        names = "; ".join(unreadable[:10] + ["..."] * (len(unreadable) > 10))
        what, n = (
            f"{len(unreadable)} pictures cannot be read ({names})",
            sum(p not in answers for p in pairs),
        )
        if not answers:
            raise InputError(f"{what}, and there are no others; give pictures")
        note(f"warning: {what}; {n} of {len(pairs)} questions are left out")
    return answers


def failed(answer: str, ended: bool) -> bool:
    """Whether a scene's description breaks off or repeats itself."""
    return (
        not ended
        or not re.match(r"[A-Z].*\.$", answer, re.DOTALL)
        or world.repeats(answer, 4)
    )


def evaluate(talk: chat.Chat, drawn: list[world.Scene], o: Options, label: str) -> dict:
    """One row of the table of scenes."""
    asked = [
        (
            scene,
            str(Path(o.data) / f"{i}.jpg"),
            rng.choice(INSTRUCTIONS),
            *world.qa(scene, rng),
            rng.choice(world.RHYME_PROMPTS),
        )
        for i, scene in enumerate(drawn)
        for rng in [random.Random(i)]
    ]
    answers = ask(
        talk, o, [(row[1], row[k]) for row in asked for k in (2, 3, 6)], label
    )
    asked = [row for row in asked if row[1:3] in answers]
    named = wanted = right = failures = questions = rhymes = 0
    for scene, picture, instruction, question, truth, kind, rhyme in asked:
        objects = world.named_objects(answers[picture, instruction][0])
        named += len(objects)
        wanted += len(scene.pairs)
        right += len(objects & scene.pairs)
        failures += failed(*answers[picture, instruction])
        questions += world.answer_is_right(
            scene, kind, answers[picture, question][0], truth
        )
        rhymes += world.rhyme_is_right(scene, answers[picture, rhyme][0])
    shares = (
        (right, named),
        (right, wanted),
        (2 * right, named + wanted),
        *((count, len(asked)) for count in (failures, questions, rhymes)),
    )
    return {"projection": label} | {
        c: percent(*share) for c, share in zip(COLUMNS, shares)
    }


def scenes(o: Options) -> dict:
    runs = {"random": o.stage2, "after stage 1": o.stage1, "after stage 2": o.stage2}
    for run in runs.values():
        if not (Path(run) / "proj.safetensors").is_file():
            raise InputError(
                f"{run}: there is no proj.safetensors; give the folder of a run"
            )
    folder, rows = Path(o.data), []
    if not folder.exists():
        world.main(["test", str(folder), f"--n={max(o.n, 500)}"])
    try:
        drawn = [
            world.Scene.from_dict(d)
            for d in json.loads((folder / "scenes.json").read_bytes())
        ]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(
            f"{folder}: no valid scenes.json ({e}); give a folder of make_scenes.py test"
        ) from e
    if len(drawn) < o.n:
        raise InputError(
            f"{folder}: only {len(drawn)} scenes; lower --n, or remove the folder to remake it"
        )
    for label, run in runs.items():
        talk = load(run, o)
        if label == "random":
            torch.manual_seed(0)
            talk.model.init_part("proj")
        rows.append(evaluate(talk, drawn[: o.n], o, label))
    return {"scenes": o.n, "rows": rows}


def words(text: str) -> list[str]:
    return re.findall(r"\w+(?:['’]\w+)*", text.lower())


def is_fragment(answer: str, kind: str) -> bool:
    """Whether a description or poem is too short, or a description's last sentence not complete."""
    whole = kind == "poem" or re.search(r"[.!?…][\"'”’)\]*]*$", answer)
    return len(words(answer)) < 8 or not whole


def repeats_itself(answer: str) -> bool:
    """Whether a sentence or line comes three times, or words come three times back to back."""
    pieces, w = (
        Counter(tuple(words(x)) for x in re.split(r"[.!?…]+\s|\n", answer)),
        words(answer),
    )
    return any(count > 2 and len(piece) > 1 for piece, count in pieces.items()) or any(
        w[i : i + n] == w[i + n : i + 2 * n] == w[i + 2 * n : i + 3 * n]
        for n in range(1, len(w) // 3 + 1)
        for i in range(len(w) - 3 * n + 1)
    )


def failure_scores(given: list[tuple]) -> dict:
    """[(answer, whether it is complete, kind)] -> shares; an answer may fail in several ways."""
    found = [
        (is_fragment(answer, kind), repeats_itself(answer), not ended)
        for answer, ended, kind in given
    ]
    shares = [
        percent(sum(column), len(given)) for column in (map(any, found), *zip(*found))
    ]
    return dict(zip(("failures", "fragment", "repeats", "no end"), shares))


def says_yes(answer: str) -> bool:
    """By POPE's official rule; also an empty answer is a yes."""
    return not {"no", "No", "not"} & set(
        answer.split(".")[0].replace(",", "").split(" ")
    )


def pope_scores(given: list[tuple]) -> dict:
    """[(answer, whether it is complete, [label])] -> shares; yes is the positive class."""
    n = Counter((says_yes(answer), label == "yes") for answer, _, (label,) in given)
    both, said, true = (
        n[True, True],
        n[True, True] + n[True, False],
        n[True, True] + n[False, True],
    )
    right, total = both + n[False, False], len(given)
    shares = (
        (right, total),
        (both, said),
        (both, true),
        (2 * both, said + true),
        (said, total),
    )
    return {
        c: percent(*v, 2)
        for c, v in zip(("accuracy", "precision", "recall", "F1", "yes"), shares)
    }


def normalize(answer: str) -> str:
    """("The dog, two; I don't know!") -> "dog 2 i dont know". VQA's evaluation writes dont as don't; here no
    apostrophe stays, which makes the same answers equal."""
    text = result = " ".join(answer.lower().split())
    for sign in (
        ';/[]"{}()=+\\_-><@`,?!'
    ):  # is dropped beside a space and in 1,000, else separates words
        drop = f"{sign} " in text or f" {sign}" in text or re.search(r"\d,\d", text)
        result = result.replace(sign, "" if drop else " ")
    result = re.sub(r"['’]|\.(?!\d)", "", result)
    return " ".join(
        DIGITS.get(word, word)
        for word in result.split()
        if word not in ("a", "an", "the")
    )


def vqa_scores(given: list[tuple]) -> dict:
    """[(answer, whether it is complete, people's answers)] -> shares. An answer's soft accuracy is the mean,
    over ten people, of min(1, a third of the other nine who gave it)."""
    same = [
        [normalize(answer) == normalize(x) for x in wanted]
        for answer, _, wanted in given
    ]
    soft = [
        sum(min(1, (sum(row) - own) / 3) for own in row) / 10
        for row in same
        if len(row) == 10
    ]
    return {
        "exact match": percent(sum(map(any, same)), len(same), 2),
        "with ten answers": len(soft),
        "soft accuracy": percent(sum(soft), len(soft), 2) if soft else "",
    }


def read_questions(
    file: str, task: str, o: Options
) -> list[tuple[tuple[str, str], list[str]]]:
    """A file with one JSON object a line -> [((picture's path, question), [label] or people's answers)]."""
    asked = []
    for number, line in enumerate(Path(file).read_bytes().splitlines(), 1):
        try:
            if line.strip():
                if type(row := json.loads(line)) is not dict:
                    raise ValueError(
                        "no object: one stands on each line, without a list around them"
                    )
                text, wanted = (
                    (row["text"], [row["label"]])
                    if task == "pope"
                    else (
                        row["question"],
                        row["answers"] if "answers" in row else [row["answer"]],
                    )
                )
                is_text = type(wanted) is list and {
                    *map(type, (row["image"], text, *wanted))
                } == {str}
                if (
                    not is_text
                    or not wanted
                    or task == "pope"
                    and wanted[0] not in ("yes", "no")
                ):
                    raise ValueError(
                        "a label is yes or no"
                        if task == "pope"
                        else "all values are texts"
                    )
                asked.append(
                    (
                        (
                            os.path.join(o.images, row["image"]),
                            o.prompt.replace("{}", text),
                        ),
                        wanted,
                    )
                )
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise InputError(
                f"{file}:{number}: not a line of {task} ({e!r}); --help shows one"
            ) from e
    if not asked:
        raise InputError(f"{file}: no questions in it; give files of {task}")
    return asked[: o.n]


def score(task: str, o: Options, names: list[str]) -> dict:
    """The table of failures, pope or vqa."""
    if task == "failures":
        pictures = dict.fromkeys(
            path for name in names for path in caption.find_pictures(name)
        )
        asked = {
            kind: [((p, prompt), kind) for p in [*pictures][: o.n]]
            for kind, prompt in PROMPTS.items()
        }
    else:
        asked = {name: read_questions(name, task, o) for name in names}
    pairs = [pair for file in asked.values() for pair, _ in file]
    if not any(os.path.isfile(picture) for picture, _ in pairs):
        raise InputError(
            f"{len(pairs)} questions, and none of their pictures is in --images={o.images}"
        )
    talk, rows = load(o.ckpt, o), []
    answers = ask(talk, o, pairs, task)
    for name, file in asked.items():
        if given := [
            (*answers[pair], wanted) for pair, wanted in file if pair in answers
        ]:
            rows.append(
                {"answers to": name, "questions": len(given)} | TASKS[task][0](given)
            )
    published = [dict(zip(rows[0], values)) for values in PUBLISHED[task]]
    return {"model": identity(talk), "rows": rows, "published": published}


OF_FILES, OF_SCENES = {"ckpt", "images", "prompt"}, {"stage1", "stage2", "data"}
TASKS = {  # what scores the answers, max_new_tokens, and the options that not all tasks have
    "scenes": (None, 160, OF_SCENES),
    "failures": (failure_scores, 500, {"ckpt"}),
    "pope": (pope_scores, 100, OF_FILES),
    "vqa": (vqa_scores, 50, OF_FILES),
}


def main(argv: list[str]):
    names, given = parse_args(
        argv, __doc__, "[scenes|failures|pope|vqa] [FILE ...]", Options
    )
    task, *names = names or ["scenes"]
    if task not in TASKS or bool(names) == (task == "scenes"):
        raise InputError(
            f"{task!r}: usage: scenes [--stage1=], or failures|pope|vqa FILE ... [--ckpt=]"
        )
    _, max_new_tokens, own = TASKS[task]
    if others := given.keys() & (OF_FILES | OF_SCENES) - own:
        raise InputError(f"--{min(others)}: not an option of {task}; --help lists them")
    o = override(Options(), given)
    is_file = Path(o.save).parent.is_dir() and not Path(o.save).is_dir()
    check_options(
        o,
        ("prompt", "{}" in o.prompt, "write {} where the question stands"),
        ("answers", o.answers and not Path(o.answers).is_dir(), "name a file"),
        ("save", not o.save or is_file, "give a file name in a folder that exists"),
        (
            "save",
            Path(o.save).resolve() != Path(o.answers).resolve(),
            "not the same as --answers",
        ),
    )
    o = replace(
        o,
        max_new_tokens=o.max_new_tokens or max_new_tokens,
        n=o.n if task == "scenes" or "n" in given else sys.maxsize,
    )
    read_answers(Path(o.answers))  # raises for a wrong file before the work
    try:
        result = scenes(o) if task == "scenes" else score(task, o, names)
    except torch.OutOfMemoryError as e:
        raise InputError(
            f"--batch_size={o.batch_size}: too much for the GPU; lower it"
        ) from e
    columns = [*result["rows"][0]]
    print(f"| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|")
    for row in result["rows"] + result.get("published", []):
        print(
            printable(
                "| " + " | ".join(str(row.get(column, "")) for column in columns) + " |"
            )
        )
    if o.save:
        with replacing(o.save) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
