"""Image-text data: sources on disk, the prompt templates, and the batches that the model is trained on.

A sequence is a plain list of ids in which IMAGE (-1) stands once for each image token; training and chat
build theirs here and nowhere else. Sequences are padded on the right, so causal attention needs no mask.

The order of the samples is a function of the seed and the step alone: worker processes only fetch what it
names, ranks take disjoint slices of the same global batch, and a resumed run continues at its step. So the
loss curve does not depend on how many workers or processes there are.

Quirks kept from the original: each text segment and each answer is tokenised on its own and so gets its own
leading space piece; an answer that is cut loses its end symbol; `###` directly after a text is other ids than
after a space.
"""

import glob
import json
import re
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from configs.schema import Config, InputError
from llama import IGNORE, IMAGE, Tokenizer
from vision import load_image

# ---- prompts -----------------------------------------------------------------------------------------------

SYSTEM = ("Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I "
          "provide it to you. Please answer my questions.")
INSTRUCTIONS = (  # one is drawn for each sample of stage 2
    "Describe this image in detail.",
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?",
)
BOS, EOS = 1, 2


@dataclass(frozen=True)
class Template:
    """How a conversation is written down. A segment is a text, BOS (a control token) or IMAGE (a picture)."""

    training: tuple[str, str]         # around the user's message in stage 2
    chat_start: tuple[str | int, ...]  # before the first message in chat
    user: tuple[str | int, ...]       # before each message of the user
    assistant: str                    # between the message and the answer
    end: str                          # after each answer; it is what the model learns to end with


TEMPLATES = {
    "vicuna": Template(("###Human: ", " ###Assistant: "), (SYSTEM, "###"), ("Human: ",),
                       "###Assistant: ", "###"),
    "llama2": Template(("[INST] ", " [/INST] "), (SYSTEM,), (BOS, "[INST] "), " [/INST] ", "</s>"),
}


def user_message(text: str, n_images: int) -> list[str | int]:
    """A user's words with pictures before them, as segments: ["<Img>", IMAGE, "</Img> ", text]."""
    return ["<Img>", IMAGE, "</Img> "] * n_images + [text]


def encode_segments(segments: list[str | int], tokenizer: Tokenizer, n_image_tokens: int) -> list[int]:
    """Segments -> ids. Texts that meet are one segment; IMAGE becomes n_image_tokens places."""
    ids, text = [], ""
    for segment in [*segments, None]:
        if isinstance(segment, str):
            text += segment
            continue
        ids += tokenizer.encode(text) if text else []
        text = ""
        if segment is not None:
            ids += [IMAGE] * n_image_tokens if segment == IMAGE else [segment]
    return ids


def chat_segments(turns: list[tuple[list[str | int], str | None]], template: Template) -> list[str | int]:
    """Turns of (user message, answer), the last answer None -> segments, laid out as in chat."""
    segments = [BOS, *template.chat_start]
    for message, answer in turns:
        segments += [*template.user, *message, template.assistant]
        if answer is not None:
            end = template.end.replace("</s>", "")  # the original writes no </s> into the history
            segments += [answer, end]
    return segments


def stop_sequences(tokenizer: Tokenizer, end: str) -> tuple[list[int], ...]:
    """The ids of an answer's end, at a segment's start and after text: "###" -> [835], [2277, 29937]."""
    if end == "</s>":
        return ([tokenizer.eos],)
    after_text = tokenizer.encode("a" + end)[len(tokenizer.encode("a")):]
    return tokenizer.encode(end), after_text


def answer_text(text: str, end: str) -> str:
    """What the user is shown of a decoded answer: all before its first end symbol."""
    return text.split(end)[0].strip()


def clean_caption(text: str, max_words: int = 50) -> str:
    """A web caption -> lower case, some punctuation out, white space folded, at most max_words words."""
    text = re.sub(r"[.!\"()*#:;~]", " ", text.lower())
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])


# ---- sources: random access to samples on disk -------------------------------------------------------------


class Sample(NamedTuple):
    """What a source holds at one place: either a caption, or a conversation, or a plain text."""

    images: list[str | bytes] = []                # paths or encoded pictures
    caption: str | None = None
    turns: list[tuple[str, str]] | None = None    # (user, assistant)
    text: str | None = None
    context: str = ""                             # stands before the text and is not learnt


class Shards:
    """Tar files as img2dataset writes them: KEY.jpg with KEY.json ({"caption": ...}) or KEY.txt beside it."""

    def __init__(self, paths: list[str]):
        self.name, self.paths, tables = paths[0] if paths else "no shards", paths, []
        for i, path in enumerate(paths):
            tables += [(i, *row) for row in _index_tar(path)]
        # columns: shard; picture at, bytes; text at, bytes; json?
        self.table = np.array(tables, dtype=np.int64).reshape(-1, 6)

    def __len__(self):
        return len(self.table)

    def __getitem__(self, i):
        shard, at, size, text_at, text_size, is_json = self.table[i].tolist()
        with open(self.paths[shard], "rb") as f:
            f.seek(at)
            image = f.read(size)
            f.seek(text_at)
            text = f.read(text_size).decode("utf-8", "replace")
        try:
            caption = json.loads(text)["caption"] if is_json else text
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(f"no caption in its .json ({e!r})") from e
        return Sample(images=[image], caption=caption)


def _index_tar(path):
    """The samples of a tar file: (picture at, bytes, text at, bytes, is it json), from its headers alone."""
    members: dict[str, dict] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for m in tar:
                key, _, kind = m.name.rpartition(".")
                members.setdefault(key, {})[kind.lower()] = (m.offset_data, m.size)
    except (OSError, tarfile.TarError) as e:
        raise InputError(f"{path}: not a readable tar file ({e}); fetch it again or take it out of "
                         "`data`") from e
    for files in members.values():
        image = next((files[k] for k in ("jpg", "jpeg", "png", "webp") if k in files), None)
        text = files.get("json") or files.get("txt")
        if image and text:
            yield *image, *text, int("json" in files)


class CaptionFolder:
    """Like cc_sbu_align: image/ID.jpg, and filter_cap.json ({"annotations": [{"image_id", "caption"}]})."""

    def __init__(self, folder: str):
        self.name, self.folder = folder, Path(folder) / "image"
        try:
            self.annotations = json.loads((Path(folder) / "filter_cap.json").read_text())["annotations"]
        except (ValueError, KeyError) as e:
            raise InputError(f"{folder}/filter_cap.json: no JSON with `annotations` ({e}); "
                             "fetch it again") from e

    def __len__(self):
        return len(self.annotations)

    def __getitem__(self, i):
        a = self.annotations[i]
        return Sample(images=[str(self.folder / f"{a['image_id']}.jpg")], caption=a["caption"])


class Conversations:
    """A .jsonl: {"conversation": [{"user": ...}, {"assistant": ...}, ...], "image": path or paths}, the image
    optional and relative to the file; {"image": path, "caption": ...}; or {"text": ..., "context": ...}, the
    text to be learnt as it stands after its context, if it has one."""

    def __init__(self, path: str):
        self.name = path
        self.lines = [line for line in Path(path).read_bytes().splitlines() if line.strip()]

    def __len__(self):
        return len(self.lines)

    def __getitem__(self, i):
        where = f"{self.name}, line {i + 1}"
        try:
            row = json.loads(self.lines[i])
            images = row.get("image", [])
            images = [images] if isinstance(images, str) else images
            images = [str(Path(self.name).parent / p) for p in images]
            if "conversation" in row:
                words = [next(iter(turn.items())) for turn in row["conversation"]]
                if [who for who, _ in words] != ["user", "assistant"] * (len(words) // 2):
                    raise InputError(f"{where}: a conversation alternates user and assistant, "
                                     "the assistant last")
                texts = [text for _, text in words]
                return Sample(images=images, turns=list(zip(texts[::2], texts[1::2])))
            return Sample(images, row.get("caption"), text=row.get("text"), context=row.get("context", ""))
        except (ValueError, AttributeError, StopIteration) as e:
            raise e if isinstance(e, InputError) else InputError(f"{where}: not a sample ({e})") from e


def open_source(path: str) -> Shards | CaptionFolder | Conversations:
    """The source at a path of the config's `data`. Raises InputError when there is none, or nothing in it."""
    braces = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", path)
    if path.endswith(".jsonl") and Path(path).is_file():
        source = Conversations(path)
    elif (Path(path) / "filter_cap.json").is_file():
        source = CaptionFolder(path)
    elif braces:
        before, first, last, after = braces.groups()
        source = Shards([f"{before}{i:0{len(first)}d}{after}" for i in range(int(first), int(last) + 1)])
    else:
        source = Shards(sorted(glob.glob(f"{path}/*.tar") if Path(path).is_dir() else glob.glob(path)))
    if len(source) == 0:
        raise InputError(f"data {path}: no samples there; give *.tar shards, a folder of them, a folder with "
                         "filter_cap.json, or a .jsonl file")
    return source


# ---- batches -----------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """images uint8 (pictures, 3, S, S) or None; tokens, targets int64 (B, T), padded on the right."""

    images: torch.Tensor | None
    tokens: torch.Tensor
    targets: torch.Tensor


class Samples(Dataset):
    """(source, sample, draw) -> (pictures uint8 (n, 3, S, S), ids, targets): one sample, ready for the model.

    `draw` seeds what is random about a sample (its instruction), so that every epoch draws anew. A sample
    that cannot be read is named on stderr and the one after it is taken; ten in a row raise InputError."""

    def __init__(self, sources: list, config: Config, tokenizer: Tokenizer, image_size: int,
                 n_image_tokens: int):
        self.sources, self.config, self.tokenizer = sources, config, tokenizer
        self.image_size, self.n_image_tokens = image_size, n_image_tokens

    def __getitem__(self, key):
        source, i, draw = key
        for i in range(i, i + 10):
            i %= len(self.sources[source])
            try:
                sample = self.sources[source][i]
                images = [load_image(image, self.image_size) for image in sample.images]
                rng = np.random.default_rng((self.config.seed, source, draw))
                return images, *self.tokenize(sample, rng)
            except InputError as e:
                print(f"skipped sample {i} of {self.sources[source].name}: {e}", file=sys.stderr)
        raise InputError(f"{self.sources[source].name}: ten samples in a row cannot be read, "
                         f"up to number {i}")

    def tokenize(self, sample: Sample, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """A sample's ids and targets (the same ids where they are to be predicted, IGNORE elsewhere)."""
        ids, targets = [], []
        for prompt, answer in self._turns(sample, rng):
            prompt = encode_segments(prompt, self.tokenizer, self.n_image_tokens)
            ids += prompt + answer
            targets += [IGNORE] * len(prompt) + answer
        return ids, targets

    def _turns(self, sample, rng):
        """Yield (prompt segments, answer ids), as the template says."""
        config = self.config
        if sample.text is not None:
            yield [BOS, sample.context], self.tokenizer.encode(sample.text)[:config.max_txt_len]
            return
        if sample.turns is None:
            if not isinstance(sample.caption, str):
                raise InputError(f"its caption is {sample.caption!r}, not a text")
            caption = clean_caption(sample.caption) if config.clean_captions else sample.caption
            if not config.template:  # stage 1: the picture, then its caption
                yield [BOS, *[IMAGE] * len(sample.images)], self._answer(caption)
                return
            turns = [(str(rng.choice(INSTRUCTIONS)), caption)]
        else:
            turns = sample.turns
        if not config.template:
            raise InputError("a conversation needs a template; set template to vicuna or llama2")
        template = TEMPLATES[config.template]
        before, after = template.training
        as_chat = rng.random() < config.chat_share
        for i, (text, answer) in enumerate(turns):
            message = user_message(text, len(sample.images) if i == 0 else 0)
            if as_chat:
                start = [BOS, *template.chat_start] if i == 0 else []
                yield [*start, *template.user, *message, template.assistant], self._answer(answer)
            else:
                start = [BOS, before] if i == 0 else [before.removeprefix(config.end_sym)]
                yield [*start, *message, after], self._answer(answer)

    def _answer(self, text):
        end = self.config.end_sym
        ids = self.tokenizer.encode(text) + [EOS] if end == "</s>" else self.tokenizer.encode(text + end)
        return ids[:self.config.max_txt_len]


class Batches(Sampler):
    """Which samples make up each batch: lists of (source, sample, draw), without end.

    A global batch of world x batch_size samples comes from one source, drawn by weight; rank r takes its r-th
    slice. Each source is gone through in a new order each epoch, every sample once."""

    def __init__(self, lengths: list[int], weights: list[float], batch_size: int, seed: int, rank: int = 0,
                 world: int = 1, start: int = 0):
        self.lengths, self.shares = lengths, np.cumsum(weights) / sum(weights)
        self.batch_size, self.seed, self.rank, self.world, self.start = batch_size, seed, rank, world, start

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        rng = np.random.default_rng(self.seed)
        past = np.searchsorted(self.shares, rng.random(self.start), side="right")
        drawn = np.bincount(past, minlength=len(self.lengths))  # batches taken from each source so far
        orders = {}  # source -> (epoch, order)
        while True:
            source = int(np.searchsorted(self.shares, rng.random(), side="right"))
            first = (int(drawn[source]) * self.world + self.rank) * self.batch_size
            drawn[source] += 1
            keys = []
            for draw in range(first, first + self.batch_size):
                epoch, place = divmod(draw, self.lengths[source])
                if orders.get(source, (None,))[0] != epoch:
                    epoch_rng = np.random.default_rng((self.seed, source, epoch))
                    order = epoch_rng.permutation(self.lengths[source])
                    orders[source] = epoch, order
                keys.append((source, int(orders[source][1][place]), draw))
            yield keys


def collate(samples: list) -> Batch:
    """Samples -> a Batch, padded on the right to the longest."""
    images = [image for images, _, _ in samples for image in images]
    longest = max(len(ids) for _, ids, _ in samples)
    tokens = torch.zeros(len(samples), longest, dtype=torch.int64)
    targets = torch.full((len(samples), longest), IGNORE, dtype=torch.int64)
    for row, (_, ids, wanted) in enumerate(samples):
        tokens[row, :len(ids)] = torch.tensor(ids)
        targets[row, :len(ids)] = torch.tensor(wanted)
    return Batch(torch.stack(images) if images else None, tokens, targets)


def open_samples(data: str | dict, config: Config, tokenizer: Tokenizer, image_size: int,
                 n_image_tokens: int):
    """The config's `data` or `heldout_data` -> (Samples, weight of each source)."""
    weights = {data: 1.0} if isinstance(data, str) else data
    sources = [open_source(path) for path in weights]
    return Samples(sources, config, tokenizer, image_size, n_image_tokens), list(weights.values())


def training_batches(samples: Samples, weights: list[float], config: Config, rank: int = 0, world: int = 1,
                     start: int = 0) -> Iterator[Batch]:
    """The endless batches of a training run for one rank, from its `start`-th on."""
    lengths = [len(source) for source in samples.sources]
    batches = Batches(lengths, weights, config.batch_size, config.seed, rank, world, start)
    return iter(DataLoader(samples, batch_sampler=batches, collate_fn=collate, num_workers=config.num_workers,
                           pin_memory=torch.cuda.is_available()))
