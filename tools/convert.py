"""Convert official weight files to this program's safetensors files, and back.

    python tools/convert.py vision eva_vit_g.pth DST.safetensors [--n_layers=39]
    python tools/convert.py qformer blip2_pretrained_flant5xxl.pth DST.safetensors
    python tools/convert.py qformer BLIP2_FOLDER DST.safetensors
    python tools/convert.py vision BLIP2_FOLDER DST.safetensors
    python tools/convert.py llama SRC_FOLDER weights/vicuna-7b [--delta=BASE_FOLDER]
    python tools/convert.py proj prerained_minigpt4_7b.pth DST.safetensors
    python tools/convert.py export out/stage2 minigpt4.pth

BLIP2_FOLDER is a download of Salesforce/blip2-flan-t5-xxl from the Hugging Face hub:
config.json, model.safetensors.index.json and the shards that hold the part. `llama`
takes a LLaMA, Mistral, SmolLM2, Qwen2 or Qwen3 in Hugging Face's format (only .bin
files have to be converted), or LLaMA 1 and 2 in Meta's *.pth. --delta adds SRC to a
base model (Vicuna v0); --lora merges an adapter. `proj` with --config=CONFIG, a
training config, also writes the config.json that chat.py --ckpt needs. No code in a
.pth or .bin file is executed.
"""

import json
import pickle
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from math import isqrt
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configs.schema import load_config, read_saved_config, write_saved_config
from llama import Llama, LlamaConfig, check_english
from model import MiniGPT4
from plumbing.console import InputError, note, progress, run_main
from plumbing.files import read_json, replacing, start_of
from plumbing.options import check_name, option, read_options
from plumbing.quantized import QUANTIZED, quantize_matrix
from plumbing.tokenizer import TOKENIZER_FILES, JsonTokenizer, open_tokenizer
from plumbing.weights import (
    DTYPES,
    check_fit,
    check_new,
    check_sizes,
    check_tied,
    fingerprint,
    hub_name,
    hub_weight_files,
    load_tensors,
    read_weight_map,
    sort_metadata,
)
from qformer import QFormer, QFormerConfig
from train import open_folder
from vision import VisionConfig, VisionTransformer

SHARD = 2 * 2**30  # bytes, about the size of each file of a converted LLaMA
# In the metadata of a part's file
KINDS = {"vision": VisionTransformer.kind, "qformer": QFormer.kind, "proj": "linear"}

# `path`, `folder`, `source` and `target` are Paths; the `source` of a LLaMA that is
# open is a Source. `tensors` are {name: tensor}, `shapes` {name: shape}.

# The start of an original name -> the part and the start of our name. "#" is the
# layer's number. Any name that is neither here nor in NOT_USED is an error.
LAYER = "Qformer.bert.encoder.layer.#."
NAMES = {
    "visual_encoder.": "vision.",
    "ln_vision.": "qformer.ln_vision.",
    "query_tokens": "qformer.query_tokens",
    "Qformer.bert.embeddings.LayerNorm.": "qformer.norm.",
    f"{LAYER}attention.output.dense.": "qformer.layers.#.self_attn.out.",
    f"{LAYER}attention.output.LayerNorm.": "qformer.layers.#.self_attn.norm.",
    f"{LAYER}attention.self.": "qformer.layers.#.self_attn.",
    f"{LAYER}crossattention.output.dense.": "qformer.layers.#.cross_attn.out.",
    f"{LAYER}crossattention.output.LayerNorm.": "qformer.layers.#.cross_attn.norm.",
    f"{LAYER}crossattention.self.": "qformer.layers.#.cross_attn.",
    f"{LAYER}intermediate_query.dense.": "qformer.layers.#.fc1.",
    f"{LAYER}output_query.dense.": "qformer.layers.#.fc2.",
    f"{LAYER}output_query.LayerNorm.": "qformer.layers.#.norm.",
    "llama_proj.": "proj.proj.",
}
# Hugging Face's names of BLIP-2 -> the original names
HUB_LAYER = "vision_model.encoder.layers.#."
BLIP2_NAMES = {
    "vision_model.embeddings.class_embedding": "visual_encoder.cls_token",
    "vision_model.embeddings.position_embedding": "visual_encoder.pos_embed",
    "vision_model.embeddings.patch_embedding.": "visual_encoder.patch_embed.proj.",
    f"{HUB_LAYER}layer_norm": "visual_encoder.blocks.#.norm",
    f"{HUB_LAYER}self_attn.projection.": "visual_encoder.blocks.#.attn.proj.",
    f"{HUB_LAYER}self_attn.": "visual_encoder.blocks.#.attn.",
    f"{HUB_LAYER}mlp.": "visual_encoder.blocks.#.mlp.",
    "vision_model.post_layernorm.": "ln_vision.",
    "query_tokens": "query_tokens",
    "qformer.layernorm.": "Qformer.bert.embeddings.LayerNorm.",
    "qformer.encoder.layer.#.attention.attention.": f"{LAYER}attention.self.",
    "qformer.encoder.layer.#.crossattention.attention.": f"{LAYER}crossattention.self.",
    "qformer.": "Qformer.bert.",
}
# A part's tensors among Hugging Face's
OF_BLIP2 = {
    "vision": r"vision_model\.(?!post_layernorm)",
    "qformer": r"qformer\.|query_tokens|vision_model\.post_layernorm",
}
# Names of LLaMA: Hugging Face's and Meta's -> ours
HUB_NAMES = {"model.": "", "lm_head.": "lm_head."}
META_NAMES = {
    "tok_embeddings.": "embed_tokens.",
    "norm.weight": "norm.weight",
    "output.": "lm_head.",
    "layers.#.attention_norm.": "layers.#.input_layernorm.",
    "layers.#.ffn_norm.": "layers.#.post_attention_layernorm.",
    "layers.#.attention.wq.": "layers.#.self_attn.q_proj.",
    "layers.#.attention.wk.": "layers.#.self_attn.k_proj.",
    "layers.#.attention.wv.": "layers.#.self_attn.v_proj.",
    "layers.#.attention.wo.": "layers.#.self_attn.o_proj.",
    "layers.#.feed_forward.w1.": "layers.#.mlp.gate_proj.",
    "layers.#.feed_forward.w2.": "layers.#.mlp.down_proj.",
    "layers.#.feed_forward.w3.": "layers.#.mlp.up_proj.",
}
# The start of an original name: EVA's classifier, the Q-Former's text branch, the
# language models, and buffers that are computed
NOT_USED = re.compile(
    r"""visual_encoder\.(norm|fc_norm|head)\.
    |Qformer\.(cls|bert\.pooler)\.
    |Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\.
    |Qformer\.bert\.embeddings\.(word|position)_
    |(vision_proj|text_proj|itm_head)\.
    |temp$
    |(t5_proj|opt_proj|t5_model|opt_model|llama_model)\.
    |.*rotary_emb\.inv_freq$
    |rope\.freqs$""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Options:
    dtype: str = option(
        "",
        "int8 and int4 only for llama (default: the source's; export: float32)",
        choices=("", *DTYPES, *QUANTIZED),
    )
    n_layers: int = option(39, "vision: number of blocks to keep")
    heads: int = option(
        0, "vision, qformer: attention heads; 0: those of the real model, 16 and 12"
    )
    delta: str = option("", "llama: folder of the base model to add SRC to")
    lora: str = option("", "llama: folder of a LoRA adapter to merge")
    check: bool = option(True, "llama: measure the result's perplexity on English text")
    config: str = option("", "proj: training config that names the other parts")


# ---- names, reading, writing -----------------------------------------------------


def rename(name, table):
    """A tensor's new name; None if the table does not know it.

    "layers.3.attention.wq.weight", META_NAMES -> "layers.3.self_attn.q_proj.weight"
    """
    number = re.search(r"\.(\d+)\.", name)
    general = re.sub(r"\.\d+\.", ".#.", name, count=1)
    for old, new in table.items():
        if general.startswith(old):
            ours = new + general.removeprefix(old)
            return ours.replace("#", number[1]) if number else ours
    return None


def rename_all(names, table, path):
    """{our name: original name} of all tensors in use.

    Raises InputError for unknown names.
    """
    dropped, unknown, originals = [], [], {}
    for name in names:
        ours = rename(name, table)
        if NOT_USED.match(name):
            dropped.append(name)
        elif ours is None:
            unknown.append(name)
        else:
            originals[ours] = name
    if unknown:
        raise InputError(
            f"{path}: {len(unknown)} unexpected tensors ({', '.join(unknown[:3])}); "
            "this file is of another model"
        )
    report_dropped(dropped)
    return originals


def report_dropped(names):
    """Note how many tensors are left out; if of several kinds, how many of each."""
    if not names:
        return
    kinds = Counter(name.split(".")[0] for name in names)
    counts = ", ".join(f"{kind} {n}" for kind, n in sorted(kinds.items()))
    details = f" ({counts})" if len(kinds) > 1 else ""
    note(f"left out on purpose: {len(names)} tensors, such as {names[0]}{details}")


def read_pickle(path):
    """The content of a .pth or .bin file, memory-mapped if possible.

    Raises InputError for a file that is broken or holds more than plain data.
    """
    # Files from before PyTorch 1.6 are no zip archives and cannot be mapped.
    is_zip = start_of(path, "weight file").startswith(b"PK")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as e:
        raise InputError(
            f"{path}: refused: no PyTorch file, or one that holds more than tensors "
            "and could run code; get it from its official source"
        ) from e
    except Exception as e:  # PyTorch's reader raises nearly anything on a broken file
        raise InputError(f"{path}: not a complete PyTorch file; fetch it again") from e


@lru_cache(maxsize=1)  # only one file is mapped at a time
def open_weights(path):
    """The tensors of a .pth, .bin or .safetensors file, memory-mapped if possible.

    Raises InputError for a file that is missing, broken or no weight file.
    """
    if path.suffix == ".safetensors":
        return load_tensors(path)[0]
    content = read_pickle(path)
    if not isinstance(content, dict):
        content = {}
    for _ in range(3):  # {"model": {"model": ...}}
        inner = content.get("model")
        if isinstance(inner, dict):
            content = inner
    tensors = {
        name: tensor
        for name, tensor in content.items()
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }
    if not tensors:
        raise InputError(
            f"{path}: holds no tensors by name; it is not a file of weights"
        )
    return tensors


def check_tensor(name, tensor, path):
    """Raise InputError for a tensor that holds no weights, or NaN or infinity."""
    is_quantized = tensor.dtype in (torch.int8, torch.uint8)
    is_weight = is_quantized or tensor.is_floating_point()
    if (
        not is_weight
        or tensor.numel() == 0
        or tensor.untyped_storage().nbytes() < tensor.nbytes
    ):
        what = f"{name}, {tensor.dtype} {tuple(tensor.shape)}"
        raise InputError(
            f"{path.name}: {what}, holds no weights, or fewer than its shape says; "
            "fetch the source again"
        )
    if not tensor.isfinite().all():
        raise InputError(
            f"{path.name}: {name} holds NaN or infinity: the source is broken; "
            "fetch it again"
        )


def torch_dtype(name):
    """The dtype of a name; None for "", which lets tensors keep their own."""
    return getattr(torch, name) if name else None


def write(path, tensors, dtype, **metadata):
    """Write a safetensors file of (name, tensor), cast to dtype unless it is empty."""
    with replacing(path) as temporary:
        cast = {}
        for name, tensor in tensors:
            check_tensor(name, tensor, path)
            copied = tensor.to(dtype=torch_dtype(dtype), copy=True)
            cast[name] = copied.contiguous()
        save_file(cast, temporary, {"format": "pt"} | metadata)
        sort_metadata(temporary)


def shapes_of(tensors):
    """{name: shape} of {name: tensor}."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def parameter_shapes(module_class, config):
    """{name: shape} of the parameters of module_class(config)."""
    check_sizes(config, "sizes")
    with torch.device("meta"):
        module = module_class(config)
    return shapes_of(dict(module.named_parameters()))


# ---- vision, qformer, proj -------------------------------------------------------


def layer_number(name):
    """ "layers.3.fc1.weight" -> 3; -1 for a tensor outside of the layers."""
    match = re.match(r"(?:blocks|layers)\.(\d+)\.", name)
    return int(match[1]) if match else -1


def vision_sizes(shapes, options):
    """Sizes from {our name: shape}; layers are an option, as a file may hold more."""
    patch_size = shapes["patch_embed.proj.weight"][-1]
    n_patches = shapes["pos_embed"][1] - 1
    return VisionConfig(
        image_size=isqrt(n_patches) * patch_size,
        patch_size=patch_size,
        width=shapes["cls_token"][-1],
        n_layers=options.n_layers,
        n_heads=options.heads or 16,
        mlp_hidden=shapes["blocks.0.mlp.fc1.weight"][0],
    )


def qformer_sizes(shapes, options):
    """Sizes from {our name: shape}, and the number of heads from the options."""
    n_layers = max(map(layer_number, shapes)) + 1
    crossed = sorted(
        layer_number(name) for name in shapes if name.endswith("cross_attn.key.weight")
    )
    _, n_queries, width = shapes["query_tokens"]
    return QFormerConfig(
        n_queries=n_queries,
        width=width,
        n_layers=n_layers,
        n_heads=options.heads or 12,
        ffn_hidden=shapes["layers.0.fc1.weight"][0],
        vision_width=shapes["layers.0.cross_attn.key.weight"][1],
        cross_attention_every=crossed[1] if len(crossed) > 1 else n_layers,
    )


def check_part(part, source, tensors, options):
    """The sizes of a vision part or Q-Former.

    Raises InputError unless `tensors` are exactly those of the part.
    """
    shapes = shapes_of(tensors)
    is_vision = part == "vision"
    infer_sizes = vision_sizes if is_vision else qformer_sizes
    try:
        config = infer_sizes(shapes, options)
    except (KeyError, ValueError, IndexError) as e:
        raise InputError(
            f"{source}: does not fit as {part}: its sizes cannot be inferred ({e}); "
            "it is of another model"
        ) from e
    width, heads = config.width, config.n_heads
    if width % heads:
        raise InputError(f"{source}: width {width} is no multiple of --heads={heads}")
    expected = parameter_shapes(VisionTransformer if is_vision else QFormer, config)
    if is_vision and "ln_vision.weight" in shapes:
        expected |= {"ln_vision.weight": (width,), "ln_vision.bias": (width,)}
    check_fit(source, part, shapes, expected)
    return config


def refuse_other_qformers(folder, config):
    """Raise InputError for a Q-Former that MiniGPT-4's projections do not fit."""
    text, vision = config.get("text_config"), config.get("vision_config")
    text = text if isinstance(text, dict) else {}
    vision = vision if isinstance(vision, dict) else {}
    model = config.get("model_type")
    language_model = text.get("model_type", "opt")
    width = text.get("d_model", text.get("hidden_size", 512))
    is_published = vision.get("hidden_size", 1408) == 1408  # not somebody's small model
    names = f"{config.get('_name_or_path')} {text.get('_name_or_path')}"
    is_other = (
        language_model != "t5"
        or width == 2048
        or (is_published and width != 4096)
        or re.search("flan-t5-(?!xxl)", names)
    )
    if model != "blip-2":
        why = f"{model}'s reads text too"
    elif is_other:
        why = f"it was trained for {language_model}, width {width}"
    else:
        return
    raise InputError(
        f"{folder}: not the Q-Former of MiniGPT-4 ({why}): with its projections this "
        "one gives nonsense; take Salesforce/blip2-flan-t5-xxl (the vision parts are "
        "the same)"
    )


def with_blip2_sizes(options, folder, part):
    """Fill in the sizes that are not given from BLIP-2's config.json.

    Raises InputError for a folder of something else.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(
            f"{folder}: it has no config.json; give the hub's BLIP-2, or the official "
            "file"
        )
    config = read_json(path)
    if part == "qformer":
        refuse_other_qformers(folder, config)
    sizes = config.get(f"{part}_config") or {}
    try:
        heads = options.heads or int(sizes.get("num_attention_heads", 0))
        n_layers = options.n_layers
        if n_layers == Options.n_layers:
            n_layers = int(sizes.get("num_hidden_layers", n_layers))
        activation = sizes.get("hidden_act", "gelu")
    except (AttributeError, TypeError, ValueError) as e:
        raise InputError(
            f"{path}: no sizes of a {part} part ({e}); fetch it again"
        ) from e
    if activation != "gelu":
        raise InputError(
            f"{folder}: its {part} part has the activation {activation}, not gelu: "
            "another model"
        )
    return replace(options, heads=heads, n_layers=n_layers)


def read_blip2(folder, part):
    """A part's tensors from the hub's BLIP-2, under the original names.

    Raises InputError for a file or tensor that is missing, or of another model.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = read_weight_map(index)
    else:
        only = "model.safetensors"
        files = dict.fromkeys(open_weights(folder / only), only)
    own = [name for name in files if re.match(OF_BLIP2[part], name)]
    report_dropped([name for name in files if name not in own])
    hub_names = rename_all(own, BLIP2_NAMES, folder)
    tensors = {}
    # File by file: open_weights keeps only the last one.
    for original, name in sorted(hub_names.items(), key=lambda pair: files[pair[1]]):
        shard = open_weights(folder / files[name])
        if name not in shard:
            raise InputError(
                f"{folder / files[name]}: it lacks {name}, which the index has there; "
                "fetch both again"
            )
        if original.endswith("attn.qkv.bias"):
            tensors |= split_qkv_bias(original, shard[name], f"{folder}: {name}")
        else:
            tensors[original] = shard[name]
    return tensors


def split_qkv_bias(name, bias, where):
    """The biases of queries and values. InputError if the keys have some, too."""
    q_bias, k_bias, v_bias = bias.chunk(3)
    if k_bias.any():
        raise InputError(
            f"{where}: its keys have biases, but EVA-ViT's have none; "
            "it is of another model"
        )
    block = name.removesuffix("qkv.bias")
    return {f"{block}q_bias": q_bias, f"{block}v_bias": v_bias}


def open_original(path, part):
    """An official file's tensors under the original names."""
    tensors = open_weights(path)
    if any(name.startswith("vision_model.") for name in tensors):
        raise InputError(
            f"{path}: a part of Hugging Face's BLIP-2; give its folder, "
            "with config.json"
        )
    has_prefix = any(name.startswith("visual_encoder.") for name in tensors)
    if part == "vision" and not has_prefix:
        return {f"visual_encoder.{name}": tensor for name, tensor in tensors.items()}
    return tensors


def select_part(part, source, tensors, n_layers):
    """A part's tensors under our names, with the first layers of a vision part."""
    lora = [name for name in tensors if "lora_" in name]
    if part == "proj" and lora:
        raise InputError(
            f"{source}: it adapts the language model, too ({lora[0]}), as MiniGPT-v2 "
            "does; only MiniGPT-4's projections can be used"
        )
    by_part = {part: {} for part in KINDS}
    for name, original in rename_all(tensors, NAMES, source).items():
        owner, _, own_name = name.partition(".")
        by_part[owner][own_name] = tensors[original]
    own = by_part[part]
    if not own:
        raise InputError(
            f"{source}: no tensors of the {part} part in it; give its official file"
        )
    if part == "vision":
        surplus = [name for name in own if layer_number(name) >= n_layers]
        report_dropped(surplus)
        for name in surplus:
            del own[name]
        for name, tensor in by_part["qformer"].items():
            if name.startswith("ln_vision."):  # for a model without Q-Former
                own[name] = tensor
    return own


def new_run(config, target):
    """The run that a converted projection belongs to. InputError if it exists."""
    run = load_config(config, {"out_dir": str(target.parent)})
    if target.name != "proj.safetensors":
        raise InputError(
            f"{target}: with --config, name it proj.safetensors, as chat.py expects"
        )
    open_folder(run)  # refuses to overwrite another run
    return run


def convert_part(part, source, target, options):
    """Convert a vision part, Q-Former or projection; return its number of tensors."""
    run = None
    if part == "proj" and options.config:
        run = new_run(options.config, target)
    if part in OF_BLIP2 and source.is_dir():
        options = with_blip2_sizes(options, source, part)
        tensors = read_blip2(source, part)
    else:
        tensors = open_original(source, part)
    own = select_part(part, source, tensors, options.n_layers)
    metadata = {"kind": KINDS[part]}
    if part != "proj":
        sizes = check_part(part, source, own, options)
        metadata["config"] = json.dumps(asdict(sizes))
    write(target, own.items(), options.dtype, **metadata)
    if run:
        write_saved_config(run)
    return len(own)


# ---- llama -----------------------------------------------------------------------


class Source(NamedTuple):
    """A LLaMA in any format, under our names. Tensors are read on demand."""

    config: LlamaConfig
    layout: dict  # all tensors, on the meta device
    read: Callable  # name -> tensor


def open_llama(folder):
    """The Source of a folder, Hugging Face's or Meta's. InputError if it is broken."""
    if (folder / "params.json").is_file():
        return open_meta(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(
            f"{folder}: it has neither config.json nor params.json; "
            "give the folder of a LLaMA"
        )
    config = LlamaConfig.from_dict(read_json(path), str(path))
    layout, places = {}, {}
    for file in hub_files(folder):
        tensors = open_weights(file)
        for name, original in rename_all(tensors, HUB_NAMES, file).items():
            check_new(name, layout, file)
            layout[name] = tensors[original].to("meta")
            places[name] = file, original

    def read(name):
        file, original = places[name]
        return open_weights(file)[original]

    source = Source(config, layout, read)
    if config.tie_word_embeddings:
        check_tied(folder, LazyTensors(source))
        layout.pop("lm_head.weight", None)
    return source


def hub_files(folder):
    """The weight files of a Hugging Face folder, safetensors rather than .bin."""
    for whole in ("model.safetensors", "pytorch_model.bin"):
        files = hub_weight_files(folder, whole, whole.replace(".", "*."))
        if files:
            return files
    raise InputError(
        f"{folder}: no model*.safetensors and no pytorch_model*.bin; "
        "fetch the weights too"
    )


def open_meta(folder):
    """The Source of Meta's own format: consolidated.00.pth ... and params.json."""
    path = folder / "params.json"
    params = read_json(path)
    files = sorted(folder.glob("consolidated.*.pth"))
    if not files:
        raise InputError(
            f"{folder}: no consolidated.*.pth beside params.json; fetch the weights too"
        )
    check_above_0(params, ("dim", "n_layers", "n_heads", "norm_eps"), path)
    if params.get("use_scaled_rope"):
        raise InputError(
            f"{path}: use_scaled_rope is not supported; take the hub's folder, with "
            "config.json"
        )
    first = open_weights(files[0])
    originals = rename_all(first, META_NAMES, files[0])
    layout = {}
    for name, original in originals.items():
        piece = first[original].to("meta")
        layout[name] = join_pieces(name, [piece] * len(files))
    missing = {"embed_tokens.weight", "layers.0.mlp.gate_proj.weight"} - layout.keys()
    if missing:
        raise InputError(f"{files[0]}: it has no {min(missing)}; fetch it again")
    sizes = {
        "vocab_size": len(layout["embed_tokens.weight"]),
        "hidden_size": params["dim"],
        "intermediate_size": len(layout["layers.0.mlp.gate_proj.weight"]),
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params.get("n_kv_heads"),
        "rms_norm_eps": params["norm_eps"],
        "rope_theta": params.get("rope_theta"),
    }
    config = LlamaConfig.from_dict(sizes, str(path))

    def read(name):
        pieces = [open_weights(file)[originals[name]] for file in files]
        whole = join_pieces(name, pieces)
        if "q_proj" in name or "k_proj" in name:
            return pairs_to_halves(whole, config.head_dim)
        return whole

    return Source(config, layout, read)


def join_pieces(name, pieces):
    """Join a tensor that Meta split over files: matrices by rows, some by columns."""
    if pieces[0].dim() == 1:  # a norm's, the same in all files
        return pieces[0]
    by_columns = re.match("embed_tokens|.*(o_proj|down_proj)", name)
    return torch.cat(pieces, dim=1 if by_columns else 0)


def pairs_to_halves(weight, head_dim):
    """Reorder rows for Hugging Face's rotary embedding, whose pairs are (i, i + n/2).

    Meta's are (0, 1), (2, 3) ... of each head. weight: (heads * head_dim, in).
    """
    pairs = weight.unflatten(0, (-1, head_dim // 2, 2))
    return pairs.transpose(1, 2).flatten(0, 2)


def check_above_0(settings, names, path):
    """Raise InputError unless each of the settings is a number above 0."""
    for name in names:
        value = settings.get(name)
        if not isinstance(value, int | float) or value <= 0:
            raise InputError(
                f"{path}: {name} = {value!r} is no number above 0; fetch the file again"
            )


def n_embeddings(source):
    """The number of embedding rows; 0 without embeddings."""
    return len(source.layout.get("embed_tokens.weight", ()))


def trim(source, vocab_size):
    """The source without the embedding rows from vocab_size on."""
    rows = n_embeddings(source)
    config = replace(source.config, vocab_size=min(rows, vocab_size))
    if rows <= vocab_size:
        return source._replace(config=config)
    note(f"embeddings: {rows} rows trimmed to {vocab_size}")

    def cut(name, tensor):
        has_rows = name in ("embed_tokens.weight", "lm_head.weight")
        return tensor[:vocab_size] if has_rows else tensor

    layout = {name: cut(name, tensor) for name, tensor in source.layout.items()}
    return Source(config, layout, lambda name: cut(name, source.read(name)))


def add_base(delta, base):
    """The sum of two models.

    Embedding rows that only one of them has, such as Vicuna v0's 32,001st, are dropped.
    """
    rows = min(n_embeddings(delta), n_embeddings(base))
    delta, base = trim(delta, rows), trim(base, rows)
    differences = shapes_of(delta.layout).items() ^ shapes_of(base.layout).items()
    names = sorted({name for name, _ in differences})
    if names:
        raise InputError(
            f"--delta: SRC is a delta of another model; {', '.join(names[:3])} differ"
        )

    def read(name):
        total = delta.read(name) + base.read(name)
        return total.to(delta.layout[name].dtype)

    return delta._replace(read=read)


def read_lora(path, layout):
    """An adapter: {our name: {"A": (r, in), "B": (out, r)}}, float32.

    Raises InputError for matrices without a partner, or of another model.
    """
    pairs = {}
    for name, tensor in open_weights(path).items():
        match = re.fullmatch(
            r"base_model\.model\.(?:model\.)?(.*\.)lora_([AB])\.(?:default\.)?weight",
            name,
        )
        ours = f"{match[1]}weight" if match else ""
        if ours not in layout:
            raise InputError(f"{path}: {name} changes no tensor of this model")
        check_tensor(name, tensor, path)
        pairs.setdefault(ours, {})[match[2]] = tensor.float()
    for name, pair in pairs.items():
        if len(pair) < 2:
            raise InputError(
                f"{path}: lora_A or lora_B is missing for {name}; fetch it again"
            )
        shape = (*pair["B"].shape[:1], *pair["A"].shape[1:])
        if shape != layout[name].shape or len(pair["A"]) != pair["B"].shape[-1]:
            raise InputError(
                f"{path}: {name} is a matrix of {shape}, in the language model one of "
                f"{tuple(layout[name].shape)}; the adapter is for another model"
            )
    return pairs


def merge_lora(source, folder):
    """W + (alpha / r) B A, for each W that the adapter changes."""
    settings_path = folder / "adapter_config.json"
    settings = read_json(settings_path)
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        path = path.with_suffix(".bin")
    has_bias = settings.get("bias", "none") != "none"
    if has_bias or settings.get("fan_in_fan_out") or settings.get("use_dora"):
        raise InputError(
            f"--lora={folder}: only plain LoRA can be merged, no bias, DoRA or "
            "fan_in_fan_out"
        )
    check_above_0(settings, ("r", "lora_alpha"), settings_path)
    exponent = 0.5 if settings.get("use_rslora") else 1
    alphas = settings.get("alpha_pattern") or {}
    check_patterns(alphas, settings_path)
    check_above_0(alphas, alphas, settings_path)
    pairs = read_lora(path, source.layout)

    def read(name):
        weight = source.read(name)
        if name not in pairs:
            return weight
        A, B = pairs[name]["A"], pairs[name]["B"]
        alpha = of_layer(alphas, name, settings["lora_alpha"])
        change = alpha / len(A) ** exponent * B @ A  # len(A) is the rank
        return (weight.float() + change).to(weight.dtype)

    return source._replace(read=read)


def check_patterns(alphas, path):
    """Raise InputError unless it is PEFT's {pattern: value}."""
    malformed = InputError(f"{path}: alpha_pattern is malformed; fetch it again")
    if not isinstance(alphas, dict):
        raise malformed
    try:
        for pattern in alphas:
            re.compile(pattern)
    except re.error as e:
        raise malformed from e


def of_layer(by_pattern, name, default):
    """The value that PEFT's {pattern: value} gives a layer: the end of its name."""
    module = hub_name(name).removesuffix(".weight")
    for pattern, value in by_pattern.items():
        if re.fullmatch(rf"(.*\.)?(?:{pattern})", module):
            return value
    return default


class LazyTensors(dict):
    """The layout of a Source, whose tensors are read when asked for."""

    def __init__(self, source):
        super().__init__(source.layout)
        self.read = source.read

    def __getitem__(self, name):
        return self.read(name)


def quantize_tensor(name, tensor, dtype):
    """A matrix as int8 or int4 with its scales under NAME_scale; others as bfloat16."""
    if not name.endswith(("_proj.weight", "lm_head.weight")):
        return {name: tensor.bfloat16()}
    matrix, scales = quantize_matrix(name, tensor, dtype)
    return {name: matrix, f"{name}_scale": scales}


def quantize_llama(source, dtype):
    """The source with int8 or int4 matrices, each followed by its scales."""
    layout = {}
    for name, tensor in source.layout.items():
        layout |= quantize_tensor(name, tensor, dtype)
    mark = fingerprint(LazyTensors(source))
    changes = {"quantization": dtype, "rotated": True, "fingerprint": mark}
    config = replace(source.config, **changes)

    @lru_cache(maxsize=1)  # a matrix and its scales are asked for in turn
    def read_quantized(name):
        return quantize_tensor(name, source.read(name), dtype)

    def read(name):
        return read_quantized(name.removesuffix("_scale"))[name]

    return Source(config, layout, read)


def write_llama(folder, llama, dtype=""):
    """Write weights, one shard in memory at a time, and a Hugging Face config.json."""
    if dtype in QUANTIZED:
        llama, dtype = quantize_llama(llama, dtype), ""
    shards = {}
    total_size = 0
    for name, tensor in llama.layout.items():
        total_size += tensor.to(dtype=torch_dtype(dtype)).nbytes
        shards.setdefault(total_size // SHARD, []).append(name)
    weight_map = {}
    for i, names in enumerate(progress(shards.values(), "llama", unit="shard"), 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = ((hub_name(name), llama.read(name)) for name in names)
        write(folder / file, tensors, dtype)
        weight_map |= {hub_name(name): file for name in names}
        open_weights.cache_clear()  # unmaps the pages that were read
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    contents = {
        "model.safetensors.index.json": index,
        "config.json": llama.config.to_hub(),
    }
    for name, content in contents.items():
        with replacing(folder / name) as temporary:
            temporary.write_text(json.dumps(content, indent=1))


def convert_llama(source, target, options):
    """Write a folder that from_files and the Hugging Face library read.

    Returns its number of tensors.
    """
    if target.exists():
        raise InputError(
            f"{target} exists already: give another name, or remove it first"
        )
    llama = open_llama(source)
    note(f"{source}: a model of the family {llama.config.model_type}")
    if options.delta:
        llama = add_base(llama, open_llama(Path(options.delta)))
    if options.lora:
        llama = merge_lora(llama, Path(options.lora))
    tokenizer = find_tokenizer(source, source.parent, Path(options.delta or source))
    if not isinstance(tokenizer, JsonTokenizer):
        llama = trim(llama, tokenizer.vocab_size)
    if llama.config.quantization:
        raise InputError(
            f"{source}: its matrices are {llama.config.quantization} already; "
            "take the original"
        )
    expected = parameter_shapes(Llama, llama.config)
    check_fit(source, "llama", shapes_of(llama.layout), expected)
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        write_llama(part, llama, options.dtype)
        for name, content in tokenizer.files().items():
            (part / name).write_bytes(content)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return len(llama.layout)


def measure_perplexity(folder):
    """Note the perplexity of a converted LLaMA; a bad one gets a warning."""
    model = MiniGPT4.from_files(None, None, folder)
    check_english(model.llama, model.tokenizer)


def find_tokenizer(*folders):
    """The tokenizer of the first folder with one. InputError if there is none."""
    for folder in folders:
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            return open_tokenizer("", folder)
    raise InputError(
        f"{folders[0]}: it has no tokenizer.model of sentencepiece, and no "
        "tokenizer.json; fetch one too"
    )


# ---- the other way, and the command ----------------------------------------------


def export(run, target, options):
    """Write a run's projection as the original's checkpoint.

    It holds {"model": {"llama_proj.weight": ..., "llama_proj.bias": ...}}. Returns its
    number of tensors.
    """
    tensors, _ = load_tensors(read_saved_config(run).proj)
    dtype = torch_dtype(options.dtype or "float32")
    content = {f"llama_{name}": tensor.to(dtype) for name, tensor in tensors.items()}
    with replacing(target) as temporary:
        torch.save({"model": content}, temporary)
    return len(tensors)


CONVERTERS = {part: partial(convert_part, part) for part in KINDS}
CONVERTERS |= {"llama": convert_llama, "export": export}


def main(argv):
    usage = f"{'|'.join(CONVERTERS)} SRC DST"
    (what, *paths), options, _ = read_options(argv, __doc__, usage, Options())
    check_name(what, CONVERTERS, "command line")
    if options.dtype in QUANTIZED and what != "llama":
        raise InputError(f"--dtype={options.dtype}: only llama can be quantized")
    source, target = map(Path, paths)
    target.parent.mkdir(parents=True, exist_ok=True)
    n = CONVERTERS[what](source, target, options)
    note(f"{target}: {n} tensors written")
    if what == "llama" and options.check:
        measure_perplexity(str(target))


if __name__ == "__main__":
    run_main(main)
