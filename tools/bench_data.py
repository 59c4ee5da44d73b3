"""How fast data.py feeds a model, beside the `webdataset` library, and how much memory it takes.

    python tools/bench.py data [--folder=out/bench/data] [--runs=5] [--memory_samples=50000]

Both sides read the same tar shards with as many worker processes, decode and resize with the same PIL calls,
tokenize with the same tokenizer, and end in normalised float32 batches in the main process. The peer is
written as webdataset's own examples are: each picture is normalised by the worker. `uint8_peer` is the same
with what data.py does instead: bytes are sent, and the whole batch is normalised where it arrives. The limit
is PIL alone: a bare loop of decode and resize over pictures in memory, in as many processes.

The shards, 224 x 224 and 640 x 480, are drawn on first use. It needs the package `webdataset`.
"""

import io
import json
import os
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import active_children
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from configs.schema import Config, InputError
from data import Reader, Sample, Samples, collate, index_tar, open_samples
from llama import Tokenizer
from vision import normalize

SIZES = ((224, 224), (640, 480))
SIDE, N_IMAGE_TOKENS = 224, 32
WORDS = "a the red small dog cat house on in front of with two people old street sea under photo sky".split()


@dataclass(frozen=True)
class Options:
    folder: str = "out/bench/data"  # where the shards are
    pictures: int = 2000            # in the shards of each size
    samples: int = 2000             # read in each timed run
    runs: int = 5                   # of each side, alternately; the median counts
    workers: int = 2
    batch_size: int = 64
    memory_samples: int = 50_000    # read while the memory is watched, of the smaller pictures; 0: not at all

    def __post_init__(self):
        if min(self.pictures, self.samples, self.runs, self.workers, self.batch_size) < 1:
            raise InputError("--pictures, --samples, --runs, --workers and --batch_size are at least 1")


# ---- the shards --------------------------------------------------------------------------------------------


def photograph(rng: np.random.Generator, size: tuple[int, int]) -> bytes:
    """A JPEG of about as many bytes as a photograph: noise that is stronger the coarser it is, and shapes."""
    width, height = size
    pixels = np.full((height, width, 3), 128, np.float32)
    for cells, strength in ((4, 60), (16, 25), (64, 12), (256, 6)):
        grid = rng.normal(0, strength, (cells * height // width, cells, 3)).clip(-127, 127) + 128
        pixels += np.asarray(Image.fromarray(grid.astype(np.uint8)).resize(size), np.float32) - 128
    pixels += rng.normal(0, 3, pixels.shape)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        box = (x, y, x + rng.uniform(10, width / 3), y + rng.uniform(10, height / 3))
        (draw.ellipse, draw.rectangle)[rng.integers(2)](box, fill=tuple(rng.integers(0, 255, 3).tolist()))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95 if size == (SIDE, SIDE) else 85)  # img2dataset's, a camera's
    return buffer.getvalue()


def make_shards(folder: Path, size: tuple[int, int], n: int):
    """n pictures with captions as img2dataset writes them, in four shards; the index comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, counts = np.random.default_rng(size), {}
    for shard, rows in enumerate(np.array_split(np.arange(n), 4)):
        counts[f"{shard:05d}.tar"] = len(rows)
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for row in rows.tolist():
                caption = " ".join(rng.choice(WORDS, rng.integers(5, 15)))
                text = json.dumps({"caption": caption, "key": f"{row:09d}", "status": "success"})
                for kind, content in (("jpg", photograph(rng, size)), ("json", text.encode()),
                                      ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{row:09d}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    (folder / "index.json").write_text(json.dumps({"samples": counts}))


# ---- the two sides, and the limit --------------------------------------------------------------------------


def ours(folder: Path, options: Options) -> Iterator[int]:
    """Read without end; yields how many pictures each batch held, once they are float32 on the main side."""
    config = Config(data=str(folder), batch_size=options.batch_size, num_workers=options.workers)
    for batch in Reader(*open_samples(config.data, config, tokenizer(), SIDE, N_IMAGE_TOKENS), config):
        yield len(normalize(batch.images))


def peer(folder: Path, options: Options, uint8: bool = False) -> Iterator[int]:
    """The same with webdataset: shards shuffled, a buffer of 1000 samples, WebLoader."""
    import webdataset
    samples = Samples([], Config(), tokenizer(), SIDE, N_IMAGE_TOKENS)

    def transform(image):
        image = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return image if uint8 else normalize(image)

    def tokens(described):
        return samples.tokenize(Sample(images=[b""], caption=described["caption"]), None)

    def batched(rows):
        return collate([([image], *ids) for image, ids in rows])

    shards = sorted(map(str, folder.glob("*.tar")))
    data = webdataset.WebDataset(shards, shardshuffle=len(shards)).shuffle(1000).decode("pil")
    data = data.to_tuple("jpg", "json").map_tuple(transform, tokens).batched(options.batch_size, batched)
    for batch in webdataset.WebLoader(data.repeat(), batch_size=None, num_workers=options.workers):
        yield len(normalize(batch.images) if uint8 else batch.images)


def tokenizer() -> Tokenizer:
    """The tiny model's: both sides tokenise with it."""
    return Tokenizer(ROOT / "assets/tiny/llama/tokenizer.model")


def processes() -> list[int]:
    """The process ids of the main process and its workers."""
    return [os.getpid(), *(child.pid for child in active_children())]


def cpu_seconds() -> float:
    """What all of them have taken of the processors so far."""
    ticks = 0
    for pid in processes():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # user and system
    return ticks / os.sysconf("SC_CLK_TCK")


def rate(side: Callable, folder: Path, options: Options) -> tuple[float, float]:
    """Pictures a second and processor milliseconds a picture, from when the workers are under way."""
    batches, n = side(folder, options), 0
    for _ in range(4 * options.workers):
        next(batches)
    start, cpu = time.perf_counter(), cpu_seconds()
    while n < options.samples:
        n += next(batches)
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    batches.close()
    return n / seconds, 1000 * cpu / n


def pil_alone(path: str, n: int, start: float) -> tuple[float, float]:
    """Decode and resize n pictures of a shard from memory, from `start` on (time.time), as `rate` does."""
    with open(path, "rb") as f:
        encoded = [f.seek(at) * 0 or f.read(size) for _, (at, size), _, _ in index_tar(path)]
    time.sleep(max(0.0, start - time.time()))
    begin, cpu = time.perf_counter(), time.process_time()
    for i in range(n):
        image = Image.open(io.BytesIO(encoded[i % len(encoded)]))  # a JPEG in color is RGB as it is decoded
        image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return n / (time.perf_counter() - begin), 1000 * (time.process_time() - cpu) / n


def limit(folder: Path, options: Options) -> tuple[float, float]:
    """What `rate` tells, of PIL alone in as many processes as there are workers."""
    share, paths = options.samples // options.workers + 1, sorted(map(str, folder.glob("*.tar")))
    with ProcessPoolExecutor(options.workers) as pool:
        runs = [pool.submit(pil_alone, paths[i % len(paths)], share, time.time() + 1)
                for i in range(options.workers)]
        speeds, cpus = zip(*(run.result() for run in runs))
        return sum(speeds), sum(cpus) / len(cpus)


def memory(folder: Path, options: Options) -> dict:
    """Resident MiB of the main process and its workers after a tenth of the samples and at the end."""
    def now():
        status = [Path(f"/proc/{pid}/status").read_text() for pid in processes()]
        return sum(int(s.split("VmRSS:")[1].split()[0]) for s in status) / 1024

    mib, n, batches = [], 0, ours(folder, options)
    while n < options.memory_samples:
        n += next(batches)
        mib.append(now())
    batches.close()
    early, late = median(mib[len(mib) // 10:][:9]), median(mib[-9:])
    return {"rss_mib": early, "rss_end_mib": late, "rss_growth_percent": 100 * (late / early - 1),
            "memory_samples": n}


def bench(options: Options) -> list[dict]:
    """One row for each size of picture. Raises InputError where webdataset is missing."""
    try:
        import webdataset  # noqa: F401
    except ImportError as e:
        raise InputError("the benchmark needs the package webdataset: pip install webdataset") from e
    torch.set_num_threads(1)
    rows = []
    for size in SIZES:
        folder = Path(options.folder) / f"{size[0]}x{size[1]}_{options.pictures}"
        if not (folder / "index.json").is_file():
            make_shards(folder, size, options.pictures)
        sides = {"ours": ours, "peer": peer, "uint8_peer": lambda *args: peer(*args, uint8=True)}
        runs = {name: [] for name in (*sides, "limit")}
        for _ in range(options.runs):
            for name, side in sides.items():
                runs[name].append(rate(side, folder, options))
            runs["limit"].append(limit(folder, options))
            print(f"{size}: " + ", ".join(f"{k} {v[-1][0]:.0f}/s {v[-1][1]:.2f} ms" for k, v in runs.items()),
                  file=sys.stderr)
        speed, cpu = ({name: median(run[i] for run in v) for name, v in runs.items()} for i in (0, 1))
        rows.append({"name": f"{size[0]}x{size[1]} w{options.workers}", "unit": "images/s", **speed,
                     "peer_name": "webdataset", "vs_peer": speed["ours"] / speed["peer"],
                     "vs_limit": speed["ours"] / speed["limit"],
                     "vs_uint8_peer": speed["ours"] / speed["uint8_peer"],
                     **{f"{name}_cpu_ms": ms for name, ms in cpu.items()}})
        if options.memory_samples and size == SIZES[0]:
            rows[-1] |= memory(folder, options)
    return rows
