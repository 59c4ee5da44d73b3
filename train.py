"""Train MiniGPT-4: both stages, and every part of the tiny world, from one config file.

    python train.py configs/tiny_stage1.py                            one process, a laptop
    torchrun --nproc-per-node 4 train.py configs/stage1.py            the paper's stage 1
    python train.py configs/stage2.py --max_steps=400 --resume        any config field can be overridden

The run's folder (out_dir) then holds the trained parts (proj.safetensors), config.json, log.jsonl, and
state.pt, from which a killed run continues. Stage 1 and stage 2 are the same loop over different data.
"""

import gc
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from itertools import takewhile
from math import cos, isfinite, log, pi
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from configs import schema
from configs.schema import Config, InputError
from data import Batch, Groups, Reader, Samples, collate, open_samples
from llama import IGNORE
from model import MiniGPT4, fingerprint, pick_device, replacing

DIVERGED = "the last checkpoint is kept; start again with a lower --lr, or with --grad_clip=1.0"


def learning_rate(step: int, config: Config) -> float:
    """Linear from warmup_lr to lr, then a cosine to min_lr. Quirk kept: the cosine counts the warm-up too."""
    if step < config.warmup_steps:
        return config.warmup_lr + (config.lr - config.warmup_lr) * step / config.warmup_steps
    return config.min_lr + (config.lr - config.min_lr) * (1 + cos(pi * step / config.max_steps)) / 2


def make_optimizer(parameters: dict[str, torch.nn.Parameter], config: Config) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices, none on biases and norms."""
    matrices = [p for p in parameters.values() if p.dim() > 1]
    vectors = [p for p in parameters.values() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, eps=1e-8)


def train_step(model, batches: list[Batch], optimizer, scaler, lr: float,
               grad_clip: float = 0.0) -> torch.Tensor:
    """One step of AdamW over the micro-batches; returns this rank's sum of the loss over its answer tokens.

    The gradient is that of the mean loss over all answer tokens of all ranks: each micro-batch counts by its
    number of answer tokens."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    total = torch.tensor(float(sum(batch.n_targets for batch in batches)), device=parameters[0].device)
    loss_sum = torch.zeros_like(total)
    if world > 1:
        dist.all_reduce(total)
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        with nullcontext() if last or world == 1 else model.no_sync():
            loss = model(*batch.to(total.device)) * batch.n_targets
            loss_sum += loss.detach()
            if batch.images is None and world > 1:  # DistributedDataParallel waits for every gradient
                loss = loss + 0 * sum(p.sum() for p in parameters)
            scaler.scale(loss * (world / total)).backward()  # it averages the gradients over the ranks
    for group in optimizer.param_groups:
        group["lr"] = lr
    if grad_clip:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, grad_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss_sum


# ---- evaluation --------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model: MiniGPT4, samples: Samples, config: Config, device) -> tuple[float, list[dict]]:
    """The mean loss per answer token over the first eval_samples held-out samples, and the first answers."""
    total, count, first = 0.0, 0, list(samples.first(config.eval_samples))
    for at in range(0, len(first), config.batch_size):
        batch = collate(first[at:at + config.batch_size])
        total += model(*batch.to(device)).item() * batch.n_targets
        count += batch.n_targets
    shown = [show_answer(model, sample, config, device) for sample in samples.first(config.show_samples)]
    return total / count, shown


def show_answer(model: MiniGPT4, sample: tuple, config: Config, device) -> dict[str, str]:
    """The greedy answer to a sample's first prompt, and the answer of the data."""
    images, ids, targets = sample
    start = next(i for i, t in enumerate(targets) if t != IGNORE)
    embeds = model.encode_image(torch.stack(images).to(device)) if images else None
    answer = model.generate(ids[:start], embeds, config.max_txt_len, temperature=0,
                            stop=model.tokenizer.stop_sequences(config.answer_end),
                            context=start + config.max_txt_len)
    of_data = list(takewhile(IGNORE.__ne__, targets[start:]))
    return {"answer": model.tokenizer.decode(list(answer)), "data": model.tokenizer.decode(of_data)}


def warn_of_broken_llama(loss: float, vocab_size: int):
    """Warn when the first loss of a frozen language model is clearly above that of a uniform guess."""
    if loss > log(vocab_size) + 1:
        print(f"warning: the first loss, {loss:.2f}, is worse than a uniform guess over the vocabulary "
              f"({log(vocab_size):.2f}): the language model's weights or tokenizer are probably wrong; "
              "measure its perplexity with python chat.py --ckpt=OUT_DIR --check", file=sys.stderr)


# ---- the run's folder --------------------------------------------------------------------------------------


def saved_parts(config: Config) -> dict[str, str]:
    """{part: its place in the run's folder}: the trained ones, and the projection, which identifies them."""
    names = (*config.trainable, "proj") if config.vision else config.trainable
    return {name: "llama" if name == "llama" else f"{name}.safetensors" for name in names}


def refuse_to_overwrite(config: Config):
    """Raise InputError when out_dir holds a run that this one does not resume, or is no run's folder."""
    out = Path(config.out_dir)
    held = [name for name in ("state.pt", *saved_parts(config).values()) if (out / name).exists()]
    if held and not config.resume:
        raise InputError(f"{out} already holds a run ({held[0]}); continue it with --resume, or choose "
                         "another --out_dir")
    if (out / "config.json").exists():
        schema.read_saved_config(str(out))  # raises InputError for something else's config.json


def start_folder(config: Config):
    """Make out_dir, with a config.json that leads chat.py to all parts."""
    out = Path(config.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    own = {name: str(out / place) for name, place in saved_parts(config).items()}
    own |= {"tokenizer": ""} if "llama" in config.trainable else {}
    real = os.path.realpath  # out may be a link
    paths = {k: os.path.relpath(real(v), real(out)) if isinstance(v, str) and v else v
             for k, v in (config.parts() | own).items()}
    with replacing(out / "config.json") as temporary:
        temporary.write_text(schema.to_json(replace(config, **paths)))


def frozen_parts(model: MiniGPT4, config: Config) -> dict[str, str]:
    """{part: fingerprint} of the frozen parts."""
    marks = dict(model.fingerprints)
    if model.proj is not None:
        marks["proj"] = fingerprint(model.part_parameters("proj"))
    return {name: mark for name, mark in marks.items() if name not in config.trainable}


def save_checkpoint(model: MiniGPT4, optimizer, scaler, *, parameters: dict, step: int, identity: dict,
                    config: Config):
    """Write the trained parts, then state.pt, which holds all that a resume needs."""
    if not all(p.isfinite().all() for p in parameters.values()):
        raise InputError(f"step {step}: the weights have become infinite or NaN; {DIVERGED}")
    for name in saved_parts(config):
        model.save_part(name, config.out_dir, config.save_dtype)
    state = {"step": step, "parameters": {k: p.detach() for k, p in parameters.items()},
             "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "identity": identity,
             "frozen": frozen_parts(model, config), "config": asdict(config)}
    with replacing(Path(config.out_dir) / "state.pt") as temporary:
        torch.save(state, temporary)


def load_checkpoint(model: MiniGPT4, optimizer, scaler, *, parameters: dict, identity: dict,
                    config: Config) -> int:
    """Restore a run's last state; returns the number of finished steps, 0 at the start."""
    path = Path(config.out_dir) / "state.pt"
    if not path.is_file():
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        before, saved = state["identity"], state["parameters"]
    except Exception as e:  # a damaged file breaks PyTorch's reader in many ways
        raise InputError(f"{path}: damaged ({type(e).__name__}); choose another --out_dir") from e
    for name, now in identity.items():
        if (was := before.get(name)) != now:
            raise InputError(f"{path}: the run's {name} was {was}, now it is {now}; keep it, or choose "
                             "another --out_dir")
    if {k: t.shape for k, t in saved.items()} != {k: p.shape for k, p in parameters.items()}:
        raise InputError(f"{path}: the run had parts of other sizes; give its parts, or another --out_dir")
    if other := [k for k, mark in frozen_parts(model, config).items() if state["frozen"].get(k) != mark]:
        print(f"warning: {path} was trained with another {' and another '.join(other)}", file=sys.stderr)
    for k, p in parameters.items():
        p.data.copy_(saved[k])
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    return state["step"]


def refuse_separate_folders(done: int):
    """Raise InputError when the processes, on several machines, did not resume at the same step."""
    dist.all_gather_object(steps := [None] * dist.get_world_size(), done)
    if len(set(steps)) > 1:
        raise InputError(f"resume: the processes found checkpoints of steps {steps}; out_dir has to be one "
                         "folder for all machines")


class Log:
    """log.jsonl, one JSON object per line. On resume, lines of steps that are done again are removed."""

    def __init__(self, config: Config, step: int):
        path, kept = Path(config.out_dir) / "log.jsonl", []
        for line in path.read_text(errors="replace").splitlines() if path.is_file() and step else ():
            try:
                kept += [line + "\n"] if json.loads(line)["step"] <= step else []
            except (ValueError, TypeError, KeyError):  # the line at which the run was killed
                pass
        with replacing(path) as temporary:
            temporary.write_text("".join(kept))
        self.file = open(path, "a", buffering=1)

    def write(self, **values):
        """One line, on disk at once. Raises InputError for a loss that is not finite."""
        if not isfinite(values.get("loss", 0.0)):
            raise InputError(f"step {values['step']}: the loss is {values['loss']}; {DIVERGED}")
        self.file.write(json.dumps(values) + "\n")


class Meter:
    """The losses and the speed since the last report, of all ranks together."""

    def __init__(self, model: MiniGPT4, config: Config, sources: list[str], device):
        self.sources, self.world = sources, dist.get_world_size() if dist.is_initialized() else 1
        self.flops, self.peak = flops_per_position(model, config.trainable), config.peak_tflops * 1e12
        self.sums = torch.zeros(2, len(sources), device=device, dtype=torch.float64)  # of losses, of targets
        self.start()

    def start(self):
        self.sums.zero_()
        self.since, self.waited, self.images, self.tokens = time.perf_counter(), 0.0, 0, 0

    def add(self, source: int, batches: list[Batch], loss_sum: torch.Tensor, waited: float):
        """Count a step: its loss, its batches, and the seconds of waiting for them."""
        self.sums[0, source] += loss_sum
        self.sums[1, source] += sum(b.n_targets for b in batches)
        self.waited += waited
        self.images += sum(len(b.tokens if b.images is None else b.images) for b in batches)
        self.tokens += sum(b.n_tokens for b in batches)

    def report(self) -> dict:
        """The mean loss per answer token, also per source where there are several, and the speed."""
        if self.world > 1:
            dist.all_reduce(self.sums)
        seconds, (losses, counts) = time.perf_counter() - self.since, self.sums.tolist()
        report = {"loss": sum(losses) / sum(counts)}
        if len(self.sources) > 1:
            report["losses"] = {name: x / n for name, x, n in zip(self.sources, losses, counts) if n}
        report |= {"images_per_s": round(self.images * self.world / seconds, 1),
                   "tokens_per_s": round(self.tokens * self.world / seconds),
                   "data_wait": round(self.waited / seconds, 3)}
        if self.peak:
            flops = self.images * self.flops[0] + self.tokens * self.flops[1]
            report["mfu"] = round(flops / seconds / self.peak, 3)
        return report


def flops_per_position(model: MiniGPT4, trainable: tuple[str, ...]) -> tuple[float, float]:
    """Training FLOPs per (picture, token): per weight, 2 for the forward pass, 2 for the gradient of the
    activations where something before is trained, 2 for the weight's own. Attention is left out."""
    vision, qformer, llama = (sum(p.numel() for p in model.part_parameters(k).values() if p.dim() > 1)
                              for k in ("vision", "qformer", "llama"))
    n_vision = 0 if model.vision is None else model.vision.pos_embed.shape[1]
    return (2 * vision * n_vision * (3 if "vision" in trainable else 1)
            + 2 * qformer * model.n_image_tokens * (3 if {"vision", "qformer"} & set(trainable) else 1),
            2 * llama * (3 if "llama" in trainable else 2))


# ---- the run -----------------------------------------------------------------------------------------------


def prepare_data(config: Config):
    """If data is missing that `prepare` makes, run its commands in order, but not for what exists already."""
    used = [path for data in ([config.tokenizer], config.data, config.heldout_data)
            for path in ([data] if isinstance(data, str) else data)]
    missing = [path for path in config.prepare if not Path(path).exists()]
    if any(f"{u}/".startswith(f"{path}/") for u in used for path in missing):
        for path in missing:
            print(f"{path} is missing; making it: python {config.prepare[path]}", file=sys.stderr)
            if subprocess.run([sys.executable, *shlex.split(config.prepare[path])]).returncode:
                raise InputError(f"{path} could not be made: the command above failed")


def build(config: Config, device) -> MiniGPT4:
    """The model of a config, its blocks sharded, checkpointed and compiled as the config says."""
    if config.shard and not dist.is_initialized():
        raise InputError("shard = True: there is only one process; start several with torchrun")
    torch.manual_seed(config.seed)
    model = MiniGPT4.from_files(**config.parts(), dtype=config.dtype, trainable=config.trainable,
                                device="cpu" if config.shard else device, image_size=config.image_size)
    if config.shard:
        from torch.distributed.fsdp import fully_shard  # takes a second to import
        mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
        for block in model.llama.layers:  # one at a time is moved to the device, and sharded there
            fully_shard(block, mesh=mesh)
        model.to(device)
    model.llama.grad_checkpoint = config.grad_checkpoint
    if config.compile:
        if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
            raise InputError("compile = True: on a CPU it needs a C++ compiler; install g++ or switch it off")
        compile_blocks(model)
    return model


def compile_blocks(model: MiniGPT4):
    """torch.compile each block by itself: one graph for all blocks of a kind and any number of tokens."""
    blocks = (*getattr(model.vision, "blocks", ()), *getattr(model.bridge, "layers", ()), *model.llama.layers)
    for block in blocks:
        block.compile(dynamic=True)


@torch.no_grad()
def cache_features(model: MiniGPT4, samples: Samples, config: Config, device):
    """Keep the frozen vision features of all pictures in `samples`; each rank computes its share."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    features, keys = {}, list(samples.keys())[rank::world]
    loader = DataLoader(samples, config.batch_size, sampler=keys, collate_fn=list,
                        num_workers=config.num_workers)
    for at, rows in enumerate(tqdm(loader, desc="features", disable=rank > 0, dynamic_ncols=True)):
        if images := [image for row in rows if row for image in row[0]]:
            computed = iter(model.image_features(torch.stack(images).to(device)).cpu())
            for key, row in zip(keys[at * config.batch_size:], rows):
                features[key[:3]] = [next(computed).clone() for _ in row[0]] if row else []
    shares = [features] * world
    if world > 1:
        dist.all_gather_object(shares, features)
    samples.features = {key: value for share in shares for key, value in share.items() if value}
    samples.bad = []  # training counts them


def open_data(config: Config, model: MiniGPT4, device) -> tuple[Samples, dict, Samples | None]:
    """The samples to train on, the weights of their sources, and the held-out samples, if there are any."""
    shape = (model.tokenizer, model.image_size, model.n_image_tokens)
    samples, weights = open_samples(config.data, config, *shape)
    heldout = open_samples(config.heldout_data, config, *shape)[0] if config.heldout_data else None
    if heldout and not list(heldout.first(1)):
        raise InputError(f"heldout_data {config.heldout_data}: not one of its samples can be used; fix it, "
                         "or train without")
    if config.cache_features:
        for each in (samples, heldout) if heldout else (samples,):
            cache_features(model, each, config, device)
        model.vision = model.bridge = None  # to free their memory
    return samples, weights, heldout


def train(config: Config, device, rank: int = 0, world: int = 1):
    """Run the config from its first or its last saved step to max_steps."""
    refuse_to_overwrite(config)
    if rank == 0:
        prepare_data(config)
    if world > 1:
        dist.barrier()
    model = build(config, device)
    parameters = {f"{name}.{k}": p for name in config.trainable
                  for k, p in model.part_parameters(name).items()}
    optimizer = make_optimizer(parameters, config)
    scaler = torch.amp.GradScaler(device.type, enabled=config.dtype == "float16")
    samples, weights, heldout = open_data(config, model, device)
    groups = Groups(samples, weights, config, rank, world)
    identity = groups.identity | {"trainable": config.trainable, "use of float16": scaler.is_enabled()}
    state = {"parameters": parameters, "identity": identity, "config": config}
    done = load_checkpoint(model, optimizer, scaler, **state) if config.resume else 0
    if world > 1:
        refuse_separate_folders(done)
    if rank == 0:
        start_folder(config)  # not earlier: a refused resume changes nothing
    log = Log(config, done) if rank == 0 else None
    # without init_sync: all ranks start alike, by their seed
    wrapped = DistributedDataParallel(model, init_sync=False) if world > 1 else model
    reader, meter = Reader(groups, done), Meter(model, config, list(weights), device)
    steps = iter(reader)
    bar = tqdm(total=config.max_steps, initial=done, disable=rank > 0, unit="step", dynamic_ncols=True)
    for step in range(done + 1, config.max_steps + 1):
        asked, lr = time.perf_counter(), learning_rate(step - 1, config)
        source, batches = next(steps)
        waited = time.perf_counter() - asked
        loss_sum = train_step(wrapped, batches, optimizer, scaler, lr, config.grad_clip)
        meter.add(source, batches, loss_sum, waited)
        bar.update()
        if step == 1 and rank == 0 and "llama" not in config.trainable:
            warn_of_broken_llama(loss_sum.item() / sum(b.n_targets for b in batches),
                                 model.llama.config.vocab_size)
        log_due, eval_due, save_due = (step % n == 0 or step == config.max_steps for n in (
            config.log_interval, config.eval_interval, config.save_interval))
        if log_due:
            report = meter.report()
            meter.start()
            if rank == 0:
                log.write(step=step, lr=lr, **report)
                bar.set_postfix({k: report[k] for k in report if k != "losses"} | {"lr": f"{lr:.1e}"})
        paused = time.perf_counter()
        if eval_due and heldout and (rank == 0 or config.shard):  # shards need all ranks
            loss, shown = evaluate(model, heldout, config, device)
            if rank == 0:
                log.write(step=step, heldout_loss=loss, samples=shown)
                lines = [f"  answer: {s['answer']!r}\n  data:   {s['data']!r}" for s in shown]
                bar.write("\n".join([f"step {step}: held-out loss {loss:.4f}", *lines]), file=sys.stderr)
        if save_due and rank == 0:
            save_checkpoint(model, optimizer, scaler, step=step, **state)
            if reader.skipped:
                log.write(step=step, skipped=dict(reader.skipped), of=reader.n_read)
                bar.write(f"step {step}: {reader.account()}", file=sys.stderr)
        meter.since += time.perf_counter() - paused  # evaluation and saving do not count
    bar.close()


def main(argv: list[str]):
    """Run `CONFIG [--key=value ...]`; under torchrun, one process per device."""
    (path,), options = schema.parse_args(argv, __doc__, "CONFIG", Config)
    config = schema.load_config(path, options)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages on Linux: pictures are normalized faster
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    device = pick_device(config.device, local)
    if world > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))  # rank 0 makes data, evaluates, saves
    try:
        if (rank := dist.get_rank() if world > 1 else 0) == 0:
            print(schema.to_json(config), file=sys.stderr)
        train(config, device, rank, world)
        if world > 1:
            dist.barrier()  # a rank that leaves while rank 0 evaluates and saves may crash on its way out
    finally:
        if world > 1:
            gc.collect()  # frees what holds the process group, so that its threads end before Python does
            dist.destroy_process_group()
    if rank == 0:
        picture = "assets/tiny/example.png " if config.vision else ""
        print(f"python chat.py {picture}--ckpt={shlex.quote(config.out_dir)}", file=sys.stderr)


if __name__ == "__main__":
    schema.run_main(main)
