"""BLIP's lists of captions and addresses -> the tar shards of stage 1, fetched by img2dataset.

    python tools/prepare_stage1.py SRC.json DST [--run=True] [--list=DST.tsv] [--key=value ...]
    python tools/prepare_stage1.py check DST

SRC is one of BLIP's `*_synthetic_filtered_large.json`, of any size: it is read in pieces. From it comes the
list that img2dataset takes (a .tsv, or a .parquet if --list ends so), and the command that fetches the
pictures into the folder DST is printed, or started with --run=True; broken off, it goes on where it was.

check, which also follows a --run, looks through the shards: samples, failures by cause, bytes, suspicious
shards. It writes DST/index.json, from which data.py knows the counts without opening every shard.
img2dataset is a package of its own, and a .parquet needs pyarrow.
"""

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configs.schema import InputError, override, parse_args, run_main
from data import index_tar

PIECE, LARGEST = 2**20, 2**24  # characters read at a time, and of the largest entry
USAGE = "usage: python tools/prepare_stage1.py SRC.json DST [--run=True], or: prepare_stage1.py check DST"


@dataclass(frozen=True)
class Options:
    run: bool = False            # start img2dataset, and check what it made
    list: str = ""               # where the .tsv or .parquet goes; "": DST.tsv
    image_size: int = 224        # pixels of a side; img2dataset keeps proportions and fills up with white
    processes: int = 16          # of img2dataset, each with so many threads
    threads: int = 128
    timeout: int = 10            # seconds for a picture
    shard_size: int = 10_000     # addresses of a shard

    def __post_init__(self):
        if min(self.image_size, self.processes, self.threads, self.timeout, self.shard_size) < 1:
            raise InputError("the options that are numbers are at least 1")


# ---- the list ----------------------------------------------------------------------------------------------


def read_entries(path: str) -> Iterator:
    """The entries of a JSON list, one after the other; no more than a piece of the file is in memory.

    Raises InputError, with the place, where the file is broken."""
    decode, skip_space = json.JSONDecoder().raw_decode, re.compile(r"\s*").match
    with open(path, encoding="utf-8-sig", errors="replace") as f:
        text, passed, at, n = f.read(PIECE), 0, 0, 0
        at = skip_space(text).end()
        if text[at:at + 1] != "[":
            raise InputError(f"{path}: does not begin with [; give a JSON list of {{\"url\", \"caption\"}}")
        at = skip_space(text, at + 1).end()
        if text[at:at + 1] == "]":
            return
        while True:
            try:
                entry, end = decode(text, skip_space(text, at).end())
                end = skip_space(text, end).end()
                if text[end] not in ",]":
                    raise ValueError("no comma behind it")
            except (ValueError, IndexError, RecursionError) as e:  # as also where the piece ends
                more = f.read(PIECE) if len(text) - at < LARGEST else ""
                if not more:
                    raise InputError(f"{path}: broken or cut off in entry {n + 1:,}, which begins at "
                                     f"character {passed + at:,}; fetch the file again") from e
                text, passed, at = text[at:] + more, passed + at, 0
                continue
            yield entry
            n, at = n + 1, end + 1
            if text[end] == "]":
                return


def write_list(src: str, dst: Path) -> Counter:
    """SRC's addresses and captions as a .tsv or .parquet; how many entries there were of which kind."""
    counts, part = Counter(), Path(f"{dst}.part")
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        write, close = (_parquet if dst.suffix == ".parquet" else _tsv)(part)
    except OSError as e:
        raise InputError(f"{dst}: cannot be written ({e}); give another --list or DST") from e
    try:
        for entry in tqdm(read_entries(src), desc=f"writing {dst}", unit="entry", unit_scale=True, delay=1):
            url, caption = (entry.get(k) for k in ("url", "caption")) if isinstance(entry, dict) else (0, 0)
            missing = [k for k, v in (("url", url), ("caption", caption))
                       if not isinstance(v, str) or not v.strip()]
            counts[f"without {missing[0]}" if missing else "written"] += 1
            if not missing:
                write(*(text.encode("utf-8", "replace").decode() for text in (url.strip(), caption)))
        close()
    except BaseException:
        part.unlink()
        raise
    part.replace(dst)
    return counts


def _tsv(path: Path) -> tuple[Callable, Callable]:
    """(write a row, close). A line break, which img2dataset's reader of .tsv cannot take, becomes a space."""
    f = open(path, "w", encoding="utf-8", newline="")
    rows = csv.writer(f, delimiter="\t", lineterminator="\n")
    rows.writerow(("url", "caption"))
    return lambda *row: rows.writerow([re.sub(r"[\r\n\0]+", " ", text) for text in row]), f.close


def _parquet(path: Path) -> tuple[Callable, Callable]:
    """(write a row, close)."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as e:
        raise InputError("a .parquet needs the package pyarrow: pip install pyarrow, or take a .tsv") from e
    schema = pyarrow.schema([("url", pyarrow.string()), ("caption", pyarrow.string())])
    writer, rows = parquet.ParquetWriter(path, schema), []

    def flush():
        urls, captions = zip(*rows) if rows else ((), ())
        writer.write_table(pyarrow.table([urls, captions], schema=schema))
        rows.clear()

    def write(*row):
        rows.append(row)
        if len(rows) == 100_000:
            flush()

    return write, lambda: (flush(), writer.close())


# ---- the pictures ------------------------------------------------------------------------------------------


def fetch_command(listed: Path, dst: Path, options: Options) -> list[str]:
    """img2dataset's command line, with the settings of the original."""
    return ["img2dataset", "--url_list", str(listed), "--input_format", listed.suffix[1:], "--url_col", "url",
            "--caption_col", "caption", "--output_format", "webdataset", "--output_folder", str(dst),
            "--image_size", str(options.image_size), "--number_sample_per_shard", str(options.shard_size),
            "--processes_count", str(options.processes), "--thread_count", str(options.threads),
            "--timeout", str(options.timeout)]


def prepare(src: str, dst: Path, options: Options):
    """Write the list, unless it is there and newer than SRC; print or start the command."""
    listed = Path(options.list or f"{dst}.tsv")
    if listed.suffix not in (".tsv", ".parquet"):
        raise InputError(f"--list={listed}: a name that ends in .tsv or .parquet")
    if not Path(src).is_file():
        raise InputError(f"{src}: there is no such file; give BLIP's *_synthetic_filtered_large.json")
    if listed.is_file() and listed.stat().st_mtime >= Path(src).stat().st_mtime:
        print(f"{listed} is there already, and newer than {src}")
    else:
        counts = write_list(src, listed)
        left_out = {k: v for k, v in counts.items() if k != "written"}
        print(f"{listed}: {counts['written']:,} pictures; left out: "
              + (", ".join(f"{v:,} {k}" for k, v in left_out.items()) or "none"))
    command, index = fetch_command(listed, dst, options), dst / "index.json"
    # img2dataset takes every .json of the folder for that of a finished shard, and stumbles over this one
    print((f"rm {shlex.quote(str(index))} && " if index.exists() else "") + shlex.join(command))
    if options.run:
        near = shutil.which("img2dataset", path=str(Path(sys.executable).parent))
        program = near or shutil.which("img2dataset")
        if not program:
            raise InputError("img2dataset is not installed: pip install img2dataset")
        index.unlink(missing_ok=True)
        dst.parent.mkdir(parents=True, exist_ok=True)
        status = subprocess.run([program, *command[1:]]).returncode
        if status:
            raise InputError(f"img2dataset ended with status {status}; started again, it keeps the shards "
                             "that are finished")
        check(dst)


# ---- the shards --------------------------------------------------------------------------------------------


class Shard(NamedTuple):
    name: str
    n_bytes: int
    samples: int
    problems: list[str]
    asked: int          # addresses, as img2dataset's *_stats.json says
    causes: Counter     # of the pictures that could not be had
    has_stats: bool


def examine(path: Path) -> Shard:
    """One shard, and what img2dataset wrote about it."""
    problems, samples, causes, asked = [], 0, Counter(), 0
    try:
        table = index_tar(str(path))
        samples = len(table)
        odd = sum(picture is None or text is None for _, picture, text, _ in table)
        if not samples:
            problems.append("no samples")
        if odd:
            problems.append(f"{odd:,} samples without picture or caption")
    except InputError as e:
        problems.append(f"unreadable ({e.__cause__})")
    stats_file = path.with_name(f"{path.stem}_stats.json")
    try:
        stats = json.loads(stats_file.read_text())
        asked, successes = int(stats["count"]), int(stats["successes"])
        causes = Counter({str(k): int(v) for k, v in stats["status_dict"].items() if k != "success"})
        if successes != samples:
            problems.append(f"{stats_file.name} says {successes:,} samples, the tar file has {samples:,}")
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        problems.append(f"{stats_file.name} cannot be read ({e!r})")
    return Shard(path.name, path.stat().st_size, samples, problems, asked, causes, stats_file.is_file())


def missing_numbers(names: list[str]) -> str:
    """["00000.tar", "00003.tar"] -> "00001.tar to 00002.tar"; "" if there are none."""
    present = {int(name[:-4]) for name in names if name[:-4].isdigit()}
    width = len(names[0]) - 4
    gaps = []
    for a, b in zip(sorted(present | {-1}), sorted(present)):
        if b - a > 1:
            first, last = f"{a + 1:0{width}d}.tar", f"{b - 1:0{width}d}.tar"
            gaps.append(first if first == last else f"{first} to {last}")
    return ", ".join(gaps)


def check(folder: Path):
    """Print what is in a folder of shards, and write its index.json."""
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise InputError(f"{folder}: no *.tar shards there")
    with ProcessPoolExecutor() as pool:
        shards = list(tqdm(pool.map(examine, tars), total=len(tars), desc="checking", unit="shard", delay=1))
    usual = median(shard.samples for shard in shards)
    for i, shard in enumerate(shards):
        if 0 < shard.samples < usual / 2 and i < len(shards) - 1:  # the last one holds what is left
            shard.problems.append(f"{shard.samples:,} samples, of the others half have {usual:,.0f} or more")
        if not shard.has_stats and any(s.has_stats for s in shards):
            shard.problems.append(f"no {shard.name[:-4]}_stats.json: img2dataset has not finished it")
    samples, asked = sum(s.samples for s in shards), sum(s.asked for s in shards)
    causes = sum((s.causes for s in shards), Counter())
    print(f"{folder}: {len(shards):,} shards, {samples:,} samples, {sum(s.n_bytes for s in shards):,} bytes")
    if asked:
        print(f"of {asked:,} pictures {causes.total():,} could not be had ({causes.total() / asked:.1%})")
        for cause, n in causes.most_common(10):
            print(f"{n:12,}  {cause}")
    suspicious = [f"{s.name}: {'; '.join(s.problems)}" for s in shards if s.problems]
    missing = missing_numbers([s.name for s in shards])
    suspicious += [f"missing: {missing}"] if missing else []
    print(f"suspicious shards: {len(suspicious) or 'none'}")
    for line in suspicious:
        print(f"  {line}")
    if not samples:
        raise InputError(f"{folder}: not one sample in {len(shards):,} shards")
    part = folder / "index.json.part"
    part.write_text(json.dumps({"samples": {s.name: s.samples for s in shards}}, indent=0))
    part.replace(folder / "index.json")


def main(argv: list[str]):
    positional, given = parse_args(argv)
    if len(positional) != 2:
        raise InputError(USAGE)
    options = override(Options(), given)
    if positional[0] == "check":
        check(Path(positional[1]))
    else:
        prepare(positional[0], Path(positional[1]), options)


if __name__ == "__main__":
    run_main(main)
