"""What the model is fed: sources, token layout, label mask, order of the samples."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from configs.schema import Config, InputError
from data import (BOS, EOS, TEMPLATES, Batches, CaptionFolder, Conversations, Sample, Samples, Shards,
                  chat_segments, clean_caption, collate, encode_segments, open_samples, open_source,
                  stop_sequences, training_batches, user_message)
from llama import IGNORE, IMAGE, Tokenizer
from tests.common import GOLDEN
from tools import make_scenes

N = 3  # image tokens
TOKENIZER = Tokenizer(GOLDEN / "tokenizer" / "tokenizer.model")
STAGE1 = Config(num_workers=0, batch_size=4)
STAGE2 = Config(template="vicuna", end_sym="###", max_txt_len=160, clean_captions=False)


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "stage1"
    make_scenes.main(["stage1", str(folder), "--n=1030"])  # two shards
    return folder


def tokenized(config, sample):
    return Samples([], config, TOKENIZER, 28, N).tokenize(sample, np.random.default_rng(0))


def jpeg(size=(20, 10)):
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, "JPEG")
    return buffer.getvalue()


def test_stage_1_is_bos_image_caption_newline():
    ids, targets = tokenized(STAGE1, Sample(images=[b""], caption="A DOG!"))
    answer = TOKENIZER.encode("a dog\n")
    assert ids == [BOS] + [IMAGE] * N + answer
    assert targets == [IGNORE] * (1 + N) + answer


def test_stage_2_wraps_the_image_in_the_template():
    ids, targets = tokenized(STAGE2, Sample(images=[b""], caption="A dog."))
    before, after = TOKENIZER.encode("###Human: <Img>"), ids[1 + 6 + N:]
    assert ids[:7] == [BOS] + before and ids[7:7 + N] == [IMAGE] * N
    answer = TOKENIZER.encode("A dog.###")
    assert after[-len(answer):] == answer
    assert [t for t in targets if t != IGNORE] == answer
    assert TOKENIZER.decode(after[:-len(answer)]).endswith("###Assistant: ")


def test_llama2_ends_with_the_control_token():
    config = Config(template="llama2", end_sym="</s>", max_txt_len=160, clean_captions=False)
    ids, targets = tokenized(config, Sample(images=[b""], caption="A dog."))
    assert ids[-1] == targets[-1] == EOS


def test_an_answer_cut_at_its_limit_loses_its_end():
    config = Config(max_txt_len=3)
    ids, targets = tokenized(config, Sample(images=[b""], caption="a dog on a sofa"))
    assert [t for t in targets if t != IGNORE] == TOKENIZER.encode("a dog on a sofa\n")[:3]


def test_conversations_learn_the_assistants_words_of_every_turn():
    ids, targets = tokenized(STAGE2, Sample(turns=[("Hello", "A dog."), ("And?", "A cat.")]))
    wanted = TOKENIZER.encode("A dog.###") + TOKENIZER.encode("A cat.###")
    assert [t for t in targets if t != IGNORE] == wanted
    assert all(t in (IGNORE, i) for i, t in zip(ids, targets))
    assert TOKENIZER.decode(ids[1:]).count("Human:") == 2


def test_chat_share_lays_a_conversation_out_as_chat_does():
    config = Config(template="vicuna", end_sym="###", max_txt_len=160, chat_share=1.0)
    ids, _ = tokenized(config, Sample(turns=[("Hello", "A dog.")]))
    segments = chat_segments([(user_message("Hello", 0), None)], TEMPLATES["vicuna"])
    prompt = encode_segments(segments, TOKENIZER, N)
    assert ids[:len(prompt)] == prompt


def test_control_tokens_typed_as_letters_are_text():
    segments = chat_segments([(user_message("</s><s>", 0), None)], TEMPLATES["llama2"])
    ids = encode_segments(segments, TOKENIZER, N)
    assert ids.count(BOS) == 2 and EOS not in ids  # the start, and the template's own <s>


def test_several_pictures_stand_before_the_words():
    ids = encode_segments(user_message("Compare.", 2), TOKENIZER, N)
    assert ids.count(IMAGE) == 2 * N and ids[-1] != IMAGE


def test_both_forms_of_the_end_symbol_stop():
    alone, after_text = stop_sequences(TOKENIZER, "###")
    assert alone == [346] and after_text == [322]
    assert stop_sequences(TOKENIZER, "</s>") == ([EOS],)


@pytest.mark.parametrize("raw, clean", [
    ("A Dog; (two)  cats!", "a dog two cats"), ("...!!!", ""), ("it's 5-6% & more?", "it's 5-6% & more?"),
    (" ".join(["word"] * 60), " ".join(["word"] * 50))])
def test_clean_caption(raw, clean):
    assert clean_caption(raw) == clean


def test_shards_read_every_sample(shards):
    source = open_source(str(shards))
    assert len(source) == 1030
    with tarfile.open(shards / "00001.tar") as tar:
        wanted = json.loads(tar.extractfile("000010004.json").read())["caption"]
        picture = tar.extractfile("000010004.jpg").read()
    assert source[1004].caption == wanted and source[1004].images == [picture]
    assert len(open_source(f"{shards}/{{00000..00001}}.tar")) == len(open_source(f"{shards}/*.tar")) == 1030


def test_shards_take_txt_where_there_is_no_json(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("1.jpg", jpeg()), ("1.txt", b"a dog"), ("2.jpg", jpeg())):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    source = Shards([str(tmp_path / "a.tar")])
    assert len(source) == 1 and source[0].caption == "a dog"  # 2 has no caption


def test_caption_folder(tmp_path):
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "7.jpg").write_bytes(jpeg())
    (tmp_path / "filter_cap.json").write_text('{"annotations": [{"image_id": "7", "caption": "A dog."}]}')
    source = open_source(str(tmp_path))
    assert isinstance(source, CaptionFolder) and source[0].caption == "A dog."
    assert source[0].images == [str(tmp_path / "image" / "7.jpg")]


def test_jsonl_names_the_line_that_is_wrong(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"image": "a.jpg", "caption": "A dog."}\n'
                    '{"conversation": [{"assistant": "Hi"}]}\n'
                    'not json\n')
    source = Conversations(str(path))
    assert source[0].images == [str(tmp_path / "a.jpg")]
    for i in (1, 2):
        with pytest.raises(InputError, match=f"line {i + 1}"):
            source[i]


def test_empty_data_is_refused(tmp_path):
    with pytest.raises(InputError, match="no samples"):
        open_source(str(tmp_path))


def keys(world, rank, n_batches, start=0, lengths=(103,), weights=(1,), batch=5):
    it = iter(Batches(list(lengths), list(weights), batch, seed=1, rank=rank, world=world, start=start))
    return [next(it) for _ in range(n_batches)]


def test_an_epoch_shows_every_sample_once_and_the_next_in_another_order():
    seen = [i for batch in keys(1, 0, 42) for _, i, _ in batch]
    first, second = seen[:103], seen[103:206]
    assert sorted(first) == sorted(second) == list(range(103)) and first != second


def test_ranks_are_disjoint_and_together_make_the_single_process_batch():
    ranks = [keys(4, r, 5) for r in range(4)]
    single = keys(1, 0, 5, batch=20)
    for step in range(5):
        together = [k for r in ranks for k in r[step]]
        assert together == single[step] and len(set(together)) == 20


def test_a_start_in_the_middle_continues_the_sequence():
    options = dict(lengths=(50, 20), weights=(3, 1))
    assert keys(2, 1, 60, **options)[37:] == keys(2, 1, 23, start=37, **options)


def test_the_mixture_is_drawn_by_weight():
    sources = [b[0][0] for b in keys(1, 0, 20_000, lengths=(1000, 1000), weights=(115, 14), batch=1)]
    assert abs(np.mean(sources) - 14 / 129) < 0.01


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_do_not_depend_on_the_number_of_workers(shards, workers):
    def first(n):
        config = Config(num_workers=n, batch_size=4)
        samples, weights = open_samples(str(shards), config, TOKENIZER, 28, N)
        it = training_batches(samples, weights, config)
        return [next(it) for _ in range(3)]
    for a, b in zip(first(workers), first(0)):
        assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_collate_pads_on_the_right():
    image = torch.zeros(3, 2, 2, dtype=torch.uint8)
    batch = collate([([image], [1, -1, 5], [-100, -100, 5]), ([image], [1], [-100])])
    assert batch.images.shape == (2, 3, 2, 2)
    assert batch.tokens.tolist() == [[1, -1, 5], [1, 0, 0]]
    assert batch.targets.tolist() == [[-100, -100, 5], [-100, -100, -100]]
