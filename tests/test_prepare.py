"""tools/prepare_stage1.py, with the real img2dataset and a local web server."""

import io
import json
import subprocess
import sys
import tarfile
import time
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from PIL import Image

from plumbing.console import InputError
from plumbing.sources import Shards
from tools import prepare_stage1
from vision import load_image

ROOT = Path(__file__).resolve().parent.parent
ODD = 'tab\there, "quotes", line\nbreak, é, 猫, \'\\'


def picture(color="red", size=(320, 200)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "JPEG")
    return buffer.getvalue()


class Web(BaseHTTPRequestHandler):
    """/KIND/N: a picture, or one of the ways in which a download fails."""

    def do_GET(self):
        kind = self.path.split("/")[1]
        if kind == "slow":
            time.sleep(9)
        body = {"html": b"<html>gone</html>", "broken": picture()[:200]}.get(
            kind, picture()
        )
        try:
            self.send_response(404 if kind == "404" else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except OSError:  # the client has given up
            pass

    def log_message(self, *args):
        pass


@pytest.fixture
def web(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(ThreadingHTTPServer, "request_queue_size", 64)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Web)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def write_json(path, entries):
    path.write_text(json.dumps(entries))
    return str(path)


@pytest.mark.slow
def test_from_the_list_over_the_web_to_the_reader(web, tmp_path, capfd):
    pytest.importorskip("img2dataset")
    kinds = ["ok"] * 16 + ["404", "slow", "html", "broken"]
    entries = [
        {"url": f"{web}/{kinds[i % 20]}/{i}", "caption": f"{i}: {ODD}"}
        for i in range(60)
    ]
    src = write_json(
        tmp_path / "ccs.json",
        [{"url": "", "caption": "x"}, *entries, {"url": "http://x"}],
    )
    dst = tmp_path / "shards"
    command = [
        src,
        str(dst),
        "--run",
        "--processes=1",
        "--threads=8",
        "--timeout=3",
        "--shard_size=20",
    ]
    prepare_stage1.main(command)
    said = capfd.readouterr().out
    assert "60 pictures; left out: 1 without url, 1 without caption" in said
    assert (
        "3 shards, 48 samples" in said and "12 of 60 downloads failed (20.0%)" in said
    )
    assert (
        "3  HTTP Error 404" in said
        and "timed out" in said
        and "suspicious shards: none" in said
    )
    assert json.loads((dst / "index.json").read_text())["samples"] == {
        f"0000{i}.tar": 16 for i in range(3)
    }
    source = Shards(sorted(map(str, dst.glob("*.tar"))))
    assert source.counts == [16, 16, 16]
    samples = [source[shard, row] for shard in range(3) for row in range(16)]
    odd = ODD.replace("\n", " ")
    assert {s.caption for s in samples} == {
        f"{i}: {odd}" for i in range(60) if kinds[i % 20] == "ok"
    }
    assert all(
        load_image(s.images[0].read(), 224).shape == (3, 224, 224) for s in samples
    )
    prepare_stage1.main(
        command
    )  # again: finished shards are kept, and index.json is not in the way
    assert "3 shards, 48 samples" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["tsv", "parquet"])
def test_captions_survive_the_list_as_img2dataset_reads_it(tmp_path, ending):
    csv, parquet = (
        pytest.importorskip("pyarrow.csv"),
        pytest.importorskip("pyarrow.parquet"),
    )
    captions = [ODD, '"', "''", '"a" b', " x ", "NULL", "5", "\ud800"] * 1000
    entries = [{"url": f"http://x/{i}", "caption": c} for i, c in enumerate(captions)]
    src = write_json(tmp_path / "a.json", entries)
    prepare_stage1.main([src, str(tmp_path / "out"), f"--list={tmp_path}/a.{ending}"])
    if ending == "parquet":
        table, want = parquet.read_table(tmp_path / "a.parquet"), captions
    else:
        table = csv.read_csv(
            tmp_path / "a.tsv", parse_options=csv.ParseOptions(delimiter="\t")
        )
        want = [c.replace("\n", " ") for c in captions]
    assert table["caption"].to_pylist() == [c.replace("\ud800", "?") for c in want]
    assert table["url"].to_pylist() == [f"http://x/{i}" for i in range(len(captions))]


@pytest.mark.slow
def test_a_list_of_any_size_is_read_in_chunks(tmp_path, monkeypatch):
    """The entries are the same wherever a chunk ends, and memory does not grow with the file."""
    entries = [
        {
            "url": f"http://x/{i}",
            "caption": 'é"\\' * (i % 7),
            "n": [i, None, {"a": -1.5e3}],
        }
        for i in range(40)
    ] + [7, "text", []]
    for indent in (None, 2):
        (tmp_path / "a.json").write_text(json.dumps(entries, indent=indent) + "\n")
        for chunk in (1, 2, 3, 7, 50, 2**20):
            monkeypatch.setattr(prepare_stage1, "CHUNK", chunk)
            assert (
                list(prepare_stage1.read_entries(str(tmp_path / "a.json"))) == entries
            )
    (tmp_path / "none.json").write_text(" [ ] ")
    assert list(prepare_stage1.read_entries(str(tmp_path / "none.json"))) == []
    entry = json.dumps({"url": "http://x", "caption": "y" * 150})
    (tmp_path / "large.json").write_text(
        "[" + ",\n".join([entry] * 110_000) + "]"
    )  # 20 MB
    tracemalloc.start()
    n = sum(1 for _ in prepare_stage1.read_entries(str(tmp_path / "large.json")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 110_000 and peak < 8e6


@pytest.mark.parametrize(
    "content, words",
    [
        (
            '[{"url": "a", "caption": "b"}, {"url": "c", "cap',
            "entry 2, which begins at character 30",
        ),
        (
            '[{"url": "a", "caption": "b"} {"url"',
            "entry 1, which begins at character 1",
        ),
        ('[{"url": "a", "caption": "b"}', "entry 1"),
        ("[", "entry 1"),
        ('{"url": "a"}', "does not begin with"),
        ("", "does not begin with"),
        ("[" * 100_000, "entry 1"),
    ],
)
def test_a_broken_list_is_one_line_that_says_where(tmp_path, content, words):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError, match=words):
        prepare_stage1.main([str(tmp_path / "a.json"), str(tmp_path / "shards")])
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_the_command_is_that_of_the_original(tmp_path, capsys):
    src = write_json(tmp_path / "a.json", [{"url": "http://x", "caption": "y"}])
    for _ in range(2):  # the second time the list exists
        prepare_stage1.main([src, str(tmp_path / "cc_sbu_dataset")])
        said = capsys.readouterr().out
        to = f"{tmp_path}/cc_sbu_dataset"
        assert (
            f"img2dataset --url_list {to}.tsv --input_format tsv --url_col url --caption_col caption "
            f"--output_format webdataset --output_folder {to} --image_size 224 " in said
        )
    assert "exists already" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["check"],
        ["none.json", "x"],
        ["check", "nowhere"],
        ["a.json", "x", "--list=x.csv"],
        ["a.json", "x", "--threads=0"],
    ],
)
def test_mistakes_give_one_line_and_status_2(arguments):
    done = subprocess.run(
        [sys.executable, "tools/prepare_stage1.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2
        and done.stderr.count("\n") == 1
        and done.stderr.startswith("error: ")
    )


def write_shard(path, n, stats=None):
    with tarfile.open(path, "w") as tar:
        for i in range(n):
            for kind, content in (("jpg", picture(size=(8, 8))), ("txt", b"a dog")):
                member = tarfile.TarInfo(f"{i:09d}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    if stats is not None:
        path.with_name(f"{path.stem}_stats.json").write_text(json.dumps(stats))


def test_suspicious_shards_are_named(tmp_path, capsys):
    ok = {
        "count": 12,
        "successes": 10,
        "status_dict": {"success": 10, "HTTP Error 404: Not Found": 2},
    }
    for number in (0, 1, 2, 9):
        write_shard(tmp_path / f"{number:05d}.tar", 10, ok)
    write_shard(tmp_path / "00004.tar", 3, ok | {"successes": 3})
    write_shard(tmp_path / "00005.tar", 0, ok | {"successes": 0})
    write_shard(tmp_path / "00006.tar", 10)
    write_shard(tmp_path / "00007.tar", 9, ok)
    (tmp_path / "00008.tar").write_text("<html>404</html>")
    prepare_stage1.main(["check", str(tmp_path)])
    said = capsys.readouterr().out
    for line in (
        "9 shards, 62 samples",
        "14  HTTP Error 404: Not Found",
        "suspicious shards: 6",
        "00004.tar: only 3 samples; the median is 10",
        "00005.tar: no samples",
        "00006.tar: no 00006_stats.json: img2dataset has not finished it",
        "00007.tar: 00007_stats.json says 10 samples, the tar file has 9",
        "00008.tar: unreadable (",
        "missing: 00003.tar",
    ):
        assert line in said, line
    samples = json.loads((tmp_path / "index.json").read_text())["samples"]
    assert samples["00008.tar"] == 0 and samples["00007.tar"] == 9
