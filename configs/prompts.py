"""The prompts: chat templates, MiniGPT-4's system text, the instructions of stage 2.

A prompt is a list of segments: a text, IMAGE (the tokens of one picture), BOS or END
(the control tokens `<s>` and `</s>`). Training and chat build their prompts here, and
turn them into ids with a `Tokenizer`. A new template is one more entry of TEMPLATES.
"""

import re
from dataclasses import dataclass
from itertools import groupby

IMAGE = -1  # also an id: repeated once for each image token of a picture
BOS = -2  # the tokenizer's `<s>`
END = -3  # the tokenizer's `</s>`

SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the "
    "image once I provide it to you. Please answer my questions."
)
# Stage 2 draws one per sample.
INSTRUCTIONS = (
    "Describe this image in detail.",
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?",
)


@dataclass(frozen=True)
class Template:
    """The text around the turns, in training (without system text) and in chat."""

    training: tuple[str, str]  # before and after the user's message
    system: tuple[str | int, ...]  # chat: before the first message
    user: tuple[str | int, ...]  # chat: before each message of the user
    assistant: str  # chat: between the message and the answer
    end: str | int  # ends each answer: a text or END


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
        end=END,
    ),
}


def parse_end(text: str) -> str | int:
    """The end of an answer as users type it: "###" -> "###", "</s>" -> END."""
    return END if text == "</s>" else text


def format_end(end: str | int) -> str:
    """The inverse of parse_end."""
    return "</s>" if end == END else end


def harmless(text: str, end: str | int = END) -> str:
    """Defuse marks of a turn's start or end: "###Human: Hi" -> "# # #Human: Hi"."""
    text = re.sub(r"#{3,}|\[/?INST\]", lambda mark: " ".join(mark[0]), text)
    if text.endswith("#"):  # the template's ### may follow
        text += " "
    return text if end == END else text.replace(end, " ")


def user_message(
    text: str | list[str | int], n_images: int, end: str | int = END
) -> list[str | int]:
    """("Hi", 1) -> ["<Img>", IMAGE, "</Img> ", "Hi"]; segments keep their pictures."""
    if isinstance(text, list):
        segments = text
    else:
        segments = ["<Img>", IMAGE, "</Img> "] * n_images + [text]
    return [harmless(s, end) if isinstance(s, str) else s for s in segments]


def placed_message(text: str) -> list[str | int]:
    """A message of LLaVA's data, "Look:\\n<image>", -> segments for user_message.

    ["Look:", " ", "<Img>", IMAGE, "</Img>"]: one space separates texts and pictures.
    """
    segments: list[str | int] = []
    for part in re.split(r"\s*(<image>)\s*", text):
        if not part:
            continue
        if segments:
            segments.append(" ")
        segments += ["<Img>", IMAGE, "</Img>"] if part == "<image>" else [part]
    return segments


def clean_caption(text: str, max_words: int = 50) -> str:
    """A web caption in lower case, less punctuation, at most max_words words."""
    text = re.sub(r"[.!\"()*#:;~]", " ", text.lower())
    text = re.sub(r"\s{2,}", " ", text)
    words = text.rstrip("\n").strip(" ").split(" ")
    return " ".join(words[:max_words])


def chat_segments(
    turns: list[tuple[list[str | int], str | None]], template: Template
) -> list[str | int]:
    """The chat prompt of turns (user_message, answer); the last answer may be None."""
    segments = [BOS, *template.system]
    for message, answer in turns:
        segments += [*template.user, *message, template.assistant]
        if answer is not None:
            segments.append(answer)
            if template.end != END:  # the original's history has no </s>
                segments.append(template.end)
    return segments


def training_segments(
    turns: list[tuple[str | list[str | int], str]],
    n_images: int,
    template: str,
    end: str | int,
    as_chat: bool = False,
) -> list[list[str | int]]:
    """The segments before each answer of a training conversation.

    Its pictures are in the first message. `end` ends the answer before a later message.
    `as_chat` writes the conversation as chat does, with the system text. Without a
    template, the pictures and the first message follow `<s>`.
    """
    if not template:
        first, *later = [
            text if isinstance(text, list) else [text] for text, _ in turns
        ]
        return [[BOS, *[IMAGE] * n_images, *first], *later]

    layout = TEMPLATES[template]
    before, after = layout.training
    if as_chat:
        first = [BOS, *layout.system, *layout.user]
        later = list(layout.user)
        after = layout.assistant
    else:
        first = [BOS, before]
        later = [before if end == END else before.removeprefix(end)]

    prompts = []
    for i, (text, _) in enumerate(turns):
        start, n = (first, n_images) if i == 0 else (later, 0)
        prompts.append([*start, *user_message(text, n, end), after])
    return prompts


def encode_segments(
    tokenizer, segments: list[str | int], n_image_tokens: int
) -> list[int]:
    """A prompt's segments -> its ids, with IMAGE; adjacent texts are encoded as one."""
    marker_ids = {
        IMAGE: [IMAGE] * n_image_tokens,
        BOS: [tokenizer.bos],
        END: [tokenizer.eos],
    }
    ids: list[int] = []
    for kind, run in groupby(segments, key=type):
        if kind is str:
            ids += tokenizer.encode("".join(run))
        else:
            for marker in run:
                ids += marker_ids[marker]
    return ids


def encode_chat(
    tokenizer,
    turns: list[tuple[str, int, str | None]],
    template: Template,
    n_image_tokens: int,
) -> list[int]:
    """The ids of turns (question, number of pictures before it, answer), with IMAGE."""
    messages = []
    for question, n_images, answer in turns:
        message = user_message(question, n_images, template.end)
        messages.append((message, answer))
    segments = chat_segments(messages, template)
    return encode_segments(tokenizer, segments, n_image_tokens)


def encode_answer(tokenizer, text: str, end: str | int) -> list[int]:
    """The ids of an answer with its end."""
    if end == END:
        return tokenizer.encode(text) + [tokenizer.eos]
    return tokenizer.encode(text + end)


def visible_answer(tokenizer, ids: list[int], end: str | int) -> str:
    """The text of an answer before its first end."""
    text = tokenizer.decode(ids)
    if end != END:
        text = text.split(end)[0]
    return text.strip()


def settled_text(answer: str, end: str | int) -> str:
    """The part of a growing answer that later tokens cannot change.

    Not settled: a beginning of its end, half a character, trailing white space.
    """
    if end != END:
        for n in range(len(end) - 1, 0, -1):
            if answer.endswith(end[:n]):
                answer = answer[:-n]
                break
    return answer.rstrip("\ufffd").rstrip()


def stop_sequences(tokenizer, end: str | int) -> tuple[list[int], ...]:
    """The id sequences that end an answer; the first is [eos].

    A text has two encodings, alone and after text: "###" -> [835], [2277, 29937].
    """
    if end == END:
        return ([tokenizer.eos],)
    n_ids_before = len(tokenizer.encode("a"))
    after_text = tokenizer.encode("a" + end)[n_ids_before:]
    return [tokenizer.eos], tokenizer.encode(end), after_text


def is_end(ids: list[int], stops: tuple[list[int], ...]) -> bool:
    """Whether the ids of an answer end with one of the stop sequences."""
    return any(ids[-len(stop) :] == stop for stop in stops)
