"""BLIP's lists of captions and URLs -> the tar shards of stage 1, downloaded by img2dataset.

    python tools/prepare_stage1.py SRC.json DST [--run] [--list=DST.tsv] [--key=value ...]
    python tools/prepare_stage1.py check DST

SRC is one of BLIP's `*_synthetic_filtered_large.json`, of any size: it is read in chunks. The program writes
the list that img2dataset takes, a .tsv or .parquet, and prints the command that downloads the pictures into
the folder DST. --run also runs it; an interrupted download continues where it stopped.

Many of LAION's addresses are dead, and more die each year. configs/stage1_llava558k.py needs none of them: it
trains on LLaVA-Pretrain, 558,128 pairs of the same sources in one archive.

check, which also follows a --run, reports samples, failed downloads by cause, bytes and suspicious shards. It
writes DST/index.json, so that data.py need not open every shard to count its samples. img2dataset is a
separate package, and a .parquet needs pyarrow.
"""

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plumbing.console import InputError, printable, run_main
from plumbing.options import option, override, parse_args
from plumbing.sources import index_tar

CHUNK, LARGEST = 2**20, 2**24  # characters: read at a time; of the largest entry


@dataclass(frozen=True)
class Options:
    run: bool = option(False, "run img2dataset, then check its shards")
    list: str = option("", "the .tsv or .parquet to write; none: DST.tsv")
    image_size: int = option(
        224, "pixels; img2dataset keeps the proportions and pads with white"
    )
    processes: int = option(16, "of img2dataset")
    threads: int = option(128, "per process")
    timeout: int = option(10, "seconds per picture")
    shard_size: int = option(10_000, "URLs per shard")

    def __post_init__(self):
        if (
            min(
                self.image_size,
                self.processes,
                self.threads,
                self.timeout,
                self.shard_size,
            )
            < 1
        ):
            raise InputError("the numeric options must be at least 1")


# ---- the list and the download -----------------------------------------------------------------------------


def read_entries(path: str):
    """Yield the entries of a JSON list, with only a chunk in memory. InputError: where it is broken."""
    decode, skip_space = json.JSONDecoder().raw_decode, re.compile(r"\s*").match
    with open(path, encoding="utf-8-sig", errors="replace") as f:
        text, passed, n = f.read(CHUNK), 0, 0
        start = re.match(r"\s*\[\s*\]?", text)
        if not start:
            raise InputError(
                f'{path}: does not begin with [; give a JSON list of {{"url", "caption"}}'
            )
        at, separator = start.end(), start[0][-1]  # "]": the list is empty
        while separator != "]":
            try:
                entry, end = decode(text, skip_space(text, at).end())
                end = skip_space(text, end).end()
                separator = text[end]
                if separator not in ",]":
                    raise ValueError("no comma after it")
            except (
                ValueError,
                IndexError,
                RecursionError,
            ) as e:  # broken, or the chunk ends here
                more = f.read(CHUNK) if len(text) - at < LARGEST else ""
                if not more:
                    raise InputError(
                        f"{path}: broken or truncated in entry {n + 1:,}, which begins at "
                        f"character {passed + at:,}; download the file again"
                    ) from e
                text, passed, at = text[at:] + more, passed + at, 0
                continue
            yield entry
            n, at = n + 1, end + 1


def _rows(entries, counts):
    """Yield (url, caption) of the entries that have both; count these and the others in `counts`."""
    for entry in entries:
        row = {
            key: entry.get(key) if isinstance(entry, dict) else None
            for key in ("url", "caption")
        }
        missing = [
            key
            for key, text in row.items()
            if not isinstance(text, str) or not text.strip()
        ]
        counts[f"without {missing[0]}" if missing else "written"] += 1
        if not missing:
            url, caption = (
                text.encode("utf-8", "replace").decode() for text in row.values()
            )
            yield url.strip(), caption


def _write_tsv(path, rows):
    """Line breaks, which img2dataset cannot read in a .tsv, become spaces."""
    with open(path, "w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f, delimiter="\t", lineterminator="\n")
        writer.writerow(("url", "caption"))
        writer.writerows(
            [re.sub(r"[\r\n\0]+", " ", text) for text in row] for row in rows
        )


def _write_parquet(path, rows):
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as e:
        raise InputError(
            "a .parquet needs the package pyarrow: pip install pyarrow, or write a .tsv"
        ) from e
    schema = pyarrow.schema([("url", pyarrow.string()), ("caption", pyarrow.string())])
    with parquet.ParquetWriter(path, schema) as writer:
        while batch := list(islice(rows, 100_000)):
            writer.write_table(pyarrow.table(list(zip(*batch)), schema=schema))


def write_list(src: str, dst: Path) -> Counter:
    """Write SRC's URLs and captions to a .tsv or .parquet; count the entries written and left out."""
    counts, part = Counter(), Path(f"{dst}.part")
    entries = tqdm(
        read_entries(src),
        desc="writing the list",
        unit="entry",
        unit_scale=True,
        delay=1,
    )
    dst.parent.mkdir(parents=True, exist_ok=True)
    try:
        (_write_parquet if dst.suffix == ".parquet" else _write_tsv)(
            part, _rows(entries, counts)
        )
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    part.replace(dst)
    return counts


def fetch_command(listed: Path, dst: Path, options: Options) -> list[str]:
    """img2dataset's command line, with the settings of the original."""
    return [
        "img2dataset",
        "--url_list",
        str(listed),
        "--input_format",
        listed.suffix[1:],
        "--url_col",
        "url",
        "--caption_col",
        "caption",
        "--output_format",
        "webdataset",
        "--output_folder",
        str(dst),
        "--image_size",
        str(options.image_size),
        "--number_sample_per_shard",
        str(options.shard_size),
        "--processes_count",
        str(options.processes),
        "--thread_count",
        str(options.threads),
        "--timeout",
        str(options.timeout),
    ]


def prepare(src: str, dst: Path, options: Options):
    """Write the list, unless it exists and is newer than SRC; print or run the command."""
    listed = Path(options.list or f"{dst}.tsv")
    if listed.suffix not in (".tsv", ".parquet"):
        raise InputError(
            f"--list={listed}: give a name that ends with .tsv or .parquet"
        )
    if not Path(src).is_file():
        raise InputError(
            f"{src}: there is no such file; give BLIP's *_synthetic_filtered_large.json"
        )
    if listed.is_file() and listed.stat().st_mtime >= Path(src).stat().st_mtime:
        print(printable(f"{listed} exists already, and is newer than {src}"))
    else:
        counts = write_list(src, listed)
        left_out = (
            ", ".join(
                f"{n:,} {kind}" for kind, n in counts.items() if kind != "written"
            )
            or "none"
        )
        print(
            printable(f"{listed}: {counts['written']:,} pictures; left out: {left_out}")
        )
    command, index = fetch_command(listed, dst, options), dst / "index.json"
    # img2dataset takes every .json in the folder for a finished shard's, and fails on this one
    print(
        printable(
            (f"rm {shlex.quote(str(index))} && " if index.exists() else "")
            + shlex.join(command)
        )
    )
    if options.run:
        near = str(Path(sys.executable).parent)
        program = shutil.which("img2dataset", path=near) or shutil.which("img2dataset")
        if not program:
            raise InputError("img2dataset is not installed: pip install img2dataset")
        index.unlink(missing_ok=True)
        dst.parent.mkdir(parents=True, exist_ok=True)
        status = subprocess.run([program, *command[1:]]).returncode
        if status:
            raise InputError(
                f"img2dataset exited with {status}; run it again: finished shards are kept"
            )
        check(dst)


# ---- the shards --------------------------------------------------------------------------------------------


def examine(path: Path) -> tuple[int, int, Counter, list[str]]:
    """(samples, URLs, failed downloads by cause, problems) of a shard, from the .tar and its *_stats.json."""
    samples, asked, causes, problems = 0, 0, Counter(), []
    try:
        table = index_tar(str(path))
        samples = len(table)
        if odd := sum(picture is None or text is None for _, picture, text, _ in table):
            problems.append(f"{odd:,} samples without picture or caption")
    except InputError as e:
        problems.append(f"unreadable ({e.__cause__ or e})")
    stats_file = path.with_name(f"{path.stem}_stats.json")
    try:
        stats = json.loads(stats_file.read_bytes())
        asked, successes = int(stats["count"]), int(stats["successes"])
        causes = Counter(
            {str(k): int(v) for k, v in stats["status_dict"].items() if k != "success"}
        )
        if successes != samples:
            problems.append(
                f"{stats_file.name} says {successes:,} samples, the tar file has {samples:,}"
            )
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        problems.append(f"{stats_file.name} is unreadable ({e!r})")
    return samples, asked, causes, problems


def missing_shards(tars: list[Path]) -> str:
    """[00000.tar, 00002.tar, 00005.tar] -> "00001.tar, 00003.tar to 00004.tar"; "" if none is missing."""
    present, width = (
        sorted({-1, *(int(t.stem) for t in tars if t.stem.isdigit())}),
        len(tars[0].stem),
    )
    gaps = [{a + 1, b - 1} for a, b in zip(present, present[1:]) if b - a > 1]
    return ", ".join(
        " to ".join(f"{i:0{width}d}.tar" for i in sorted(gap)) for gap in gaps
    )


def check(folder: Path):
    """Print a report on a folder of shards, and write its index.json."""
    tars, stats = (
        sorted(folder.glob("*.tar")),
        {path.name for path in folder.glob("*_stats.json")},
    )
    if not tars:
        raise InputError(f"{folder}: no *.tar shards there")
    with ProcessPoolExecutor() as pool:
        shards = list(
            tqdm(
                pool.map(examine, tars),
                total=len(tars),
                desc="checking",
                unit="shard",
                delay=1,
            )
        )
    samples, asked, causes, problems = zip(*shards)
    usual = median(samples)
    for tar, n, found in zip(tars, samples, problems):
        if 0 < n < usual / 2 and tar != tars[-1]:  # the last one holds the remainder
            found.append(f"only {n:,} samples; the median is {usual:,.0f}")
        if stats and f"{tar.stem}_stats.json" not in stats:
            found.append(f"no {tar.stem}_stats.json: img2dataset has not finished it")
    n_bytes, failed = sum(tar.stat().st_size for tar in tars), sum(causes, Counter())
    print(
        printable(
            f"{folder}: {len(tars):,} shards, {sum(samples):,} samples, {n_bytes:,} bytes"
        )
    )
    if sum(asked):
        print(
            f"{failed.total():,} of {sum(asked):,} downloads failed ({failed.total() / sum(asked):.1%})"
        )
        for cause, n in failed.most_common(10):
            print(printable(f"{n:12,}  {cause}"))
    suspicious = [
        f"{tar.name}: {'; '.join(found)}" for tar, found in zip(tars, problems) if found
    ]
    if missing := missing_shards(tars):
        suspicious.append(f"missing: {missing}")
    print(
        printable(
            "\n  ".join(
                [f"suspicious shards: {len(suspicious) or 'none'}", *suspicious]
            )
        )
    )
    if not sum(samples):
        raise InputError(f"{folder}: no sample in {len(tars):,} shards")
    index = {"samples": {tar.name: n for tar, n in zip(tars, samples)}}
    (folder / "index.json").write_text(json.dumps(index, indent=0))


def main(argv: list[str]):
    (src, dst), given = parse_args(argv, __doc__, "SRC|check DST", Options)
    options = override(Options(), given)
    if src == "check":
        check(Path(dst))
    else:
        prepare(src, Path(dst), options)


if __name__ == "__main__":
    run_main(main)
