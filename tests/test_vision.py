"""Pictures and the vision tower."""

import io
import os
import zlib

import pytest
from PIL import Image

from plumbing.console import InputError
from vision import load_image


def test_a_pipe_is_not_waited_for_and_other_formats_start_no_program(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n%%EOF\n"
    )
    for name in "ab":
        with pytest.raises(
            InputError, match=f"{name}.jpg: cannot be read as a picture"
        ):
            load_image(str(tmp_path / f"{name}.jpg"), 28)


def test_a_picture_that_would_take_gigabytes_is_refused(tmp_path):
    Image.new("1", (13000, 13000)).save(
        tmp_path / "a.png"
    )  # a large one of one bit a pixel is none
    assert load_image(str(tmp_path / "a.png"), 28).shape == (3, 28, 28)
    header = io.BytesIO()
    Image.new("RGBA", (8, 8)).save(header, "PNG")
    big = bytearray(header.getvalue())
    big[16:24] = (13000).to_bytes(4, "big") * 2
    big[29:33] = zlib.crc32(big[12:29]).to_bytes(4, "big")
    with pytest.raises(InputError, match="too large: 13000 x 13000 pixels"):
        load_image(bytes(big), 28)
