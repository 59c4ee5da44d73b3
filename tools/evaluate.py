"""How well the tiny world's model talks about 500 held-out scenes: before stage 1, after it, after stage 2.

    python tools/evaluate.py                                            the committed weights in assets/tiny
    python tools/evaluate.py --stage1=out/tiny_stage1 --stage2=out/tiny_stage2
    python tools/evaluate.py --n=100 --save=out/evaluation.json

Every answer is greedy, with chat's repetition penalty, in a conversation of its own. Columns, in percent:

precision, recall, F1   (color, shape) pairs named in the description, against those of the scene
failures                descriptions that break off or repeat themselves: no end within the limit, the same 4
                        words in a row twice, or no whole sentence (from a capital to a full stop)
questions               one question about each scene (count, color, shape, place, ...) answered rightly
rhymes                  rhymes that rhyme and name exactly the objects of the scene

Neither stage's training data holds a question or a rhyme, and no training scene has the same colored shapes
as a test scene, neither more nor fewer.
"""

import json
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from chat import Chat
from chat import Options as ChatOptions
from chat import load
from configs.schema import InputError, override, parse_args, run_main
from data import INSTRUCTIONS
from tools import make_scenes as world

COLUMNS = ("precision", "recall", "F1", "failures", "questions", "rhymes")


@dataclass(frozen=True)
class Options:
    stage2: str = str(ROOT / "assets/tiny")                          # a run's folder
    stage1: str = str(ROOT / "assets/tiny/stage1")                   # the run that it started from
    data: str = str(ROOT / "data/tiny/test")                         # made when it is missing
    n: int = 500                                                     # scenes
    max_new_tokens: int = 160                                        # the limit of an answer
    save: str = ""                                                   # also write the table there, as JSON


def failed(answer: str, ended: bool) -> bool:
    """Whether a description breaks off or repeats itself."""
    whole = re.match(r"[A-Z].*\.$", answer, re.DOTALL)
    return not ended or not whole or world.repeats(answer, 4)


def evaluate(chat: Chat, scenes: list[world.Scene], folder: Path, label: str) -> dict:
    """One row of the table, numbers in percent."""
    named = wanted = right = failures = questions = rhymes = 0

    def ask(i, question):
        chat.reset()
        chat.add_image(str(folder / f"{i}.jpg"))
        return "".join(chat.ask(question))

    for i, scene in enumerate(tqdm(scenes, desc=label)):
        rng = random.Random(i)
        answer = ask(i, rng.choice(INSTRUCTIONS))
        failures += failed(answer, chat.ended)
        objects = world.named_objects(answer)
        named += len(objects)
        wanted += len(scene.pairs)
        right += len(objects & scene.pairs)
        question, truth, kind = world.qa(scene, rng)
        questions += world.answer_is_right(scene, question, kind, ask(i, question), truth)
        rhymes += world.rhyme_is_right(scene, ask(i, rng.choice(world.RHYME_PROMPTS)))
    values = (right / max(named, 1), right / wanted, 2 * right / (named + wanted),
              failures / len(scenes), questions / len(scenes), rhymes / len(scenes))
    return {"projection": label} | {c: round(100 * v, 1) for c, v in zip(COLUMNS, values)}


def main(argv: list[str]):
    positional, given = parse_args(argv)
    options = override(Options(), given)
    if positional or options.n < 1:
        raise InputError("usage: python tools/evaluate.py [--key=value ...], --n at least 1")
    if options.save and (not Path(options.save).parent.is_dir() or Path(options.save).is_dir()):
        raise InputError(f"--save={options.save}: give a file name in a folder that exists")
    runs = {"random": options.stage2, "after stage 1": options.stage1, "after stage 2": options.stage2}
    for run in runs.values():
        if not (Path(run) / "proj.safetensors").is_file():
            raise InputError(f"{run}: there is no proj.safetensors; give the folder of a run")
    folder = Path(options.data)
    if not folder.exists():
        world.main(["test", str(folder), f"--n={max(options.n, 500)}"])
    try:
        listed = json.loads((folder / "scenes.json").read_text())
        scenes = [world.Scene.from_dict(d) for d in listed][:options.n]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"{folder}: no good scenes.json ({e}); give a folder of make_scenes.py test") from e
    if len(scenes) < options.n:
        raise InputError(f"{folder}: it has {len(scenes)} scenes, not {options.n}; remove it and it is made "
                         "anew, or give --n")
    rows = []
    for label, run in runs.items():
        greedy = ChatOptions(ckpt=run, temperature=0.0, max_new_tokens=options.max_new_tokens)
        model, chat_options = load(greedy)
        if label == "random":
            torch.manual_seed(0)
            model.proj.reset_parameters()
        rows.append(evaluate(Chat(model, chat_options), scenes, folder, label))
    print("| projection |" + "".join(f" {c} |" for c in COLUMNS) + "\n|---|" + "---|" * len(COLUMNS))
    for row in rows:
        print(f"| {row['projection']} |" + "".join(f" {row[c]:.1f} |" for c in COLUMNS))
    if options.save:
        Path(options.save).write_text(json.dumps({"scenes": options.n, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
