"""Speed and memory beside what a user would pick instead, both sides measured alternately in one run.

    python tools/bench.py data                  reading tar shards, beside the webdataset library
    python tools/bench.py train --size=small    a training step, beside the same step of transformers' BLIP-2
    python tools/bench.py chat --size=1.1b      answers, beside transformers and, where installed, llama.cpp

chat measures the first word from the start of Python, beside InstructBLIP; the language model's prompt and
decoding in bf16, int8 and int4, beside transformers' bf16 and llama.cpp's BF16, Q8_0 and Q4_0 (on a CPU, with
llama-cpp-python and gguf); a second question about a picture, beside the first; 8 pictures in a batch, beside
one at a time.

`limit` is PIL alone in as many workers (data), a large matrix product, so that vs_limit is the model FLOPs
utilization (train), one read of all weights from memory (first word). Random weights and pictures are made in
--folder on first use (1.1b: 13 GB, full: 50 GB). The last line is JSON, in which higher rates are better.
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
from functools import partial, reduce
from importlib.util import find_spec
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
from configs.prompts import IMAGE
from configs.schema import Config
from data import Batch, Samples, TrainingSteps, collate, open_samples
from llama import IGNORE, LlamaConfig, Tokenizer
from model import MiniGPT4
from plumbing.console import InputError
from plumbing.files import replacing
from plumbing.options import option
from plumbing.processes import peak_mib, pick_device
from plumbing.quantized import compile_rows
from plumbing.sources import Sample, index_tar, split_files
from plumbing.weights import DTYPES, PARTS, read_part
from qformer import QFormerConfig
from train import build, flops_per_position, make_optimizer, train_step
from vision import VisionConfig, load_image, normalize, preprocess

TOKENIZER = Tokenizer(str(ROOT / "assets/tiny/llama/tokenizer.model"))
SIDE, N_TOKENS, VOCAB, DATA_BATCH = 224, 32, 32_000, 64
PROMPT, ANSWER, CAPTION, CHAT_BATCH = (
    80,
    32,
    80,
    8,
)  # tokens, of chat's texts; pictures at a time
PICTURE, QUESTION = str(ROOT / "assets/tiny/example.png"), "What is in this picture?"
WAYS = {
    "bfloat16": "BF16",
    "bfloat16 compiled": "BF16",
    "int8": "Q8_0",
    "int4": "Q4_0",
}  # llama.cpp's types
HUB_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "num_key_value_heads",
)
SIZES = {  # these of the vision tower, the Q-Former and LLaMA; the last one only where it differs
    "small": ((64, 4, 4, 128), (48, 4, 4, 96), (64, 3, 4, 128)),
    "medium": ((768, 12, 12, 3072), (768, 12, 12, 3072), (1024, 12, 16, 2816)),
    "1.1b": (
        (1408, 39, 16, 6144),
        (768, 12, 12, 3072),
        (2048, 22, 32, 5632, 4),
    ),  # TinyLlama
    "full": ((1408, 39, 16, 6144), (768, 12, 12, 3072), (4096, 32, 32, 11008)),
}
PEER_NAMES = (  # a part of transformers' name -> of ours, replaced in this order
    ("vision_model.embeddings.", "vision."),
    ("vision_model.encoder.layers", "vision.blocks"),
    (".dense", ".out"),
    ("vision_model.post_layernorm", "bridge.ln_vision"),
    ("class_embedding", "cls_token"),
    ("layer_norm", "norm"),
    ("position_embedding", "pos_embed"),
    ("patch_embedding", "patch_embed.proj"),
    ("self_attn.qkv", "attn.qkv"),
    ("self_attn.projection", "attn.proj"),
    ("query_tokens", "bridge.query_tokens"),
    ("LayerNorm", "norm"),
    ("qformer.layernorm", "bridge.norm"),
    ("qformer.encoder.layer.", "bridge.layers."),
    ("intermediate_query.out", "fc1"),
    ("output_query.out", "fc2"),
    ("output_query.", ""),
    ("attention.output", "attention.attention"),
    ("crossattention.attention", "cross_attn"),
    ("attention.attention", "self_attn"),
    ("language_projection", "proj"),
    ("language_model.model", "llama"),
    ("language_model", "llama"),
)


@dataclass(frozen=True)
class Options:
    size: str = option(
        "",
        f"{', '.join(SIZES)}; none: medium (train), 1.1b (chat)",
        choices=("", *SIZES),
    )
    folder: str = option("out/bench", "where random weights and pictures are kept")
    device: str = option("", "none: cuda if there is one, else cpu")
    rounds: int = option(3, "in which the sides take turns; the median counts", least=1)
    steps: int = option(
        5, "train: timed steps per round; data: 8 times as many batches", least=1
    )
    batch_size: int = option(8, "train: pictures per step", least=1)
    dtype: str = option("bfloat16", "train: bfloat16 or float32", choices=DTYPES[:2])
    workers: int = option(2, "data: worker processes, at most 16", least=1, most=16)

    def __post_init__(self):
        schema.check_options(self)


def measure(
    rounds: int, name: str, units: dict, peer: str, sides: dict[str, tuple]
) -> list[dict]:
    """A row for each rate in `units`. The sides, (function, arguments...), take turns in new processes."""
    runs = {side: [] for side in sides}
    for _ in range(rounds):
        for side, call in sides.items():
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                runs[side].append(pool.submit(*call).result())
            print(f"{name}, {side}: {runs[side][-1]}", file=sys.stderr)
    medians = {
        side: {
            key: round(median(result[key] for result in results), 4)
            for key in results[0]
        }
        for side, results in runs.items()
    }
    others = {
        f"{side}_{key}".removeprefix("ours_"): value
        for side, found in medians.items()
        for key, value in found.items()
        if key not in units
    }  # "ours_loss" -> "loss", "peer_loss"
    return [
        dict(name=f"{name} {rate}".removesuffix(" rate"), unit=unit, peer_name=peer)
        | {side: found[rate] for side, found in medians.items()}
        | others
        | {
            f"vs_{side}": round(medians["ours"][rate] / found[rate], 4)
            for side, found in medians.items()
            if side != "ours"
        }
        for rate, unit in units.items()
    ]


def seconds(function: Callable, n: int = 3) -> float:
    """The mean of n calls, after two that do not count; a GPU has finished when the clock is read."""
    return (
        Timer("f()", globals={"f": function}, num_threads=torch.get_num_threads())
        .timeit(n)
        .mean
    )


def our_batches(
    folder: Path, workers: int, device: torch.device
) -> Iterator[torch.Tensor]:
    """Yield the normalized float32 pictures of each batch, on the device."""
    config = Config(data=str(folder), num_workers=workers, batch_size=DATA_BATCH)
    data = open_samples(config.data, config, TOKENIZER, SIDE, N_TOKENS)
    for _, _, (batch,) in TrainingSteps(*data, config).read():
        yield normalize(batch.to(device).images)


def peer_batches(
    folder: Path, workers: int, device: torch.device
) -> Iterator[torch.Tensor]:
    """The same as in webdataset's examples, where the workers normalize each picture."""
    import webdataset

    samples = Samples([], Config(), TOKENIZER, SIDE, N_TOKENS)
    data = webdataset.WebDataset(
        f"{folder}/{{00000..00015}}.tar", shardshuffle=16
    ).shuffle(1000)
    data = (
        data.decode("pilrgb")
        .to_tuple("jpg", "json")
        .map(
            lambda row: (
                [normalize(preprocess(row[0], SIDE))],
                *samples.tokenize(Sample([""], row[1]["caption"]), None),
            )
        )
    )
    data = data.batched(DATA_BATCH, collate).repeat()
    for batch in webdataset.WebLoader(data, batch_size=None, num_workers=workers):
        yield batch.to(device).images


def pil_alone(folder: Path, workers: int, device: torch.device) -> Iterator[None]:
    """Decode and resize pictures that are in memory; the workers send nothing."""
    encoded = [
        split_files(files)[0].read()
        for path in folder.glob("*.tar")
        for _, files in index_tar(str(path))
    ]
    yield from DataLoader(
        encoded * 1000,
        DATA_BATCH,
        num_workers=workers,
        collate_fn=lambda batch: (
            [preprocess(Image.open(io.BytesIO(picture)), SIDE) for picture in batch]
            and None
        ),
    )


def read_data(
    side: Callable, n: int, folder: Path, workers: int, device: torch.device
) -> dict:
    """Pictures per second over n batches, once the workers are busy."""
    set_start_method(
        "fork", force=True
    )  # of the workers; a spawned process would spawn
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
            with webdataset.ShardWriter(
                f"{folder}/%05d.tar", maxcount=32, verbose=0
            ) as shards:
                for i in range(512):
                    noise = Image.effect_noise((width // 6, height // 6), 90).convert(
                        "RGB"
                    )
                    noise.resize((width, height)).save(
                        jpg := io.BytesIO(), "JPEG", quality=90
                    )
                    shards.write(
                        {
                            "__key__": f"{i}",
                            "jpg": jpg.getvalue(),
                            "json": {"caption": "a red fox"},
                        }
                    )
        sides = {"ours": our_batches, "peer": peer_batches, "limit": pil_alone}
        yield (
            f"{width}x{height} w{options.workers}",
            {"rate": "images/s"},
            "webdataset",
            {
                side: (
                    read_data,
                    batches,
                    8 * options.steps,
                    folder,
                    options.workers,
                    device,
                )
                for side, batches in sides.items()
            },
        )


def random_weights(options: Options, kind: str) -> tuple[Path, Path]:
    """A run's folder with random weights, made on first use, and the same for a model of transformers."""
    import transformers

    ours, peer = (
        Path(options.folder).resolve() / options.size / name for name in ("ours", kind)
    )
    vision, qformer, llama = (
        dict(zip(HUB_SIZES, sizes)) for sizes in SIZES[options.size]
    )
    qformer["encoder_hidden_size"] = vision["hidden_size"]
    if not (ours / "config.json").is_file():
        ours.mkdir(parents=True, exist_ok=True)
        with torch.device("meta"):
            model = MiniGPT4(
                VisionConfig(SIDE, 14, *vision.values()),
                QFormerConfig(N_TOKENS, *qformer.values()),
                LlamaConfig.from_dict(llama | {"vocab_size": VOCAB}),
            ).bfloat16()
        model.tokenizer = TOKENIZER
        for name in PARTS:
            model.init_part(name)
            # chat is to say whole pieces of text: no bytes, and no ids beyond the tokenizer's
            model.llama.lm_head.weight.data[
                [*range(259), *range(TOKENIZER.vocab_size, VOCAB)]
            ] = 0
            model.save_part(name, str(ours), "bfloat16")
        files = {name: f"{name}.safetensors" for name in ("vision", "qformer", "proj")}
        (ours / "config.json").write_text(
            schema.to_json(Config(**files, llama="llama", template="vicuna"))
        )
    if not (peer / "model.safetensors").is_file():
        config = getattr(transformers, f"{kind}Config")(
            vision_config=vision,
            qformer_config=qformer,
            num_query_tokens=N_TOKENS,
            text_config=llama | {"model_type": "llama"},
            image_token_index=VOCAB - 1,
        )
        with torch.device("meta"):
            model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
        named = dict(
            MiniGPT4.from_files(
                **schema.read_saved_config(str(ours)).parts()
            ).named_parameters()
        )
        for k in [
            k for k in named if k.endswith("q_bias")
        ]:  # theirs is one bias, with zeros for the keys
            q_bias, v_bias = named[k], named[k.replace("q_bias", "v_bias")]
            named[k.replace("q_bias", "qkv.bias")] = torch.cat(
                (q_bias, torch.zeros_like(q_bias), v_bias)
            )
        names = {
            k: reduce(lambda name, pair: name.replace(*pair), PEER_NAMES, k)
            for k in model.state_dict()
        }
        model.load_state_dict(
            {
                k: (
                    named[names[k]] if names[k] in named else torch.randn(t.shape)
                ).bfloat16()
                for k, t in model.state_dict().items()
            },
            assign=True,
        )
        model.save_pretrained(peer)
    return ours, peer


def random_batch(n: int) -> Batch:
    """n times a picture with a caption of 12 tokens."""
    torch.manual_seed(0)
    caption = torch.randint(3, VOCAB - 1, (12,)).tolist()
    image = torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8)
    return collate(
        [
            (
                [image],
                [1] + [IMAGE] * N_TOKENS + caption,
                [IGNORE] * (1 + N_TOKENS) + caption,
            )
        ]
        * n
    )


def our_step(config: Config, device: torch.device) -> Callable:
    """A function that makes train.py's step and returns the loss."""
    model, batch = build(config, device), random_batch(config.batch_size)
    optimizer = make_optimizer(dict(model.proj.named_parameters()), config)
    scaler = torch.amp.GradScaler(enabled=False)
    return lambda: (
        train_step(model, [batch], optimizer, scaler, lr=1e-4) / batch.n_targets
    )


def peer_step(config: Config, device: torch.device) -> Callable:
    """The same of transformers' BLIP-2, eager, as users get it."""
    from transformers import Blip2ForConditionalGeneration

    dtype, batch = getattr(torch, config.dtype), random_batch(config.batch_size)
    model = (
        Blip2ForConditionalGeneration.from_pretrained(config.out_dir, dtype=dtype)
        .to(device)
        .eval()
    )
    model.requires_grad_(False).language_projection.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.language_projection.parameters(), lr=1e-4)

    def step():
        images, tokens, targets = batch.to(device)
        tokens = tokens.where(tokens != IMAGE, VOCAB - 1)
        loss = model(
            pixel_values=normalize(images).to(dtype), input_ids=tokens, labels=targets
        ).loss
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
    per_picture, per_token = flops_per_position(
        MiniGPT4.from_files(**config.parts()), config.trainable
    )
    return {
        "rate": 2
        * n**3
        / seconds(lambda: a @ a)
        / (per_picture + per_token * random_batch(1).n_tokens)
    }


def bench_train(options: Options, device: torch.device) -> Iterator[tuple]:
    ours, peer = random_weights(options, "Blip2")
    config = replace(
        schema.read_saved_config(str(ours)),
        dtype=options.dtype,
        batch_size=options.batch_size,
        max_steps=options.steps,
        out_dir=str(peer),
    )
    name = f"{options.size} {options.dtype.replace('loat', '')} b{options.batch_size}"  # "medium bf16 b8"
    for way, on in {
        "": {},
        "compiled": {"compile": True},
        "checkpointed": {"grad_checkpoint": True},
    }.items():
        yield (
            f"{name} {way}".strip(),
            {"rate": "images/s"},
            "transformers BLIP-2",
            {
                "ours": (run_steps, our_step, replace(config, **on), device),
                "peer": (run_steps, peer_step, config, device),
                "limit": (matmul_alone, config, device),
            },
        )


def first_word(ours: bool, folder: Path, device: torch.device) -> dict:
    """From the start of this process, less the time of reading the weights into the page cache."""
    started = int(Path("/proc/self/stat").read_text().split()[21]) / os.sysconf(
        "SC_CLK_TCK"
    )
    imports = time.clock_gettime(time.CLOCK_BOOTTIME) - started
    subprocess.run(["cat", *folder.rglob("*.safetensors")], stdout=subprocess.DEVNULL)
    start = time.perf_counter()
    if ours:
        options = chat.Options(
            ckpt=str(folder), device=device.type, dtype="bfloat16", temperature=0.0
        )
        talk = chat.Chat(*chat.load(options))
        talk.add_image(PICTURE)
        next(talk.ask(QUESTION))
    else:
        from transformers import InstructBlipForConditionalGeneration

        model = InstructBlipForConditionalGeneration.from_pretrained(
            folder, dtype=torch.bfloat16
        ).to(device)
        pixels = normalize(load_image(PICTURE, SIDE)[None].to(device)).bfloat16()
        ids = torch.tensor(
            [[VOCAB - 1] * N_TOKENS + [5] * 52], device=device
        )  # as long as our prompt
        model.generate(
            pixel_values=pixels,
            input_ids=ids,
            qformer_input_ids=ids[:, -8:],
            max_new_tokens=1,
        )
    return {
        "rate": 1 / (imports + time.perf_counter() - start),
        "peak_mib": peak_mib(device),
    }


def memory_alone(folder: Path) -> dict:
    """How often the weights can be read per second, at the speed of a sum over 1 GiB."""
    n_bytes = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    return {"rate": 2**30 / n_bytes / seconds(torch.ones(2**28).sum)}


def gguf_file(folder: Path, kind: str) -> Path:
    """LLaMA for llama.cpp, made on first use. The output matrix of Q4_0 is Q8_0, as int4's is int8."""
    import gguf

    if not (path := folder / f"{kind}.gguf").is_file():
        file = read_part("llama", str(folder), LlamaConfig.from_dict)
        tensors, sizes = file.tensors, file.sizes
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, sizes.num_hidden_layers)
        with replacing(path) as temporary:
            writer = gguf.GGUFWriter(temporary, "llama")
            writer.add_context_length(sizes.max_position_embeddings)
            writer.add_embedding_length(sizes.hidden_size)
            writer.add_block_count(sizes.num_hidden_layers)
            writer.add_feed_forward_length(sizes.intermediate_size)
            writer.add_head_count(sizes.num_attention_heads)
            writer.add_head_count_kv(sizes.num_key_value_heads)
            writer.add_layer_norm_rms_eps(sizes.rms_norm_eps)
            writer.add_vocab_size(sizes.vocab_size)
            writer.add_tokenizer_model("no_vocab")
            for k, t in tensors.items():
                if k.endswith(
                    ("q_proj.weight", "k_proj.weight")
                ):  # it rotates neighbors, not halves
                    t = (
                        t.unflatten(0, (-1, 2, sizes.head_dim // 2))
                        .transpose(1, 2)
                        .flatten(0, 2)
                    )
                q = kind if k.startswith("layers") else kind.replace("4", "8")
                q = gguf.GGMLQuantizationType["F32" if t.dim() == 1 else q]
                name = names.get_name(
                    k if k == "lm_head.weight" else f"model.{k}", (".weight",)
                )
                writer.add_tensor(
                    name, gguf.quants.quantize(t.float().numpy(), q), raw_dtype=q
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
    return path


def our_answer(
    folder: Path, way: str, ids: list[int], device: torch.device
) -> Callable:
    """A function of n that answers `ids` greedily with n tokens."""
    dtype, *compiled = way.split()
    model = MiniGPT4.from_files(
        None, None, str(folder), dtype=dtype, device=device.type
    )
    if compiled:
        compile_rows(model.llama)
    return lambda n: [
        *model.generate(ids, max_new_tokens=n, temperature=0, min_length=n + 1)
    ]


def peer_answer(
    folder: Path, way: str, ids: list[int], device: torch.device
) -> Callable:
    from transformers import LlamaForCausalLM

    model = (
        LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    )
    tokens = torch.tensor([ids], device=device)
    return lambda n: model.generate(
        tokens, do_sample=False, min_new_tokens=n, max_new_tokens=n
    ).tolist()


def llamacpp_answer(
    path: Path, way: str, ids: list[int], device: torch.device
) -> Callable:
    """The same, but the n tokens are given: nothing is sampled."""
    from llama_cpp import Llama

    threads = torch.get_num_threads()
    model = Llama(
        str(path), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    return lambda n: [
        model.reset(),
        *(model.eval(new) for new in [ids] + [[5]] * (n - 1)),
    ]


def answers(
    make_answer: Callable, folder: Path, way: str, units: dict, device: torch.device
) -> dict:
    """prompt: 1/s until the first token; decode: tokens/s after it."""
    ids = torch.randint(
        3, VOCAB, (PROMPT,), generator=torch.Generator().manual_seed(0)
    ).tolist()
    answer = make_answer(folder, way, ids, device)
    first, all_tokens = (seconds(partial(answer, n), 2) for n in (1, 1 + ANSWER))
    rates = {"prompt": 1 / first, "decode": ANSWER / (all_tokens - first)}
    return {k: rates[k] for k in units} | {"peak_mib": peak_mib(device)}


def last_turn(n: int, folder: Path, device: torch.device) -> dict:
    """1/s until the first token of the n-th answer about a picture; the first one waits for its encoding."""
    talk = chat.Chat(
        *chat.load(
            chat.Options(
                ckpt=str(folder),
                device=device.type,
                dtype="bfloat16",
                temperature=0.0,
                max_new_tokens=ANSWER,
            )
        )
    )
    for _ in range(2):  # the first conversation does not count
        talk.reset()
        start = time.perf_counter()
        talk.add_image(PICTURE)
        for _ in range(n):
            waited = time.perf_counter() - start
            "".join(talk.ask(QUESTION))
            waited += talk.stats["first_word_s"]
            talk.remember()
            start = time.perf_counter()
    return {"rate": 1 / waited, "peak_mib": peak_mib(device)}


def describe(at_once: int, folder: Path, dtype: str, device: torch.device) -> dict:
    """Pictures per minute, with CAPTION tokens about each."""
    config = schema.read_saved_config(str(folder))
    model = MiniGPT4.from_files(**config.parts(), dtype=dtype, device=device.type)
    pictures = random_batch(CHAT_BATCH).images.to(device)
    prompt = [1] + [IMAGE] * N_TOKENS + [5] * (PROMPT - 1 - N_TOKENS)

    @torch.no_grad()
    def answer(images, n):
        return model.generate_batch(
            [prompt] * len(images),
            model.encode_image(images),
            max_new_tokens=n,
            temperature=0,
            min_length=n + 1,
        )

    answer(pictures[:at_once], 2)
    start = time.perf_counter()
    for images in pictures.split(at_once):
        answer(images, CAPTION)
    return {
        "rate": 60 * CHAT_BATCH / (time.perf_counter() - start),
        "peak_mib": peak_mib(device),
    }


def bench_chat(options: Options, device: torch.device) -> Iterator[tuple]:
    ours, peer = random_weights(options, "InstructBlip")
    yield (
        f"{options.size} first word",
        {"rate": "1/s"},
        "transformers InstructBLIP",
        {
            "ours": (first_word, True, ours, device),
            "peer": (first_word, False, peer, device),
            "limit": (memory_alone, ours),
        },
    )
    for way, kind in WAYS.items():
        if device.type == "cuda" and "compiled" in way:
            continue  # --compile is for CPUs
        units = {"decode": "tokens/s"} | (
            {} if "compiled" in way else {"prompt": "1/s"}
        )
        sides = {
            side: (answers, answer, ours / "llama", way, units, device)
            for side, answer in (("ours", our_answer), ("peer", peer_answer))
        }
        if device.type == "cpu" and find_spec("llama_cpp") and find_spec("gguf"):
            file = gguf_file(ours / "llama", kind)
            sides["llamacpp"] = (answers, llamacpp_answer, file, way, units, device)
        yield (
            f"{options.size} {way.replace('loat', '')}",
            units,
            "transformers bf16",
            sides,
        )
    yield (
        f"{options.size} second turn",
        {"rate": "1/s"},
        "its first turn",
        {"ours": (last_turn, 2, ours, device), "peer": (last_turn, 1, ours, device)},
    )
    for dtype, name in (("bfloat16", "batch 8"), ("int8", "int8 batch 8")):
        yield (
            f"{options.size} {name}",
            {"rate": "pictures/min"},
            "one at a time",
            {
                "ours": (describe, CHAT_BATCH, ours, dtype, device),
                "peer": (describe, 1, ours, dtype, device),
            },
        )


def main(argv: list[str]):
    benches = {"data": bench_data, "train": bench_train, "chat": bench_chat}
    (name,), given = schema.parse_args(argv, __doc__, "|".join(benches), Options)
    bench, options = (
        benches[schema.check_name(name, benches, "bench")],
        schema.override(Options(), given),
    )
    options = replace(
        options, size=options.size or ("1.1b" if name == "chat" else "medium")
    )
    os.environ.setdefault(
        "THP_MEM_ALLOC_ENABLE", "1"
    )  # before anything is allocated, as train.py does
    device = pick_device(options.device)
    label = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    try:
        rows = [
            row
            for rows in bench(options, device)
            for row in measure(options.rounds, *rows)
        ]
    except ModuleNotFoundError as e:
        raise InputError(
            f"this benchmark needs the package {e.name}: pip install {e.name}"
        ) from e
    print(json.dumps({"bench": name, "device": label, "rows": rows}))


if __name__ == "__main__":
    schema.run_main(main)
