"""Chat in the browser: chat.py as a web page.

    python tools/webchat.py --ckpt=out/stage2

Serves http://127.0.0.1:7860 to this computer only. Without --ckpt, it serves the tiny
model. Needs gradio 6 (pip install gradio). Each browser tab is its own conversation,
and questions are answered one at a time. Options set the sliders' initial values.
"""

import html
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import chat
from model import MiniGPT4
from plumbing.console import InputError, optional_package, run_main, set_plain
from plumbing.options import option, read_options

# least, most, step
SLIDERS = {
    "temperature": (0, 2, 0.05),
    "top_p": (0.05, 1, 0.05),
    "repetition_penalty": (0.5, 2, 0.05),
    "max_new_tokens": (1, 1000, 1),
}
CLEANING = (3600, 86400)  # seconds between two, and that pictures are kept
NEEDED = 6  # version of gradio; the last one tried is 6.31
# the button would send a picture to another server
NO_SHARING = "button[aria-label=Share] {display: none}"


@dataclass(frozen=True)
class Options(chat.Options):
    prompt: str = option(
        "Describe this image in detail.",
        "question for an image sent without text",
    )
    port: int = option(7860, "port to serve the page on", least=1, most=65535)


def as_messages(turns):
    """What gradio shows of turns: each picture is a message; texts are HTML."""
    messages = []
    for turn in turns:
        for picture in turn.pictures:
            messages.append({"role": "user", "content": {"path": picture.path}})
        question = html.escape(turn.question)
        answer = html.escape(turn.answer or "...")
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages


def with_sliders(options, values):
    """The options with the sliders' values, each as its option's type."""
    changes = {}
    for name, value in zip(SLIDERS, values):
        kind = type(getattr(options, name))
        changes[name] = kind(value)
    return replace(options, **changes)


@dataclass
class Page:
    """The page."""

    gr: object  # the module gradio
    model: MiniGPT4
    options: Options

    def answer(self, message, talk, *values):
        """Yield what box, talk and log become: first the question, then the answer."""
        if talk is None:
            talk = chat.Chat(self.model, self.options)
        question = message["text"].strip() or self.options.prompt
        try:
            talk.options = with_sliders(self.options, values)
            for path in message["files"]:
                talk.add_image(path)
            asked = chat.Turn(question, pictures=talk.new_pictures)
            yield None, talk, as_messages([*talk.turns, asked])
            for _ in talk.ask(question):
                # the box may hold the next question by now
                yield self.gr.skip(), talk, as_messages(talk.turns)
            talk.remember()
        except InputError as e:
            self.gr.Warning(re.sub(r"/\S*/", "", str(e)))  # without gradio's folders
            talk.new_pictures = ()
            yield message, talk, as_messages(talk.turns)

    def build(self):
        """Place the parts of the page and connect them."""
        gr = self.gr
        with gr.Blocks(title="nanoMiniGPT-4", delete_cache=CLEANING) as page:
            talk = gr.State()
            log = gr.Chatbot(
                show_label=False, render_markdown=False, height="75vh", buttons=[]
            )
            box = gr.MultimodalTextbox(
                file_count="multiple",
                file_types=["image"],
                show_label=False,
                placeholder="Drop or paste a picture; ask about it",
            )
            with gr.Sidebar(position="right"):
                stop = gr.Button("Stop")
                clear = gr.Button("New conversation")
                sliders = [self.slider(name) for name in SLIDERS]
            inputs, outputs = [box, talk, *sliders], [box, talk, log]
            asked = box.submit(self.answer, inputs, outputs, concurrency_limit=1)
            stop.click(None, cancels=[asked])
            gr.on(
                [clear.click, log.clear],
                lambda: (None, None, []),
                None,
                outputs,
                cancels=[asked],
            )
        return page

    def slider(self, name):
        """A slider that starts at the option's value, which may widen its range."""
        least, most, step = SLIDERS[name]
        value = getattr(self.options, name)
        return self.gr.Slider(
            min(least, value), max(most, value), value, step=step, label=name
        )


def main(argv):
    _, options, _ = read_options(argv, __doc__, "", Options())
    set_plain(options.plain)
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}
    for name in ("no_proxy", "NO_PROXY"):  # gradio opens the page to see if it is there
        others = os.environ.get(name, "")
        os.environ[name] = f"{others},127.0.0.1,localhost".strip(",")
    gradio = optional_package("gradio", "the page")
    version = getattr(gradio, "__version__", "0")
    if int(version.split(".")[0]) < NEEDED:
        raise InputError(
            f"the page needs gradio {NEEDED} or later, not {version}: "
            "pip install -U gradio"
        )
    model, options = chat.load(options)
    page = Page(gradio, model, options).build()
    try:
        page.launch(
            server_name="127.0.0.1",
            server_port=options.port,
            share=False,
            footer_links=[],
            css=NO_SHARING,
        )
    except OSError as e:
        raise InputError(f"port {options.port} is not free; give another --port") from e


if __name__ == "__main__":
    run_main(main)
