"""Download the images of stage 1 into tar shards, with img2dataset.

    python tools/prepare_stage1.py SRC.json DST [--run] [--list=DST.tsv]
    python tools/prepare_stage1.py check DST

SRC is one of BLIP's `*_synthetic_filtered_large.json` files with captions and URLs, of
any size. The program writes img2dataset's list, a .tsv or .parquet, and prints the
command that downloads the images into the folder DST. --run also runs this command; an
interrupted download continues where it stopped.

Many of LAION's URLs are dead, and more die each year. configs/stage1_llava558k.py needs
none of them: it trains on LLaVA-Pretrain, 558,128 pairs from the same sources in one
archive.

`check`, which --run does at the end, reports samples, failed downloads by cause, bytes
and suspicious shards. It writes DST/index.json, so that data.py need not open every
shard to count its samples. img2dataset is a separate package; a .parquet needs pyarrow.
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
from itertools import islice, pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plumbing.console import (
    InputError,
    optional_package,
    printable,
    progress,
    run_main,
)
from plumbing.files import replacing
from plumbing.options import option, read_options
from plumbing.sources import index_tar, split_files

# characters: read at a time; of the largest entry
CHUNK, LARGEST = 2**20, 2**24
skip_space = re.compile(r"\s*").match


@dataclass(frozen=True)
class Options:
    run: bool = option(False, "run img2dataset, then check its shards")
    list: str = option("", "the .tsv or .parquet to write (default: DST.tsv)")
    image_size: int = option(
        224, "pixels per side; keeps the aspect ratio, pads with white", least=1
    )
    processes: int = option(16, "processes of img2dataset", least=1)
    threads: int = option(128, "threads per process", least=1)
    timeout: int = option(10, "seconds per image", least=1)
    shard_size: int = option(10_000, "URLs per shard", least=1)


# ---- the list and the download ---------------------------------------------------


def parse_entry(text, start):
    """(entry of a JSON list at `start`, start of the next, whether it is the last).

    Raises ValueError, IndexError or RecursionError if it is broken or cut.
    """
    first = skip_space(text, start).end()
    entry, end = json.JSONDecoder().raw_decode(text, first)
    separator = skip_space(text, end).end()
    if text[separator] not in ",]":
        raise ValueError("no comma after it")
    return entry, separator + 1, text[separator] == "]"


def read_entries(path):
    """Yield the entries of a JSON list, with only a chunk in memory.

    Raises InputError that says where the list is broken.
    """
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        text = file.read(CHUNK)
        opening = re.match(r"\s*\[\s*\]?", text)
        if not opening:
            raise InputError(
                f"{path}: does not begin with [; "
                'give a JSON list of {"url", "caption"}'
            )
        is_last = opening[0].endswith("]")
        position = opening.end()
        dropped = 0  # characters before `text`
        n = 0
        while not is_last:
            try:
                entry, following, is_last = parse_entry(text, position)
            except (ValueError, IndexError, RecursionError) as e:
                # Broken, or the chunk ends here
                more = file.read(CHUNK) if len(text) - position < LARGEST else ""
                if not more:
                    raise InputError(
                        f"{path}: broken or truncated in entry {n + 1:,}, which begins "
                        f"at character {dropped + position:,}; download the file again"
                    ) from e
                text = text[position:] + more
                dropped += position
                position = 0
                continue
            yield entry
            n += 1
            position = following


def clean(text):
    """A text without lone surrogates; "" for what is no text."""
    return text.encode("utf-8", "replace").decode() if isinstance(text, str) else ""


def complete_rows(entries, counts):
    """Yield (url, caption) of the entries that have both; count them and the others."""
    for entry in entries:
        fields = entry if isinstance(entry, dict) else {}
        url = clean(fields.get("url")).strip()
        caption = clean(fields.get("caption"))
        if not url:
            counts["without url"] += 1
        elif not caption.strip():
            counts["without caption"] += 1
        else:
            counts["written"] += 1
            yield url, caption


def write_tsv(path, rows):
    """Write a .tsv. Line breaks, which img2dataset cannot read there, become spaces."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(("url", "caption"))
        for row in rows:
            writer.writerow([re.sub(r"[\r\n\0]+", " ", text) for text in row])


def write_parquet(path, rows):
    pyarrow = optional_package("pyarrow", "a .parquet (a .tsv needs none)")
    parquet = optional_package("pyarrow.parquet", "a .parquet")
    text = pyarrow.string()
    schema = pyarrow.schema([("url", text), ("caption", text)])
    with parquet.ParquetWriter(path, schema) as writer:
        while batch := list(islice(rows, 100_000)):
            columns = list(zip(*batch))
            writer.write_table(pyarrow.table(columns, schema=schema))


def write_list(src, dst):
    """Write SRC's URLs and captions to a .tsv or .parquet.

    Returns how many entries were written, and left out for which reason.
    """
    counts = Counter()
    entries = progress(
        read_entries(src), "writing the list", unit="entry", unit_scale=True, delay=1
    )
    write = write_parquet if dst.suffix == ".parquet" else write_tsv
    dst.parent.mkdir(parents=True, exist_ok=True)
    with replacing(dst) as temporary:
        write(temporary, complete_rows(entries, counts))
    return counts


def fetch_command(listed, dst, options):
    """img2dataset's command line, with the settings of the original."""
    urls, folder = shlex.quote(str(listed)), shlex.quote(str(dst))
    return (
        f"img2dataset --url_list {urls} --input_format {listed.suffix[1:]} "
        "--url_col url --caption_col caption --output_format webdataset "
        f"--output_folder {folder} --image_size {options.image_size} "
        f"--number_sample_per_shard {options.shard_size} "
        f"--processes_count {options.processes} --thread_count {options.threads} "
        f"--timeout {options.timeout}"
    )


def run_img2dataset(command):
    """Run the command. Raises InputError if it is not installed, or fails."""
    near = str(Path(sys.executable).parent)
    program = shutil.which("img2dataset", path=near) or shutil.which("img2dataset")
    if not program:
        raise InputError("img2dataset is not installed: pip install img2dataset")
    arguments = shlex.split(command)[1:]
    status = subprocess.run([program, *arguments]).returncode
    if status:
        raise InputError(
            f"img2dataset exited with {status}; run it again: finished shards are kept"
        )


def prepare(src, dst, options):
    """Write the list unless it is newer than SRC; print the command, or also run it."""
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
        n_written = counts.pop("written", 0)
        left_out = ", ".join(f"{n:,} {reason}" for reason, n in counts.items())
        print(
            printable(
                f"{listed}: {n_written:,} pictures; left out: {left_out or 'none'}"
            )
        )
    command = shown = fetch_command(listed, dst, options)
    # img2dataset takes every .json of its folder for a shard's, and fails on this one.
    index = dst / "index.json"
    if index.exists():
        shown = f"rm {shlex.quote(str(index))} && {command}"
    print(printable(shown))
    if options.run:
        index.unlink(missing_ok=True)
        dst.parent.mkdir(parents=True, exist_ok=True)
        run_img2dataset(command)
        check(dst)


# ---- the shards ------------------------------------------------------------------


class Shard(NamedTuple):
    """What the .tar of a shard and img2dataset's *_stats.json say."""

    n_samples: int
    n_urls: int
    failures: Counter  # of downloads, by cause
    problems: list  # of texts


def examine(path) -> Shard:
    table, problems = [], []
    try:
        table = index_tar(str(path))
    except InputError as e:
        problems.append(f"unreadable ({e.__cause__ or e})")
    odd = sum(None in split_files(files) for _, files in table)
    if odd:
        problems.append(f"{odd:,} samples without picture or caption")
    stats_file = path.with_name(f"{path.stem}_stats.json")
    n_urls, failures = 0, Counter()
    try:
        stats = json.loads(stats_file.read_bytes())
        n_urls, n_successes = int(stats["count"]), int(stats["successes"])
        failures.update({str(k): int(v) for k, v in stats["status_dict"].items()})
        del failures["success"]
        if n_successes != len(table):
            problems.append(
                f"{stats_file.name} says {n_successes:,} samples, "
                f"the tar file has {len(table):,}"
            )
    except FileNotFoundError:
        pass  # check reports it
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        problems.append(f"{stats_file.name} is unreadable ({e!r})")
    return Shard(len(table), n_urls, failures, problems)


def missing_shards(tars):
    """The gaps in the numbers: "00001.tar, 00003.tar to 00004.tar", or ""."""
    numbers = {int(tar.stem) for tar in tars if tar.stem.isdigit()}
    present = sorted(numbers | {-1})
    width = len(tars[0].stem)
    gaps = []
    for before, after in pairwise(present):
        first, last = f"{before + 1:0{width}d}.tar", f"{after - 1:0{width}d}.tar"
        if after - before == 2:
            gaps.append(first)
        elif after - before > 2:
            gaps.append(f"{first} to {last}")
    return ", ".join(gaps)


def suspicions(tars, shards):
    """One line for each shard with problems, and one for missing shards."""
    usual = median(shard.n_samples for shard in shards)
    has_stats = any(tars[0].parent.glob("*_stats.json"))
    lines = []
    for tar, shard in zip(tars, shards):
        problems = shard.problems
        # The last shard holds the remainder.
        if 0 < shard.n_samples < usual / 2 and tar != tars[-1]:
            problems.append(
                f"only {shard.n_samples:,} samples; the median is {usual:,.0f}"
            )
        stats = f"{tar.stem}_stats.json"
        if has_stats and not tar.with_name(stats).exists():
            problems.append(f"no {stats}: img2dataset has not finished it")
        if problems:
            lines.append(f"{tar.name}: {'; '.join(problems)}")
    missing = missing_shards(tars)
    if missing:
        lines.append(f"missing: {missing}")
    return lines


def check(folder):
    """Print a report on a folder of shards, and write its index.json."""
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise InputError(f"{folder}: no *.tar shards there")
    with ProcessPoolExecutor() as pool:
        results = pool.map(examine, tars)
        bar = progress(results, "checking", total=len(tars), unit="shard", delay=1)
        shards = list(bar)
    n_samples = sum(shard.n_samples for shard in shards)
    n_urls = sum(shard.n_urls for shard in shards)
    n_bytes = sum(tar.stat().st_size for tar in tars)
    failures = sum((shard.failures for shard in shards), Counter())
    counts = f"{len(tars):,} shards, {n_samples:,} samples, {n_bytes:,} bytes"
    print(printable(f"{folder}: {counts}"))
    if n_urls:
        n = failures.total()
        print(f"{n:,} of {n_urls:,} downloads failed ({n / n_urls:.1%})")
        for cause, n in failures.most_common(10):
            print(printable(f"{n:12,}  {cause}"))
    suspicious = suspicions(tars, shards)
    title = f"suspicious shards: {len(suspicious) or 'none'}"
    print(printable("\n  ".join([title, *suspicious])))
    if not n_samples:
        raise InputError(f"{folder}: no sample in {len(tars):,} shards")
    index = {tar.name: shard.n_samples for tar, shard in zip(tars, shards)}
    content = json.dumps({"samples": index}, indent=0)
    (folder / "index.json").write_text(content)


def main(argv):
    (src, dst), options, _ = read_options(argv, __doc__, "SRC|check DST", Options())
    if src == "check":
        check(Path(dst))
    else:
        prepare(src, Path(dst), options)


if __name__ == "__main__":
    run_main(main)
