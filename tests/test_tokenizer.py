"""tokenizer.json: the ids of transformers, and typed control tokens that are text."""

import json
import pickle
import random
import shutil
import sys
import unicodedata

import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st

from configs.prompts import suggest_template
from plumbing.console import InputError
from plumbing.tokenizer import open_tokenizer, read_chat_template
from tests.common import ROOT
from tests.families import CONTROLS, EACH_FAMILY, random_text, write_tokenizer

FAMILIES = list(CONTROLS)


def change(folder, name, **settings):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_equal_transformers(folders, family):
    ours = open_tokenizer("", folders[family])
    theirs = transformers.AutoTokenizer.from_pretrained(
        folders[family], split_special_tokens=True
    )
    rng = random.Random(0)
    texts = [random_text(rng) for _ in range(20_000)]
    if family == "qwen3":  # transformers never splits <think>, which is not special
        texts = [text.replace("think>", "") for text in texts]
    want = theirs(texts, add_special_tokens=False)["input_ids"]
    assert [ours.encode(text) for text in texts] == want


@pytest.mark.parametrize("family", EACH_FAMILY)
@given(text=st.text())
def test_decoding_gives_the_text_back(folders, family, text):
    if family.startswith("qwen"):
        text = unicodedata.normalize("NFC", text)
    tokenizer = open_tokenizer("", folders[family])
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("family", EACH_FAMILY)
@given(data=st.data())
def test_typed_names_of_control_tokens_are_text(folders, family, data):
    tokenizer = open_tokenizer("", folders[family])
    names = st.sampled_from([*CONTROLS[family], " ", "a", "\n", "<", "|"])
    text = "".join(data.draw(st.lists(names)))
    ids = tokenizer.encode(text)
    assert not {tokenizer.control(name) for name in CONTROLS[family]} & set(ids)
    assert tokenizer.decode(ids) == text


def test_a_tokenizer_in_another_process_reads_the_same(folders):
    tokenizer = open_tokenizer("", folders["llama3"])
    copy = pickle.loads(pickle.dumps(tokenizer))
    text = "<|eot_id|> a dog"
    assert copy.encode(text, bos=True) == tokenizer.encode(text, bos=True)


def test_only_some_families_start_texts_with_a_token(folders):
    for family in FAMILIES:
        tokenizer = open_tokenizer("", folders[family])
        plain, with_bos = tokenizer.encode("a"), tokenizer.encode("a", bos=True)
        start = [tokenizer.control("<|begin_of_text|>")] if family == "llama3" else []
        assert with_bos == start + plain
        assert tokenizer.bos == (start[0] if start else None)


def test_pieces_show_spaces_and_control_tokens(folders):
    tokenizer = open_tokenizer("", folders["qwen3"])
    ids = [tokenizer.control("<|im_start|>"), *tokenizer.encode(" a")]
    assert "".join(map(tokenizer.piece, ids)) == "<|im_start|> a"
    assert tokenizer.decode(ids) == " a"


# ---- the files beside it -------------------------------------------------------------


def test_ends_come_from_the_first_file_that_names_one(folders, tmp_path):
    write_tokenizer(tmp_path, "qwen2.5")
    tokenizer = open_tokenizer("", tmp_path)
    end, answer_end, start = map(tokenizer.control, CONTROLS["qwen2.5"])
    assert tokenizer.ends == [answer_end, end] and tokenizer.eos == answer_end
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": end}))
    (tmp_path / "generation_config.json").unlink()
    assert open_tokenizer("", tmp_path).ends == [end]
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 10**9}))
    assert open_tokenizer("", tmp_path).ends == [answer_end]
    change(tmp_path, "tokenizer_config.json", eos_token={"content": "<|im_start|>"})
    assert open_tokenizer("", tmp_path).ends == [start]
    change(tmp_path, "tokenizer_config.json", eos_token=None)
    with pytest.raises(InputError, match="which token ends an answer; fetch"):
        open_tokenizer("", tmp_path)


def test_chat_template_is_read_from_either_file(folders, tmp_path):
    write_tokenizer(tmp_path, "smollm2")
    path = str(tmp_path / "tokenizer.json")
    assert "<|im_start|>" in read_chat_template(path)
    named = [{"name": "tools", "template": "<|im_end|>"}]
    change(tmp_path, "tokenizer_config.json", chat_template=named)
    assert "<|im_end|>" in read_chat_template(path)
    (tmp_path / "chat_template.jinja").write_text("zé", "utf-8")
    assert read_chat_template(path) == "zé"
    assert read_chat_template(str(ROOT / "assets/tiny/llama/tokenizer.model")) == ""


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_written_files_give_the_same_tokenizer(folders, tmp_path, family):
    tokenizer = open_tokenizer("", folders[family])
    for name, content in tokenizer.files().items():
        (tmp_path / name).write_bytes(content)
    copy = open_tokenizer("", tmp_path)
    for name in ("ends", "bos", "vocab_size", "no_thinking", "controls"):
        assert getattr(copy, name) == getattr(tokenizer, name)


def test_words_that_somebody_added_stay_words(folders, tmp_path):
    shutil.copytree(folders["smollm2"], tmp_path, dirs_exist_ok=True)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs.add_tokens(["ginkgo", "<|x|>", "[INST]"])
    theirs.save_pretrained(tmp_path)
    tokenizer = open_tokenizer("", tmp_path)
    text = "A ginkgo, and a <|x|> [INST]."
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.control("ginkgo") in ids
    assert not {tokenizer.control(name) for name in ("<|x|>", "[INST]")} & set(ids)
    word = "a ginkgo"
    assert tokenizer.encode(word) == theirs(word)["input_ids"]


def test_without_a_chat_template_the_control_tokens_suggest_one(folders, tmp_path):
    for family, template in (("qwen3", "chatml"), ("llama3", "llama3")):
        folder = tmp_path / family
        shutil.copytree(folders[family], folder)
        change(folder, "tokenizer_config.json", chat_template="")
        tokenizer = open_tokenizer("", folder)
        assert suggest_template(" ".join(tokenizer.controls)) == template
        assert bool(tokenizer.no_thinking) == (family == "qwen3")


def test_a_truncating_file_does_not_truncate(folders, tmp_path):
    write_tokenizer(tmp_path, "smollm2")
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst"}
    change(tmp_path, "tokenizer.json", truncation=cut | {"stride": 0})
    assert len(open_tokenizer("", tmp_path).encode("1 2 3 4 5 6")) == 11


# ---- errors --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"added_tokens": [], "model": {"type": "?"}}',
        '{"added_tokens": 3}',
    ],
    ids=["empty", "list", "no_model", "unknown_model", "no_tokens"],
)
def test_broken_files_raise_one_line(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=r"tokenizer.json: [^\n]+fetch [^\n]*again"):
        open_tokenizer("", tmp_path)


def test_a_missing_package_is_named(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError, match="json needs the package tokenizers: pip "):
        open_tokenizer("", folders["qwen3"])


def test_a_tokenizer_without_tokens_for_some_bytes_is_refused(folders, tmp_path):
    shutil.copytree(folders["smollm2"], tmp_path, dirs_exist_ok=True)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    for byte in ("a", "\u00c3", "\u00f0"):  # a letter, the first bytes of others
        assert byte in letters
        vocabulary = dict(content["model"]["vocab"])
        merges = content["model"]["merges"]
        kept = {piece: id for piece, id in vocabulary.items() if byte not in piece}
        pairs = [pair for pair in merges if byte not in "".join(pair)]
        model = content["model"] | {"vocab": kept, "merges": pairs}
        (tmp_path / "tokenizer.json").write_text(json.dumps(content | {"model": model}))
        with pytest.raises(InputError, match="no tokens for some characters; take"):
            open_tokenizer("", tmp_path)


def test_a_control_token_that_is_missing_is_named(folders):
    for folder in (folders["llama3"], ROOT / "assets/tiny/llama"):
        with pytest.raises(InputError, match="no token <.im_start.>; take another"):
            open_tokenizer("", folder).control("<|im_start|>")


def test_sentencepiece_is_preferred(folders, tmp_path):
    write_tokenizer(tmp_path, "smollm2")
    source = ROOT / "assets/tiny/llama/tokenizer.model"
    (tmp_path / "tokenizer.model").write_bytes(source.read_bytes())
    assert open_tokenizer("", tmp_path).path.endswith("tokenizer.model")
