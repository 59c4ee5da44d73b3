"""A part's tensors: read, checked, named in one line where they are wrong."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import chat
from plumbing.console import InputError
from plumbing.weights import load_tensors, save_tensors
from tests.common import TINY, readable
from tests.samples import PAGE, POINTER


@pytest.fixture
def tiny(tmp_path):
    return shutil.copytree(TINY, tmp_path / "tiny")


def load(folder):
    return chat.load(chat.Options(ckpt=str(folder), device="cpu"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "file", ["proj.safetensors", "qformer.safetensors", "llama/model.safetensors"]
)
def test_weights_that_are_not_finite_are_named(tiny, file, value):
    tensors = load_file(tiny / file)
    name = next(k for k in tensors if tensors[k].dim() == 1)
    tensors[name][-1] = value
    with safe_open(tiny / file, "pt") as f:
        metadata = f.metadata()
    save_file(tensors, tiny / file, metadata)
    with pytest.raises(
        InputError, match=f"{name.removeprefix('model.')} holds NaN or infinity"
    ):
        load(tiny)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64])
def test_integers_are_no_weights(tiny, dtype):
    tensors = load_file(tiny / "proj.safetensors")
    save_file(
        tensors | {"proj.bias": tensors["proj.bias"].to(dtype)},
        tiny / "proj.safetensors",
    )
    with pytest.raises(
        InputError, match="proj.bias holds NaN or infinity, or no floats"
    ):
        load(tiny)


@pytest.mark.parametrize(
    "content, words", [(POINTER, "a Git LFS pointer"), (PAGE, "a saved web page")]
)
@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        "proj.safetensors",
        "llama/config.json",
        "llama/tokenizer.model",
        "llama/model.safetensors",
    ],
)
def test_what_lies_in_the_place_of_a_weight_file_is_named(tiny, file, content, words):
    (tiny / file).write_bytes(content)
    with pytest.raises(InputError, match=f"{file}: {words}"):
        load(tiny)


def test_a_mac_s_notes_beside_weights_and_byte_order_marks_do_not_matter(tiny):
    (tiny / "llama/._model.safetensors").write_bytes(b"notes")
    for file in ("config.json", "llama/config.json"):
        (tiny / file).write_bytes(b"\xef\xbb\xbf" + (tiny / file).read_bytes())
    assert load(tiny)[0].tokenizer.vocab_size == 1024


@pytest.mark.parametrize(
    "file, changes, words",
    [
        (
            "llama/config.json",
            {"num_hidden_layers": 10**7},
            "num_hidden_layers 10000000 is no size",
        ),
        (
            "config.json",
            {"image_size": 28000},
            "image_size = 28000: give one from 0 to 2048",
        ),
        (
            "config.json",
            {"tokenizer": "/dev/zero"},
            "/dev/zero: no sentencepiece model",
        ),
        (
            "llama/config.json",
            {"rms_norm_eps": float("nan")},
            "rms_norm_eps nan is no size",
        ),
        ("llama/config.json", {"rope_theta": -1.0}, "rope_theta -1.0 is no size"),
        (
            "llama/config.json",
            {"num_key_value_heads": -1},
            "num_key_value_heads -1 is no size",
        ),
        ("llama/config.json", {"head_dim": -4}, "head_dim -4 is no size"),
    ],
    ids=readable,
)
def test_sizes_are_checked_before_memory_is_taken(tiny, file, changes, words):
    content = json.loads((tiny / file).read_text())
    (tiny / file).write_text(json.dumps(content | changes))
    with pytest.raises(InputError, match=words):
        load(tiny)


@pytest.mark.parametrize(
    "file, changes",
    [
        ("vision.safetensors", {"n_layers": 2_000_000_000}),
        ("qformer.safetensors", {"n_layers": 2_000_000_000}),
        ("vision.safetensors", {"patch_size": 2_147_483_647}),
        ("qformer.safetensors", {"width": -1}),
    ],
    ids=readable,
)
def test_sizes_in_weight_files_are_checked(tiny, file, changes):
    with safe_open(tiny / file, "pt") as f:
        config = json.loads(f.metadata()["config"]) | changes
    save_file(load_file(tiny / file), tiny / file, {"config": json.dumps(config)})
    with pytest.raises(InputError, match=f"{file}: {[*changes][0]} .* is no size"):
        load(tiny)


@pytest.mark.parametrize(
    "weight_map",
    [{"a": ["x"]}, {"a": 1, "b": "c"}, {"a": 1}, [], {}],
    ids=readable,
)
def test_an_odd_index_of_weights_is_refused(tiny, weight_map):
    (tiny / "llama/model.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map})
    )
    with pytest.raises(InputError, match="it has no weight_map"):
        load(tiny)


def test_a_missing_shard_is_named_also_without_an_index(tiny):
    (tiny / "llama/model.safetensors").rename(
        tiny / "llama/model-00001-of-00002.safetensors"
    )
    with pytest.raises(
        InputError, match="model-00002-of-00002.safetensors: no such weight file"
    ):
        load(tiny)


def test_a_backup_beside_the_weights_is_not_read_or_refused(tiny):
    path = tiny / "llama/model.safetensors"
    before, _ = load(tiny)
    tensors = load_file(path)
    save_file(
        {k: t + 1 for k, t in tensors.items()}, tiny / "llama/model_old.safetensors"
    )
    assert load(tiny)[0].fingerprints == before.fingerprints
    path.rename(tiny / "llama/model_new.safetensors")
    with pytest.raises(
        InputError, match="model_old.*: another file of this folder also"
    ):
        load(tiny)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize("is_told", [False, True], ids=["silent", "in_config"])
def test_weights_with_foreign_scales_are_refused(tiny, dtype, is_told):
    path = tiny / "llama/model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scale = tensors[name].float().abs().amax(1, keepdim=True) / 127
        tensors[name] = (tensors[name].float() / scale).to(dtype)
        tensors[f"{name}_scale"] = scale.bfloat16()
    save_file(tensors, path)
    if is_told:
        config = json.loads((tiny / "llama/config.json").read_text())
        config["quantization_config"] = {"quant_method": "compressed-tensors"}
        (tiny / "llama/config.json").write_text(json.dumps(config))
    words = (
        "compressed-tensors.* is not supported" if is_told else "unexpected|no floats"
    )
    with pytest.raises(InputError, match=words):
        load(tiny)


def test_a_language_model_s_folder_is_no_run():
    with pytest.raises(InputError, match="llama: a language model's folder"):
        load(TINY / "llama")


def test_a_model_that_computes_nan_says_so(tiny):
    model, options = load(tiny)
    model.llama.norm.weight.data[3] = float("nan")
    with pytest.raises(InputError, match="computes NaN"):
        list(chat.Chat(model, options).ask("Hi"))


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_matrix_with_nan_is_not_quantized(tiny, dtype):
    tensors = load_file(tiny / "llama/model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 5] = float("nan")
    save_file(tensors, tiny / "llama/model.safetensors")
    with pytest.raises(InputError, match="layers.1.mlp.up_proj.weight holds NaN"):
        chat.load(chat.Options(ckpt=str(tiny), device="cpu", dtype=dtype))


def test_files_of_equal_tensors_have_equal_bytes(tmp_path):
    """Also their metadata, which the library writes in any order."""
    tensors = {name: torch.ones(3) for name in ("b", "a")}
    metadata = {f"key {i}": f"valué {i}" for i in range(20)}
    for name, items in (("one", metadata), ("two", reversed(metadata.items()))):
        save_tensors(tmp_path / name, tensors, "float32", dict(items))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    loaded, read = load_tensors(tmp_path / "one")
    assert read == metadata | {"format": "pt"}
    assert torch.equal(loaded["a"], tensors["a"])
