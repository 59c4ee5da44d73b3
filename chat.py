"""Chat with MiniGPT-4 about pictures, in the terminal.

    python chat.py photo.jpg                                        a conversation; /help lists the commands
    python chat.py photo.jpg --prompt="What is in this picture?"    one answer on stdout, then exit
    python chat.py a.jpg b.jpg --ckpt=out/stage2 --temperature=0    several pictures, a trained run, greedy

Without --ckpt it is the tiny model in assets/tiny. The sampling defaults are those of the original demo.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from configs.prompts import IMAGE, TEMPLATES, chat_segments, user_message
from configs.schema import (DTYPES, InputError, check_options, option, override, parse_args,
                            read_saved_config, run_main)
from llama import CONTEXT
from model import MiniGPT4, pick_device
from vision import load_image

PARAGRAPH = ("The old lighthouse stands at the end of the harbor wall. Every evening the keeper climbs the "
             "narrow stairs, cleans the glass and lights the lamp, so that the fishing boats can find their "
             "way home. In winter, when storms come in from the sea, he sometimes stays awake all night. His "
             "daughter brings him bread, cheese and a pot of hot tea, and they talk about the ships that "
             "pass and the places where they may be going.")
TINY_NOTE = ("note: this is the tiny demonstration model. It knows only drawings of colored shapes, and "
             "names shapes in any photograph. For a real model see the README, then --ckpt=RUN.")
HELP = """\
/image PATH   show a picture; your next message is about it and those before
/reset        forget the conversation and its pictures
/quit         leave (also Ctrl-D); Ctrl-C stops an answer"""


@dataclass(frozen=True)
class Options:
    ckpt: str = option("", "a run's folder; none: the tiny model of this repo")
    prompt: str = option("", "ask this, print the answer alone, and exit")
    template: str = option("", "none: the run's own", choices=("", *TEMPLATES))
    temperature: float = option(1.0, "0: greedy", least=0)
    top_p: float = option(0.9, "sample from the likeliest tokens of this total probability")
    repetition_penalty: float = option(1.05, "1: none", least=0.01, most=100)
    num_beams: int = option(1, "above 1: beam search, which takes the likeliest answer", least=1, most=64)
    min_length: int = option(1, "least tokens of an answer, its `<s>` among them, before `</s>`", least=0)
    length_penalty: float = option(1.0, "above 0: beam search prefers longer answers")
    max_new_tokens: int = option(300, "most tokens of an answer", least=1, most=CONTEXT - 1)
    seed: int = option(0, "the same seed gives the same answers", least=0, most=2**63 - 1)
    device: str = option("", "none: cuda if there is one, else cpu")
    dtype: str = option("", "none: the run's own, but never float16 on a CPU", choices=("", *DTYPES))
    check: bool = option(False, "first measure whether the language model knows English")

    def __post_init__(self):
        check_options(self, ("temperature", not 0 < self.temperature < 1e-3, "give 0 or at least 0.001"),
                      ("top_p", 0 < self.top_p <= 1, "give one above 0, at most 1"))


def load(options: Options) -> tuple[MiniGPT4, Options]:
    """The model of a run's folder, checked if asked for, and the options with the gaps filled in from it."""
    if not options.ckpt:
        print(TINY_NOTE, file=sys.stderr)
    run = options.ckpt or str(Path(__file__).parent / "assets/tiny")
    saved = read_saved_config(run)
    device = pick_device(options.device).type
    dtype = options.dtype or saved.dtype
    if dtype == "float16" and device == "cpu":
        dtype = "bfloat16"
    model = MiniGPT4.from_files(**saved.parts(), dtype=dtype, device=device, image_size=saved.image_size)
    template = options.template or saved.template or "vicuna"
    if not options.template and not saved.template:
        print(f"note: {run} was trained without a template; --template=vicuna is used", file=sys.stderr)
    if options.check:
        check(model)
    return model, replace(options, device=device, dtype=dtype, template=template)


def check(model: MiniGPT4):
    """Print the language model's perplexity on English, and a warning if its weights are broken."""
    value = model.perplexity(PARAGRAPH)
    print(f"perplexity on a paragraph of English: {value:.1f} (a healthy LLaMA: below 20)", file=sys.stderr)
    if value > 100:
        print("warning: these weights are broken or not English; fetch or convert again", file=sys.stderr)


class Picture(NamedTuple):
    path: str
    number: int     # of all pictures of this chat, from 1
    embeds: Tensor  # (1, N, d_llama)


class Turn(NamedTuple):
    question: str
    answer: str | None = None
    pictures: tuple[Picture, ...] = ()  # shown before the question
    ended: bool = False                 # whether the answer is complete


class Chat:
    """One conversation: its turns and its pictures. Start with Chat(*load(Options()))."""

    def __init__(self, model: MiniGPT4, options: Options):
        self.model, self.options, self.template = model, options, TEMPLATES[options.template]
        self.generator = torch.Generator(options.device).manual_seed(options.seed)
        self.context, self.n_pictures = model.llama.config.max_position_embeddings, 0
        self.reset()

    def reset(self):
        """Forget all turns and pictures."""
        self.turns: list[Turn] = []
        self.new_pictures: tuple[Picture, ...] = ()  # shown since the last question
        self.n_dropped = 0                           # turns that the context has no room for
        self.cache, self.cached = self.model.new_cache(), []  # `cached`: whose keys and values it holds
        self.stats: dict[str, float] = {}  # of the last answer: tokens, and seconds

    @property
    def ended(self) -> bool:
        """Whether the last answer is complete."""
        return not self.turns or self.turns[-1].ended

    @torch.no_grad()
    def add_image(self, path: str):
        """Show a picture; it stands before the next question. Raises InputError when it cannot be read."""
        if self.model.vision is None:
            raise InputError(f"{self.options.ckpt}: this run sees no pictures; give one with vision")
        image = load_image(path, self.model.image_size).unsqueeze(0).to(self.options.device)
        self.n_pictures += 1
        self.new_pictures += (Picture(path, self.n_pictures, self.model.encode_image(image)),)

    def undo(self) -> Turn:
        """Forget the last turn and return it; its pictures stand before the next question."""
        turn = self.turns.pop()
        self.new_pictures = turn.pictures + self.new_pictures
        self.n_dropped = min(self.n_dropped, len(self.turns))
        return turn

    def ask(self, text: str) -> Iterator[str]:
        """Yield the answer piece by piece; the turn is remembered, also when it is stopped half-way. A question
        that is too long raises InputError and is forgotten."""
        start, o, model, end = time.perf_counter(), self.options, self.model, self.template.end
        text = text.encode("utf-8", "replace").decode()  # a terminal may send what is no text
        tokens, images = self.prompt(Turn(text, pictures=self.new_pictures))
        self.turns.append(Turn(text, "", self.new_pictures))
        self.new_pictures, n_cached = (), self.cache.length
        stop, room = model.tokenizer.stop_sequences(end), min(o.max_new_tokens, self.context - len(tokens))
        if o.num_beams > 1:
            steps = model.beam_search(tokens, images, o.num_beams, room, o.repetition_penalty, o.min_length,
                                      o.length_penalty, stop)
        else:
            steps = model.generate(tokens, images, room, o.temperature, o.top_p, o.repetition_penalty, stop,
                                   self.context, self.generator, o.min_length, self.cache)
        ids, shown = [], ""
        for token in steps:
            ids.append(token)
            seconds, ended = time.perf_counter() - start, model.is_end(ids, stop)
            self.stats = {"prompt_tokens": len(tokens), "cached_tokens": n_cached, "answer_tokens": len(ids),
                          "first_word_s": seconds if len(ids) == 1 else self.stats["first_word_s"],
                          "seconds": seconds}
            ready = answer = model.tokenizer.answer_text(ids, end)
            if not ended and len(ids) < room:
                ready = answer.rstrip("\ufffd").rstrip(end[0])  # half a character, or half an end, waits
            self.turns[-1] = self.turns[-1]._replace(answer=answer, ended=ended)
            if ready.startswith(shown) and len(ready) > len(shown):
                yield ready[len(shown):]
                shown = ready

    @torch.no_grad()
    def remember(self):
        """Bring the last answer into the cache as later prompts have it. Call it while the user reads."""
        tokens, images = self.prompt(None)
        if self.cache.length < len(tokens) <= self.context:
            x = self.model.embed(torch.tensor([tokens], device=self.options.device), images)
            self.model.llama(x[:, self.cache.length:], self.cache)

    def prompt(self, new: Turn | None) -> tuple[list[int], Tensor | None]:
        """The ids and pictures of the conversation, with a new turn or without; the cache keeps what it shares
        with them. When the context is full, the oldest turns are left out. Their pictures stay as long as
        there is room, or no newer one."""
        limit = self.context - min(self.options.max_new_tokens, self.context // 3)
        turns, old = [*self.turns[self.n_dropped:], *[new] * bool(new)], self.turns[:self.n_dropped]
        old = [p for turn in old for p in turn.pictures]
        n_turns = len(turns)
        while len(tokens := self.ids(old, turns)) > limit and new:
            if len(turns) > 1:
                old += turns.pop(0).pictures
            elif old and new.pictures:
                old.pop(0)
            else:
                raise InputError(f"the question takes {len(tokens)} tokens of the {limit} that the model has "
                                 "room for; shorten it, or show fewer pictures")
        if len(turns) < n_turns:
            self.n_dropped += n_turns - len(turns)
            print(f"note: the model's context of {self.context} tokens is full; the oldest turns, "
                  f"{self.n_dropped}, are left out from now on", file=sys.stderr)
        pictures = old + [p for turn in turns for p in turn.pictures]
        numbers = iter([-p.number for p in pictures for _ in range(self.model.n_image_tokens)])
        keys = [next(numbers) if id == IMAGE else id for id in tokens]
        same = [a == b for a, b in zip(keys, self.cached)] + [False]
        self.cache.length = min(same.index(False), self.cache.length, len(keys) - bool(new))
        self.cached = keys
        return tokens, torch.cat([p.embeds for p in pictures]) if pictures else None

    def ids(self, old: list[Picture], turns: list[Turn]) -> list[int]:
        """The ids of these turns, `old` pictures before the first one's own."""
        counts = [len(turn.pictures) + len(old) * (i == 0) for i, turn in enumerate(turns)]
        segments = chat_segments([(user_message(turn.question, n), turn.answer)
                                  for turn, n in zip(turns, counts)], self.template)
        return self.model.tokenizer.encode_segments(segments, self.model.n_image_tokens)


def converse(chat: Chat):
    """Read questions from stdin until /quit or its end."""
    with suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and history, where the system has them)
    while True:
        try:
            line = input("you> " if sys.stdin.isatty() else "").strip()
            command, _, argument = line.partition(" ")
            if command == "/quit":
                return
            elif command == "/help":
                print(HELP)
            elif command == "/reset":
                chat.reset()
                print("A new conversation begins, without a picture.")
            elif command == "/image":
                path = os.path.expanduser(argument.strip().strip("'\""))
                chat.add_image(path)
                print(f"{path}: seen. What would you like to know?")
            elif command.startswith("/"):
                print(f"{command}: unknown command\n{HELP}")
            elif line:
                say(chat, line)
        except EOFError:
            return
        except InputError as e:
            print(f"error: {e}", file=sys.stderr)


def say(chat: Chat, question: str):
    """Print an answer as it comes; Ctrl-C ends it early."""
    with suppress(KeyboardInterrupt):
        for piece in chat.ask(question):
            print(piece, end="", flush=True)
    print()
    if not chat.ended:
        print(f"(stopped before its end; max_new_tokens is {chat.options.max_new_tokens})", file=sys.stderr)


def main(argv: list[str]):
    pictures, given = parse_args(argv, __doc__, "[IMAGE ...]", Options)
    options = override(Options(), given)
    chat = Chat(*load(options))
    for path in pictures:
        chat.add_image(path)
    if options.prompt:
        say(chat, options.prompt)
    else:
        print(f"{len(pictures)} picture(s) shown. /help lists what can be typed.", file=sys.stderr)
        converse(chat)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack some characters
    run_main(main)
