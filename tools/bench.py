"""Compare speed and memory with the usual alternatives, side by side in one run.

        python tools/bench.py data                  reading tar shards: webdataset
    python tools/bench.py train --size=small    a training step: transformers' BLIP-2
    python tools/bench.py chat --size=1.1b      answers: transformers and llama.cpp

chat compares
    the first word, from the start of Python     with InstructBLIP
    prompt and decoding in bf16, int8 and int4   with transformers' bf16 and, on a CPU
        with llama-cpp-python and gguf, with llama.cpp's BF16, Q8_0 and Q4_0
    a second question about an image             with the first
    8 images in a batch                          with one at a time

`limit` is an upper bound: PIL alone with as many workers (data), a large matrix product
(train), or one read of all weights from memory (first word, decoding). vs_limit is ours
divided by it. peak_mib is the peak memory of the process; above limit_peak_mib there is
a warning. Random weights and images are generated in --folder on first use (1.1b: 13
GB; full: 50 GB, and 40 GB of memory). The last line is JSON; higher rates are better.
"""

import io
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import inf
from multiprocessing import get_context, set_start_method
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from PIL import Image
from torch.utils.benchmark import Timer
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import chat
from configs.prompts import IMAGE
from configs.schema import Config, read_saved_config
from data import Samples, TrainingSteps, collate, open_samples
from llama import IGNORE, LlamaConfig, Tokenizer
from model import MiniGPT4
from plumbing.console import InputError, note, run_main
from plumbing.files import replacing
from plumbing.options import check_name, option, read_options, to_json
from plumbing.processes import peak_mib, pick_device
from plumbing.sources import Sample, index_tar, split_files
from plumbing.weights import PARTS, hub_name, read_hub_folder
from qformer import QFormerConfig
from train import build, make_optimizer, train_step
from vision import VisionConfig, load_image, normalize, preprocess

# Each side is a function that runs in a new process. `device` is a torch.device,
# `folder` a Path.

TINY = Path(chat.__file__).parent / "assets/tiny"
TOKENIZER = Tokenizer(f"{TINY}/llama/tokenizer.model")
SIDE, N_TOKENS, VOCAB = 224, 32, 32_000  # pixels, IMAGE ids per picture, ids
DATA_BATCH, CHAT_BATCH = 64, 8  # pictures
PROMPT, ANSWER, CAPTION = 80, 32, 24  # tokens, of chat's texts
PICTURE, QUESTION = f"{TINY}/example.png", "What is in this picture?"
WAYS = {  # of holding LLaMA's weights, and the same for llama.cpp
    "bfloat16": "BF16",
    "int8": "Q8_0",
    "int4": "Q4_0",
}
BYTES = {"bfloat16": 2, "int8": 1, "int4": 0.5 + 4 / 64}  # of a weight with its scale
HUB_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "num_key_value_heads",
)
EVA_VIT_G = (1408, 39, 16, 6144)
BLIP2_QFORMER = (768, 12, 12, 3072)
# HUB_SIZES of the vision tower, the Q-Former and LLaMA; the last only where it differs
SIZES = {
    "small": ((64, 4, 4, 128), (48, 4, 4, 96), (64, 3, 4, 128)),
    "medium": ((768, 12, 12, 3072), BLIP2_QFORMER, (1024, 12, 16, 2816)),
    "1.1b": (EVA_VIT_G, BLIP2_QFORMER, (2048, 22, 32, 5632, 4)),  # TinyLlama
    "full": (EVA_VIT_G, BLIP2_QFORMER, (4096, 32, 32, 11008)),
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
        "size of the model (default: medium for train, 1.1b for chat)",
        choices=("", *SIZES),
    )
    folder: str = option("out/bench", "folder for random weights and images")
    device: str = option("", "PyTorch device (default: cuda if available, else cpu)")
    rounds: int = option(3, "rounds of alternating runs; medians are reported", least=1)
    steps: int = option(
        5, "train: timed steps per round; data: 8 times as many batches", least=1
    )
    batch_size: int = option(8, "train: images per step", least=1)
    dtype: str = option(
        "bfloat16", "train: dtype of the weights", choices=("float32", "bfloat16")
    )
    workers: int = option(2, "data: worker processes, up to 16", least=1, most=16)


# ---- measuring -----------------------------------------------------------------------


class Comparison(NamedTuple):
    name: str
    units: dict  # {rate: unit}
    peer_name: str
    # "ours", "peer" and others: a function and its arguments; it returns the rates, and
    # other results
    sides: dict


def measure(comparison, rounds):
    """{side: {result: median}}. The sides take turns in new processes."""
    results = {side: [] for side in comparison.sides}
    for _ in range(rounds):
        for side, call in comparison.sides.items():
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                result = pool.submit(*call).result()
            print(f"{comparison.name}, {side}: {result}", file=sys.stderr)
            results[side].append(result)
    medians = {}
    for side, rows in results.items():
        medians[side] = {}
        for key in rows[0]:
            medians[side][key] = round(median(row[key] for row in rows), 4)
    return medians


def table_rows(comparison, medians):
    """Yield a row for each rate."""
    others = {}  # "ours_loss" -> "loss", "peer_loss"
    for side, results in medians.items():
        for key, value in results.items():
            if key not in comparison.units:
                others[f"{side}_{key}".removeprefix("ours_")] = value
    for rate, unit in comparison.units.items():
        rates = {
            side: results[rate] for side, results in medians.items() if rate in results
        }
        row = {
            "name": f"{comparison.name} {rate}".removesuffix(" rate"),
            "unit": unit,
            "peer_name": comparison.peer_name,
        }
        row |= rates | others
        ours = rates.pop("ours")
        for side in rates:
            row[f"vs_{side}"] = round(ours / rates[side], 4)
        yield row


def seconds(function, n=3):
    """The mean of n calls, after two that do not count; waits for a GPU."""
    threads = torch.get_num_threads()
    timer = Timer("f()", globals={"f": function}, num_threads=threads)
    return timer.timeit(n).mean


def short(dtype):
    """ "bfloat16" -> "bf16"."""
    return dtype.replace("loat", "")


# ---- data ----------------------------------------------------------------------------


def our_batches(folder, workers, device):
    """Yield the normalized float32 pictures of each batch, on the device."""
    config = Config(data=str(folder), num_workers=workers, batch_size=DATA_BATCH)
    samples, weights = open_samples(config.data, config, TOKENIZER, SIDE, N_TOKENS)
    for _, _, (batch,) in TrainingSteps(samples, weights, config).read():
        yield normalize(batch.to(device).images)


def peer_batches(folder, workers, device):
    """The same as in webdataset's examples: the workers normalize each picture."""
    import webdataset

    samples = Samples([], Config(), TOKENIZER, SIDE, N_TOKENS)

    def prepare(row):
        picture, about = row
        ids, targets = samples.tokenize(Sample([""], about["caption"]), None)
        return [normalize(preprocess(picture, SIDE))], ids, targets

    shards = f"{folder}/{{00000..00015}}.tar"
    data = webdataset.WebDataset(shards, shardshuffle=16).shuffle(1000)
    data = data.decode("pilrgb").to_tuple("jpg", "json").map(prepare)
    data = data.batched(DATA_BATCH, collate).repeat()
    for batch in webdataset.WebLoader(data, batch_size=None, num_workers=workers):
        yield batch.to(device).images


def decode(batch):
    for encoded in batch:
        preprocess(Image.open(io.BytesIO(encoded)), SIDE)


def pil_alone(folder, workers, device):
    """Decode and resize pictures that are in memory; the workers send nothing."""
    rows = [row for path in folder.glob("*.tar") for row in index_tar(str(path))]
    encoded = [split_files(files)[0].read() for _, files in rows]
    yield from DataLoader(
        encoded * 1000, DATA_BATCH, num_workers=workers, collate_fn=decode
    )


def read_data(batches_of, n, folder, workers, device):
    """Pictures per second over n batches, once the workers are busy."""
    # of the workers; a spawned process would spawn
    set_start_method("fork", force=True)
    torch.set_num_threads(1)
    batches = batches_of(folder, workers, device)
    seconds(batches.__next__, 2 * workers)
    return {"rate": DATA_BATCH / seconds(batches.__next__, n)}


def write_pictures(folder, width, height):
    """Noise as coarse as a photograph's details, in 16 shards."""
    import webdataset

    folder.mkdir(parents=True, exist_ok=True)
    shards = webdataset.ShardWriter(f"{folder}/%05d.tar", maxcount=32, verbose=0)
    with shards:
        for i in range(512):
            noise = Image.effect_noise((width // 6, height // 6), 90).convert("RGB")
            jpg = io.BytesIO()
            noise.resize((width, height)).save(jpg, "JPEG", quality=90)
            about = {"caption": "a red fox"}
            shards.write({"__key__": f"{i}", "jpg": jpg.getvalue(), "json": about})


def bench_data(options, device):
    """One comparison for each size of pictures."""
    for width, height in ((224, 224), (640, 480)):
        folder = Path(options.folder) / f"{width}x{height}"
        if not (folder / "00015.tar").is_file():
            write_pictures(folder, width, height)
        arguments = (8 * options.steps, folder, options.workers, device)
        yield Comparison(
            f"{width}x{height} w{options.workers}",
            {"rate": "images/s"},
            "webdataset",
            {
                "ours": (read_data, our_batches, *arguments),
                "peer": (read_data, peer_batches, *arguments),
                "limit": (read_data, pil_alone, *arguments),
            },
        )


# ---- random weights ------------------------------------------------------------------


def hub_sizes(size):
    """The sizes of the vision tower, the Q-Former and LLaMA by transformers' names."""
    return [dict(zip(HUB_SIZES, sizes)) for sizes in SIZES[size]]


def save_ours(folder, size):
    """A run's folder with random weights."""
    vision, qformer, llama = hub_sizes(size)
    folder.mkdir(parents=True, exist_ok=True)
    model = MiniGPT4(
        VisionConfig(SIDE, 14, *vision.values()),
        QFormerConfig(N_TOKENS, *qformer.values(), vision["hidden_size"]),
        LlamaConfig.from_dict(llama | {"vocab_size": VOCAB}),
    )
    model.tokenizer = TOKENIZER
    # chat shall say whole pieces of text: no bytes, no ids without a piece
    unspoken = [*range(259), *range(TOKENIZER.vocab_size, VOCAB)]
    model.llama.lm_head.weight.data[unspoken] = 0
    for name in PARTS:
        model.save_part(name, str(folder), "bfloat16")
    files = {name: f"{name}.safetensors" for name in ("vision", "qformer", "proj")}
    config = Config(**files, llama="llama", template="vicuna")
    (folder / "config.json").write_text(to_json(config))


def save_peer(folder, size, kind, run):
    """A run's weights as a model of transformers: Blip2 or InstructBlip.

    What only InstructBLIP has, the question in its Q-Former, is random.
    """
    import transformers

    vision, qformer, llama = hub_sizes(size)
    config = getattr(transformers, f"{kind}Config")(
        vision_config=vision,
        qformer_config=qformer | {"encoder_hidden_size": vision["hidden_size"]},
        num_query_tokens=N_TOKENS,
        text_config=llama | {"model_type": "llama"},
        image_token_index=VOCAB - 1,
    )
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    our_model = MiniGPT4.from_files(**read_saved_config(str(run)).parts())
    named = dict(our_model.named_parameters())
    for i, block in enumerate(our_model.vision.blocks):
        # theirs is one bias, with zeros for the keys
        q_bias, v_bias = block.attn.q_bias, block.attn.v_bias
        bias = torch.cat((q_bias, torch.zeros_like(q_bias), v_bias))
        named[f"vision.blocks.{i}.attn.qkv.bias"] = bias
    tensors = {}
    for name, tensor in model.state_dict().items():
        our_name = name
        for theirs, replacement in PEER_NAMES:
            our_name = our_name.replace(theirs, replacement)
        found = named[our_name] if our_name in named else torch.randn(tensor.shape)
        tensors[name] = found.bfloat16()
    model.load_state_dict(tensors, assign=True)
    model.save_pretrained(folder)


def random_weights(options, kind):
    """The folders of a run and of a model of transformers, made on first use."""
    folder = Path(options.folder).resolve() / options.size
    ours, peer = folder / "ours", folder / kind
    if not (ours / "config.json").is_file():
        save_ours(ours, options.size)
    if not (peer / "model.safetensors").is_file():
        save_peer(peer, options.size, kind, ours)
    return ours, peer


# ---- train ---------------------------------------------------------------------------


def random_batch(n):
    """n times a picture with a caption of 12 tokens."""
    torch.manual_seed(0)
    caption = torch.randint(3, VOCAB - 1, (12,)).tolist()
    image = torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8)
    ids = [TOKENIZER.bos] + [IMAGE] * N_TOKENS + caption
    targets = [IGNORE] * (1 + N_TOKENS) + caption
    return collate([([image], ids, targets)] * n)


def our_step(config, device):
    """A function that makes train.py's step and returns the loss."""
    model = build(config, device)
    batch = random_batch(config.batch_size)
    optimizer = make_optimizer(list(model.proj.parameters()), config)
    scaler = torch.amp.GradScaler(enabled=False)

    def step():
        loss, _ = train_step(model, [batch], optimizer, scaler, lr=1e-4)
        return loss

    return step


def peer_step(config, device):
    """The same of transformers' BLIP-2, eager, as users get it."""
    from transformers import Blip2ForConditionalGeneration

    dtype = getattr(torch, config.dtype)
    batch = random_batch(config.batch_size)
    model = Blip2ForConditionalGeneration.from_pretrained(config.out_dir, dtype=dtype)
    model.to(device).eval().requires_grad_(False)
    model.language_projection.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.language_projection.parameters(), lr=1e-4)

    def step():
        images, tokens, targets = batch.to(device)
        tokens = tokens.where(tokens != IMAGE, VOCAB - 1)
        pixels = normalize(images).to(dtype)
        loss = model(pixel_values=pixels, input_ids=tokens, labels=targets).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def run_steps(make_step, config, device):
    """Pictures per second, the loss of the first step, peak memory."""
    step = make_step(config, device)
    loss = step().item()
    rate = config.batch_size / seconds(step, config.max_steps)
    return {"rate": rate, "loss": loss, "peak_mib": peak_mib(device)}


def matmul_alone(config, device):
    """Pictures per second if a step were one large matrix product of as many FLOPs."""
    model = build(config, device)
    batch = random_batch(1).to(device)
    with FlopCounterMode(display=False) as counter:
        model(*batch).backward()
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(getattr(torch, config.dtype))
    flops_per_second = 2 * n**3 / seconds(lambda: a @ a)
    return {"rate": flops_per_second / counter.get_total_flops()}


def bench_train(options, device):
    """One comparison for each way of training."""
    ours, peer = random_weights(options, "Blip2")
    config = replace(
        read_saved_config(str(ours)),
        dtype=options.dtype,
        batch_size=options.batch_size,
        max_steps=options.steps,
        out_dir=str(peer),
    )
    ways = {
        "": config,
        " compiled": replace(config, compile=True),
        " checkpointed": replace(config, grad_checkpoint=True),
    }
    for way, our_config in ways.items():
        yield Comparison(
            f"{options.size} {short(options.dtype)} b{options.batch_size}{way}",
            {"rate": "images/s"},
            "transformers BLIP-2",
            {
                "ours": (run_steps, our_step, our_config, device),
                "peer": (run_steps, peer_step, config, device),
                "limit": (matmul_alone, config, device),
            },
        )


# ---- chat ----------------------------------------------------------------------------


def start_chat(folder, device):
    options = chat.Options(
        ckpt=str(folder),
        device=device.type,
        dtype="bfloat16",
        temperature=0.0,
        max_new_tokens=ANSWER,
    )
    return chat.Chat(*chat.load(options))


def our_first_word(folder, device):
    talk = start_chat(folder, device)
    talk.add_image(PICTURE)
    next(talk.ask(QUESTION))


def peer_first_word(folder, device):
    """The same of InstructBLIP, with a prompt as long as ours."""
    from transformers import InstructBlipForConditionalGeneration

    model = InstructBlipForConditionalGeneration.from_pretrained(
        folder, dtype=torch.bfloat16
    )
    images = load_image(PICTURE, SIDE).unsqueeze(0).to(device)
    ids = torch.tensor([[VOCAB - 1] * N_TOKENS + [5] * 52], device=device)
    model.to(device).generate(
        pixel_values=normalize(images).bfloat16(),
        input_ids=ids,
        qformer_input_ids=ids[:, -8:],
        max_new_tokens=1,
    )


def first_word(answer, folder, device):
    """1/s, from the start of this process to the first word of an answer.

    The time of reading the weights into the page cache does not count.
    """
    fields = Path("/proc/self/stat").read_text().split()
    started = int(fields[21]) / os.sysconf("SC_CLK_TCK")
    imports = time.clock_gettime(time.CLOCK_BOOTTIME) - started
    subprocess.run(["cat", *folder.rglob("*.safetensors")], stdout=subprocess.DEVNULL)
    start = time.perf_counter()
    answer(folder, device)
    rate = 1 / (imports + time.perf_counter() - start)
    return {"rate": rate, "peak_mib": peak_mib(device)}


def memory_alone(folder):
    """How often per second all weights can be read."""
    n_bytes = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    return {"rate": bandwidth() / n_bytes}


def bandwidth(device="cpu"):
    """Bytes per second of a sum over 1 GiB of memory."""
    return 2**30 / seconds(torch.ones(2**28, device=device).sum)


def matrices_alone(folder, way, device):
    """decode: tokens/s if each read LLaMA's matrices once, and did nothing else.

    peak_mib: what the answers may take, weights and a fifth, and PyTorch.
    """
    n_bytes = 0
    tensors = read_hub_folder(str(folder), LlamaConfig).tensors
    for name, tensor in tensors.items():
        if name == "lm_head.weight" and way == "int4":
            n_bytes += tensor.numel()  # int8
        elif tensor.dim() == 2 and name != "embed_tokens.weight":
            n_bytes += BYTES[way] * tensor.numel()
    all_bytes = n_bytes + tensors["embed_tokens.weight"].nbytes
    bar = 1.2 * all_bytes / 2**20 + 350
    return {"decode": bandwidth(device) / n_bytes, "peak_mib": bar}


def gguf_file(folder, kind):
    """LLaMA for llama.cpp, made on first use.

    The output matrix of Q4_0 is Q8_0, as int4's is int8.
    """
    import gguf

    path = folder / f"{kind}.gguf"
    if path.is_file():
        return path
    file = read_hub_folder(str(folder), LlamaConfig)
    sizes = file.sizes
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
        for name, tensor in file.tensors.items():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                # llama.cpp rotates neighbors, not halves
                halves = tensor.unflatten(0, (-1, 2, sizes.head_dim // 2))
                tensor = halves.transpose(1, 2).flatten(0, 2)
            type_name = kind if name.startswith("layers") else kind.replace("4", "8")
            if tensor.dim() == 1:
                type_name = "F32"
            number_type = gguf.GGMLQuantizationType[type_name]
            writer.add_tensor(
                names.get_name(hub_name(name), (".weight",)),
                gguf.quants.quantize(tensor.float().numpy(), number_type),
                raw_dtype=number_type,
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def our_answer(folder, way, ids, device):
    """A function of n that answers `ids` greedily with n tokens."""
    model = MiniGPT4.from_files(None, None, str(folder), dtype=way, device=device.type)

    def answer(n):
        steps = model.generate(ids, max_new_tokens=n, temperature=0, min_length=n + 1)
        return list(steps)

    return answer


def peer_answer(folder, way, ids, device):
    """The same of transformers, in bf16."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.to(device).eval()
    tokens = torch.tensor([ids], device=device)

    def answer(n):
        model.generate(tokens, do_sample=False, min_new_tokens=n, max_new_tokens=n)

    return answer


def llamacpp_answer(path, way, ids, device):
    """The same of llama.cpp, but the n tokens are given: nothing is sampled."""
    from llama_cpp import Llama

    threads = torch.get_num_threads()
    model = Llama(
        str(path), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def answer(n):
        model.reset()
        model.eval(ids)
        for _ in range(n - 1):
            model.eval([5])

    return answer


def seconds_once(answer, n_tokens):
    """The time of an answer, whose last token arrives in Python."""
    start = time.perf_counter()
    answer(n_tokens)
    return time.perf_counter() - start


def answers(make_answer, folder, way, device):
    """prompt: 1/s until the first token; decode: tokens/s after it."""
    torch.manual_seed(0)
    ids = torch.randint(3, VOCAB, (PROMPT,)).tolist()
    answer = make_answer(folder, way, ids, device)
    answer(2)  # does not count
    first, all_tokens = (seconds_once(answer, n) for n in (1, 1 + ANSWER))
    return {
        "prompt": 1 / first,
        "decode": ANSWER / (all_tokens - first),
        "peak_mib": peak_mib(device),
    }


def last_turn(n, folder, device):
    """1/s until the first token of the n-th answer about a picture.

    The first answer waits for the picture's encoding.
    """
    talk = start_chat(folder, device)
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


def describe(at_once, folder, dtype, device):
    """Pictures per minute, with CAPTION tokens about each."""
    parts = read_saved_config(str(folder)).parts()
    model = MiniGPT4.from_files(**parts, dtype=dtype, device=device.type)
    pictures = random_batch(CHAT_BATCH).images.to(device)
    prompt = [TOKENIZER.bos] + [IMAGE] * N_TOKENS + [5] * (PROMPT - 1 - N_TOKENS)

    @torch.no_grad()
    def answer(images, n):
        embeds = model.encode_image(images)
        prompts = [prompt] * len(images)
        return model.generate_batch(
            prompts, embeds, max_new_tokens=n, temperature=0, min_length=n + 1
        )

    answer(pictures[:at_once], 2)
    start = time.perf_counter()
    for images in pictures.split(at_once):
        answer(images, CAPTION)
    minutes = (time.perf_counter() - start) / 60
    return {"rate": CHAT_BATCH / minutes, "peak_mib": peak_mib(device)}


def compare_ways(options, ours, device):
    """One comparison for each way of holding LLaMA's weights."""
    llama = ours / "llama"
    has_llamacpp = find_spec("llama_cpp") and find_spec("gguf")
    for way, kind in WAYS.items():
        units = {"decode": "tokens/s", "prompt": "1/s"}
        sides = {
            "ours": (answers, our_answer, llama, way, device),
            "peer": (answers, peer_answer, llama, way, device),
            "limit": (matrices_alone, llama, way, device),
        }
        if device.type == "cpu" and has_llamacpp:
            file = gguf_file(llama, kind)
            sides["llamacpp"] = (answers, llamacpp_answer, file, way, device)
        yield Comparison(
            f"{options.size} {short(way)}", units, "transformers bf16", sides
        )


def bench_chat(options, device):
    ours, peer = random_weights(options, "InstructBlip")
    yield Comparison(
        f"{options.size} first word",
        {"rate": "1/s"},
        "transformers InstructBLIP",
        {
            "ours": (first_word, our_first_word, ours, device),
            "peer": (first_word, peer_first_word, peer, device),
            "limit": (memory_alone, ours),
        },
    )
    yield from compare_ways(options, ours, device)
    yield Comparison(
        f"{options.size} second turn",
        {"rate": "1/s"},
        "its first turn",
        {"ours": (last_turn, 2, ours, device), "peer": (last_turn, 1, ours, device)},
    )
    for dtype, name in (("bfloat16", "batch 8"), ("int8", "int8 batch 8")):
        yield Comparison(
            f"{options.size} {name}",
            {"rate": "pictures/min"},
            "one at a time",
            {
                "ours": (describe, CHAT_BATCH, ours, dtype, device),
                "peer": (describe, 1, ours, dtype, device),
            },
        )


BENCHES = {"data": bench_data, "train": bench_train, "chat": bench_chat}


def main(argv):
    (name,), options, _ = read_options(argv, __doc__, "|".join(BENCHES), Options())
    check_name(name, BENCHES, "bench")
    if not options.size:
        options = replace(options, size="1.1b" if name == "chat" else "medium")
    # before anything is allocated, as train.py does
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    device = pick_device(options.device)
    is_gpu = device.type == "cuda"
    label = torch.cuda.get_device_name(device) if is_gpu else device.type
    rows = []
    try:
        for comparison in BENCHES[name](options, device):
            medians = measure(comparison, options.rounds)
            rows += table_rows(comparison, medians)
            peak, bar = rows[-1].get("peak_mib", 0), rows[-1].get("limit_peak_mib", inf)
            if peak > bar:
                note(f"warning: {comparison.name}: {peak} MiB of memory, above {bar}")
    except ModuleNotFoundError as e:
        raise InputError(
            f"this benchmark needs the package {e.name}: pip install {e.name}"
        ) from e
    print(json.dumps({"bench": name, "device": label, "rows": rows}))


if __name__ == "__main__":
    run_main(main)
