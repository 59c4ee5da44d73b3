"""How well the tiny world's model talks about 500 held-out scenes: before stage 1, after it, after stage 2.

    python tools/evaluate.py                         the committed weights in assets/tiny
    python tools/evaluate.py --stage1=out/tiny_stage1 --stage2=out/tiny_stage2 --n=100 --save=out/table.json

Each answer is greedy, with chat's repetition penalty, in a conversation of its own. Columns, in percent:

precision, recall, F1   (color, shape) pairs named in the description, against those of the scene
failures                descriptions that break off or repeat themselves: no end within the limit, no capital
                        letter at the start or full stop at the end, or the same 4 consecutive words twice
questions               correct answers to one question per scene (count, color, shape, place, ...)
rhymes                  rhymes that rhyme and name exactly the objects of the scene

Neither stage sees a question, a rhyme, or a scene with the same set of colored shapes as a test scene.
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
import chat
from configs.prompts import INSTRUCTIONS
from configs.schema import InputError, option, override, parse_args, run_main
from tools import make_scenes as world

COLUMNS = ("precision", "recall", "F1", "failures", "questions", "rhymes")

@dataclass(frozen=True)
class Options:
    stage2: str = option(str(ROOT / "assets/tiny"), "a run's folder")
    stage1: str = option(str(ROOT / "assets/tiny/stage1"), "the run that it started from")
    data: str = option(str(ROOT / "data/tiny/test"), "test scenes; made if missing")
    n: int = option(500, "scenes")
    max_new_tokens: int = option(160, "most tokens of an answer")
    save: str = option("", "a JSON file to write the table to")

def failed(answer: str, ended: bool) -> bool:
    """Whether a description breaks off or repeats itself."""
    return not ended or not re.match(r"[A-Z].*\.$", answer, re.DOTALL) or world.repeats(answer, 4)

def evaluate(talk: chat.Chat, scenes: list[world.Scene], folder: Path, label: str) -> dict:
    """One row of the table, numbers in percent."""
    def ask(i, question):
        talk.reset()
        talk.add_image(str(folder / f"{i}.jpg"))
        return "".join(talk.ask(question))

    named = wanted = right = failures = questions = rhymes = 0
    for i, scene in enumerate(tqdm(scenes, desc=label)):
        rng = random.Random(i)
        answer = ask(i, rng.choice(INSTRUCTIONS))
        failures += failed(answer, talk.turns[-1].ended)
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
    options = override(Options(), parse_args(argv, __doc__, "", Options)[1])
    if options.n < 1:
        raise InputError(f"--n={options.n}: give at least 1")
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
        scenes = [world.Scene.from_dict(d) for d in json.loads((folder / "scenes.json").read_text())]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"{folder}: no valid scenes.json ({e}); give a folder of make_scenes.py test") from e
    if len(scenes) < options.n:
        raise InputError(f"{folder}: only {len(scenes)} scenes; lower --n, or remove the folder to remake it")
    rows = []
    for label, run in runs.items():
        greedy = chat.Options(ckpt=run, temperature=0.0, max_new_tokens=options.max_new_tokens)
        talk = chat.Chat(*chat.load(greedy))
        if label == "random":
            torch.manual_seed(0)
            for module in (m for m in talk.model.proj.modules() if hasattr(m, "reset_parameters")):
                module.reset_parameters()
        rows.append(evaluate(talk, scenes[:options.n], folder, label))
    print("| projection |" + "".join(f" {c} |" for c in COLUMNS) + "\n|---|" + "---|" * len(COLUMNS))
    for row in rows:
        print(f"| {row['projection']} |" + "".join(f" {row[c]:.1f} |" for c in COLUMNS))
    if options.save:
        Path(options.save).write_text(json.dumps({"scenes": options.n, "rows": rows}, indent=1) + "\n")

if __name__ == "__main__":
    run_main(main)
