"""MiniGPT-4 (arXiv 2304.10592): only the projection between frozen parts is trained.

    images -> vision -> bridge -> proj -> in place of the IMAGE ids: llama -> text

The vision tower (EVA-ViT) and the bridge (Q-Former) come from BLIP-2, the language
model is a Vicuna or another LLaMA. Axes: B sequences, T tokens, N image tokens of a
picture, D width, V vocabulary, S pixels of a side.
"""

from collections.abc import Collection, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs.prompts import IMAGE, is_end
from llama import IGNORE, KVCache, Llama, LlamaConfig, sample
from llama import beam_search as search_beams
from plumbing.console import InputError
from plumbing.quantized import GraphedSteps, one_row_kernels
from plumbing.tokenizer import Tokenizer, open_tokenizer
from plumbing.weights import (
    Part,
    build,
    check_companions,
    check_initialized,
    check_sources,
    check_vocabulary,
    choose_quantization,
    describe_part,
    identify,
    load_part,
    read_parts,
    read_sizes,
    reset_part,
    save_hub_folder,
    save_tensors,
    uninitialized_as_nan,
)
from qformer import JoinPatches, QFormer, QFormerConfig
from vision import VisionConfig, VisionTransformer

# The vision towers to choose from, by the class of their config.
TOWERS = {VisionConfig: VisionTransformer}
# A part's file says of which kind it is: {part: {kind: the class of its config}}.
KINDS = {
    "vision": {tower.kind: config for config, tower in TOWERS.items()},
    "qformer": {"qformer": QFormerConfig},
    "llama": {"llama": LlamaConfig},
}
Ids = list[int]  # of tokens
LOGITS_AT_ONCE = 256  # positions; 33 MB of float32 with a vocabulary of 32,000


class MiniGPT4(nn.Module):
    """The whole model. Each part casts its input to the dtype of its own weights."""

    def __init__(
        self,
        vision: VisionConfig | None,
        qformer: QFormerConfig | None,
        llama: LlamaConfig,
        image_size: int = 0,
        on_disk: Collection[str] = (),
    ):
        """Build the parts, without memory for those whose weights are `on_disk`.

        Without `vision` it is a language model alone, without `qformer` the bridge
        joins neighboring patches. image_size 0 takes the size of the vision part.
        """
        super().__init__()
        self.vision = self.bridge = self.proj = None
        self.image_size = self.n_image_tokens = 0
        if vision:
            self.vision = build(TOWERS[type(vision)], vision, "vision" in on_disk)
            if qformer:
                self.bridge = build(QFormer, qformer, "qformer" in on_disk)
            else:
                self.bridge = JoinPatches(vision.width, self.vision.has_class_token)
            self.proj = nn.Linear(self.bridge.width, llama.hidden_size)
            self.image_size = image_size or vision.image_size
            n_patches = self.vision.n_patches(self.image_size)
            self.n_image_tokens = self.bridge.n_image_tokens(n_patches)
        self.llama = build(Llama, llama, "llama" in on_disk)

        # The table of parts. Each has a file, and modules whose tensors are in it:
        # Part({prefix of their names in the file: module}).
        self.parts: dict[str, Part] = {}
        if vision:
            # A bridge begins with a LayerNorm, ln_vision. The Q-Former's file has it.
            # JoinPatches has no file: its ln_vision is in the vision file or, as in the
            # original, in none, and keeps its initial values. "Optional" covers this,
            # and a vision file whose ln_vision is not used.
            modules = {"": self.vision}
            if not qformer:
                modules["ln_vision."] = self.bridge.ln_vision
            self.parts["vision"] = Part(modules, optional=("ln_vision.",))
            if qformer:
                self.parts["qformer"] = Part({"": self.bridge})
            self.parts["proj"] = Part({"proj.": self.proj})
        self.parts["llama"] = Part({"": self.llama})
        self.tokenizer: Tokenizer | None = None
        # Decodes instead of llama where it is set: with CUDA graphs.
        self.graphed_steps: GraphedSteps | None = None
        # {part: hash of its weights as loaded}
        self.fingerprints: dict[str, str] = {}

    def encode_image(self, images: Tensor) -> Tensor:
        """Pictures, (B, 3, S, S) uint8 or normalized float -> (B, N, d_llama).

        Also takes the features that `image_features` computed, (B, N, bridge.width).
        """
        is_features = images.dim() == 3
        features = images if is_features else self.image_features(images)
        dtype = next(self.proj.parameters()).dtype  # proj may be any module
        return self.proj(features.to(dtype))

    def image_features(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, S, S) -> the projection's input (B, N, bridge.width)."""
        if images.dtype == torch.uint8:
            images = self.vision.normalize(images)
        return self.bridge(self.vision(images))

    def embed(self, tokens: Tensor, image_embeds: Tensor | None) -> Tensor:
        """Token ids (B, T) -> (B, T, d_llama), with the image tokens in reading order.

        image_embeds: (pictures, N, d_llama), as many vectors as there are IMAGE ids.
        """
        is_image = tokens == IMAGE
        x = self.llama.embed_tokens(tokens.masked_fill(is_image, 0))
        n_given = 0 if image_embeds is None else image_embeds.shape[:-1].numel()
        if tokens.is_cpu:  # a GPU would have to be waited for
            n_wanted = int(is_image.sum())
            if n_wanted != n_given:
                raise ValueError(
                    f"{n_wanted} IMAGE ids in the tokens, "
                    f"but {n_given} image tokens were given"
                )
        if n_given == 0:
            return x
        return x.masked_scatter(is_image.unsqueeze(-1), image_embeds.to(x.dtype))

    def forward(self, images: Tensor | None, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy over all targets of the batch, float32; 0 without targets.

        images: all pictures of the batch, (pictures, 3, S, S), or their features.
        tokens: int64 (B, T), padded on the right with any id: attention is causal, so
        that needs no mask. targets: the same ids where they are to be predicted, IGNORE
        elsewhere; the shift by one position happens here.
        """
        image_embeds = None if images is None else self.encode_image(images)
        hidden = self.llama(self.embed(tokens, image_embeds))
        following = targets[:, 1:]
        is_predicted = following != IGNORE
        return self.cross_entropy(hidden[:, :-1][is_predicted], following[is_predicted])

    def cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean over positions; hidden (n, d_llama), targets (n,).

        Logits are computed for a few positions at a time, and again in the backward
        pass: (n, V) of them would take more memory than the rest of the step.
        """

        def loss_sum(hidden, targets):
            logits = self.llama.logits(hidden).float()
            return F.cross_entropy(logits, targets, reduction="sum")

        total = torch.zeros((), device=hidden.device)
        hidden_chunks = hidden.split(LOGITS_AT_ONCE)
        target_chunks = targets.split(LOGITS_AT_ONCE)
        for h, t in zip(hidden_chunks, target_chunks):
            total = total + checkpoint(loss_sum, h, t, use_reentrant=False)
        return total / max(1, len(targets))

    def generate(
        self,
        tokens: Ids,
        image_embeds: Tensor | None = None,
        stop: tuple[Ids, ...] = (),
        **options,
    ) -> Iterator[int]:
        """Yield the ids of an answer, with the ids that end it.

        tokens: the prompt, with IMAGE ids. image_embeds: (pictures, N, d_llama). stop:
        sequences that end an answer, besides the end token. options: see `decode`.
        """
        answer = []
        for (new,) in self.decode([tokens], image_embeds, **options):
            yield new
            answer.append(new)
            if is_end(answer, (*self.ends, *stop)):
                return

    def generate_batch(
        self,
        prompts: list[Ids],
        image_embeds: Tensor | None = None,
        stop: tuple[Ids, ...] = (),
        **options,
    ) -> list[Ids]:
        """The answers to B prompts of one length, all computed together."""
        stops = (*self.ends, *stop)
        answers = [[] for _ in prompts]
        unfinished = set(range(len(prompts)))
        for new in self.decode(prompts, image_embeds, **options):
            for row in list(unfinished):
                answers[row].append(new[row])
                if is_end(answers[row], stops):
                    unfinished.remove(row)
            if not unfinished:
                break
        return answers

    @torch.no_grad()
    def decode(
        self,
        prompts: list[Ids],
        image_embeds: Tensor | None = None,
        max_new_tokens: int = 300,
        temperature: float = 1.0,
        top_p: float = 0.9,
        repetition_penalty: float = 1.05,
        context: int = 0,
        generator: torch.Generator | None = None,
        min_length: int = 0,
        cache: KVCache | None = None,
    ) -> Iterator[Ids]:
        """Yield the next id of each of B prompts, max_new_tokens times.

        min_length: the end token is not allowed among the first min_length - 1 ids.
        context: the most tokens of prompt and answer together (0: the model's own); a
        longer prompt loses its beginning. cache: may hold the first tokens of the
        prompts, if these do not lose any.
        """
        x, max_new_tokens = self.embed_prompts(
            prompts, image_embeds, max_new_tokens, context
        )
        seen = self.penalized_ids(len(prompts))
        if cache is None:
            cache = KVCache()
        x = x[:, cache.length :]
        step = self.graphed_steps or self.llama
        for n in range(1, max_new_tokens + 1):
            with one_row_kernels(x):
                hidden = step(x, cache)
                logits = self.llama.logits(hidden[:, -1])
            # The embeddings may have more rows than the tokenizer has ids.
            logits = logits[:, : seen.shape[1]].float()
            if n < min_length:
                logits[:, self.tokenizer.ends] = -torch.inf
            new = sample(
                logits, seen, temperature, top_p, repetition_penalty, generator
            )
            seen.scatter_(1, new, True)
            yield new.flatten().tolist()  # waits for the device
            x = self.llama.embed_tokens(new)

    @torch.no_grad()
    def beam_search(
        self,
        tokens: Ids,
        image_embeds: Tensor | None = None,
        stop: tuple[Ids, ...] = (),
        max_new_tokens: int = 300,
        context: int = 0,
        **options,
    ) -> Ids:
        """The likeliest answer that several beams find.

        options: num_beams, length_penalty, repetition_penalty and min_length.
        """
        x, max_new_tokens = self.embed_prompts(
            [tokens], image_embeds, max_new_tokens, context
        )
        seen = self.penalized_ids(1)
        return search_beams(
            self.llama, x, seen, max_new_tokens, self.ends, stop, **options
        )

    def embed_prompts(self, prompts, image_embeds, max_new_tokens: int, context: int):
        """Embed B prompts, (B, T, d_llama), and find the length of the answer.

        Where a context is given, the answer has max_new_tokens, and a prompt that is
        too long loses its beginning. In the model's own context (0) the answer has only
        what the prompt leaves, but at least a third of the context.
        """
        n_prompt = len(prompts[0])
        if not context:
            context = self.llama.config.max_position_embeddings
            room = max(context - n_prompt, context // 3)
            max_new_tokens = min(max_new_tokens, room)
        if context <= max_new_tokens:
            raise InputError(
                f"context {context} leaves no room "
                f"beside max_new_tokens {max_new_tokens}"
            )
        x = self.embed(torch.tensor(prompts, device=self.device), image_embeds)
        n_cut = max(0, n_prompt + max_new_tokens - context)
        return x[:, n_cut:], max_new_tokens

    def penalized_ids(self, n_prompts: int) -> Tensor:
        """The ids that the repetition penalty starts with, bool (B, tokenizer's ids).

        Quirk of the original kept: `<s>`, and nothing of the prompt.
        """
        seen = torch.zeros(n_prompts, self.tokenizer.vocab_size, dtype=torch.bool)
        if self.tokenizer.bos is not None:
            seen[:, self.tokenizer.bos] = True
        return seen.to(self.device)

    @property
    def ends(self) -> list[Ids]:
        """The sequences that end any answer: one id each."""
        return [[id] for id in self.tokenizer.ends]

    @property
    def device(self) -> torch.device:
        """Where the language model is."""
        return self.llama.norm.weight.device

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
        """Build the model from weight files, memory-mapped.

        A dict of sizes makes a new part with random weights. The projection, new parts
        and `trainable` ones (default: the projection) are float32, other parts `dtype`.
        Raises InputError for files that are missing, broken, or do not fit together.
        """
        sources = {"vision": vision, "qformer": qformer, "proj": proj, "llama": llama}
        check_sources(sources, trainable or (), dtype, tokenizer)
        # {part: its file's tensors and sizes}; a new part has sizes alone. LlamaConfig
        # reads config.json; other files have their sizes in their metadata.
        files = read_parts(sources, LlamaConfig)
        # Changes LLaMA's sizes in `files` for int8 and int4; other parts are bfloat16.
        dtype = choose_quantization(files, dtype, trainable or ())
        if trainable is None:
            trainable = ("proj",) if vision else ()
        tokenizer = open_tokenizer(tokenizer, llama)
        vision_config, qformer_config, llama_config = read_sizes(
            files, KINDS, tokenizer.vocab_size, image_size
        )
        check_vocabulary(tokenizer, llama_config.vocab_size)
        on_disk = [name for name, file in files.items() if file.tensors is not None]
        with uninitialized_as_nan():
            model = cls(
                vision_config, qformer_config, llama_config, image_size, on_disk
            )
        model.tokenizer = tokenizer
        for name, part in model.parts.items():
            if name in on_disk:  # new parts are float32, and stay it
                in_float32 = name in (*trainable, "proj")
                part_dtype = torch.float32 if in_float32 else getattr(torch, dtype)
                load_part(name, part, files[name], part_dtype, device)
            else:
                check_initialized(name, part)
            for module in part.modules.values():
                module.to(device).requires_grad_(name in trainable)
        model.fingerprints = identify(model.parts, files)
        check_companions(files, model.fingerprints)  # warns if proj had others
        return model.eval()

    def part_tensors(self, name: str) -> dict[str, Tensor]:
        """A part's parameters and buffers, {} without that part."""
        return self.parts[name].tensors() if name in self.parts else {}

    def init_part(self, name: str):
        """Draw new random weights for a part."""
        reset_part(self.parts[name])

    def save_part(self, name: str, folder: str, dtype: str = "float32"):
        """Write a part into `folder`, for from_files to read.

        An older file is replaced at the end, in one move.
        """
        tensors = self.part_tensors(name)
        if name == "llama":
            sizes = self.llama.config.to_hub()
            save_hub_folder(
                f"{folder}/llama", tensors, dtype, sizes, self.tokenizer.files()
            )
        else:
            metadata = describe_part(name, self.parts, self.fingerprints)
            save_tensors(f"{folder}/{name}.safetensors", tensors, dtype, metadata)

    def drop_vision(self, to_save: Collection[str] = ()):
        """Free vision tower and bridge once all features are computed.

        Those named in `to_save` stay in the table of parts, for save_part.
        """
        self.vision = self.bridge = None
        for name in {"vision", "qformer"} - set(to_save):
            self.parts.pop(name, None)
