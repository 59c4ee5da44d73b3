"""Tokenizers: sentencepiece's tokenizer.model, and Hugging Face's tokenizer.json."""

import json
import os
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from plumbing.console import InputError, optional_package
from plumbing.files import read_json, start_of

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")  # the first one counts
# What is read beside a tokenizer.json
BESIDE_TOKENIZER = (
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
)
EVERY_SCRIPT = "a\né你😀"  # characters of one to four bytes


class Tokenizer:
    """A sentencepiece `tokenizer.model`. Typed letters `<s>`, `</s>` are plain text."""

    joins_end = True  # an answer and its end are encoded as one text, as originally
    other_ends: list[int] = []  # that end an answer besides `eos`
    no_thinking: list[int] = []  # before the answer of a model that else thinks first
    controls: dict[str, int] = {}  # control tokens that templates may name

    def __init__(self, path: str):
        try:
            if not os.path.isfile(path):  # a device would be read without end
                raise OSError("no regular file")
            start_of(path)
            self._processor = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as e:
            raise InputError(
                f"{path}: no sentencepiece model; it is a LLaMA folder's "
                "tokenizer.model"
            ) from e
        self.path = str(path)
        self.vocab_size = self._processor.vocab_size()
        bos, self.eos = self._processor.bos_id(), self._processor.eos_id()
        self.bos = bos if bos >= 0 else None  # a model may have none
        if self.eos < 0:
            raise InputError(f"{path}: no `</s>`, which ends answers; take another")
        self.unknown = self._processor.unk_id()

    @property
    def ends(self) -> list[int]:
        """The ids that end any answer."""
        return [self.eos, *self.other_ends]

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """ "a dog" -> [263, 11203], with a leading space; `bos` prepends `<s>`."""
        ids = self._processor.encode(text)
        return [self.bos, *ids] if bos and self.bos is not None else ids

    def decode(self, ids: list[int]) -> str:
        """[263, 11203] -> "a dog", the reverse; control tokens give no text."""
        return self._processor.decode(ids)

    def piece(self, id: int) -> str:
        """11203 -> "\\u2581dog", where \\u2581 is a space."""
        return self._processor.id_to_piece(id)

    def control(self, name: str) -> int:
        """The id of a control token. Raises InputError if there is none."""
        if name not in self.controls:
            raise InputError(
                f"{self.path}: it has no token {name}; take another template, or "
                "another answer_end"
            )
        return self.controls[name]

    def files(self) -> dict[str, bytes]:
        """{name: content} of its files in a language model's folder."""
        files = {"tokenizer.model": Path(self.path).read_bytes()}
        if template := read_chat_template(self.path):
            files["chat_template.jinja"] = template.encode()
        return files


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json` of Hugging Face, such as LLaMA 3's, Qwen's and SmolLM2's.

    Typed names of control tokens, "<|im_end|>", are plain text. `bos` is None if texts
    do not start with a token.
    """

    joins_end = False

    def __init__(self, path: str):
        self.path = str(path)
        self._tokenizer, self.controls = read_tokenizer_json(path)
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
        if self.decode(self.encode(EVERY_SCRIPT)) != EVERY_SCRIPT:
            raise InputError(
                f"{path}: it has no tokens for some characters; take a model whose "
                "tokenizer knows all bytes"
            )
        first = self._tokenizer.encode("a").ids[0]
        self.bos = None if first == self.encode("a")[0] else first
        self.eos, *self.other_ends = read_ends(path, self.controls)
        self.unknown = None
        template = read_chat_template(path)
        may_think = "enable_thinking" in template or not template
        if may_think and {"<think>", "</think>"} <= self.controls.keys():
            gap = self.encode("\n\n")
            start, end = self.control("<think>"), self.control("</think>")
            self.no_thinking = [start, *gap, end, *gap]

    def __reduce__(self):  # what is pickled would read typed names as control tokens
        return JsonTokenizer, (self.path,)

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """ "a dog" -> [64, 2767]; `bos` prepends the token, if there is one."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [self.bos, *ids] if bos and self.bos is not None else ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)

    def piece(self, id: int) -> str:
        """2767 -> " dog"; control tokens by name."""
        return self._tokenizer.decode([id], skip_special_tokens=False)

    def files(self) -> dict[str, bytes]:
        folder = Path(self.path).parent
        names = ("tokenizer.json", *BESIDE_TOKENIZER)
        files = {n: (folder / n).read_bytes() for n in names if (folder / n).is_file()}
        ends = json.dumps({"eos_token_id": self.ends})
        return files | {"generation_config.json": ends.encode()}


def open_tokenizer(path: str | None, folder: str | Path = "") -> Tokenizer:
    """The tokenizer of a file; without a path, that of a language model's folder.

    Raises InputError if there is none, or if it needs a package that is missing.
    """
    if not path:
        found = [n for n in TOKENIZER_FILES if os.path.isfile(f"{folder}/{n}")]
        path = f"{folder}/{[*found, *TOKENIZER_FILES][0]}"
    return JsonTokenizer(path) if path.endswith(".json") else Tokenizer(path)


def read_tokenizer_json(path: str):
    """The tokenizer of the package `tokenizers`, and its control tokens, {name: id}."""
    content = read_json(Path(path))
    tokenizers = optional_package("tokenizers", path)
    content |= {"truncation": None, "padding": None}
    try:
        controls = content["added_tokens"]
        for token in controls:  # words that somebody added stay words
            token["special"] |= is_tag(token["content"])
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
        tokenizer.encode_special_tokens = True  # as text, not as control tokens
        return tokenizer, {token["content"]: token["id"] for token in controls}
    except Exception as e:  # the package has no class of its own for them
        raise InputError(f"{path}: no tokenizer ({e}); fetch it again") from e


def is_tag(token: str) -> bool:
    """Whether a token looks like markup: <think>, [INST]."""
    return token.startswith(("<", "[")) and token.endswith((">", "]"))


def beside(path: str, name: str) -> dict:
    """The JSON file beside a tokenizer's; {} if there is none."""
    file = Path(path).with_name(name)
    return read_json(file) if file.is_file() else {}


def read_ends(path: str, controls: dict[str, int]) -> list[int]:
    """The ids that end an answer, by the files beside a tokenizer; its eos first.

    Raises InputError if none of the files names one.
    """
    name = beside(path, "tokenizer_config.json").get("eos_token")
    if isinstance(name, dict):
        name = name.get("content")
    eos = controls.get(str(name))
    for given in (
        beside(path, "generation_config.json").get("eos_token_id"),
        beside(path, "config.json").get("eos_token_id"),
        eos,
    ):
        ends = given if isinstance(given, list) else [given]
        ends = [end for end in ends if end in controls.values()]
        if ends:
            return sorted(ends, key=lambda end: end != eos)
    raise InputError(
        f"{path}: no file beside it says which token ends an answer; fetch "
        "tokenizer_config.json, too"
    )


def read_chat_template(path: str) -> str:
    """The chat template (Jinja) of the folder with a tokenizer; "" without one."""
    file = Path(path).with_name("chat_template.jinja")
    if file.is_file():
        return file.read_text("utf-8", "replace")
    template = beside(path, "tokenizer_config.json").get("chat_template", "")
    # One template, or a list of several with names
    return template if isinstance(template, str) else json.dumps(template)
