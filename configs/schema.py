"""The typed configuration of a training run, and what all programs share: options, notes, looks at files.

A config file is plain Python that assigns fields of `Config`; a variant imports another one and states the
difference. The command line overrides any field: `--key=value`, `--key value`, or a bare `--key` for True.
"""

import os
import runpy
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from configs.prompts import TEMPLATES, parse_end
from plumbing.console import InputError
from plumbing.files import read_json
from plumbing.options import check_options, option, override
from plumbing.weights import DTYPES


@dataclass(frozen=True)
class Config:
    """One training run. Paths are relative to the working directory; an empty string means "none"."""

    # The model's parts; a dict holds the sizes of a new part, with random weights.
    vision: str | dict = option("", "weight file; none: train on text alone")
    qformer: str | dict = option(
        "", "weight file; none: join 4 patches per image token"
    )
    llama: str | dict = option("", "weight folder")
    proj: str = option("", "weight file; none: a new, random projection")
    tokenizer: str = option("", "tokenizer.model; none: the one in the llama folder")
    trainable: tuple[str, ...] = option(
        ("proj",), "parts to train: vision, qformer, proj, llama"
    )
    image_size: int = option(
        0, "pixels; 0: what the vision part was trained with", least=0, most=2048
    )
    # The data.
    data: str | dict | list = option(
        "",
        "a path, paths or {path: weight}, of which a step takes one: tar "
        "shards (a glob, {00..99}.tar, a folder, a .txt list), a filter_cap.json's folder, a .jsonl or .json",
    )
    heldout_data: str | dict | list = option(
        "", "the same; none: no evaluation during training"
    )
    prepare: dict = option(
        {}, "{path: arguments of python that make it, if data needs it}"
    )
    template: str = option(
        "", "none: picture, then caption, as in stage 1", choices=("", *TEMPLATES)
    )
    end_sym: str = option(
        "", "ends every answer: a text, or the token </s>; none: the template's own"
    )
    max_txt_len: int = option(
        32, "tokens of an answer with its end; longer ones are cut", least=1
    )
    clean_captions: bool = option(
        False, "lower case, less punctuation, at most 50 words, as in stage 1"
    )
    chat_share: float = option(
        0.0, "share of conversations with chat's system text", least=0, most=1
    )
    shuffle_shards: int = option(
        8, "shards whose samples are shuffled together", least=1
    )
    length_group: int = option(
        1, "steps sorted by length together; workers' memory grows with it", least=1
    )
    max_bad_fraction: float = option(
        0.1, "of the samples; more unusable ones stop the run", least=0
    )
    num_workers: int = option(2, "data-loading processes per training process", least=0)
    seed: int = option(
        42, "of new weights and of the order of the samples", least=0, most=2**63 - 1
    )
    # The optimizer, AdamW. A step has processes x batch_size x grad_accum samples.
    batch_size: int = option(64, "samples per process and micro-batch", least=1)
    grad_accum: int = option(1, "micro-batches per step", least=1)
    max_steps: int = option(20_000, "steps", least=1, most=10**8)
    lr: float = option(1e-4, "highest learning rate", least=0)
    min_lr: float = option(8e-5, "learning rate at the end", least=0)
    warmup_lr: float = option(1e-6, "learning rate of step 0", least=0)
    warmup_steps: int = option(5000, "steps from warmup_lr to lr", least=0)
    weight_decay: float = option(
        0.05, "of matrices; biases and norms have none", least=0
    )
    betas: tuple[float, ...] = option((0.9, 0.999), "of AdamW")
    grad_clip: float = option(
        0.0, "largest norm of the gradient; 0: no clipping", least=0
    )
    # The machine.
    device: str = option("", "none: cuda if there is one, else cpu")
    dtype: str = option(
        "bfloat16", "of the frozen parts; trainable ones are float32", choices=DTYPES
    )
    cache_features: bool = option(
        False, "keep the frozen vision features of all pictures in memory"
    )
    grad_checkpoint: bool = option(
        False, "recompute LLaMA's activations instead of keeping them"
    )
    compile: bool = option(False, "torch.compile the blocks")
    shard: bool = option(False, "shard LLaMA's blocks over the processes (fully_shard)")
    peak_tflops: float = option(
        0.0, "of the device in `dtype`; the log then shows mfu", least=0
    )
    # The run's folder, and what is written to it.
    out_dir: str = option("out/run", "the run's folder")
    log_interval: int = option(10, "steps", least=1)
    eval_interval: int = option(500, "steps", least=1)
    eval_samples: int = option(128, "held-out samples whose loss is taken", least=1)
    show_samples: int = option(2, "sample answers per evaluation", least=0)
    save_interval: int = option(500, "steps", least=1)
    save_dtype: str = option(
        "float32", "of the trained parts' files", choices=DTYPES[:2]
    )
    resume: bool = option(
        False, "continue from out_dir's last checkpoint, if there is one"
    )

    @property
    def answer_end(self) -> str | int:
        """What ends every answer: a text or END."""
        if self.end_sym:
            return parse_end(self.end_sym)
        return TEMPLATES[self.template].end if self.template else "\n"

    def __post_init__(self):
        frozen_vision = self.vision and not {"vision", "qformer"} & set(self.trainable)
        frozen_llama = isinstance(self.llama, str) and "llama" not in self.trainable
        check_options(
            self,
            (
                "betas",
                len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
                "give two in [0, 1)",
            ),
            (
                "trainable",
                0 < len(self.trainable) == len(set(self.trainable)),
                "name each part once",
            ),
            (
                "out_dir",
                self.out_dir and not os.path.isfile(self.out_dir),
                "name a folder",
            ),
            (
                "prepare",
                all(isinstance(v, str) for v in self.prepare.values()),
                "give {path: arguments}",
            ),
            (
                "cache_features",
                frozen_vision or not self.cache_features,
                "needs a frozen vision side",
            ),
            (
                "shard",
                frozen_llama or not self.shard,
                "needs a frozen language model from files",
            ),
        )

    def parts(self) -> dict[str, str | dict]:
        """The fields that name weights, as arguments of MiniGPT4.from_files."""
        return {
            name: getattr(self, name)
            for name in ("vision", "qformer", "llama", "proj", "tokenizer")
        }

    def data_paths(self) -> list[str]:
        """The paths that training reads, apart from weights: `prepare` may make them."""
        paths = [self.tokenizer]
        for data in (self.data, self.heldout_data):
            paths += [data] if isinstance(data, str) else data
        return paths


def load_config(path: str, options: dict[str, str]) -> Config:
    """Read a config file, then the command line's `options` over it."""
    try:
        names = runpy.run_path(path)
    except (Exception, SystemExit) as e:
        raise InputError(f"config file {path}: {type(e).__name__}: {e}") from e
    settings = {
        k: v
        for k, v in names.items()
        if not k.startswith("_") and not isinstance(v, ModuleType)
    }
    return override(override(Config(), settings, path), options)


def read_saved_config(folder: str) -> Config:
    """The configuration of a run's folder; the paths in its config.json are relative to the folder."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise InputError(
            f"{folder}: it has no config.json; give the out_dir of a training run"
        )
    if "hidden_size" in (content := read_json(path)):
        raise InputError(
            f"{folder}: a language model's folder; give the out_dir of a training run"
        )
    saved = override(Config(), content, str(path))
    paths = {
        k: str(Path(folder) / v)
        for k, v in saved.parts().items()
        if isinstance(v, str) and v
    }
    return replace(saved, **paths)
