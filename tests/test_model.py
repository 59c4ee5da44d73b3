"""The model as a whole."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from model import MiniGPT4
from plumbing.console import InputError
from plumbing.weights import Part, load_tensors
from qformer import QFormer
from tests.runs import changed_llama, micro, run


def test_a_projection_of_another_language_model_is_warned_of(world, tmp_path, capsys):
    llama = changed_llama(world, tmp_path, "norm.weight", 1.1)
    run(micro(world, tmp_path / "one", max_steps=1, llama=llama))
    assert "was trained with another" not in capsys.readouterr().err
    run(
        micro(
            world,
            tmp_path / "two",
            max_steps=1,
            proj=f"{tmp_path}/one/proj.safetensors",
        )
    )
    assert "proj.safetensors was trained with another llama" in capsys.readouterr().err


class Rescaled(QFormer):
    """A part of one's own: a bare parameter, a buffer, a module without `.data`."""

    def __init__(self, config):
        super().__init__(config)
        self.scale = nn.Parameter(torch.full((1,), 2.0))
        self.mixer = nn.MultiheadAttention(config.width, 2)
        self.register_buffer("offset", torch.ones(1))

    def forward(self, image):
        x = super().forward(image)
        y, _ = self.mixer(x, x, x)
        return self.scale * (x + y) + self.offset


def new_model(world, qformer=None):
    sizes = dict(n_queries=4, width=16, n_layers=2, n_heads=2, ffn_hidden=32)
    return MiniGPT4.from_files(
        world["vision"], qformer or sizes, world["llama"], dtype="float32"
    )


def test_a_part_of_one_s_own_keeps_its_initial_values_and_is_saved_and_loaded(
    world, tmp_path, monkeypatch
):
    monkeypatch.setattr("model.QFormer", Rescaled)
    model = new_model(world)
    assert model.bridge.scale.item() == 2 and model.bridge.offset.item() == 1
    assert model.bridge.mixer.in_proj_weight.isfinite().all()
    model.bridge.offset.fill_(3)
    model.save_part("qformer", tmp_path)
    loaded = new_model(world, str(tmp_path / "qformer.safetensors"))
    assert loaded.bridge.offset.item() == 3
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    assert torch.equal(loaded.image_features(images), model.image_features(images))


def test_a_buffer_that_no_file_holds_is_refused_by_name(world, tmp_path, monkeypatch):
    """New ones are, too: what was trained with it could not be loaded."""
    new_model(world).save_part("qformer", tmp_path)

    class WithCache(QFormer):
        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("cache", torch.ones(1), persistent=False)

    monkeypatch.setattr("model.QFormer", WithCache)
    for source in ((), (str(tmp_path / "qformer.safetensors"),)):
        with pytest.raises(InputError, match="qformer: no file holds the buffer cache"):
            new_model(world, *source)


def test_a_part_s_file_says_its_kind(world, tmp_path):
    model = new_model(world)
    kinds = {"vision": "eva_vit", "qformer": "qformer", "proj": "linear"}
    for part, kind in kinds.items():
        model.save_part(part, tmp_path)
        _, metadata = load_tensors(tmp_path / f"{part}.safetensors")
        assert metadata["kind"] == kind
    with pytest.raises(InputError, match="a qformer file; as vision, give eva_vit"):
        MiniGPT4.from_files(str(tmp_path / "qformer.safetensors"), None, world["llama"])


def test_an_image_size_without_whole_patches_is_refused(world):
    parts = [world[name] for name in ("vision", "qformer", "llama")]
    with pytest.raises(InputError, match="image_size 20: give a multiple of 8"):
        MiniGPT4.from_files(*parts, image_size=20)


def test_a_file_without_tensors_is_no_new_part(world, tmp_path):
    model = new_model(world)
    model.save_part("proj", tmp_path)
    path = tmp_path / "proj.safetensors"
    _, metadata = load_tensors(path)
    save_file({}, path, metadata)
    with pytest.raises(InputError, match="does not fit as proj: 2 missing"):
        MiniGPT4.from_files(world["vision"], None, world["llama"], str(path))


def test_new_parts_draw_only_what_their_own_rules_ask_for(world):
    torch.manual_seed(0)
    model = new_model(world)
    torch.manual_seed(0)
    model.bridge.reset_parameters()
    proj = nn.Linear(model.proj.in_features, model.proj.out_features)
    assert torch.equal(model.proj.weight, proj.weight)


class Gate(nn.Module):
    """A part with a value that nobody sets."""

    def __init__(self, fill=None):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(4))
        if fill is not None:
            nn.init.constant_(self.scale, fill)


@pytest.mark.parametrize(
    "fill, is_right", [(None, False), (float("inf"), False), (1.0, True)], ids=str
)
def test_a_new_part_needs_initial_values(world, fill, is_right):
    files = {name: world[name] for name in ("vision", "qformer", "llama")}

    class WithGate(MiniGPT4):
        def __init__(self, *args):
            super().__init__(*args)
            self.gate = Gate(fill)
            self.parts["gate"] = Part({"": self.gate})

    if is_right:
        model = WithGate.from_files(**files)
        assert model.gate.scale.tolist() == [1.0] * 4
    else:
        with pytest.raises(InputError, match="^gate: scale has no initial values"):
            WithGate.from_files(**files)
    assert not torch.are_deterministic_algorithms_enabled()
