"""How good a model is: on drawn scenes, by the paper's count of failed answers, on POPE, on VQA.

    python tools/evaluate.py                         the weights in assets/tiny, on drawings of colored shapes
    python tools/evaluate.py --stage1=out/tiny_stage1 --stage2=out/tiny_stage2 --n=100 --save=out/table.json
    python tools/evaluate.py failures photos --ckpt=out/stage2
    python tools/evaluate.py pope coco_pope_random.json coco_pope_popular.json --images=val2014 --ckpt=out/stage2
    python tools/evaluate.py vqa aokvqa.jsonl --images=val2017 --prompt="Question: {} Short answer:"

Each answer is greedy, with chat's repetition penalty, in a conversation of its own. All answers are kept in
--answers with a mark of the weights and settings that gave them, so that a stopped run continues where it was.
Pictures that cannot be read are named and left out. The columns are in percent.

scenes     500 held-out scenes before stage 1, after it, after stage 2. Neither stage sees a question, a rhyme,
           or a scene with the same set of colored shapes as a test scene.
    precision, recall, F1   (color, shape) pairs named in the description, against those of the scene
    failures                descriptions that break off or repeat themselves: no end within the limit, no
                            capital letter at the start or full stop at the end, or the same 4 words twice
    questions               correct answers to one question per scene (count, color, shape, place, ...)
    rhymes                  rhymes that rhyme and name exactly the objects of the scene
failures   the paper's Table 3: a description and a poem of each picture (a folder, a glob, a .txt that lists
           them). The paper's authors judged by eye; here, an answer fails for any of these:
    fragment                it has fewer than 8 words; or a description does not end with a whole sentence
    repeats                 a sentence or line of 2 words or more comes three times; or some words, or one,
                            come three times back to back. A poem may have a refrain, twice
    no end                  max_new_tokens was reached
pope       files of {"image": ..., "text": a question, "label": "yes" or "no"} lines, as in RUCAIBox/POPE, read
           by its rule: an answer is no if "no", "No" or "not" is a word of its first sentence, or else yes
vqa        files of {"image": ..., "question": ..., "answers": [...]} lines (or one "answer")
    exact match             the answer is one of the answers, both as VQA's evaluation normalizes them
    soft accuracy           of questions with ten answers: VQA's, 3 who gave the same answer make it right
"""

import json
import os
import random
import re
import sys
from collections import Counter, namedtuple
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import chat
from configs.prompts import INSTRUCTIONS
from configs.schema import (DTYPES, QUANTIZED, InputError, check_name, check_options, option, override,
                            parse_args, printable, run_main)
from model import fingerprint
from tools import caption, make_scenes as world
from vision import load_image

COLUMNS = ("precision", "recall", "F1", "failures", "questions", "rhymes")
PROMPTS = {  # of the paper's Table 3, with its failures in percent before and after stage 2
    "description": ("Describe the image in detail.", 35, 2),
    "poem": ("Can you write a beautiful poem about this image?", 32, 1)}
POPE_COLUMNS = ("accuracy", "precision", "recall", "F1", "yes")
PUBLISHED = {  # of MiniGPT-4, in Table 3 of the POPE paper (arXiv 2305.10355)
    "coco_pope_random": (77.83, 75.38, 82.67, 78.86, 54.83),
    "coco_pope_popular": (68.30, 64.27, 82.40, 72.21, 64.10),
    "coco_pope_adversarial": (66.60, 62.45, 83.27, 71.37, 66.67)}
FORMATS = {"pope": '{"image": ..., "text": ..., "label": "yes" or "no"}',
           "vqa": '{"image": ..., "question": ..., "answers": [a text, ...]}'}

@dataclass(frozen=True)
class Options:
    ckpt: str = option("", "a run's folder; none: the tiny model of this repo")
    images: str = option("", "pope, vqa: the folder of the pictures")
    prompt: str = option("{}", "pope, vqa: how to ask; {} stands for the question")
    stage2: str = option(str(ROOT / "assets/tiny"), "scenes: a run's folder")
    stage1: str = option(str(ROOT / "assets/tiny/stage1"), "scenes: the run that it started from")
    data: str = option(str(ROOT / "data/tiny/test"), "scenes: the pictures; made if missing")
    n: int = option(500, "scenes: how many", least=1)
    max_new_tokens: int = option(0, "most tokens of an answer; 0: 160, 500, 100, 50 for the four tasks",
                                 least=0, most=1999)
    batch_size: int = option(8, "questions answered together", least=1)
    device: str = option("", "none: cuda if there is one, else cpu")
    dtype: str = option("", "none: the run's, but not float16 on a CPU", choices=("", *DTYPES, *QUANTIZED))
    answers: str = option("out/answers.jsonl", "the answers' file, to write or to continue")
    save: str = option("", "a JSON file to write the table to")

    def __post_init__(self):
        path = Path(self.save)
        check_options(self, ("prompt", "{}" in self.prompt, "write {} where the question shall stand"),
                      ("save", not self.save or path.parent.is_dir() and not path.is_dir(),
                       "give a file name in a folder that exists"))

def percent(part: float, whole: int, digits: int = 1) -> float:
    return round(100 * part / max(whole, 1), digits)

# ---- answers -----------------------------------------------------------------------------------------------

def load(run: str, o: Options) -> chat.Chat:
    talk = chat.Chat(*chat.load(chat.Options(ckpt=run, temperature=0.0, max_new_tokens=o.max_new_tokens,
                                             device=o.device, dtype=o.dtype)))
    if talk.model.vision is None:
        raise InputError(f"{run}: this run sees no pictures; give one with vision")
    return talk

def mark(talk: chat.Chat) -> str:
    """What the words of an answer depend on: the weights and the settings."""
    o, model = talk.options, talk.model
    proj = {f"{k} {i}": row for k, p in model.part_parameters("proj").items() for i, row in enumerate(p)}
    parts = model.fingerprints | {"proj": fingerprint(proj)}  # some values of every row
    settings = {"dtype": model.llama.config.quantization or o.dtype, "image_size": model.image_size,
                "template": o.template, "end": o.answer_end, "max_new_tokens": o.max_new_tokens,
                "repetition_penalty": o.repetition_penalty}
    return " ".join(f"{k}={v}" for k, v in (parts | settings).items())

def read_answers(path: Path) -> dict[tuple[str, str, str], tuple[str, bool]]:
    """{(mark, picture, question): (answer, whether it is complete)}. A last line that was cut is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.open("ab").close()  # raises OSError before the work
    lines, known = path.read_bytes().splitlines(keepends=True), {}
    if lines and not lines[-1].endswith(b"\n") and lines[-1][:10] == b'{"model": '[:len(lines[-1])]:
        os.truncate(path, path.stat().st_size - len(lines.pop()))
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            known[row["model"], row["image"], row["question"]] = str(row["answer"]), bool(row["ended"])
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(f"{path}:{number}: not a line of answers; give another file as --answers") from e
    return known

def ask(talk: chat.Chat, o: Options, pairs: list[tuple[str, str]], label: str) -> dict[tuple, tuple]:
    """[(picture's path, question)] -> {pair: (answer, whether it is complete)} from --answers; those that are
    missing there are generated first. Pairs with a picture that cannot be read are left out."""
    path, model, unreadable, missing = Path(o.answers), mark(talk), {}, {}
    known, names = read_answers(path), {p: caption.written_path(p, path.parent) for p, _ in pairs}
    for picture, question in dict.fromkeys(pairs):
        if (model, names[picture], question) not in known:
            missing.setdefault(picture, []).append(question)
    pictures = [*missing]
    with path.open("a") as file, tqdm(total=sum(map(len, missing.values())), desc=label) as bar:
        for start in range(0, len(pictures), 8 * o.batch_size):  # enough for full batches of equal lengths
            loaded, prompts = {}, []
            for picture in pictures[start:start + 8 * o.batch_size]:
                try:
                    loaded[picture] = load_image(picture, talk.model.image_size)
                    prompts += [(caption.prompt_ids(talk, q), picture, q) for q in missing[picture]]
                except InputError as e:
                    if picture in loaded:  # the question is too long
                        raise
                    unreadable[picture] = str(e)
            embeds = {}
            for batch in batches([*loaded], o.batch_size):
                embeds |= zip(batch, caption.encode(talk, [loaded[p] for p in batch]))
            for batch in same_length_batches(prompts, o.batch_size):
                tokens, images, questions = zip(*batch)
                given = caption.answers(talk, [*tokens], torch.stack([embeds[p] for p in images]))
                for picture, question, (answer, ended) in zip(images, questions, given):
                    known[model, names[picture], question] = answer, ended
                    row = {"model": model, "image": names[picture], "question": question, "answer": answer}
                    print(json.dumps(row | {"ended": ended}), file=file)
                file.flush()
                bar.update(len(batch))
    report(unreadable, pairs)
    keys = {(picture, q): (model, names[picture], q) for picture, q in pairs}
    return {pair: known[key] for pair, key in keys.items() if key in known}

def batches(items: list, size: int) -> list[list]:
    return [items[i:i + size] for i in range(0, len(items), size)]

def same_length_batches(prompts: list[tuple], size: int) -> list[list[tuple]]:
    """[(ids, ...)] -> batches in each of which the ids are of one length."""
    groups = groupby(sorted(prompts, key=lambda p: len(p[0])), key=lambda p: len(p[0]))
    return [batch for _, group in groups for batch in batches([*group], size)]

def report(unreadable: dict[str, str], pairs: list[tuple[str, str]]):
    """Name the pictures that cannot be read. Raises InputError if that is all of them."""
    if unreadable:
        n, reasons = sum(picture in unreadable for picture, _ in pairs), [*unreadable.values()]
        what = f"{len(unreadable)} pictures cannot be read ({'; '.join(reasons[:10])}{'; ...' * (len(reasons) > 10)})"
        if n == len(pairs):
            raise InputError(f"{what}; no other is left")
        print(printable(f"warning: {what}: {n} of {len(pairs)} questions are left out"), file=sys.stderr)

# ---- scenes ------------------------------------------------------------------------------------------------

def failed(answer: str, ended: bool) -> bool:
    """Whether a description of a scene breaks off or repeats itself."""
    return not ended or not re.match(r"[A-Z].*\.$", answer, re.DOTALL) or world.repeats(answer, 4)

def score(talk: chat.Chat, o: Options, scenes: list[world.Scene], label: str) -> dict:
    """One row of the table, numbers in percent."""
    asked = []
    for i, scene in enumerate(scenes):
        rng = random.Random(i)
        texts = rng.choice(INSTRUCTIONS), *world.qa(scene, rng), rng.choice(world.RHYME_PROMPTS)
        asked.append((scene, str(Path(o.data) / f"{i}.jpg"), *texts))
    answers = ask(talk, o, [(p, q) for _, p, *texts in asked for q in (texts[0], texts[1], texts[4])], label)
    asked = [row for row in asked if (row[1], row[2]) in answers]
    named = wanted = right = failures = questions = rhymes = 0
    for scene, picture, instruction, question, truth, kind, rhyme in asked:
        answer, ended = answers[picture, instruction]
        failures += failed(answer, ended)
        objects = world.named_objects(answer)
        named += len(objects)
        wanted += len(scene.pairs)
        right += len(objects & scene.pairs)
        questions += world.answer_is_right(scene, question, kind, answers[picture, question][0], truth)
        rhymes += world.rhyme_is_right(scene, answers[picture, rhyme][0])
    n = len(asked)
    values = (right, named), (right, wanted), (2 * right, named + wanted), (failures, n), (questions, n), (rhymes, n)
    return {"projection": label} | {c: percent(*v) for c, v in zip(COLUMNS, values)}

def scenes(o: Options, arguments: list[str]) -> dict:
    if arguments:
        raise InputError(f"scenes: takes no {arguments[0]}; its options are --stage1, --stage2, --data and --n")
    runs = {"random": o.stage2, "after stage 1": o.stage1, "after stage 2": o.stage2}
    for run in runs.values():
        if not (Path(run) / "proj.safetensors").is_file():
            raise InputError(f"{run}: there is no proj.safetensors; give the folder of a run")
    folder = Path(o.data)
    if not folder.exists():
        world.main(["test", str(folder), f"--n={max(o.n, 500)}"])
    try:
        drawn = [world.Scene.from_dict(d) for d in json.loads((folder / "scenes.json").read_text())]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"{folder}: no valid scenes.json ({e}); give a folder of make_scenes.py test") from e
    if len(drawn) < o.n:
        raise InputError(f"{folder}: only {len(drawn)} scenes; lower --n, or remove the folder to remake it")
    rows = []
    for label, run in runs.items():
        talk = load(run, o)
        if label == "random":
            torch.manual_seed(0)
            for module in (m for m in talk.model.proj.modules() if hasattr(m, "reset_parameters")):
                module.reset_parameters()
        rows.append(score(talk, o, drawn[:o.n], label))
    return {"scenes": o.n, "rows": rows}

# ---- failures ----------------------------------------------------------------------------------------------

def words(text: str) -> list[str]:
    return re.findall(r"\w+(?:['’]\w+)*", text.lower())

def is_fragment(answer: str, kind: str) -> bool:
    """Whether it is too short, or a description's last sentence breaks off."""
    whole = kind == "poem" or re.search(r"[.!?…][\"'”’)\]*]*$", answer.strip())
    return len(words(answer)) < 8 or not whole

def repeats_itself(answer: str) -> bool:
    """Whether a sentence or line comes three times, or a run of words three times back to back."""
    pieces = Counter(tuple(words(piece)) for piece in re.split(r"[.!?…]+\s|\n", answer))
    w = words(answer)
    return any(n > 2 and len(piece) > 1 for piece, n in pieces.items()) or any(
        w[i:i + n] == w[i + n:i + 2 * n] == w[i + 2 * n:i + 3 * n]
        for n in range(1, len(w) // 3 + 1) for i in range(len(w) - 3 * n + 1))

def failures(o: Options, arguments: list[str]) -> dict:
    pictures = list(dict.fromkeys(path for name in arguments for path in caption.find_pictures(name)))
    if not pictures:
        raise InputError("failures: no pictures; give a picture, a folder, a glob, or a .txt that lists them")
    talk, rows = load(o.ckpt, o), []
    answers = ask(talk, o, [(p, prompt) for p in pictures for prompt, *_ in PROMPTS.values()], "failures")
    for kind, (prompt, before, after) in PROMPTS.items():
        given = [answers[p, prompt] for p in pictures if (p, prompt) in answers]
        found = [(is_fragment(answer, kind), repeats_itself(answer), not ended) for answer, ended in given]
        shares = [percent(sum(column), len(given)) for column in ([*map(any, found)], *zip(*found))]
        rows.append({"answer": kind, "pictures": len(given)}
                    | dict(zip(("failures", "fragment", "repeats", "no end"), shares))
                    | {"the paper before stage 2": before, "after it": after})
    return {"model": mark(talk), "rows": rows}

# ---- pope and vqa ------------------------------------------------------------------------------------------

def read_questions(file: str, task: str, o: Options) -> list[tuple[tuple[str, str], list[str]]]:
    """A file with one JSON object a line -> [((picture's path, question), the label or the right answers)]."""
    asked = []
    try:
        lines = Path(file).read_text("utf-8-sig").split("\n")
    except (OSError, ValueError) as e:
        raise InputError(f"{file}: cannot be read as UTF-8 text ({e}); give a file of questions") from e
    for number, line in enumerate(lines, 1):
        try:
            if row := json.loads(line.strip() or "0"):
                text, wanted = ((row["text"], [row["label"]]) if task == "pope" else
                                (row["question"], row["answers"] if "answers" in row else [row["answer"]]))
                if not (isinstance(wanted, list) and wanted and {*map(type, (row["image"], text, *wanted))} == {str}
                        and (task != "pope" or wanted[0] in ("yes", "no"))):
                    raise ValueError("a value is not of this form")
                asked.append(((os.path.join(o.images, row["image"]), o.prompt.replace("{}", text)), wanted))
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise InputError(f"{file}:{number}: {type(e).__name__} {e}; a line is {FORMATS[task]}") from e
    if not any(os.path.isfile(picture) for (picture, _), _ in asked):
        raise InputError(f"{file}: {len(asked)} questions, and none of their pictures is in {o.images}")
    return asked

def answer_files(task: str, o: Options, files: list[str]) -> tuple[str, dict[str, list[tuple]]]:
    """What answered, and of each file [(answer, the label or the right answers)]."""
    if not files or not os.path.isdir(o.images):
        raise InputError(f"{task}: {len(files)} files, --images={o.images}: give files of questions, and the "
                         "folder of their pictures")
    asked = {file: read_questions(file, task, o) for file in files}
    talk = load(o.ckpt, o)
    answers = ask(talk, o, [pair for file in files for pair, _ in asked[file]], task)
    return mark(talk), {file: [(answers[pair][0], wanted) for pair, wanted in asked[file] if pair in answers]
                        for file in files}

def says_yes(answer: str) -> bool:
    """By POPE's official rule, which takes all other answers, also an empty one, as a yes."""
    return not {"no", "No", "not"} & set(answer.split(".")[0].replace(",", "").split(" "))

def pope(o: Options, files: list[str]) -> dict:
    model, given = answer_files("pope", o, files)
    rows, published = [], []
    for file, answers in given.items():
        pairs = [(says_yes(answer), label == "yes") for answer, (label,) in answers]
        right, both = sum(a == b for a, b in pairs), sum(a and b for a, b in pairs)
        said, true = sum(a for a, _ in pairs), sum(b for _, b in pairs)
        values = (right, len(pairs)), (both, said), (both, true), (2 * both, said + true), (said, len(pairs))
        rows.append({"file": Path(file).name, "questions": len(pairs)}
                    | {c: percent(*v, 2) for c, v in zip(POPE_COLUMNS, values)})
        if numbers := PUBLISHED.get(Path(file).stem):
            about = {"file": f"{Path(file).stem}: MiniGPT-4 in the POPE paper", "questions": 3000}
            published.append(about | dict(zip(POPE_COLUMNS, numbers)))
    return {"model": model, "rows": rows, "published": published}

NUMBERS = "zero one two three four five six seven eight nine ten".split()
NUMBERS = {word: str(i) for i, word in enumerate(NUMBERS)} | {"none": "0"}

def normalize(answer: str) -> str:
    """("A dog, the two; I don't know!") -> "dog 2 i dont know", as VQA's evaluation does, but that it writes
    dont as don't, and here no apostrophe stays."""
    text = result = " ".join(answer.lower().split())
    for sign in ';/[]"{}()=+\\_-><@`,?!':  # goes at a space or in 1,000, else it separates words: black/white
        goes = f"{sign} " in text or f" {sign}" in text or re.search(r"\d,\d", text)
        result = result.replace(sign, "" if goes else " ")
    result = re.sub(r"['’]|\.(?!\d)", "", result)
    return " ".join(NUMBERS.get(w, w) for w in result.split() if w not in ("a", "an", "the"))

def soft_accuracy(same: list[bool]) -> float:
    """Who of some people gave the model's answer -> the mean, over all people, of a third of the number of
    the others who gave it, at most 1."""
    return sum(min(1, (sum(same) - own) / 3) for own in same) / len(same)

def vqa(o: Options, files: list[str]) -> dict:
    model, given = answer_files("vqa", o, files)
    rows = []
    for file, answers in given.items():
        same = [[normalize(answer) == normalize(x) for x in wanted] for answer, wanted in answers]
        soft = [soft_accuracy(row) for row in same if len(row) == 10]
        rows.append({"file": Path(file).name, "questions": len(same),
                     "exact match": percent(sum(map(any, same)), len(same), 2), "with ten answers": len(soft),
                     "soft accuracy": percent(sum(soft), len(soft), 2) if soft else None})
    return {"model": model, "rows": rows, "note": "MiniGPT-4 in its paper's Table 5, by the authors' own scoring: "
            "58.2 on AOK-VQA, 32.2 on GQA"}

TASKS = {  # the function, its max_new_tokens, and the options that not all have
    "scenes": (scenes, 160, {"stage1", "stage2", "data", "n"}), "failures": (failures, 500, {"ckpt"}),
    "pope": (pope, 100, {"ckpt", "images", "prompt"}), "vqa": (vqa, 50, {"ckpt", "images", "prompt"})}

def main(argv: list[str]):
    arguments, given = parse_args(argv, __doc__, f"[{'|'.join(TASKS)}] [...]", Options)
    task, *arguments = arguments or ["scenes"]
    function, max_new_tokens, own = TASKS[check_name(task, TASKS, "command line")]
    if others := given.keys() & set().union(*(names for _, _, names in TASKS.values())) - own:
        raise InputError(f"--{min(others)}: not an option of {task}")
    o = override(Options(), given)
    read_answers(Path(o.answers))  # raises for a wrong file before the work
    try:
        result = function(replace(o, max_new_tokens=o.max_new_tokens or max_new_tokens), arguments)
    except torch.OutOfMemoryError as e:
        raise InputError(f"--batch_size={o.batch_size}: too much for the GPU; lower it") from e
    rows = result["rows"] + result.get("published", [])
    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print(printable("| " + " | ".join("" if v is None else str(v) for v in row.values()) + " |"))
    print(result.get("note", ""), end="\n" if "note" in result else "")
    if o.save:
        Path(o.save).write_text(json.dumps(result, indent=1) + "\n")

if __name__ == "__main__":
    run_main(main)
