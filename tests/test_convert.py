"""tools/convert.py: every format that weights come in, and every way in which they come broken."""

import functools
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama import LlamaConfig, Tokenizer
from model import MiniGPT4
from plumbing.console import InputError
from plumbing.weights import fingerprint, read_part
from qformer import QFormer, QFormerConfig
from tests import random_weights
from tests.common import GOLDEN, ROOT, Golden
from tools import convert
from vision import VisionConfig, VisionTransformer

SIZES = dict(
    vocab_size=600,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)


def random_llama(seed=0, **sizes):
    """(config.json's content, tensors under Hugging Face's names)."""
    config = LlamaConfig(**SIZES | sizes)
    with torch.device("meta"):
        shapes = {
            k: p.shape
            for k, p in MiniGPT4(None, None, config).part_tensors("llama").items()
        }
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        k if k.startswith("lm_head") else f"model.{k}": torch.randn(
            shape, generator=generator
        )
        for k, shape in shapes.items()
    }
    return {"model_type": "llama"} | vars(config), tensors


def hub_folder(folder, sizes, tensors, shards=1, ending="safetensors"):
    """A Hugging Face folder of so many files."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(sizes))
    shutil.copyfile(GOLDEN / "tokenizer/tokenizer.model", folder / "tokenizer.model")
    stem, names, weight_map = (
        "model" if ending == "safetensors" else "pytorch_model",
        list(tensors),
        {},
    )
    for i in range(shards):
        file = (
            f"{stem}-{i + 1:05d}-of-{shards:05d}.{ending}"
            if shards > 1
            else f"{stem}.{ending}"
        )
        part = {k: tensors[k] for k in names[i::shards]}
        save_file(part, folder / file) if ending == "safetensors" else torch.save(
            part, folder / file
        )
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    return folder


def converted(source, target, *options):
    """The tensors that `convert.py llama` makes, under our names, as a loaded model has them."""
    convert.main(["llama", str(source), str(target), "--check=False", *options])
    model = MiniGPT4.from_files(None, None, str(target), dtype="float32")
    return model.llama.config, model.part_tensors("llama")


def same(parameters, tensors):
    tensors = {k.removeprefix("model."): t for k, t in tensors.items()}
    assert parameters.keys() == tensors.keys()
    for k, t in tensors.items():
        assert torch.equal(parameters[k], t), k


def fails(*argv):
    """The one-line error of the command."""
    with pytest.raises(InputError) as e:
        convert.main([str(a) for a in argv])
    assert "\n" not in str(e.value)
    return str(e.value)


# ---- the formats of LLaMA ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_hugging_face_folders_with_one_or_many_files(tmp_path, ending, shards):
    sizes, tensors = random_llama()
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    folder = hub_folder(tmp_path / "hub", sizes, tensors | old, shards, ending)
    config, got = converted(folder, tmp_path / "ours")
    same(got, tensors)
    assert vars(config) == {k: v for k, v in sizes.items() if k != "model_type"}


def test_an_old_pickle_without_memory_mapping_is_read_too(tmp_path):
    sizes, tensors = random_llama()
    folder = hub_folder(tmp_path / "hub", sizes, tensors, 1, "bin")
    torch.save(
        tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False
    )
    same(converted(folder, tmp_path / "ours")[1], tensors)


def test_the_32001st_row_of_vicuna_is_trimmed_and_said_so(tmp_path, capsys):
    sizes, tensors = random_llama(vocab_size=601)
    config, got = converted(
        hub_folder(tmp_path / "hub", sizes, tensors), tmp_path / "ours"
    )
    assert config.vocab_size == 600 and "601 rows trimmed" in capsys.readouterr().err
    for k in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[k] = tensors[k][:600]
    same(got, tensors)


def test_a_delta_is_added_to_its_base_although_it_has_a_row_more(tmp_path):
    sizes, base = random_llama(seed=1)
    delta_sizes, delta = random_llama(seed=2, vocab_size=601)
    a = hub_folder(tmp_path / "delta", delta_sizes, delta, 2, "bin")
    b = hub_folder(tmp_path / "base", sizes, base, 3)
    same(
        converted(a, tmp_path / "ours", f"--delta={b}")[1],
        {k: t + delta[k][: len(t)] for k, t in base.items()},
    )


def test_a_delta_of_another_model_is_refused(tmp_path):
    a = hub_folder(tmp_path / "delta", *random_llama(seed=2, num_hidden_layers=3))
    b = hub_folder(tmp_path / "base", *random_llama(seed=1))
    assert "delta of another model" in fails(
        "llama", a, tmp_path / "ours", f"--delta={b}"
    )
    assert not (tmp_path / "ours").exists()


def meta_folder(folder, tensors, files):
    """Meta's own format, made from Hugging Face's by the inverse of what the converter has to do."""
    folder.mkdir()
    names = {
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
    parts = [{} for _ in range(files)]
    for k, t in tensors.items():
        if "q_proj" in k or "k_proj" in k:  # halves of a head -> neighbors
            t = t.view(-1, 2, 4, 32).transpose(1, 2).reshape(t.shape)
        name = k.removeprefix("model.")
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        columns = "tok_embeddings" in name or ".wo." in name or ".w2." in name
        pieces = (
            [t] * files if t.dim() == 1 else t.chunk(files, dim=1 if columns else 0)
        )
        for part, piece in zip(parts, pieces):
            part[name] = piece.clone()
    for i, part in enumerate(parts):
        torch.save(
            part | {"rope.freqs": torch.ones(4)}, folder / f"consolidated.{i:02d}.pth"
        )
    (folder / "params.json").write_text(
        json.dumps(
            {
                "dim": 32,
                "n_layers": 2,
                "n_heads": 4,
                "n_kv_heads": 2,
                "norm_eps": 1e-6,
                "vocab_size": -1,
            }
        )
    )
    shutil.copyfile(
        GOLDEN / "tokenizer/tokenizer.model", folder.parent / "tokenizer.model"
    )
    return folder


@pytest.mark.parametrize("files", [1, 2])
def test_meta_s_own_files_are_permuted_and_joined(tmp_path, files):
    _, tensors = random_llama()
    same(
        converted(meta_folder(tmp_path / "7B", tensors, files), tmp_path / "ours")[1],
        tensors,
    )


def test_meta_s_params_without_a_field_are_refused(tmp_path):
    folder = meta_folder(tmp_path / "7B", random_llama()[1], 1)
    (folder / "params.json").write_text(
        json.dumps({"dim": 32, "n_layers": 2, "norm_eps": 1e-6})
    )
    assert "n_heads = None is no number above 0" in fails(
        "llama", folder, tmp_path / "ours"
    )


def test_tensors_without_names_are_refused(tmp_path):
    torch.save({0: torch.ones(2)}, tmp_path / "a.pth")
    assert "holds no tensors by name" in fails(
        "vision", tmp_path / "a.pth", tmp_path / "a.safetensors"
    )


def test_a_lora_adapter_is_merged(tmp_path):
    sizes, tensors = random_llama()
    folder, adapter = hub_folder(tmp_path / "hub", sizes, tensors), tmp_path / "adapter"
    adapter.mkdir()
    changed, lora = "model.layers.1.self_attn.q_proj.weight", {}
    a, b = torch.randn(4, 32), torch.randn(32, 4)
    name = "base_model.model.model.layers.1.self_attn.q_proj"
    save_file(
        {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b},
        adapter / "adapter_model.safetensors",
    )
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    got = converted(folder, tmp_path / "ours", f"--lora={adapter}")[1]
    want = tensors | {changed: tensors[changed] + 2 * b @ a}
    for k, t in want.items():
        torch.testing.assert_close(got[k.removeprefix("model.")].detach(), t)
    save_file({f"{name}.lora_A.weight": a}, adapter / "adapter_model.safetensors")
    assert "lora_B is missing" in fails(
        "llama", folder, tmp_path / "b", f"--lora={adapter}"
    )
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 0, "lora_alpha": 8}))
    assert "r = 0 is no number above 0" in fails(
        "llama", folder, tmp_path / "c", f"--lora={adapter}"
    )


def test_a_folder_is_written_in_order_and_in_shards_of_bounded_size(
    tmp_path, monkeypatch
):
    sizes, tensors = random_llama()
    monkeypatch.setattr(convert, "SHARD", 30_000)
    folder = hub_folder(tmp_path / "hub", sizes, tensors, 1, "bin")
    same(
        converted(folder, tmp_path / "ours", "--dtype=bfloat16")[1],
        {k: t.bfloat16().float() for k, t in tensors.items()},
    )
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    shards = [load_file(file) for file in files]
    largest = max(2 * t.numel() for t in tensors.values())
    assert (
        len(shards) > 2
        and files[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    )
    assert all(
        sum(t.nbytes for t in shard.values()) <= 30_000 + largest for shard in shards
    )
    place = {k: i for i, shard in enumerate(shards) for k in shard}
    assert [place[k] for k in tensors] == sorted(place.values())
    index = json.loads((tmp_path / "ours/model.safetensors.index.json").read_text())
    assert index["weight_map"] == {k: files[i].name for k, i in place.items()}
    assert index["metadata"]["total_size"] == sum(
        2 * t.numel() for t in tensors.values()
    )


def test_tensors_that_share_memory_are_written_twice(tmp_path):
    sizes, tensors = random_llama()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    same(
        converted(
            hub_folder(tmp_path / "hub", sizes, tensors, 1, "bin"), tmp_path / "ours"
        )[1],
        tensors,
    )


def test_dtype_casts_and_without_it_tensors_stay_as_they_are(tmp_path):
    sizes, tensors = random_llama()
    folder = hub_folder(
        tmp_path / "hub", sizes, {k: t.half() for k, t in tensors.items()}
    )
    for option, dtype in ((), torch.float16), (("--dtype=bfloat16",), torch.bfloat16):
        out = tmp_path / str(dtype)
        convert.main(["llama", str(folder), str(out), "--check=False", *option])
        assert {
            t.dtype for p in out.glob("*.safetensors") for t in load_file(p).values()
        } == {dtype}


# ---- the vision side and the projection --------------------------------------------------------------------


def test_ln_vision_is_in_the_q_former_s_file_and_in_that_of_a_vision_part_that_has_its_own(
    tmp_path,
):
    files, own = (
        Golden(GOLDEN, "qformer").convert(tmp_path),
        {"ln_vision.weight", "ln_vision.bias"},
    )
    assert (
        own < load_file(files["vision"]).keys()
        and own < load_file(files["qformer"]).keys()
    )
    eva = {
        k.removeprefix("visual_encoder."): t
        for k, t in Golden(GOLDEN, "qformer").weights.items()
        if k.startswith("visual_encoder.")
    }
    torch.save(eva, tmp_path / "eva.pth")
    convert.main(
        [
            "vision",
            str(tmp_path / "eva.pth"),
            files["vision"],
            "--n_layers=3",
            "--heads=4",
        ]
    )
    assert not own & load_file(files["vision"]).keys()
    MiniGPT4.from_files(**files)


def test_an_exported_projection_is_the_original_s_and_comes_back_bit_for_bit(tmp_path):
    files = Golden(GOLDEN, "qformer").convert(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(
        json.dumps({k: f"../{Path(v).name}" for k, v in files.items()})
    )
    convert.main(["export", str(run), str(tmp_path / "mine.pth")])
    exported = torch.load(tmp_path / "mine.pth", weights_only=True)["model"]
    original = torch.load(tmp_path / "original.pth", weights_only=True)["model"]
    assert exported.keys() == {"llama_proj.weight", "llama_proj.bias"}
    for k, t in exported.items():
        assert t.dtype == original[k].dtype and torch.equal(t, original[k])
    convert.main(
        ["proj", str(tmp_path / "mine.pth"), str(tmp_path / "again.safetensors")]
    )
    again, before = load_file(tmp_path / "again.safetensors"), load_file(files["proj"])
    assert (
        all(torch.equal(again[k], t) for k, t in before.items())
        and again.keys() == before.keys()
    )


@pytest.mark.slow
def test_a_converted_projection_with_a_config_is_a_run_s_folder(tmp_path):
    files = Golden(GOLDEN, "qformer").convert(tmp_path)
    config = tmp_path / "stage2.py"
    config.write_text(
        "\n".join(f"{k} = {v!r}" for k, v in files.items()) + "\ntemplate = 'vicuna'\n"
    )
    out = tmp_path / "official/proj.safetensors"
    convert.main(
        ["proj", str(tmp_path / "original.pth"), str(out), f"--config={config}"]
    )
    picture = next((GOLDEN / "images").glob("*.png"))
    done = subprocess.run(
        [
            sys.executable,
            "chat.py",
            str(picture),
            f"--ckpt={out.parent}",
            "--prompt=hm?",
            "--max_new_tokens=3",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "does not say which parts" in done.stderr
    (out.parent / "state.pt").write_bytes(b"")  # a training run is not overwritten
    assert "already holds a run" in fails(
        "proj", tmp_path / "original.pth", out, f"--config={config}"
    )
    other = tmp_path / "other/proj.safetensors"
    fails("proj", tmp_path / "original.pth", other, "--config=none.py")
    assert not other.exists()


def test_a_projection_beside_other_parts_is_warned_of(tmp_path, capsys):
    files = Golden(GOLDEN, "qformer").convert(tmp_path)
    model = MiniGPT4.from_files(**files, dtype="float32")
    assert "does not say which parts" in capsys.readouterr().err
    model.save_part("proj", tmp_path)
    MiniGPT4.from_files(**files, dtype="bfloat16")  # the dtype does not matter
    assert not capsys.readouterr().err
    other = load_file(Path(files["llama"]) / "model-00001-of-00001.safetensors")
    other["model.norm.weight"] += 1
    shutil.copytree(files["llama"], tmp_path / "vicuna-v1")
    save_file(other, tmp_path / "vicuna-v1/model-00001-of-00001.safetensors")
    MiniGPT4.from_files(**files | {"llama": str(tmp_path / "vicuna-v1")})
    assert "proj.safetensors was trained with another llama:" in capsys.readouterr().err


def test_a_file_that_was_only_cast_to_bfloat16_counts_as_the_same(tmp_path, capsys):
    golden = Golden(GOLDEN, "qformer")
    files = golden.convert(tmp_path)
    MiniGPT4.from_files(**files).save_part("proj", tmp_path)
    shutil.rmtree(files["llama"])
    convert.main(
        [
            "llama",
            str(tmp_path / "hub"),
            files["llama"],
            "--check=False",
            "--dtype=bfloat16",
        ]
    )
    MiniGPT4.from_files(**files)
    assert "warning" not in capsys.readouterr().err


# ---- hard cases --------------------------------------------------------------------------------------------


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


def test_a_git_lfs_pointer(tmp_path):
    (tmp_path / "eva.pth").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )
    assert "git lfs pull" in fails(
        "vision", tmp_path / "eva.pth", tmp_path / "v.safetensors"
    )


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_wants_to_run_code_is_refused_and_not_run(tmp_path):
    torch.save(
        {"model": {"x": torch.ones(1), "y": Evil(tmp_path / "ran")}},
        tmp_path / "zip.pth",
    )
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    for name in ("zip.pth", "plain.pth"):
        assert "could run code" in fails(
            "proj", tmp_path / name, tmp_path / "p.safetensors"
        )
    assert not (tmp_path / "ran").exists()


def test_a_file_of_something_else(tmp_path):
    (tmp_path / "a.pth").write_text("<html>404</html>")
    torch.save({"epoch": 3}, tmp_path / "b.pth")
    torch.save({"conv1.weight": torch.ones(1)}, tmp_path / "c.pth")
    (tmp_path / "d.pth").write_bytes(b"")
    for name in "abcd":
        fails("qformer", tmp_path / f"{name}.pth", tmp_path / "q.safetensors")
    assert "unexpected" in fails(
        "qformer", tmp_path / "c.pth", tmp_path / "q.safetensors"
    )
    assert "no PyTorch file" in fails(
        "qformer", tmp_path / "a.pth", tmp_path / "q.safetensors"
    )


def test_missing_and_mis_shaped_tensors_are_named(tmp_path):
    weights = dict(Golden(GOLDEN, "qformer").weights)
    weights.pop("visual_encoder.blocks.1.norm1.bias")
    weights["visual_encoder.blocks.0.attn.q_bias"] = torch.ones(63)
    torch.save(weights, tmp_path / "v.pth")
    message = fails(
        "vision",
        tmp_path / "v.pth",
        tmp_path / "v.safetensors",
        "--n_layers=3",
        "--heads=4",
    )
    assert (
        "1 missing (blocks.1.norm1.bias)" in message
        and "q_bias (63,) instead of (64,)" in message
    )
    message = fails(
        "vision", tmp_path / "v.pth", tmp_path / "v.safetensors", "--heads=4"
    )
    assert "missing" in message and "blocks.10" in message  # of 39 blocks
    assert not (tmp_path / "v.safetensors").exists()


def test_a_projection_of_13b_beside_7b(tmp_path):
    files = Golden(GOLDEN, "qformer").convert(tmp_path)
    torch.save(
        {
            "model": {
                "llama_proj.weight": torch.ones(40, 48),
                "llama_proj.bias": torch.ones(40),
            }
        },
        tmp_path / "13b.pth",
    )
    convert.main(["proj", str(tmp_path / "13b.pth"), files["proj"]])
    with pytest.raises(
        InputError, match=r"proj.weight \(40, 48\) instead of \(32, 48\)"
    ):
        MiniGPT4.from_files(**files)


@pytest.mark.parametrize("model_type", ["qwen2", "gemma", "phi3"])
def test_another_architecture_is_refused_by_name(hub, tmp_path, model_type):
    sizes = json.loads((hub / "config.json").read_text())
    (hub / "config.json").write_text(json.dumps(sizes | {"model_type": model_type}))
    assert model_type in fails("llama", hub, tmp_path / "ours")


def test_the_command_line(hub, tmp_path):
    for argv in (("vission", hub, tmp_path / "x"), ("llama", hub), ()):
        assert fails(*argv).startswith("usage: python ")
    assert "did you mean dtype" in fails("llama", hub, tmp_path / "x", "--dtyp=float16")
    assert "--dtype=int2: give one of float32" in fails(
        "llama", hub, tmp_path / "x", "--dtype=int2"
    )
    assert "exists already" in fails("llama", hub, hub)


@pytest.mark.slow
def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    """A limit on the size of files acts as a full disk; the old file is kept."""
    pytest.importorskip("resource")  # not on Windows
    torch.save(Golden(GOLDEN, "qformer").weights, tmp_path / "o.pth")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/v.safetensors").write_text("old")
    program = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); "
        "from tools import convert; convert.run_main(convert.main)"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            program,
            "vision",
            f"{tmp_path}/o.pth",
            f"{tmp_path}/out/v.safetensors",
            "--n_layers=3",
            "--heads=4",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2
        and "cannot be written" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["v.safetensors"]
    assert (tmp_path / "out/v.safetensors").read_text() == "old"


def test_a_failed_conversion_leaves_no_folder(hub, tmp_path, monkeypatch):
    def save_file(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "save_file", save_file)
    assert "No space left" in fails("llama", hub, tmp_path / "ours/llama")
    assert list((tmp_path / "ours").iterdir()) == []


# ---- does the language model speak? ------------------------------------------------------------------------


def test_garbage_weights_are_warned_of(hub, tmp_path, capsys):
    convert.main(["llama", str(hub), str(tmp_path / "ours")])
    said = capsys.readouterr().err
    assert (
        "perplexity on a paragraph of English" in said
        and "warning: these weights are broken" in said
    )


def test_perplexity_is_that_of_transformers(hub, tmp_path):
    from transformers import LlamaForCausalLM

    sizes, _ = random_llama()
    ours = MiniGPT4.from_files(None, None, str(hub), dtype="float32")
    theirs = LlamaForCausalLM.from_pretrained(hub, dtype=torch.float32)
    ids = torch.tensor(
        [Tokenizer(f"{hub}/tokenizer.model").encode("the old lighthouse", bos=True)]
    )
    want = torch.exp(theirs(ids, labels=ids).loss).item()
    assert ours.perplexity("the old lighthouse") == pytest.approx(want, rel=1e-4)


# ---- random weights of official names ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_random_weights_are_converted_and_make_a_model(tmp_path, monkeypatch, format):
    """At small sizes, with the tools' own names, formats and shards."""
    sizes = dict(width=16, n_heads=2)
    monkeypatch.setattr(
        random_weights,
        "VisionConfig",
        functools.partial(VisionConfig, **sizes, mlp_hidden=32),
    )
    monkeypatch.setattr(
        random_weights,
        "QFormerConfig",
        functools.partial(QFormerConfig, **sizes, ffn_hidden=32, vision_width=16),
    )
    monkeypatch.setitem(random_weights.LLAMA, "7b", LlamaConfig(**SIZES))
    monkeypatch.setattr(convert, "SHARD", 20_000)
    raw, ours = tmp_path / "raw", tmp_path / "ours"
    for part in ("vision", "qformer", "proj"):
        random_weights.main([part, str(raw / f"{part}.pth")])
        options = ["--heads=2"] * (part != "proj")
        convert.main(
            [
                part,
                str(raw / f"{part}.pth"),
                str(ours / f"{part}.safetensors"),
                *options,
            ]
        )
    tokenizer = GOLDEN / "tokenizer/tokenizer.model"
    random_weights.main(
        ["llama", str(raw / "llama"), f"--format={format}", f"--tokenizer={tokenizer}"]
    )
    assert len(list(raw.glob(f"llama/*.{format}"))) > 1
    convert.main(["llama", str(raw / "llama"), str(ours / "llama"), "--check=False"])
    files = {k: str(ours / f"{k}.safetensors") for k in ("vision", "qformer", "proj")}
    model = MiniGPT4.from_files(**files, llama=str(ours / "llama"), dtype="float32")
    assert model.encode_image(torch.zeros(1, 3, 224, 224)).shape == (1, 32, 32)
    assert (
        len(model.vision.blocks) == 39
        and model.bridge.config.cross_attention_every == 2
    )


# ---- Hugging Face's BLIP-2 ---------------------------------------------------------------------------------

TO_HUB = {theirs: hub for hub, theirs in convert.BLIP2_NAMES.items()}
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
    shapes = {
        f"vision.{k}": s
        for k, s in convert.parameter_shapes(
            VisionTransformer, VisionConfig(28, 14, 16, 2, 2, 24)
        ).items()
    }
    shapes |= {
        f"qformer.{k}": s
        for k, s in convert.parameter_shapes(
            QFormer, QFormerConfig(4, 16, 3, 2, 24, 16, 2)
        ).items()
    }
    generator = torch.Generator().manual_seed(0)
    return {
        convert.rename(k, random_weights.OFFICIAL): torch.randn(
            shape, generator=generator
        )
        for k, shape in shapes.items()
    }


def blip2_folder(folder, tensors, config=BLIP2, key_bias=0.0):
    """The same as the hub has it: under its names, one file for each kind of tensors."""
    hub, files = {}, {}
    for name, t in tensors.items():
        if name.endswith("q_bias"):
            bias = (
                t,
                torch.full_like(t, key_bias),
                tensors[name.replace("q_bias", "v_bias")],
            )
            hub[convert.rename(name.replace("q_bias", "qkv.bias"), TO_HUB)] = torch.cat(
                bias
            )
        elif not name.endswith("v_bias"):
            hub[convert.rename(name, TO_HUB)] = t
    hub |= {
        "language_model.shared.weight": torch.ones(3, 32),
        "language_projection.bias": torch.ones(32),
    }
    folder.mkdir()
    for name, t in hub.items():
        kind = "ln_vision" if "post_layernorm" in name else name.split(".")[0]
        files.setdefault(f"model-{kind}.safetensors", {})[name] = t
    for file, own in files.items():
        save_file(own, folder / file)
    weight_map = {name: file for file, own in files.items() for name in own}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map})
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_official_files_and_the_hub_s_blip2_give_the_same_fingerprints(
    tmp_path, capsys
):
    tensors = official_tensors()
    folder = blip2_folder(tmp_path / "hub", tensors)
    torch.save(
        {
            k.removeprefix("visual_encoder."): t
            for k, t in tensors.items()
            if "visual" in k
        },
        tmp_path / "eva.pth",
    )
    torch.save(
        {"model": {k: t for k, t in tensors.items() if "visual" not in k}},
        tmp_path / "blip2.pth",
    )
    for part, official in (("vision", "eva.pth"), ("qformer", "blip2.pth")):
        convert.main(
            [
                part,
                str(tmp_path / official),
                f"{tmp_path}/a_{part}",
                "--heads=2",
                "--n_layers=2",
            ]
        )
        convert.main([part, str(folder), f"{tmp_path}/b_{part}"])
        ours, hub = (read_part(part, f"{tmp_path}/{x}_{part}") for x in "ab")
        assert ours.sizes == hub.sizes and fingerprint(ours.tensors) == fingerprint(
            hub.tensors
        )
        assert not any(k.startswith("ln_vision") for k in hub.tensors) == (
            part == "vision"
        )
    assert (
        "(language_model 1, language_projection 1, qformer 70, query_tokens 1, vision_model 2)"
        in capsys.readouterr().err
    )  # of the hub's vision part


def test_only_the_shards_of_a_part_are_opened(tmp_path):
    folder = blip2_folder(tmp_path / "hub", official_tensors())
    for file in folder.glob("model-language*"):
        file.write_text("not opened")
    shutil.move(folder / "model-qformer.safetensors", tmp_path)
    convert.main(["vision", str(folder), f"{tmp_path}/vision"])
    assert "model-qformer.safetensors: there is no such" in fails(
        "qformer", folder, tmp_path / "qformer"
    )


def test_an_index_of_other_shards_is_named(tmp_path):
    folder = blip2_folder(tmp_path / "hub", official_tensors())
    index = folder / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"]
    files["query_tokens"] = "model-qformer.safetensors"
    for content, words in (
        (files, "model-qformer.safetensors: it lacks query_tokens"),
        (5, "no weight_map"),
        ({"query_tokens": None}, "no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": content}))
        assert words in fails("qformer", folder, tmp_path / "qformer")


@pytest.mark.parametrize(
    "part, sizes, words",
    [
        ("vision", {"hidden_act": "relu"}, "activation relu"),
        ("qformer", {"hidden_act": "gelu_new"}, "gelu_new"),
        ("vision", {"num_attention_heads": None}, "no sizes"),
        ("vision", [1], "no sizes"),
        ("vision", {"num_hidden_layers": 3}, "blocks.2"),
    ],
)
def test_a_blip2_whose_config_is_odd(tmp_path, part, sizes, words):
    sizes = BLIP2[f"{part}_config"] | sizes if isinstance(sizes, dict) else sizes
    folder = blip2_folder(
        tmp_path / "hub", official_tensors(), BLIP2 | {f"{part}_config": sizes}
    )
    assert words in fails(part, folder, tmp_path / "out")


def test_a_shard_without_its_folder_is_no_source(tmp_path):
    folder = blip2_folder(tmp_path / "hub", official_tensors())
    assert "give its folder" in fails(
        "vision", folder / "model-vision_model.safetensors", tmp_path / "v"
    )


def test_biases_of_keys_are_no_eva_vit(tmp_path):
    folder = blip2_folder(tmp_path / "hub", official_tensors(), key_bias=1e-3)
    message = fails("vision", folder, tmp_path / "vision")
    assert "layers.0.self_attn.qkv.bias: its keys have biases" in message


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_type": "instructblip"}, "instructblip's reads text too"),
        (
            {"text_config": {"model_type": "opt", "hidden_size": 2560}},
            "trained for opt, width 2560",
        ),
        (
            {"text_config": {"model_type": "t5", "d_model": 2048}},
            "trained for t5, width 2048",
        ),
        (
            {
                "text_config": {
                    "model_type": "t5",
                    "d_model": 32,
                    "_name_or_path": "google/flan-t5-xl",
                }
            },
            "for t5",
        ),
        ({"vision_config": {}}, "trained for t5, width 32"),
        ({"text_config": None}, "trained for opt"),
    ],
)
def test_another_q_former_is_refused_but_its_vision_part_is_taken(
    tmp_path, changes, words
):
    folder = blip2_folder(tmp_path / "hub", official_tensors(), BLIP2 | changes)
    message = fails("qformer", folder, tmp_path / "qformer")
    assert (
        words in message
        and "gives nonsense" in message
        and "blip2-flan-t5-xxl" in message
    )
    convert.main(
        ["vision", str(folder), f"{tmp_path}/vision", "--heads=2", "--n_layers=2"]
    )


def test_a_folder_without_config_and_one_of_something_else_are_refused(tmp_path):
    assert "has no config.json" in fails("vision", tmp_path, tmp_path / "v")
    save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert "no tensors of the vision part" in fails("vision", tmp_path, tmp_path / "v")


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
@pytest.mark.parametrize(
    "content, words",
    [
        ("<!DOCTYPE html><html>", "a saved web page"),
        ("\n <HTML lang=en>", "a saved web page"),
        ("version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    ],
)
def test_what_was_saved_in_place_of_the_weights_is_named(
    tmp_path, name, content, words
):
    (tmp_path / name).write_text(content)
    assert words in fails("proj", tmp_path / name, tmp_path / "proj.safetensors")


@pytest.mark.parametrize(
    "tensor, words",
    [
        (torch.zeros(1).expand(999, 999), "fewer than its shape says"),
        (torch.zeros(3, 3).int(), "holds no weights"),
        (torch.zeros(3, 3).cfloat(), "holds no weights"),
        (torch.zeros(0, 3), "holds no weights"),
        (torch.full((3, 3), float("nan")), "holds NaN or infinity"),
    ],
)
def test_converted_are_finite_weights_only(tmp_path, tensor, words):
    torch.save(
        {"llama_proj.weight": tensor, "llama_proj.bias": torch.zeros(3)},
        tmp_path / "x.pth",
    )
    with pytest.raises(InputError, match=f"proj.weight.* {words}"):
        convert.main(
            ["proj", str(tmp_path / "x.pth"), str(tmp_path / "proj.safetensors")]
        )
    assert not (tmp_path / "proj.safetensors").exists()
