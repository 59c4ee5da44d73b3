"""Chat with MiniGPT-4 about images, in the terminal.

    python chat.py photo.jpg                                       /help lists commands
    python chat.py photo.jpg --prompt="What is in this picture?"   prints one answer
    python chat.py a.jpg b.jpg --ckpt=out/stage2 --temperature=0   a run, greedy

Without --ckpt, it chats with the tiny model. Sampling defaults are the original demo's.
`-` reads an image from stdin. Text on stdin is put before --prompt; without --prompt,
it is the question or, if it contains a command, a whole conversation.
"""

import io
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from configs.prompts import (
    IMAGE,
    TEMPLATES,
    check_template,
    encode_chat,
    format_end,
    is_end,
    parse_end,
    settled_text,
    stop_sequences,
    suggest_template,
    visible_answer,
)
from configs.schema import read_saved_config
from llama import KVCache, check_english
from model import MiniGPT4
from plumbing import terminal
from plumbing.console import InputError, is_plain, note, printable, run_main, set_plain
from plumbing.options import check_name, check_options, option, override, parse_args
from plumbing.processes import peak_mib, pick_device
from plumbing.quantized import QUANTIZED, graph_steps
from plumbing.tokenizer import read_chat_template
from plumbing.weights import DTYPES
from vision import load_image

HELP = """\
/image PATH          show an image; a path in a message does the same
/clear               start a new conversation, without images
/undo, /regenerate   take back the last question; answer it again
/set NAME VALUE      change an option; /show lists them
/save FILE           save the conversation as JSON, else as Markdown
/bye                 quit (also Ctrl-D); Ctrl-C stops an answer
\"""                  starts and ends a message of several lines"""
SETTINGS = (
    "temperature",
    "top_p",
    "repetition_penalty",
    "num_beams",
    "min_length",
    "length_penalty",
    "max_new_tokens",
    "seed",
    "stats",
)


@dataclass(frozen=True)
class Options:
    """Options of chat.py and of the tools that build on it."""

    ckpt: str = option("", "a run's folder (default: the tiny model in assets/)")
    prompt: str = option("", "ask this, print only the answer, and exit")
    template: str = option(
        "", "chat template (default: the run's)", choices=("", *TEMPLATES)
    )
    answer_end: str = option(
        "", "end of an answer, text or token (default: the run's or the template's)"
    )
    temperature: float = option(
        1.0, "sampling temperature; 0: greedy", least=0, most=100
    )
    top_p: float = option(
        0.9, "sample from the most likely tokens with this total probability"
    )
    repetition_penalty: float = option(
        1.05, "penalty on repeated tokens; 1: off", least=0.01, most=100
    )
    num_beams: int = option(
        1, "above 1: beam search, without sampling", least=1, most=64
    )
    min_length: int = option(
        1, "the answer cannot end in its first min_length - 1 tokens", least=0
    )
    length_penalty: float = option(
        1.0, "beam search prefers longer answers if above 0", least=-10, most=10
    )
    max_new_tokens: int = option(300, "longest answer in tokens", least=1, most=1999)
    seed: int = option(
        0, "random seed; the same gives the same answers", least=0, most=2**63 - 1
    )
    device: str = option("", "PyTorch device (default: cuda if available, else cpu)")
    dtype: str = option(
        "",
        "dtype of the weights (default: the run's, but not float16 on a CPU)",
        choices=("", *DTYPES, *QUANTIZED),
    )
    cuda_graphs: bool = option(False, "decode with CUDA graphs (untested on GPUs)")
    json: bool = option(False, "print each answer as a JSON object")
    plain: bool = option(False, "plain text: no colors, images or progress bars")
    stats: bool = option(False, "print speed and memory after each answer")
    check: bool = option(
        False, "first measure the language model's perplexity on English text"
    )

    def __post_init__(self):
        check_options(
            self,
            (
                "temperature",
                not 0 < self.temperature < 1e-3,
                "give 0 or at least 0.001",
            ),
            ("top_p", 0 < self.top_p <= 1, "give one above 0, at most 1"),
        )


def load(options: Options) -> tuple[MiniGPT4, Options]:
    """The model of a run's folder, and the options with the gaps filled in from it."""
    if not options.ckpt:
        note(
            "note: this is the tiny demonstration model. It knows only drawings of "
            "colored shapes, and names shapes in any photograph. For a real model see "
            "the README, then --ckpt=RUN."
        )
    run = options.ckpt or str(Path(__file__).parent / "assets/tiny")
    saved = read_saved_config(run)
    device = pick_device(options.device).type
    dtype = options.dtype or saved.dtype
    if dtype == "float16" and device == "cpu":
        dtype = "bfloat16"
    model = MiniGPT4.from_files(
        **saved.parts(), dtype=dtype, device=device, image_size=saved.image_size
    )
    if options.cuda_graphs:
        model.graphed_steps = graph_steps(model.llama)

    template = options.template or saved.template
    if not template:
        tokenizer = model.tokenizer
        jinja = read_chat_template(tokenizer.path) or " ".join(tokenizer.controls)
        template = suggest_template(jinja)
        note(
            f"note: {run} was trained without a template; --template={template} is used"
        )
    is_own = template == saved.template
    end = saved.answer_end if is_own else TEMPLATES[template].end
    answer_end = options.answer_end or format_end(end)
    if options.check:
        check_english(model.llama, model.tokenizer)
    return model, replace(
        options, device=device, dtype=dtype, template=template, answer_end=answer_end
    )


class Picture(NamedTuple):
    path: str
    number: int  # from 1 in each conversation
    embeds: Tensor  # (1, N, d_llama)


class Turn(NamedTuple):
    question: str
    answer: str | None = None  # None: not begun
    pictures: tuple[Picture, ...] = ()  # before the question
    ended: bool = False  # whether the answer is complete


class Chat:
    """One conversation: turns and pictures. Start with Chat(*load(Options()))."""

    def __init__(self, model: MiniGPT4, options: Options):
        self.model = model
        self.options = options
        self.template = replace(
            TEMPLATES[options.template], end=parse_end(options.answer_end)
        )
        check_template(model.tokenizer, options.template, self.template.end)
        self.generator = torch.Generator(options.device).manual_seed(options.seed)
        self.context = model.llama.config.max_position_embeddings  # tokens
        self.reset()

    def reset(self):
        """Forget all turns and pictures."""
        self.turns: list[Turn] = []
        self.new_pictures = ()  # shown since the last question
        self.n_pictures = 0
        self.n_dropped = 0  # oldest turns that the context has no room for
        self.cache = KVCache()
        self.cached = []  # ids of the last prompt, -n in picture n
        self.stats = {}  # of the last answer

    @torch.no_grad()
    def add_image(self, source: str | bytes):
        """Put a picture, its path or its file's content, before the next question.

        Raises InputError if it cannot be read.
        """
        if self.model.vision is None:
            raise InputError(
                f"{self.options.ckpt}: this run sees no pictures; give one with vision"
            )
        image = load_image(source, self.model.image_size).unsqueeze(0)
        embeds = self.model.encode_image(image.to(self.options.device))
        path = source if isinstance(source, str) else "-"
        self.n_pictures += 1
        self.new_pictures += (Picture(path, self.n_pictures, embeds),)

    def undo(self) -> Turn:
        """Forget the last turn and return it; its pictures go to the next question."""
        turn = self.turns.pop()
        self.new_pictures = turn.pictures + self.new_pictures
        self.n_dropped = 0  # there may be room again
        return turn

    def ask(self, text: str) -> Iterator[str]:
        """Yield the answer piece by piece, and keep the turn as far as it gets.

        Raises InputError for too long a question.
        """
        start = perf_counter()
        text = text.encode("utf-8", "replace").decode()  # terminals may send no UTF-8
        turn = Turn(text, pictures=self.new_pictures)
        tokens, images = self.prompt(turn)
        self.stats = {
            "prompt_tokens": len(tokens),
            "cached_tokens": self.cache.length if self.options.num_beams == 1 else 0,
            "answer_tokens": 0,
            "seconds": 0.0,
        }
        self.turns.append(turn._replace(answer=""))
        self.new_pictures = ()

        tokenizer, end = self.model.tokenizer, self.template.end
        stop = stop_sequences(tokenizer, end)
        ids, answer, shown = [], "", ""
        for token in self.generate(tokens, images, stop):
            ids.append(token)
            answer = visible_answer(tokenizer, ids, end)
            self.turns[-1] = turn._replace(answer=answer, ended=is_end(ids, stop))
            seconds = perf_counter() - start
            self.stats |= {"answer_tokens": len(ids), "seconds": seconds}
            self.stats.setdefault("first_word_s", seconds)
            settled = settled_text(answer, end)  # it only grows
            if settled != shown:
                yield settled[len(shown) :]
                shown = settled
        if answer != shown:
            yield answer[len(shown) :]

    def generate(self, tokens, images, stop):
        """Iterate over the ids of an answer; the options choose how it is searched."""
        o = self.options
        common = {
            "max_new_tokens": o.max_new_tokens,
            "repetition_penalty": o.repetition_penalty,
            "min_length": o.min_length,
        }
        if o.num_beams > 1:
            common |= {"num_beams": o.num_beams, "length_penalty": o.length_penalty}
            return self.model.beam_search(tokens, images, stop, **common)
        return self.model.generate(
            tokens,
            images,
            stop,
            **common,
            temperature=o.temperature,
            top_p=o.top_p,
            generator=self.generator,
            cache=self.cache,
        )

    @torch.no_grad()
    def remember(self):
        """Cache the last answer as later prompts have it, while the user reads it."""
        tokens, images = self.prompt(None)
        if self.cache.length < len(tokens) <= self.context:
            ids = torch.tensor([tokens], device=self.options.device)
            x = self.model.embed(ids, images)
            self.model.llama(x[:, self.cache.length :], self.cache)

    def prompt(self, new: Turn | None) -> tuple[list[int], Tensor | None]:
        """The ids and pictures of the conversation, perhaps with a new turn.

        The cache is cut to what it shares with them. If the context is full, the oldest
        turns are left out, then the oldest pictures. Raises InputError if that is not
        enough.
        """
        limit = self.context - min(self.options.max_new_tokens, self.context // 3)
        turns = [*self.turns, new] if new else self.turns
        pictures = [picture for turn in turns for picture in turn.pictures]
        n_dropped = self.n_dropped
        while True:
            tokens = self.ids(turns[n_dropped:], len(pictures))
            if new is None or len(tokens) <= limit:
                break
            if n_dropped < len(self.turns):
                n_dropped += 1
            elif len(pictures) > max(1, len(new.pictures)):
                pictures.pop(0)
            else:
                raise InputError(
                    f"the question takes {len(tokens)} tokens of the {limit} that the "
                    "model has room for; shorten it, or take pictures back with /undo"
                )
        if n_dropped > self.n_dropped == 0:
            note(
                f"note: the context of {self.context} tokens is full: "
                "the oldest turns go"
            )
        self.n_dropped = n_dropped

        self.cut_cache(tokens, pictures)
        if new:  # the logits after its last token are needed
            self.cache.length = min(self.cache.length, len(tokens) - 1)
        embeds = [picture.embeds for picture in pictures]
        return tokens, torch.cat(embeds) if embeds else None

    def ids(self, turns: list[Turn], n_pictures: int) -> list[int]:
        """The ids of these turns; the first one takes pictures that no turn has."""
        counts = [len(turn.pictures) for turn in turns] or [0]
        counts[0] += n_pictures - sum(counts)
        counted = zip(turns, counts)
        exchanges = [(turn.question, n, turn.answer) for turn, n in counted]
        model = self.model
        return encode_chat(
            model.tokenizer, exchanges, self.template, model.n_image_tokens
        )

    def cut_cache(self, tokens: list[int], pictures: list[Picture]):
        """Forget what comes after the ids that the cache shares with a prompt."""
        per_picture = range(self.model.n_image_tokens)
        numbers = iter([-p.number for p in pictures for _ in per_picture])
        ids = [next(numbers) if id == IMAGE else id for id in tokens]
        n_shared = 0
        for new, old in zip(ids, self.cached):
            if new != old:
                break
            n_shared += 1
        self.cache.length = min(self.cache.length, n_shared)
        self.cached = ids


def show(talk: Chat, source: str | bytes):
    """Show a picture to the model and, in half-blocks, to the user."""
    talk.add_image(source)
    if not talk.options.plain:
        image = load_image(source, terminal.picture_width())
        print(terminal.half_blocks(image), file=sys.stderr)


def say(talk: Chat, message: str, is_script: bool = False):
    """Show the pictures that a message names, and print the answer as it comes.

    Ctrl-C stops an answer that has begun, or ends a script.
    """
    question, paths = terminal.find_pictures(message)
    terminal.check_pictures(question)
    for path in paths:
        show(talk, path)
    if not question:
        return note("What would you like to know?")
    n_turns = len(talk.turns)
    if talk.model.vision and not talk.n_pictures and not n_turns:
        note("note: no picture has been shown; /image PATH shows one")
    was_stopped = False
    answer = terminal.Wrapper(terminal.answer_columns(talk.options.plain))
    try:
        for piece in talk.ask(question):
            if not talk.options.json:
                print(printable(answer.add(piece)), end="", flush=True)
    except KeyboardInterrupt:
        if is_script or len(talk.turns) == n_turns:
            raise
        was_stopped = True
    print(as_json(talk) if talk.options.json else printable(answer.rest()))
    if not talk.turns[-1].ended:
        note(why_unfinished(talk, was_stopped))
    if talk.options.stats and talk.stats["answer_tokens"]:
        note(speed(talk))


def as_dict(turn: Turn) -> dict:
    """A turn as JSON has it."""
    return {
        "prompt": turn.question,
        "pictures": [picture.path for picture in turn.pictures],
        "answer": turn.answer,
        "ended": turn.ended,
    }


def as_json(talk: Chat) -> str:
    """The last answer."""
    stats = {
        "tokens": talk.stats["answer_tokens"],
        "seconds": round(talk.stats["seconds"], 3),
    }
    return json.dumps(as_dict(talk.turns[-1]) | stats)


def why_unfinished(talk: Chat, was_stopped: bool) -> str:
    n_tokens = talk.stats["prompt_tokens"] + talk.stats["answer_tokens"]
    if was_stopped:
        return "(you stopped it)"
    if n_tokens >= talk.context:
        return f"(the context of {talk.context} tokens is full)"
    return f"(stopped before its end; max_new_tokens is {talk.options.max_new_tokens})"


def speed(talk: Chat) -> str:
    """The rate after the first token; beam search yields all tokens at once."""
    s = talk.stats
    first = s["first_word_s"]
    seconds = s["seconds"] if talk.options.num_beams > 1 else s["seconds"] - first
    rate = (s["answer_tokens"] - 1) / (seconds or 1)
    return (
        f"({rate:.1f} tokens/s, first word after {first:.2f} s, "
        f"{s['cached_tokens']} of {s['prompt_tokens']} prompt tokens cached, "
        f"{peak_mib(talk.options.device):,.0f} MiB)"
    )


# ---- the commands; each gets the Chat and the text after the command, perhaps "" ----


def tell(talk, text):
    """Print what is no answer; with --json, stdout is for answers alone."""
    print(printable(text), file=sys.stderr if talk.options.json else sys.stdout)


def show_pictures(talk, text):
    rest, paths = terminal.find_pictures(text)
    missing = rest.strip("'\"")
    if missing:
        paths.append(missing)
    if not paths:
        raise InputError("/image wants a path")
    for path in paths:
        show(talk, path)
        tell(talk, f"{path}: seen. What would you like to know?")


def clear(talk, text):
    talk.reset()
    tell(talk, "A new conversation begins, without a picture.")


def undo(talk, text):
    if talk.new_pictures:
        *kept, picture = talk.new_pictures
        talk.new_pictures = tuple(kept)
        tell(talk, f"Forgotten: {picture.path}")
    elif talk.turns:
        tell(talk, f"Forgotten: {talk.undo().question}")
    else:
        tell(talk, "There is no question yet.")


def regenerate(talk, text):
    if not talk.turns:
        return tell(talk, "There is no question yet.")
    old = talk.undo()
    say(talk, old.question)
    new = talk.turns[-1]
    if not new.answer and not new.ended:  # stopped before it began
        talk.turns[-1] = old


def set_option(talk, text):
    if not text:
        return list_options(talk, text)
    name, _, value = text.replace("=", " ", 1).partition(" ")
    check_name(name, SETTINGS, "/set")
    talk.options = override(talk.options, {name: value.strip()}, "/set")
    if name == "seed":
        talk.generator.manual_seed(talk.options.seed)


def list_options(talk, text):
    for name in SETTINGS:
        tell(talk, f"{name:20}{getattr(talk.options, name)}")


def save(talk, path):
    path = os.path.expanduser(path.strip("'\""))
    turns = list(map(as_dict, talk.turns))
    options = {name: getattr(talk.options, name) for name in SETTINGS}
    about = {
        "model": talk.options.ckpt or "the tiny model",
        "template": talk.options.template,
        "options": options,
    }
    terminal.write_conversation(path, about, turns)
    tell(talk, f"{path}: {len(turns)} answers written")


def print_help(talk, text):
    tell(talk, HELP)


COMMANDS = {
    "/image": show_pictures,
    "/clear": clear,
    "/reset": clear,
    "/undo": undo,
    "/regenerate": regenerate,
    "/set": set_option,
    "/show": list_options,
    "/save": save,
    "/help": print_help,
    "/?": print_help,
}
LEAVE = ("/bye", "/quit", "/exit")
NAMES = (*COMMANDS, *LEAVE)


def carry_out(talk: Chat, command: str, text: str):
    """Run a command, or answer a message if `command` is empty."""
    if command in COMMANDS:
        COMMANDS[command](talk, text)
    elif command:
        near = get_close_matches(command, NAMES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        tell(talk, f"{command}: unknown command{hint}\n{HELP}")
    elif text:
        say(talk, text)


def converse(talk: Chat):
    """Carry out messages and commands until one leaves or stdin ends."""
    is_terminal = sys.stdin.isatty()
    if is_terminal and not talk.options.plain:
        terminal.set_up_readline(NAMES, SETTINGS, "~/.nanominigpt4_history")
    while True:
        turns, new_pictures = talk.turns[:], talk.new_pictures
        try:
            command, text = terminal.read_message(NAMES)
            if command in LEAVE:
                return
            carry_out(talk, command, text)
            talk.remember()
        except EOFError:
            if is_terminal:
                print()
            return
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print("\n(/bye or Ctrl-D leaves)", file=sys.stderr)
        except (InputError, torch.OutOfMemoryError) as e:
            # a message that fails leaves nothing behind
            talk.turns, talk.new_pictures = turns, new_pictures
            note(f"error: {e}")


def main(argv: list[str]):
    # huge pages on Linux: weights are read faster
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    pictures, given = parse_args(argv, __doc__, "[IMAGE ...]", Options)
    options = override(Options(plain=is_plain()), given)
    set_plain(options.plain)
    talk = Chat(*load(options))
    for path in pictures:
        is_pipe = path.startswith("/dev/fd/")  # <(...) of a shell
        if path == "-":
            show(talk, sys.stdin.buffer.read())
        else:
            path = terminal.as_path(path)
            show(talk, Path(path).read_bytes() if is_pipe else path)
    is_optional = bool(options.prompt)
    text = "" if "-" in pictures else terminal.read_piped(is_optional)
    if isinstance(text, bytes):
        show(talk, text)
        text = ""
    if options.prompt or (text and not terminal.has_command(text, NAMES)):
        parts = filter(None, (text, options.prompt))
        return say(talk, "\n".join(parts), is_script=True)
    if text:
        sys.stdin = io.StringIO(text)
    note(f"{len(pictures)} picture(s) shown. /help lists what can be typed.")
    converse(talk)


if __name__ == "__main__":
    run_main(main)
