"""Chat with MiniGPT-4 about pictures, in the terminal.

    python chat.py photo.jpg                                        a conversation; /help lists the commands
    python chat.py photo.jpg --prompt="What is in this picture?"    one answer on stdout, then exit
    python chat.py a.jpg b.jpg --ckpt=out/stage2 --temperature=0    several pictures, a trained run, greedy

Without --ckpt it is the tiny model; the defaults of sampling are the original demo's. The picture `-` is read
from stdin. Text on stdin stands before --prompt, or is the prompt or, with a command in it, a conversation.
"""

import io
import json
import os
import re
import shutil
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from glob import escape, glob
from pathlib import Path

import torch

from configs.prompts import (
    END,
    IMAGE,
    TEMPLATES,
    chat_segments,
    encode_segments,
    format_end,
    is_end,
    parse_end,
    stop_sequences,
    user_message,
    visible_answer,
)
from configs.schema import read_saved_config
from llama import KVCache
from model import MiniGPT4, check_english
from plumbing.console import InputError, note, printable, run_main
from plumbing.files import replacing
from plumbing.options import (
    check_name,
    check_options,
    option,
    override,
    parse_args,
)
from plumbing.processes import peak_mib, pick_device
from plumbing.quantized import QUANTIZED, compile_rows
from plumbing.terminal import find_pictures, half_blocks, read_message
from plumbing.weights import DTYPES
from vision import load_image

HELP = """\
/image PATH          show a picture, as a path in a message does
/clear               forget the conversation and its pictures
/undo, /regenerate   forget the last question; answer it again
/set NAME VALUE      change an option; /show lists them
/save FILE           write the conversation, as JSON or else as Markdown
/bye                 leave (also Ctrl-D); Ctrl-C stops an answer
\"""                  begins and ends a message of several lines"""
COMMANDS = [
    *re.findall(r"(?<!\S)/\w+", HELP),
    "/reset",
    "/quit",
    "/exit",
    "/help",
    "/?",
]
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
    """Of chat.py, and of the tools that build on it."""

    ckpt: str = option("", "a run's folder; none: the tiny model of this repo")
    prompt: str = option("", "ask this, print the answer alone, and exit")
    template: str = option("", "none: the run's own", choices=("", *TEMPLATES))
    answer_end: str = option(
        "", "what ends an answer; none: the run's own, or the template's"
    )
    temperature: float = option(1.0, "0: greedy", least=0, most=100)
    top_p: float = option(
        0.9, "sample from the likeliest tokens of this total probability"
    )
    repetition_penalty: float = option(1.05, "1: none", least=0.01, most=100)
    num_beams: int = option(
        1, "above 1: beam search, which takes the likeliest answer", least=1, most=64
    )
    min_length: int = option(
        1, "least tokens of an answer, its `<s>` among them, before `</s>`", least=0
    )
    length_penalty: float = option(
        1.0, "above 0: beam search prefers longer answers", least=-10, most=10
    )
    max_new_tokens: int = option(300, "most tokens of an answer", least=1, most=1999)
    seed: int = option(
        0, "the same seed gives the same answers", least=0, most=2**63 - 1
    )
    device: str = option("", "none: cuda if there is one, else cpu")
    dtype: str = option(
        "",
        "none: the run's, but not float16 on a CPU",
        choices=("", *DTYPES, *QUANTIZED),
    )
    compile: bool = option(
        False, "on a CPU, compile decoding: faster in bfloat16, after a slow start"
    )
    json: bool = option(False, "print each answer as a JSON object")
    plain: bool = option(False, "text alone: no colors, pictures or progress")
    stats: bool = option(False, "print speed and memory after each answer")
    check: bool = option(
        False, "first measure whether the language model knows English"
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
    """The model of a run's folder, checked if asked for, and the options with the gaps filled in from it."""
    if not options.ckpt:
        note(
            "note: this is the tiny demonstration model. It knows only drawings of colored shapes, and "
            "names shapes in any photograph. For a real model see the README, then --ckpt=RUN."
        )
    run = options.ckpt or str(Path(__file__).parent / "assets/tiny")
    saved, device = read_saved_config(run), pick_device(options.device).type
    dtype = options.dtype or saved.dtype
    if dtype == "float16" and device == "cpu":
        dtype = "bfloat16"
    model = MiniGPT4.from_files(
        **saved.parts(), dtype=dtype, device=device, image_size=saved.image_size
    )
    if options.compile:
        compile_rows(model.llama)
    if not (template := options.template or saved.template):
        note(f"note: {run} was trained without a template; --template=vicuna is used")
    template = template or "vicuna"
    end = saved.answer_end if template == saved.template else TEMPLATES[template].end
    end = options.answer_end or format_end(end)
    if options.check:
        check_english(model)
    return model, replace(
        options, device=device, dtype=dtype, template=template, answer_end=end
    )


Picture = namedtuple(
    "Picture", "path number embeds"
)  # counted from 1 in each chat; embeds: (1, N, d_llama)
Turn = namedtuple(
    "Turn", "question answer pictures ended", defaults=(None, (), False)
)  # ended: complete


class Chat:
    """One conversation: its turns and its pictures. Start with Chat(*load(Options()))."""

    def __init__(self, model: MiniGPT4, options: Options):
        self.model, self.options = model, options
        self.template = replace(
            TEMPLATES[options.template], end=parse_end(options.answer_end)
        )
        self.generator = torch.Generator(options.device).manual_seed(options.seed)
        self.context = model.llama.config.max_position_embeddings
        self.reset()

    def reset(self):
        """Forget all turns and pictures."""
        self.turns: list[Turn] = []
        self.new_pictures: tuple[Picture, ...] = ()  # shown since the last question
        self.n_pictures = self.n_dropped = 0  # turns that the context has no room for
        self.cache, self.cached = (
            KVCache(),
            [],
        )  # and the ids in it, with -n for picture number n
        self.stats: dict[str, float] = {}  # of the last answer: tokens, and seconds

    @torch.no_grad()
    def add_image(self, path: str, encoded: bytes | None = None):
        """Show a picture; it stands before the next question. Raises InputError when it cannot be read."""
        if self.model.vision is None:
            raise InputError(
                f"{self.options.ckpt}: this run sees no pictures; give one with vision"
            )
        image = load_image(path if encoded is None else encoded, self.model.image_size)
        embeds = self.model.encode_image(image.unsqueeze(0).to(self.options.device))
        self.n_pictures += 1
        self.new_pictures += (Picture(path, self.n_pictures, embeds),)

    def undo(self) -> Turn:
        """Forget the last turn and return it; its pictures stand before the next question."""
        turn = self.turns.pop()
        self.new_pictures = turn.pictures + self.new_pictures
        self.n_dropped = 0  # there may be room again
        return turn

    def ask(self, text: str) -> Iterator[str]:
        """Yield the answer piece by piece and keep the turn. Raises InputError for too long a question."""
        start, o, model, end = (
            time.perf_counter(),
            self.options,
            self.model,
            self.template.end,
        )
        text = text.encode(
            "utf-8", "replace"
        ).decode()  # a terminal may send what is no text
        tokens, images = self.prompt(Turn(text, pictures=self.new_pictures))
        self.turns.append(Turn(text, "", self.new_pictures))
        self.stats = {
            "prompt_tokens": len(tokens),
            "cached_tokens": self.cache.length * (o.num_beams == 1),
        }
        self.new_pictures, stop, ids, shown = (
            (),
            stop_sequences(model.tokenizer, end),
            [],
            "",
        )
        room = min(o.max_new_tokens, self.context - len(tokens))
        options = {
            "max_new_tokens": room,
            "repetition_penalty": o.repetition_penalty,
            "stop": stop,
            "min_length": o.min_length,
        }
        if o.num_beams > 1:
            steps = model.beam_search(
                tokens,
                images,
                num_beams=o.num_beams,
                length_penalty=o.length_penalty,
                **options,
            )
        else:
            steps = model.generate(
                tokens,
                images,
                temperature=o.temperature,
                top_p=o.top_p,
                generator=self.generator,
                cache=self.cache,
                **options,
            )
        for token in steps:
            ids.append(token)
            answer, ended = (
                visible_answer(model.tokenizer, ids, end),
                is_end(ids, stop),
            )
            self.turns[-1] = self.turns[-1]._replace(answer=answer, ended=ended)
            self.stats |= {
                "answer_tokens": len(ids),
                "seconds": time.perf_counter() - start,
            }
            self.stats.setdefault("first_word_s", self.stats["seconds"])
            if not ended and len(ids) < room:
                if end != END:
                    answer = answer[
                        : -max(n for n in range(len(end)) if answer.endswith(end[:n]))
                        or None
                    ]
                answer = answer.rstrip(
                    "\ufffd"
                ).rstrip()  # half an end, or half a character, waits
            if answer.startswith(shown) and answer != shown:
                yield answer[len(shown) :]
                shown = answer

    @torch.no_grad()
    def remember(self):
        """Bring the last answer into the cache as later prompts have it. Call it while the user reads."""
        tokens, images = self.prompt(None)
        if self.cache.length < len(tokens) <= self.context:
            x = self.model.embed(
                torch.tensor([tokens], device=self.options.device), images
            )
            self.model.llama(x[:, self.cache.length :], self.cache)

    def prompt(self, new: Turn | None) -> tuple[list[int], torch.Tensor | None]:
        """The ids and pictures of the conversation, perhaps with a new turn. The cache keeps what it shares
        with them; when the context is full, the oldest turns are left out, then the oldest pictures."""
        limit = self.context - min(self.options.max_new_tokens, self.context // 3)
        turns, n_dropped = self.turns + [new] * bool(new), self.n_dropped
        pictures = [picture for turn in turns for picture in turn.pictures]
        while len(tokens := self.ids(turns[n_dropped:], len(pictures))) > limit and new:
            if n_dropped < len(self.turns):
                n_dropped += 1
            elif len(pictures) > max(1, len(new.pictures)):
                pictures.pop(0)
            else:
                raise InputError(
                    f"the question takes {len(tokens)} tokens of the {limit} that the model has "
                    "room for; shorten it, or take pictures back with /undo"
                )
        if n_dropped > self.n_dropped == 0:
            note(
                f"note: the context of {self.context} tokens is full: the oldest turns go"
            )
        self.n_dropped = n_dropped
        numbers = iter(
            [-p.number for p in pictures for _ in range(self.model.n_image_tokens)]
        )
        keys = [next(numbers) if id == IMAGE else id for id in tokens]
        same = [a == b for a, b in zip(keys, self.cached)] + [False]
        length = min(same.index(False), self.cache.length, len(keys) - bool(new))
        self.cache.length, self.cached = length, keys
        return tokens, torch.cat([p.embeds for p in pictures]) if pictures else None

    def ids(self, turns: list[Turn], n_pictures: int) -> list[int]:
        """The ids of these turns; those of n_pictures that are not theirs stand before the first one's."""
        counts = [len(turn.pictures) for turn in turns] or [0]
        counts[0] += n_pictures - sum(counts)
        messages = [
            user_message(turn.question, n, self.template.end)
            for turn, n in zip(turns, counts)
        ]
        segments = chat_segments(
            zip(messages, [turn.answer for turn in turns]), self.template
        )
        return encode_segments(
            self.model.tokenizer, segments, self.model.n_image_tokens
        )


def show(talk: Chat, path: str, encoded: bytes | None = None):
    """Show a picture to the model and, in half-blocks, to the user."""
    talk.add_image(path, encoded)
    if not talk.options.plain:
        width = max(2, min(40, shutil.get_terminal_size().columns // 2 * 2))
        print(
            half_blocks(load_image(path if encoded is None else encoded, width)),
            file=sys.stderr,
        )


def say(talk: Chat, question: str, is_script: bool = False):
    """Show the pictures that a question names, and print the answer as it comes; Ctrl-C stops it."""
    o, (question, paths), n_turns = (
        talk.options,
        find_pictures(question),
        len(talk.turns),
    )
    for path in paths:
        show(talk, path)
    if not question:
        return note("What would you like to know?")
    if talk.model.vision and not talk.n_pictures and not n_turns:
        note("note: no picture has been shown; /image PATH shows one")
    reason = f"stopped before its end; max_new_tokens is {o.max_new_tokens}"
    try:
        for piece in talk.ask(question):
            print("" if o.json else printable(piece), end="", flush=True)
    except KeyboardInterrupt:
        if is_script or len(talk.turns) == n_turns:
            raise
        reason = "you stopped it"
    turn, s = talk.turns[-1], talk.stats
    print(
        json.dumps(
            {
                "prompt": turn.question,
                "pictures": [p.path for p in turn.pictures],
                "answer": turn.answer,
                "tokens": s.get("answer_tokens", 0),
                "seconds": round(s.get("seconds", 0), 3),
                "ended": turn.ended,
            }
        )
        if o.json
        else ""
    )
    if not turn.ended:
        full = (
            len(talk.cached) + s.get("answer_tokens", 0) >= talk.context
            and reason != "you stopped it"
        )
        note(f"({f'the context of {talk.context} tokens is full' if full else reason})")
    if o.stats and "seconds" in s:
        rate = (s["answer_tokens"] - 1) / (
            s["seconds"] - s["first_word_s"] * (o.num_beams == 1) or 1
        )
        note(
            f"({rate:.1f} tokens/s, first word after {s['first_word_s']:.2f} s, {s['cached_tokens']} of "
            f"{s['prompt_tokens']} prompt tokens cached, {peak_mib(o.device):,.0f} MiB)"
        )


def run_command(talk: Chat, command: str, argument: str):
    """Carry out what HELP lists, but /bye."""
    if command == "/image":
        rest, paths = find_pictures(argument)
        for path in paths + [rest.strip("'\"") or "/image wants a path"] * bool(
            rest or not paths
        ):
            show(talk, path)
            print(f"{printable(path)}: seen. What would you like to know?")
    elif command in ("/clear", "/reset"):
        talk.reset()
        print("A new conversation begins, without a picture.")
    elif command == "/undo" and talk.new_pictures:
        print(f"Forgotten: {printable(talk.new_pictures[-1].path)}")
        talk.new_pictures = talk.new_pictures[:-1]
    elif command in ("/undo", "/regenerate") and not talk.turns:
        print("There is no question yet.")
    elif command == "/undo":
        print(f"Forgotten: {printable(talk.undo().question)}")
    elif command == "/regenerate":
        old = talk.turns[-1]
        say(talk, talk.undo().question)
        if not (
            talk.turns[-1].answer or talk.turns[-1].ended
        ):  # stopped before it began
            talk.turns[-1] = old
    elif command == "/set" and argument:
        name, _, value = argument.replace("=", " ", 1).partition(" ")
        talk.options = override(
            talk.options, {check_name(name, SETTINGS, "/set"): value.strip()}, "/set"
        )
        if name == "seed":
            talk.generator.manual_seed(talk.options.seed)
    elif command in ("/set", "/show"):
        print("\n".join(f"{name:20}{getattr(talk.options, name)}" for name in SETTINGS))
    elif command == "/save":
        save(talk, argument)
    else:
        print(
            HELP
            if command in ("/help", "/?")
            else f"{printable(command)}: unknown command\n{HELP}"
        )


def save(talk: Chat, path: str):
    """Write the conversation as JSON, or else as Markdown."""
    rows = [
        turn._asdict() | {"pictures": [p.path for p in turn.pictures]}
        for turn in talk.turns
    ]
    text = "\n".join(
        "".join(f"![](<{p}>)\n\n" for p in row["pictures"])
        + f"**{row['question']}**\n\n{row['answer']}\n"
        for row in rows
    )
    with replacing(path := os.path.expanduser(path.strip("'\""))) as file:
        file.write_text(
            json.dumps(rows, indent=1) if path.endswith(".json") else text,
            "utf-8",
            "replace",
        )
    print(f"{printable(path)}: {len(rows)} answers written")


def set_up_readline():
    """Arrow keys, a history that is kept, and Tab for commands and paths, where the system has readline."""
    import atexit
    import readline

    history = Path(os.path.expanduser("~/.nanominigpt4_history"))
    with suppress(OSError):  # no folder to write to
        history.touch()
        readline.read_history_file(history)
        atexit.register(readline.write_history_file, history)

    def complete(text: str, state: int) -> str | None:
        found = COMMANDS if readline.get_begidx() == 0 and text.startswith("/") else []
        paths = [
            p + "/" * os.path.isdir(p)
            for p in glob(escape(os.path.expanduser(text)) + "*")
        ]
        return dict(
            enumerate([name for name in found if name.startswith(text)] + paths)
        ).get(state)

    readline.set_completer(complete)
    readline.set_completer_delims(" \t\n\"'")
    readline.parse_and_bind(
        "bind ^I rl_complete" if "libedit" in str(readline.__doc__) else "tab: complete"
    )


def converse(talk: Chat):
    """Read messages and commands until /bye or the end of stdin."""
    if sys.stdin.isatty() and not talk.options.plain:
        with suppress(ImportError):  # on Windows
            set_up_readline()
    while True:
        before = talk.turns[:], talk.new_pictures
        try:
            message, may_command = read_message()
            command, *argument = (
                message.split(maxsplit=1)[:2] if may_command else []
            ) or [""]
            if command in ("/bye", "/quit", "/exit"):
                return
            elif (
                command in COMMANDS
                or command.startswith("/")
                and not find_pictures(message)[1]
            ):
                run_command(talk, command, "".join(argument).strip())
            elif message:
                say(talk, message)
            talk.remember()  # while the user reads
        except EOFError:
            return print(end="\n" * sys.stdin.isatty())
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print("\n(/bye or Ctrl-D leaves)", file=sys.stderr)
        except (InputError, torch.OutOfMemoryError) as e:
            talk.turns, talk.new_pictures = (
                before  # a message that fails leaves nothing behind
            )
            note(f"error: {e}")


def main(argv: list[str]):
    os.environ.setdefault(
        "THP_MEM_ALLOC_ENABLE", "1"
    )  # huge pages on Linux: weights are read faster
    pictures, given = parse_args(argv, __doc__, "[IMAGE ...]", Options)
    plain = (
        os.environ.get("NO_COLOR")
        or os.environ.get("TERM") == "dumb"
        or not sys.stderr.isatty()
    )
    options = override(Options(plain=bool(plain)), given)
    os.environ["TQDM_DISABLE"] = str(int(options.plain))
    talk = Chat(*load(options))
    for path in pictures:
        show(talk, path, sys.stdin.buffer.read() if path == "-" else None)
    text = ""
    with suppress(OSError):  # it cannot be read
        text = (
            ""
            if sys.stdin.isatty() or "-" in pictures
            else sys.stdin.read().replace("\0", "")
        )
    if (
        options.prompt
        or text.strip()
        and not {*re.findall(r"^/\S+", text, re.MULTILINE)} & {*COMMANDS}
    ):
        return say(
            talk,
            "\n".join(filter(None, (text.strip(), options.prompt))),
            is_script=True,
        )
    sys.stdin = io.StringIO(text) if text else sys.stdin
    note(f"{len(pictures)} picture(s) shown. /help lists what can be typed.")
    converse(talk)


if __name__ == "__main__":
    run_main(main)
