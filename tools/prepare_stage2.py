"""Is cc_sbu_align, or a folder of its form, whole? To be run once after it was fetched.

    python tools/prepare_stage2.py data/cc_sbu_align

Every annotation of filter_cap.json has to have its picture, each picture is decoded as training will decode
it, and nothing may be empty or there twice. Ends with status 0 if all is right, else with 2.
"""

import sys
from collections import Counter, defaultdict
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configs.schema import InputError, parse_args, run_main
from data import CaptionFolder
from vision import load_image

EXAMPLES = 3  # shown of each problem


def find_problems(source: CaptionFolder) -> dict[str, list[str]]:
    """{problem: where}, the place of every single one."""
    problems = defaultdict(list)
    named = Counter()
    for row, annotation in enumerate(tqdm(source.annotations, desc="checking", unit="picture", delay=1)):
        where = source.describe(0, row)
        if not isinstance(annotation, dict) or not {"image_id", "caption"} <= annotation.keys():
            problems["annotation without image_id or caption"].append(where)
            continue
        caption, name = annotation["caption"], f"{annotation['image_id']}.jpg"
        if not isinstance(caption, str) or not caption.strip():
            problems["empty caption"].append(where)
        named[name] += 1
        if named[name] > 1:
            problems["picture annotated twice"].append(f"{name} again in {where}")
        elif not (source.folder / name).is_file():
            problems["picture is missing"].append(f"{name} of {where}")
        else:
            try:
                load_image(str(source.folder / name), 224, smallest=2)
            except InputError as e:
                problems["picture cannot be read"].append(str(e))
    for path in sorted(source.folder.glob("*")):
        if path.name not in named:
            problems["file without annotation"].append(str(path))
    return problems


def main(argv: list[str]):
    positional, options = parse_args(argv)
    if len(positional) != 1 or options:
        raise InputError("usage: python tools/prepare_stage2.py FOLDER, for instance data/cc_sbu_align")
    if not Path(positional[0], "filter_cap.json").is_file():
        raise InputError(f"{positional[0]}: no filter_cap.json there; give the folder cc_sbu_align")
    source = CaptionFolder(positional[0])
    problems = find_problems(source)
    for problem, places in problems.items():
        print(f"{problem}: {len(places):,}")
        for place in places[:EXAMPLES]:
            print(f"  {place}")
        if len(places) > EXAMPLES:
            print("  ...")
    n = len(source.annotations)
    if problems or not n:
        summary = ", ".join(f"{problem} {len(places):,}" for problem, places in problems.items())
        raise InputError(f"{positional[0]}: {n:,} annotations, not all right ({summary or 'there are none'})"
                         "; fetch the folder again or mend it")
    print(f"{positional[0]}: {n:,} annotations, each with its picture; all right")


if __name__ == "__main__":
    run_main(main)
