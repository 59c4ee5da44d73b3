"""Train MiniGPT-4: both stages, and every part of the tiny world, from one config file.

    python train.py configs/tiny_stage1.py                            one process, a laptop
    torchrun --nproc-per-node 4 train.py configs/stage1.py            the paper's stage 1
    python train.py configs/stage2.py --max_steps=400 --resume        any config field can be overridden

out_dir then holds proj.safetensors, config.json, log.jsonl, and state.pt, from which a killed run continues.
"""

import gc
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import timedelta
from math import cos, isfinite, log, pi
from pathlib import Path
from zipfile import ZipFile

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from configs.prompts import stop_sequences
from configs.schema import Config, load_config, read_saved_config
from data import (
    Batch,
    Samples,
    TrainingSteps,
    cache_features,
    collate,
    open_samples,
)
from llama import IGNORE
from model import MiniGPT4
from plumbing.console import InputError, note, outlive_reader, run_main, set_quiet
from plumbing.files import append_row, replacing
from plumbing.options import parse_args, to_json
from plumbing.processes import SIGNALS, make_missing, pick_device
from plumbing.weights import PARTS, fingerprint

ADVICE = "the last checkpoint is kept; start again with a lower --lr, or with --grad_clip=1.0"
LAUNCHER = os.getppid()  # torchrun, or a shell
MOST_FAILED = 20  # steps in a row whose loss or gradient is not finite


def learning_rate(step: int, config: Config) -> float:
    """Linear from warmup_lr to lr, then a cosine to min_lr. Quirk kept: the cosine counts the warm-up too."""
    if step < config.warmup_steps:
        return (
            config.warmup_lr
            + (config.lr - config.warmup_lr) * step / config.warmup_steps
        )
    return (
        config.min_lr
        + (config.lr - config.min_lr) * (1 + cos(pi * step / config.max_steps)) / 2
    )


def make_optimizer(
    parameters: dict[str, torch.nn.Parameter], config: Config
) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices, none on biases and norms."""
    groups = [
        {"params": [p for p in parameters.values() if p.dim() > 1]},
        {
            "params": [p for p in parameters.values() if p.dim() <= 1],
            "weight_decay": 0.0,
        },
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        config.lr,
        config.betas,
        eps=1e-8,
        weight_decay=config.weight_decay,
    )


def train_step(
    model, batches: list[Batch], optimizer, scaler, lr: float, grad_clip=0.0
) -> torch.Tensor:
    """One step of AdamW along the gradient of the mean loss over all answer tokens, of all micro-batches and
    ranks; none if one is not finite. Returns the sum of the loss over this rank's answer tokens, or NaN."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    total = torch.tensor(
        float(sum(batch.n_targets for batch in batches)), device=parameters[0].device
    )
    loss_sum = torch.zeros_like(total)
    if world > 1:
        dist.all_reduce(total)
    total.clamp_(min=1)  # no rank may have a good sample
    for i, batch in enumerate(batches, 1):
        model.require_backward_grad_sync = i == len(
            batches
        )  # for DistributedDataParallel
        loss = model(*batch.to(total.device)) * batch.n_targets
        loss_sum += loss.detach()
        if (
            batch.images is None
        ):  # DistributedDataParallel waits for every gradient, also the projection's
            loss = loss + 0 * sum(p.sum() for p in parameters)
        scaler.scale(
            loss * (world / total + 0 * loss.detach())
        ).backward()  # DDP averages; NaN if infinite
    for group in optimizer.param_groups:
        group["lr"] = lr
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(
        parameters, grad_clip or torch.inf
    )  # of all ranks' gradients
    is_finite = (
        norm.isfinite() | scaler.is_enabled()
    )  # a scaler tries infinite ones, and skips the step
    if is_finite:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss_sum if is_finite else loss_sum * torch.nan


@torch.no_grad()
def evaluate(
    model: MiniGPT4, samples: Samples, config: Config, device
) -> tuple[float, list[dict]]:
    """The mean loss per answer token, and the greedy answers to some first prompts beside the data's."""
    good, bad = samples.first(config.eval_samples)
    batches = list(DataLoader(good, config.batch_size, collate_fn=collate))
    if bad:
        note(
            f"warning: {len(bad)} held-out samples cannot be used, such as {min(bad)[1]}"
        )
    loss_sum = sum(
        model(*batch.to(device)).item() * batch.n_targets for batch in batches
    )
    shown, stop = [], stop_sequences(model.tokenizer, config.answer_end)
    for images, ids, targets in samples.first(config.show_samples)[0]:
        start = next(i for i, target in enumerate(targets) if target != IGNORE)
        embeds = model.encode_image(torch.stack(images).to(device)) if images else None
        answer = model.generate(
            ids[:start],
            embeds,
            max_new_tokens=config.max_txt_len,
            temperature=0,
            stop=stop,
            context=start + config.max_txt_len,
        )
        end = [*targets, IGNORE].index(IGNORE, start)
        shown.append(
            {
                "answer": model.tokenizer.decode(list(answer)),
                "data": model.tokenizer.decode(targets[start:end]),
            }
        )
    return loss_sum / sum(batch.n_targets for batch in batches), shown


def saved_parts(config: Config) -> dict[str, str]:
    """{part: its file in out_dir}: the trained ones, and the projection, which identifies them."""
    names = (*config.trainable, "proj") if config.vision else config.trainable
    return {
        k: f"{config.out_dir}/{k}" + ("" if k == "llama" else ".safetensors")
        for k in names
    }


def refuse_to_overwrite(config: Config):
    """Raise InputError when out_dir holds a run that this one does not resume, or is no run's folder."""
    rows = Path(config.out_dir, "log.jsonl")
    files = [
        f"{config.out_dir}/state.pt",
        f"{config.out_dir}/state.old.pt",
        *saved_parts(config).values(),
    ]
    files += [rows] * (rows.is_file() and rows.stat().st_size > 0)
    if not config.resume and (held := list(filter(os.path.exists, files))):
        raise InputError(
            f"{held[0]}: already holds a run; continue it with --resume, or change --out_dir"
        )
    if Path(config.out_dir, "config.json").exists():
        read_saved_config(
            config.out_dir
        )  # raises InputError for something else's config.json


def start_folder(config: Config):
    """Make out_dir, with a config.json that leads chat.py to all parts."""
    Path(config.out_dir).mkdir(parents=True, exist_ok=True)
    own = saved_parts(config) | (
        {"tokenizer": ""} if "llama" in config.trainable else {}
    )
    real = os.path.realpath  # out_dir may be a link
    paths = {
        k: os.path.relpath(real(v), real(config.out_dir))
        if isinstance(v, str) and v
        else v
        for k, v in (config.parts() | own).items()
    }
    with replacing(Path(config.out_dir, "config.json")) as temporary:
        temporary.write_text(to_json(replace(config, **paths)))


def open_log(config: Config, done: int):
    """log.jsonl, to append to, without the steps that come again. InputError: another run writes to it."""
    Path(config.out_dir).mkdir(parents=True, exist_ok=True)
    out = open(
        Path(config.out_dir, "log.jsonl"), "a+", 1, "utf-8", "surrogateescape", "\n"
    )
    with suppress(ImportError, OSError):  # on Windows; on a file system without locks
        from fcntl import LOCK_EX, LOCK_NB, lockf

        try:
            lockf(out, LOCK_EX | LOCK_NB)  # of this process alone: it ends with it
        except (BlockingIOError, PermissionError) as e:
            raise InputError(
                f"{config.out_dir}: another run writes to it; choose another --out_dir"
            ) from e
    out.seek(0)
    rows = re.finditer(
        r'^{"step": (\d+), .*}\r?\n', text := out.read(), re.MULTILINE
    )  # the last may be cut
    end = max((row.end() for row in rows if int(row[1]) <= done), default=0)
    out.truncate(len(text[:end].encode("utf-8", "surrogateescape")))
    return out


class Checkpoint:
    """The state of a run that state.pt keeps: the trained parameters, the optimizer and the scaler."""

    def __init__(self, model: MiniGPT4, config: Config, identity: dict, device):
        self.model, self.config, self.path = (
            model,
            config,
            Path(config.out_dir, "state.pt"),
        )
        self.older, self.damage = (
            self.path.with_name("state.old.pt"),
            "",
        )  # the state before; what is wrong
        self.parameters = {
            f"{name}.{k}": p
            for name in config.trainable
            for k, p in model.part_tensors(name).items()
        }
        self.optimizer = make_optimizer(self.parameters, config)
        self.scaler = torch.amp.GradScaler(
            device.type, enabled=config.dtype == "float16"
        )
        self.identity = identity | {
            "trainable": config.trainable,
            "use of float16": self.scaler.is_enabled(),
        }
        proj = {"proj": fingerprint(model.part_tensors("proj"))} if model.proj else {}
        self.frozen = {
            k: v
            for k, v in (model.fingerprints | proj).items()
            if k not in config.trainable
        }

    def save(self, step: int):
        """Write the trained parts, then state.pt. Raises InputError for weights that are not finite."""
        if not all(p.isfinite().all() for p in self.parameters.values()):
            raise InputError(
                f"step {step}: the weights have become infinite or NaN; {ADVICE}"
            )
        for name in saved_parts(self.config):
            self.model.save_part(name, self.config.out_dir, self.config.save_dtype)
        state = {
            "step": step,
            "parameters": {k: p.detach() for k, p in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "identity": self.identity,
            "frozen": self.frozen,
            "config": asdict(self.config),
        }
        with replacing(self.path) as temporary:
            torch.save(state, temporary)
            if self.path.exists() and not self.damage:
                os.replace(self.path, self.older)
        self.damage = ""

    def load(self) -> int:
        """Restore state.pt, or if it is damaged the state before; returns its step, or 0 if there is none.
        Raises InputError if all are damaged, or for another run's."""
        for path in filter(Path.is_file, (self.path, self.older)):
            if self.damage:
                note(f"warning: {self.damage}; the run goes on from {path}")
            try:
                return self.restore(path)
            except InputError:
                raise
            except Exception as e:  # a damaged file breaks the readers in many ways
                self.damage = f"{path}: damaged ({type(e).__name__}: {e})"
        if self.damage:
            raise InputError(f"{self.damage}; choose another --out_dir")
        return 0

    def restore(self, path: Path) -> int:
        """Take over a saved state and return its step. Raises InputError for another run's."""
        if broken := ZipFile(path).testzip():  # by their checksums
            raise ValueError(f"the checksum of {broken} does not match")
        state = torch.load(path, map_location="cpu", weights_only=True)
        step, before, saved = state["step"], state["identity"], state["parameters"]
        assert type(step) is int and step > 0, f"step {step}"
        for name, now in self.identity.items():
            if (was := before.get(name)) != now:
                raise InputError(
                    f"{path}: {name} was {was}, now it is {now}; keep it or change out_dir"
                )
        if {k: p.shape for k, p in self.parameters.items()} != {
            k: t.shape for k, t in saved.items()
        }:
            raise InputError(
                f"{path}: its parts have other sizes; give them, or another --out_dir"
            )
        if other := [
            k for k, mark in self.frozen.items() if state["frozen"].get(k) != mark
        ]:
            note(f"warning: {path} was trained with another {', '.join(other)}")
        for k, p in self.parameters.items():
            p.data.copy_(saved[k])
        groups = self.optimizer.state_dict()["param_groups"]  # with this run's options
        self.optimizer.load_state_dict(
            {"state": state["optimizer"]["state"], "param_groups": groups}
        )
        self.scaler.load_state_dict(state["scaler"])
        for p in self.parameters.values():
            moments = self.optimizer.state[p].values()  # none before the first step
            shapes = [
                t.shape if t.isfinite().all() else "not finite" for t in (p, *moments)
            ]
            if shapes not in ([p.shape], [p.shape, (), p.shape, p.shape]):
                raise ValueError(f"{shapes} for a parameter, a count and two moments")
        return step


class Meter:
    """The losses and the speed since the last report, of all ranks together."""

    def __init__(self, model: MiniGPT4, config: Config, sources: list[str], device):
        self.sources, self.flops = sources, flops_per_position(model, config.trainable)
        self.peak = (
            config.peak_tflops
            * 1e12
            * (dist.get_world_size() if dist.is_initialized() else 1)
        )
        self.sums = torch.zeros(
            4, len(sources), device=device, dtype=torch.float64
        )  # rows: see `add`
        self.since, self.waited = (
            time.perf_counter(),
            0.0,
        )  # seconds of waiting for data

    def add(self, source: int, loss_sum: torch.Tensor, batches: list[Batch]):
        """Count a step: the sum of its loss, its answer tokens, its pictures (or texts), and its tokens."""
        counts = [
            (b.n_targets, len(b.tokens if b.images is None else b.images), b.n_tokens)
            for b in batches
        ]
        for row, value in enumerate((loss_sum, *map(sum, zip(*counts)))):
            self.sums[row, source] += value  # without waiting for the device

    def report(self) -> dict:
        """The mean loss per answer token, also per source where there are several, and the speed."""
        if dist.is_initialized():
            dist.all_reduce(self.sums)
        losses, targets, images, tokens = self.sums.tolist()  # waits for the device
        if not sum(targets):
            return {}  # no step was finite
        seconds = time.perf_counter() - self.since
        report = {"loss": sum(losses) / sum(targets)}
        if len(self.sources) > 1:
            report["losses"] = {
                name: x / n for name, x, n in zip(self.sources, losses, targets) if n
            }
        report |= {
            "images_per_s": round(sum(images) / seconds, 1),
            "tokens_per_s": round(sum(tokens) / seconds),
            "data_wait": round(self.waited / seconds, 3),
        }
        if self.peak:
            flops = sum(images) * self.flops[0] + sum(tokens) * self.flops[1]
            report["mfu"] = round(flops / seconds / self.peak, 3)
        self.sums.zero_()
        self.since, self.waited = time.perf_counter(), 0.0
        return report


def flops_per_position(
    model: MiniGPT4, trainable: tuple[str, ...]
) -> tuple[float, float]:
    """Training FLOPs per (picture, token): 2 per weight forward, 2 for each gradient; without attention."""
    n = {
        k: sum(p.numel() for p in model.part_tensors(k).values() if p.dim() > 1)
        for k in PARTS
    }
    n["llama"] -= model.llama.embed_tokens.weight.numel() * (
        model.llama.lm_head is not None
    )  # a lookup
    n_patches = model.vision.pos_embed.shape[1] if model.vision else 0
    vision = n["vision"] * n_patches * (3 if "vision" in trainable else 1)
    qformer = (
        n["qformer"]
        * model.n_image_tokens
        * (3 if {"vision", "qformer"} & set(trainable) else 1)
    )
    return 2 * (vision + qformer), 2 * n["llama"] * (3 if "llama" in trainable else 2)


def build(config: Config, device) -> MiniGPT4:
    """The model of a config, its blocks sharded, checkpointed and compiled as the config says."""
    if config.shard and not dist.is_initialized():
        raise InputError(
            "shard = True: there is only one process; start several with torchrun"
        )
    torch.manual_seed(config.seed)
    model = MiniGPT4.from_files(
        **config.parts(),
        dtype=config.dtype,
        trainable=config.trainable,
        device="cpu" if config.shard else device,
        image_size=config.image_size,
    )
    if config.shard:
        from torch.distributed.fsdp import fully_shard  # takes a second to import

        mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
        for block in (
            model.llama.layers
        ):  # one at a time is moved to the device, and sharded there
            fully_shard(block, mesh=mesh)
        model.to(device)
    model.llama.grad_checkpoint = config.grad_checkpoint
    if config.compile:
        if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
            raise InputError(
                "compile = True: on a CPU it needs a C++ compiler; install g++ or switch it off"
            )
        vision, bridge = (
            getattr(model.vision, "blocks", ()),
            getattr(model.bridge, "layers", ()),
        )
        for blocks in (vision, bridge, model.llama.layers):
            for block in blocks:
                block.compile(
                    dynamic=True
                )  # one graph for all blocks of a kind and any number of tokens
    return model


def open_data(
    config: Config, model: MiniGPT4, device
) -> tuple[Samples, dict, Samples | None]:
    """The samples to train on, the weights of their sources, and the held-out samples, if there are any."""
    shape = (model.tokenizer, model.image_size, model.n_image_tokens)
    samples, weights = open_samples(config.data, config, *shape)
    heldout = (
        open_samples(config.heldout_data, config, *shape)[0]
        if config.heldout_data
        else None
    )
    if heldout and not heldout.first(1)[0]:
        raise InputError(
            f"heldout_data {config.heldout_data}: not one of its samples can be used; fix it"
        )
    if config.cache_features:
        for each in filter(None, (samples, heldout)):
            cache_features(each, model.image_features, config, device)
        model.drop_vision()
    return samples, weights, heldout


def train(config: Config, device, rank: int = 0, world: int = 1):
    """Run the config from its first or its last saved step to max_steps, or until a signal."""
    refuse_to_overwrite(config)
    if rank == 0:
        make_missing(config.prepare, config.data_paths())
    if world > 1:
        dist.barrier()
    model = build(config, device)
    samples, weights, heldout = open_data(config, model, device)
    steps = TrainingSteps(samples, weights, config, rank, world)
    checkpoint = Checkpoint(model, config, steps.identity, device)
    done = checkpoint.load() if config.resume else 0
    if world > 1:
        dist.all_gather_object(found := [None] * world, (done, steps.identity))
        if any(each != found[0] for each in found):
            saved = [step for step, _ in found]
            raise InputError(
                f"the processes found steps {saved} or other data; give all the same folders"
            )
    if done >= config.max_steps:
        return note(f"{config.out_dir}: its run is already at step {done:,}")
    meter = Meter(model, config, list(weights), device)
    with open_log(config, done) if rank == 0 else open(os.devnull, "w") as out:
        if rank == 0:
            start_folder(config)  # not earlier: a refused run changes nothing
        return run_steps(checkpoint, steps, meter, heldout, done + 1, out)


def run_steps(
    checkpoint: Checkpoint,
    steps: TrainingSteps,
    meter: Meter,
    heldout: Samples | None,
    first: int,
    out,
):
    """The steps from `first` on: train, log, evaluate on rank 0, save; until a signal. True after Ctrl-C."""
    config, model, rank, device = (
        steps.config,
        checkpoint.model,
        steps.rank,
        meter.sums.device,
    )
    # without init_sync: all ranks start alike, by their seed
    wrapped = (
        DistributedDataParallel(model, init_sync=False) if steps.world > 1 else model
    )
    caught, failed = [], 0
    for name in (
        SIGNALS
    ):  # the third ends the run at once; two may be one, as torchrun passes them on
        signal.signal(
            name,
            lambda n, f: (
                caught.append(n) or caught[2:] and signal.default_int_handler(n, f)
            ),
        )
    bar = tqdm(
        range(first, config.max_steps + 1),
        total=config.max_steps,
        initial=first - 1,
        unit="step",
        dynamic_ncols=True,
        disable=rank > 0,
    )
    asked = time.perf_counter()
    for _, (step, source, batches) in zip(bar, steps.read(first)):
        meter.waited += time.perf_counter() - asked
        lr, is_orphan = (
            learning_rate(step - 1, config),
            steps.world > 1 and os.getppid() != LAUNCHER,
        )
        loss_sum = train_step(
            wrapped,
            batches,
            checkpoint.optimizer,
            checkpoint.scaler,
            lr,
            config.grad_clip,
        )
        stop = len(caught) + is_orphan  # is_orphan: torchrun has died
        if steps.world > 1:
            dist.all_reduce(stop := torch.tensor(float(stop), device=device))
        is_end, last = step == config.max_steps, step == config.max_steps or bool(stop)
        failed = 0 if loss_sum.isfinite() else failed + 1
        if not failed:
            meter.add(source, loss_sum, batches)
        elif rank == 0:
            append_row(out, step=step, not_finite=failed, samples=steps.describe(step))
        if failed == MOST_FAILED:
            raise InputError(
                f"step {step}: the last {failed} losses or gradients were not finite; {ADVICE}"
            )
        if step == 1 and rank == 0 and "llama" not in config.trainable:
            loss = loss_sum.item() / sum(batch.n_targets for batch in batches)
            if loss > log(model.llama.config.vocab_size) + 1:
                note(
                    f"warning: the first loss, {loss:.2f}, is worse than a uniform guess: LLaMA's weights "
                    "or tokenizer are probably wrong; try chat.py --ckpt=OUT_DIR --check"
                )
        if (last or step % config.log_interval == 0) and (report := meter.report()):
            append_row(out, step=step, lr=lr, seen=step * steps.step_size, **report)
            report.pop("losses", None)  # too many for the bar
            bar.set_postfix(report | {"lr": f"{lr:.1e}"}, refresh=False)
        paused = time.perf_counter()
        if (
            heldout
            and (is_end or not (last or step % config.eval_interval))
            and (not rank or config.shard)
        ):
            loss, shown = evaluate(
                model, heldout, config, device
            )  # shards need all ranks
            append_row(
                out,
                step=step,
                heldout_loss=loss if isfinite(loss) else None,
                samples=shown,
            )
            lines = [
                f"  answer: {s['answer']!r}\n  data:   {s['data']!r}" for s in shown
            ]
            if rank == 0:
                bar.write(
                    "\n".join([f"step {step}: held-out loss {loss:.4f}", *lines]),
                    file=sys.stderr,
                )
        if rank == 0 and (last or step % config.save_interval == 0):
            checkpoint.save(step)
            if steps.account.skipped:
                append_row(
                    out,
                    step=step,
                    skipped=steps.account.skipped,
                    of=steps.account.n_read,
                )
                bar.write(f"step {step}: {steps.account.text}", file=sys.stderr)
        if last and not is_end:
            bar.close()
            note(f"stopped after step {step}, which is saved; --resume continues")
            return signal.SIGINT in caught
        asked = time.perf_counter()
        meter.since += asked - paused  # evaluation and saving do not count


def main(argv: list[str]):
    (path,), options = parse_args(argv, __doc__, "CONFIG", Config)
    config = load_config(path, options)
    outlive_reader(sys.stderr)
    os.environ.setdefault(
        "THP_MEM_ALLOC_ENABLE", "1"
    )  # huge pages on Linux: pictures are normalized faster
    world, local_rank = (
        int(os.environ.get("WORLD_SIZE", 1)),
        int(os.environ.get("LOCAL_RANK", 0)),
    )
    device = pick_device(config.device, local_rank)
    if world > 1:  # the others wait while rank 0 makes data, evaluates and saves
        # torchrun's store outlives a restart on one machine, and with it the addresses of the ranks before
        one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(world)
        attempt = (
            os.environ.get("TORCHELASTIC_RESTART_COUNT", "") if one_machine else ""
        )
        store, rank, _ = next(dist.rendezvous("env://", timeout=timedelta(hours=2)))
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            rank=rank,
            world_size=world,
            store=dist.PrefixStore(attempt, store),
            timeout=timedelta(hours=2),
        )
    rank = dist.get_rank() if world > 1 else 0
    set_quiet(rank > 0)
    if rank == 0:
        print(to_json(config), file=sys.stderr)
    try:
        interrupted = train(config, device, rank, world)
        if world > 1:
            dist.barrier()  # a rank that leaves while rank 0 evaluates and saves may crash on its way out
        if interrupted:
            raise KeyboardInterrupt
    except (RuntimeError, EOFError, ConnectionError) as e:
        if isinstance(e, RuntimeError) and not re.search(
            r"DataLoader worker .*(is killed|exited)", str(e)
        ):
            raise
        raise InputError(
            f"a data worker died ({e}); if memory ran out, lower num_workers; --resume"
        ) from e
    finally:
        for worker in multiprocessing.active_children():  # of data: it may be stuck
            worker.kill()
        if world > 1:
            gc.collect()  # frees what holds the process group, so that its threads end before Python does
            dist.destroy_process_group()
    if rank == 0:
        picture = ["assets/tiny/example.png"] * bool(config.vision)
        print(
            shlex.join(["python", "chat.py", *picture, f"--ckpt={config.out_dir}"]),
            file=sys.stderr,
        )


if __name__ == "__main__":
    run_main(main)
