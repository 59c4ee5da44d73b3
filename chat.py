"""Chat with MiniGPT-4 about pictures, in the terminal.

    python chat.py photo.jpg                                        a conversation; /help lists the commands
    python chat.py photo.jpg --prompt="What is in this picture?"    one answer on stdout, then exit
    python chat.py a.jpg b.jpg --ckpt=out/stage2 --temperature=0    several pictures, a trained run, greedy

Without --ckpt it is the tiny model in assets/tiny. The sampling defaults are those of the original demo. The
picture `-` is read from stdin. Text on stdin stands before --prompt, or is the prompt; with a command in it,
its lines are a conversation.
"""

import io
import json
import os
import re
import shutil
import sys
import time
import unicodedata
from collections import namedtuple
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from glob import escape, glob
from pathlib import Path
from urllib.parse import unquote

import torch
from torch import Tensor

from configs.prompts import IMAGE, TEMPLATES, chat_segments, user_message
from configs.schema import (DTYPES, QUANTIZED, InputError, check_name, check_options, option, override,
                            parse_args, read_saved_config, run_main)
from llama import CONTEXT, KVCache
from model import MiniGPT4, pick_device, replacing
from vision import load_image

PARAGRAPH = ("The old lighthouse stands at the end of the harbor wall. Every evening the keeper climbs the "
             "narrow stairs, cleans the glass and lights the lamp, so that the fishing boats can find their "
             "way home. In winter, when storms come in from the sea, he sometimes stays awake all night. His "
             "daughter brings him bread, cheese and a pot of hot tea, and they talk about the ships that "
             "pass and the places where they may be going.")
TINY_NOTE = ("note: this is the tiny demonstration model. It knows only drawings of colored shapes, and "
             "names shapes in any photograph. For a real model see the README, then --ckpt=RUN.")
HELP = """\
/image PATH          show a picture, as a path in a message does
/clear               forget the conversation and its pictures
/undo, /regenerate   forget the last question; answer it again
/set NAME VALUE      change an option; /show lists them
/save FILE           write the conversation, as JSON or else as Markdown
/bye                 leave (also Ctrl-D); Ctrl-C stops an answer
\"""                  begins and ends a message of several lines"""
COMMANDS = [*re.findall(r"(?<!\S)/\w+", HELP), "/reset", "/quit", "/exit", "/help", "/?"]
SETTINGS = ("temperature", "top_p", "repetition_penalty", "num_beams", "min_length", "length_penalty",
            "max_new_tokens", "seed", "stats")
WORD = re.compile(r"""(?<!\S)(?:"([^"]+)"|'([^']+)'|((?:\\.|\S)+))""")  # quoted, or with its spaces escaped
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class Options:
    ckpt: str = option("", "a run's folder; none: the tiny model of this repo")
    prompt: str = option("", "ask this, print the answer alone, and exit")
    template: str = option("", "none: the run's own", choices=("", *TEMPLATES))
    answer_end: str = option("", "what ends an answer; none: the run's own, or the template's")
    temperature: float = option(1.0, "0: greedy", least=0)
    top_p: float = option(0.9, "sample from the likeliest tokens of this total probability")
    repetition_penalty: float = option(1.05, "1: none", least=0.01, most=100)
    num_beams: int = option(1, "above 1: beam search, which takes the likeliest answer", least=1, most=64)
    min_length: int = option(1, "least tokens of an answer, its `<s>` among them, before `</s>`", least=0)
    length_penalty: float = option(1.0, "above 0: beam search prefers longer answers")
    max_new_tokens: int = option(300, "most tokens of an answer", least=1, most=CONTEXT - 1)
    seed: int = option(0, "the same seed gives the same answers", least=0, most=2**63 - 1)
    device: str = option("", "none: cuda if there is one, else cpu")
    dtype: str = option("", "none: the run's own, but never float16 on a CPU",
                        choices=("", *DTYPES, *QUANTIZED))
    compile: bool = option(False, "compile decoding: faster in bfloat16, after some seconds at first")
    json: bool = option(False, "print each answer as a JSON object")
    plain: bool = option(False, "text alone: no colors, pictures or progress")
    stats: bool = option(False, "print speed and memory after each answer")
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
    end = options.answer_end or (saved.end_sym if saved.template and not options.template else "")
    model = MiniGPT4.from_files(**saved.parts(), dtype=dtype, device=device, image_size=saved.image_size)
    if options.compile and device == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        print("note: --compile needs a C++ compiler; it goes on without", file=sys.stderr)
    elif options.compile:
        model.llama.compile_rows()
    template = options.template or saved.template or "vicuna"
    if not options.template and not saved.template:
        print(f"note: {run} was trained without a template; --template=vicuna is used", file=sys.stderr)
    if options.check:
        check(model)
    return model, replace(options, device=device, dtype=dtype, template=template, answer_end=end)


def check(model: MiniGPT4):
    """Print the language model's perplexity on English, and a warning if its weights are broken."""
    value = model.perplexity(PARAGRAPH)
    print(f"perplexity on a paragraph of English: {value:.1f} (a healthy LLaMA: below 20)", file=sys.stderr)
    if value > 100:
        print("warning: these weights are broken or not English; fetch or convert again", file=sys.stderr)


Picture = namedtuple("Picture", "path number embeds")  # counted from 1 in each chat; embeds: (1, N, d_llama)
Turn = namedtuple("Turn", "question answer pictures ended", defaults=(None, (), False))  # ended: complete


class Chat:
    """One conversation: its turns and its pictures. Start with Chat(*load(Options()))."""

    def __init__(self, model: MiniGPT4, options: Options):
        self.model, self.options = model, options
        template = TEMPLATES[options.template]
        self.template = replace(template, end=options.answer_end or template.end)
        self.generator = torch.Generator(options.device).manual_seed(options.seed)
        self.context, self.n_pictures = model.llama.config.max_position_embeddings, 0
        self.reset()

    def reset(self):
        """Forget all turns and pictures."""
        self.turns: list[Turn] = []
        self.new_pictures: tuple[Picture, ...] = ()  # shown since the last question
        self.n_dropped = 0                           # turns that the context has no room for
        w = self.model.llama.norm.weight
        self.cache = KVCache(self.model.llama.config, 1, 256, w.device, w.dtype)
        self.cached: list[int] = []  # the ids whose keys and values it holds, with -n for picture number n
        self.stats: dict[str, float] = {}  # of the last answer: tokens, and seconds

    @property
    def ended(self) -> bool:
        """Whether the last answer is complete."""
        return not self.turns or self.turns[-1].ended

    @torch.no_grad()
    def add_image(self, path: str, encoded: bytes = b""):
        """Show a picture; it stands before the next question. Raises InputError when it cannot be read."""
        if self.model.vision is None:
            raise InputError(f"{self.options.ckpt}: this run sees no pictures; give one with vision")
        image = load_image(encoded or path, self.model.image_size).unsqueeze(0).to(self.options.device)
        self.n_pictures += 1
        self.new_pictures += (Picture(path, self.n_pictures, self.model.encode_image(image)),)

    def undo(self) -> Turn:
        """Forget the last turn and return it; its pictures stand before the next question."""
        turn = self.turns.pop()
        self.new_pictures = turn.pictures + self.new_pictures
        self.n_dropped = min(self.n_dropped, len(self.turns))
        return turn

    def ask(self, text: str) -> Iterator[str]:
        """Yield the answer piece by piece; the turn is kept, also when it is stopped half-way. Raises
        InputError for a question that is too long."""
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
            seconds, ended = time.perf_counter() - start, model.tokenizer.is_end(ids, stop)
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
        """The ids and pictures of the conversation, with a new turn or without; the cache keeps what it
        shares with them. When the context is full, the oldest turns are left out. Their pictures stay, unless
        there is no room for them beside newer ones."""
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


def printable(text: str) -> str:
    """Show characters that would steer a terminal as codes, such as \\x1b."""
    return "".join(c if c in "\n\t\u200d" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else
                   f"\\x{ord(c):02x}" for c in text)


def find_pictures(message: str) -> tuple[str, list[str]]:
    """A message without the paths of pictures in it, as a terminal inserts them, and these paths."""
    paths = []

    def take(word: re.Match) -> str:
        path = word[1] or word[2] or re.sub(r"\\(.)", r"\1", word[3])
        path = unquote(path[7:]) if path.startswith("file://") else os.path.expanduser(path)
        for each in (path, path.rstrip("?!.,;:)"), word[0]):
            if each.lower().endswith(SUFFIXES) and os.path.isfile(each):
                paths.append(each)
                return ""
        return word[0]

    if message.lower().endswith(SUFFIXES) and os.path.isfile(message):  # with spaces, not escaped
        return "", [message]
    text = WORD.sub(take, message)
    return re.sub(" {2,}", " ", text).strip() if paths else message, paths


def show(talk: Chat, path: str, encoded: bytes = b""):
    """Show a picture to the model and, in half-blocks, to the user."""
    talk.add_image(path, encoded)
    if not talk.options.plain:
        columns = min(40, shutil.get_terminal_size().columns)
        pixels = load_image(encoded or path, columns // 2 * 2).permute(1, 2, 0).tolist()
        for above, below in zip(pixels[::2], pixels[1::2]):
            cells = ("\x1b[38;2;{};{};{};48;2;{};{};{}m\u2580".format(*a, *b) for a, b in zip(above, below))
            print("".join(cells) + "\x1b[0m", file=sys.stderr)


def say(talk: Chat, question: str, is_script: bool = False):
    """Show the pictures that a question names, and print the answer as it comes; Ctrl-C stops it."""
    o, (question, paths), n_turns = talk.options, find_pictures(question), len(talk.turns)
    for path in paths:
        show(talk, path)
    if not question:
        return print("What would you like to know?", file=sys.stderr)
    if talk.model.vision and not talk.n_pictures and not n_turns:
        print("note: no picture has been shown; /image PATH shows one", file=sys.stderr)
    note = ""
    try:
        for piece in talk.ask(question):
            print("" if o.json else printable(piece), end="", flush=True)
    except KeyboardInterrupt:
        if is_script or len(talk.turns) == n_turns:
            raise
        note = "you stopped it"
    turn, seconds = talk.turns[-1], talk.stats.get("seconds", 0.0)
    if o.json:
        print(json.dumps({"prompt": turn.question, "pictures": [p.path for p in turn.pictures],
                          "answer": turn.answer, "tokens": talk.stats.get("answer_tokens", 0),
                          "seconds": round(seconds, 3), "ended": turn.ended}), end="")
    print()
    if not turn.ended:
        print(f"({note or f'stopped before its end; max_new_tokens is {o.max_new_tokens}'})", file=sys.stderr)
    if o.stats and talk.stats:
        rate = (talk.stats["answer_tokens"] - 1) / max(seconds - talk.stats["first_word_s"], 1e-9)
        print(f"({rate:.1f} tokens/s, first word after {talk.stats['first_word_s']:.2f} s; "
              f"{talk.stats['cached_tokens']} of {talk.stats['prompt_tokens']} prompt tokens were cached)",
              file=sys.stderr)


def run_command(talk: Chat, command: str, argument: str):
    """Carry out what HELP lists, but /bye."""
    if command == "/image":
        _, paths = find_pictures(argument)
        for path in paths or [argument or "/image wants a path"]:
            show(talk, path)
            print(f"{printable(path)}: seen. What would you like to know?")
    elif command in ("/clear", "/reset"):
        talk.reset()
        print("A new conversation begins, without a picture.")
    elif command in ("/undo", "/regenerate") and not talk.turns:
        print("There is no question yet.")
    elif command == "/undo":
        print(f"Forgotten: {printable(talk.undo().question)}")
    elif command == "/regenerate":
        say(talk, talk.undo().question)
    elif command == "/set" and argument:
        name, _, value = argument.partition(" ")
        value = {"on": "true", "off": "false"}.get(value.strip(), value.strip())
        talk.options = override(talk.options, {check_name(name, SETTINGS, "/set"): value}, "/set")
        talk.generator.manual_seed(talk.options.seed)
    elif command in ("/set", "/show"):
        print("\n".join(f"{name:20}{getattr(talk.options, name)}" for name in SETTINGS))
    elif command == "/save":
        save(talk, argument)
    else:
        print(HELP if command in ("/help", "/?") else f"{printable(command)}: unknown command\n{HELP}")


def save(talk: Chat, path: str):
    """Write the conversation as JSON, or else as Markdown."""
    turns = [{"pictures": [p.path for p in t.pictures], "question": t.question, "answer": t.answer}
             for t in talk.turns]
    text = "\n".join("".join(f"![]({p})\n\n" for p in t["pictures"]) +
                     f"**{t['question']}**\n\n{t['answer']}\n" for t in turns)
    with replacing(path or "/save wants a file name") as temporary:
        temporary.write_text(json.dumps(turns, indent=1) if path.endswith(".json") else text, "utf-8")
    print(f"{printable(path)}: {len(turns)} answers written")


def set_up_readline():
    """Arrow keys, a history that is kept, and Tab for commands and paths, where the system has readline."""
    import atexit
    import readline
    history = Path.home() / ".nanominigpt4_history"
    with suppress(OSError):
        readline.read_history_file(history)
    if os.access(history.parent, os.W_OK):
        atexit.register(readline.write_history_file, history)

    def complete(text: str, state: int) -> str | None:
        found = COMMANDS if readline.get_begidx() == 0 and text.startswith("/") else []
        paths = [p + "/" * os.path.isdir(p) for p in glob(escape(os.path.expanduser(text)) + "*")]
        return dict(enumerate([name for name in found if name.startswith(text)] + paths)).get(state)

    readline.set_completer(complete)
    readline.set_completer_delims(" \t\n\"'")
    readline.parse_and_bind("bind ^I rl_complete" if "libedit" in str(readline.__doc__) else "tab: complete")


def read_message() -> str:
    """A line, or what stands between two \"\"\"."""
    prompt = ("you> ", "...> ") if sys.stdin.isatty() else ("", "")
    message = input(prompt[0])
    if message.lstrip().startswith('"""'):
        while message.count('"""') < 2:
            message += "\n" + input(prompt[1])
        message = message.split('"""')[1]
    return message.strip()


def converse(talk: Chat):
    """Read messages and commands until /bye or the end of stdin."""
    if sys.stdin.isatty() and not talk.options.plain:
        with suppress(ImportError):
            set_up_readline()
    while True:
        try:
            message = read_message()
            command, *argument = message.split(maxsplit=1)[:2] or [""]
            if command in ("/bye", "/quit", "/exit"):
                return
            elif command in COMMANDS or command.startswith("/") and not find_pictures(message)[1]:
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
        except InputError as e:
            print("error:", printable(str(e)), file=sys.stderr)


def main(argv: list[str]):
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages on Linux: weights are read faster
    pictures, given = parse_args(argv, __doc__, "[IMAGE ...]", Options)
    options = override(Options(), given)
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not sys.stderr.isatty():
        options = replace(options, plain=True)
    os.environ["TQDM_DISABLE"] = str(int(options.plain))
    talk = Chat(*load(options))
    for path in pictures:
        show(talk, path, sys.stdin.buffer.read() if path == "-" else b"")
    text = ""
    if not sys.stdin.isatty() and "-" not in pictures:
        with suppress(OSError):  # closed
            text = sys.stdin.read()
    is_conversation = any(line.startswith("/") for line in text.splitlines()) and not options.prompt
    if options.prompt or text.strip() and not is_conversation:
        return say(talk, "\n".join(filter(None, (text.strip(), options.prompt))), is_script=True)
    if text:
        sys.stdin = io.StringIO(text)
    print(f"{len(pictures)} picture(s) shown. /help lists what can be typed.", file=sys.stderr)
    converse(talk)


if __name__ == "__main__":
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal may lack some characters
    run_main(main)
