"""A server on the loopback that answers as huggingface.co does, and small random models under real names."""

import hashlib
import json
import re
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file

from llama import LlamaConfig
from qformer import QFormerConfig
from tests import random_weights
from tests.test_convert import SIZES, TO_HUB, hub_folder, random_llama
from tools import convert
from vision import VisionConfig

COMMIT = "0123456789" * 4
BLIP2, VICUNA, MIRROR = (
    "Salesforce/blip2-flan-t5-xxl",
    "Vision-CAIR/vicuna-7b",
    "ckpt/minigpt4-7B",
)
LLAMA2, TINYLLAMA = (
    "meta-llama/Llama-2-7b-chat-hf",
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
)
PROJ = "prerained_minigpt4_7b.pth"

# ---- the models --------------------------------------------------------------------------------------------


def official(part: str) -> dict[str, torch.Tensor]:
    """The tensors of an official file, tiny ones; the vision part's without prefix."""
    sizes = {
        "VisionConfig": partial(VisionConfig, width=16, n_heads=16, mlp_hidden=32),
        "QFormerConfig": partial(
            QFormerConfig,
            width=24,
            n_heads=12,
            n_layers=4,
            ffn_hidden=32,
            vision_width=16,
        ),
    }
    with mock.patch.multiple(random_weights, **sizes):
        shapes = random_weights.official_shapes(part, LlamaConfig(**SIZES))
    generator = torch.Generator().manual_seed(len(part))
    return {
        k: random_weights.random_tensor(k, shape, generator, torch.float32)
        for k, shape in shapes.items()
        if "word_embeddings" not in k and "t5_proj" not in k
    }


def write_blip2(folder: Path):
    """Three shards; the third holds the language model alone."""
    folder.mkdir(parents=True)
    tensors = {
        f"visual_encoder.{k}": t for k, t in official("vision").items()
    } | official("qformer")
    last = re.compile(r"visual_encoder\.(blocks\.39|norm)\.")
    tensors = {k: t for k, t in tensors.items() if not last.match(k)}
    for k in [k for k in tensors if k.endswith("q_bias")]:
        q, v = tensors.pop(k), tensors.pop(k.replace("q_bias", "v_bias"))
        tensors[k.replace("q_bias", "qkv.bias")] = torch.cat(
            (q, torch.zeros_like(q), v)
        )
    tensors = {convert.rename(k, TO_HUB): t.contiguous() for k, t in tensors.items()}
    files = {
        "model-00001-of-00003.safetensors": ("vision_model", "query_tokens"),
        "model-00002-of-00003.safetensors": ("qformer",),
    }
    shards = {
        file: {k: t for k, t in tensors.items() if k.startswith(starts)}
        for file, starts in files.items()
    }
    shards["model-00003-of-00003.safetensors"] = {
        "language_model.shared.weight": torch.ones(2, 2),
        "language_projection.weight": torch.ones(2, 24),
    }
    for file, shard in shards.items():
        save_file(shard, folder / file)
    index = {
        "metadata": {},
        "weight_map": {k: file for file, shard in shards.items() for k in shard},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "blip-2",
                "architectures": ["Blip2ForConditionalGeneration"],
                "num_query_tokens": 32,
                "vision_config": {
                    "model_type": "blip_2_vision_model",
                    "hidden_size": 16,
                    "num_attention_heads": 16,
                    "num_hidden_layers": 39,
                    "intermediate_size": 32,
                    "patch_size": 14,
                    "image_size": 224,
                    "layer_norm_eps": 1e-6,
                    "hidden_act": "gelu",
                    "qkv_bias": True,
                },
                "qformer_config": {
                    "model_type": "blip_2_qformer",
                    "hidden_size": 24,
                    "num_attention_heads": 12,
                    "num_hidden_layers": 4,
                    "intermediate_size": 32,
                    "encoder_hidden_size": 16,
                    "cross_attention_frequency": 2,
                },
                "text_config": {
                    "model_type": "t5",
                    "d_model": 4096,
                    "d_ff": 10240,
                    "num_layers": 24,
                    "num_heads": 64,
                    "feed_forward_proj": "gated-gelu",
                    "vocab_size": 32128,
                },
            }
        )
    )


def write_repos(root: Path):
    """All repos that get_weights.py knows, but Vicuna-13B."""
    write_blip2(root / BLIP2)
    hub_folder(root / VICUNA, *random_llama(), shards=2, ending="bin")
    hub_folder(root / LLAMA2, *random_llama(seed=1), shards=2)
    hub_folder(root / TINYLLAMA, *random_llama(seed=2))
    (root / MIRROR).mkdir(parents=True)
    torch.save({"model": official("proj")}, root / MIRROR / PROJ)


# ---- the server --------------------------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """Serves root/OWNER/NAME/FILE. `requests` lists (method, repo/file, first byte, token)."""

    daemon_threads = True

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.requests = root, []
        self.gated, self.missing = set(), set()  # repos; repo/file
        self.cut: dict[
            str, int
        ] = {}  # {repo/file: bytes after which it breaks off, then is down}
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def fetched(self) -> list[str]:
        """What was downloaded, in order."""
        return [name for method, name, *_ in self.requests if method == "GET"]

    def __exit__(self, *args):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status: int, body: bytes = b"", **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for k, v in headers.items():
            self.send_header(k.replace("_", "-"), v)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.split("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/.*)?", path):
            return self.api(match[1], match[2] or "")
        if match := re.fullmatch(
            r"/([^/]+/[^/]+)/resolve/(main|[0-9a-f]{40})/(.+)", path
        ):
            return self.resolve(match[1], match[3])
        if path.startswith("/cdn/"):
            return self.cdn(path.removeprefix("/cdn/"))
        self.answer(404)

    do_HEAD = do_GET

    def refused(self, repo: str) -> bool:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not (
            self.server.root / repo
        ).is_dir():  # so that nobody learns which private repos there are
            self.answer(
                401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found"
            )
        elif repo in self.server.gated and token != "hf_good":
            self.answer(
                403 if token else 401,
                X_Error_Code="GatedRepo",
                X_Error_Message=f"Access to model {repo} is restricted.",
            )
        else:
            return False
        return True

    def api(self, repo: str, rest: str):
        if not self.refused(repo):
            files = sorted((self.server.root / repo).iterdir())
            info = {
                "id": repo,
                "modelId": repo,
                "sha": COMMIT,
                "private": False,
                "tags": [],
                "downloads": 0,
                "siblings": [{"rfilename": p.name} for p in files],
            }
            tree = [
                {
                    "type": "file",
                    "path": p.name,
                    "size": p.stat().st_size,
                    "oid": COMMIT,
                }
                for p in files
            ]
            self.answer(
                200,
                json.dumps(tree if rest.startswith("/tree/") else info).encode(),
                Content_Type="application/json",
            )

    def resolve(self, repo: str, file: str):
        """Small files at once; large ones are on a CDN, that is a host of another name, without token."""
        hub, name = self.server, f"{repo}/{file}"
        path, is_large = (
            hub.root / name,
            file.endswith((".bin", ".pth", ".safetensors", ".model")),
        )
        hub.requests.append(
            (self.command, name, self.first, self.headers.get("Authorization", ""))
        )
        if self.refused(repo):
            return
        if name in hub.missing or not path.is_file():
            return self.answer(
                404,
                X_Error_Code="EntryNotFound",
                X_Error_Message="Entry not found",
                X_Repo_Commit=COMMIT,
            )
        if not is_large:
            return self.send(path, X_Repo_Commit=COMMIT)
        self.answer(
            302,
            Location=f"http://localhost:{hub.server_port}/cdn/{name}",
            X_Repo_Commit=COMMIT,
            X_Linked_Size=str(path.stat().st_size),
            X_Linked_ETag=etag(path),
            ETag='"of-the-answer"',
        )

    @property
    def first(self) -> int:
        """The first byte that is asked for: "bytes=FIRST-"."""
        return int(re.sub(r"\D", "", self.headers.get("Range", "")) or 0)

    def send(self, path: Path, **headers):
        content = path.read_bytes()
        if self.first:
            headers["Content_Range"] = (
                f"bytes {self.first}-{len(content) - 1}/{len(content)}"
            )
        self.answer(
            206 if self.first else 200,
            content[self.first :],
            ETag=etag(path),
            Accept_Ranges="bytes",
            **headers,
        )

    def cdn(self, name: str):
        hub = self.server
        assert "Authorization" not in self.headers
        if name not in hub.cut:
            return self.send(hub.root / name)
        if hub.cut[name] is None:
            return self.answer(503)
        content = (hub.root / name).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: hub.cut[name]])
        self.close_connection, hub.cut[name] = True, None


def etag(path: Path) -> str:
    return f'"{hashlib.sha256(path.read_bytes()).hexdigest()}"'
