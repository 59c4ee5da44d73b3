"""The prompts: chat templates, MiniGPT-4's system text, the instructions of stage 2.

A prompt is a list of segments: a text, IMAGE (the tokens of one picture), BOS or END
(the tokenizer's `<s>` and `</s>`), or a Control token by its name. Training and chat
build their prompts here, and turn them into ids with a `Tokenizer`. A new template is
one more entry of TEMPLATES.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

IMAGE = -1  # also an id: repeated once for each image token of a picture
BOS = -2  # the tokenizer's `<s>`
END = -3  # the tokenizer's `</s>`
NO_THINKING = -4  # the empty thoughts that Qwen3 answers after at once

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
class Control:
    """A control token. In a text, such as a question, its name is no control token."""

    name: str


Segment = str | int | Control
Segments = tuple[Segment, ...]


@dataclass(frozen=True)
class Template:
    """The segments around the messages and answers of a conversation."""

    system: Segments  # before the first message, but not in training
    user: Segments  # before each message of the user
    assistant: Segments  # between a message and its answer
    end: Segment  # ends each answer: a text, END or a control token
    after_end: Segments = ()  # between the end and the next message
    before_new: Segments = ()  # between `assistant` and an answer to be written
    # What replaces `user` and `assistant` in training: two texts, or nothing.
    training: tuple[str, str] | tuple[()] = ()


def header(role: str) -> Segments:
    """The start of a message in LLaMA 3's template."""
    return Control("<|start_header_id|>"), role, Control("<|end_header_id|>"), "\n\n"


IM_START, IM_END = Control("<|im_start|>"), Control("<|im_end|>")
EOT = Control("<|eot_id|>")
TEMPLATES = {
    "vicuna": Template(
        system=(SYSTEM, "###"),
        user=("Human: ",),
        assistant=("###Assistant: ",),
        end="###",
        training=("###Human: ", " ###Assistant: "),
    ),
    "llama2": Template(
        system=(SYSTEM,),
        user=(BOS, "[INST] "),
        assistant=(" [/INST] ",),
        end=END,
        training=("[INST] ", " [/INST] "),
    ),
    "chatml": Template(  # SmolLM2 and Qwen
        system=(),
        user=(IM_START, "user\n"),
        assistant=(IM_END, "\n", IM_START, "assistant\n"),
        end=IM_END,
        after_end=("\n",),
        before_new=(NO_THINKING,),
    ),
    "llama3": Template(
        system=(),
        user=header("user"),
        assistant=(EOT, *header("assistant")),
        end=EOT,
    ),
}


def turn_marks(templates: Iterable[Template]) -> re.Pattern:
    """What a text must not contain: what begins a turn or an answer, if it is text."""
    patterns = ["#{3,}"]
    for template in templates:
        before = template.assistant
        if template.end == END:  # else the end is there first
            before = (*template.user, *before)
        if not isinstance(template.end, Control):
            patterns += [re.escape(s.strip()) for s in before if isinstance(s, str)]
    return re.compile("|".join(filter(None, patterns)))


MARKS = turn_marks(TEMPLATES.values())
# Ends that are no text, as users type them
ENDS = {"</s>": END, IM_END.name: IM_END, EOT.name: EOT}


def suggest_template(jinja: str) -> str:
    """The template that is most like a model's own; "" is like vicuna's."""
    for name, template in TEMPLATES.items():
        first = next(segment for segment in template.user if segment != BOS)
        mark = first.name if isinstance(first, Control) else first
        if mark in jinja:
            return name
    return "vicuna"


def check_template(tokenizer, name: str, end: Segment):
    """Raise InputError if the tokenizer has not all control tokens of a template."""
    segments = [end]
    if name:
        segments += TEMPLATES[name].user + TEMPLATES[name].assistant
    encode_segments(tokenizer, segments, 0)


def parse_end(text: str) -> Segment:
    """The end of an answer as users type it: "###" -> "###", "</s>" -> END."""
    return ENDS.get(text, text)


def format_end(end: Segment) -> str:
    """The inverse of parse_end."""
    if isinstance(end, Control):
        return end.name
    return "</s>" if end == END else end


def harmless(text: str, end: Segment = END) -> str:
    """Defuse marks of a turn's start or end: "###Human: Hi" -> "# # #Human: Hi".

    Control tokens cannot be typed: where one is the end, nothing needs to change.
    """
    if isinstance(end, Control):
        return text
    text = MARKS.sub(lambda mark: " ".join(mark[0]), text)
    if text.endswith("#"):  # the template's ### may follow
        text += " "
    return text if end == END else text.replace(end, " ")


def user_message(
    text: str | list[Segment], n_images: int, end: Segment = END
) -> list[Segment]:
    """("Hi", 1) -> ["<Img>", IMAGE, "</Img> ", "Hi"]; segments keep their pictures."""
    if isinstance(text, list):
        segments = text
    else:
        segments = ["<Img>", IMAGE, "</Img> "] * n_images + [text]
    return [harmless(s, end) if isinstance(s, str) else s for s in segments]


def placed_message(text: str) -> list[Segment]:
    """A message of LLaVA's data, "Look:\\n<image>", -> segments for user_message.

    ["Look:", " ", "<Img>", IMAGE, "</Img>"]: one space separates texts and pictures.
    """
    segments: list[Segment] = []
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
    turns: list[tuple[list[Segment], str | None]], template: Template
) -> list[Segment]:
    """The chat prompt of turns (user_message, answer); the last answer may be None."""
    segments = [BOS, *template.system]
    for message, answer in turns:
        segments += [*template.user, *message, *template.assistant]
        if answer is None:
            segments += template.before_new
        else:
            segments.append(answer)
            if template.end != END:  # the original's history has no </s>
                segments.append(template.end)
            segments += template.after_end
    return segments


def training_segments(
    turns: list[tuple[str | list[Segment], str]],
    n_images: int,
    template: str,
    end: Segment,
    as_chat: bool = False,
) -> list[list[Segment]]:
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
    if layout.training and not as_chat:
        before, after = layout.training
        first, after = [BOS, before], [after]
        later = [before.removeprefix(end) if isinstance(end, str) else before]
    else:
        first, after = [BOS, *layout.system, *layout.user], layout.assistant
        later = layout.user

    prompts = []
    for i, (text, _) in enumerate(turns):
        start, n = ([*layout.after_end, *later], 0) if i else (first, n_images)
        message = user_message(text, n, end)
        prompts.append([*start, *message, *after, *layout.before_new])
    return prompts


def encode_segments(
    tokenizer, segments: list[Segment], n_image_tokens: int
) -> list[int]:
    """A prompt's segments -> its ids, with IMAGE; adjacent texts are encoded as one.

    Raises InputError for a control token that the tokenizer does not have.
    """
    marker_ids = {
        IMAGE: [IMAGE] * n_image_tokens,
        BOS: [] if tokenizer.bos is None else [tokenizer.bos],
        END: [tokenizer.eos],
        NO_THINKING: tokenizer.no_thinking,
    }
    ids: list[int] = []
    for kind, run in groupby(segments, key=type):
        if kind is str:
            ids += tokenizer.encode("".join(run))
        elif kind is Control:
            ids += [tokenizer.control(control.name) for control in run]
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


def encode_answer(tokenizer, text: str, end: Segment) -> list[int]:
    """The ids of an answer with its end."""
    if isinstance(end, str) and tokenizer.joins_end:
        return tokenizer.encode(text + end)
    return tokenizer.encode(text) + encode_segments(tokenizer, [end], 0)


def visible_answer(tokenizer, ids: list[int], end: Segment) -> str:
    """The text of an answer before its first end."""
    text = tokenizer.decode(ids)
    if isinstance(end, str):
        text = text.split(end)[0]
    return text.strip()


def settled_text(answer: str, end: Segment) -> str:
    """The part of a growing answer that later tokens cannot change.

    Not settled: a beginning of its end, half a character, trailing white space.
    """
    if isinstance(end, str):
        for n in range(len(end) - 1, 0, -1):
            if answer.endswith(end[:n]):
                answer = answer[:-n]
                break
    return answer.rstrip("\ufffd").rstrip()


def stop_sequences(tokenizer, end: Segment) -> tuple[list[int], ...]:
    """The id sequences that end an answer; the first is [eos].

    A text may have two encodings, alone and after text: "###" -> [835], [2277, 29937].
    """
    stops = [[id] for id in tokenizer.ends]
    own_end = encode_segments(tokenizer, [end], 0)
    if own_end not in stops:
        stops.append(own_end)
    if isinstance(end, str) and tokenizer.joins_end:
        n_ids_before = len(tokenizer.encode("a"))
        stops.append(tokenizer.encode("a" + end)[n_ids_before:])
    return tuple(stops)


def is_end(ids: list[int], stops: tuple[list[int], ...]) -> bool:
    """Whether the ids of an answer end with one of the stop sequences."""
    return any(ids[-len(stop) :] == stop for stop in stops)
