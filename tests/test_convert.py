"""tools/convert.py: every format of weight files, and every way in which they break."""

import functools
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llama import LlamaConfig, Tokenizer, perplexity
from model import MiniGPT4
from plumbing.console import InputError
from plumbing.weights import fingerprint, read_part
from qformer import QFormer, QFormerConfig
from tests import random_weights
from tests.common import GOLDEN, ROOT, Golden
from tests.hub import (
    SIZES,
    blip2_names,
    hub_folder,
    random_llama,
    write_index,
    write_shards,
)
from tools import convert
from vision import VisionConfig, VisionTransformer

TOKENIZER = GOLDEN / "tokenizer/tokenizer.model"
LN_VISION = {"ln_vision.weight", "ln_vision.bias"}
SMALL = ("--n_layers=3", "--heads=4")  # the golden vision part's


def run(*argv):
    """Run the command in this process."""
    convert.main([str(word) for word in argv])


def converted(source, target, *options):
    """The config and tensors, under our names, of a LLaMA that was converted."""
    run("llama", source, target, "--check=False", *options)
    model = MiniGPT4.from_files(None, None, str(target), dtype="float32")
    return model.llama.config, model.part_tensors("llama")


def same(parameters, tensors):
    tensors = {name.removeprefix("model."): t for name, t in tensors.items()}
    assert parameters.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(parameters[name], tensor), name


def fails(*argv):
    """The one-line error of the command."""
    with pytest.raises(InputError) as e:
        run(*argv)
    assert "\n" not in str(e.value)
    return str(e.value)


# ---- the formats of LLaMA ------------------------------------------------------------


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_hugging_face_folders_with_one_or_many_files(tmp_path, ending, shards):
    sizes, tensors = random_llama()
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    folder = hub_folder(tmp_path / "hub", sizes, tensors | old, shards, ending)
    config, got = converted(folder, tmp_path / "ours")
    same(got, tensors)
    assert {"model_type": "llama"} | vars(config) == sizes


def test_an_old_pickle_without_memory_mapping_is_read_too(tmp_path):
    sizes, tensors = random_llama()
    folder = hub_folder(tmp_path / "hub", sizes, tensors, 1, "bin")
    old = folder / "pytorch_model.bin"
    torch.save(tensors, old, _use_new_zipfile_serialization=False)
    same(converted(folder, tmp_path / "ours")[1], tensors)


def test_the_32001st_row_of_vicuna_is_trimmed_with_a_note(tmp_path, capsys):
    sizes, tensors = random_llama(vocab_size=601)
    folder = hub_folder(tmp_path / "hub", sizes, tensors)
    config, got = converted(folder, tmp_path / "ours")
    assert config.vocab_size == 600
    assert "601 rows trimmed" in capsys.readouterr().err
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:600]
    same(got, tensors)


def test_a_model_may_have_fewer_rows_than_the_tokenizer_has_pieces(tmp_path):
    folder = hub_folder(tmp_path / "hub", *random_llama(vocab_size=590))
    run("llama", folder, tmp_path / "ours", "--check=False")
    sizes = json.loads((tmp_path / "ours/config.json").read_text())
    assert sizes["vocab_size"] == 590


def test_a_delta_is_added_to_its_base_although_it_has_a_row_more(tmp_path):
    sizes, base = random_llama(seed=1)
    delta_sizes, delta = random_llama(seed=2, vocab_size=601)
    a = hub_folder(tmp_path / "delta", delta_sizes, delta, 2, "bin")
    b = hub_folder(tmp_path / "base", sizes, base, 3)
    _, got = converted(a, tmp_path / "ours", f"--delta={b}")
    same(got, {name: t + delta[name][: len(t)] for name, t in base.items()})


def test_a_delta_of_another_model_is_refused(tmp_path):
    a = hub_folder(tmp_path / "delta", *random_llama(seed=2, num_hidden_layers=3))
    b = hub_folder(tmp_path / "base", *random_llama(seed=1))
    message = fails("llama", a, tmp_path / "ours", f"--delta={b}")
    assert "delta of another model" in message
    assert not (tmp_path / "ours").exists()


META = {
    "embed_tokens.": "tok_embeddings.",
    "input_layernorm": "attention_norm",
    "lm_head": "output",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}
PARAMS = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-6,
    "vocab_size": -1,
}


def meta_folder(folder, tensors, n_files):
    """Meta's own format, made from Hugging Face's by the converter's inverse."""
    folder.mkdir()
    parts = [{"rope.freqs": torch.ones(4)} for _ in range(n_files)]
    for name, tensor in tensors.items():
        if "q_proj" in name or "k_proj" in name:  # halves of a head -> neighbors
            halves = tensor.view(-1, 2, 4, 32)
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        name = name.removeprefix("model.")
        for ours, theirs in META.items():
            name = name.replace(ours, theirs)
        pieces = [tensor] * n_files
        if tensor.dim() > 1:
            columns = ("tok_embeddings.weight", ".wo.weight", ".w2.weight")
            pieces = tensor.chunk(n_files, dim=1 if name.endswith(columns) else 0)
        for part, piece in zip(parts, pieces):
            part[name] = piece.clone()
    for i, part in enumerate(parts):
        torch.save(part, folder / f"consolidated.{i:02d}.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS))
    shutil.copyfile(TOKENIZER, folder.parent / "tokenizer.model")
    return folder


@pytest.mark.parametrize("n_files", [1, 2])
def test_meta_s_own_files_are_permuted_and_joined(tmp_path, n_files):
    _, tensors = random_llama()
    folder = meta_folder(tmp_path / "7B", tensors, n_files)
    same(converted(folder, tmp_path / "ours")[1], tensors)


def test_meta_s_params_without_a_field_are_refused(tmp_path):
    folder = meta_folder(tmp_path / "7B", random_llama()[1], 1)
    params = {name: value for name, value in PARAMS.items() if name != "n_heads"}
    (folder / "params.json").write_text(json.dumps(params))
    message = fails("llama", folder, tmp_path / "ours")
    assert "n_heads = None is no number above 0" in message


def test_tensors_without_names_are_refused(tmp_path):
    torch.save({0: torch.ones(2)}, tmp_path / "a.pth")
    message = fails("vision", tmp_path / "a.pth", tmp_path / "a.safetensors")
    assert "holds no tensors by name" in message


def write_adapter(folder, tensors, **settings):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("use_rslora, scale", [(False, 8 / 4), (True, 8 / 4**0.5)])
def test_a_lora_adapter_is_merged(tmp_path, use_rslora, scale):
    sizes, tensors = random_llama()
    folder = hub_folder(tmp_path / "hub", sizes, tensors)
    a, b = torch.randn(4, 32), torch.randn(32, 4)
    changed = "model.layers.1.self_attn.q_proj"
    pair = {
        f"base_model.model.{changed}.lora_A.weight": a,
        f"base_model.model.{changed}.lora_B.weight": b,
    }
    adapter = tmp_path / "adapter"
    write_adapter(adapter, pair, r=4, lora_alpha=8, use_rslora=use_rslora)
    _, got = converted(folder, tmp_path / "ours", f"--lora={adapter}")
    tensors[f"{changed}.weight"] += scale * b @ a
    for name, tensor in tensors.items():
        merged = got[name.removeprefix("model.")].detach()
        torch.testing.assert_close(merged, tensor)


def test_an_adapter_may_have_another_alpha_and_rank_for_some_layers(tmp_path):
    sizes, tensors = random_llama()
    folder = hub_folder(tmp_path / "hub", sizes, tensors)
    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"]
    pairs = {}
    for name, rank in zip(names, (4, 4, 2, 4)):
        width = len(tensors[f"{name}.weight"])
        pairs[name] = torch.randn(rank, 32), torch.randn(width, rank)
    adapter = tmp_path / "adapter"
    lora = {}
    for name, pair in pairs.items():
        for letter, matrix in zip("AB", pair):
            lora[f"base_model.model.{name}.lora_{letter}.weight"] = matrix
    patterns = {
        "rank_pattern": {"layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 64, "v_proj": 4},
    }
    write_adapter(adapter, lora, r=4, lora_alpha=8, **patterns)
    _, got = converted(folder, tmp_path / "ours", f"--lora={adapter}")
    for name, scale in zip(names, (8 / 4, 4 / 4, 64 / 2, 4 / 4)):
        a, b = pairs[name]
        merged = got[f"{name}.weight".removeprefix("model.")].detach()
        torch.testing.assert_close(merged, tensors[f"{name}.weight"] + scale * b @ a)


def test_a_folder_keeps_its_chat_template(tmp_path):
    folder = hub_folder(tmp_path / "hub", *random_llama())
    settings = json.dumps({"chat_template": "{{ 'é [INST] ' }}"})
    (folder / "tokenizer_config.json").write_text(settings)
    converted(folder, tmp_path / "ours")
    template = (tmp_path / "ours/chat_template.jinja").read_text("utf-8")
    assert template == "{{ 'é [INST] ' }}"


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_a_backup_beside_the_weights_is_not_read(tmp_path, ending):
    sizes, tensors = random_llama()
    folder = hub_folder(tmp_path / "hub", sizes, tensors, 1, ending)
    old = {name: tensor + 1 for name, tensor in tensors.items()}
    stem = "model" if ending == "safetensors" else "pytorch_model"
    write = save_file if ending == "safetensors" else torch.save
    write(old, folder / f"{stem}_old.{ending}")
    _, got = converted(folder, tmp_path / "ours")
    same(got, tensors)
    (folder / f"{stem}.{ending}").rename(folder / f"{stem}_new.{ending}")
    message = fails("llama", folder, tmp_path / "x")
    assert f"{stem}_old.{ending}: another file of this folder also holds" in message


def test_a_missing_bin_shard_is_named_also_without_an_index(tmp_path):
    folder = hub_folder(tmp_path / "hub", *random_llama(), 2, "bin")
    (folder / "pytorch_model.bin.index.json").unlink()
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    message = fails("llama", folder, tmp_path / "ours")
    assert "pytorch_model-00002-of-00002.bin: no such weight file" in message


def test_a_minigpt_v2_is_no_projection(tmp_path):
    lora = "llama_model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    tensors = {"llama_proj.weight": torch.ones(4, 8), lora: torch.ones(2, 4)}
    torch.save({"model": tensors}, tmp_path / "v2.pth")
    message = fails("proj", tmp_path / "v2.pth", tmp_path / "p.safetensors")
    assert "as MiniGPT-v2 does" in message


def test_an_adapter_that_cannot_be_merged_is_refused(tmp_path):
    folder = hub_folder(tmp_path / "hub", *random_llama())
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    a = {name: torch.randn(4, 32)}
    b = {name.replace("_A", "_B"): torch.randn(64, 4)}
    other = {name.replace("layers.1", "layers.2"): torch.randn(4, 32)}
    for tensors, settings, words in (
        (a, {"r": 4}, "lora_B is missing"),
        (a, {"r": 0}, "r = 0 is no number above 0"),
        (a, {"r": 4, "use_dora": True}, "only plain LoRA"),
        (a, {"r": 4, "bias": "all"}, "only plain LoRA"),
        (other, {"r": 4}, "changes no tensor of this model"),
        (a | b, {"r": 4, "alpha_pattern": ["q"]}, "alpha_pattern is malformed"),
        (a | b, {"r": 4, "alpha_pattern": {"q(": 4}}, "alpha_pattern is malformed"),
        (a, {"r": 4, "alpha_pattern": {"q": 0}}, "q = 0 is no number above 0"),
        ({name: math.nan * a[name]}, {"r": 4}, f"adapter_model.safetensors: {name}"),
        (a | b, {"r": 4}, r"(64, 32), in the language model one of (32, 32)"),
    ):
        write_adapter(tmp_path / "adapter", tensors, lora_alpha=8, **settings)
        message = fails("llama", folder, tmp_path / "a", f"--lora={tmp_path}/adapter")
        assert words in message


def test_a_folder_is_written_in_order_and_in_shards_of_bounded_size(
    tmp_path, monkeypatch
):
    sizes, tensors = random_llama()
    monkeypatch.setattr(convert, "SHARD", 30_000)
    folder = hub_folder(tmp_path / "hub", sizes, tensors, 1, "bin")
    _, got = converted(folder, tmp_path / "ours", "--dtype=bfloat16")
    same(got, {name: tensor.bfloat16().float() for name, tensor in tensors.items()})
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    shards = [load_file(file) for file in files]
    assert len(shards) > 2
    assert files[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    n_bytes = {name: 2 * tensor.numel() for name, tensor in tensors.items()}
    for shard in shards:
        size = sum(tensor.nbytes for tensor in shard.values())
        assert size <= 30_000 + max(n_bytes.values())
    place = {name: i for i, shard in enumerate(shards) for name in shard}
    assert [place[name] for name in tensors] == sorted(place.values())
    index = json.loads((tmp_path / "ours/model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: files[i].name for name, i in place.items()}
    assert index["metadata"]["total_size"] == sum(n_bytes.values())


def test_tensors_that_share_memory_are_written_twice(tmp_path):
    sizes, tensors = random_llama()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    folder = hub_folder(tmp_path / "hub", sizes, tensors, 1, "bin")
    same(converted(folder, tmp_path / "ours")[1], tensors)


@pytest.mark.parametrize(
    "options, dtype",
    [
        pytest.param([], torch.float16, id="as_is"),
        pytest.param(["--dtype=bfloat16"], torch.bfloat16, id="cast"),
    ],
)
def test_dtype_casts_and_without_it_tensors_stay_as_they_are(tmp_path, options, dtype):
    sizes, tensors = random_llama()
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    folder = hub_folder(tmp_path / "hub", sizes, halves)
    run("llama", folder, tmp_path / "ours", "--check=False", *options)
    for file in (tmp_path / "ours").glob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} == {dtype}


# ---- the vision side and the projection ----------------------------------------------


@pytest.fixture
def golden(tmp_path):
    """The arguments of from_files for converted golden weights, in tmp_path."""
    return Golden(GOLDEN, "qformer").convert(tmp_path)


def test_a_file_says_its_kind(golden):
    kinds = {"vision": "eva_vit", "qformer": "qformer", "proj": "linear"}
    for part, kind in kinds.items():
        with safe_open(golden[part], framework="pt") as file:
            assert file.metadata()["kind"] == kind


def test_ln_vision_is_in_the_q_former_s_file_and_in_a_vision_file_that_has_its_own(
    golden, tmp_path
):
    for part in ("vision", "qformer"):
        assert load_file(golden[part]).keys() > LN_VISION
    eva = {
        name.removeprefix("visual_encoder."): tensor
        for name, tensor in Golden(GOLDEN, "qformer").weights.items()
        if name.startswith("visual_encoder.")
    }
    torch.save(eva, tmp_path / "eva.pth")
    run("vision", tmp_path / "eva.pth", golden["vision"], *SMALL)
    assert not load_file(golden["vision"]).keys() & LN_VISION
    MiniGPT4.from_files(**golden)


def test_only_the_first_blocks_of_a_vision_part_are_kept(golden, tmp_path):
    whole = load_file(golden["vision"])
    assert any(name.startswith("blocks.2.") for name in whole)
    target = golden["vision"]
    run("vision", tmp_path / "original.pth", target, "--n_layers=2", "--heads=4")
    first = {k: t for k, t in whole.items() if not k.startswith("blocks.2.")}
    same(load_file(target), first)


def test_an_exported_projection_is_the_original_s_and_comes_back_bit_for_bit(
    golden, tmp_path
):
    folder = tmp_path / "run"
    folder.mkdir()
    paths = {part: f"../{Path(path).name}" for part, path in golden.items()}
    (folder / "config.json").write_text(json.dumps(paths))
    run("export", folder, tmp_path / "mine.pth")
    exported = torch.load(tmp_path / "mine.pth", weights_only=True)["model"]
    original = torch.load(tmp_path / "original.pth", weights_only=True)["model"]
    assert exported.keys() == {"llama_proj.weight", "llama_proj.bias"}
    for name, tensor in exported.items():
        assert tensor.dtype == original[name].dtype
        assert torch.equal(tensor, original[name])
    run("proj", tmp_path / "mine.pth", tmp_path / "again.safetensors")
    same(load_file(tmp_path / "again.safetensors"), load_file(golden["proj"]))


@pytest.mark.slow
def test_a_converted_projection_with_a_config_is_a_run_s_folder(golden, tmp_path):
    config = tmp_path / "stage2.py"
    settings = golden | {"template": "vicuna"}
    lines = [f"{name} = {value!r}\n" for name, value in settings.items()]
    config.write_text("".join(lines))
    out = tmp_path / "official/proj.safetensors"
    run("proj", tmp_path / "original.pth", out, f"--config={config}")
    picture = next((GOLDEN / "images").glob("*.png"))
    options = [f"--ckpt={out.parent}", "--prompt=hm?", "--max_new_tokens=3"]
    done = subprocess.run(
        [sys.executable, "chat.py", str(picture), *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "does not say which parts" in done.stderr


def test_a_converted_projection_overwrites_no_run(golden, tmp_path):
    config = tmp_path / "stage2.py"
    lines = [f"{name} = {value!r}\n" for name, value in golden.items()]
    config.write_text("".join(lines))
    out = tmp_path / "official/proj.safetensors"
    out.parent.mkdir()
    (out.parent / "state.pt").write_bytes(b"")
    message = fails("proj", tmp_path / "original.pth", out, f"--config={config}")
    assert "already holds a run" in message
    other = tmp_path / "other/proj.safetensors"
    fails("proj", tmp_path / "original.pth", other, "--config=none.py")
    assert not other.exists()
    other = tmp_path / "other/mine.safetensors"
    message = fails("proj", tmp_path / "original.pth", other, f"--config={config}")
    assert "name it proj.safetensors" in message


def test_a_projection_beside_other_parts_gives_a_warning(golden, tmp_path, capsys):
    model = MiniGPT4.from_files(**golden, dtype="float32")
    assert "does not say which parts" in capsys.readouterr().err
    model.save_part("proj", tmp_path)
    MiniGPT4.from_files(**golden, dtype="bfloat16")  # the dtype does not matter
    assert not capsys.readouterr().err
    other = tmp_path / "vicuna-v1"
    shutil.copytree(golden["llama"], other)
    shard = other / "model-00001-of-00001.safetensors"
    tensors = load_file(shard)
    tensors["model.norm.weight"] += 1
    save_file(tensors, shard)
    MiniGPT4.from_files(**golden | {"llama": str(other)})
    assert "proj.safetensors was trained with another llama:" in capsys.readouterr().err


def test_a_file_that_was_only_cast_to_bfloat16_counts_as_the_same(
    golden, tmp_path, capsys
):
    MiniGPT4.from_files(**golden).save_part("proj", tmp_path)
    llama = golden["llama"]
    shutil.rmtree(llama)
    run("llama", tmp_path / "hub", llama, "--check=False", "--dtype=bfloat16")
    MiniGPT4.from_files(**golden)
    assert "warning" not in capsys.readouterr().err


# ---- hard cases ----------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path):
    return hub_folder(tmp_path / "hub", *random_llama(), shards=2)


def test_a_truncated_safetensors(hub, tmp_path):
    file = next(hub.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    assert "not a complete safetensors" in fails("llama", hub, tmp_path / "ours")


def test_a_missing_shard_and_an_index_that_names_none(hub, tmp_path):
    next(hub.glob("*.safetensors")).unlink()
    assert "no such weight file" in fails("llama", hub, tmp_path / "ours")
    (hub / "model.safetensors.index.json").write_text("{}")
    assert "no weight_map" in fails("llama", hub, tmp_path / "ours")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_wants_to_run_code_is_refused_and_not_run(tmp_path):
    evil = Evil(tmp_path / "ran")
    torch.save({"model": {"x": torch.ones(1), "y": evil}}, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(evil))
    for name in ("zip.pth", "plain.pth"):
        message = fails("proj", tmp_path / name, tmp_path / "p.safetensors")
        assert "could run code" in message
    assert not (tmp_path / "ran").exists()


def test_a_file_of_something_else(tmp_path):
    (tmp_path / "text.pth").write_text("<p>404</p>")
    torch.save({"epoch": 3}, tmp_path / "numbers.pth")
    torch.save({"conv1.weight": torch.ones(1)}, tmp_path / "other.pth")
    (tmp_path / "empty.pth").write_bytes(b"")
    for name, words in (
        ("text.pth", "no PyTorch file"),
        ("numbers.pth", "holds no tensors by name"),
        ("other.pth", "1 unexpected tensors (conv1.weight)"),
        ("empty.pth", "not a complete PyTorch file"),
    ):
        message = fails("qformer", tmp_path / name, tmp_path / "q.safetensors")
        assert words in message


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
@pytest.mark.parametrize(
    "content, words",
    [
        pytest.param("<!DOCTYPE html><html>", "a saved web page", id="doctype"),
        pytest.param("\n <HTML lang=en>", "a saved web page", id="html"),
        pytest.param(
            "version https://git-lfs.github.com/spec/v1\n",
            "a Git LFS pointer, not the content; run `git lfs pull`",
            id="lfs",
        ),
    ],
)
def test_what_was_saved_in_place_of_the_weights_is_named(
    tmp_path, name, content, words
):
    (tmp_path / name).write_text(content)
    assert words in fails("proj", tmp_path / name, tmp_path / "proj.safetensors")


def test_missing_and_mis_shaped_tensors_are_named(tmp_path):
    weights = dict(Golden(GOLDEN, "qformer").weights)
    weights.pop("visual_encoder.blocks.1.norm1.bias")
    weights["visual_encoder.blocks.0.attn.q_bias"] = torch.ones(63)
    source, target = tmp_path / "v.pth", tmp_path / "v.safetensors"
    torch.save(weights, source)
    message = fails("vision", source, target, *SMALL)
    assert "1 missing (blocks.1.norm1.bias)" in message
    assert "q_bias (63,) instead of (64,)" in message
    message = fails("vision", source, target, "--heads=4")
    assert "missing" in message and "blocks.10" in message  # of 39 blocks
    message = fails("vision", source, target, "--n_layers=3", "--heads=5")
    assert "width 64 is no multiple of --heads=5" in message
    assert not target.exists()


def test_a_projection_of_13b_beside_7b(golden, tmp_path):
    tensors = {
        "llama_proj.weight": torch.ones(40, 48),
        "llama_proj.bias": torch.ones(40),
    }
    torch.save({"model": tensors}, tmp_path / "13b.pth")
    run("proj", tmp_path / "13b.pth", golden["proj"])
    words = r"proj.weight \(40, 48\) instead of \(32, 48\)"
    with pytest.raises(InputError, match=words):
        MiniGPT4.from_files(**golden)


@pytest.mark.parametrize("model_type", ["smollm3", "gemma", "phi3"])
def test_another_architecture_is_refused_by_name(hub, tmp_path, model_type):
    sizes = json.loads((hub / "config.json").read_text())
    (hub / "config.json").write_text(json.dumps(sizes | {"model_type": model_type}))
    assert model_type in fails("llama", hub, tmp_path / "ours")


def test_the_command_line(hub, tmp_path):
    target = tmp_path / "x"
    for argv in (("llama", hub), ()):
        assert fails(*argv).startswith("usage: python ")
    assert "did you mean vision" in fails("vission", hub, target)
    assert "did you mean dtype" in fails("llama", hub, target, "--dtyp=float16")
    message = fails("llama", hub, target, "--dtype=int2")
    assert "dtype = 'int2': give one of none, float32" in message
    message = fails("vision", hub, target, "--dtype=int8")
    assert "only llama can be quantized" in message
    assert "exists already" in fails("llama", hub, hub)


WITH_A_LIMIT = """
import resource, signal
from tools import convert
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
convert.run_main(convert.main)
"""


@pytest.mark.slow
def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    """A limit on the size of files acts as a full disk; the old file is kept."""
    pytest.importorskip("resource")  # not on Windows
    torch.save(Golden(GOLDEN, "qformer").weights, tmp_path / "o.pth")
    target = tmp_path / "out/v.safetensors"
    target.parent.mkdir()
    target.write_text("old")
    arguments = ["vision", f"{tmp_path}/o.pth", str(target), *SMALL]
    done = subprocess.run(
        [sys.executable, "-c", WITH_A_LIMIT, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(target.parent.iterdir()) == [target]
    assert target.read_text() == "old"


def test_a_failed_conversion_leaves_no_folder(hub, tmp_path, monkeypatch):
    def save_file(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "save_file", save_file)
    assert "No space left" in fails("llama", hub, tmp_path / "ours/llama")
    assert list((tmp_path / "ours").iterdir()) == []


@pytest.mark.parametrize(
    "tensor, words",
    [
        pytest.param(
            torch.zeros(1).expand(999, 999), "fewer than its shape says", id="strides"
        ),
        pytest.param(torch.zeros(3, 3).int(), "holds no weights", id="int"),
        pytest.param(torch.zeros(3, 3).cfloat(), "holds no weights", id="complex"),
        pytest.param(torch.zeros(0, 3), "holds no weights", id="empty"),
        pytest.param(torch.full((3, 3), torch.nan), "holds NaN or infinity", id="nan"),
    ],
)
def test_converted_are_finite_weights_only(tmp_path, tensor, words):
    tensors = {"llama_proj.weight": tensor, "llama_proj.bias": torch.zeros(3)}
    torch.save(tensors, tmp_path / "x.pth")
    message = fails("proj", tmp_path / "x.pth", tmp_path / "proj.safetensors")
    assert "proj.weight" in message and words in message
    assert not (tmp_path / "proj.safetensors").exists()


# ---- does the language model speak? --------------------------------------------------


def test_garbage_weights_give_a_warning(hub, tmp_path, capsys):
    run("llama", hub, tmp_path / "ours")
    said = capsys.readouterr().err
    assert "perplexity on a paragraph of English" in said
    assert "warning: these weights are broken" in said


def test_perplexity_is_that_of_transformers(hub):
    from transformers import LlamaForCausalLM

    text = "the old lighthouse"
    ours = MiniGPT4.from_files(None, None, str(hub), dtype="float32")
    theirs = LlamaForCausalLM.from_pretrained(hub, dtype=torch.float32)
    ids = torch.tensor([Tokenizer(f"{hub}/tokenizer.model").encode(text, bos=True)])
    want = torch.exp(theirs(ids, labels=ids).loss).item()
    assert perplexity(ours.llama, ours.tokenizer, text) == pytest.approx(want, rel=1e-4)


# ---- random weights of official names ------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_random_weights_are_converted_and_make_a_model(tmp_path, monkeypatch, format):
    """At small sizes, with the tools' own names, formats and shards."""
    vision = functools.partial(VisionConfig, width=16, n_heads=2, mlp_hidden=32)
    qformer = functools.partial(
        QFormerConfig, width=16, n_heads=2, ffn_hidden=32, vision_width=16
    )
    monkeypatch.setattr(random_weights, "VisionConfig", vision)
    monkeypatch.setattr(random_weights, "QFormerConfig", qformer)
    monkeypatch.setitem(random_weights.LLAMA, "7b", LlamaConfig(**SIZES))
    monkeypatch.setattr(convert, "SHARD", 20_000)
    raw, ours = tmp_path / "raw", tmp_path / "ours"
    files = {"llama": str(ours / "llama")}
    for part in ("vision", "qformer", "proj"):
        files[part] = str(ours / f"{part}.safetensors")
        random_weights.main([part, str(raw / f"{part}.pth")])
        options = [] if part == "proj" else ["--heads=2"]
        run(part, raw / f"{part}.pth", files[part], *options)
    options = [f"--format={format}", f"--tokenizer={TOKENIZER}"]
    random_weights.main(["llama", str(raw / "llama"), *options])
    assert len(list(raw.glob(f"llama/*.{format}"))) > 1
    run("llama", raw / "llama", files["llama"], "--check=False")
    model = MiniGPT4.from_files(**files, dtype="float32")
    assert model.encode_image(torch.zeros(1, 3, 224, 224)).shape == (1, 32, 32)
    assert len(model.vision.blocks) == 39
    assert model.bridge.config.cross_attention_every == 2


# ---- Hugging Face's BLIP-2 -----------------------------------------------------------

BLIP2 = {
    "model_type": "blip-2",
    "text_config": {"model_type": "t5", "d_model": 32},
    "vision_config": {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
    },
    "qformer_config": {"num_attention_heads": 2},
}


def official_tensors():
    """Random tensors of a small vision part and Q-Former, under the original names."""
    vision = VisionConfig(28, 14, 16, 2, 2, 24)
    qformer = QFormerConfig(4, 16, 3, 2, 24, 16, 2)
    shapes = {
        "vision": convert.parameter_shapes(VisionTransformer, vision),
        "qformer": convert.parameter_shapes(QFormer, qformer),
    }
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for part, own in shapes.items():
        for name, shape in own.items():
            original = convert.rename(f"{part}.{name}", random_weights.OFFICIAL)
            tensors[original] = torch.randn(shape, generator=generator)
    return tensors


def blip2_folder(folder, config=BLIP2, key_bias=0.0):
    """The same as the hub has it: under its names, a file for each kind of tensors."""
    tensors = blip2_names(official_tensors(), key_bias)
    tensors |= {
        "language_model.shared.weight": torch.ones(3, 32),
        "language_projection.bias": torch.ones(32),
    }
    shards = {}
    for name, tensor in tensors.items():
        kind = "ln_vision" if "post_layernorm" in name else name.split(".")[0]
        shards.setdefault(f"model-{kind}.safetensors", {})[name] = tensor
    write_shards(folder, shards, config)
    return folder


def test_official_files_and_the_hub_s_blip2_give_the_same_fingerprints(
    tmp_path, capsys
):
    folder = blip2_folder(tmp_path / "hub")
    eva, blip2 = {}, {}
    for name, tensor in official_tensors().items():
        if "visual" in name:
            eva[name.removeprefix("visual_encoder.")] = tensor
        else:
            blip2[name] = tensor
    torch.save(eva, tmp_path / "vision.pth")
    torch.save({"model": blip2}, tmp_path / "qformer.pth")
    for part in ("vision", "qformer"):
        official, hub = f"{tmp_path}/official_{part}", f"{tmp_path}/hub_{part}"
        run(part, tmp_path / f"{part}.pth", official, "--heads=2", "--n_layers=2")
        run(part, folder, hub)
        one, other = read_part(part, official), read_part(part, hub)
        assert one.sizes == other.sizes
        assert fingerprint(one.tensors) == fingerprint(other.tensors)
        has_ln_vision = not other.tensors.keys().isdisjoint(LN_VISION)
        assert has_ln_vision == (part == "qformer")
    # What is left out for the vision part
    counts = "language_model 1, language_projection 1, qformer 70, query_tokens 1"
    assert f"({counts}, vision_model 2)" in capsys.readouterr().err


def test_only_the_shards_of_a_part_are_opened(tmp_path):
    folder = blip2_folder(tmp_path / "hub")
    for file in folder.glob("model-language*"):
        file.write_text("not opened")
    shutil.move(folder / "model-qformer.safetensors", tmp_path)
    run("vision", folder, tmp_path / "vision")
    message = fails("qformer", folder, tmp_path / "qformer")
    assert "model-qformer.safetensors: there is no such" in message


def test_an_index_of_other_shards_is_named(tmp_path):
    folder = blip2_folder(tmp_path / "hub")
    index = folder / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"]
    files["query_tokens"] = "model-qformer.safetensors"
    for weight_map, words in (
        (files, "model-qformer.safetensors: it lacks query_tokens"),
        (5, "no weight_map"),
        ({}, "no weight_map"),
        ({"query_tokens": None}, "no weight_map"),
    ):
        write_index(index, weight_map)
        assert words in fails("qformer", folder, tmp_path / "qformer")


@pytest.mark.parametrize(
    "part, sizes, words",
    [
        pytest.param("vision", {"hidden_act": "relu"}, "activation relu", id="relu"),
        pytest.param("qformer", {"hidden_act": "gelu_new"}, "gelu_new", id="gelu_new"),
        pytest.param("vision", {"num_attention_heads": None}, "no sizes", id="heads"),
        pytest.param("vision", {"num_hidden_layers": 3}, "blocks.2", id="layers"),
    ],
)
def test_a_blip2_with_odd_sizes(tmp_path, part, sizes, words):
    section = f"{part}_config"
    config = BLIP2 | {section: BLIP2[section] | sizes}
    folder = blip2_folder(tmp_path / "hub", config)
    assert words in fails(part, folder, tmp_path / "out")


def test_a_blip2_whose_sizes_are_no_object(tmp_path):
    folder = blip2_folder(tmp_path / "hub", BLIP2 | {"vision_config": [1]})
    assert "no sizes" in fails("vision", folder, tmp_path / "out")


def test_a_shard_without_its_folder_is_no_source(tmp_path):
    folder = blip2_folder(tmp_path / "hub")
    shard = folder / "model-vision_model.safetensors"
    assert "give its folder" in fails("vision", shard, tmp_path / "v")


def test_biases_of_keys_are_no_eva_vit(tmp_path):
    folder = blip2_folder(tmp_path / "hub", key_bias=1e-3)
    message = fails("vision", folder, tmp_path / "vision")
    assert "layers.0.self_attn.qkv.bias: its keys have biases" in message


def other_text(**settings):
    return {"text_config": settings}


@pytest.mark.parametrize(
    "changes, words",
    [
        pytest.param(
            {"model_type": "instructblip"},
            "instructblip's reads text too",
            id="instructblip",
        ),
        pytest.param(
            other_text(model_type="opt", hidden_size=2560),
            "trained for opt, width 2560",
            id="opt",
        ),
        pytest.param(
            other_text(model_type="t5", d_model=2048),
            "trained for t5, width 2048",
            id="t5_xl",
        ),
        pytest.param(
            other_text(model_type="t5", d_model=32, _name_or_path="google/flan-t5-xl"),
            "for t5",
            id="t5_xl_by_name",
        ),
        pytest.param({"vision_config": {}}, "trained for t5, width 32", id="published"),
        pytest.param({"text_config": None}, "trained for opt", id="no_text_config"),
    ],
)
def test_another_q_former_is_refused_but_its_vision_part_is_taken(
    tmp_path, changes, words
):
    folder = blip2_folder(tmp_path / "hub", BLIP2 | changes)
    message = fails("qformer", folder, tmp_path / "qformer")
    assert words in message
    assert "gives nonsense" in message and "blip2-flan-t5-xxl" in message
    run("vision", folder, tmp_path / "vision", "--heads=2", "--n_layers=2")


def test_a_folder_without_config_and_one_of_something_else_are_refused(tmp_path):
    assert "has no config.json" in fails("vision", tmp_path, tmp_path / "v")
    save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert "no tensors of the vision part" in fails("vision", tmp_path, tmp_path / "v")
