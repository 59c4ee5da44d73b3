"""int8, int4, and compiled rows."""

import shutil

import pytest
import torch

import chat
from chat import Chat, Options
from llama import Llama, LlamaConfig
from plumbing.quantized import compile_rows
from tests.common import EXAMPLE

STAR = "What color is the star?"


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_quantized_model_chats(dtype):
    talk = Chat(*chat.load(Options(device="cpu", temperature=0.0, dtype=dtype)))
    talk.add_image(EXAMPLE)
    assert "red" in "".join(talk.ask(STAR)) and "two" in "".join(
        talk.ask("How many objects are there?")
    )


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_compiled_rows_give_the_same_logits_and_no_compiler_is_noted(
    monkeypatch, capsys
):
    torch.manual_seed(0)
    model = Llama(LlamaConfig(64, 64, 64, 2, 4, 4, 16)).requires_grad_(
        False
    )  # one shape to compile
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    rows = [torch.randn(1, 1, 64), torch.randn(1, 5, 64), torch.randn(2, 1, 64)]
    want = [model.logits(model(x)) for x in rows]
    monkeypatch.setenv("CXX", "no-such-compiler")
    compile_rows(model)
    assert "needs a C++ compiler" in capsys.readouterr().err
    monkeypatch.setenv("CXX", "g++")
    compile_rows(model)
    assert capsys.readouterr().err == "" and "forward" in vars(model.lm_head)
    for x, logits in zip(rows, want):
        assert torch.allclose(model.logits(model(x)), logits, atol=1e-4)
