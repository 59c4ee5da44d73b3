"""A training step of the projection, beside the same step of BLIP-2 of `transformers` with the same weights.

    python tools/bench.py train [--size=medium|full|small] [--grow=True] [--peer=False] [--steps=10]

Ours is train.py's own train_step. Both sides run in processes of their own, in turn, `rounds` times, and the
median of all steps counts; memory is a process's peak. `limit` is what the matrix products of the step alone
would allow: the FLOP/s of a large product in that dtype, measured in the same run, over the model's FLOPs;
so vs_limit is the model FLOPs utilisation. --grow=True measures ours alone, for batch sizes, lengths of
captions, and processes.
"""

import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from configs.schema import InputError, read_saved_config
from data import Batch
from llama import IGNORE, IMAGE, LlamaConfig
from model import MiniGPT4, save_tensors
from qformer import QFormerConfig
from tools import bench_chat
from tools.dry_run import meta_model
from tools.meter import matmul_peak, model_flops
from train import build, make_optimizer, train_step
from vision import VisionConfig, normalize

SIZES = {
    "small": bench_chat.SIZES["small"],
    "medium": (VisionConfig(width=768, n_layers=12, n_heads=12, mlp_hidden=3072, patch_size=14),
               QFormerConfig(vision_width=768),
               LlamaConfig(hidden_size=1024, intermediate_size=2816, num_hidden_layers=12,
                           num_attention_heads=16, num_key_value_heads=16, head_dim=64)),
    "full": (VisionConfig(), QFormerConfig(),  # beside TinyLlama-1.1B
             LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
                         num_attention_heads=32, num_key_value_heads=4, head_dim=64)),
}


@dataclass(frozen=True)
class Options:
    size: str = "medium"
    folder: str = "out/bench"  # where the random weights are
    steps: int = 10            # of each row and side, in all
    rounds: int = 2            # in which both sides take turns
    peer: bool = True          # measure transformers as well
    grow: bool = False         # how the cost grows, instead of the rows beside the peer

    def __post_init__(self):
        if self.size not in SIZES or not 1 <= self.rounds <= self.steps:
            raise InputError(f"--size={self.size} --steps={self.steps} --rounds={self.rounds}: sizes are "
                             f"{', '.join(SIZES)}, and every round needs a step")


@dataclass(frozen=True)
class Case:
    """What one process measures."""

    folder: str
    side: str = "ours"
    dtype: str = "bfloat16"
    batch_size: int = 8
    length: int = 12           # tokens of a caption
    compile: bool = False
    grad_checkpoint: bool = False
    cached: bool = False       # features instead of pictures
    steps: int = 5
    processes: int = 1

    def name(self, size: str) -> str:
        """The row's label: "medium bf16 b32 checkpointed"."""
        words = [size, {"bfloat16": "bf16", "float32": "fp32"}[self.dtype], f"b{self.batch_size}"]
        words += [f"{self.length} tokens"] * (self.length != 12) + ["compiled"] * self.compile
        words += ["checkpointed"] * self.grad_checkpoint + ["cached features"] * self.cached
        return " ".join(words + [f"{self.processes} processes"] * (self.processes > 1))


# ---- one process -------------------------------------------------------------------------------------------


def make_batch(model: MiniGPT4, case: Case) -> Batch:
    """Random pictures, each with a caption of `length` tokens."""
    generator = torch.Generator().manual_seed(0)
    size, n = model.image_shape
    images = torch.randint(0, 256, (case.batch_size, 3, size, size), generator=generator, dtype=torch.uint8)
    caption = torch.randint(3, model.llama.config.vocab_size - 1, (case.batch_size, case.length),
                            generator=generator)
    before = torch.tensor([[1] + [IMAGE] * n]).expand(case.batch_size, -1)
    tokens = torch.cat((before, caption), dim=1)
    return Batch(images, tokens, torch.cat((torch.full_like(before, IGNORE), caption), dim=1))


def our_step(case: Case):
    """A function that makes one step and returns its loss; the FLOPs of that step."""
    run = read_saved_config(f"{case.folder}/ours")
    config = replace(run, dtype=case.dtype, compile=case.compile, grad_checkpoint=case.grad_checkpoint)
    model, device = build(config, torch.device("cpu")), torch.device("cpu")
    batch = make_batch(model, case)
    if case.cached:
        with torch.no_grad():
            batch = batch._replace(images=model.image_features(batch.images))
        model.vision = model.ln_vision = model.qformer = None
    costs = model_flops(model, config.train)
    parameters = {k: p for k, p in model.named_parameters() if p.requires_grad}
    optimizer, scaler = make_optimizer(parameters, config), torch.amp.GradScaler("cpu", enabled=False)
    wrapped = DistributedDataParallel(model, init_sync=False) if case.processes > 1 else model

    def step():
        loss = train_step(wrapped, [batch], optimizer, scaler, parameters, config, 1e-4, device)
        if case.processes > 1:
            torch.distributed.all_reduce(loss)
        return loss
    return step, sum(n * cost for n, cost in zip((case.batch_size, batch.n_tokens, batch.n_targets), costs))


def peer_step(case: Case):
    """The same of transformers."""
    from transformers import Blip2ForConditionalGeneration
    dtype, ours = getattr(torch, case.dtype), read_saved_config(f"{case.folder}/ours")
    batch = make_batch(meta_model(ours)[0], case)
    model = Blip2ForConditionalGeneration.from_pretrained(f"{case.folder}/peer", dtype=dtype).eval()
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("language_projection"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = batch.tokens.where(batch.tokens != IMAGE, model.config.image_token_index)

    def step():
        images = normalize(batch.images).to(dtype)
        loss = model(pixel_values=images, input_ids=ids, labels=batch.targets).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()
    return step, 0


def measure(case: Case):
    """Print as JSON: seconds of each step, the first loss, FLOPs of a step, peak memory in MiB."""
    if case.processes > 1:
        torch.distributed.init_process_group("gloo")
    step, flops = our_step(case) if case.side == "ours" else peer_step(case)
    losses, seconds = [step().item()], []
    step()  # compiled, the first two are slow
    for _ in range(case.steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if case.processes == 1 or torch.distributed.get_rank() == 0:
        print(json.dumps({"seconds": seconds, "loss": losses[0], "flops": flops, "peak_mib": peak}))


# ---- the rows ----------------------------------------------------------------------------------------------


def make_peer(folder: Path, ours: Path):
    """A folder for transformers' BLIP-2 with the weights of ours."""
    from transformers import Blip2Config
    run = read_saved_config(str(ours))
    model = MiniGPT4.from_files(run.vision, run.qformer, run.llama, run.proj, "bfloat16")
    v, q, llama = model.vision.config, model.qformer.config, model.llama.config
    config = Blip2Config(
        vision_config=dict(hidden_size=v.width, intermediate_size=v.mlp_hidden, num_hidden_layers=v.n_layers,
                           num_attention_heads=v.n_heads, image_size=v.image_size, patch_size=v.patch_size),
        qformer_config=dict(hidden_size=q.width, intermediate_size=q.ffn_hidden, num_hidden_layers=q.n_layers,
                            num_attention_heads=q.n_heads, encoder_hidden_size=q.vision_width,
                            cross_attention_frequency=q.cross_attention_every),
        text_config=llama.to_hub(), num_query_tokens=q.n_queries, image_token_index=llama.vocab_size - 1)
    ours = dict(model.named_parameters())
    for i in range(v.n_layers):  # theirs is one bias, with zeros for the keys
        at = f"vision.blocks.{i}.attn"
        q_bias, v_bias = ours.pop(f"{at}.q_bias"), ours.pop(f"{at}.v_bias")
        ours[f"{at}.qkv.bias"] = torch.cat((q_bias, torch.zeros_like(q_bias), v_bias))
    tensors = {}
    for name, t in ours.items():
        for pattern, theirs in PEER_NAMES:
            name = re.sub(pattern, theirs, name)
        tensors[name] = t
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    save_tensors(tensors, folder / "model.safetensors", {"format": "pt"})


PEER_NAMES = (  # ours -> theirs, applied one after the other
    (r"^vision\.(cls_token)", "vision_model.embeddings.class_embedding"),
    (r"^vision\.(pos_embed)", "vision_model.embeddings.position_embedding"),
    (r"^vision\.patch_embed\.proj", "vision_model.embeddings.patch_embedding"),
    (r"^vision\.blocks\.(\d+)\.norm", r"vision_model.encoder.layers.\1.layer_norm"),
    (r"^vision\.blocks\.(\d+)\.attn\.proj", r"vision_model.encoder.layers.\1.self_attn.projection"),
    (r"^vision\.blocks\.(\d+)\.attn", r"vision_model.encoder.layers.\1.self_attn"),
    (r"^vision\.blocks", "vision_model.encoder.layers"),
    (r"^ln_vision", "vision_model.post_layernorm"),
    (r"^qformer\.query_tokens", "query_tokens"),
    (r"^qformer\.norm", "qformer.layernorm"),
    (r"^qformer\.layers\.(\d+)\.fc1", r"qformer.encoder.layer.\1.intermediate_query.dense"),
    (r"^qformer\.layers\.(\d+)\.fc2", r"qformer.encoder.layer.\1.output_query.dense"),
    (r"^qformer\.layers\.(\d+)\.norm", r"qformer.encoder.layer.\1.output_query.LayerNorm"),
    (r"^qformer\.layers", "qformer.encoder.layer"),
    (r"self_attn\.(query|key|value)\.", r"attention.attention.\1."),
    (r"cross_attn\.(query|key|value)\.", r"crossattention.attention.\1."),
    (r"self_attn\.out\.", "attention.output.dense."), (r"self_attn\.norm\.", "attention.output.LayerNorm."),
    (r"cross_attn\.out\.", "crossattention.output.dense."),
    (r"cross_attn\.norm\.", "crossattention.output.LayerNorm."),
    (r"^proj\.", "language_projection."),
    (r"^llama\.lm_head", "language_model.lm_head"),
    (r"^llama\.", "language_model.model."),
)


def run(case: Case) -> dict:
    """What `measure` prints, in a process of its own."""
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(case.processes)]
    command = [sys.executable, *(start if case.processes > 1 else []), __file__, json.dumps(asdict(case))]
    threads = torch.get_num_threads() // case.processes
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": str(max(1, threads))})
    if done.returncode:
        raise InputError(f"{case}: failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def as_peer(case: Case) -> Case:
    """What transformers is measured at beside a case of ours: eager, as users get it."""
    return replace(case, side="peer", compile=False, grad_checkpoint=False)


def cases(folder: str, options: Options) -> list[Case]:
    """Of our side, the rows of the table."""
    case = Case(folder, steps=-(-options.steps // options.rounds))
    if options.grow:
        return ([replace(case, batch_size=n) for n in (1, 2, 4, 8, 16, 32)] +
                [replace(case, length=n) for n in (25, 50, 100, 160)] +
                [replace(case, length=n, cached=True) for n in (12, 100)] +
                [replace(case, batch_size=4, processes=2)])
    if options.size == "full":
        return [case]
    sizes = (8, 32) if options.size == "medium" else (2,)
    rows = [replace(case, batch_size=n, compile=c) for n in sizes for c in (False, True)]
    if options.size == "medium":
        rows += [replace(case, batch_size=32, grad_checkpoint=True), replace(case, dtype="float32")]
    return rows


def bench(options: Options) -> list[dict]:
    """The rows of the table."""
    folder = Path(options.folder).resolve() / f"train_{options.size}"
    if not (folder / "ours/config.json").is_file():
        bench_chat.make_ours(folder / "ours", SIZES[options.size])
    peers = options.peer and not options.grow
    if peers:
        bench_chat.needs_transformers()
        if not (folder / "peer/config.json").is_file():
            make_peer(folder / "peer", folder / "ours")
    found: dict[Case, list[dict]] = {}
    peaks: dict[str, list[float]] = {}
    for n in range(options.rounds):
        for case in cases(str(folder), options):
            peer = as_peer(case)
            for c in [case] + [peer] * (peers and len(found.get(peer, [])) == n):
                found.setdefault(c, []).append(run(c))
                peak = matmul_peak(torch.device("cpu"), getattr(torch, c.dtype))
                peaks.setdefault(c.dtype, []).append(peak)
                result = found[c][-1]
                print(f"{c.side} {c.name(options.size)}: {statistics.median(result['seconds']):.3f} s, loss "
                      f"{result['loss']:.4f}, {result['peak_mib']:.0f} MiB, peak {peak / 1e9:.0f} GFLOP/s",
                      file=sys.stderr)
    rows = []
    for case in cases(str(folder), options):
        seconds = lambda c: statistics.median(s for r in found[c] for s in r["seconds"])
        images = lambda c: c.batch_size * c.processes / seconds(c)
        memory = lambda c: max(r["peak_mib"] for r in found[c])
        limit = case.batch_size / (found[case][0]["flops"] / statistics.median(peaks[case.dtype]))
        row = {"name": case.name(options.size), "unit": "images/s", "ours": images(case), "limit": limit,
               "vs_limit": images(case) / limit, "seconds": seconds(case), "peak_mib": memory(case),
               "peak_tflops": statistics.median(peaks[case.dtype]) / 1e12}
        if peers:
            peer = as_peer(case)
            row |= {"peer": images(peer), "peer_name": "transformers BLIP-2",
                    "vs_peer": images(case) / images(peer), "peer_peak_mib": memory(peer),
                    "loss": found[case][0]["loss"], "peer_loss": found[peer][0]["loss"]}
        rows.append(row)
    return rows


if __name__ == "__main__":
    measure(Case(**json.loads(sys.argv[1])))
