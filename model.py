"""MiniGPT-4 (arXiv 2304.10592): a frozen vision tower and bridge, a trained projection, a frozen LLaMA.

    images -> vision -> bridge (Q-Former) -> proj -> in place of the IMAGE ids: llama -> text

Axes: B sequences, T tokens, N image tokens of a picture, D width, V vocabulary.
"""

import json
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from configs.prompts import IMAGE, is_end
from llama import (
    IGNORE,
    KVCache,
    Llama,
    LlamaConfig,
    Tokenizer,
    beam_search,
    read_llama_folder,
    sample,
)
from plumbing.console import InputError, note
from plumbing.files import replacing
from plumbing.options import override
from plumbing.quantized import QUANTIZED, QuantizedLinear, quantize
from plumbing.weights import (
    DTYPES,
    check_fit,
    check_sizes,
    fingerprint,
    finite,
    load_tensors,
)
from qformer import JoinPatches, QFormer, QFormerConfig
from vision import VisionConfig, VisionTransformer

PARTS = ("vision", "qformer", "proj", "llama")
CONFIGS = {
    "vision": VisionConfig,
    "qformer": QFormerConfig,
}  # of the parts whose files hold their sizes
LOGITS_AT_ONCE = (
    256  # positions; with a vocabulary of 32,000 these take 33 MB in float32
)


class MiniGPT4(nn.Module):
    """The whole model. Each part computes in the dtype of its own weights and casts its input."""

    def __init__(
        self,
        vision: VisionConfig | None,
        qformer: QFormerConfig | None,
        llama: LlamaConfig,
        image_size: int = 0,
    ):
        super().__init__()
        self.vision = self.bridge = self.proj = (
            None  # a language model alone, unless `vision` is given
        )
        self.image_size = self.n_image_tokens = (
            0  # pixels of a side; IMAGE ids per picture
        )
        if vision:
            self.vision = VisionTransformer(vision)
            has_class_token = self.vision.has_class_token
            self.bridge = (
                QFormer(qformer)
                if qformer
                else JoinPatches(vision.width, has_class_token)
            )
            self.proj = nn.Linear(self.bridge.width, llama.hidden_size)
            self.image_size = image_size or vision.image_size
            self.n_image_tokens = self.bridge.n_image_tokens(
                self.vision.n_patches(self.image_size)
            )
        self.llama = Llama(llama)
        self.tokenizer: Tokenizer | None = None
        self.fingerprints: dict[
            str, str
        ] = {}  # of the parts that a projection is trained with, as loaded

    def encode_image(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, S, S), uint8 or normalized float, or their features -> (B, N, d_llama)."""
        features = images if images.dim() == 3 else self.image_features(images)
        return self.proj(features.to(next(self.proj.parameters()).dtype))

    def image_features(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, S, S) -> the projection's input (B, N, bridge.width)."""
        images = (
            self.vision.normalize(images) if images.dtype == torch.uint8 else images
        )
        return self.bridge(self.vision(images))

    def embed(self, tokens: Tensor, image_embeds: Tensor | None) -> Tensor:
        """ids (B, T) -> (B, T, d_llama), with image_embeds at the IMAGE ids, in reading order."""
        x = self.llama.embed_tokens(tokens.clamp(min=0))
        image_mask = tokens == IMAGE
        n_given = 0 if image_embeds is None else image_embeds.shape[:-1].numel()
        if (
            tokens.is_cpu and (n := int(image_mask.sum())) != n_given
        ):  # a GPU would have to be waited for
            raise ValueError(
                f"{n} IMAGE ids in the tokens, but {n_given} image tokens were given"
            )
        return (
            x.masked_scatter(image_mask.unsqueeze(-1), image_embeds.to(x.dtype))
            if n_given
            else x
        )

    def forward(self, images: Tensor | None, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean cross entropy, float32, over all targets of the batch.
        images: all pictures of the batch (any number, 3, S, S), or their features. tokens: int64 (B, T),
        padded on the right. targets: the ids to be predicted, IGNORE elsewhere; shifted by one here."""
        image_embeds = self.encode_image(images) if images is not None else None
        hidden = self.llama(self.embed(tokens, image_embeds))
        predicted = targets[:, 1:] != IGNORE
        return self.cross_entropy(hidden[:, :-1][predicted], targets[:, 1:][predicted])

    def cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The mean over positions, hidden (n, d_llama), targets (n,), with few logits at a time in memory."""

        def loss_sum(hidden, targets):
            return F.cross_entropy(
                self.llama.logits(hidden).float(), targets, reduction="sum"
            )

        chunks = zip(hidden.split(LOGITS_AT_ONCE), targets.split(LOGITS_AT_ONCE))
        return sum(
            checkpoint(loss_sum, *chunk, use_reentrant=False) for chunk in chunks
        ) / len(targets)

    @torch.no_grad()
    def generate(
        self,
        tokens: list[int] | list[list[int]],
        image_embeds: Tensor | None = None,
        max_new_tokens: int = 300,
        temperature: float = 1.0,
        top_p: float = 0.9,
        repetition_penalty: float = 1.05,
        stop: tuple[list[int], ...] = (),
        context: int = 0,
        generator: torch.Generator | None = None,
        min_length: int = 0,
        cache: KVCache | None = None,
        num_beams: int = 1,
        length_penalty: float = 1.0,
    ) -> Iterator:
        """Yield the ids of an answer, with those that end it; for B prompts of one length, lists of B ids,
        None after an end. tokens: ids with IMAGE, the first ones perhaps in `cache`; image_embeds: (pictures,
        N, d_llama). An answer ends at `</s>` (from `min_length` ids on, with `<s>`), a `stop` sequence or
        max_new_tokens. `context` (0: the model's) cuts the prompt's beginning. Several beams: one prompt."""
        stop = ([self.tokenizer.eos], *stop)
        batch = tokens if isinstance(tokens[0], list) else [tokens]
        if not context:  # the answer gets what the prompt leaves, at least a third
            context = self.llama.config.max_position_embeddings
            max_new_tokens = min(
                max_new_tokens, max(context - len(batch[0]), context // 3)
            )
        if context <= max_new_tokens:
            raise InputError(
                f"context {context} leaves no room beside max_new_tokens {max_new_tokens}"
            )
        x, seen = self.embed_prompts(batch, image_embeds)
        start, cache = max(0, x.shape[1] + max_new_tokens - context), cache or KVCache()
        if num_beams > 1:
            return (
                yield from beam_search(
                    self.llama,
                    self.tokenizer,
                    x[:, start:],
                    seen,
                    max_new_tokens,
                    repetition_penalty,
                    stop,
                    min_length,
                    num_beams,
                    length_penalty,
                )
            )
        x = x[:, max(cache.length, start) :]
        ids, ended = [[] for _ in batch], [False for _ in batch]
        for n in range(1, max_new_tokens + 1):
            logits = self.llama.logits(self.llama(x, cache)[:, -1]).float()
            if n < min_length:
                logits[:, self.tokenizer.eos] = -torch.inf
            token = sample(
                logits, seen, temperature, top_p, repetition_penalty, generator
            )
            seen.scatter_(1, token, True)
            new = token.flatten().tolist()  # waits for the device
            ids = [[*row, id] for row, id in zip(ids, new)]
            yield (
                [None if end else id for end, id in zip(ended, new)]
                if batch is tokens
                else new[0]
            )
            ended = [end or is_end(row, stop) for end, row in zip(ended, ids)]
            if all(ended):
                return
            x = self.llama.embed_tokens(token)

    def embed_prompts(
        self, batch: list[list[int]], image_embeds: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings (B, T, d_llama), and the ids that the repetition penalty applies to, bool (B, V)."""
        x = self.embed(
            torch.tensor(batch, device=self.llama.norm.weight.device), image_embeds
        )
        ids = torch.arange(self.llama.config.vocab_size, device=x.device)
        return x, (ids == self.tokenizer.bos).repeat(len(batch), 1)

    @torch.no_grad()
    def perplexity(self, text: str) -> float:
        """Of the language model alone, per token of the text."""
        tokens = torch.tensor([self.tokenizer.encode(text, bos=True)]).to(
            self.llama.norm.weight.device
        )
        return self(None, tokens, tokens).double().exp().item()

    @classmethod
    def from_files(
        cls,
        vision: str | dict | None,
        qformer: str | dict | None,
        llama: str | dict,
        proj: str | None = None,
        dtype: str = "bfloat16",
        device: str = "cpu",
        trainable: tuple[str, ...] | None = None,
        tokenizer: str | None = None,
        image_size: int = 0,
    ) -> "MiniGPT4":
        """Build the model from weight files, memory-mapped; a dict of sizes makes a new, random part. The
        projection, new parts and `trainable` ones (default: the projection) are float32, others `dtype`, and
        frozen. Raises InputError for files that are missing, broken, or do not fit together."""
        sources = {"vision": vision, "qformer": qformer, "proj": proj, "llama": llama}
        check_sources(sources, trainable or (), dtype, tokenizer)
        files = {
            k: read_part(k, path)
            for k, path in sources.items()
            if isinstance(path, str) and path
        }
        if (
            "llama" in files
            and (kind := files["llama"].sizes.quantization or dtype) in QUANTIZED
        ):
            if dtype in QUANTIZED and dtype != kind or trainable:
                raise InputError(
                    f"{llama}: already {kind}; take the original for {dtype}, or to train"
                )
            files["llama"] = files["llama"]._replace(
                sizes=replace(files["llama"].sizes, quantization=kind)
            )
            dtype = "bfloat16"
        trainable = (("proj",) if vision else ()) if trainable is None else trainable
        tokenizer = Tokenizer(tokenizer or f"{llama}/tokenizer.model")
        model = cls.on_meta(sources, files, tokenizer.vocab_size, image_size)
        model.tokenizer = tokenizer
        if tokenizer.vocab_size > (n := model.llama.config.vocab_size):
            raise InputError(
                f"{tokenizer.path}: it has more pieces than llama, {n}; not of the same model"
            )
        for name in PARTS:
            part_dtype = (
                torch.float32 if name in (*trainable, "proj") else getattr(torch, dtype)
            )
            if name in files:
                model.load_part(name, files[name], part_dtype, device)
            else:
                model.init_part(name, device)
            parameters = model.part_parameters(name)
            for p in parameters.values():
                p.requires_grad_(name in trainable)
            if parameters and name != "proj":
                model.fingerprints[name] = fingerprint(
                    files[name].tensors if name in files else parameters
                )
        model.fingerprints["llama"] = (
            model.llama.config.fingerprint or model.fingerprints["llama"]
        )
        trained_with = files["proj"].sizes if "proj" in files else model.fingerprints
        if not trained_with:
            note(f"note: {proj} does not say which parts it was trained with")
        if other := [
            k
            for k, mark in model.fingerprints.items()
            if trained_with.get(k, mark) != mark
        ]:
            note(
                f"warning: {proj} was trained with another {' and another '.join(other)}: its answers will "
                "be meaningless; give the parts that it was trained with"
            )
        return model.eval()

    @classmethod
    def on_meta(
        cls, sources: dict, files: dict, vocab_size: int, image_size: int = 0
    ) -> "MiniGPT4":
        """The model without memory for its weights; `files` of read_part, and for new parts the `sources`."""
        vision = part_config("vision", sources, files)
        qformer = part_config(
            "qformer", sources, files, vision_width=vision.width if vision else 0
        )
        if "llama" in files:
            llama = files["llama"].sizes
        else:
            override(LlamaConfig(), sources["llama"], "llama")  # refuses unknown names
            llama = LlamaConfig.from_dict(
                {"vocab_size": vocab_size} | sources["llama"], "llama"
            )
        if (
            image_size
            and vision
            and image_size % (unit := vision.patch_size * (1 if qformer else 2))
        ):
            raise InputError(
                f"image_size {image_size}: give a multiple of {unit}, for whole patches"
            )
        with torch.device("meta"):
            return cls(vision, qformer, llama, image_size)

    def part_modules(self, name: str) -> list[tuple[str, nn.Module]]:
        """The modules of a part, each with the prefix of its tensors in the part's file; [] if it is missing.
        A Q-Former's file has its `ln_vision`; that of JoinPatches is in the vision file."""
        of_bridge = "qformer" if isinstance(self.bridge, QFormer) else "vision"
        modules = (
            ("vision", "", self.vision),
            (of_bridge, "", self.bridge),
            ("proj", "proj.", self.proj),
            ("llama", "", self.llama),
        )
        return [
            (prefix, module)
            for part, prefix, module in modules
            if part == name and module is not None
        ]

    def part_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The tensors of a part under their names in the part's file."""
        return {
            prefix + k: p
            for prefix, m in self.part_modules(name)
            for k, p in m.named_parameters()
        }

    def load_part(self, name: str, file: "PartFile", dtype: torch.dtype, device):
        """Give a part that is on the meta device the tensors of its file: all of them, and no others."""
        tensors = dict(file.tensors)
        if name == "vision" and isinstance(
            self.bridge, QFormer
        ):  # whose own ln_vision counts
            tensors = {
                k: t for k, t in tensors.items() if not k.startswith("ln_vision.")
            }
        elif (
            name == "vision" and "ln_vision.weight" not in tensors
        ):  # the original never loads it then
            tensors |= nn.LayerNorm(self.vision.config.width).state_dict(
                prefix="ln_vision."
            )
        shapes = {
            k: (
                *t.shape[:1],
                *(n * (1 + (t.dtype == torch.uint8)) for n in t.shape[1:]),
            )  # two int4
            for k, t in tensors.items()
            if not k.endswith(".weight_scale")
        }
        check_fit(
            file.path,
            name,
            shapes,
            {k: tuple(p.shape) for k, p in self.part_parameters(name).items()},
        )
        if name == "llama" and (kind := self.llama.config.quantization):
            modules = [
                pair
                for pair in self.llama.named_modules()
                if getattr(pair[1], "quantized", {})
            ]
            for prefix, module in tqdm(
                modules, f"quantizing to {kind}", delay=1, leave=False
            ):
                mapped = read_part(
                    "llama", file.path
                ).tensors  # mapped again, to free pages that were read
                for new_name, linears in module.quantized.items():
                    names = [
                        f"{prefix}.{linear}.weight".lstrip(".") for linear in linears
                    ]
                    matrices = [
                        (mapped[w], mapped[f"{w}_scale"])
                        if f"{w}_scale" in mapped
                        else quantize(
                            finite(mapped[w], f"{file.path}: {w}"),
                            "int8" if w == "lm_head.weight" else kind,
                        )
                        for w in names
                    ]
                    for linear in linears:
                        setattr(module, linear, None)
                    setattr(module, new_name, QuantizedLinear(matrices, device))
        for prefix, module in self.part_modules(name):
            own = {}
            for k, _ in tqdm(
                [*module.named_parameters()], f"loading {name}", delay=1, leave=False
            ):
                own[k] = finite(tensors[prefix + k], f"{file.path}: {prefix}{k}").to(
                    device, dtype
                )
            module.load_state_dict(own, assign=True)

    def init_part(self, name: str, device):
        """Random float32 weights by a part's own rule, or its layers'; drawn on the CPU, for any device."""
        for _, module in self.part_modules(name):
            module.to_empty(device="cpu")
            for layer in (
                [module]
                if hasattr(module, "reset_parameters")
                else reversed([*module.modules()])
            ):
                if hasattr(layer, "reset_parameters"):
                    layer.reset_parameters()
            module.to(device)

    def save_part(self, name: str, folder: str, dtype: str = "float32"):
        """Write a part into `folder`, for from_files to read; an older file is replaced in one move."""
        parameters = self.part_parameters(name)
        path, metadata = Path(folder) / f"{name}.safetensors", {"format": "pt"}
        if name == "llama":
            path = Path(folder) / "llama/model.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            parameters = {
                k if k.startswith("lm_head") else f"model.{k}": p
                for k, p in parameters.items()
            }
            for file, content in (
                (
                    "config.json",
                    json.dumps(self.llama.config.to_hub(), indent=1).encode(),
                ),
                ("tokenizer.model", Path(self.tokenizer.path).read_bytes()),
            ):
                with replacing(path.parent / file) as temporary:
                    temporary.write_bytes(content)
        elif name in CONFIGS:
            metadata["config"] = json.dumps(
                asdict(self.part_modules(name)[0][1].config)
            )
        else:
            trained = {
                k: fingerprint(self.part_parameters(k))
                for k in self.fingerprints
                if any(p.requires_grad for p in self.part_parameters(k).values())
            }
            metadata["trained_with"] = json.dumps(self.fingerprints | trained)
        with replacing(path) as temporary:
            save_file(
                {
                    k: p.detach().to("cpu", getattr(torch, dtype)).contiguous()
                    for k, p in parameters.items()
                },
                temporary,
                metadata,
            )


def check_english(model: MiniGPT4):
    """Print the language model's perplexity on English, and a warning if its weights are broken."""
    value = model.perplexity(
        (Path(__file__).parent / "assets/paragraph.txt").read_text().strip()
    )
    note(
        f"perplexity on a paragraph of English: {value:.1f} (a healthy LLaMA: below 20)"
    )
    if value > 100:
        note("warning: these weights are broken or not English; fetch or convert again")


# sizes: a LlamaConfig, or a dict; of a projection, the fingerprints of the parts that it was trained with
PartFile = namedtuple("PartFile", "path tensors sizes")


def read_part(name: str, path: str) -> PartFile:
    """A part's file, or LLaMA's folder."""
    if name == "llama":
        config, shards = read_llama_folder(path)
        unused = (
            "rotary_emb.inv_freq",
            *["lm_head.weight"] * config.tie_word_embeddings,
        )  # in some files
        tensors = {
            k.removeprefix("model."): t
            for shard in shards
            for k, t in load_tensors(shard)[0].items()
            if not k.endswith(unused)
        }
        return PartFile(path, tensors, config)
    tensors, metadata = load_tensors(path)
    try:
        sizes = (
            metadata["config"]
            if name in CONFIGS
            else metadata.get("trained_with", "{}")
        )
        return PartFile(path, tensors, dict(json.loads(sizes)))
    except (KeyError, ValueError, TypeError, RecursionError) as e:
        raise InputError(
            f"{path}: no metadata of a {name} file; make it with tools/convert.py {name}"
        ) from e


def check_sources(
    sources: dict, trainable: tuple[str, ...], dtype: str, tokenizer: str | None
):
    """Raise InputError for arguments of from_files that do not go together."""
    vision, qformer, llama = (sources[k] for k in ("vision", "qformer", "llama"))
    parts = [k for k in PARTS if k == "llama" or vision and (k != "qformer" or qformer)]
    wrong = [name for name in trainable if name not in parts]
    known, is_new = DTYPES + QUANTIZED, isinstance(llama, dict)
    for is_wrong, what in (
        (dtype not in known, f"dtype {dtype!r}: give one of {', '.join(known)}"),
        (
            wrong,
            f"trainable: {''.join(wrong[:1])!r} is no part of this model; it has {', '.join(parts)}",
        ),
        (
            qformer and not vision,
            "qformer: it needs a vision part; give vision as well",
        ),
        (not llama, "llama: no language model is given; set llama to its folder"),
        (
            is_new and not tokenizer,
            "llama: a new one needs a tokenizer.model; set tokenizer",
        ),
        (
            dtype in QUANTIZED and (trainable or is_new),
            f"dtype {dtype}: not for trained or new parts",
        ),
    ):
        if is_wrong:
            raise InputError(what)


def part_config(
    name: str, sources: dict, files: dict, **needed: int
) -> VisionConfig | QFormerConfig | None:
    """A part's sizes, from its file or else from `sources`. Raises InputError unless they are as `needed`."""
    if sources[name] in ("", None):
        return None
    file = files.get(name) or PartFile("the run's config", {}, needed | sources[name])
    config = check_sizes(
        override(CONFIGS[name](), file.sizes, f"{file.path}: {name}"), file.path
    )
    if config.width % config.n_heads:
        raise InputError(
            f"{file.path}: {config}: give a width that is a multiple of n_heads"
        )
    if needed.items() - asdict(config).items():
        raise InputError(
            f"{file.path}: {config} does not fit the vision part; needed is {needed}"
        )
    return config
