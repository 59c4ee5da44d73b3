"""Official weight files -> the safetensors files that the program reads, and back.

    python tools/convert.py vision eva_vit_g.pth weights/eva_vit_g.safetensors [--n_layers=39] [--heads=16]
    python tools/convert.py qformer blip2_pretrained_flant5xxl.pth weights/qformer.safetensors [--heads=12]
    python tools/convert.py llama SRC_FOLDER weights/vicuna-7b [--delta=BASE_FOLDER] [--lora=ADAPTER_FOLDER]
    python tools/convert.py proj prerained_minigpt4_7b.pth out/official/proj.safetensors [--config=CONFIG]
    python tools/convert.py export out/stage2 minigpt4.pth

`.pth` and `.bin` are read with weights_only=True: nothing in them is executed. --dtype=bfloat16 (or float16,
float32) casts; without it the tensors stay as they are. `llama` takes a Hugging Face folder (any number of
.bin or .safetensors files) or Meta's (consolidated.*.pth, params.json); --delta adds the folder's weights to
those of BASE (Vicuna v0), --lora merges an adapter. A hub folder of safetensors needs no conversion. With
--config=configs/stage2.py, `proj` also writes the folder's config.json, so that chat.py --ckpt takes it.

Tensors are read and written one by one, into a temporary name that is moved at the end.
"""

import functools
import json
import pickle
import re
import resource
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import isqrt
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from chat import check
from configs.schema import InputError, load_config, override, parse_args, read_saved_config, run_main
from llama import LlamaConfig, Tokenizer, indexed_files, read_json
from model import MiniGPT4, check_fit, load_tensors, write_tensors
from qformer import QFormerConfig
from train import refuse_to_overwrite, start_folder
from vision import VisionConfig

LAYER = r"Qformer\.bert\.encoder\.layer\.(\d+)\."

# The original's tensor names -> ours, first match wins; None: dropped on purpose. A name that no row matches
# is an error.
NAMES = (
    (r"visual_encoder\.(norm|fc_norm|head)\.", None),    # of the classifier that EVA was trained as
    (r"visual_encoder\.", "vision."),
    (r"ln_vision\.", "ln_vision."),
    (r"query_tokens$", "qformer.query_tokens"),
    (r"Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.norm."),
    (LAYER + r"attention\.self\.", r"qformer.layers.\1.self_attn."),
    (LAYER + r"attention\.output\.dense\.", r"qformer.layers.\1.self_attn.out."),
    (LAYER + r"attention\.output\.LayerNorm\.", r"qformer.layers.\1.self_attn.norm."),
    (LAYER + r"crossattention\.self\.", r"qformer.layers.\1.cross_attn."),
    (LAYER + r"crossattention\.output\.dense\.", r"qformer.layers.\1.cross_attn.out."),
    (LAYER + r"crossattention\.output\.LayerNorm\.", r"qformer.layers.\1.cross_attn.norm."),
    (LAYER + r"intermediate_query\.dense\.", r"qformer.layers.\1.fc1."),
    (LAYER + r"output_query\.dense\.", r"qformer.layers.\1.fc2."),
    (LAYER + r"output_query\.LayerNorm\.", r"qformer.layers.\1.norm."),
    (LAYER + r"(intermediate|output)\.", None),          # the Q-Former's text branch
    (r"Qformer\.bert\.embeddings\.(word_embeddings|position_embeddings|position_ids)", None),
    (r"Qformer\.(cls|bert\.pooler)\.", None),
    (r"(vision_proj|text_proj|itm_head)\.|temp$", None),
    (r"(t5_proj|opt_proj|t5_model|opt_model)\.", None),  # BLIP-2's own language model
    (r"llama_proj\.", "proj."),
    (r"llama_model\..*rotary_emb\.inv_freq$", None),     # computed, not learnt
    (r"llama_model\.lm_head\.", "llama.lm_head."),
    (r"llama_model\.model\.", "llama."),
)
LLAMA_NAMES = (  # Hugging Face's
    (r".*rotary_emb\.inv_freq$", None),
    (r"model\.", ""),
    (r"lm_head\.", "lm_head."),
)
META_NAMES = (  # Meta's; the second half of the row is how model-parallel files are joined
    (r"rope\.freqs$", None),
    (r"tok_embeddings\.", "embed_tokens."),
    (r"norm\.weight$", "norm.weight"),
    (r"output\.", "lm_head."),
    (r"layers\.(\d+)\.attention_norm\.", r"layers.\1.input_layernorm."),
    (r"layers\.(\d+)\.ffn_norm\.", r"layers.\1.post_attention_layernorm."),
    (r"layers\.(\d+)\.attention\.w([qkvo])\.", r"layers.\1.self_attn.\2_proj."),
    (r"layers\.(\d+)\.feed_forward\.w1\.", r"layers.\1.mlp.gate_proj."),
    (r"layers\.(\d+)\.feed_forward\.w2\.", r"layers.\1.mlp.down_proj."),
    (r"layers\.(\d+)\.feed_forward\.w3\.", r"layers.\1.mlp.up_proj."),
)
SPLIT_BY_INPUT = ("embed_tokens", "o_proj", "down_proj")  # of which Meta's files hold columns, of others rows


def rename(name: str, table=NAMES) -> str | None:
    """The original's name of a tensor -> ours in MiniGPT4, None for one to drop. KeyError if unknown."""
    for pattern, ours in table:
        if match := re.match(pattern, name):
            return None if ours is None else match.expand(ours) + name[match.end():]
    raise KeyError(name)


def rename_all(names, table, path) -> dict[str, str]:
    """{our name: the original's} of those to keep; says which are dropped. InputError for unknown ones."""
    renamed, dropped, unknown = {}, [], []
    for name in names:
        try:
            ours = rename(name, table)
            renamed |= {ours: name} if ours is not None else {}
            dropped += [name] if ours is None else []
        except KeyError:
            unknown.append(name)
    if unknown:
        raise InputError(f"{path}: {len(unknown)} unexpected tensors ({', '.join(unknown[:3])}); this file "
                         "is of another model")
    _say_dropped(dropped)
    return renamed


def _say_dropped(names):
    if names:
        print(f"left out on purpose: {len(names)} tensors ({names[0]}{', ...' * (len(names) > 1)})",
              file=sys.stderr)


@functools.lru_cache(maxsize=1)  # one file open at a time, so memory-mapped pages do not pile up
def open_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .pth, .bin or .safetensors file, memory-mapped where the format allows it.

    Raises InputError for a file that is missing, broken, a Git LFS pointer, or holds more than plain data."""
    if not path.is_file():
        raise InputError(f"{path}: there is no such weight file")
    with open(path, "rb") as f:
        if f.read(40).startswith(b"version https://git-lfs"):
            raise InputError(f"{path}: a Git LFS pointer, not the weights; run `git lfs pull` in its folder")
    if path.suffix == ".safetensors":
        return load_tensors(path)[0]
    load = functools.partial(torch.load, path, map_location="cpu", weights_only=True)
    try:
        try:
            content = load(mmap=True)
        except RuntimeError as e:
            if "mmap" not in str(e):
                raise
            content = load()  # the format of before PyTorch 1.6
    except pickle.UnpicklingError as e:
        raise InputError(f"{path}: refused: no PyTorch file, or one that holds more than tensors and could "
                         "run code; get it from its official source") from e
    except Exception as e:  # a broken file breaks PyTorch's reader in many ways
        raise InputError(f"{path}: not a complete PyTorch file ({type(e).__name__}); fetch it again") from e
    while isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    named = content.items() if isinstance(content, dict) else ()
    tensors = {k: t for k, t in named if isinstance(k, str) and isinstance(t, torch.Tensor)}
    if not tensors:
        raise InputError(f"{path}: holds no tensors by name; it is not a file of weights")
    return tensors


# ---- vision, qformer, proj ---------------------------------------------------------------------------------


def vision_sizes(shapes: dict, options: "Options") -> VisionConfig:
    """The sizes that {our name: shape} tells. Heads are an option, and layers too: a file may hold more."""
    patch, n_tokens = shapes["patch_embed.proj.weight"][-1], shapes["pos_embed"][1]
    return VisionConfig(image_size=isqrt(n_tokens - 1) * patch, patch_size=patch,
                        width=shapes["cls_token"][-1], n_layers=options.n_layers, n_heads=options.heads or 16,
                        mlp_hidden=shapes["blocks.0.mlp.fc1.weight"][0])


def qformer_sizes(shapes: dict, options: "Options") -> QFormerConfig:
    """The sizes that {our name: shape} tells, and the number of heads from the options."""
    looks = [int(k.split(".")[1]) for k in shapes if k.endswith("cross_attn.key.weight")]
    layers = [int(k.split(".")[1]) for k in shapes if k.startswith("layers.")]
    _, n_queries, width = shapes["query_tokens"]
    return QFormerConfig(n_queries=n_queries, width=width, n_layers=max(layers) + 1,
                         n_heads=options.heads or 12, ffn_hidden=shapes["layers.0.fc1.weight"][0],
                         vision_width=shapes["layers.0.cross_attn.key.weight"][1],
                         cross_attention_every=sorted(looks)[1] if len(looks) > 1 else max(layers) + 1)


def convert_part(part: str, source: str, target: str, options: "Options"):
    """One file of the vision part, the Q-Former or the projection."""
    config = None
    if part == "proj" and options.config:
        folder = Path(target).parent
        if Path(target).name != "proj.safetensors":
            raise InputError(f"{target}: with --config, name it {folder}/proj.safetensors, as chat.py does")
        config = load_config(options.config, {"out_dir": str(folder)})
        refuse_to_overwrite(config)
    tensors = open_weights(Path(source))
    if part == "vision" and not any(k.startswith("visual_encoder.") for k in tensors):
        tensors = {f"visual_encoder.{k}": t for k, t in tensors.items()}
    renamed = rename_all(tensors, NAMES, source)
    own = (f"{part}.",) if part == "proj" else (f"{part}.", "ln_vision.")
    kept = {k.removeprefix(f"{part}." if part != "proj" else ""): tensors[name]
            for k, name in renamed.items() if k.startswith(own)}
    if not kept:
        raise InputError(f"{source}: no tensors of the {part} part in it; give its official file")
    if part == "vision":
        beyond = [k for k in kept if k.startswith("blocks.") and int(k.split(".")[1]) >= options.n_layers]
        _say_dropped(beyond)
        kept = {k: t for k, t in kept.items() if k not in beyond}
    shapes = {k: tuple(t.shape) for k, t in kept.items()}
    try:
        sizes, expected = _expected(part, shapes, options)
    except (KeyError, ValueError, IndexError) as e:
        raise InputError(f"{source}: does not fit as {part}: its sizes cannot be told ({e}); it is of "
                         "another model") from e
    if sizes and sizes["width"] % sizes["n_heads"]:
        raise InputError(f"{source}: a width of {sizes['width']} is not for {sizes['n_heads']} heads; give "
                         "--heads")
    check_fit(source, part, shapes, expected)
    metadata = {"config": json.dumps(sizes)} if sizes else {}
    write_tensors(Path(target), metadata, _layout(kept, options.dtype), kept.__getitem__)
    if config:
        start_folder(config)
    _say_written(target, kept)


def _expected(part, shapes, options):
    """(sizes for the file's metadata, {name: shape} of all its tensors)."""
    if part == "proj":
        width = shapes["proj.weight"][0]
        return {}, {"proj.weight": shapes["proj.weight"], "proj.bias": (width,)}
    vision, qformer = VisionConfig(n_layers=1), QFormerConfig(n_layers=1)
    if part == "vision":
        vision = vision_sizes(shapes, options)
        qformer = None if "ln_vision.weight" in shapes else replace(qformer, vision_width=vision.width)
    else:
        qformer = qformer_sizes(shapes, options)
        vision = replace(vision, width=qformer.vision_width, n_heads=1)
    with torch.device("meta"):
        model = MiniGPT4(vision, qformer, LlamaConfig(num_hidden_layers=1))
    sizes = asdict(vision if part == "vision" else qformer)
    return sizes, {k: tuple(p.shape) for k, p in model.part_parameters(part).items()}


def _layout(tensors, dtype):
    """{name: (dtype, shape)} of a file to be written."""
    return {k: (getattr(torch, dtype) if dtype else t.dtype, tuple(t.shape)) for k, t in tensors.items()}


def _say_written(path, tensors):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{path}: {len(tensors)} tensors written, peak memory {peak:.2f} GiB", file=sys.stderr)


# ---- llama -------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """A LLaMA folder in any format. Names are ours; shards groups them as its files do."""

    config: LlamaConfig
    shards: list[list[str]]
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]]  # (dtype, shape) of each tensor
    get: Callable[[str], torch.Tensor]


def open_llama(folder: Path) -> Source:
    """Raises InputError when something of the folder is missing."""
    if (folder / "params.json").is_file():
        return _open_meta(folder)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: neither config.json (Hugging Face) nor params.json (Meta) is in it; "
                         "give the folder of a LLaMA")
    config = LlamaConfig.from_dict(read_json(folder / "config.json"), f"{folder}/config.json")
    files = _files(folder)
    shards, layout, where = [], {}, {}
    for path in files:
        tensors = open_weights(path)
        renamed = rename_all(tensors, LLAMA_NAMES, path)
        if config.tie_word_embeddings:
            renamed.pop("lm_head.weight", None)
        shards.append(list(renamed))
        layout |= {k: (tensors[name].dtype, tuple(tensors[name].shape)) for k, name in renamed.items()}
        where |= {k: (path, name) for k, name in renamed.items()}
    return Source(config, shards, layout, lambda k: open_weights(where[k][0])[where[k][1]])


def _files(folder):
    """The weight files of a Hugging Face folder; safetensors are preferred to .bin."""
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{ending}.index.json"
        if index.is_file():
            return indexed_files(index)
        if files := sorted(folder.glob(f"{stem}*.{ending}")):
            return files
    raise InputError(f"{folder}: no model*.safetensors and no pytorch_model*.bin; fetch the weights too")


def _open_meta(folder):
    """consolidated.00.pth ... and params.json, in Meta's own names, layout and split over files."""
    params, files = read_json(folder / "params.json"), sorted(folder.glob("consolidated.*.pth"))
    if not files:
        raise InputError(f"{folder}: no consolidated.*.pth beside params.json; fetch the weights too")
    _needs(params, ("dim", "n_layers", "n_heads", "norm_eps"), folder / "params.json")
    tensors = open_weights(files[0])
    renamed = rename_all(tensors, META_NAMES, files[0])
    joined = lambda k: None if tensors[renamed[k]].dim() == 1 else int(any(s in k for s in SPLIT_BY_INPUT))
    layout = {}
    for k, name in renamed.items():
        shape = list(tensors[name].shape)
        if joined(k) is not None:
            shape[joined(k)] *= len(files)
        layout[k] = tensors[name].dtype, tuple(shape)
    axes, heads = {k: joined(k) for k in renamed}, params["n_heads"]
    config = LlamaConfig.from_dict({
        "vocab_size": layout["embed_tokens.weight"][1][0], "hidden_size": params["dim"],
        "intermediate_size": layout["layers.0.mlp.gate_proj.weight"][1][0],
        "num_hidden_layers": params["n_layers"], "num_attention_heads": heads,
        "num_key_value_heads": params.get("n_kv_heads") or heads, "rms_norm_eps": params["norm_eps"],
        "rope_theta": params.get("rope_theta", 10000.0)}, f"{folder}/params.json")

    def get(k):
        if axes[k] is None:
            return open_weights(files[0])[renamed[k]]
        whole = torch.cat([open_weights(path)[renamed[k]] for path in files], dim=axes[k])
        if "q_proj" in k or "k_proj" in k:  # a head's pairs (0, 1), (2, 3) -> (0, n/2), (1, n/2 + 1)
            rows, width = whole.shape
            whole = whole.view(-1, config.head_dim // 2, 2, width).transpose(1, 2).reshape(rows, width)
        return whole

    by_layer: dict[str, list[str]] = {}
    for k in renamed:  # eight layers a file
        at = re.match(r"layers\.(\d+)", k)
        by_layer.setdefault(int(at[1]) // 8 if at else -1, []).append(k)
    return Source(config, [by_layer[i] for i in sorted(by_layer)], layout, get)


def _needs(settings, names, path):
    """Raise InputError where one of the names is no number above 0."""
    for name in names:
        if not isinstance(value := settings.get(name), (int, float)) or value <= 0:
            raise InputError(f"{path}: {name} = {value!r} is no number above 0; fetch the file again")


def add_base(delta: Source, base: Source) -> Source:
    """The sum of two models; rows that only one of them has are left out (Vicuna v0's 32,001st)."""
    misfits = delta.layout.keys() ^ base.layout.keys()
    misfits |= {k for k in delta.layout.keys() & base.layout.keys()
                if delta.layout[k][1][1:] != base.layout[k][1][1:]}
    if misfits:
        raise InputError("--delta: base and delta have not the same tensors "
                         f"({', '.join(sorted(misfits)[:3])}); it is the delta of another model")
    layout = {k: (dtype, (min(shape[0], base.layout[k][1][0]), *shape[1:]))
              for k, (dtype, shape) in delta.layout.items()}

    def get(k):
        rows = layout[k][1][0]
        return (delta.get(k)[:rows] + base.get(k)[:rows]).to(layout[k][0])

    return delta._replace(layout=layout, get=get)


def merge_lora(source: Source, folder: Path) -> Source:
    """W + (alpha / r) B A, for each W that the adapter changes."""
    settings = read_json(folder / "adapter_config.json")
    files = [folder / f"adapter_model.{ending}" for ending in ("safetensors", "bin")]
    path = next((p for p in files if p.is_file()), None)
    if path is None:
        raise InputError(f"--lora={folder}: no adapter_model.safetensors or .bin in it")
    if settings.get("fan_in_fan_out") or settings.get("use_dora") or settings.get("bias", "none") != "none":
        raise InputError(f"--lora={folder}: only plain LoRA can be merged, no bias, DoRA or fan_in_fan_out")
    _needs(settings, ("r", "lora_alpha"), folder / "adapter_config.json")
    rank = settings["r"]
    scale = settings["lora_alpha"] / (rank ** 0.5 if settings.get("use_rslora") else rank)
    pairs, adapter = {}, dict(open_weights(path))
    for name, t in adapter.items():
        match = re.fullmatch(r"base_model\.model\.(?:model\.)?(.*)\.lora_([AB])(?:\.default)?\.weight", name)
        if not match or f"{match[1]}.weight" not in source.layout:
            raise InputError(f"{path}: {name} changes no tensor of this model")
        pairs.setdefault(f"{match[1]}.weight", {})[match[2]] = t
    if missing := [k for k, ab in pairs.items() if len(ab) < 2]:
        raise InputError(f"{path}: lora_A or lora_B is missing for {missing[0]}; fetch it again")

    def get(k):
        w = source.get(k)
        if k not in pairs:
            return w
        return (w.float() + scale * pairs[k]["B"].float() @ pairs[k]["A"].float()).to(w.dtype)

    return source._replace(get=get)


def convert_llama(source: str, target: str, options: "Options"):
    """A folder that from_files and the Hugging Face library read."""
    folder, out = Path(source), Path(target)
    if out.exists():
        raise InputError(f"{out} exists already: give another name, or remove it first")
    llama = open_llama(folder)
    if options.delta:
        llama = add_base(llama, open_llama(Path(options.delta)))
    if options.lora:
        llama = merge_lora(llama, Path(options.lora))
    places = [folder, folder.parent] + [Path(options.delta)] * bool(options.delta)
    tokenizer_file = next((p / "tokenizer.model" for p in places if (p / "tokenizer.model").is_file()), None)
    if tokenizer_file is None:
        raise InputError(f"{folder}: no tokenizer.model, the sentencepiece one; fetch it too")
    llama = _trim(llama, Tokenizer(str(tokenizer_file)).vocab_size)
    with torch.device("meta"):
        expected = MiniGPT4(None, None, llama.config).part_parameters("llama")
    check_fit(source, "llama", {k: shape for k, (_, shape) in llama.layout.items()},
              {k: tuple(p.shape) for k, p in expected.items()})

    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        _write_llama(part, llama, options.dtype)
        shutil.copyfile(tokenizer_file, part / "tokenizer.model")
        part.rename(out)
    except OSError as e:
        raise InputError(f"{out}: cannot be written: {e.strerror or e}") from e
    finally:
        shutil.rmtree(part, ignore_errors=True)
    _say_written(out, llama.layout)
    if options.check:
        check(MiniGPT4.from_files(None, None, target, train=()))


def _trim(llama, vocab_size):
    """Without the embedding rows that no piece of the tokenizer has."""
    rows = llama.layout.get("embed_tokens.weight", (None, (0,)))[1][0]
    if rows <= vocab_size:
        return llama._replace(config=replace(llama.config, vocab_size=rows))
    print(f"embeddings: {rows} rows trimmed to the tokenizer's {vocab_size}", file=sys.stderr)
    trimmed = ("embed_tokens.weight", "lm_head.weight")
    layout = {k: (dtype, (vocab_size, *shape[1:]) if k in trimmed else shape)
              for k, (dtype, shape) in llama.layout.items()}
    return Source(replace(llama.config, vocab_size=vocab_size), llama.shards, layout,
                  lambda k: llama.get(k)[:vocab_size] if k in trimmed else llama.get(k))


def _write_llama(folder, llama, dtype):
    weight_map, n_bytes = {}, 0
    bar = tqdm(total=len(llama.layout), desc=str(folder.name), unit="tensor")
    hub_name = lambda k: k if k.startswith("lm_head") else f"model.{k}"
    for i, names in enumerate(llama.shards, 1):
        file = f"model-{i:05d}-of-{len(llama.shards):05d}.safetensors"
        layout = {hub_name(k): (getattr(torch, dtype) if dtype else llama.layout[k][0], llama.layout[k][1])
                  for k in names}

        def get(name):
            bar.update()
            return llama.get(name.removeprefix("model."))

        write_tensors(folder / file, {"format": "pt"}, layout, get)
        weight_map |= dict.fromkeys(layout, file)
        n_bytes += (folder / file).stat().st_size
    bar.close()
    index = {"metadata": {"total_size": n_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (folder / "config.json").write_text(json.dumps(llama.config.to_hub(), indent=1))


# ---- and back ----------------------------------------------------------------------------------------------


def export(run: str, target: str, options: "Options"):
    """The projection of a run's folder as a checkpoint of the original's: {"model": {"llama_proj....}}."""
    tensors = load_tensors(read_saved_config(run).proj)[0]
    dtype = getattr(torch, options.dtype) if options.dtype else torch.float32
    content = {"model": {f"llama_{k}": t.to(dtype) for k, t in tensors.items()}}
    temporary = Path(f"{target}.part")
    try:
        torch.save(content, temporary)
        temporary.replace(target)
    except (OSError, RuntimeError) as e:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{target}: cannot be written ({e})") from e
    _say_written(target, tensors)


@dataclass(frozen=True)
class Options:
    dtype: str = ""        # float32, bfloat16 or float16; "": as in the source (export: float32)
    n_layers: int = 39     # vision: blocks to keep
    heads: int = 0         # vision, qformer: attention heads; 0: the real model's, 16 and 12
    delta: str = ""        # llama: the folder of the base model that SRC is the difference to
    lora: str = ""         # llama: a folder with a LoRA adapter to merge
    check: bool = True     # llama: measure the result's perplexity on English text
    config: str = ""       # proj: the training config that says which other parts it belongs to

    def __post_init__(self):
        if self.dtype not in ("", "float32", "bfloat16", "float16"):
            raise InputError(f"--dtype={self.dtype}: give float32, bfloat16 or float16")


def main(argv: list[str]):
    positional, given = parse_args(argv)
    kinds = ("vision", "qformer", "llama", "proj", "export")
    if len(positional) != 3 or positional[0] not in kinds:
        raise InputError(f"usage: python tools/convert.py {'|'.join(kinds)} SRC DST [--key=value ...]")
    options = override(Options(), given)
    kind, source, target = positional
    try:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"{target}: cannot be written: {e.strerror or e}") from e
    if kind == "llama":
        convert_llama(source, target, options)
    elif kind == "export":
        export(source, target, options)
    else:
        convert_part(kind, source, target, options)


if __name__ == "__main__":
    run_main(main)
