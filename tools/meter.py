"""How fast a run is: what its steps cost in FLOPs, what the device can do, and a profile. For train.py."""

import sys
import time
from pathlib import Path

import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from configs.schema import Config
from data import Batch
from model import MiniGPT4
from vision import normalize


def model_flops(model: MiniGPT4, train: tuple[str, ...]) -> tuple[float, float, float]:
    """FLOPs of training on (one picture, one token, one target of the language model).

    Those of the forward pass, of the backward pass to whatever learns, and nothing that is computed twice;
    LLaMA's attention matrix, a percent of the rest at these lengths, is left out."""
    per_picture = 0.0
    if model.vision:  # else the features are cached, or there are no pictures
        with torch.device("meta"):
            twin = MiniGPT4(model.vision.config, model.qformer.config if model.qformer else None,
                            model.llama.config)
            picture = torch.empty(1, 3, model.image_size, model.image_size, dtype=torch.uint8)
        with FlopCounterMode(display=False) as vision, torch.no_grad():
            twin.vision(normalize(picture))
        with FlopCounterMode(display=False) as whole, torch.no_grad():
            twin.encode_image(picture)
        look = vision.get_total_flops()
        per_picture = (look * (3 if "vision" in train else 1) +
                       (whole.get_total_flops() - look) * (3 if {"vision", "qformer"} & set(train) else 1))
    passes = 2 + ("llama" in train)  # forward, backward to the input, backward to the weights
    llama = model.llama.config
    heads = 2 * llama.num_attention_heads + 2 * llama.num_key_value_heads  # of q and o, k and v
    block = llama.hidden_size * (llama.head_dim * heads + 3 * llama.intermediate_size)
    return (per_picture, 2 * passes * block * llama.num_hidden_layers,
            2 * passes * llama.vocab_size * llama.hidden_size)


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the most that a model can reach on the device.

    The size is doubled until a product takes 20 ms, which float16 on a CPU does at 256 already."""
    size, seconds = 128, 0.0
    while seconds < 0.02 and size < 16384:
        size *= 2
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
        seconds = timer.blocked_autorange(min_run_time=0.2).median
    return 2 * size**3 / seconds


class Meter:
    """The speed since `start`: images and tokens (without padding) per second of all processes, the shares
    of padding and of time spent waiting for data, and which part of the device's peak FLOP/s is reached
    (model FLOPs utilisation)."""

    def __init__(self, model: MiniGPT4, config: Config, device: torch.device, world: int):
        self.costs, self.world = model_flops(model, config.train), world
        self.peak = config.peak_tflops * 1e12 or matmul_peak(device, getattr(torch, config.dtype))
        self.start()

    def start(self):
        self.since, self.waited = time.perf_counter(), 0.0
        self.images = self.places = self.tokens = self.flops = 0

    def add(self, batches: list[Batch], waited: float):
        """Count what one step is made of, and the seconds that it took to get it."""
        self.waited += waited
        for b in batches:
            counts = (0 if b.images is None else len(b.images), b.n_tokens, b.n_targets)
            self.flops += sum(n * cost for n, cost in zip(counts, self.costs))
            self.images += counts[0] or len(b.tokens)  # of a text, the samples
            self.tokens, self.places = self.tokens + counts[1], self.places + b.tokens.numel()

    def rates(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.since
        return {"images_per_s": round(self.images * self.world / seconds, 1),
                "tokens_per_s": round(self.tokens * self.world / seconds),
                "padding": round(1 - self.tokens / self.places, 3),
                "data_wait": round(self.waited / seconds, 3),
                "mfu": round(self.flops / seconds / self.peak, 3)}


def start_profiler(config: Config, device: torch.device) -> torch.profiler.profile:
    """A profiler of the steps 4 to 6, which writes trace.json and prints the 15 dearest operations."""
    def report(profiler):
        profiler.export_chrome_trace(str(Path(config.out_dir) / "trace.json"))
        table = profiler.key_averages().table(f"self_{device.type}_time_total", row_limit=15)
        print(table, file=sys.stderr)
    steps = torch.profiler.schedule(wait=2, warmup=1, active=3, repeat=1)
    profiler = torch.profiler.profile(schedule=steps, on_trace_ready=report)
    profiler.start()
    return profiler
