"""What the model is fed: sources, token layout, label mask, order of the samples."""

import functools
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from configs.schema import Config, InputError
from data import (BOS, EOS, TEMPLATES, BadSample, CaptionFolder, Conversations, Groups, Reader, Sample,
                  Samples, Shards, chat_segments, clean_caption, collate, encode_segments, index_tar,
                  open_samples, open_source, stop_sequences, user_message)
from llama import IGNORE, IMAGE, Tokenizer
from tests.common import GOLDEN
from tools import make_scenes

ROOT = Path(__file__).resolve().parent.parent
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


def test_without_a_template_turns_are_plain_and_pictures_refused():
    ids, targets = tokenized(Config(), Sample(turns=[("size star", "large"), ("shape red", "star")]))
    assert TOKENIZER.decode(ids[1:]).split() == "size star large shape red star".split()
    assert [t for t in targets if t != IGNORE] == TOKENIZER.encode("large\n") + TOKENIZER.encode("star\n")
    with pytest.raises(InputError, match="needs a template"):
        tokenized(Config(), Sample(images=[b""], turns=[("Hello", "A dog.")]))


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
    assert source.counts == [1000, 30]
    with tarfile.open(shards / "00001.tar") as tar:
        wanted = json.loads(tar.extractfile("000010004.json").read())["caption"]
        picture = tar.extractfile("000010004.jpg").read()
    assert source[1, 4].caption == wanted and source[1, 4].images == [picture]
    (shards.parent / "list.txt").write_text(f"{shards}/00001.tar\n\n{shards}/00000.tar\n")
    assert open_source(str(shards.parent / "list.txt")).counts == [30, 1000]
    for path in (f"{shards}/{{00000..00001}}.tar", f"{shards}/*.tar"):
        assert open_source(path).counts == [1000, 30]


def write_tar(path, members):
    """members: {name: content}."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_shards_take_txt_where_there_is_no_json(tmp_path):
    write_tar(tmp_path / "a.tar", {"1.jpg": jpeg(), "1.txt": b"a dog"})
    assert Shards([str(tmp_path / "a.tar")])[0, 0].caption == "a dog"


@pytest.mark.parametrize("file, content", [
    ("index.json", {"samples": {"a.tar": 7}}), ("a_stats.json", {"successes": 7, "count": 9})])
def test_known_counts_are_believed_without_a_look_at_the_shard(tmp_path, file, content):
    write_tar(tmp_path / "a.tar", {"1.jpg": jpeg(), "1.txt": b"a dog"})
    (tmp_path / file).write_text(json.dumps(content))
    source = Shards([str(tmp_path / "a.tar")])
    assert source.counts == [7] and source[0, 0].caption == "a dog"
    with pytest.raises(BadSample, match="broken tar"):
        source[0, 1]


def test_caption_folder(tmp_path):
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "7.jpg").write_bytes(jpeg())
    (tmp_path / "filter_cap.json").write_text('{"annotations": [{"image_id": "7", "caption": "A dog."}]}')
    source = open_source(str(tmp_path))
    assert isinstance(source, CaptionFolder) and source[0, 0].caption == "A dog."
    assert source[0, 0].images == [str(tmp_path / "image" / "7.jpg")]


def test_jsonl_names_the_line_that_is_wrong(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('\n\n{"image": "a.jpg", "caption": "A dog."}\n'
                    '{"conversation": [{"assistant": "Hi"}]}\n'
                    'not json\n'
                    '{"image": "a.jpg", "caption": "A cat.", "text": null}\n')
    source = Conversations(str(path))
    assert source[0, 0].images == source[0, 3].images == [str(tmp_path / "a.jpg")]
    for i in (1, 2):
        assert source.describe(0, i).endswith(f"line {i + 3}")
        with pytest.raises(BadSample):
            source[0, i]


def test_empty_data_is_refused(tmp_path):
    with pytest.raises(InputError, match="no samples"):
        open_source(str(tmp_path))


# ---- the order of the samples ------------------------------------------------------------------------------


def keys(world, rank, n_groups, counts=((103,),), weights=(1,), batch=5, group=1, **settings):
    """The draws of n_groups groups, as lists of batches of (source, shard, row)."""
    config = Config(batch_size=batch, length_group=group, seed=1, **settings)
    it = iter(Groups([list(c) for c in counts], list(weights), config, rank, world))
    return [[(k.source, k.shard, k.row) for k in batch] for _ in range(n_groups) for _, batch in next(it)]


def test_an_epoch_shows_every_sample_once_and_the_next_in_another_order():
    counts = ((40, 1, 0, 33, 29),)
    everything = [(0, shard, row) for shard, n in enumerate(counts[0]) for row in range(n)]
    for window in (1, 2, 8):
        seen = [k for batch in keys(1, 0, 42, counts, shuffle_shards=window) for k in batch]
        first, second = seen[:103], seen[103:206]
        assert sorted(first) == sorted(second) == everything and first != second


def test_a_window_of_shards_is_read_before_the_next():
    batches = keys(1, 0, 8, ((10,) * 8,), batch=10, shuffle_shards=2)
    seen = [shard for batch in batches for _, shard, _ in batch]
    assert all(len(set(seen[at:at + 20])) == 2 for at in range(0, 80, 20))


def test_ranks_are_disjoint_and_together_make_the_single_process_batch():
    ranks = [keys(4, r, 5) for r in range(4)]
    single = keys(1, 0, 5, batch=20)
    for step in range(5):
        together = [k for r in ranks for k in r[step]]
        assert together == single[step] and len(set(together)) == 20


def test_the_mixture_is_drawn_by_weight():
    sources = [b[0][0] for b in keys(1, 0, 12_500, ((1000,), (1000,)), (115, 14), batch=1, group=8)]
    assert len(sources) == 100_000 and abs(np.mean(sources) - 14 / 129) < 0.01 * 14 / 129


# ---- reading -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def seven(tmp_path_factory):
    """Seven shards of 20 samples whose captions are their numbers, and a second source of 30."""
    root = tmp_path_factory.mktemp("seven")
    for source, n_shards, size in (("a", 7, 20), ("b", 1, 30)):
        (root / source).mkdir()
        for shard in range(n_shards):
            members = {}
            for i in range(size):
                number = f"{source}{shard * size + i}"
                members |= {f"{number}.jpg": jpeg(), f"{number}.txt": f"{number}{' w' * (i % 6)}".encode()}
            write_tar(root / source / f"{shard:05d}.tar", members)
    return root


def numbers(batch):
    """Which samples a batch holds, by their captions."""
    rows = [TOKENIZER.decode([t for t in row if t != IGNORE]) for row in batch.targets.tolist()]
    return [row.split()[0] for row in rows]


def reader(data, rank=0, world=1, state=None, **settings):
    config = Config(**dict(batch_size=2, num_workers=0, length_group=4, shuffle_shards=3) | settings)
    samples, weights = open_samples(data, config, TOKENIZER, 28, N)
    return Reader(samples, weights, config, rank, world, state)


@pytest.fixture
def bucket(seven, tmp_path, monkeypatch):
    """(command that prints a shard of `seven`, the cache's shards now)."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    counts = {f"{i:05d}.tar": 20 for i in range(7)}
    (seven / "a/index.json").write_text(json.dumps({"samples": counts}))
    yield f"pipe:cat {seven}/a/{{00000..00006}}.tar", lambda: list(tmp_path.glob("nanominigpt4-*/*/*.tar"))
    (seven / "a/index.json").unlink()


def test_a_pipe_gives_the_same_batches_and_keeps_few_shards(seven, bucket):
    command, cached = bucket
    for workers in (0, 3):
        for a, b, _ in zip(reader(command, num_workers=workers), reader(f"{seven}/a"), range(150)):
            assert all(torch.equal(x, y) for x, y in zip(a, b))
        assert 3 <= len(cached()) <= 6  # shuffle_shards is 3
    folder, = {path.parent for path in cached()}
    assert not list(folder.glob("*.part"))


def test_a_pipe_fetches_a_shard_once_whatever_the_number_of_processes(seven, bucket, tmp_path):
    command, _ = bucket
    command = command.replace("pipe:cat ", f"pipe:echo x >> {tmp_path}/calls; sleep 0.2; cat ")
    ranks = [iter(reader(command, rank, 2, num_workers=2, length_group=1)) for rank in range(2)]
    seen = [n for _ in range(35) for rank in ranks for n in numbers(next(rank))]
    assert len(set(seen)) == 140 and len((tmp_path / "calls").read_text().split()) == 2 + 7  # 2: the index


def test_a_shard_that_another_process_clears_away_before_it_is_read_is_fetched_again(bucket, monkeypatch):
    source, have, calls = open_source(bucket[0]), Shards._have, []

    def have_and_lose(self, shard):
        have(self, shard)
        calls.append(shard)
        if len(calls) == 1:
            index_tar.cache_clear()  # as in a process that has not read this shard's headers yet
        if len(calls) < 3:
            Path(self.paths[shard]).unlink()

    monkeypatch.setattr(Shards, "_have", have_and_lose)
    assert source[0, 7].caption.split()[0] == "a7" and len(calls) == 3


def test_a_shard_whose_command_fails_costs_its_samples_and_not_the_run(seven, bucket, tmp_path, capsys):
    shutil.copytree(seven / "a", tmp_path / "a")
    (tmp_path / "a/00003.tar").unlink()
    it = reader(f"pipe:cat {tmp_path}/a/{{00000..00006}}.tar", batch_size=20, length_group=7,
                max_bad_fraction=0.5)
    seen = [n for _, b in zip(range(7), it) for n in numbers(b)]
    assert it.skipped == {"shard cannot be fetched": 20}
    assert set(seen) == {f"a{i}" for i in range(140) if i // 20 != 3}
    assert "00003.tar: No such file" in capsys.readouterr().err


@pytest.mark.parametrize("command, words", [
    ("cat /nowhere/{00..02}.tar", "no index.json beside the shards .*prepare_stage1.py check"),
    ("cat /nowhere/{00..02}", "has to name a .tar file"),
    ("cat SEVEN/a/{00006..00008}.tar", "does not tell how many samples 00007.tar has")])
def test_a_pipe_without_counts_is_refused(seven, bucket, command, words):
    with pytest.raises(InputError, match=words):
        open_source("pipe:" + command.replace("SEVEN", str(seven)))


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_batches_do_not_depend_on_the_number_of_workers(seven, workers):
    mixed = {f"{seven}/a": 3, f"{seven}/b": 1}
    for a, b, _ in zip(reader(mixed, num_workers=workers), reader(mixed), range(60)):
        assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_four_ranks_of_three_workers_share_seven_shards_without_repeating_any(seven):
    """140 samples: 17 global batches of 8, and half of one."""
    ranks = [iter(reader(f"{seven}/a", rank, 4, num_workers=3, length_group=1)) for rank in range(4)]
    seen = [number for _ in range(17) for rank in ranks for number in numbers(next(rank))]
    assert len(seen) == len(set(seen)) == 136


def test_batches_hold_samples_of_like_length_and_the_same_ones_as_unsorted(seven):
    of_length = lambda group: reader(f"{seven}/a", batch_size=5, length_group=group)
    take = lambda group: [b for b, _ in zip(of_length(group), range(28))]
    alike, chance = take(28), take(1)
    assert sorted(n for b in alike for n in numbers(b)) == sorted(n for b in chance for n in numbers(b))
    padding = lambda batches: sum((b.targets[:, 1 + N:] == IGNORE).sum().item() for b in batches)
    assert padding(alike) < 0.2 * padding(chance)


@pytest.mark.parametrize("killed_at", [1, 4, 7, 16, 33])
def test_a_resumed_run_goes_on_with_the_very_next_batch(seven, killed_at):
    mixed = {f"{seven}/a": 3, f"{seven}/b": 1}
    unbroken = [numbers(b) for b, _ in zip(reader(mixed), range(50))]
    before = reader(mixed)
    batches = iter(before)
    seen = [numbers(next(batches)) for _ in range(killed_at)]
    again = reader(mixed, state=json.loads(json.dumps(before.state())))
    batches = iter(again)
    seen += [numbers(next(batches)) for _ in range(5)]
    third = reader(mixed, state=again.state())
    seen += [numbers(b) for b, _ in zip(third, range(45 - killed_at))]
    assert seen == unbroken


def test_another_number_of_processes_repeats_nothing_within_the_epoch(seven, capsys):
    data, seen = f"{seven}/a", []
    for rank in range(2):
        before = reader(data, rank, 2)
        seen += [n for b, _ in zip(before, range(6)) for n in numbers(b)]
    after = [reader(data, rank, 3, state=before.state()) for rank in range(3)]
    assert "no sample comes twice" in capsys.readouterr().err
    batches = [iter(a) for a in after]  # 2 groups of 4 x 4 samples are gone
    seen += [n for _ in range(16) for rank in batches for n in numbers(next(rank))]
    assert len(seen) == len(set(seen)) == 24 + 96


def test_resuming_far_into_ten_thousand_shards_reads_only_what_comes_next(tmp_path):
    write_tar(tmp_path / "one.tar", {f"{i}.{end}": c for i in range(1000) for end, c in
                                     (("jpg", jpeg()), ("txt", b"a dog"))})
    (tmp_path / "many").mkdir()
    names = [f"{i:05d}.tar" for i in range(10_000)]
    for name in names:
        (tmp_path / "many" / name).symlink_to(tmp_path / "one.tar")
    (tmp_path / "many/index.json").write_text(json.dumps({"samples": dict.fromkeys(names, 1000)}))
    state = {"drawn": [0], "choices": 0, "batches": 15_625, "shape": [1, 64, 8],
             "order": reader(f"{tmp_path}/many", shuffle_shards=8).state()["order"]}
    start = time.perf_counter()
    far = reader(f"{tmp_path}/many", state=state, batch_size=64, length_group=8, shuffle_shards=8)
    next(iter(far))
    assert time.perf_counter() - start < 10
    assert far.state()["batches"] % 8 == 15_626 % 8 and far.state()["drawn"] == [1953 * 512]


def png(size):
    buffer = io.BytesIO()
    Image.new("L", size).save(buffer, "PNG")
    return buffer.getvalue()


@functools.cache
def bomb():
    buffer = io.BytesIO()
    Image.new("1", (14_000, 14_000)).save(buffer, "PNG")
    return buffer.getvalue()


def break_in_some_way(way, key):
    """The members of a sample that is broken, and the cause by which it is to be counted."""
    good = {f"{key}.jpg": jpeg(), f"{key}.json": json.dumps({"caption": "a dog"}).encode()}
    changes = {
        "truncated": ({f"{key}.jpg": jpeg((200, 200))[:300]}, "picture cannot be read"),
        "html": ({f"{key}.jpg": b"<html>404</html>"}, "picture cannot be read"),
        "noise": ({f"{key}.jpg": bytes(range(256)) * 4}, "picture cannot be read"),
        "empty picture": ({f"{key}.jpg": b""}, "no picture"),
        "one pixel": ({f"{key}.jpg": png((1, 1))}, "picture too small"),
        "bomb": ({f"{key}.jpg": bomb()}, "picture too large"),
        "empty json": ({f"{key}.json": b""}, "no caption"),
        "broken json": ({f"{key}.json": b'{"caption": "a d'}, "no caption in its .json"),
        "no such key": ({f"{key}.json": b'{"url": "x"}'}, "no caption in its .json"),
        "number": ({f"{key}.json": b'{"caption": 7}'}, "caption is not a text"),
        "null": ({f"{key}.json": b'{"caption": null}'}, "caption is not a text"),
        "no caption": ({f"{key}.json": None}, "no caption"),
    }
    changed, cause = changes[way]
    return {k: v for k, v in (good | changed).items() if v is not None}, cause


WAYS = ("truncated", "html", "noise", "empty picture", "one pixel", "bomb", "empty json", "broken json",
        "no such key", "number", "null", "no caption")


def test_a_tenth_of_bad_samples_is_left_out_counted_and_named_once(tmp_path, capfd):
    """10,000 samples, 1,000 broken in 12 ways; all good ones arrive, once."""
    causes = Counter()
    for shard in range(4):
        members = {}
        for i in range(2500):
            key = f"{shard}{i:04d}"
            members |= {f"{key}.jpg": jpeg(), f"{key}.json": json.dumps({"caption": f"n{key}"}).encode()}
            if i % 10 == 3:
                broken, cause = break_in_some_way(WAYS[i // 10 % 12], key)
                members = {k: v for k, v in members.items() if not k.startswith(key)} | broken
                causes[cause] += 1
        write_tar(tmp_path / f"{shard:05d}.tar", members)
    it = reader(str(tmp_path), batch_size=10, length_group=4, num_workers=2, max_bad_fraction=0.2)
    seen = [n for _, b in zip(range(1000), it) for n in numbers(b)]
    good = [f"n{shard}{i:04d}" for shard in range(4) for i in range(2500) if i % 10 != 3]
    assert sorted(seen) == sorted(good)
    assert it.skipped == causes and sum(causes.values()) == 1000 and it.looked_at == 10_000
    said = [line for line in capfd.readouterr().err.splitlines() if "first of its kind" in line]
    assert len(said) == len(causes) and all(".tar:" in line for line in said)
    assert "1000 of 10000 samples cannot be used" in it.account()


def test_what_lies_behind_a_damage_in_a_tar_is_still_read(tmp_path):
    members = {f"{i}.{end}": c for i in range(50) for end, c in (("jpg", jpeg()), ("txt", b"n%d" % i))}
    write_tar(tmp_path / "00000.tar", members)
    write_tar(tmp_path / "00001.tar", members)
    whole = (tmp_path / "00000.tar").read_bytes()
    with tarfile.open(tmp_path / "00000.tar") as tar:
        middle = tar.getmember("25.jpg").offset
    (tmp_path / "00000.tar").write_bytes(whole[:middle] + b"\xff" * 512 + whole[middle + 512:])
    (tmp_path / "00001.tar").write_bytes(whole[:middle + 600])
    (tmp_path / "index.json").write_text(json.dumps({"samples": {"00000.tar": 50, "00001.tar": 50}}))
    it = reader(str(tmp_path), batch_size=10, length_group=10, max_bad_fraction=1.0)
    seen = [n for _, b in zip(range(10), it) for n in numbers(b)]
    assert len(seen) == 49 + 25 and it.skipped.total() == 26


def test_too_many_bad_samples_stop_the_run_with_one_line(tmp_path):
    members = {f"{i}.{end}": c for i in range(300) for end, c in
               (("jpg", jpeg() if i % 4 else b"x"), ("txt", b"a dog"))}
    write_tar(tmp_path / "a.tar", members)
    said = r"cannot be used \(picture cannot be read \d+\), more than max_bad_fraction"
    with pytest.raises(InputError, match=said):
        for _, _ in zip(reader(str(tmp_path), batch_size=10), range(40)):
            pass


def test_a_batch_without_a_good_sample_gives_another_sample_s_place(tmp_path):
    """With batch_size 1 a bad sample is a whole batch; the first good sample of the data stands in for it."""
    members = {f"{i}.{end}": c for i in range(20) for end, c in
               (("jpg", jpeg() if i % 10 else b"x"), ("txt", b"n%d" % i))}
    write_tar(tmp_path / "a.tar", members)
    it = reader(str(tmp_path), batch_size=1, length_group=1)
    seen = Counter(n for _, b in zip(range(20), it) for n in numbers(b))
    assert seen == {f"n{i}": 3 if i == 1 else 1 for i in range(20) if i % 10}
    write_tar(tmp_path / "a.tar", {"0.jpg": b"x", "0.txt": b"n0"})
    with pytest.raises(InputError, match="not one sample of the data can be used"):
        next(iter(reader(str(tmp_path), batch_size=1)))


def test_collate_pads_on_the_right():
    image = torch.zeros(3, 2, 2, dtype=torch.uint8)
    batch = collate([([image], [1, -1, 5], [-100, -100, 5]), ([image], [1], [-100])])
    assert batch.images.shape == (2, 3, 2, 2)
    assert batch.tokens.tolist() == [[1, -1, 5], [1, 0, 0]]
    assert batch.targets.tolist() == [[-100, -100, 5], [-100, -100, -100]]


@pytest.mark.parametrize("line", [
    '{"text": 5}', '{"image": "a.jpg", "caption": "\\ud800"}', "[" * 100_000,
    '{"img": "a.jpg", "caption": "A dog."}', '{"image": "a.jpg", "caption": ""}',
    '{"image": "none.jpg", "caption": "A dog."}', '[1]', '{"conversation": []}',
    '{"image": "a.jpg", "text": "A dog."}', '{"text": "A dog.", "context": 5}'])
def test_any_odd_line_of_a_jsonl_is_one_bad_sample(tmp_path, line):
    (tmp_path / "a.jpg").write_bytes(jpeg())
    path = tmp_path / "own.jsonl"
    path.write_text(f'{{"image": "a.jpg", "caption": "A dog."}}\n{line}\n')
    it = reader(str(path), batch_size=2, length_group=1)
    assert numbers(next(iter(it))) == ["a"] and it.skipped.total() == 1


@pytest.mark.parametrize("content", [
    "[]", '{"annotations": null}', '{"annotations": 7}', '{"annotations": {}}'])
def test_a_filter_cap_json_of_another_form_is_refused(tmp_path, content):
    (tmp_path / "filter_cap.json").write_text(content)
    with pytest.raises(InputError, match="filter_cap.json"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("data", [[], {}, {"a": 0}, {"a": "x"}])
def test_data_of_no_weight_is_refused(data):
    with pytest.raises(InputError, match="weights above 0"):
        open_samples(data, STAGE1, TOKENIZER, 28, N)


def test_a_shard_that_is_gone_costs_its_samples_and_not_the_run(tmp_path):
    write_tar(tmp_path / "00000.tar", {f"{i}.{end}": c for i in range(5) for end, c in
                                       (("jpg", jpeg()), ("txt", b"n%d" % i))})
    (tmp_path / "00001.tar").write_text("<html>404</html>")
    (tmp_path / "index.json").write_text(json.dumps({"samples": {"00000.tar": 5, "00001.tar": 5}}))
    it = reader(str(tmp_path), batch_size=10, length_group=1, max_bad_fraction=1.0)
    assert len(numbers(next(iter(it)))) == 5 and it.skipped.total() == 5


def test_data_py_shows_the_samples_and_what_they_amount_to(shards):
    done = subprocess.run([sys.executable, "data.py", "configs/tiny_stage1.py", f"--data={shards}", "--n=100",
                           "--heldout_data=", "--plain=True"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("picture (3, 48, 48)") == 3 and done.stdout.count("<image x 19>") == 3
    assert "100 samples of 1,030, 19 image tokens" in done.stdout
    shares = [float(share) for share in re.findall(r"padding +([\d.]+)%", done.stdout)]
    assert len(shares) == 2 and 0 < shares[1] < shares[0] < 100  # as drawn, and with length_group 8
