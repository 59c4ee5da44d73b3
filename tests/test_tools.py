"""tools/dry_run.py and tools/show_data.py: what a run will need, and what its data are like."""

import io
import json
import random
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from configs.prompts import IMAGE
from configs.schema import load_config
from llama import IGNORE
from model import MiniGPT4
from plumbing.console import InputError
from tools import dry_run, make_scenes, show_data

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A config of a micro model with random weights, and stage-2 data for it."""
    root = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    model = MiniGPT4.from_files(
        dict(
            image_size=32, patch_size=8, width=16, n_layers=2, n_heads=2, mlp_hidden=32
        ),
        dict(n_queries=4, width=16, n_layers=2, n_heads=2, ffn_hidden=32),
        dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
        tokenizer=str(ROOT / "tests/golden/tokenizer/tokenizer.model"),
    )
    for part in ("vision", "qformer", "llama"):
        model.save_part(part, root)
    make_scenes.main(["stage2", str(root / "stage2"), "--n=24"])
    settings = dict(
        vision=f"{root}/vision.safetensors",
        qformer=f"{root}/qformer.safetensors",
        llama=f"{root}/llama",
        data=f"{root}/stage2",
        template="vicuna",
        max_txt_len=9,
        dtype="float32",
        batch_size=4,
        max_steps=6,
        warmup_steps=2,
    )
    (root / "config.py").write_text(
        "\n".join(f"{k} = {v!r}" for k, v in settings.items())
    )
    return root / "config.py"


# ---- tools/dry_run.py --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stage1", "stage2_llama2", "stage1_tinyllama"])
def test_a_dry_run_needs_no_weights_and_knows_the_official_sizes(name, capsys):
    dry_run.main(
        [str(ROOT / "configs" / f"{name}.py"), "--vision=none", "--llama=none"]
    )
    text = capsys.readouterr().out
    assert re.search(r"vision +985,89\d,\d{3} ", text) and re.search(
        r"llama +6,738,415,616 ", text
    )
    assert "none is missing; official sizes are assumed" in text
    trainable = "23,072,768" if "llama2" in name else "3,149,824"
    assert re.search(rf"all .* {trainable} ", text)


def test_a_dry_run_takes_the_language_model_s_sizes_from_its_config_json_alone(
    world, tmp_path, capsys
):
    (tmp_path / "config.json").write_text(
        (world.parent / "llama/config.json").read_text()
    )
    dry_run.main([str(world), f"--llama={tmp_path}", "--world=2"])
    text = capsys.readouterr().out
    count = sum(
        t.numel() for t in load_file(world.parent / "llama/model.safetensors").values()
    )
    assert re.search(rf"llama +{count:,} ", text) and "48 with 2 process" in text


def test_a_dry_run_counts_what_a_step_computes(world, capsys):
    """Its FLOPs are those that the counter sees in a real step over sequences of that length."""
    dry_run.main([str(world)])
    text = capsys.readouterr().out
    model = train.build(load_config(str(world), {}), torch.device("cpu"))
    length = int(re.search(r"at most (\d+)", text)[1])
    tokens = torch.full((4, length), 5)
    tokens[:, 1:5] = IMAGE
    targets = torch.full_like(tokens, IGNORE)
    targets[:, -9:] = 5
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):  # CPU's own is not counted
        model(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), tokens, targets).backward()
    said = float(re.search(r"([\d.e-]+) TFLOP", text)[1]) * 1e12
    assert said == pytest.approx(counter.get_total_flops(), rel=0.05)
    assert "epochs                1.00 of the 24 in" in text


def test_what_cached_features_recomputed_activations_and_sharding_save(world, capsys):
    said = {}
    for options in ("", "--cache_features", "--grad_checkpoint", "--shard --world=2"):
        dry_run.main([str(world), *options.split()])
        text = capsys.readouterr().out
        said[options] = [
            float(re.search(rf"([\d.e-]+) {what}", text)[1])
            for what in ("TFLOP", "weights", "activations")
        ]
    flops, weights, activations = zip(*said.values())
    assert flops[1] < flops[0] < flops[2] and activations[2] < activations[0]
    assert weights[1] < weights[0] and weights[3] < weights[0]


def test_a_dry_run_of_a_run_s_folder_says_what_chat_needs(capsys):
    dry_run.main([str(ROOT / "assets/tiny"), "--dtype=bfloat16"])
    text = capsys.readouterr().out
    assert (
        re.search(r"proj +16,512 +0 ", text)
        and "keys and values of 2000 tokens" in text
    )
    assert "FLOPs" not in text and "missing" not in text


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "usage"),
        (["nowhere.py"], "nowhere.py"),
        (["configs"], "no config.json"),
        (["configs/stage1.py", "--wrld=2"], "did you mean world"),
        (["configs/stage1.py", "--llama="], "llama: no language model is given"),
    ],
)
def test_a_wrong_command_is_one_line(argv, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError, match=words) as error:
        dry_run.main(argv)
    assert "\n" not in str(error.value)


# ---- tools/show_data.py ------------------------------------------------------------------------------------


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
        (5, "FileNotFoundError"),
        (1, "UnidentifiedImageError"),
        (1, "OSError"),
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
    assert "cannot be used        2: FileNotFoundError" in capsys.readouterr().out
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
)
def test_wrong_data_are_one_line(argv, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError, match=words):
        show_data.main(argv)
