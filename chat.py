"""Talk with MiniGPT-4 about pictures, in the terminal.

    python chat.py photo.jpg                                        a conversation; /help lists the commands
    python chat.py photo.jpg --prompt="What is in this picture?"    one answer on stdout, then exit
    python chat.py a.jpg b.jpg --ckpt=out/stage2 --temperature=0    several pictures, a trained run, greedy
    python chat.py                                                  a picture can come later, by /image PATH

Without --ckpt it is the tiny model in assets/tiny. The sampling defaults are those of the original demo.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from configs.schema import InputError, override, parse_args, read_saved_config, run_main
from data import TEMPLATES, answer_text, chat_segments, encode_segments, stop_sequences, user_message
from llama import CONTEXT
from model import MiniGPT4, pick_device
from vision import load_image

TINY = "assets/tiny"
PARAGRAPH = (
    "The old lighthouse stands at the end of the harbor wall. Every evening the keeper climbs the narrow "
    "stairs, cleans the glass and lights the lamp, so that the fishing boats can find their way home. In "
    "winter, when storms come in from the sea, he sometimes stays awake all night. His daughter brings him "
    "bread, cheese and a pot of hot tea, and they talk about the ships that pass and the places where they "
    "may be going.")
TINY_NOTE = ("note: this is the tiny demonstration model. It knows only drawings of one to three colored "
             "shapes, like assets/tiny/example.png, and will name shapes in any photograph. For a real one "
             "see the README, then --ckpt=RUN.")
HELP = """\
/image PATH   show a picture; your next words are about it, and about those before
/reset        forget the conversation and its pictures
/help         this text
/quit         leave (also Ctrl-D); Ctrl-C stops an answer"""


@dataclass(frozen=True)
class Options:
    """The options of chat.py, as --key=value."""

    ckpt: str = ""                    # a run's folder; "": the tiny model of this repo
    prompt: str = ""                  # ask this, print the answer alone, and exit
    template: str = ""                # vicuna or llama2; "": the run's own
    temperature: float = 1.0          # 0: greedy
    top_p: float = 0.9
    repetition_penalty: float = 1.05
    max_new_tokens: int = 300
    seed: int = 0                     # of the sampling; the same seed gives the same answers
    device: str = ""                  # "": cuda if there is one, else cpu
    dtype: str = ""                   # "": the run's own, but never float16 on a CPU
    force: bool = False               # take a projection that was trained beside other parts
    check: bool = False               # first measure whether the language model knows English
    dry_run: bool = False             # print sizes and memory, without weights, and exit

    def __post_init__(self):
        if (not (self.temperature == 0 or self.temperature >= 1e-3) or not 0 < self.top_p <= 1
                or not 0.01 <= self.repetition_penalty <= 100 or self.max_new_tokens < 1):
            raise InputError("sampling: temperature is 0 or at least 0.001, top_p in (0, 1], "
                             "repetition_penalty from 0.01 to 100, max_new_tokens at least 1")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed {self.seed}: give one from 0 to 2**63 - 1")
        if self.max_new_tokens >= CONTEXT:
            raise InputError(f"max_new_tokens {self.max_new_tokens}: give less than {CONTEXT}, the most that "
                             "a conversation can have")
        if self.dtype not in ("", "float32", "bfloat16", "float16"):
            raise InputError(f"dtype {self.dtype!r}: give float32, bfloat16 or float16")
        if self.template and self.template not in TEMPLATES:
            raise InputError(f"template {self.template!r}: give one of {', '.join(TEMPLATES)}")


def load(options: Options) -> tuple[MiniGPT4, Options]:
    """The model of a run's folder, and the options with their blanks filled in from that run."""
    run = options.ckpt or str(Path(__file__).parent / TINY)
    saved = read_saved_config(run)
    device = pick_device(options.device).type
    dtype = options.dtype or saved.dtype
    if dtype == "float16" and device == "cpu":
        dtype = "bfloat16"
    learns = ("proj",) if saved.vision else ()  # it stays in float32
    model = MiniGPT4.from_files(saved.vision, saved.qformer, saved.llama, saved.proj, dtype, device, learns,
                                saved.tokenizer, saved.image_size, options.force)
    template = options.template or saved.template or "vicuna"
    if not options.template and not saved.template:
        print(f"note: {run} was trained without a template; --template=vicuna is used", file=sys.stderr)
    return model, replace(options, device=device, dtype=dtype, template=template)


def check(model: MiniGPT4) -> float:
    """Print the language model's perplexity on English, and a warning if its weights are broken."""
    value = model.perplexity(PARAGRAPH)
    print(f"perplexity on a paragraph of English: {value:.1f} (of a sound LLaMA below 20)", file=sys.stderr)
    if value > 100:
        print("warning: these weights are broken, or of no model of English; convert or fetch them again",
              file=sys.stderr)
    return value


class Chat:
    """One conversation: its turns and its pictures.

    >>> chat = Chat(*load(Options()))
    >>> chat.add_image("assets/tiny/example.png")
    >>> "".join(chat.ask("What color is the star?"))
    """

    def __init__(self, model: MiniGPT4, options: Options):
        self.model, self.options = model, options
        self.template = TEMPLATES[options.template]
        self.generator = torch.Generator(options.device).manual_seed(options.seed)
        self.reset()

    def reset(self):
        """Forget all turns and pictures."""
        self.turns, self.images, self.new_images = [], [], 0
        self.ended = True  # whether the last answer came to its end by itself

    @torch.no_grad()
    def add_image(self, path: str):
        """Show a picture; it stands before the next question. Raises InputError when it cannot be read."""
        if self.model.vision is None:
            raise InputError(f"{self.options.ckpt}: a language model alone, it sees no pictures; give the "
                             "folder of a run with vision")
        image = load_image(path, self.model.image_size).unsqueeze(0).to(self.options.device)
        self.images.append(self.model.encode_image(image))
        self.new_images += 1

    def ask(self, text: str) -> Iterator[str]:
        """Yield the answer piece by piece; the turn is remembered, also when it is stopped half-way."""
        o, model, end = self.options, self.model, self.template.end
        text = text.encode("utf-8", "replace").decode()  # what a terminal of another encoding sends
        message = user_message(text, self.new_images)
        segments = chat_segments([*self.turns, (message, None)], self.template)
        tokens = encode_segments(segments, model.tokenizer, model.image_shape[1])
        stop = stop_sequences(model.tokenizer, end)
        if len(tokens) > CONTEXT - o.max_new_tokens:
            print(f"note: with its answer the conversation is longer than {CONTEXT} tokens; its beginning is "
                  "cut off", file=sys.stderr)
        ids, shown = [], ""
        self.turns.append((message, ""))
        self.new_images, self.ended = 0, False
        for token in model.generate(tokens, torch.cat(self.images) if self.images else None, o.max_new_tokens,
                                    o.temperature, o.top_p, o.repetition_penalty,
                                    stop, generator=self.generator):
            ids.append(token)
            self.ended = ids[-1] == model.tokenizer.eos or any(ids[-len(s):] == s for s in stop)
            answer = answer_text(model.tokenizer.decode(ids), end)
            ready = answer.rstrip("\ufffd").rstrip(end[0])  # half a character, or half an end symbol, waits
            if ready.startswith(shown) and len(ready) > len(shown):
                yield ready[len(shown):]
                shown = ready
            self.turns[-1] = (message, answer)
        if answer.startswith(shown) and len(answer) > len(shown):
            yield answer[len(shown):]


def converse(chat: Chat):
    """Read questions from stdin until /quit or its end."""
    try:
        import readline  # noqa: F401  (arrow keys and history, where the system has them)
    except ImportError:
        pass
    while True:
        try:
            line = input("you> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        command, _, argument = line.partition(" ")
        try:
            if command == "/quit":
                return
            elif command == "/help":
                print(HELP)
            elif command == "/reset":
                chat.reset()
                print("The conversation begins anew, without a picture.")
            elif command == "/image":
                path = os.path.expanduser(argument.strip().strip("'\""))
                chat.add_image(path)
                print(f"{path}: seen. What would you like to know?")
            elif command.startswith("/"):
                print(f"{command}: unknown command\n{HELP}")
            elif line:
                say(chat, line)
        except InputError as e:
            print(f"error: {e}", file=sys.stderr)


def say(chat: Chat, question: str):
    """Print an answer as it comes; Ctrl-C ends it early."""
    try:
        for piece in chat.ask(question):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass
    print()
    if not chat.ended:
        print(f"(stopped before its end; max_new_tokens is {chat.options.max_new_tokens})", file=sys.stderr)


def main(argv: list[str]):
    """`[IMAGE ...] [--key=value ...]`, see the top of this file."""
    pictures, given = parse_args(argv)
    options = override(Options(), given)
    if not options.ckpt:
        print(TINY_NOTE, file=sys.stderr)
    if options.dry_run:
        from tools.dry_run import describe_chat
        return print(describe_chat(options))
    chat = Chat(*load(options))
    if options.check:
        check(chat.model)
    for path in pictures:
        chat.add_image(path)
    if options.prompt:
        say(chat, options.prompt)
        return
    print(f"{len(pictures)} picture(s) shown. /help lists what can be typed.", file=sys.stderr)
    converse(chat)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack some characters
    run_main(main)
