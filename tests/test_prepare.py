"""tools/prepare_stage1.py, with the real img2dataset and a local web server."""

import io
import json
import subprocess
import sys
import tarfile
import time
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from plumbing.console import InputError
from plumbing.sources import Shards
from tests.common import ROOT
from tests.samples import picture
from tools import prepare_stage1
from vision import load_image

ODD = 'tab\there, "quotes", line\nbreak, é, 猫, \'\\'


class Web(BaseHTTPRequestHandler):
    """/KIND/N: a picture, or one of the ways in which a download fails."""

    def do_GET(self):
        kind = self.path.split("/")[1]
        if kind == "slow":
            time.sleep(9)
        failures = {"html": b"<html>gone</html>", "broken": picture()[:200]}
        body = failures.get(kind, picture())
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
    kinds = (["ok"] * 16 + ["404", "slow", "html", "broken"]) * 3
    entries = [
        {"url": f"{web}/{kind}/{i}", "caption": f"{i}: {ODD}"}
        for i, kind in enumerate(kinds)
    ]
    incomplete = [{"url": "", "caption": "x"}, {"url": "http://x"}]
    src = write_json(tmp_path / "ccs.json", [*incomplete, *entries])
    dst = tmp_path / "shards"
    options = ["--processes=1", "--threads=8", "--timeout=3", "--shard_size=20"]
    prepare_stage1.main([src, str(dst), "--run", *options])
    said = capfd.readouterr().out
    for line in (
        "60 pictures; left out: 1 without url, 1 without caption",
        "3 shards, 48 samples",
        "12 of 60 downloads failed (20.0%)",
        "3  HTTP Error 404",
        "timed out",
        "suspicious shards: none",
    ):
        assert line in said, line
    samples = json.loads((dst / "index.json").read_text())["samples"]
    assert samples == {"00000.tar": 16, "00001.tar": 16, "00002.tar": 16}

    source = Shards(sorted(map(str, dst.glob("*.tar"))))
    assert source.counts == [16, 16, 16]
    samples = [source[shard, row] for shard in range(3) for row in range(16)]
    odd = ODD.replace("\n", " ")
    good = {f"{i}: {odd}" for i, kind in enumerate(kinds) if kind == "ok"}
    assert {sample.caption for sample in samples} == good
    for sample in samples:
        assert load_image(sample.images[0].read(), 224).shape == (3, 224, 224)

    # Again: finished shards are kept, and index.json is not in the way.
    prepare_stage1.main([src, str(dst), "--run", *options])
    assert "3 shards, 48 samples" in capfd.readouterr().out


def read_csv(path):
    csv = pytest.importorskip("pyarrow.csv")
    return csv.read_csv(path, parse_options=csv.ParseOptions(delimiter="\t"))


def read_parquet(path):
    return pytest.importorskip("pyarrow.parquet").read_table(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "ending, read, line_break",
    [
        pytest.param("tsv", read_csv, " ", id="tsv"),
        pytest.param("parquet", read_parquet, "\n", id="parquet"),
    ],
)
def test_captions_survive_the_list_as_img2dataset_reads_it(
    tmp_path, ending, read, line_break
):
    pytest.importorskip("pyarrow")
    captions = [ODD, '"', "''", '"a" b', " x ", "NULL", "5", "\ud800"] * 1000
    urls = [f"http://x/{i}" for i in range(len(captions))]
    rows = zip(urls, captions)
    entries = [{"url": url, "caption": caption} for url, caption in rows]
    src = write_json(tmp_path / "a.json", entries)
    listed = tmp_path / f"a.{ending}"
    prepare_stage1.main([src, str(tmp_path / "out"), f"--list={listed}"])
    table = read(listed)
    # A lone surrogate cannot be written.
    want = [c.replace("\n", line_break).replace("\ud800", "?") for c in captions]
    assert table["caption"].to_pylist() == want
    assert table["url"].to_pylist() == urls


def entries_of(path):
    return list(prepare_stage1.read_entries(str(path)))


@pytest.mark.slow
@pytest.mark.parametrize("indent", [None, 2])
def test_the_entries_are_the_same_wherever_a_chunk_ends(tmp_path, monkeypatch, indent):
    entries = [7, "text", []]
    for i in range(40):
        odd = {"caption": 'é"\\' * (i % 7), "n": [i, None, {"a": -1.5e3}]}
        entries.append({"url": f"http://x/{i}"} | odd)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(entries, indent=indent) + "\n")
    for chunk in (1, 2, 3, 7, 50, 2**20):
        monkeypatch.setattr(prepare_stage1, "CHUNK", chunk)
        assert entries_of(path) == entries


def test_a_list_may_be_empty(tmp_path):
    (tmp_path / "none.json").write_text(" [ ] ")
    assert entries_of(tmp_path / "none.json") == []


@pytest.mark.slow
def test_memory_does_not_grow_with_the_list(tmp_path):
    entry = json.dumps({"url": "http://x", "caption": "y" * 150})
    path = tmp_path / "large.json"
    path.write_text("[" + ",\n".join([entry] * 110_000) + "]")
    assert path.stat().st_size > 20e6
    tracemalloc.start()
    n = sum(1 for _ in prepare_stage1.read_entries(str(path)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert n == 110_000
    assert peak < 8e6


WHOLE = '{"url": "a", "caption": "b"}'


@pytest.mark.parametrize(
    "content, words",
    [
        pytest.param(
            f'[{WHOLE}, {{"url": "c", "cap',
            "entry 2, which begins at character 30",
            id="cut",
        ),
        pytest.param(
            f'[{WHOLE} {{"url"',
            "entry 1, which begins at character 1",
            id="without_comma",
        ),
        pytest.param(f"[{WHOLE}", "entry 1", id="without_end"),
        pytest.param("[", "entry 1", id="bracket"),
        pytest.param(WHOLE, "does not begin with", id="object"),
        pytest.param("", "does not begin with", id="empty"),
        pytest.param("[" * 10_000, "entry 1", id="deep"),
    ],
)
@pytest.mark.parametrize("chunk", [7, 2**20])
def test_a_broken_list_is_one_line_that_says_where(
    tmp_path, monkeypatch, content, words, chunk
):
    monkeypatch.setattr(prepare_stage1, "CHUNK", chunk)
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(InputError, match=words):
        prepare_stage1.main([str(path), str(tmp_path / "shards")])
    assert list(tmp_path.iterdir()) == [path]  # no half-written list


def test_the_command_is_that_of_the_original(tmp_path, capsys):
    src = write_json(tmp_path / "a.json", [{"url": "http://x", "caption": "y"}])
    dst = f"{tmp_path}/cc_sbu_dataset"
    for _ in range(2):  # the second time the list exists
        prepare_stage1.main([src, dst])
        said = capsys.readouterr().out
        for words in (
            f"img2dataset --url_list {dst}.tsv --input_format tsv ",
            "--url_col url --caption_col caption --output_format webdataset ",
            f"--output_folder {dst} --image_size 224 ",
        ):
            assert words in said
    assert "exists already" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([], id="none"),
        pytest.param(["check"], id="check"),
        pytest.param(["none.json", "x"], id="source"),
        pytest.param(["check", "nowhere"], id="folder"),
        pytest.param(["requirements.txt", "x", "--list=x.csv"], id="list"),
        pytest.param(["requirements.txt", "x", "--threads=0"], id="threads"),
    ],
)
def test_usage_errors_give_one_line_and_status_2(arguments):
    done = subprocess.run(
        [sys.executable, "tools/prepare_stage1.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")


def write_shard(path, n, stats=None):
    with tarfile.open(path, "w") as tar:
        for i in range(n):
            for kind, content in (("jpg", picture()), ("txt", b"a dog")):
                member = tarfile.TarInfo(f"{i:09d}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    if stats is not None:
        path.with_name(f"{path.stem}_stats.json").write_text(json.dumps(stats))


def test_suspicious_shards_are_named(tmp_path, capsys):
    causes = {"success": 10, "HTTP Error 404: Not Found": 2}
    ok = {"count": 12, "successes": 10, "status_dict": causes}
    for number in (0, 1, 2, 9, 12):
        write_shard(tmp_path / f"{number:05d}.tar", 10, ok)
    write_shard(tmp_path / "00004.tar", 3, ok | {"successes": 3})
    write_shard(tmp_path / "00005.tar", 0, ok | {"successes": 0})
    write_shard(tmp_path / "00006.tar", 10)
    write_shard(tmp_path / "00007.tar", 9, ok)
    write_shard(tmp_path / "00013.tar", 10, ok | {"count": "many"})
    (tmp_path / "00008.tar").write_text("<html>404</html>")
    prepare_stage1.main(["check", str(tmp_path)])
    said = capsys.readouterr().out
    for line in (
        "11 shards, 82 samples",
        "16 of 96 downloads failed (16.7%)",
        "16  HTTP Error 404: Not Found",
        "suspicious shards: 7",
        "00004.tar: only 3 samples; the median is 10",
        "00005.tar: no samples",
        "00006.tar: no 00006_stats.json: img2dataset has not finished it",
        "00007.tar: 00007_stats.json says 10 samples, the tar file has 9",
        "00008.tar: unreadable (",
        "00013.tar: 00013_stats.json is unreadable (",
        "missing: 00003.tar, 00010.tar to 00011.tar",
    ):
        assert line in said, line
    samples = json.loads((tmp_path / "index.json").read_text())["samples"]
    assert samples["00008.tar"] == 0
    assert samples["00007.tar"] == 9
