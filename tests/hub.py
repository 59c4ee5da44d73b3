"""Small random models under real names, and a server that answers as huggingface.co."""

import hashlib
import json
import re
import shutil
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file

from llama import Llama, LlamaConfig
from qformer import QFormerConfig
from tests import random_weights
from tests.common import GOLDEN
from tests.families import write_tokenizer
from tools import convert
from vision import VisionConfig

COMMIT = "0123456789" * 4
BLIP2 = "Salesforce/blip2-flan-t5-xxl"
VICUNA = "Vision-CAIR/vicuna-7b"
MIRROR = "ckpt/minigpt4-7B"
LLAMA2 = "meta-llama/Llama-2-7b-chat-hf"
TINYLLAMA = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
QWEN3 = "Qwen/Qwen3-1.7B"
PROJ = "prerained_minigpt4_7b.pth"
SIZES = dict(
    vocab_size=600,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
TO_HUB = {theirs: hub for hub, theirs in convert.BLIP2_NAMES.items()}


# ---- LLaMA ---------------------------------------------------------------------------


def random_llama(seed=0, **sizes):
    """(config.json's content, tensors under Hugging Face's names)."""
    config = LlamaConfig(**SIZES | sizes)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in convert.parameter_shapes(Llama, config).items():
        tensors[convert.hub_name(name)] = torch.randn(shape, generator=generator)
    return {"model_type": "llama"} | vars(config), tensors


def hub_folder(folder, sizes, tensors, shards=1, ending="safetensors"):
    """A Hugging Face folder with its weights in so many files."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(sizes))
    shutil.copyfile(GOLDEN / "tokenizer/tokenizer.model", folder / "tokenizer.model")
    stem = "model" if ending == "safetensors" else "pytorch_model"
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"{stem}.{ending}"
        if shards > 1:
            file = f"{stem}-{i + 1:05d}-of-{shards:05d}.{ending}"
        own = {name: tensors[name] for name in names[i::shards]}
        if ending == "safetensors":
            save_file(own, folder / file)
        else:
            torch.save(own, folder / file)
        weight_map |= dict.fromkeys(own, file)
    if shards > 1:
        write_index(folder / f"{stem}.{ending}.index.json", weight_map)
    return folder


def write_index(path, weight_map):
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# ---- the parts of MiniGPT-4 ----------------------------------------------------------


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
        name: random_weights.random_tensor(name, shape, generator, torch.float32)
        for name, shape in shapes.items()
        if "word_embeddings" not in name and "t5_proj" not in name
    }


def blip2_names(tensors, key_bias=0.0):
    """Tensors under original names -> under the hub's, biases of q, k, v joined."""
    renamed = {}
    for name, tensor in tensors.items():
        if name.endswith("q_bias"):
            v_bias = tensors[name.replace("q_bias", "v_bias")]
            k_bias = torch.full_like(tensor, key_bias)
            tensor = torch.cat((tensor, k_bias, v_bias))
            name = name.replace("q_bias", "qkv.bias")
        if not name.endswith("v_bias"):
            renamed[convert.rename(name, TO_HUB)] = tensor.contiguous()
    return renamed


def write_shards(folder: Path, shards: dict[str, dict[str, torch.Tensor]], config):
    """A BLIP-2 folder of {file: its tensors}."""
    folder.mkdir(parents=True)
    weight_map = {}
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    write_index(folder / "model.safetensors.index.json", weight_map)
    (folder / "config.json").write_text(json.dumps(config))


BLIP2_CONFIG = {
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


def write_blip2(folder: Path):
    """Three shards; the third holds the language model alone."""
    vision = {f"visual_encoder.{k}": t for k, t in official("vision").items()}
    not_in_blip2 = re.compile(r"visual_encoder\.(blocks\.39|norm)\.")
    tensors = {
        name: tensor
        for name, tensor in (vision | official("qformer")).items()
        if not not_in_blip2.match(name)
    }
    first, second = {}, {}
    for name, tensor in blip2_names(tensors).items():
        shard = second if name.startswith("qformer") else first
        shard[name] = tensor
    third = {
        "language_model.shared.weight": torch.ones(2, 2),
        "language_projection.weight": torch.ones(2, 24),
    }
    shards = {
        f"model-0000{i}-of-00003.safetensors": shard
        for i, shard in enumerate((first, second, third), 1)
    }
    write_shards(folder, shards, BLIP2_CONFIG)


def write_repos(root: Path):
    """All repos that get_weights.py knows, but Vicuna-13B."""
    write_blip2(root / BLIP2)
    hub_folder(root / VICUNA, *random_llama(), shards=2, ending="bin")
    hub_folder(root / LLAMA2, *random_llama(seed=1), shards=2)
    hub_folder(root / TINYLLAMA, *random_llama(seed=2))
    qwen3 = random_llama(
        3, model_type="qwen3", vocab_size=420, tie_word_embeddings=True
    )
    folder = hub_folder(root / QWEN3, *qwen3)
    (folder / "tokenizer.model").unlink()
    write_tokenizer(folder, "qwen3")
    (root / MIRROR).mkdir(parents=True)
    torch.save({"model": official("proj")}, root / MIRROR / PROJ)


# ---- the server ----------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """Serves root/OWNER/NAME/FILE.

    `requests` lists (method, repo/file, first byte, token).
    """

    daemon_threads = True

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.requests = []
        self.gated = set()  # repos
        self.missing = set()  # repo/file
        # {repo/file: bytes after which the download breaks off}; None: it is down
        self.cut: dict[str, int | None] = {}
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
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.split("?")[0]
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/.*)?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/(?:main|[0-9a-f]{40})/(.+)", path)
        if api:
            self.api(api[1], api[2] or "")
        elif file:
            self.resolve(file[1], file[2])
        elif path.startswith("/cdn/"):
            self.cdn(path.removeprefix("/cdn/"))
        else:
            self.answer(404)

    do_HEAD = do_GET

    def refused(self, repo: str) -> bool:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        # The hub does not tell which private repos exist.
        if not (self.server.root / repo).is_dir():
            self.answer(
                401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found"
            )
            return True
        if repo in self.server.gated and token != "hf_good":
            self.answer(
                403 if token else 401,
                X_Error_Code="GatedRepo",
                X_Error_Message=f"Access to model {repo} is restricted.",
            )
            return True
        return False

    def api(self, repo: str, rest: str):
        if self.refused(repo):
            return
        files = sorted((self.server.root / repo).iterdir())
        content = {
            "id": repo,
            "modelId": repo,
            "sha": COMMIT,
            "private": False,
            "tags": [],
            "downloads": 0,
            "siblings": [{"rfilename": file.name} for file in files],
        }
        if rest.startswith("/tree/"):
            content = [
                {
                    "type": "file",
                    "path": file.name,
                    "size": file.stat().st_size,
                    "oid": COMMIT,
                }
                for file in files
            ]
        body = json.dumps(content).encode()
        self.answer(200, body, Content_Type="application/json")

    def resolve(self, repo: str, file: str):
        """Small files at once; large ones are on a host of another name, a CDN."""
        hub = self.server
        name = f"{repo}/{file}"
        path = hub.root / name
        token = self.headers.get("Authorization", "")
        hub.requests.append((self.command, name, self.first, token))
        if self.refused(repo):
            return
        if name in hub.missing or not path.is_file():
            self.answer(
                404,
                X_Error_Code="EntryNotFound",
                X_Error_Message="Entry not found",
                X_Repo_Commit=COMMIT,
            )
        elif file.endswith((".bin", ".pth", ".safetensors", ".model")):
            self.answer(
                302,
                Location=f"http://localhost:{hub.server_port}/cdn/{name}",
                X_Repo_Commit=COMMIT,
                X_Linked_Size=str(path.stat().st_size),
                X_Linked_ETag=etag(path),
                ETag='"of-the-answer"',
            )
        else:
            self.send(path, X_Repo_Commit=COMMIT)

    @property
    def first(self) -> int:
        """The first byte that is asked for: "bytes=FIRST-"."""
        return int(re.sub(r"\D", "", self.headers.get("Range", "")) or 0)

    def send(self, path: Path, **headers):
        content = path.read_bytes()
        if self.first:
            last, size = len(content) - 1, len(content)
            headers["Content_Range"] = f"bytes {self.first}-{last}/{size}"
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
            self.send(hub.root / name)
        elif hub.cut[name] is None:
            self.answer(503)
        else:
            content = (hub.root / name).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: hub.cut[name]])
            self.close_connection = True
            hub.cut[name] = None


def etag(path: Path) -> str:
    return f'"{hashlib.sha256(path.read_bytes()).hexdigest()}"'
