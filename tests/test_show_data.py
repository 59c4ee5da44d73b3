"""tools/show_data.py: what data are like."""

import io
import json
import random
import re

import pytest
from PIL import Image

from plumbing.console import InputError
from tests.common import ROOT, readable
from tools import make_scenes, show_data


@pytest.mark.slow
def test_show_data_shows_the_samples_and_what_they_amount_to(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    make_scenes.main(["stage1", str(tmp_path / "stage1"), "--n=1030"])  # two shards
    command = [
        "configs/tiny_stage1.py",
        f"--data={tmp_path}/stage1",
        "--heldout_data=",
        "--n=100",
    ]
    show_data.main([*command, "--plain"])
    text = capsys.readouterr().out
    assert text.count("picture (3, 48, 48)") == 3 and text.count("<image x 19>") == 3
    assert (
        "100 good samples and 0 bad ones, the first of 1,030; 19 image tokens" in text
    )
    shares = [float(share) for share in re.findall(r"padding +([\d.]+)%", text)]
    assert (
        len(shares) == 2 and 0 < shares[1] < shares[0] < 100
    )  # as drawn, and with length_group 8
    show_data.main([*command, "--show=1"])
    assert (
        "\u2580" in (text := capsys.readouterr().out)
        and text.count("<image x 19>") == 1
    )


def picture():
    buffer = io.BytesIO()
    Image.new("RGB", (320, 200), "red").save(buffer, "JPEG")
    return buffer.getvalue()


def caption_folder(path, annotations, pictures) -> list[str]:
    """Write a folder like cc_sbu_align; the command line of show_data.main for it."""
    (path / "image").mkdir()
    for name, content in pictures.items():
        (path / "image" / name).write_bytes(content)
    (path / "filter_cap.json").write_text(json.dumps({"annotations": annotations}))
    return [
        str(ROOT / "configs/tiny_stage2.py"),
        f"--data={path}",
        "--heldout_data=",
        "--plain",
        "--n=0",
    ]


def test_all_is_well_with_a_whole_cc_sbu_align(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    annotations = [{"image_id": str(i), "caption": "A dog."} for i in range(5)]
    show_data.main(
        caption_folder(tmp_path, annotations, {f"{i}.jpg": picture() for i in range(5)})
    )
    text = capsys.readouterr().out
    assert (
        "5 good samples and 0 bad ones, the first of 5" in text
        and "cannot be used" not in text
    )


def test_what_is_wrong_with_a_cc_sbu_align_is_counted_and_named(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    noise = random.Random(0).randbytes(1000)
    annotations = [{"image_id": str(i), "caption": "A dog."} for i in range(14)]
    annotations[1]["caption"], annotations[2]["caption"], annotations[3] = (
        " ",
        None,
        {"image_id": "3"},
    )
    pictures = {f"{i}.jpg": picture() for i in range(7)} | {
        "7.jpg": noise,
        "8.jpg": picture()[:300],
    }
    show_data.main(caption_folder(tmp_path, annotations, pictures))
    text = capsys.readouterr().out
    for count, kind in (
        (1, "empty caption"),
        (2, "caption is not a text"),
        (5, "missing file"),
        (1, "not a picture"),
        (1, "unreadable file"),
    ):
        assert f"cannot be used        {count}: {kind}\n" in text
    assert "4 good samples and 10 bad ones" in text
    assert "annotation 2 (" in text and "9.jpg" in text and "7.jpg" in text
    assert "11.jpg" in text and "12.jpg" not in text  # three examples of a kind


def test_data_without_one_good_sample_ends_with_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(
        InputError, match="none of 2 samples can be used; the first: .*annotation 1"
    ) as error:
        show_data.main(
            caption_folder(tmp_path, [{"image_id": "0", "caption": "A dog."}] * 2, {})
        )
    assert "cannot be used        2: missing file" in capsys.readouterr().out
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "usage"),
        (["nowhere.py"], "nowhere.py"),
        (["configs/tiny_stage2.py", "--n=-1"], "at least 0"),
        (
            ["configs/tiny_stage2.py", "--data=nowhere", "--heldout_data="],
            "data nowhere: no samples",
        ),
    ],
    ids=readable,
)
def test_wrong_data_are_one_line(argv, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError, match=words):
        show_data.main(argv)
