"""MiniGPT-4 (arXiv 2304.10592): a frozen vision tower and bridge, a trained projection, a frozen LLaMA.

    images -> vision -> bridge (Q-Former) -> proj -> in place of the IMAGE ids: llama -> text

Axes: B sequences, T tokens, N image tokens of a picture, D width, V vocabulary.
"""

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from configs.schema import DTYPES, InputError, override
from llama import CONTEXT, IGNORE, IMAGE, KVCache, Llama, LlamaConfig, Tokenizer, read_llama_folder
from qformer import JoinPatches, QFormer, QFormerConfig
from vision import VisionConfig, VisionTransformer, normalize

PARTS = ("vision", "qformer", "proj", "llama")
LOGITS_AT_ONCE = 256  # positions; with a vocabulary of 32,000 these take 33 MB in float32


class MiniGPT4(nn.Module):
    """The whole model. Each part computes in the dtype of its own weights and casts its input."""

    def __init__(self, vision: VisionConfig | None, qformer: QFormerConfig | None, llama: LlamaConfig,
                 image_size: int = 0):
        super().__init__()
        self.vision = self.bridge = self.proj = None  # a language model alone, unless `vision` is given
        self.image_size = self.n_image_tokens = 0     # pixels of a side; IMAGE ids per picture
        if vision:
            self.vision = VisionTransformer(vision)
            self.bridge = QFormer(qformer) if qformer else JoinPatches(vision.width)
            self.proj = nn.Linear(self.bridge.width, llama.hidden_size)
            self.image_size = image_size or vision.image_size
            self.n_image_tokens = self.bridge.n_image_tokens((self.image_size // vision.patch_size) ** 2)
        self.llama = Llama(llama)
        self.tokenizer: Tokenizer | None = None
        self.fingerprints: dict[str, str] = {}  # of the parts that a projection is trained with, as loaded

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Pictures (B, 3, S, S), uint8 or normalized float, or their features -> (B, N, d_llama)."""
        features = images if images.dim() == 3 else self.image_features(images)
        return self.proj(cast(features, self.proj))

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        """Pictures (B, 3, S, S) -> the projection's input (B, N, bridge.width)."""
        x = normalize(images) if images.dtype == torch.uint8 else images
        x = self.vision(cast(x, self.vision))
        return self.bridge(cast(x, self.bridge))

    def embed(self, tokens: torch.Tensor, image_embeds: torch.Tensor | None) -> torch.Tensor:
        """ids (B, T) -> (B, T, d_llama), with image_embeds at the IMAGE ids, in reading order."""
        x = self.llama.embed_tokens(tokens.clamp(min=0))
        image_mask = tokens == IMAGE
        n_given = 0 if image_embeds is None else image_embeds.shape[:-1].numel()
        if tokens.is_cpu and (n := int(image_mask.sum())) != n_given:  # a GPU would have to be waited for
            raise ValueError(f"{n} IMAGE ids in the tokens, but {n_given} image tokens were given")
        return x.masked_scatter(image_mask.unsqueeze(-1), image_embeds.to(x.dtype)) if n_given else x

    def forward(self, images: torch.Tensor | None, tokens: torch.Tensor,
                targets: torch.Tensor) -> torch.Tensor:
        """The mean cross entropy, float32, over all targets of the batch.

        images: all pictures of the batch (any number, 3, S, S), or their features, or None. tokens: int64
        (B, T), padded on the right. targets: int64 (B, T), the same ids where they are to be predicted,
        IGNORE elsewhere; shifted by one here."""
        image_embeds = self.encode_image(images) if images is not None else None
        hidden = self.llama(self.embed(tokens, image_embeds))
        targets = targets[:, 1:]
        predicted = targets != IGNORE
        return self.cross_entropy(hidden[:, :-1][predicted], targets[predicted])

    def cross_entropy(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean over positions, hidden (n, d_llama), targets (n,), with few logits at a time in memory."""
        chunks = zip(hidden.split(LOGITS_AT_ONCE), targets.split(LOGITS_AT_ONCE))
        return sum(checkpoint(self._loss_sum, *chunk, use_reentrant=False) for chunk in chunks) / len(targets)

    def _loss_sum(self, hidden, targets):
        return F.cross_entropy(self.llama.logits(hidden).float(), targets, reduction="sum")

    @torch.no_grad()
    def generate(self, tokens: list[int], image_embeds: torch.Tensor | None = None, max_new_tokens: int = 300,
                 temperature: float = 1.0, top_p: float = 0.9, repetition_penalty: float = 1.05,
                 stop: tuple[list[int], ...] = (), context: int = CONTEXT,
                 generator: torch.Generator | None = None) -> Iterator[int]:
        """Yield the ids of the answer to one conversation, including those that end it.

        tokens: ids with IMAGE; image_embeds: (pictures, N, d_llama). Ends at `</s>`, when the last ids are
        one of the `stop` sequences, or after max_new_tokens. The prompt's beginning is cut off if prompt and
        answer would exceed `context`. The repetition penalty spares the prompt, as in the original."""
        if context <= max_new_tokens:
            raise InputError(f"context {context} leaves no room for a prompt beside max_new_tokens "
                             f"{max_new_tokens}")
        device = self.llama.embed_tokens.weight.device
        x = self.embed(torch.tensor([tokens], device=device), image_embeds)
        x = x[:, max(0, x.shape[1] + max_new_tokens - context):]
        cache = KVCache(self.llama.config, 1, x.shape[1] + max_new_tokens, device, x.dtype)
        seen = torch.zeros(self.llama.config.vocab_size, dtype=torch.bool, device=device)
        seen[self.tokenizer.bos] = True
        ids = []
        for _ in range(max_new_tokens):
            logits = self.llama.logits(self.llama(x, cache)[0, -1]).float()
            token = sample(logits, seen, temperature, top_p, repetition_penalty, generator)
            seen.scatter_(0, token, True)
            ids.append(int(token))  # the only wait for the device
            yield ids[-1]
            if ids[-1] == self.tokenizer.eos or any(ids[-len(s):] == list(s) for s in stop):
                return
            x = self.llama.embed_tokens(token.view(1, 1))

    @torch.no_grad()
    def perplexity(self, text: str) -> float:
        """Of the language model alone, per token of the text."""
        device = self.llama.embed_tokens.weight.device
        tokens = torch.tensor([self.tokenizer.encode(text, bos=True)], device=device)
        return math.exp(min(self(None, tokens, tokens).item(), 700))

    @classmethod
    def from_files(cls, vision: str | dict | None, qformer: str | dict | None, llama: str | dict,
                   proj: str | None = None, dtype: str = "bfloat16", device: str = "cpu",
                   trainable: tuple[str, ...] | None = None, tokenizer: str | None = None,
                   image_size: int = 0) -> "MiniGPT4":
        """Build the model from weight files; a dict of sizes in place of a path makes a new, random part.

        The projection, new parts and those in `trainable` (default: the projection) are float32, the others
        `dtype`; all but the trainable ones are frozen. Without `vision` it is a language model alone.
        `image_size` (pixels) overrides the vision part's own. Files are memory-mapped. Raises InputError for
        files that are missing, broken, or do not fit together."""
        sources = {"vision": vision, "qformer": qformer, "proj": proj, "llama": llama}
        trainable = (("proj",) if vision else ()) if trainable is None else trainable
        check_sources(sources, trainable, dtype)
        files = {k: read_part(k, path) for k, path in sources.items() if isinstance(path, str) and path}
        if not tokenizer and not isinstance(llama, str):
            raise InputError("llama: a new one needs a tokenizer.model; set tokenizer")
        tokenizer = Tokenizer(tokenizer or f"{llama}/tokenizer.model")
        model = cls.on_meta(sources, files, tokenizer.vocab_size, image_size)
        model.tokenizer = tokenizer
        if tokenizer.vocab_size > (n := model.llama.config.vocab_size):
            raise InputError(f"{tokenizer.path}: {tokenizer.vocab_size} pieces, but the language model has "
                             f"{n}; they are not of the same model")
        for name in PARTS:
            part_dtype = torch.float32 if name in (*trainable, "proj") else getattr(torch, dtype)
            model.load_part(name, files[name], part_dtype, device) if name in files else (
                model.init_part(name, device))
            parameters = model.part_parameters(name)
            for p in parameters.values():
                p.requires_grad_(name in trainable)
            if parameters and name != "proj":
                model.fingerprints[name] = fingerprint(files[name].tensors if name in files else parameters)
        if "proj" in files:
            warn_of_other_parts(files["proj"], model.fingerprints)
        return model.eval()

    @classmethod
    def on_meta(cls, sources: dict, files: dict, vocab_size: int, image_size: int = 0) -> "MiniGPT4":
        """The model without memory for its weights. Sizes come from `files` (of read_part), or for new parts
        from the dicts in `sources`."""
        vision = part_config(VisionConfig, "vision", sources, files)
        qformer = part_config(QFormerConfig, "qformer", sources, files,
                              vision_width=vision.width if vision else 0)
        if "llama" in files:
            llama = files["llama"].sizes
        else:
            override(LlamaConfig(), sources["llama"], "llama")  # refuses unknown names
            llama = LlamaConfig.from_dict({"vocab_size": vocab_size} | sources["llama"], "llama")
        if image_size and vision and image_size % (unit := vision.patch_size * (1 if qformer else 2)):
            raise InputError(f"image_size {image_size}: give a multiple of {unit}, for whole patches")
        with torch.device("meta"):
            return cls(vision, qformer, llama, image_size)

    def part_modules(self, name: str) -> list[tuple[str, nn.Module]]:
        """The modules of a part, each with the prefix of its tensors in the part's file; [] if it is missing.
        `ln_vision` belongs to the Q-Former's file, or without a Q-Former to the vision file."""
        has_qformer = isinstance(self.bridge, QFormer)
        modules = {"vision": [("", self.vision)] + [("", self.bridge)] * (not has_qformer),
                   "qformer": [("", self.bridge)] * has_qformer,
                   "proj": [("proj.", self.proj)],
                   "llama": [("", self.llama)]}[name]
        return [(prefix, module) for prefix, module in modules if module is not None]

    def part_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The tensors of a part under their names in the part's file."""
        return {prefix + k: p for prefix, module in self.part_modules(name)
                for k, p in module.named_parameters()}

    def load_part(self, name: str, file: "PartFile", dtype: torch.dtype, device):
        """Give a part that is on the meta device the tensors of its file: all of them, and no others."""
        tensors = dict(file.tensors)
        if name == "vision" and isinstance(self.bridge, QFormer):  # whose own ln_vision counts
            tensors = {k: t for k, t in tensors.items() if not k.startswith("ln_vision.")}
        elif name == "vision" and "ln_vision.weight" not in tensors:  # the original never loads it then
            width = self.vision.config.width
            tensors |= {"ln_vision.weight": torch.ones(width), "ln_vision.bias": torch.zeros(width)}
        check_fit(file.path, name, {k: tuple(t.shape) for k, t in tensors.items()},
                  {k: tuple(p.shape) for k, p in self.part_parameters(name).items()})
        for prefix, module in self.part_modules(name):
            own = {k: tensors[prefix + k].to(device, dtype) for k, _ in module.named_parameters()}
            module.load_state_dict(own, assign=True)

    def init_part(self, name: str, device):
        """Random float32 weights for a new part, drawn on the CPU: the same on every device."""
        for _, module in self.part_modules(name):
            module.to_empty(device="cpu")
            init_weights(module)
            module.to(device)

    def save_part(self, name: str, folder: str, dtype: str = "float32"):
        """Write a part into `folder`, for from_files to read; an older file is replaced in one move."""
        parameters = self.part_parameters(name)
        path, metadata = Path(folder) / f"{name}.safetensors", {"format": "pt"}
        if name == "llama":
            path = Path(folder) / "llama/model.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            parameters = {k if k.startswith("lm_head") else f"model.{k}": p for k, p in parameters.items()}
            (path.parent / "config.json").write_text(json.dumps(self.llama.config.to_hub(), indent=1))
            if Path(self.tokenizer.path) != path.parent / "tokenizer.model":
                shutil.copyfile(self.tokenizer.path, path.parent / "tokenizer.model")
        elif name in ("vision", "qformer"):
            metadata["config"] = json.dumps(asdict(self.part_modules(name)[0][1].config))
        else:
            parts = {k: self.part_parameters(k) for k in self.fingerprints}
            trained = {k: fingerprint(part) for k, part in parts.items()
                       if any(p.requires_grad for p in part.values())}
            metadata["trained_with"] = json.dumps(self.fingerprints | trained)
        with replacing(path) as temporary:
            save_file({k: p.detach().to("cpu", getattr(torch, dtype)).contiguous()
                       for k, p in parameters.items()}, temporary, metadata)


def pick_device(name: str = "", index: int = 0) -> torch.device:
    """"" -> cuda if there is one, else cpu. Raises InputError for a device that this machine lacks."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name, index) if name == "cuda" else torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"device {name!r}: not available on this machine ({str(e).splitlines()[0]})") from e
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def init_weights(module: nn.Module):
    """Random weights by the module's own rule, or else by its children's."""
    init = getattr(module, "init_weights", None) or getattr(module, "reset_parameters", None)
    if init:
        init()
    else:
        for child in module.children():
            init_weights(child)


def cast(x: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """x in the dtype of the module's weights."""
    return x.to(next(module.parameters()).dtype)


def sample(logits: torch.Tensor, seen: torch.Tensor, temperature: float, top_p: float,
           repetition_penalty: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw the next id, int64 (1,), from logits float32 (V,): repetition penalty on the ids where `seen`,
    bool (V,), temperature, then top_p. Temperature 0 is greedy. Order and penalty as in Hugging Face's."""
    penalized = torch.where(logits < 0, logits * repetition_penalty, logits / repetition_penalty)
    logits = torch.where(seen, penalized, logits)
    if temperature == 0:
        return logits.argmax(keepdim=True)
    probs, order = (logits / temperature).softmax(-1).sort(descending=True)
    beyond = probs.cumsum(-1) - probs >= top_p  # the token that reaches top_p is kept, and always the first
    beyond[0] = False
    return order[torch.multinomial(probs.masked_fill(beyond, 0), 1, generator=generator)]


# ---- weight files ------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; it replaces `path` at the end, in one move."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes its files private to their owner
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as e:
        raise InputError(f"{path}: cannot be written ({e}); what was there before is kept") from e
    finally:
        temporary.unlink(missing_ok=True)


class PartFile(NamedTuple):
    """A part as it was read: its tensors, memory-mapped, and what its metadata says."""

    path: str
    tensors: dict[str, torch.Tensor]
    sizes: dict | LlamaConfig  # of a projection: the fingerprints of the parts that it was trained with


def load_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A safetensors file -> its tensors, memory-mapped, and metadata. Raises InputError if unreadable."""
    if not Path(path).is_file():
        raise InputError(f"{path}: there is no such weight file")
    try:
        with safe_open(path, framework="pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}
    except (SafetensorError, OSError) as e:
        raise InputError(f"{path}: not a complete safetensors file ({e}); fetch or convert it again") from e


def read_part(name: str, path: str) -> PartFile:
    """A part's file, or LLaMA's folder."""
    if name == "llama":
        sizes, shards = read_llama_folder(path)
        tensors = {k.removeprefix("model."): t for shard in shards for k, t in load_tensors(shard)[0].items()
                   if not k.endswith("rotary_emb.inv_freq")}
        if sizes.tie_word_embeddings:
            tensors.pop("lm_head.weight", None)  # some files hold the tied tensor twice
        return PartFile(path, tensors, sizes)
    tensors, metadata = load_tensors(path)
    key, default = ("config", None) if name in ("vision", "qformer") else ("trained_with", "{}")
    about = metadata.get(key, default)
    if about is None:
        raise InputError(f"{path}: its metadata has no sizes, so it is not a converted {name} file; "
                         f"run tools/convert.py {name}")
    try:
        return PartFile(path, tensors, dict(json.loads(about)))
    except (ValueError, TypeError) as e:
        raise InputError(f"{path}: its metadata is not a JSON object; fetch or convert it again") from e


def check_sources(sources: dict, trainable: tuple[str, ...], dtype: str):
    """Raise InputError for arguments of from_files that do not go together."""
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}: give one of {', '.join(DTYPES)}")
    for name in trainable:
        if name not in PARTS:
            raise InputError(f"trainable: {name!r} is no part of the model; the parts are {', '.join(PARTS)}")
        if not sources["vision"] and name != "llama" or name == "qformer" and not sources["qformer"]:
            raise InputError(f"trainable: {name} cannot be trained, this run has none")
    if sources["qformer"] and not sources["vision"]:
        raise InputError("qformer: it needs a vision part; give vision as well")
    if not sources["llama"]:
        raise InputError("llama: no language model is given; set llama to its folder")


def part_config(cls, name: str, sources: dict, files: dict, **derived):
    """The config of the vision or qformer part, from its file or, for a new one, from `sources`."""
    if not sources[name] and sources[name] != {}:
        return None
    where, sizes = ((files[name].path, files[name].sizes) if name in files
                    else ("the run's config", derived | sources[name]))
    config = override(cls(), sizes, f"{where}: {name}")
    if min(asdict(config).values()) <= 0 or config.width % config.n_heads:
        raise InputError(f"{where}: {name} {sizes}: sizes must be above 0, and width a multiple of n_heads")
    for k, v in derived.items():
        if getattr(config, k) != v:
            raise InputError(f"{where}: {name} needs {k} {getattr(config, k)}, but it is {v} here; "
                             "they do not fit")
    return config


def check_fit(path: str, part: str, shapes: dict[str, tuple], expected: dict[str, tuple]):
    """Raise InputError unless a file's {name: shape} is exactly what the part expects."""
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
    """12 hex digits that identify a part's weights: a hash of all names and shapes and of some values of each
    tensor, rounded to bfloat16, so that a cast file keeps its fingerprint."""
    digest = hashlib.sha256()
    for k in sorted(tensors):
        values = tensors[k].detach().reshape(-1)
        ends = torch.cat((values[:16], values[-16:])).to("cpu", torch.bfloat16).view(torch.uint8)
        digest.update(f"{k} {tuple(tensors[k].shape)}".encode() + ends.numpy().tobytes())
    return digest.hexdigest()[:12]


def warn_of_other_parts(proj: PartFile, fingerprints: dict[str, str]):
    """Warn when the projection was trained with other parts than these."""
    if not proj.sizes:
        print(f"note: {proj.path} does not say which parts it was trained with; only its size is checked",
              file=sys.stderr)
    other = [name for name, mark in fingerprints.items() if proj.sizes.get(name, mark) != mark]
    if other:
        print(f"warning: {proj.path} was trained with another {' and another '.join(other)}: its answers "
              "will be meaningless; give the parts that it was trained with", file=sys.stderr)
