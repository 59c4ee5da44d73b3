"""Official weight files -> the safetensors files that the program reads, and back.

    python tools/convert.py vision eva_vit_g.pth weights/eva_vit_g.safetensors [--n_layers=39] [--heads=16]
    python tools/convert.py qformer blip2_pretrained_flant5xxl.pth weights/qformer.safetensors [--heads=12]
    python tools/convert.py qformer BLIP2_FOLDER weights/qformer.safetensors; the same for vision
    python tools/convert.py llama SRC_FOLDER weights/vicuna-7b [--delta=BASE_FOLDER] [--lora=ADAPTER_FOLDER]
    python tools/convert.py proj prerained_minigpt4_7b.pth out/official/proj.safetensors [--config=CONFIG]
    python tools/convert.py export out/stage2 minigpt4.pth

BLIP2_FOLDER is Salesforce/blip2-flan-t5-xxl from the Hugging Face hub, or as much of it as is needed:
config.json, model.safetensors.index.json and the shards that hold the part. `llama` takes Hugging Face's
.bin or .safetensors files (the latter need no conversion) or Meta's *.pth. --delta adds SRC to a base model
(Vicuna v0); --lora merges an adapter. With a training config, `proj` also writes the config.json that chat.py
--ckpt needs. Nothing in a .pth or .bin file is executed.
"""

import json
import pickle
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate
from math import isqrt
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configs.schema import load_config, read_saved_config
from llama import Llama, LlamaConfig, Tokenizer
from model import PARTS, MiniGPT4, check_english
from plumbing.console import InputError, note, run_main
from plumbing.files import read_json, replacing, start_of
from plumbing.options import option, override, parse_args
from plumbing.quantized import QUANTIZED, quantize
from plumbing.weights import (
    DTYPES,
    check_fit,
    check_sizes,
    fingerprint,
    indexed_files,
    load_tensors,
    read_weight_map,
)
from qformer import QFormer, QFormerConfig
from train import refuse_to_overwrite, start_folder
from vision import VisionConfig, VisionTransformer

TORCH_DTYPES = {"": None} | {name: getattr(torch, name) for name in DTYPES}
SHARD = 2 * 2**30  # bytes, about the size of each file of a converted LLaMA

# How an original name begins -> the part and how our name begins; "#" is the layer's number. A name that is
# neither here nor in NOT_USED is an error.
LAYER = "Qformer.bert.encoder.layer.#."
NAMES = {
    "visual_encoder.": "vision.",
    "ln_vision.": "qformer.ln_vision.",
    "query_tokens": "qformer.query_tokens",
    "Qformer.bert.embeddings.LayerNorm.": "qformer.norm.",
    LAYER + "attention.output.dense.": "qformer.layers.#.self_attn.out.",
    LAYER + "attention.output.LayerNorm.": "qformer.layers.#.self_attn.norm.",
    LAYER + "attention.self.": "qformer.layers.#.self_attn.",
    LAYER + "crossattention.output.dense.": "qformer.layers.#.cross_attn.out.",
    LAYER + "crossattention.output.LayerNorm.": "qformer.layers.#.cross_attn.norm.",
    LAYER + "crossattention.self.": "qformer.layers.#.cross_attn.",
    LAYER + "intermediate_query.dense.": "qformer.layers.#.fc1.",
    LAYER + "output_query.dense.": "qformer.layers.#.fc2.",
    LAYER + "output_query.LayerNorm.": "qformer.layers.#.norm.",
    "llama_proj.": "proj.proj.",
}
BLIP2_NAMES = {  # Hugging Face's BLIP-2 -> the original names
    "vision_model.embeddings.class_embedding": "visual_encoder.cls_token",
    "vision_model.embeddings.position_embedding": "visual_encoder.pos_embed",
    "vision_model.embeddings.patch_embedding.": "visual_encoder.patch_embed.proj.",
    "vision_model.encoder.layers.#.layer_norm": "visual_encoder.blocks.#.norm",
    "vision_model.encoder.layers.#.self_attn.projection.": "visual_encoder.blocks.#.attn.proj.",
    "vision_model.encoder.layers.#.self_attn.": "visual_encoder.blocks.#.attn.",
    "vision_model.encoder.layers.#.mlp.": "visual_encoder.blocks.#.mlp.",
    "vision_model.post_layernorm.": "ln_vision.",
    "query_tokens": "query_tokens",
    "qformer.layernorm.": "Qformer.bert.embeddings.LayerNorm.",
    "qformer.encoder.layer.#.attention.attention.": LAYER + "attention.self.",
    "qformer.encoder.layer.#.crossattention.attention.": LAYER + "crossattention.self.",
    "qformer.": "Qformer.bert.",
}
OF_BLIP2 = {
    "vision": r"vision_model\.(?!post_layernorm)",  # which of these names belong to a part
    "qformer": r"qformer\.|query_tokens|vision_model\.post_layernorm",
}
HUB_NAMES = {"model.": "", "lm_head.": "lm_head."}  # Hugging Face's LLaMA
META_NAMES = {
    "tok_embeddings.": "embed_tokens.",
    "norm.weight": "norm.weight",
    "output.": "lm_head.",
    "layers.#.attention_norm.": "layers.#.input_layernorm.",
    "layers.#.ffn_norm.": "layers.#.post_attention_layernorm.",
    **{f"layers.#.attention.w{x}.": f"layers.#.self_attn.{x}_proj." for x in "qkvo"},
    "layers.#.feed_forward.w1.": "layers.#.mlp.gate_proj.",
    "layers.#.feed_forward.w2.": "layers.#.mlp.down_proj.",
    "layers.#.feed_forward.w3.": "layers.#.mlp.up_proj.",
}
NOT_USED = re.compile(
    "|".join(
        (  # at the beginning of an original name
            r"visual_encoder\.(norm|fc_norm|head)\.",  # EVA's classifier
            r"Qformer\.(cls|bert\.pooler|bert\.encoder\.layer\.\d+\.(intermediate|output))\.",  # the text branch
            r"Qformer\.bert\.embeddings\.(word|position)_|(vision_proj|text_proj|itm_head)\.|temp$",
            r"(t5_proj|opt_proj|t5_model|opt_model|llama_model)\.",  # language models
            r".*rotary_emb\.inv_freq$|rope\.freqs$",
        )
    )
)  # computed, not learned


def rename(name: str, table: dict[str, str]) -> str | None:
    """("layers.3.attention.wq.weight", META_NAMES) -> "layers.3.self_attn.q_proj.weight"; None if unknown."""
    number = re.search(r"\.(\d+)\.", name)
    general = re.sub(r"\.\d+\.", ".#.", name, count=1)
    ours = next(
        (
            new + general[len(old) :]
            for old, new in table.items()
            if general.startswith(old)
        ),
        None,
    )
    return ours.replace("#", number[1]) if ours and number else ours


def rename_all(
    names: Iterable[str], table: dict[str, str], path: Path | str
) -> dict[str, str]:
    """{our name: the original's} of all tensors in use. Raises InputError for unknown names."""
    names = list(names)
    renamed = {name: rename(name, table) for name in names if not NOT_USED.match(name)}
    if unknown := [name for name, ours in renamed.items() if ours is None]:
        raise InputError(
            f"{path}: {len(unknown)} unexpected tensors ({', '.join(unknown[:3])}); this file "
            "is of another model"
        )
    report_dropped([name for name in names if name not in renamed])
    return {ours: name for name, ours in renamed.items()}


def report_dropped(names: list[str]):
    kinds = Counter(name.split(".")[0] for name in names)
    counts = (
        f" ({', '.join(f'{k} {n}' for k, n in sorted(kinds.items()))})"
        if len(kinds) > 1
        else ""
    )
    if names:
        note(f"left out on purpose: {len(names)} tensors, such as {names[0]}{counts}")


@lru_cache(maxsize=1)  # only one file is mapped at a time
def open_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .pth, .bin or .safetensors file, memory-mapped where the format allows it. Raises
    InputError for a file that is missing, broken, or holds more than plain data."""
    if path.suffix == ".safetensors":
        return load_tensors(path)[0]
    is_zip = (
        start_of(path, "weight file")[:2] == b"PK"
    )  # files from before PyTorch 1.6 cannot be mapped
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as e:
        raise InputError(
            f"{path}: refused: no PyTorch file, or one that holds more than tensors and could "
            "run code; get it from its official source"
        ) from e
    except Exception as e:  # PyTorch's reader raises nearly anything on a broken file
        raise InputError(
            f"{path}: not a complete PyTorch file ({type(e).__name__}); fetch it again"
        ) from e
    content = content if isinstance(content, dict) else {}
    for _ in range(3):
        content = (
            content["model"] if isinstance(content.get("model"), dict) else content
        )
    tensors = {
        k: t
        for k, t in content.items()
        if isinstance(k, str) and isinstance(t, torch.Tensor)
    }
    if not tensors:
        raise InputError(
            f"{path}: holds no tensors by name; it is not a file of weights"
        )
    return tensors


def sound(name: str, tensor: torch.Tensor, path: Path) -> torch.Tensor:
    """The tensor. Raises InputError for one that is no weight, or not finite."""
    is_weight = tensor.is_floating_point() or tensor.dtype in (
        torch.int8,
        torch.uint8,
    )  # quantized
    if (
        not is_weight
        or not tensor.numel()
        or tensor.untyped_storage().nbytes() < tensor.nbytes
    ):
        what = f"{path.name}: {name}, {tensor.dtype} {tuple(tensor.shape)}"
        raise InputError(
            f"{what}, holds no weights, or fewer than its shape says; fetch the source again"
        )
    if not tensor.isfinite().all():
        raise InputError(
            f"{path.name}: {name} holds NaN or infinity: the source is broken; fetch it again"
        )
    return tensor


def write(
    path: Path, tensors: Iterable[tuple[str, torch.Tensor]], dtype: str, **metadata: str
):
    """Write a safetensors file of (name, tensor), cast to dtype unless it is empty."""
    with replacing(path) as temporary:
        tensors = ((k, sound(k, t, path)) for k, t in tensors)
        cast = {
            k: t.to(dtype=TORCH_DTYPES[dtype], copy=True).contiguous()
            for k, t in tensors
        }
        save_file(cast, temporary, {"format": "pt"} | metadata)


def parameter_shapes(module_class, config) -> dict[str, tuple]:
    """{name: shape} of the parameters of module_class(config)."""
    with torch.device("meta"):
        return {
            k: tuple(p.shape)
            for k, p in module_class(check_sizes(config, "sizes")).named_parameters()
        }


# ---- vision, qformer, proj ---------------------------------------------------------------------------------


def vision_sizes(shapes: dict, options: "Options") -> VisionConfig:
    """Sizes from {our name: shape}. Heads are an option, and layers too: a file may hold more."""
    patch, n_tokens = shapes["patch_embed.proj.weight"][-1], shapes["pos_embed"][1]
    return VisionConfig(
        image_size=isqrt(n_tokens - 1) * patch,
        patch_size=patch,
        width=shapes["cls_token"][-1],
        n_layers=options.n_layers,
        n_heads=options.heads or 16,
        mlp_hidden=shapes["blocks.0.mlp.fc1.weight"][0],
    )


def qformer_sizes(shapes: dict, options: "Options") -> QFormerConfig:
    """Sizes from {our name: shape}, and the number of heads from the options."""
    n_layers = max(int(k.split(".")[1]) for k in shapes if k.startswith("layers.")) + 1
    with_cross = sorted(
        int(k.split(".")[1]) for k in shapes if k.endswith("cross_attn.key.weight")
    )
    _, n_queries, width = shapes["query_tokens"]
    return QFormerConfig(
        n_queries=n_queries,
        width=width,
        n_layers=n_layers,
        n_heads=options.heads or 12,
        ffn_hidden=shapes["layers.0.fc1.weight"][0],
        vision_width=shapes["layers.0.cross_attn.key.weight"][1],
        cross_attention_every=with_cross[1] if len(with_cross) > 1 else n_layers,
    )


def open_blip2(
    folder: Path, part: str, options: "Options"
) -> tuple[dict[str, torch.Tensor], "Options"]:
    """A part of the hub's BLIP-2 under the original names, and the options with the config's sizes."""
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder}: it has no config.json; give the hub's BLIP-2, or the official file"
        )
    config, index = (
        read_json(folder / "config.json"),
        folder / "model.safetensors.index.json",
    )
    if part == "qformer":
        refuse_other_qformers(folder, config)
    sizes = config.get(f"{part}_config") or {}
    try:
        heads, n_layers = (
            sizes.get("num_attention_heads", 0),
            sizes.get("num_hidden_layers", 39),
        )
        given = options.n_layers != Options.n_layers
        options = replace(
            options,
            heads=options.heads or int(heads),
            n_layers=options.n_layers if given else int(n_layers),
        )
    except (AttributeError, TypeError, ValueError) as e:
        raise InputError(
            f"{folder}/config.json: no sizes of a {part} part ({e}); fetch it again"
        ) from e
    if (kind := sizes.get("hidden_act", "gelu")) != "gelu":
        raise InputError(
            f"{folder}: its {part} part has the activation {kind}, not gelu: another model"
        )
    if index.is_file():
        files = read_weight_map(index)
    else:
        files = dict.fromkeys(
            open_weights(folder / "model.safetensors"), "model.safetensors"
        )
    wanted = {name: bool(re.match(OF_BLIP2[part], name)) for name in files}
    report_dropped([name for name in files if not wanted[name]])
    names = rename_all(filter(wanted.get, files), BLIP2_NAMES, folder)
    tensors = {}
    for k in sorted(names, key=lambda k: files[names[k]]):
        if names[k] not in (shard := open_weights(folder / files[names[k]])):
            raise InputError(
                f"{folder / files[names[k]]}: it lacks {names[k]}, which the index has there; "
                "fetch both again"
            )
        tensors[k] = shard[names[k]]
    for k in [k for k in tensors if k.endswith("attn.qkv.bias")]:
        q_bias, k_bias, v_bias = tensors.pop(k).chunk(3)
        if k_bias.any():
            raise InputError(
                f"{folder}: {names[k]}: its keys have biases, as EVA-ViT's never have; it is of "
                "another model"
            )
        tensors |= {
            k.replace("qkv.bias", "q_bias"): q_bias,
            k.replace("qkv.bias", "v_bias"): v_bias,
        }
    return tensors, options


def refuse_other_qformers(folder: Path, config: dict):
    """Raise InputError for a Q-Former that MiniGPT-4's projections were not trained with."""
    text, vision = (
        c if isinstance(c := config.get(f"{name}_config"), dict) else {}
        for name in ("text", "vision")
    )
    kind, width = (
        text.get("model_type", "opt"),
        text.get("d_model", text.get("hidden_size", 512)),
    )
    published = (
        vision.get("hidden_size", 1408) == 1408
    )  # others are small models of somebody's own
    name, why = f"{config.get('_name_or_path')} {text.get('_name_or_path')}", ""
    if (model := config.get("model_type")) != "blip-2":
        why = f"{model}'s reads text too"
    elif (
        kind != "t5"
        or width == 2048
        or published
        and width != 4096
        or re.search("flan-t5-(?!xxl)", name)
    ):
        why = f"it was trained for {kind}, width {width}"
    if why:
        raise InputError(
            f"{folder}: not the Q-Former of MiniGPT-4 ({why}): with its projections this one "
            "gives nonsense; take Salesforce/blip2-flan-t5-xxl (the vision parts are the same)"
        )


def convert_part(part: str, source: str, target: str, options: "Options") -> int:
    """Convert the file of the vision part, the Q-Former or the projection. Returns its number of tensors."""
    run = None
    if part == "proj" and options.config:
        run = load_config(options.config, {"out_dir": str(Path(target).parent)})
        if Path(target).name != "proj.safetensors":
            raise InputError(
                f"{target}: with --config, name it proj.safetensors, as chat.py expects"
            )
        refuse_to_overwrite(run)
    if part in OF_BLIP2 and Path(source).is_dir():
        tensors, options = open_blip2(Path(source), part, options)
    else:
        tensors = open_weights(Path(source))
    if any(k.startswith("vision_model.") for k in tensors):
        raise InputError(
            f"{source}: a part of Hugging Face's BLIP-2; give its folder, with config.json"
        )
    if part == "vision" and not any(k.startswith("visual_encoder.") for k in tensors):
        tensors = {f"visual_encoder.{k}": t for k, t in tensors.items()}
    renamed = rename_all(tensors, NAMES, source)
    own = {
        k.removeprefix(f"{part}."): tensors[name]
        for k, name in renamed.items()
        if k.startswith(f"{part}.")
    }
    if not own:
        raise InputError(
            f"{source}: no tensors of the {part} part in it; give its official file"
        )
    if part == "vision":
        beyond = [
            k
            for k in own
            if k.startswith("blocks.") and int(k.split(".")[1]) >= options.n_layers
        ]
        report_dropped(beyond)
        own = {k: t for k, t in own.items() if k not in beyond}
        own |= {
            k.removeprefix("qformer."): tensors[name]
            for k, name in renamed.items()
            if k.startswith("qformer.ln_vision.")
        }  # for a model without Q-Former
    sizes = (
        {}
        if part == "proj"
        else {"config": json.dumps(check_part(part, source, own, options))}
    )
    write(Path(target), own.items(), options.dtype, **sizes)
    if run:
        start_folder(run)
    return len(own)


def check_part(part: str, source: str, tensors: dict, options: "Options") -> dict:
    """The sizes of a vision part or Q-Former. Raises InputError unless exactly its tensors are there."""
    shapes = {k: tuple(t.shape) for k, t in tensors.items()}
    try:
        config = (
            vision_sizes(shapes, options)
            if part == "vision"
            else qformer_sizes(shapes, options)
        )
    except (KeyError, ValueError, IndexError) as e:
        raise InputError(
            f"{source}: does not fit as {part}: its sizes cannot be inferred ({e}); it is of "
            "another model"
        ) from e
    if config.width % config.n_heads:
        raise InputError(
            f"{source}: width {config.width} is no multiple of --heads={config.n_heads}"
        )
    expected = parameter_shapes(
        VisionTransformer if part == "vision" else QFormer, config
    )
    if part == "vision" and "ln_vision.weight" in shapes:
        expected |= dict.fromkeys(
            ("ln_vision.weight", "ln_vision.bias"), (config.width,)
        )
    check_fit(source, part, shapes, expected)
    return asdict(config)


# ---- llama -------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """A LLaMA in any format, under our names. Tensors are read on demand."""

    config: LlamaConfig
    layout: dict[str, torch.Tensor]  # all tensors, on the meta device
    get: Callable[[str], torch.Tensor]  # reads one


def open_llama(folder: Path) -> Source:
    """A Hugging Face or Meta folder. Raises InputError when something is missing."""
    if (folder / "params.json").is_file():
        return open_meta(folder)
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder}: it has neither config.json nor params.json; give the folder of a LLaMA"
        )
    config = LlamaConfig.from_dict(
        read_json(folder / "config.json"), f"{folder}/config.json"
    )
    layout, places = {}, {}
    for path in hub_files(folder):
        tensors = open_weights(path)
        for k, name in rename_all(tensors, HUB_NAMES, path).items():
            layout[k], places[k] = tensors[name].to("meta"), (path, name)
    if config.tie_word_embeddings:
        layout.pop("lm_head.weight", None)
    return Source(config, layout, lambda k: open_weights(places[k][0])[places[k][1]])


def hub_files(folder: Path) -> list[Path]:
    """The weight files of a Hugging Face folder, safetensors rather than .bin."""
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{ending}.index.json"
        if index.is_file():
            return indexed_files(index)
        if files := sorted(folder.glob(f"{stem}*.{ending}")):
            return files
    raise InputError(
        f"{folder}: no model*.safetensors and no pytorch_model*.bin; fetch the weights too"
    )


def open_meta(folder: Path) -> Source:
    """consolidated.00.pth ... and params.json, in Meta's own names, layout and split over files."""
    params, files = (
        read_json(folder / "params.json"),
        sorted(folder.glob("consolidated.*.pth")),
    )
    if not files:
        raise InputError(
            f"{folder}: no consolidated.*.pth beside params.json; fetch the weights too"
        )
    check_above_0(
        params, ("dim", "n_layers", "n_heads", "norm_eps"), folder / "params.json"
    )
    tensors = open_weights(files[0])
    renamed = rename_all(tensors, META_NAMES, files[0])

    def join(k, pieces):
        columns = any(
            name in k for name in ("embed_tokens", "o_proj", "down_proj")
        )  # others: by rows
        return torch.cat(pieces, dim=int(columns)) if pieces[0].dim() > 1 else pieces[0]

    layout = {
        k: join(k, [tensors[name].to("meta")] * len(files))
        for k, name in renamed.items()
    }
    if (
        missing := {"embed_tokens.weight", "layers.0.mlp.gate_proj.weight"}
        - layout.keys()
    ):
        raise InputError(f"{files[0]}: it has no {min(missing)}; fetch it again")
    config = LlamaConfig.from_dict(
        {
            "vocab_size": len(layout["embed_tokens.weight"]),
            "hidden_size": params["dim"],
            "intermediate_size": len(layout["layers.0.mlp.gate_proj.weight"]),
            "num_hidden_layers": params["n_layers"],
            "num_attention_heads": params["n_heads"],
            "num_key_value_heads": params.get("n_kv_heads"),
            "rms_norm_eps": params["norm_eps"],
            "rope_theta": params.get("rope_theta"),
        },
        f"{folder}/params.json",
    )

    def get(k):
        whole = join(k, [open_weights(path)[renamed[k]] for path in files])
        if (
            "q_proj" in k or "k_proj" in k
        ):  # a head's pairs (0, 1), (2, 3) -> (0, n/2), (1, n/2 + 1)
            return (
                whole.unflatten(0, (-1, config.head_dim // 2, 2))
                .transpose(1, 2)
                .flatten(0, 2)
            )
        return whole

    return Source(config, layout, get)


def check_above_0(settings: dict, names: tuple[str, ...], path: Path):
    """Raise InputError unless each of the settings is a number above 0."""
    for name in names:
        if not isinstance(value := settings.get(name), (int, float)) or value <= 0:
            raise InputError(
                f"{path}: {name} = {value!r} is no number above 0; fetch the file again"
            )


def trim(source: Source, vocab_size: int) -> Source:
    """Without the embedding rows from vocab_size on."""
    rows = len(source.layout.get("embed_tokens.weight", ()))
    if rows <= vocab_size:
        return source._replace(config=replace(source.config, vocab_size=rows))
    note(f"embeddings: {rows} rows trimmed to {vocab_size}")

    def cut(k, tensor):
        return (
            tensor[:vocab_size]
            if k in ("embed_tokens.weight", "lm_head.weight")
            else tensor
        )

    return Source(
        replace(source.config, vocab_size=vocab_size),
        {k: cut(k, t) for k, t in source.layout.items()},
        lambda k: cut(k, source.get(k)),
    )


def add_base(delta: Source, base: Source) -> Source:
    """The sum of two models. Embedding rows that only one of them has are left out (Vicuna v0's 32,001st)."""
    rows = min(len(s.layout.get("embed_tokens.weight", ())) for s in (delta, base))
    delta, base = trim(delta, rows), trim(base, rows)
    shapes, base_shapes = (
        {k: t.shape for k, t in s.layout.items()} for s in (delta, base)
    )
    if misfits := {k for k, _ in shapes.items() ^ base_shapes.items()}:
        raise InputError(
            f"--delta: SRC is a delta of another model; {', '.join(sorted(misfits)[:3])} differ"
        )
    return delta._replace(
        get=lambda k: (delta.get(k) + base.get(k)).to(delta.layout[k].dtype)
    )


def merge_lora(source: Source, folder: Path) -> Source:
    """W + (alpha / r) B A, for each W that the adapter changes."""
    settings = read_json(folder / "adapter_config.json")
    path = folder / "adapter_model.safetensors"
    path = path if path.is_file() else path.with_suffix(".bin")
    if (
        settings.get("fan_in_fan_out")
        or settings.get("use_dora")
        or settings.get("bias", "none") != "none"
    ):
        raise InputError(
            f"--lora={folder}: only plain LoRA can be merged, no bias, DoRA or fan_in_fan_out"
        )
    check_above_0(settings, ("r", "lora_alpha"), folder / "adapter_config.json")
    scale = settings["lora_alpha"] / settings["r"] ** (
        0.5 if settings.get("use_rslora") else 1
    )
    pairs = {}
    for name, t in open_weights(path).items():
        match = re.fullmatch(
            r"base_model\.model\.(?:model\.)?(.*\.)lora_([AB])\.(?:default\.)?weight",
            name,
        )
        if not match or (k := f"{match[1]}weight") not in source.layout:
            raise InputError(f"{path}: {name} changes no tensor of this model")
        pairs.setdefault(k, {})[match[2]] = t.float()
    if missing := [k for k, ab in pairs.items() if len(ab) < 2]:
        raise InputError(
            f"{path}: lora_A or lora_B is missing for {missing[0]}; fetch it again"
        )

    def get(k):
        w = source.get(k)
        return (
            (w.float() + scale * pairs[k]["B"] @ pairs[k]["A"]).to(w.dtype)
            if k in pairs
            else w
        )

    return source._replace(get=get)


def convert_llama(source: str, target: str, options: "Options") -> int:
    """Write a folder that from_files and the Hugging Face library read. Returns its number of tensors."""
    folder, out = Path(source), Path(target)
    if out.exists():
        raise InputError(f"{out} exists already: give another name, or remove it first")
    llama = open_llama(folder)
    if options.delta:
        llama = add_base(llama, open_llama(Path(options.delta)))
    if options.lora:
        llama = merge_lora(llama, Path(options.lora))
    places = [
        p / "tokenizer.model"
        for p in (folder, folder.parent, Path(options.delta or folder))
    ]
    tokenizer = next(filter(Path.is_file, places), None)
    if tokenizer is None:
        raise InputError(
            f"{folder}: it has no tokenizer.model of sentencepiece; fetch it too"
        )
    llama = trim(llama, Tokenizer(str(tokenizer)).vocab_size)
    if llama.config.quantization:
        raise InputError(
            f"{source}: its matrices are {llama.config.quantization} already; take the original"
        )
    check_fit(
        source,
        "llama",
        {k: tuple(t.shape) for k, t in llama.layout.items()},
        parameter_shapes(Llama, llama.config),
    )
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        write_llama(part, llama, options.dtype)
        shutil.copyfile(tokenizer, part / "tokenizer.model")
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return len(llama.layout)


def write_llama(folder: Path, llama: Source, dtype: str = ""):
    """Write the weights, one shard in memory at a time, and config.json as Hugging Face does."""
    if dtype in QUANTIZED:
        llama, dtype = quantize_llama(llama, dtype), ""
    sizes = {k: t.to(dtype=TORCH_DTYPES[dtype]).nbytes for k, t in llama.layout.items()}
    shards, weight_map = {}, {}
    for k, end in zip(sizes, accumulate(sizes.values())):
        shards.setdefault(end // SHARD, []).append(k)
    hub_names = {k: k if k.startswith("lm_head") else f"model.{k}" for k in sizes}
    for i, names in enumerate(tqdm(shards.values(), desc="llama", unit="shard"), 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write(folder / file, ((hub_names[k], llama.get(k)) for k in names), dtype)
        weight_map |= {hub_names[k]: file for k in names}
        open_weights.cache_clear()  # unmaps the pages that were read
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    for name, content in (
        ("model.safetensors.index.json", index),
        ("config.json", llama.config.to_hub()),
    ):
        with replacing(folder / name) as temporary:
            temporary.write_text(json.dumps(content, indent=1))


class LazyTensors(dict):
    """The layout of a Source, whose tensors are read when asked for."""

    def __init__(self, source: Source):
        super().__init__(source.layout)
        self.read = source.get

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.read(name)


def quantize_llama(source: Source, dtype: str) -> Source:
    """With int8 or int4 matrices, each followed by its scales, and the rest in bfloat16."""

    def convert(k: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if not k.endswith(("_proj.weight", "lm_head.weight")):
            return {k: tensor.bfloat16()}
        return dict(
            zip(
                (k, f"{k}_scale"),
                quantize(tensor, "int8" if k.startswith("lm_head") else dtype),
            )
        )

    @lru_cache(maxsize=1)
    def read(k: str) -> dict[str, torch.Tensor]:
        return convert(k, source.get(k))

    config = replace(
        source.config, quantization=dtype, fingerprint=fingerprint(LazyTensors(source))
    )
    layout = {
        name: t
        for k, tensor in source.layout.items()
        for name, t in convert(k, tensor).items()
    }
    return Source(config, layout, lambda k: read(k.removesuffix("_scale"))[k])


def export(run: str, target: str, options: "Options") -> int:
    """Write a run's projection as the original's checkpoint, {"model": {"llama_proj....}}."""
    tensors = load_tensors(read_saved_config(run).proj)[0]
    content = {
        f"llama_{k}": t.to(TORCH_DTYPES[options.dtype or "float32"])
        for k, t in tensors.items()
    }
    with replacing(target) as temporary:
        torch.save({"model": content}, temporary)
    return len(tensors)


@dataclass(frozen=True)
class Options:
    dtype: str = option(
        "",
        f"{', '.join(DTYPES)}; llama also int8, int4; none: the source's own (export: "
        "float32)",
    )
    n_layers: int = option(39, "vision: blocks to keep")
    heads: int = option(
        0, "vision, qformer: attention heads; 0: the real model's, 16 and 12"
    )
    delta: str = option(
        "", "llama: folder of the base model that SRC is the difference to"
    )
    lora: str = option("", "llama: folder of a LoRA adapter to merge")
    check: bool = option(True, "llama: measure the result's perplexity on English text")
    config: str = option("", "proj: the training config that names the other parts")

    def __post_init__(self):
        if self.dtype not in (*TORCH_DTYPES, *QUANTIZED):
            raise InputError(
                f"--dtype={self.dtype}: give one of {', '.join((*DTYPES, *QUANTIZED))}"
            )


def main(argv: list[str]):
    (kind, source, target), given = parse_args(argv, __doc__, "KIND SRC DST", Options)
    options = override(Options(), given)
    converters = {k: partial(convert_part, k) for k in PARTS} | {
        "llama": convert_llama,
        "export": export,
    }
    if kind not in converters:
        raise InputError(
            f"usage: python tools/convert.py {'|'.join(converters)} SRC DST [--key=value ...]"
        )
    if options.dtype in QUANTIZED and kind != "llama":
        raise InputError(f"--dtype={options.dtype}: only llama can be quantized")
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    n = converters[kind](source, target, options)
    note(f"{target}: {n} tensors written")
    if kind == "llama" and options.check:
        check_english(MiniGPT4.from_files(None, None, target))


if __name__ == "__main__":
    run_main(main)
