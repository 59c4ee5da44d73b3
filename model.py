"""MiniGPT-4 (arXiv 2304.10592): frozen ViT and Q-Former look, a linear layer translates, frozen LLaMA talks.

    image -> vision -> ln_vision -> qformer -> proj -> (in place of the IMAGE ids) llama -> words

Without a Q-Former (LLaMA-2 variant) each 4 neighbouring patch tokens are joined into one image token.

Axes: B sequences, T tokens, N image tokens of a picture, D width.
"""

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint

from configs.schema import InputError, override
from llama import CONTEXT, IGNORE, IMAGE, KVCache, Llama, LlamaConfig, Tokenizer, read_llama_folder
from qformer import QFormer, QFormerConfig
from vision import VisionConfig, VisionTransformer, normalize

PARTS = ("vision", "qformer", "proj", "llama")
PATCHES_PER_TOKEN = 4  # joined into one image token where there is no Q-Former
LOGITS_AT_ONCE = 256   # positions; of a vocabulary of 32,000 that is 33 MB in float32
FILE_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
               torch.float64: "F64"}  # as safetensors files call them


class MiniGPT4(nn.Module):
    """The whole model. Each part computes in the dtype of its own weights and casts what it is given."""

    def __init__(self, vision: VisionConfig | None, qformer: QFormerConfig | None, llama: LlamaConfig):
        super().__init__()
        self.vision = self.ln_vision = self.qformer = self.proj = None  # a language model alone, unless:
        if vision:
            image_width = qformer.width if qformer else PATCHES_PER_TOKEN * vision.width
            self.vision = VisionTransformer(vision)
            self.ln_vision = nn.LayerNorm(vision.width, eps=1e-5)
            self.qformer = QFormer(qformer) if qformer else None
            self.proj = nn.Linear(image_width, llama.hidden_size)
            self.image_size = vision.image_size  # pixels; may be set to another multiple of the patch size
        self.llama = Llama(llama)
        self.tokenizer: Tokenizer | None = None
        self.fingerprints: dict[str, str] = {}  # of the parts that came from files

    @property
    def n_image_tokens(self) -> int:
        """IMAGE ids that stand for one picture in a token sequence."""
        if self.qformer:
            return self.qformer.config.n_queries
        return (self.image_size // self.vision.config.patch_size) ** 2 // PATCHES_PER_TOKEN

    @property
    def image_shape(self) -> tuple[int, int]:
        """(pixels of a side, image tokens) of a picture, for data.py; zeros for a language model alone."""
        return (self.image_size, self.n_image_tokens) if self.vision else (0, 0)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Pictures (B, 3, S, S), uint8 or normalised float, or their features -> (B, N, d_llama)."""
        features = images if images.dim() == 3 else self.image_features(images)
        return self.proj(cast(features, self.proj))

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        """Pictures (B, 3, S, S) -> what the projection is given, (B, N, its inputs)."""
        x = normalize(images) if images.dtype == torch.uint8 else images
        x = self.vision(cast(x, self.vision))
        x = self.ln_vision(cast(x, self.ln_vision))
        if self.qformer:
            x = self.qformer(cast(x, self.qformer))
        else:
            B, _, D = x.shape
            x = x[:, 1:].reshape(B, -1, PATCHES_PER_TOKEN * D)  # without the class token
        return x

    def embed(self, tokens: torch.Tensor, image_embeds: torch.Tensor | None) -> torch.Tensor:
        """ids (B, T) -> (B, T, d_llama), the places of IMAGE filled from image_embeds in reading order."""
        x = self.llama.embed_tokens(tokens.clamp(min=0))
        places = tokens == IMAGE
        given = 0 if image_embeds is None else image_embeds.shape[:-1].numel()
        if (n := int(places.sum())) != given:
            raise ValueError(f"{n} IMAGE ids in the tokens, but {given} image tokens were given")
        return x.masked_scatter(places.unsqueeze(-1), image_embeds.to(x.dtype)) if given else x

    def forward(self, images: torch.Tensor | None, tokens: torch.Tensor,
                targets: torch.Tensor) -> torch.Tensor:
        """The mean cross entropy, float32, over all targets of the batch.

        images: all pictures of the batch (any number, 3, S, S) in the order of their places, or their
        features, None if none.
        tokens: int64 (B, T), padded on the right with any id. targets: int64 (B, T), the same id where it is
        to be predicted, IGNORE elsewhere; the shift by one is made here."""
        image_embeds = self.encode_image(images) if images is not None else None
        hidden = self.llama(self.embed(tokens, image_embeds))
        targets = targets[:, 1:]
        predicted = targets != IGNORE
        return self.cross_entropy(hidden[:, :-1][predicted], targets[predicted])

    def cross_entropy(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean over positions, hidden (n, d_llama), targets (n,). A few logits exist at a time: those of
        the backward pass are computed anew."""
        sum_of = lambda h, t: F.cross_entropy(self.llama.logits(h).float(), t, reduction="sum")
        chunks = zip(hidden.split(LOGITS_AT_ONCE), targets.split(LOGITS_AT_ONCE))
        return sum(checkpoint(sum_of, h, t, use_reentrant=False) for h, t in chunks) / len(targets)

    @torch.no_grad()
    def generate(self, tokens: list[int], image_embeds: torch.Tensor | None = None, max_new_tokens: int = 300,
                 temperature: float = 1.0, top_p: float = 0.9, repetition_penalty: float = 1.05,
                 stop: tuple[list[int], ...] = (), context: int = CONTEXT,
                 generator: torch.Generator | None = None) -> Iterator[int]:
        """Yield the ids of the answer to one conversation, one by one, the one that ends it included.

        tokens: ids with IMAGE places; image_embeds: (pictures, N, d_llama). It ends at `</s>`, when the last
        ids are one of the `stop` sequences, or after max_new_tokens. Of a conversation that would outgrow
        `context` the beginning is cut off. The repetition penalty looks at `<s>` and the new ids, not at the
        prompt (as the original's)."""
        device = self.llama.embed_tokens.weight.device
        x = self.embed(torch.tensor([tokens], device=device), image_embeds)
        if context <= max_new_tokens:
            raise InputError(f"context {context} leaves no room for a prompt beside max_new_tokens "
                             f"{max_new_tokens}")
        x = x[:, max(0, x.shape[1] + max_new_tokens - context):]
        cache = KVCache(self.llama.config, 1, x.shape[1] + max_new_tokens, device, x.dtype)
        ids = [self.tokenizer.bos]
        for _ in range(max_new_tokens):
            logits = self.llama.logits(self.llama(x, cache)[0, -1]).float()
            ids.append(sample(logits, ids, temperature, top_p, repetition_penalty, generator))
            yield ids[-1]
            if ids[-1] == self.tokenizer.eos or any(ids[-len(s):] == list(s) for s in stop):
                return
            x = self.embed(torch.tensor([ids[-1:]], device=device), None)

    @classmethod
    def from_files(cls, vision: str | dict | None, qformer: str | dict | None, llama: str | dict,
                   proj: str | None = None, dtype: str = "bfloat16", device: str = "cpu",
                   train: tuple[str, ...] = ("proj",), tokenizer: str | None = None, image_size: int = 0,
                   force: bool = False) -> "MiniGPT4":
        """Build the model from weight files; a dict of sizes in place of a path makes a new, random part.

        The parts named in `train` are float32 and have gradients; the others are `dtype` and frozen. Without
        `vision` it is a language model alone; with `image_size` (pixels) it takes pictures of another size
        than the vision part was trained with. Files are memory-mapped and, where their dtype is `dtype`, not
        copied. Raises InputError for files that are missing, broken, or do not fit together; for a projection
        that was trained beside other parts, unless `force`."""
        check_parts(train, vision, qformer)
        files = {name: read_part(name, source) for name, source in
                 {"vision": vision, "qformer": qformer, "proj": proj, "llama": llama}.items()
                 if isinstance(source, str) and source}
        fingerprints = {name: fingerprint(file.tensors) for name, file in files.items() if name != "proj"}
        if "proj" in files and not force:
            _check_companions(files, fingerprints)
        if not tokenizer and not isinstance(llama, str):
            raise InputError("llama: a new one needs a tokenizer.model to read with; set tokenizer")
        tokenizer = Tokenizer(tokenizer or f"{llama}/tokenizer.model")
        model = cls.on_meta(vision, qformer, llama, files, tokenizer.vocab_size, image_size)
        if tokenizer.vocab_size > model.llama.config.vocab_size:
            raise InputError(f"{tokenizer.path}: {tokenizer.vocab_size} pieces, but the language model has "
                             f"{model.llama.config.vocab_size}; they are not of the same model")
        model.tokenizer, model.fingerprints = tokenizer, fingerprints
        for name in PARTS:
            if getattr(model, name) is None:
                continue
            if name in files:
                part_dtype = torch.float32 if name in train else getattr(torch, dtype)
                _fill(model, name, files[name], part_dtype, device)
            else:
                _fill_new(model, name, device)
            for p in model.part_parameters(name).values():
                p.requires_grad_(name in train)
        return model.eval()

    @classmethod
    def on_meta(cls, vision, qformer, llama, files: dict, vocab_size: int, image_size: int = 0) -> "MiniGPT4":
        """The model without memory for its weights; the sizes of a part come from `files` (of read_part), or
        from the dict given for it."""
        vision_config = _sizes(VisionConfig, "vision", vision, files)
        qformer_config = _sizes(QFormerConfig, "qformer", qformer, files,
                                vision_width=vision_config.width if vision_config else 0)
        if "llama" in files:
            llama_config = files["llama"].sizes
        else:
            override(LlamaConfig(), llama, "llama")  # refuses unknown names
            llama_config = LlamaConfig.from_dict({"vocab_size": vocab_size} | llama, "llama")
        with torch.device("meta"):
            model = cls(vision_config, qformer_config, llama_config)
        if image_size and vision_config:
            if image_size % (unit := vision_config.patch_size * (1 if qformer_config else 2)):
                raise InputError(f"image_size {image_size}: give a multiple of {unit}, for whole patches")
            model.image_size = image_size
        return model

    def part_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The tensors of a part under the names of its file. `ln_vision` is a part of the Q-Former's file."""
        prefix = "proj." if name == "proj" else ""
        tensors = {prefix + k: p for k, p in getattr(self, name).named_parameters()}
        if name == ("qformer" if self.qformer else "vision"):
            tensors |= {f"ln_vision.{k}": p for k, p in self.ln_vision.named_parameters()}
        return tensors

    def save_part(self, name: str, folder: str, dtype: str = "float32"):
        """Write a part into `folder` in the form that from_files reads, replacing it in one move."""
        parameters = self.part_parameters(name)
        tensors = {k: p.detach().to("cpu", getattr(torch, dtype)) for k, p in parameters.items()}
        if name != "llama":
            about = self.companions() if name == "proj" else asdict(getattr(self, name).config)
            key = "trained_with" if name == "proj" else "config"
            save_tensors(tensors, Path(folder) / f"{name}.safetensors", {key: json.dumps(about)})
            return
        root = Path(folder) / "llama"
        root.mkdir(parents=True, exist_ok=True)
        tensors = {k if k.startswith("lm_head") else f"model.{k}": t for k, t in tensors.items()}
        save_tensors(tensors, root / "model.safetensors", {"format": "pt"})
        (root / "config.json").write_text(json.dumps(self.llama.config.to_hub(), indent=1))
        if Path(self.tokenizer.path) != root / "tokenizer.model":
            shutil.copyfile(self.tokenizer.path, root / "tokenizer.model")

    def companions(self) -> dict[str, str]:
        """{part: fingerprint} of what the projection stands beside; of parts that learn, as they are now."""
        marks = dict(self.fingerprints)
        for name in ("vision", "qformer", "llama"):
            tensors = self.part_parameters(name) if getattr(self, name) is not None else {}
            if tensors and name not in marks or any(p.requires_grad for p in tensors.values()):
                marks[name] = fingerprint(tensors)
        return marks

    @torch.no_grad()
    def perplexity(self, text: str) -> float:
        """Of the language model alone, per token of the text."""
        ids = self.tokenizer.encode(text, bos=True)
        tokens = torch.tensor([ids], device=self.llama.embed_tokens.weight.device)
        return math.exp(min(self(None, tokens, tokens).item(), 700))


def pick_device(name: str = "", index: int = 0) -> torch.device:
    """"" -> cuda if there is one, else cpu. Raises InputError for a device that this machine lacks."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name, index) if name == "cuda" else torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"device {name!r}: not to be had on this machine ({str(e).splitlines()[0]})") from e
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def cast(x: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """x in the dtype of the module's weights."""
    return x.to(next(module.parameters()).dtype)


def sample(logits: torch.Tensor, ids: list[int], temperature: float, top_p: float, repetition_penalty: float,
           generator: torch.Generator | None = None) -> int:
    """Draw the next id from logits float32 (V,): penalty on `ids`, temperature, then nucleus of mass top_p.

    Temperature 0 takes the likeliest. The order and the penalty's form are Hugging Face `generate`'s."""
    seen = torch.tensor(sorted(set(ids)), device=logits.device)
    scores = logits[seen]
    penalised = torch.where(scores < 0, scores * repetition_penalty, scores / repetition_penalty)
    logits = logits.index_copy(0, seen, penalised)
    if temperature == 0:
        return int(logits.argmax())
    probs, order = (logits / temperature).softmax(-1).sort(descending=True)
    beyond = probs.cumsum(-1) - probs >= top_p  # the token that passes top_p is kept, the first one always
    beyond[0] = False
    probs[beyond] = 0
    return int(order[torch.multinomial(probs, 1, generator=generator)])


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]):
    """Write tensors as a safetensors file."""
    layout = {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()}
    write_tensors(path, metadata, layout, tensors.__getitem__)


def write_tensors(path: Path, metadata: dict[str, str],
                  layout: dict[str, tuple[torch.dtype, tuple[int, ...]]],
                  get: Callable[[str], torch.Tensor]):
    """Write a safetensors file, one tensor in memory at a time (the library's writer wants all of them).

    layout: {name: (dtype, shape)}; get(name) is asked for each once, and cast. `path` holds the old content
    or the new, whatever happens; raises InputError when it cannot be written."""
    header, end = {"__metadata__": metadata}, 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": FILE_DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # so that the data is aligned
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(len(head).to_bytes(8, "little") + head)
            for name, (dtype, _) in layout.items():
                tensor = get(name).detach().to("cpu", dtype).contiguous()
                f.write(tensor.reshape(-1).view(torch.uint8).numpy())
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({e}); the file that was there before is kept") from e
    finally:
        temporary.unlink(missing_ok=True)


def load_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A safetensors file -> its tensors, memory-mapped, and metadata. Raises InputError if unreadable."""
    if not Path(path).is_file():
        raise InputError(f"{path}: there is no such weight file")
    try:
        with safe_open(path, framework="pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}
    except (SafetensorError, OSError) as e:
        raise InputError(f"{path}: not a complete safetensors file ({e}); fetch or convert it again") from e


def check_parts(train: tuple[str, ...], vision, qformer):
    """Raise InputError when a part that is to learn is unknown or not there."""
    for name in train:
        if name not in PARTS:
            raise InputError(f"train: {name!r} is no part of the model; the parts are {', '.join(PARTS)}")
        if name in ("vision", "proj") and not vision or name == "qformer" and not qformer:
            raise InputError(f"train: {name} cannot learn, this run has none")
    if qformer and not vision:
        raise InputError("qformer: it needs a vision part to look through; give vision as well")


class File(NamedTuple):
    """A part as it was read; `sizes` of a projection is what it was trained with."""

    path: str
    tensors: dict[str, torch.Tensor]
    sizes: dict | LlamaConfig


def read_part(name: str, path: str) -> File:
    """A part's file or folder: its tensors, memory-mapped, and its sizes."""
    if name == "llama":
        return _read_llama(path)
    tensors, metadata = load_tensors(path)
    about = metadata.get("trained_with" if name == "proj" else "config", "{}" if name == "proj" else None)
    if about is None:
        raise InputError(f"{path}: it carries no sizes, so it is not a converted {name} file; "
                         f"run tools/convert.py {name}")
    try:
        return File(path, tensors, dict(json.loads(about)))
    except (ValueError, TypeError) as e:
        raise InputError(f"{path}: its metadata is no JSON object; fetch or convert it again") from e


def _read_llama(folder):
    sizes, shards = read_llama_folder(folder)
    tensors = {}
    for shard in shards:
        tensors |= load_tensors(shard)[0]
    tensors = {k.removeprefix("model."): t for k, t in tensors.items()
               if not k.endswith("rotary_emb.inv_freq")}
    if sizes.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)  # some files carry the tied tensor twice
    return File(folder, tensors, sizes)


def _sizes(cls, name, source, files, **derived):
    """The config of a part: from its file, or, for a new one, from the dict in the run's config."""
    if source is None or source == "":
        return None
    if name in files:
        where, sizes = files[name].path, files[name].sizes
    else:
        where, sizes = "the run's config", derived | source
    config = override(cls(), sizes, f"{where}: {name}")
    if min(asdict(config).values()) <= 0 or config.width % config.n_heads:
        raise InputError(f"{where}: {name} {sizes}: sizes are above 0, and width is a multiple of n_heads")
    for k, v in derived.items():
        if getattr(config, k) != v:
            raise InputError(f"{where}: {name} needs {k} {getattr(config, k)}, but it is {v} here; "
                             "they do not fit")
    return config


def check_fit(path: str, part: str, shapes: dict[str, tuple], expected: dict[str, tuple]):
    """Raise InputError unless a file's {name: shape} is just what the part expects."""
    problems = {
        "missing": sorted(expected.keys() - shapes.keys()),
        "unexpected": sorted(shapes.keys() - expected.keys()),
        "of another shape": [f"{k} {shapes[k]} instead of {shape}" for k, shape in expected.items()
                             if k in shapes and shapes[k] != shape],
    }
    found = [f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
             for what, names in problems.items() if names]
    if found:
        hint = ("it was trained for another language model or vision side" if part == "proj"
                else "it is of another model")
        raise InputError(f"{path}: does not fit as {part}: tensors {'; '.join(found)}; {hint}")


def fingerprint(tensors: dict[str, torch.Tensor]) -> str:
    """12 hex digits that tell a part's weights from others: of all names and shapes and of some values of
    each tensor, rounded to bfloat16, so that a file cast to it has the fingerprint of its source."""
    digest = hashlib.sha256()
    for k in sorted(tensors):
        values = tensors[k].detach().reshape(-1)
        ends = torch.cat((values[:16], values[-16:])).to("cpu", torch.bfloat16).view(torch.uint8)
        digest.update(f"{k} {tuple(tensors[k].shape)}".encode() + ends.numpy().tobytes())
    return digest.hexdigest()[:12]


def _check_companions(files, fingerprints):
    """Whether the projection was trained beside these very parts."""
    path, trained_with = files["proj"].path, files["proj"].sizes
    if not trained_with:
        print(f"note: {path} does not say which parts it was trained with; only its size is checked",
              file=sys.stderr)
        return
    for name, mark in fingerprints.items():
        if trained_with.get(name, mark) != mark:
            raise InputError(f"{path} was trained with {name} {trained_with[name]}, but {files[name].path} "
                             f"is {mark}; give the {name} that it was trained with, or --force=True")


def _fill(model, name, file, dtype, device):
    """Give a part, built on the meta device, the tensors of its file: all of them, and no others."""
    tensors, expected = dict(file.tensors), model.part_parameters(name)
    if name == "vision" and model.qformer:  # its own ln_vision, if it has one, is for use without a Q-Former
        tensors = {k: t for k, t in tensors.items() if not k.startswith("ln_vision.")}
    if "ln_vision.weight" in expected and name == "vision" and "ln_vision.weight" not in tensors:
        width = model.vision.config.width  # without a Q-Former, the original leaves this norm as it was made
        tensors = tensors | {"ln_vision.weight": torch.ones(width), "ln_vision.bias": torch.zeros(width)}
    check_fit(file.path, name, {k: tuple(t.shape) for k, t in tensors.items()},
              {k: tuple(p.shape) for k, p in expected.items()})
    tensors = {k: t.to(device, dtype) for k, t in tensors.items()}
    own_prefix = "proj." if name == "proj" else ""
    for prefix, module in (("ln_vision.", model.ln_vision), (own_prefix, getattr(model, name))):
        own = {k.removeprefix(prefix): tensors.pop(k) for k in list(tensors) if k.startswith(prefix)}
        if own:
            module.load_state_dict(own, assign=True)


def _fill_new(model, name, device):
    """Random float32 weights for a part trained from nothing, drawn on the CPU: the same on every device."""
    part = getattr(model, name).to_empty(device="cpu")
    part.reset_parameters() if name == "proj" else part.init_weights()
    part.to(device)
    if name == ("qformer" if model.qformer else "vision"):
        model.ln_vision.to_empty(device=device).reset_parameters()
