"""The chat of chat.py as a page in this computer's browser.

    python tools/webchat.py --ckpt=out/stage2          at http://127.0.0.1:7860; without --ckpt the tiny model

It needs gradio (pip install gradio). Only this computer can open the page, each browser tab is a conversation
of its own, and the model answers one question at a time. chat.py's options are where the sliders start.
"""

import html
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import chat
from plumbing.console import InputError, run_main
from plumbing.options import option, override, parse_args

SLIDERS = {
    "temperature": (0, 2, 0.05),
    "top_p": (0.05, 1, 0.05),
    "repetition_penalty": (0.5, 2, 0.05),
    "max_new_tokens": (1, 1000, 1),
}  # from, to, step


@dataclass(frozen=True)
class Options(chat.Options):
    prompt: str = option(
        "Describe this image in detail.",
        "asked when a picture comes without a question",
    )
    port: int = option(7860, "of the page's address", least=1, most=65535)


def as_messages(turns: list[chat.Turn]) -> list[dict]:
    """Turns -> what gradio shows, which takes a text for HTML; a picture is a message of its own."""
    return [
        {"role": role, "content": content}
        for turn in turns
        for role, content in (
            *(("user", {"path": picture.path}) for picture in turn.pictures),
            ("user", html.escape(turn.question)),
            ("assistant", html.escape(turn.answer or "...")),
        )
    ]


def serve(gr, model, options: Options):
    """Show the page, made with the module gradio, until Ctrl-C."""

    def answer(
        message: dict, talk: chat.Chat | None, *values: float
    ):  # yields what box, talk, log become
        talk, question = (
            talk or chat.Chat(model, options),
            message["text"].strip() or options.prompt,
        )
        try:
            talk.options = replace(
                options,
                **{k: type(vars(options)[k])(v) for k, v in zip(SLIDERS, values)},
            )
            for path in message["files"]:
                talk.add_image(path)
            yield (
                None,
                talk,
                as_messages(
                    [*talk.turns, chat.Turn(question, pictures=talk.new_pictures)]
                ),
            )
            for _ in talk.ask(question):
                yield (
                    gr.skip(),
                    talk,
                    as_messages(talk.turns),
                )  # the box may hold the next question by now
            talk.remember()
        except InputError as e:
            gr.Warning(re.sub(r"/\S*/", "", str(e)))  # without gradio's folders
            talk.new_pictures = ()
            yield message, talk, as_messages(talk.turns)

    with gr.Blocks(
        title="nanoMiniGPT-4", delete_cache=(3600, 86400)
    ) as page:  # seconds; pictures of a day
        talk, log = (
            gr.State(),
            gr.Chatbot(
                show_label=False, render_markdown=False, height="75vh", buttons=[]
            ),
        )
        box = gr.MultimodalTextbox(
            file_count="multiple",
            file_types=["image"],
            show_label=False,
            placeholder="Drop or paste a picture; ask about it",
        )
        with gr.Sidebar(position="right"):
            stop, clear = gr.Button("Stop"), gr.Button("New conversation")
            sliders = [
                gr.Slider(min(least, v), max(most, v), v, step=step, label=name)
                for name, (least, most, step) in SLIDERS.items()
                for v in [getattr(options, name)]
            ]
        asked = box.submit(
            answer, [box, talk, *sliders], [box, talk, log], concurrency_limit=1
        )
        stop.click(None, cancels=[asked])
        gr.on(
            [clear.click, log.clear],
            lambda: (None, None, []),
            None,
            [box, talk, log],
            cancels=[asked],
        )
    try:
        page.launch(
            server_name="127.0.0.1",
            server_port=options.port,
            share=False,
            footer_links=[],
            css="button[aria-label=Share] {display: none}",
        )  # which would send a picture elsewhere
    except OSError as e:
        raise InputError(f"port {options.port} is not free; give another --port") from e


def main(argv: list[str]):
    options = override(Options(), parse_args(argv, __doc__, "", Options)[1])
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}
    try:
        import gradio
    except ImportError as e:
        raise InputError("the page needs the package gradio: pip install gradio") from e
    serve(gradio, *chat.load(options))


if __name__ == "__main__":
    run_main(main)
