"""Train stage 1 or stage 2 of MiniGPT-4 from a config file.

    python train.py configs/tiny_stage1.py                    one process, a laptop
    torchrun --nproc-per-node 4 train.py configs/stage1.py    the paper's stage 1
    python train.py configs/stage2.py --max_steps=400 --resume

Every field of the config is an option; the defaults in --help are for fields that it
leaves unset. The run writes proj.safetensors, config.json and log.jsonl to out_dir, and
the checkpoint state.pt, from which --resume continues. Configs can also train other
parts, or a language model alone, without vision and projection.
"""

import math
import os
import shlex
import sys
from itertools import takewhile

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from configs.prompts import IMAGE, check_template, stop_sequences
from configs.schema import Config, load_config, read_saved_config, write_saved_config
from data import (
    Batch,
    Example,
    Samples,
    TrainingSteps,
    collate,
    open_samples,
    precompute_features,
)
from llama import IGNORE
from model import MiniGPT4
from plumbing.console import InputError, note, outlive_reader, run_main, set_quiet
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
from plumbing.quantized import compile_blocks, graph_steps
from plumbing.run import Checkpoint, Meter, RunFolder, RunLog
from plumbing.weights import check_fetched


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
    """Take a step along the gradient of the mean loss over all answer tokens.

    "All" means those of all micro-batches on all ranks. Returns this mean loss, and
    whether loss and gradient are finite; both are the same on all ranks. If not, no
    weight changes. In float16 only the loss is checked: the scaler takes care of
    infinite gradients, skips their step and lowers its scale.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    device = parameters[0].device
    n_on_this_rank = float(sum(batch.n_targets for batch in batches))
    n_targets = all_sum(torch.tensor(n_on_this_rank, device=device)).clamp(min=1)
    # The model returns the mean loss of a micro-batch. The mean over all answer tokens
    # is the sum, over ranks and micro-batches, of mean * batch.n_targets / n_targets.
    # DDP divides the sum over the ranks by n_processes(): multiply by it.
    weight = n_processes() / n_targets
    loss_sum = torch.zeros_like(n_targets)
    for i, batch in enumerate(batches, 1):
        # DDP exchanges gradients only after the last micro-batch. (Without DDP, this
        # sets an attribute that nobody reads.)
        model.require_backward_grad_sync = i == len(batches)
        images, tokens, targets = batch.to(device)
        batch_sum = model(images, tokens, targets) * batch.n_targets
        loss_sum += batch_sum.detach()
        if images is None:
            # The projection is not used then, but DDP waits for the gradients of all
            # parameters: add zero times each.
            batch_sum = batch_sum + 0 * sum(p.sum() for p in parameters)
        scaler.scale(batch_sum * weight).backward()

    for group in optimizer.param_groups:
        group["lr"] = lr
    scaler.unscale_(optimizer)
    max_norm = grad_clip if grad_clip > 0 else math.inf
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    loss = all_sum(loss_sum) / n_targets
    is_finite = bool(loss.isfinite())  # waits for the device
    if not scaler.is_enabled():
        is_finite = is_finite and bool(norm.isfinite())
    if is_finite:
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss, is_finite


@torch.no_grad()
def evaluate(
    model: MiniGPT4,
    samples: Samples,
    config: Config,
    device,
    stop: StopSignals | None = None,
) -> tuple[float, list[dict]] | None:
    """The mean loss per answer token, and some greedy answers beside the data's.

    A signal to stop cuts it short; the result is None then.
    """
    # A sharded model needs all ranks at each batch: none may leave early.
    may_leave = stop is not None and not config.shard
    examples, faults = samples.first(config.eval_samples)
    if faults:
        note(
            f"warning: {len(faults)} held-out samples cannot be used, "
            f"such as {faults[0].message}"
        )
    loss_sum = 0.0
    n_targets = 0
    for batch in DataLoader(examples, config.batch_size, collate_fn=collate):
        if may_leave and stop.received:
            return None
        images, tokens, targets = batch.to(device)
        loss_sum += model(images, tokens, targets).item() * batch.n_targets
        n_targets += batch.n_targets
    shown, _ = samples.first(config.show_samples)
    answers = [answer_example(model, example, config, device) for example in shown]
    return loss_sum / n_targets, answers


def answer_example(
    model: MiniGPT4, example: Example, config: Config, device
) -> dict[str, str]:
    """The greedy answer to the first question of a sample, beside the data's answer."""
    # targets[i] is ids[i], not shifted, or IGNORE where nothing is to be predicted.
    images, ids, targets = example
    is_answer = [target != IGNORE for target in targets]
    start = is_answer.index(True)
    wanted = list(takewhile(lambda target: target != IGNORE, targets[start:]))
    prompt = ids[:start]
    # A picture has n_image_tokens places in the ids, each with the id IMAGE. The first
    # pictures are the prompt's; later turns, which are not asked here, may have others.
    image_embeds = None
    if IMAGE in prompt:
        n_images = prompt.count(IMAGE) // model.n_image_tokens
        image_embeds = model.encode_image(torch.stack(images[:n_images]).to(device))
    answer = model.generate(
        prompt,
        image_embeds,
        stop=stop_sequences(model.tokenizer, config.answer_end),
        max_new_tokens=config.max_txt_len,
        temperature=0,
        context=start + config.max_txt_len,  # cut nothing, however long the prompt is
    )
    return {
        "answer": model.tokenizer.decode(list(answer)),
        "data": model.tokenizer.decode(wanted),
    }


def build(config: Config, device: torch.device) -> MiniGPT4:
    """The model, its blocks sharded, checkpointed and compiled as the config says.

    It stays in eval mode: training uses no dropout.
    """
    if config.shard and n_processes() == 1:
        raise InputError(
            "shard = True: there is only one process; start several with torchrun"
        )
    torch.manual_seed(config.seed)
    model = MiniGPT4.from_files(
        **config.parts(),  # vision, qformer, llama, proj, tokenizer
        dtype=config.dtype,
        trainable=config.trainable,
        device="cpu" if config.shard else device,
        image_size=config.image_size,
    )
    check_template(model.tokenizer, config.template, config.answer_end)
    if config.shard:
        shard_llama(model, device)
    model.llama.grad_checkpoint = config.grad_checkpoint
    if device.type == "cuda":  # on a CPU, float32 is faster
        mix_precision(model, config, device)
    if config.compile:
        compile_blocks(model, device)
    if config.cuda_graphs:
        model.graphed_steps = graph_steps(model.llama)
    return model


def mix_precision(model: MiniGPT4, config: Config, device: torch.device):
    """Let trained parts, kept in float32, compute in the dtype of the frozen ones.

    This concerns the loss, not `generate`. Without autocast each part computes in the
    dtype of its own weights. The projection alone is too small to be worth it.
    """
    if config.dtype != "float32" and config.trainable != ("proj",):
        mixed = torch.autocast(device.type, getattr(torch, config.dtype))
        model.forward = mixed(model.forward)


def shard_llama(model: MiniGPT4, device: torch.device):
    """Spread the blocks of the frozen LLaMA over the ranks.

    Each rank has a copy of all other weights.

    fully_shard moves a block from the CPU to the device: no device ever holds all of
    them. Trained parts are not sharded; DDP averages their gradients as always.
    """
    from torch.distributed.fsdp import fully_shard  # takes a second to import

    mesh = dist.init_device_mesh(device.type, (n_processes(),))
    for block in model.llama.layers:
        fully_shard(block, mesh=mesh)
    model.to(device)


def open_data(
    config: Config, model: MiniGPT4, device
) -> tuple[Samples, dict[str, float], Samples | None]:
    """The training samples, {path: weight} of their sources, the held-out samples."""
    encoding = (model.tokenizer, model.image_size, model.n_image_tokens)
    samples, source_weights = open_samples(config.data, config, *encoding)
    heldout = None
    if config.heldout_data:
        heldout, _ = open_samples(config.heldout_data, config, *encoding)
        first_usable, _ = heldout.first(1)
        if not first_usable:
            raise InputError(
                f"heldout_data {config.heldout_data}: "
                "not one of its samples can be used; fix it"
            )
    if config.cache_features:
        # From here on the samples have features in place of pictures; the model takes
        # both. Its vision side is freed, except for parts that the run has to save.
        precompute_features(samples, model.image_features, config, device)
        if heldout:
            precompute_features(heldout, model.image_features, config, device)
        model.drop_vision(to_save=config.part_files())
    return samples, source_weights, heldout


def open_folder(config: Config) -> RunFolder:
    """out_dir, checked: a run must neither overwrite another one nor other files."""
    # The run saves the parts that it trains, and those that a config makes from a dict
    # of sizes, with random weights.
    part_files = list(config.part_files().values())
    # Raises InputError if there is a run and no --resume, or if it lost its state.pt.
    folder = RunFolder(config.out_dir, part_files, config.resume)
    if (folder.path / "config.json").exists():
        read_saved_config(config.out_dir)  # raises InputError if it is not a run's
    return folder


def make_checkpoint(
    folder: RunFolder, model: MiniGPT4, config: Config, identity: dict, device
) -> Checkpoint:
    """What learns, its optimizer and gradient scaler, and how to save them.

    identity: settings that must be the same when a run is resumed. A frozen part with
    another fingerprint only causes a warning.
    """
    tensors = {}
    for name in config.trainable:
        for key, tensor in model.part_tensors(name).items():
            tensors[f"{name}.{key}"] = tensor
    parameters = [t for t in tensors.values() if t.requires_grad]  # no buffers
    optimizer = make_optimizer(parameters, config)
    scaler = torch.amp.GradScaler(device.type, enabled=config.dtype == "float16")
    identity = identity | {
        "trainable": config.trainable,
        "use of float16": scaler.is_enabled(),
    }
    frozen = {
        name: fingerprint
        for name, fingerprint in model.fingerprints.items()
        if name not in config.trainable
    }

    def save_parts():
        for name in config.part_files():
            model.save_part(name, config.out_dir, config.save_dtype)

    return Checkpoint(folder, tensors, optimizer, scaler, identity, frozen, save_parts)


def train(config: Config, device: torch.device, rank: int = 0, world: int = 1) -> bool:
    """Run the config to its end, or until a signal; --resume starts at the last save.

    rank: of this process, of `world`. Returns whether Ctrl-C ended the run.
    """
    set_quiet(rank > 0)
    folder = open_folder(config)
    for source in config.parts().values():
        check_fetched(source)
    if rank == 0:
        # Runs the commands of config.prepare, which draw the tiny world's pictures and
        # make the tokenizer of its language model.
        make_missing(config.prepare, config.data_paths())
    if world > 1:
        dist.barrier()
    model = build(config, device)
    samples, source_weights, heldout = open_data(config, model, device)
    steps = TrainingSteps(samples, source_weights, config, rank, world)
    checkpoint = make_checkpoint(folder, model, config, steps.identity, device)
    n_done = checkpoint.load() if config.resume else 0
    check_same_everywhere((n_done, steps.identity), "checkpoint or data")
    if n_done >= config.max_steps:
        if rank == 0:
            # It may have been killed between its first state.pt and its first parts.
            checkpoint.save_missing_parts()
        note(f"{config.out_dir}: its run is already at step {n_done:,}")
        return False
    meter = Meter(list(source_weights), device, 1e12 * config.peak_tflops)
    with RunLog(folder, config.max_steps, n_done, is_silent=rank > 0) as log:
        if rank == 0:
            write_saved_config(config)  # not earlier: a refused run changes nothing
        return run_steps(
            config, model, steps, heldout, checkpoint, meter, log, n_done, device
        )


def run_steps(
    config: Config,
    model: MiniGPT4,
    steps: TrainingSteps,
    heldout: Samples | None,
    checkpoint: Checkpoint,
    meter: Meter,
    log: RunLog,
    n_done: int,
    device: torch.device,
) -> bool:
    """The training loop, after `n_done` steps. Returns whether Ctrl-C ended it."""
    optimizer, scaler = checkpoint.optimizer, checkpoint.scaler
    stop = StopSignals(device)
    # Rank 0 evaluates, and the others wait in the next step; but a sharded model needs
    # all ranks for it.
    evaluates = heldout is not None and (steps.rank == 0 or config.shard)
    ddp_model = data_parallel(model)  # the model itself if there is one process

    # Steps count from 1. The micro-batches of a step, `batches`, are of one source.
    for step, source, batches in meter.time_waiting(steps.read(start=n_done + 1)):
        lr = learning_rate(step - 1, config)
        with meter.counting_flops(batches):
            loss, is_finite = train_step(
                ddp_model, batches, optimizer, scaler, lr, config.grad_clip
            )
        if is_finite:
            meter.add(source, loss, batches)
        else:  # raises InputError after too many successive steps
            log.failure(step, steps.describe(step))

        finished = step == config.max_steps
        stopping = stop.received_anywhere()
        last = finished or stopping
        log.advance()
        if last or step % config.log_interval == 0:
            # The report has the mean loss, and the speed, since the last one.
            log.progress(step, lr, step * steps.samples_per_step, meter.report())
        with meter.paused():
            # Save first: an evaluation that fails costs nothing.
            if steps.rank == 0 and (last or step % config.save_interval == 0):
                checkpoint.save(step)
                log.bad_samples(step, steps.account)  # counted by rank 0, on its share
            is_due = step % config.eval_interval == 0 and not stopping
            if evaluates and (finished or is_due):
                # None if a signal cut it short; the loop then ends with the next step.
                result = evaluate(model, heldout, config, device, stop)
                log.evaluation(step, result)
        if last:
            break
    if finished:
        return False
    note(f"stopped after step {step}, which is saved; --resume continues")
    return stop.was_ctrl_c()


def main(argv: list[str]):
    paths, options = parse_args(argv, __doc__, "CONFIG", Config)
    config = load_config(paths[0], options)
    outlive_reader(sys.stderr)  # a run goes on when nobody reads its messages any more
    # PyTorch's allocator reads this when it is first used. With huge pages (on Linux)
    # pictures are normalized faster.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with process_group(config.device) as (device, rank, world):
        if rank == 0:
            print(to_json(config), file=sys.stderr)
        was_interrupted = train(config, device, rank, world)
    if was_interrupted:
        raise KeyboardInterrupt  # status 130; after SIGTERM or SIGUSR1 it is 0
    if rank == 0:
        command = ["python", "chat.py"]
        if config.vision:
            command.append("assets/tiny/example.png")
        command.append(f"--ckpt={config.out_dir}")
        print(shlex.join(command), file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
