"""Pictures, tar shards and files of something else, for the tests that read data."""

import io
import tarfile

from PIL import Image

from configs.prompts import IMAGE
from llama import IGNORE
from tests.common import TOKENIZER

N = 3  # image tokens
BOS, EOS = [TOKENIZER.bos], [TOKENIZER.eos]
VICUNA, LLAMA2 = {"template": "vicuna"}, {"template": "llama2"}


def layout(segments):
    """The ids and targets of segments; those in a set are predicted."""
    ids, targets = [], []
    for segment in segments:
        if isinstance(segment, set):
            (text,) = segment
            new = TOKENIZER.encode(text.removesuffix("</s>")) + EOS * text.endswith(
                "</s>"
            )
        else:
            new = (
                [IMAGE] * N
                if segment == IMAGE
                else TOKENIZER.encode(segment)
                if segment != BOS
                else BOS
            )
        ids += new
        targets += new if isinstance(segment, set) else [IGNORE] * len(new)
    return ids, targets


def picture(mode="RGB", size=(20, 10), kind="JPEG"):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path, names, **changed):
    """One sample per name, which is also its caption.

    `changed`: other members, {name: content}.
    """
    path.parent.mkdir(exist_ok=True)
    members = {
        f"{name}.{kind}": content
        for name in names
        for kind, content in (("jpg", picture()), ("txt", name.encode()))
    }
    with tarfile.open(path, "w") as tar:
        for name, content in (members | changed).items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


PAGE = b"\n<!DOCTYPE html><html>"
