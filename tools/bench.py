"""Speed and memory beside what a user would pick instead, both sides measured alternately in one run.

    python tools/bench.py data                  reading tar shards, beside the webdataset library
    python tools/bench.py train --size=small    a training step, beside the same step of transformers' BLIP-2
    python tools/bench.py chat --size=full      until the first word, beside transformers' InstructBLIP

`limit` is PIL alone in as many workers (data), a large matrix product, so that vs_limit is the model FLOPs
utilization (train), one read of all weights from memory (chat). Random weights and pictures are made in
--folder on first use (full: 32 GB). The last line is JSON, in which higher rates are better.
"""

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import reduce
from multiprocessing import get_context, set_start_method
from pathlib import Path
from statistics import median

import torch
from PIL import Image
from torch.utils.benchmark import Timer
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import chat
from configs import schema
from configs.schema import Config, InputError, option
from data import Batch, Groups, Reader, Sample, Samples, collate, index_tar, open_samples
from llama import IGNORE, IMAGE, LlamaConfig, Tokenizer
from model import PARTS, MiniGPT4, pick_device
from qformer import QFormerConfig
from train import build, flops_per_position, make_optimizer, train_step
from vision import VisionConfig, load_image, normalize, preprocess

TOKENIZER = Tokenizer(str(ROOT / "assets/tiny/llama/tokenizer.model"))
SIDE, N_TOKENS, VOCAB, DATA_BATCH = 224, 32, 32_000, 64
HUB_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
SIZES = {  # these four of the vision tower, the Q-Former and LLaMA
    "small": ((64, 4, 4, 128), (48, 4, 4, 96), (64, 3, 4, 128)),
    "medium": ((768, 12, 12, 3072), (768, 12, 12, 3072), (1024, 12, 16, 2816)),
    "full": ((1408, 39, 16, 6144), (768, 12, 12, 3072), (4096, 32, 32, 11008)),
}
PEER_NAMES = (  # a part of transformers' name -> of ours, replaced in this order
    ("vision_model.embeddings.", "vision."), ("vision_model.encoder.layers", "vision.blocks"),
    (".dense", ".out"), ("vision_model.post_layernorm", "bridge.ln_vision"), ("class_embedding", "cls_token"),
    ("layer_norm", "norm"), ("position_embedding", "pos_embed"), ("patch_embedding", "patch_embed.proj"),
    ("self_attn.qkv", "attn.qkv"), ("self_attn.projection", "attn.proj"),
    ("query_tokens", "bridge.query_tokens"), ("LayerNorm", "norm"), ("qformer.layernorm", "bridge.norm"),
    ("qformer.encoder.layer.", "bridge.layers."), ("intermediate_query.out", "fc1"),
    ("output_query.out", "fc2"), ("output_query.", ""), ("attention.output", "attention.attention"),
    ("crossattention.attention", "cross_attn"), ("attention.attention", "self_attn"),
    ("language_projection", "proj"), ("language_model.model", "llama"), ("language_model", "llama"))


@dataclass(frozen=True)
class Options:
    size: str = option("medium", f"train, chat: {', '.join(SIZES)}, of the model", choices=tuple(SIZES))
    folder: str = option("out/bench", "where random weights and pictures are kept")
    device: str = option("", "none: cuda if there is one, else cpu")
    rounds: int = option(3, "in which the sides take turns; the median counts", least=1)
    steps: int = option(5, "train: timed steps per round; data: 8 times as many batches", least=1)
    batch_size: int = option(8, "train: pictures per step", least=1)
    dtype: str = option("bfloat16", "train: bfloat16 or float32", choices=schema.DTYPES[:2])
    workers: int = option(2, "data: worker processes, at most 16", least=1, most=16)

    def __post_init__(self):
        schema.check_options(self)


def measure(rounds: int, name: str, unit: str, peer: str, *calls: tuple) -> dict:
    """A row of the result. Ours, peer and limit, (function, arguments...), take turns, in new processes."""
    runs, row = {side: [] for side in ("ours", "peer", "limit")}, dict(name=name, unit=unit, peer_name=peer)
    for _ in range(rounds):
        for side, call in zip(runs, calls):
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                runs[side].append(pool.submit(*call).result())
            print(f"{name}, {side}: {runs[side][-1]}", file=sys.stderr)
    for side, results in runs.items():  # "ours_rate" -> "ours", "ours_loss" -> "loss", "peer_loss"
        row |= {f"{side}_{key}".removesuffix("_rate").removeprefix("ours_"):
                round(median(result[key] for result in results), 4) for key in results[0]}
    return row | {f"vs_{side}": round(row["ours"] / row[side], 4) for side in ("peer", "limit")}


def seconds(function: Callable, n: int = 3) -> float:
    """The mean of n calls, after two that do not count; a GPU has finished when the clock is read."""
    return Timer("f()", globals={"f": function}, num_threads=torch.get_num_threads()).timeit(n).mean


def peak_mib(device: torch.device) -> float:
    """The peak of this process's tensors on a GPU, or of its resident memory."""
    return (torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else
            int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024)


def our_batches(folder: Path, workers: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Yield the normalized float32 pictures of each batch, on the device."""
    config = Config(data=str(folder), num_workers=workers, batch_size=DATA_BATCH)
    for _, (batch,) in Reader(Groups(*open_samples(config.data, config, TOKENIZER, SIDE, N_TOKENS), config)):
        yield normalize(batch.to(device).images)


def peer_batches(folder: Path, workers: int, device: torch.device) -> Iterator[torch.Tensor]:
    """The same as in webdataset's examples, where the workers normalize each picture."""
    import webdataset
    samples = Samples([], Config(), TOKENIZER, SIDE, N_TOKENS)
    data = webdataset.WebDataset(f"{folder}/{{00000..00015}}.tar", shardshuffle=16).shuffle(1000)
    data = data.decode("pilrgb").to_tuple("jpg", "json").map(lambda row: (
        [normalize(preprocess(row[0], SIDE))], *samples.tokenize(Sample([""], row[1]["caption"]), None)))
    data = data.batched(DATA_BATCH, collate).repeat()
    for batch in webdataset.WebLoader(data, batch_size=None, num_workers=workers):
        yield batch.to(device).images


def pil_alone(folder: Path, workers: int, device: torch.device) -> Iterator[None]:
    """Decode and resize pictures that are in memory; the workers send nothing."""
    encoded = [picture.read() for path in folder.glob("*.tar") for _, picture, _, _ in index_tar(str(path))]
    yield from DataLoader(encoded * 1000, DATA_BATCH, num_workers=workers, collate_fn=lambda batch: [
        preprocess(Image.open(io.BytesIO(picture)), SIDE) for picture in batch] and None)


def read_data(side: Callable, n: int, folder: Path, workers: int, device: torch.device) -> dict:
    """Pictures per second over n batches, once the workers are busy."""
    set_start_method("fork", force=True)  # of the workers; a spawned process would spawn
    torch.set_num_threads(1)
    batches = side(folder, workers, device)
    seconds(batches.__next__, 2 * workers)
    return {"rate": DATA_BATCH / seconds(batches.__next__, n)}


def bench_data(options: Options, device: torch.device) -> Iterator[tuple]:
    """A row for each size of pictures; they are noise as coarse as a photograph's details, in 16 shards."""
    import webdataset
    for width, height in ((224, 224), (640, 480)):
        folder = Path(options.folder) / f"{width}x{height}"
        if not (folder / "00015.tar").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with webdataset.ShardWriter(f"{folder}/%05d.tar", maxcount=32, verbose=0) as shards:
                for i in range(512):
                    noise = Image.effect_noise((width // 6, height // 6), 90).convert("RGB")
                    noise.resize((width, height)).save(jpg := io.BytesIO(), "JPEG", quality=90)
                    shards.write({"__key__": f"{i}", "jpg": jpg.getvalue(), "json": {"caption": "a red fox"}})
        yield (f"{width}x{height} w{options.workers}", "images/s", "webdataset",
               *((read_data, side, 8 * options.steps, folder, options.workers, device)
                 for side in (our_batches, peer_batches, pil_alone)))


def random_weights(options: Options, kind: str) -> tuple[Path, Path]:
    """A run's folder with random weights, made on first use, and the same for a model of transformers."""
    import transformers
    ours, peer = (Path(options.folder).resolve() / options.size / name for name in ("ours", kind))
    vision, qformer, llama = (dict(zip(HUB_SIZES, sizes)) for sizes in SIZES[options.size])
    qformer["encoder_hidden_size"] = vision["hidden_size"]
    if not (ours / "config.json").is_file():
        ours.mkdir(parents=True, exist_ok=True)
        with torch.device("meta"):
            model = MiniGPT4(
                VisionConfig(SIDE, 14, *vision.values()), QFormerConfig(N_TOKENS, *qformer.values()),
                LlamaConfig.from_dict(llama | {"vocab_size": VOCAB})).bfloat16()
        model.tokenizer = TOKENIZER
        for name in PARTS:
            model.init_part(name, "cpu")
            # chat is to say whole pieces of text: no bytes, and no ids beyond the tokenizer's
            model.llama.lm_head.weight.data[[*range(259), *range(TOKENIZER.vocab_size, VOCAB)]] = 0
            model.save_part(name, str(ours), "bfloat16")
        files = {name: f"{name}.safetensors" for name in ("vision", "qformer", "proj")}
        (ours / "config.json").write_text(schema.to_json(Config(**files, llama="llama", template="vicuna")))
    if not (peer / "model.safetensors").is_file():
        config = getattr(transformers, f"{kind}Config")(
            vision_config=vision, qformer_config=qformer, num_query_tokens=N_TOKENS,
            text_config=llama | {"model_type": "llama"}, image_token_index=VOCAB - 1)
        with torch.device("meta"):
            model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
        named = dict(MiniGPT4.from_files(**schema.read_saved_config(str(ours)).parts()).named_parameters())
        for k in [k for k in named if k.endswith("q_bias")]:  # theirs is one bias, with zeros for the keys
            q_bias, v_bias = named[k], named[k.replace("q_bias", "v_bias")]
            named[k.replace("q_bias", "qkv.bias")] = torch.cat((q_bias, torch.zeros_like(q_bias), v_bias))
        names = {k: reduce(lambda name, pair: name.replace(*pair), PEER_NAMES, k) for k in model.state_dict()}
        model.load_state_dict({k: (named[names[k]] if names[k] in named else torch.randn(t.shape)).bfloat16()
                               for k, t in model.state_dict().items()}, assign=True)
        model.save_pretrained(peer)
    return ours, peer


def random_batch(n: int) -> Batch:
    """n times a picture with a caption of 12 tokens."""
    torch.manual_seed(0)
    caption = torch.randint(3, VOCAB - 1, (12,)).tolist()
    image = torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8)
    return collate([([image], [1] + [IMAGE] * N_TOKENS + caption, [IGNORE] * (1 + N_TOKENS) + caption)] * n)


def our_step(config: Config, device: torch.device) -> Callable:
    """A function that makes train.py's step and returns the loss."""
    model, batch = build(config, device), random_batch(config.batch_size)
    optimizer = make_optimizer(dict(model.proj.named_parameters()), config)
    scaler = torch.amp.GradScaler(enabled=False)
    return lambda: train_step(model, [batch], optimizer, scaler, lr=1e-4) / batch.n_targets


def peer_step(config: Config, device: torch.device) -> Callable:
    """The same of transformers' BLIP-2, eager, as users get it."""
    from transformers import Blip2ForConditionalGeneration
    dtype, batch = getattr(torch, config.dtype), random_batch(config.batch_size)
    model = Blip2ForConditionalGeneration.from_pretrained(config.out_dir, dtype=dtype).to(device).eval()
    model.requires_grad_(False).language_projection.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.language_projection.parameters(), lr=1e-4)

    def step():
        images, tokens, targets = batch.to(device)
        tokens = tokens.where(tokens != IMAGE, VOCAB - 1)
        loss = model(pixel_values=normalize(images).to(dtype), input_ids=tokens, labels=targets).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss
    return step


def run_steps(make_step: Callable, config: Config, device: torch.device) -> dict:
    """Pictures per second, the loss of the first step, peak memory."""
    step = make_step(config, device)
    loss, rate = step().item(), config.batch_size / seconds(step, config.max_steps)
    return {"rate": rate, "loss": loss, "peak_mib": peak_mib(device)}


def matmul_alone(config: Config, device: torch.device) -> dict:
    """Pictures per second if a step were one large matrix product of as many FLOPs."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(getattr(torch, config.dtype))
    per_picture, per_token = flops_per_position(MiniGPT4.from_files(**config.parts()), config.trainable)
    return {"rate": 2 * n**3 / seconds(lambda: a @ a) / (per_picture + per_token * random_batch(1).n_tokens)}


def bench_train(options: Options, device: torch.device) -> Iterator[tuple]:
    ours, peer = random_weights(options, "Blip2")
    config = replace(schema.read_saved_config(str(ours)), dtype=options.dtype, batch_size=options.batch_size,
                     max_steps=options.steps, out_dir=str(peer))
    name = f"{options.size} {options.dtype.replace('loat', '')} b{options.batch_size}"  # "medium bf16 b8"
    for way, on in {"": {}, "compiled": {"compile": True}, "checkpointed": {"grad_checkpoint": True}}.items():
        yield (f"{name} {way}".strip(), "images/s", "transformers BLIP-2",
               (run_steps, our_step, replace(config, **on), device), (run_steps, peer_step, config, device),
               (matmul_alone, config, device))


def first_word(ours: bool, folder: Path, device: torch.device) -> dict:
    """From the start of this process, less the time of reading the weights into the page cache."""
    started = int(Path("/proc/self/stat").read_text().split()[21]) / os.sysconf("SC_CLK_TCK")
    imports = time.clock_gettime(time.CLOCK_BOOTTIME) - started
    subprocess.run(["cat", *folder.rglob("*.safetensors")], stdout=subprocess.DEVNULL)
    start, picture = time.perf_counter(), str(ROOT / "assets/tiny/example.png")
    if ours:
        options = chat.Options(ckpt=str(folder), device=device.type, dtype="bfloat16", temperature=0.0)
        talk = chat.Chat(*chat.load(options))
        talk.add_image(picture)
        next(talk.ask("What is in this picture?"))
    else:
        from transformers import InstructBlipForConditionalGeneration
        model = InstructBlipForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).to(device)
        pixels = normalize(load_image(picture, SIDE)[None].to(device)).bfloat16()
        ids = torch.tensor([[VOCAB - 1] * N_TOKENS + [5] * 52], device=device)  # as long as our prompt
        model.generate(pixel_values=pixels, input_ids=ids, qformer_input_ids=ids[:, -8:], max_new_tokens=1)
    return {"rate": 1 / (imports + time.perf_counter() - start), "peak_mib": peak_mib(device)}


def memory_alone(folder: Path) -> dict:
    """How often the weights can be read per second, at the speed of a sum over 1 GiB."""
    n_bytes = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    return {"rate": 2**30 / n_bytes / seconds(torch.ones(2**28).sum)}


def bench_chat(options: Options, device: torch.device) -> Iterator[tuple]:
    ours, peer = random_weights(options, "InstructBlip")
    yield (f"{options.size} bf16 first word", "1/s", "transformers InstructBLIP",
           (first_word, True, ours, device), (first_word, False, peer, device), (memory_alone, ours))


def main(argv: list[str]):
    benches = {"data": bench_data, "train": bench_train, "chat": bench_chat}
    (name,), given = schema.parse_args(argv, __doc__, "|".join(benches), Options)
    bench, options = benches[schema.check_name(name, benches, "bench")], schema.override(Options(), given)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # before anything is allocated, as train.py does
    device = pick_device(options.device)
    label = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    try:
        rows = [measure(options.rounds, *row) for row in bench(options, device)]
    except ModuleNotFoundError as e:
        raise InputError(f"this benchmark needs the package {e.name}: pip install {e.name}") from e
    print(json.dumps({"bench": name, "device": label, "rows": rows}))


if __name__ == "__main__":
    schema.run_main(main)
