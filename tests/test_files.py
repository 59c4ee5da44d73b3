"""Files that are read and written."""

import pytest

from plumbing.console import InputError
from plumbing.files import append_row, read_json, read_rows, replacing, start_of


def test_the_start_of_a_file_is_at_most_64_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"\0" * 100)
    assert start_of(tmp_path / "a") == b"\0" * 64


@pytest.mark.parametrize(
    "content, words",
    [
        pytest.param(None, "there is no such weight file", id="missing"),
        pytest.param("folder", "not a file", id="a folder"),
        pytest.param(b"version https://git-lfs.x/spec/v1", "Git LFS", id="a pointer"),
        pytest.param(b"\xef\xbb\xbf \n<HTML lang=en>", "web page", id="a page"),
        pytest.param(b"<!DOCTYPE html>", "web page", id="another page"),
    ],
)
def test_what_stands_in_a_files_place_is_named(tmp_path, content, words):
    path = tmp_path / "a.bin"
    if content == "folder":
        path.mkdir()
    elif content:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"a.bin: .*{words}"):
        start_of(path, "weight file")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("{", id="cut"),
        pytest.param("[1]", id="a list"),
        pytest.param("[" * 100_000, id="deep"),
        pytest.param("\0", id="zeros"),
    ],
)
def test_a_file_without_a_json_object_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match="a.json: .*fetch or make it again"):
        read_json(tmp_path / "a.json")


def test_rows_come_with_their_numbers_and_the_rest_of_a_cut_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\r\n\n  \n[2]\n{"cut": ')
    rows, rest = read_rows(tmp_path / "a.jsonl")
    assert rows == [(1, b'{"a": 1}\r'), (4, b"[2]")]
    assert rest == b'{"cut": '


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    with replacing(path) as temporary:
        temporary.write_text("old")
    mode = path.stat().st_mode
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    message = "a.txt: cannot be written .*what was there before is kept"
    with pytest.raises(InputError, match=message), replacing(path) as temporary:
        temporary.write_text("half")
        raise OSError("no space left")
    assert path.read_text() == "old"
    with replacing(path) as temporary:
        temporary.write_text("new")
        temporary.chmod(0o600)  # as safetensors does
    assert path.read_text() == "new"
    assert path.stat().st_mode == mode
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_named_with_the_file():
    with (
        pytest.raises(InputError, match="/dev/full: cannot be written"),
        open("/dev/full", "w") as file,
    ):
        append_row(file, step=1)
