"""The prompts: chat templates, MiniGPT-4's system text, and the instructions of stage 2.

A prompt is a list of segments: a text, IMAGE (the tokens of one picture) or BOS (the control token `<s>`).
Training and chat both build theirs from here. A new template is one more entry of TEMPLATES.
"""

import re
from dataclasses import dataclass

IMAGE = (
    -1
)  # one image token; in token ids it is repeated once for each token of a picture
BOS = -2  # the tokenizer's `<s>`

SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I "
    "provide it to you. Please answer my questions."
)
INSTRUCTIONS = (
    "Describe this image in detail.",  # stage 2 draws one per sample
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?",
)


@dataclass(frozen=True)
class Template:
    """How a conversation is written down, in training (without system text) and in chat."""

    training: tuple[str, str]  # before and after the user's message
    system: tuple[str | int, ...]  # chat: before the first message
    user: tuple[str | int, ...]  # chat: before each message of the user
    assistant: str  # chat: between the message and the answer
    end: str  # ends each answer: a text, or the control token "</s>"


TEMPLATES = {
    "vicuna": Template(
        training=("###Human: ", " ###Assistant: "),
        system=(SYSTEM, "###"),
        user=("Human: ",),
        assistant="###Assistant: ",
        end="###",
    ),
    "llama2": Template(
        training=("[INST] ", " [/INST] "),
        system=(SYSTEM,),
        user=(BOS, "[INST] "),
        assistant=" [/INST] ",
        end="</s>",
    ),
}


def user_message(text: str | list, n_images: int, end: str = "</s>") -> list[str | int]:
    """("Hi", 1) -> ["<Img>", IMAGE, "</Img> ", "Hi"]; a list is of segments, with its pictures."""
    segments = (
        text
        if isinstance(text, list)
        else ["<Img>", IMAGE, "</Img> "] * n_images + [text]
    )
    return [
        harmless(segment, end) if isinstance(segment, str) else segment
        for segment in segments
    ]


def harmless(text: str, end: str = "</s>") -> str:
    """A text that neither ends a turn nor begins one: "###Human: Hi" -> "# # #Human: Hi"."""
    text = re.sub(r"#{3,}|\[/?INST\]", lambda mark: " ".join(mark[0]), text)
    text += " " * text.endswith("#")  # the template's ### may follow
    return (
        text if end == "</s>" else text.replace(end, " ")
    )  # the letters </s> are no control token


def clean_caption(text: str, max_words: int = 50) -> str:
    """A web caption -> lower case, less punctuation, white space folded, at most max_words words."""
    text = (
        re.sub(r"\s{2,}", " ", re.sub(r"[.!\"()*#:;~]", " ", text.lower()))
        .rstrip("\n")
        .strip(" ")
    )
    return " ".join(text.split(" ")[:max_words])


def placed_message(text: str) -> list[str | int]:
    """ "Look:\\n<image>" -> ["Look:", " ", "<Img>", IMAGE, "</Img>"], as LLaVA's data marks pictures."""
    segments = []
    for part in filter(None, re.split(r"\s*(<image>)\s*", text)):
        segments += [" "] * bool(segments) + (
            ["<Img>", IMAGE, "</Img>"] if part == "<image>" else [part]
        )
    return segments


def chat_segments(
    turns: list[tuple[list[str | int], str | None]], template: Template
) -> list[str | int]:
    """Turns of (user_message, answer), the last answer None, -> the segments of a chat prompt."""
    segments = [BOS, *template.system]
    for message, answer in turns:
        segments += [*template.user, *message, template.assistant]
        if answer is not None:
            segments += [
                answer,
                template.end.replace("</s>", ""),
            ]  # the original's history has no </s>
    return segments


def training_segments(
    turns: list[tuple[str, str]],
    n_images: int,
    template: str,
    end: str,
    as_chat: bool = False,
) -> list[list[str | int]]:
    """The prompt segments before each answer of a training conversation, its pictures in the first message.
    `end` ended the answer before. `as_chat` writes the conversation as chat does, with the system text."""
    template = TEMPLATES[template]
    before, after = template.training
    first, later = [BOS, before], [before.removeprefix(end)]
    if as_chat:
        first, later, after = (
            [BOS, *template.system, *template.user],
            template.user,
            template.assistant,
        )
    return [
        [
            *(later if i else first),
            *user_message(text, 0 if i else n_images, end),
            after,
        ]
        for i, (text, _) in enumerate(turns)
    ]
