"""Train MiniGPT-4: both stages, and every part of the tiny world, from one config file.

    python train.py configs/tiny_stage1.py                              one process, a laptop
    torchrun --nproc-per-node 4 train.py configs/stage1.py              the paper's stage 1
    python train.py configs/stage2.py --max_steps=400 --resume=True     any config field can be overridden

The run's folder (out_dir) then holds the trained parts (proj.safetensors), config.json, log.jsonl, and
state.safetensors, from which a killed run goes on. Stage 1 and stage 2 are the same loop over different data.
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
from dataclasses import replace
from datetime import timedelta
from math import cos, isfinite, log, pi
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from configs.schema import (PATHS, Config, InputError, load_config, parse_args, read_saved_config, run_main,
                            to_json)
from data import (Batch, FeatureCache, Reader, Samples, Uncached, collate, flatten, open_samples,
                  stop_sequences)
from llama import IGNORE
from model import MiniGPT4, fingerprint, load_tensors, pick_device, save_tensors
from tools.meter import Meter, start_profiler

NOT_FINITE = "the last checkpoint is kept; begin again with a lower --lr, or with --grad_clip=1.0"


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


# ---- the run's folder --------------------------------------------------------------------------------------


def refuse_to_overwrite(config: Config):
    """Raise InputError when out_dir holds a run that this one does not resume, or is no run's folder."""
    out = Path(config.out_dir)
    held = [name for name in ("state.safetensors", *saved_parts(config).values()) if (out / name).exists()]
    if held and not config.resume:
        raise InputError(f"{out} already holds a run ({held[0]}); go on with it by --resume=True, or choose "
                         "another --out_dir")
    if (out / "config.json").exists():
        read_saved_config(str(out))  # raises it when this is the config.json of something else


def saved_parts(config: Config) -> dict[str, str]:
    """{part: its place in the run's folder}: those that learn, and the projection, which remembers them."""
    names = (*config.train, "proj") if config.vision else config.train
    return {name: "llama" if name == "llama" else f"{name}.safetensors" for name in names}


def start_folder(config: Config):
    """Make out_dir, with a config.json that leads chat.py to all parts."""
    out = Path(config.out_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"out_dir {out}: cannot be made ({e}); choose another --out_dir") from e
    own = {name: str(out / place) for name, place in saved_parts(config).items()}
    own |= {"tokenizer": ""} if "llama" in config.train else {}
    places = {k: own.get(k, getattr(config, k)) for k in PATHS}
    real = os.path.realpath  # out may be a link
    relative = {k: os.path.relpath(real(v), real(out)) if isinstance(v, str) and v else v
                for k, v in places.items()}
    temporary = out / ".config.json.tmp"
    temporary.write_text(to_json(replace(config, **relative)))
    os.replace(temporary, out / "config.json")


def save_checkpoint(model: MiniGPT4, optimizer, scaler, parameters: dict, step: int, reader: Reader,
                    config: Config):
    """Write the trained parts, then all that a resume needs: float32 weights, AdamW's moments, the step, and
    where the reader is."""
    if not all(p.isfinite().all() for p in parameters.values()):
        raise InputError(f"step {step}: the weights have become infinite or NaN; {NOT_FINITE}")
    for name in saved_parts(config):
        model.save_part(name, config.out_dir, config.save_dtype)
    tensors = {f"weight.{k}": p.detach() for k, p in parameters.items()}
    for k, p in parameters.items():  # a parameter that took no step yet has no state, as float16's at first
        zeros = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p), "step": torch.tensor(0.0)}
        tensors |= {f"{m}.{k}": (optimizer.state.get(p) or zeros)[m].detach() for m in zeros}
    metadata = {"step": str(step), "scaler": json.dumps(scaler.state_dict()),
                "reader": json.dumps(reader.state()), "frozen": json.dumps(frozen_parts(model, config))}
    save_tensors(tensors, Path(config.out_dir) / "state.safetensors", metadata)


def frozen_parts(model: MiniGPT4, config: Config) -> dict[str, str]:
    """{part: fingerprint} of those that do not learn."""
    marks = {name: mark for name, mark in model.fingerprints.items() if name not in config.train}
    if model.proj is not None and "proj" not in config.train:
        marks["proj"] = fingerprint(model.part_parameters("proj"))
    return marks


def load_checkpoint(model: MiniGPT4, optimizer, scaler, parameters: dict, config: Config,
                    device) -> tuple[int, dict | None]:
    """Put a run's last state back; returns the steps done and the reader's state, (0, None) at the start."""
    path = Path(config.out_dir) / "state.safetensors"
    if not path.is_file():
        return 0, None
    tensors, metadata = load_tensors(path)
    misfits = [k for k, p in parameters.items()
               if tensors.get(f"weight.{k}", torch.empty(0)).shape != p.shape]
    if misfits or len(tensors) != 4 * len(parameters):
        raise InputError(f"{path}: was saved by a run of other parts or sizes; give that run's config or "
                         "another --out_dir")
    marks = json.loads(metadata["frozen"])
    for name, mark in frozen_parts(model, config).items():
        if marks.get(name) != mark and not config.force:
            raise InputError(f"{path}: was saved beside another {name}; give the {name} of that run, another "
                             "--out_dir, or --force=True")
    saved_scaler = json.loads(metadata["scaler"])  # empty unless the run was in float16
    if bool(saved_scaler) != scaler.is_enabled():
        before = "in float16" if saved_scaler else "in another dtype than float16"
        raise InputError(f"{path}: was saved by a run {before}; give that run's --dtype or another --out_dir")
    for k, p in parameters.items():
        p.data.copy_(tensors[f"weight.{k}"])
        optimizer.state[p] = {m: tensors[f"{m}.{k}"].clone().to("cpu" if m == "step" else device)
                              for m in ("exp_avg", "exp_avg_sq", "step")}
    scaler.load_state_dict(saved_scaler)
    return int(metadata["step"]), json.loads(metadata["reader"])


def refuse_separate_folders(done: int):
    """Raise InputError when the processes, on several machines, did not resume at the same step."""
    steps = [None] * dist.get_world_size()
    dist.all_gather_object(steps, done)
    if len(set(steps)) > 1:
        raise InputError(f"resume: the processes found states of the steps {steps}; out_dir has to be one "
                         "folder for all machines")


class Log:
    """log.jsonl, one JSON object a line. On resume, lines of steps that are done again are taken out."""

    def __init__(self, config: Config, step: int):
        path, kept = Path(config.out_dir) / "log.jsonl", []
        if path.is_file() and step:
            for line in path.read_text(errors="replace").splitlines():
                try:
                    kept += [line + "\n"] if json.loads(line)["step"] <= step else []
                except (ValueError, TypeError, KeyError):  # the line at which the run was killed
                    pass
        temporary = path.with_name(".log.jsonl.tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, path)
        self.file = open(path, "a", buffering=1)

    def write(self, **values):
        """One line, on disk at once. Raises InputError for a loss that is no number."""
        if not isfinite(values.get("loss", 0.0)):
            raise InputError(f"step {values['step']}: the loss is {values['loss']}; {NOT_FINITE}")
        self.file.write(json.dumps(values) + "\n")


# ---- evaluation during training ----------------------------------------------------------------------------


@torch.no_grad()
def heldout_loss(model: MiniGPT4, samples, config: Config, device) -> float:
    """The mean loss per answer token over the first eval_samples held-out samples."""
    total, count = 0.0, 0
    first = list(samples.first(config.eval_samples))
    for at in range(0, len(first), config.batch_size):
        batch = collate(first[at:at + config.batch_size])
        total += model(*to_device(batch, device)).item() * batch.n_targets
        count += batch.n_targets
    return total / count


def show_answers(model: MiniGPT4, samples, config: Config, device) -> list[dict]:
    """Greedy answers to the first held-out samples, each beside the text of the data."""
    shown = []
    for images, ids, targets in samples.first(config.show_samples):
        start = next(at for at, t in enumerate(targets) if t != IGNORE)
        embeds = model.encode_image(torch.stack(images).to(device)) if images else None
        answer = model.generate(ids[:start], embeds, config.max_txt_len, temperature=0,
                                stop=stop_sequences(model.tokenizer, config.end_sym),
                                context=start + config.max_txt_len)
        wanted = [t for t in targets if t != IGNORE]
        shown.append({"answer": model.tokenizer.decode(list(answer)), "data": model.tokenizer.decode(wanted)})
    return shown


def report_heldout(model: MiniGPT4, samples, config: Config, device, step: int, log: Log | None, bar: tqdm):
    """Held-out loss and a few answers, into the log and above the progress bar of the rank that has a log."""
    shown = show_answers(model, samples, config, device)
    loss = heldout_loss(model, samples, config, device)
    if log:
        log.write(step=step, heldout_loss=loss, samples=shown)
        bar.write(f"step {step}: held-out loss {loss:.4f}", file=sys.stderr)
        for s in shown:
            bar.write(f"  answer: {s['answer']!r}\n  data:   {s['data']!r}", file=sys.stderr)


def to_device(batch: Batch, device) -> Batch:
    """The batch on the device, copied while the CPU goes on."""
    return Batch(*(t if t is None else t.to(device, non_blocking=True) for t in batch))


# ---- the loop ----------------------------------------------------------------------------------------------


def prepare_data(config: Config, rank: int):
    """Make what `prepare` names, is used and is missing, by its command; rank 0 does it, the others wait."""
    used, missing = [config.tokenizer], {}
    for data in (config.data, config.heldout_data):
        used += [data] if isinstance(data, str) else data
    for path, command in reversed(config.prepare.items()):  # one may read what an earlier one makes
        if not Path(path).exists() and any(f"{u}/".startswith(f"{path}/") for u in used):
            missing = {path: command} | missing
            used += [word.split("=", 1)[-1] for word in shlex.split(command)]
    if rank == 0:
        for path, command in missing.items():
            print(f"{path} is missing; making it: python {command}", file=sys.stderr)
            done = subprocess.run([sys.executable, *shlex.split(command)])
            if done.returncode:
                raise InputError(f"{path} could not be made: the command above failed")
    if dist.is_initialized():
        dist.barrier()


def open_data(config: Config, model: MiniGPT4) -> tuple[Samples, list[float], Samples | None]:
    """The samples to train on, the weights of their sources, and the held-out samples, if there are any."""
    opened = lambda data: open_samples(data, config, model.tokenizer, *model.image_shape)
    samples, weights = opened(config.data)
    heldout = opened(config.heldout_data)[0] if config.heldout_data else None
    if heldout and not list(heldout.first(1)):
        raise InputError(f"heldout_data {config.heldout_data}: not one of its samples can be used; mend it, "
                         "or train without")
    return samples, weights, heldout


def build(config: Config, device) -> MiniGPT4:
    """The model of a config, its blocks sharded, checkpointed and compiled as the config says."""
    if config.shard and not dist.is_initialized():
        raise InputError("shard = True: there is one process only; start several with torchrun")
    torch.manual_seed(config.seed)
    model = MiniGPT4.from_files(config.vision, config.qformer, config.llama, config.proj, config.dtype,
                                "cpu" if config.shard else device, config.train, config.tokenizer,
                                config.image_size, config.force)
    if config.shard:
        from torch.distributed.fsdp import fully_shard  # a second of imports, and 45 MB
        mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
        for block in model.llama.layers:  # each is moved to the device by itself, and shared out there
            fully_shard(block, mesh=mesh)
        model.to(device)
    model.llama.grad_checkpoint = config.grad_checkpoint
    if config.compile:
        if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
            raise InputError("compile = True: on a CPU it needs a C++ compiler; install g++ or switch it off")
        compile_blocks(model)
    return model


def compile_blocks(model: MiniGPT4):
    """torch.compile each block by itself: one graph for all of a kind, whatever the number of tokens."""
    for blocks in (model.vision and model.vision.blocks, model.qformer and model.qformer.layers,
                   model.llama.layers):
        for block in blocks or ():
            block.compile(dynamic=True)


@torch.no_grad()
def cache_features(model: MiniGPT4, all_samples: list, config: Config, device, rank: int, world: int):
    """Have the samples give features instead of pictures; the model then does without its towers."""
    model.fingerprints = model.companions()  # while all parts are there
    marks = [model.fingerprints.get(part, "none") for part in ("vision", "qformer")]
    cache = FeatureCache(config.cache_dir, "-".join((*marks, config.dtype, str(model.image_size))))
    for samples in all_samples:
        loader = DataLoader(Uncached(samples, cache, rank, world), config.batch_size, collate_fn=flatten,
                            num_workers=config.num_workers)
        for pictures in tqdm(loader, desc="features", disable=rank > 0, dynamic_ncols=True):
            if pictures:
                paths, images = zip(*pictures)
                for path, features in zip(paths, model.image_features(torch.stack(images).to(device)).cpu()):
                    cache.put(path, features.clone())
        samples.cache = cache
    model.vision = model.ln_vision = model.qformer = None
    if world > 1:
        dist.barrier()


def train_step(wrapped, batches: list[Batch], optimizer, scaler, parameters: dict, config: Config,
               lr: float, device) -> torch.Tensor:
    """One step of AdamW over the micro-batches. The loss is the mean over all answer tokens of all ranks, and
    so is the gradient: each micro-batch counts by its number of answer tokens."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    counts = [b.n_targets for b in batches]
    total = torch.tensor(float(sum(counts)), device=device)
    if world > 1:
        dist.all_reduce(total)
    loss_sum = torch.zeros((), device=device)
    for i, (batch, count) in enumerate(zip(batches, counts)):
        last = i == len(batches) - 1
        with nullcontext() if last or world == 1 else wrapped.no_sync():
            loss = wrapped(*to_device(batch, device)) * (count / total)
            if batch.images is None and config.vision:  # DistributedDataParallel waits for every gradient
                loss = loss + 0 * sum(p.sum() for p in parameters.values())
            scaler.scale(loss * world).backward()  # DistributedDataParallel takes the mean over ranks
        loss_sum += loss.detach()
    for group in optimizer.param_groups:
        group["lr"] = lr
    if config.grad_clip:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters.values(), config.grad_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss_sum


def warn_of_chance(loss: float, vocab_size: int):
    """A frozen language model whose first loss is that of drawing lots has the wrong weights."""
    if loss > log(vocab_size) - 0.5:
        print(f"warning: the first loss, {loss:.2f}, is that of guessing among {vocab_size} tokens "
              f"({log(vocab_size):.2f}); look whether the language model is whole, with python chat.py "
              "--ckpt=OUT_DIR --check=True", file=sys.stderr)


def train(config: Config, device, rank: int = 0, world: int = 1):
    """Run the config from its first or its last saved step to max_steps."""
    refuse_to_overwrite(config)
    prepare_data(config, rank)
    model = build(config, device)
    samples, weights, heldout = open_data(config, model)
    if config.cache_features:
        cache_features(model, [samples] + [heldout] * bool(heldout), config, device, rank, world)
    parameters = {f"{name}.{k}": p for name in config.train for k, p in model.part_parameters(name).items()}
    optimizer = make_optimizer(parameters, config)
    scaler = torch.amp.GradScaler(device.type, enabled=config.dtype == "float16")
    done, read = (load_checkpoint(model, optimizer, scaler, parameters, config, device) if config.resume
                  else (0, None))
    if world > 1:
        refuse_separate_folders(done)
    reader = Reader(samples, weights, config, rank, world, read)
    if rank == 0:
        start_folder(config)  # after the state was found to fit: a refused resume changes nothing
    log = Log(config, done) if rank == 0 else None
    # without init_sync, since all ranks start alike, by seed
    wrapped = DistributedDataParallel(model, init_sync=False) if world > 1 else model
    batches = iter(reader)
    if config.profile and config.max_steps - done < 6:
        raise InputError("profile = True: it looks at the steps 4 to 6; raise max_steps")
    profiler = start_profiler(config, device) if config.profile and rank == 0 else None
    meter = Meter(model, config, device, world)
    bar = tqdm(total=config.max_steps, initial=done, disable=rank > 0, unit="step", dynamic_ncols=True)
    for step in range(done, config.max_steps):
        asked = time.perf_counter()
        micro = [next(batches) for _ in range(config.grad_accum)]
        meter.add(micro, time.perf_counter() - asked)
        lr = learning_rate(step, config)
        loss = train_step(wrapped, micro, optimizer, scaler, parameters, config, lr, device)
        if profiler:
            profiler.step()
        finished = step + 1
        due = lambda interval: finished % interval == 0 or finished == config.max_steps
        if world > 1 and (step == 0 or due(config.log_interval)):
            dist.all_reduce(loss)  # until here each rank has its own share
        if step == 0 and rank == 0 and "llama" not in config.train:
            warn_of_chance(loss.item(), model.llama.config.vocab_size)
        if due(config.log_interval):
            if rank == 0:
                value, rates = loss.item(), meter.rates()
                log.write(step=finished, loss=value, lr=lr, **rates)
                bar.set_postfix(loss=f"{value:.3f}", lr=f"{lr:.1e}", **rates)
            meter.start()
        bar.update()
        if heldout and due(config.eval_interval) and (rank == 0 or config.shard):  # shards need all ranks
            report_heldout(model, heldout, config, device, finished, log, bar)
            meter.start()
        if rank == 0 and due(config.save_interval):
            save_checkpoint(model, optimizer, scaler, parameters, finished, reader, config)
            if reader.skipped:
                log.write(step=finished, skipped=dict(reader.skipped), of=reader.looked_at)
                bar.write(f"step {finished}: {reader.account()}", file=sys.stderr)
            meter.start()
    bar.close()
    if profiler:
        profiler.stop()


def main(argv: list[str]):
    """`CONFIG [--key=value ...]`; under torchrun, one process per device."""
    positional, options = parse_args(argv)
    if len(positional) != 1:
        raise InputError("usage: python train.py CONFIG [--key=value ...], for instance "
                         "configs/tiny_stage1.py")
    config = load_config(positional[0], options)
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if config.dry_run:
        from tools.dry_run import describe_training
        if int(os.environ.get("RANK", 0)) == 0:
            print(describe_training(config, world))
        return
    device = pick_device(config.device, local)
    if world > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))  # rank 0 makes data, evaluates, saves
    try:
        if (rank := dist.get_rank() if world > 1 else 0) == 0:
            print(to_json(config), file=sys.stderr)
        train(config, device, rank, world)
        if world > 1:
            dist.barrier()  # a rank that leaves while rank 0 evaluates and saves may crash on its way out
    finally:
        if world > 1:
            gc.collect()  # what still holds the group, so that its threads end before Python does
            dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
