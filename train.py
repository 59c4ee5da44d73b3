"""Train MiniGPT-4: both stages, and every part of the tiny world, from a config file.

    python train.py configs/tiny_stage1.py                    one process, a laptop
    torchrun --nproc-per-node 4 train.py configs/stage1.py    the paper's stage 1
    python train.py configs/stage2.py --max_steps=400 --resume

The command line overrides any field of the config. out_dir then holds proj.safetensors,
config.json, log.jsonl, and state.pt, from which --resume continues a killed run.
"""

import math
import os
import shlex
import sys

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from configs.prompts import IMAGE, stop_sequences
from configs.schema import Config, load_config, read_saved_config, write_saved_config
from data import (
    Batch,
    Example,
    Samples,
    TrainingSteps,
    cache_features,
    collate,
    open_samples,
)
from llama import IGNORE
from model import MiniGPT4
from plumbing.console import InputError, note, outlive_reader, run_main, set_quiet
from plumbing.meter import Meter
from plumbing.options import parse_args, to_json
from plumbing.processes import (
    StopSignals,
    all_sum,
    check_same_everywhere,
    data_parallel,
    make_missing,
    n_processes,
    process_group,
)
from plumbing.quantized import autocast, compile_blocks
from plumbing.run import Checkpoint, RunFolder, RunLog
from plumbing.weights import fingerprint


def learning_rate(step: int, config: Config) -> float:
    """Linear from warmup_lr to lr, then a cosine to min_lr; steps count from 0.

    Quirk kept: the cosine counts the warm-up steps too.
    """
    if step < config.warmup_steps:
        share = step / config.warmup_steps
        return config.warmup_lr + (config.lr - config.warmup_lr) * share
    share = (1 + math.cos(math.pi * step / config.max_steps)) / 2
    return config.min_lr + (config.lr - config.min_lr) * share


def make_optimizer(
    parameters: list[torch.nn.Parameter], config: Config
) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices, none on biases and norms."""
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    decay = config.weight_decay
    return torch.optim.AdamW(
        groups, config.lr, config.betas, eps=1e-8, weight_decay=decay
    )


def train_step(
    model, batches: list[Batch], optimizer, scaler, lr: float, grad_clip: float = 0.0
) -> tuple[torch.Tensor, bool]:
    """A step along the gradient of the mean loss over all answer tokens.

    They are those of all micro-batches and ranks. Returns this loss, and whether it and
    its gradient are finite: if not, nothing is learned. Both are the same on all ranks.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    device = parameters[0].device
    n_own_targets = float(sum(batch.n_targets for batch in batches))
    n_targets = all_sum(torch.tensor(n_own_targets, device=device)).clamp(min=1)
    loss_sum = torch.zeros_like(n_targets)
    for i, batch in enumerate(batches, 1):
        model.require_backward_grad_sync = i == len(batches)  # for DDP
        batch_loss = model(*batch.to(device)) * batch.n_targets
        loss_sum += batch_loss.detach()
        if batch.images is None:
            # DDP waits for all gradients, also of a projection without pictures.
            batch_loss = batch_loss + 0 * sum(p.sum() for p in parameters)
        # DDP averages gradients over the ranks; here they add up.
        scaler.scale(batch_loss * (n_processes() / n_targets)).backward()

    for group in optimizer.param_groups:
        group["lr"] = lr
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf)
    loss = all_sum(loss_sum) / n_targets
    # A scaler expects infinite gradients now and then, and skips their step itself.
    gradient_is_finite = norm.isfinite() | scaler.is_enabled()
    is_finite = bool(loss.isfinite() & gradient_is_finite)  # waits for the device
    if is_finite:
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss, is_finite


@torch.no_grad()
def evaluate(
    model: MiniGPT4, samples: Samples, config: Config, device, interrupted=None
) -> tuple[float, list[dict]] | None:
    """The mean loss per answer token, and greedy answers beside the data's.

    None if interrupted() says so in between.
    """
    examples, faults = samples.first(config.eval_samples)
    if faults:
        note(
            f"warning: {len(faults)} held-out samples cannot be used, "
            f"such as {min(faults).message}"
        )
    loss_sum = 0.0
    n_targets = 0
    for batch in DataLoader(examples, config.batch_size, collate_fn=collate):
        if interrupted and interrupted():
            return None
        loss_sum += model(*batch.to(device)).item() * batch.n_targets
        n_targets += batch.n_targets
    shown, _ = samples.first(config.show_samples)
    answers = [answer_example(model, example, config, device) for example in shown]
    return loss_sum / n_targets, answers


def answer_example(
    model: MiniGPT4, example: Example, config: Config, device
) -> dict[str, str]:
    """The greedy answer to a sample's first question, beside the data's answer."""
    images, ids, targets = example
    is_target = [target != IGNORE for target in targets]
    start = is_target.index(True)
    end = [*is_target, False].index(False, start)
    image_embeds = None
    if IMAGE in ids[:start]:  # later turns may have pictures of their own
        n_images = ids[:start].count(IMAGE) // model.n_image_tokens
        image_embeds = model.encode_image(torch.stack(images[:n_images]).to(device))
    answer = model.generate(
        ids[:start],
        image_embeds,
        stop=stop_sequences(model.tokenizer, config.answer_end),
        max_new_tokens=config.max_txt_len,
        temperature=0,
        context=start + config.max_txt_len,
    )
    return {
        "answer": model.tokenizer.decode(list(answer)),
        "data": model.tokenizer.decode(targets[start:end]),
    }


def build(config: Config, device: torch.device) -> MiniGPT4:
    """The model, its blocks sharded, checkpointed and compiled as the config says."""
    if config.shard and n_processes() == 1:
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

        mesh = dist.init_device_mesh(device.type, (n_processes(),))
        # One block at a time is moved to the device, and sharded there.
        for block in model.llama.layers:
            fully_shard(block, mesh=mesh)
        model.to(device)
    model.llama.grad_checkpoint = config.grad_checkpoint
    # Trained parts are float32. On a GPU they compute in the dtype of the frozen ones;
    # the projection alone is too small to matter, and stays exact.
    if device.type == "cuda" and config.trainable != ("proj",):
        model.forward = autocast(model.forward, device, config.dtype)
    if config.compile:
        for part in (model.vision, model.bridge, model.llama):
            compile_blocks(part, device)
    return model


def open_data(
    config: Config, model: MiniGPT4, device
) -> tuple[Samples, dict[str, float], Samples | None]:
    """The training samples, the weights of their sources, the held-out samples."""
    shape = (model.tokenizer, model.image_size, model.n_image_tokens)
    samples, weights = open_samples(config.data, config, *shape)
    heldout = None
    if config.heldout_data:
        heldout, _ = open_samples(config.heldout_data, config, *shape)
        if not heldout.first(1)[0]:
            raise InputError(
                f"heldout_data {config.heldout_data}: "
                "not one of its samples can be used; fix it"
            )
    if config.cache_features:
        cache_features(samples, model.image_features, config, device)
        if heldout:
            cache_features(heldout, model.image_features, config, device)
        model.drop_vision(to_save=config.part_files())
    return samples, weights, heldout


def open_folder(config: Config) -> RunFolder:
    """The run's folder. Raises InputError if it holds something else."""
    folder = RunFolder(
        config.out_dir, list(config.part_files().values()), config.resume
    )
    if (folder.path / "config.json").exists():
        read_saved_config(config.out_dir)  # refuses another program's config.json
    return folder


def make_checkpoint(
    folder: RunFolder, model: MiniGPT4, config: Config, identity: dict, device
) -> Checkpoint:
    """What learns, its optimizer and gradient scaler, and how to save them."""
    tensors = {}
    for name in config.trainable:
        for key, tensor in model.part_tensors(name).items():
            tensors[f"{name}.{key}"] = tensor
    learning = [t for t in tensors.values() if t.requires_grad]
    scaler = torch.amp.GradScaler(device.type, enabled=config.dtype == "float16")
    identity = identity | {
        "trainable": config.trainable,
        "use of float16": scaler.is_enabled(),
    }
    frozen = dict(model.fingerprints)
    if model.proj:
        frozen["proj"] = fingerprint(model.part_tensors("proj"))
    for name in config.trainable:
        frozen.pop(name, None)

    def save_parts():
        for name in config.part_files():
            model.save_part(name, config.out_dir, config.save_dtype)

    optimizer = make_optimizer(learning, config)
    return Checkpoint(folder, tensors, optimizer, scaler, identity, frozen, save_parts)


def train(config: Config, device: torch.device, rank: int = 0, world: int = 1) -> bool:
    """Run the config from its first or last saved step on; True if Ctrl-C ended it."""
    set_quiet(rank > 0)
    folder = open_folder(config)
    if rank == 0:
        make_missing(config.prepare, config.data_paths())
    if world > 1:
        dist.barrier()
    model = build(config, device)
    samples, weights, heldout = open_data(config, model, device)
    steps = TrainingSteps(samples, weights, config, rank, world)
    checkpoint = make_checkpoint(folder, model, config, steps.identity, device)
    done = checkpoint.load() if config.resume else 0
    check_same_everywhere((done, steps.identity), "checkpoint or data")
    if done >= config.max_steps:
        if rank == 0:
            checkpoint.save_missing_parts()
        note(f"{config.out_dir}: its run is already at step {done:,}")
        return False
    if rank > 0 and not config.shard:
        heldout = None  # rank 0 evaluates
    meter = Meter(list(weights), device, 1e12 * config.peak_tflops)
    with RunLog(folder, config.max_steps, done, is_silent=rank > 0) as log:
        if rank == 0:
            write_saved_config(config)  # not earlier: a refused run changes nothing
        return run_steps(config, model, steps, heldout, checkpoint, meter, log, done)


def run_steps(
    config: Config,
    model: MiniGPT4,
    steps: TrainingSteps,
    heldout: Samples | None,
    checkpoint: Checkpoint,
    meter: Meter,
    log: RunLog,
    done: int,
) -> bool:
    """Train from step `done` + 1 on: log, save, evaluate; until a signal."""
    optimizer, scaler = checkpoint.optimizer, checkpoint.scaler
    stop = StopSignals(meter.device)
    # Sharded, an evaluation needs all ranks: none may leave it alone.
    interrupted = None if config.shard else stop.came
    ddp_model = data_parallel(model)

    n_failed = 0
    for step, source, batches in meter.waiting(steps.read(start=done + 1)):
        lr = learning_rate(step - 1, config)
        with meter.counting_flops(batches):
            loss, is_finite = train_step(
                ddp_model, batches, optimizer, scaler, lr, config.grad_clip
            )
        if is_finite:
            n_failed = 0
            meter.add(source, loss, batches)
        else:
            n_failed += 1
            log.failure(step, n_failed, steps.describe(step))

        finished = step == config.max_steps
        last = stop.requested() or finished
        log.advance()
        if last or step % config.log_interval == 0:
            log.speed(step, lr, step * steps.step_size, meter.report())
        with meter.paused():
            # Save first: an evaluation that fails costs nothing.
            if last or step % config.save_interval == 0:
                if steps.rank == 0:
                    checkpoint.save(step)
                log.skipped(step, steps.account)
            is_due = step % config.eval_interval == 0 and not last
            if heldout and (finished or is_due):
                result = evaluate(model, heldout, config, meter.device, interrupted)
                log.evaluation(step, result)
        if last:
            break
    if not finished:
        note(f"stopped after step {step}, which is saved; --resume continues")
    return stop.interrupted and not finished


def main(argv: list[str]):
    (path,), options = parse_args(argv, __doc__, "CONFIG", Config)
    config = load_config(path, options)
    outlive_reader(sys.stderr)
    # Huge pages on Linux: pictures are normalized faster.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with process_group(config.device) as (device, rank, world):
        if rank == 0:
            print(to_json(config), file=sys.stderr)
        was_interrupted = train(config, device, rank, world)
    if was_interrupted:
        raise KeyboardInterrupt
    if rank == 0:
        command = ["python", "chat.py"]
        if config.vision:
            command.append("assets/tiny/example.png")
        command.append(f"--ckpt={config.out_dir}")
        print(shlex.join(command), file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
