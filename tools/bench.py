"""Speed and memory beside what one would use instead, both measured in one run.

    python tools/bench.py chat [--size=full|small] [--folder=out/bench]
    python tools/bench.py data [--key=value ...]

data: how fast pictures and captions come from tar shards, beside `webdataset`; see tools/bench_data.py.
chat: from the start of the process to the first word about a picture, and the peak memory, in bfloat16; the
peer is InstructBLIP-Vicuna of Hugging Face `transformers` of the same shape. Both have random weights, which
are made in --folder on first use (full: 32 GB of disk) and are in the page cache when the clock starts.

The last line printed is one JSON object: for each row what was measured (higher is better), of the peer and
of the limit. chat needs the package `transformers`, data `webdataset`.
"""

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tools"))
import bench_data
import random_weights
from configs.schema import Config, InputError, override, parse_args, run_main, to_json
from data import TEMPLATES, chat_segments, encode_segments, user_message
from llama import LlamaConfig, Tokenizer
from model import MiniGPT4, write_tensors
from qformer import QFormerConfig
from vision import VisionConfig

SIZES = {
    "full": (VisionConfig(), QFormerConfig(), LlamaConfig()),
    "small": (VisionConfig(width=64, n_layers=4, n_heads=4, mlp_hidden=128),
              QFormerConfig(width=48, n_layers=4, n_heads=4, ffn_hidden=96, vision_width=64),
              LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
                          num_key_value_heads=4, head_dim=16)),
}
QUESTION = "What is in this picture?"
PEER = """
import sys, torch
from PIL import Image
from transformers import InstructBlipForConditionalGeneration as Model
model = Model.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
size = model.config.vision_config.image_size
image = torch.tensor(list(Image.open(sys.argv[2]).convert("RGB").resize((size, size)).tobytes()))
pixels = (image.view(1, size, size, 3).permute(0, 3, 1, 2) / 255 - 0.45) / 0.27
ids = torch.full((1, 32 + int(sys.argv[3])), 5)
ids[:, :32] = model.config.image_token_index
with torch.no_grad():
    model.generate(pixel_values=pixels.bfloat16(), input_ids=ids, qformer_input_ids=torch.full((1, 8), 5),
                   qformer_attention_mask=torch.ones(1, 8, dtype=torch.int64), max_new_tokens=1,
                   do_sample=False)
print("word", flush=True)
"""


@dataclass(frozen=True)
class Options:
    size: str = "full"
    folder: str = "out/bench"  # where the random weights are
    runs: int = 3              # of each side, alternately; the median counts

    def __post_init__(self):
        if self.size not in SIZES or self.runs < 1:
            raise InputError(f"--size={self.size} --runs={self.runs}: sizes are {', '.join(SIZES)}, runs at "
                             "least 1")


# ---- chat --------------------------------------------------------------------------------------------------


def random_parts(shapes: dict[str, tuple], path: Path, metadata: dict[str, str]):
    """A safetensors file of random bfloat16 tensors."""
    generator = torch.Generator().manual_seed(0)
    layout = {k: (torch.bfloat16, shape) for k, shape in shapes.items()}
    write_tensors(path, metadata, layout,
                  lambda k: random_weights.random_tensor(k, shapes[k], generator, torch.bfloat16))


def make_ours(folder: Path, size: str):
    """A run's folder that chat.py takes."""
    vision, qformer, llama = SIZES[size]
    folder.mkdir(parents=True)
    with torch.device("meta"):
        model = MiniGPT4(vision, qformer, llama)
    shapes = lambda part: {k: tuple(p.shape) for k, p in model.part_parameters(part).items()}
    for part, sizes in (("vision", vision), ("qformer", qformer), ("proj", None)):
        metadata = {"config": json.dumps(asdict(sizes))} if sizes else {}
        random_parts(shapes(part), folder / f"{part}.safetensors", metadata)
    (folder / "llama").mkdir()
    random_parts({k if k.startswith("lm_head") else f"model.{k}": s for k, s in shapes("llama").items()},
                 folder / "llama/model.safetensors", {"format": "pt"})
    (folder / "llama/config.json").write_text(json.dumps(llama.to_hub()))
    (folder / "llama/tokenizer.model").write_bytes(random_weights.made_up_tokenizer(llama.vocab_size, 0))
    files = {part: f"{part}.safetensors" for part in ("vision", "qformer", "proj")}
    (folder / "config.json").write_text(to_json(replace(Config(), **files, llama="llama", template="vicuna")))


def make_peer(folder: Path, size: str):
    """The same shapes as a folder of transformers' InstructBLIP."""
    from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration
    vision, qformer, llama = SIZES[size]
    config = InstructBlipConfig(
        vision_config=dict(hidden_size=vision.width, intermediate_size=vision.mlp_hidden,
                           num_hidden_layers=vision.n_layers, num_attention_heads=vision.n_heads,
                           image_size=vision.image_size, patch_size=vision.patch_size),
        qformer_config=dict(hidden_size=qformer.width, num_hidden_layers=qformer.n_layers,
                            num_attention_heads=qformer.n_heads, intermediate_size=qformer.ffn_hidden,
                            encoder_hidden_size=qformer.vision_width),
        text_config=dict(model_type="llama", **asdict(llama)),
        num_query_tokens=qformer.n_queries, image_token_index=llama.vocab_size - 1)
    with torch.device("meta"):
        model = InstructBlipForConditionalGeneration(config)
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    random_parts({k: tuple(t.shape) for k, t in model.state_dict().items() if t.is_floating_point()},
                 folder / "model.safetensors", {"format": "pt"})


def until_first_word(command: list[str]) -> tuple[float, float]:
    """Seconds from the start of a process to its first byte on stdout, and its peak memory so far in MiB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    first = process.stdout.read(1)
    seconds = time.perf_counter() - start
    if not first:
        error = process.communicate()[1].decode().strip().splitlines()
        raise InputError(f"{command[1]} failed: {error[-1] if error else 'no word on stdout'}")
    status = Path(f"/proc/{process.pid}/status").read_text()
    process.communicate()
    return seconds, int(status.split("VmHWM:")[1].split()[0]) / 1024


def bench_chat(options: Options) -> list[dict]:
    try:
        import transformers  # noqa: F401
    except ImportError as e:
        raise InputError("the benchmark needs the package transformers: pip install transformers") from e
    folder = Path(options.folder).resolve() / options.size
    for name, make in (("ours", make_ours), ("peer", make_peer)):
        if not (folder / name / "config.json").is_file():
            make(folder / name, options.size)
    message = user_message(QUESTION, 1)
    segments = chat_segments([(message, None)], TEMPLATES["vicuna"])  # the peer's prompt has as many tokens
    prompt = encode_segments(segments, Tokenizer(f"{folder}/ours/llama/tokenizer.model"), n_image_tokens=0)
    picture = str(folder / "picture.png")
    Image.effect_noise((640, 480), 80).convert("RGB").save(picture)
    ours = [sys.executable, "chat.py", picture, f"--ckpt={folder / 'ours'}", "--dtype=bfloat16",
            "--temperature=0", f"--prompt={QUESTION}", "--max_new_tokens=8"]
    peer = [sys.executable, "-c", PEER, str(folder / "peer"), picture, str(len(prompt))]
    weights = sum(p.stat().st_size for p in (folder / "ours").rglob("*.safetensors"))
    times, peaks = {"ours": [], "peer": []}, {"ours": [], "peer": []}
    for run in range(options.runs + 1):
        for name, command in (("ours", ours), ("peer", peer)):
            warm(folder / name)
            seconds, peak = until_first_word(command)
            print(f"{name} {run or 'warming up'}: {seconds:.2f} s, {peak:.0f} MiB", file=sys.stderr)
            if run:
                times[name].append(seconds)
                peaks[name].append(peak)
    median = lambda values: sorted(values)[len(values) // 2]
    a, b = median(times["ours"]), median(times["peer"])
    limit = read_seconds(weights)
    return [{"name": f"{options.size} bf16 first word", "unit": "1/s", "ours": 1 / a, "peer": 1 / b,
             "peer_name": "transformers InstructBLIP", "limit": 1 / limit, "vs_peer": b / a,
             "vs_limit": limit / a, "peak_mib": median(peaks["ours"]), "peer_peak_mib": median(peaks["peer"]),
             "weights_mib": weights / 2**20}]


def warm(folder: Path):
    """Read a folder's weights once, so that they are in the page cache if it can hold them."""
    for path in folder.rglob("*.safetensors"):
        with open(path, "rb") as f:
            while f.read(2**24):
                pass


def read_seconds(n_bytes: int) -> float:
    """How long it takes to read so many bytes from memory once, at the speed of a sum over 1 GiB."""
    block = torch.ones(2**28)
    block.sum()
    start = time.perf_counter()
    for _ in range(3):
        block.sum()
    return (time.perf_counter() - start) / 3 * n_bytes / 2**30


BENCHES = {"chat": (bench_chat, Options), "data": (bench_data.bench, bench_data.Options)}


def main(argv: list[str]):
    positional, given = parse_args(argv)
    if len(positional) != 1 or positional[0] not in BENCHES:
        raise InputError(f"usage: python tools/bench.py {'|'.join(BENCHES)} [--key=value ...]")
    bench, options = BENCHES[positional[0]]
    rows = bench(override(options(), given))
    rows = [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    print(json.dumps({"bench": positional[0], "device": "cpu", "rows": rows}))


if __name__ == "__main__":
    run_main(main)
