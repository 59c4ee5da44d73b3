"""The typed configuration of a training run.

A config file is plain Python that assigns fields of `Config`; a variant imports another
one and states the difference. The command line overrides any field: `--key=value`,
`--key value`, or a bare `--key` for True.
"""

import os
import runpy
from dataclasses import dataclass, replace
from pathlib import Path

from configs.prompts import TEMPLATES, Segment, parse_end
from plumbing.console import InputError
from plumbing.files import read_json, relative_path, replacing
from plumbing.options import check_name, check_options, option, override, to_json
from plumbing.weights import DTYPES

PLAIN = (str, int, float, list, tuple, dict, type(None))  # that a setting may have


@dataclass(frozen=True)
class Config:
    """One training run. Paths are relative to the working directory; "" means none."""

    # The model's parts; a dict holds the sizes of a new part, with random weights.
    vision: str | dict = option("", "weight file; without it, train on text only")
    qformer: str | dict = option(
        "", "weight file; without it, 4 patches make one image token"
    )
    llama: str | dict = option("", "folder of the language model")
    proj: str = option("", "weight file (default: a new projection, random weights)")
    tokenizer: str = option(
        "", "tokenizer.model or tokenizer.json (default: the one in the llama folder)"
    )
    trainable: tuple[str, ...] = option(
        ("proj",), "parts to train, of vision, qformer, proj and llama"
    )
    image_size: int = option(
        0, "pixels per side; 0: the vision part's own size", least=0, most=2048
    )
    # The data.
    data: str | dict | list = option(
        "",
        "a path, a list of paths, or {path: weight} for a mixture; a path names tar "
        "shards (a glob, {00..99}.tar, a folder, a .txt list), a folder with "
        "filter_cap.json, a .jsonl or a .json",
    )
    heldout_data: str | dict | list = option(
        "", "data to evaluate on during training, like --data"
    )
    prepare: dict = option(
        {}, "{path: Python arguments that generate it}, run if the path is missing"
    )
    template: str = option(
        "",
        "chat template; without it, the image and its caption, as in stage 1",
        choices=("", *TEMPLATES),
    )
    end_sym: str = option(
        "", "end of each answer, text or a token such as </s> (default: the template's)"
    )
    max_txt_len: int = option(
        32, "longest answer in tokens, end included; longer ones are cut", least=1
    )
    clean_captions: bool = option(
        False, "normalize captions as in stage 1: lower case, at most 50 words"
    )
    chat_share: float = option(
        0.0, "share of conversations that get the system prompt", least=0, most=1
    )
    shuffle_shards: int = option(
        8, "number of shards whose samples are shuffled together", least=1
    )
    length_group: int = option(
        1, "sort samples by length within groups of this many steps", least=1
    )
    max_bad_fraction: float = option(
        0.1, "stop the run if a larger share of the samples is unusable", least=0
    )
    num_workers: int = option(2, "data workers per training process", least=0)
    seed: int = option(
        42, "seed for new weights and the order of samples", least=0, most=2**63 - 1
    )
    # The optimizer, AdamW. A step has processes x batch_size x grad_accum samples.
    batch_size: int = option(64, "samples per process and micro-batch", least=1)
    grad_accum: int = option(1, "micro-batches per step", least=1)
    max_steps: int = option(20_000, "number of optimizer steps", least=1, most=10**8)
    lr: float = option(1e-4, "peak learning rate", least=0)
    min_lr: float = option(8e-5, "final learning rate", least=0)
    warmup_lr: float = option(1e-6, "learning rate at the first step", least=0)
    warmup_steps: int = option(5000, "steps of warm-up, from warmup_lr to lr", least=0)
    weight_decay: float = option(
        0.05, "AdamW's weight decay; biases and norms have none", least=0
    )
    betas: tuple[float, ...] = option((0.9, 0.999), "AdamW's beta1 and beta2")
    grad_clip: float = option(0.0, "clip the gradient to this norm; 0: off", least=0)
    # The machine.
    device: str = option("", "PyTorch device (default: cuda if available, else cpu)")
    dtype: str = option(
        "bfloat16", "dtype of frozen parts; trained ones are float32", choices=DTYPES
    )
    cache_features: bool = option(
        False, "compute the frozen vision features once and keep them in memory"
    )
    grad_checkpoint: bool = option(
        False, "recompute LLaMA's activations in the backward pass, to save memory"
    )
    compile: bool = option(False, "compile the transformer blocks with torch.compile")
    cuda_graphs: bool = option(
        False, "decode held-out answers with CUDA graphs (untested on GPUs)"
    )
    shard: bool = option(False, "shard LLaMA's blocks across processes (fully_shard)")
    peak_tflops: float = option(
        0.0, "the device's peak TFLOP/s; adds MFU to the log", least=0
    )
    # The run's folder, and what is written to it.
    out_dir: str = option("out/run", "folder for weights, log and checkpoints")
    log_interval: int = option(10, "steps between log entries", least=1)
    eval_interval: int = option(500, "steps between evaluations", least=1)
    eval_samples: int = option(128, "held-out samples per evaluation", least=1)
    show_samples: int = option(2, "answers to log per evaluation", least=0)
    save_interval: int = option(500, "steps between checkpoints", least=1)
    save_dtype: str = option("float32", "dtype of the saved parts", choices=DTYPES[:2])
    resume: bool = option(
        False, "continue from the last checkpoint in out_dir, if there is one"
    )

    @property
    def answer_end(self) -> Segment:
        """What ends every answer: a text, END or a control token."""
        if self.end_sym:
            return parse_end(self.end_sym)
        return TEMPLATES[self.template].end if self.template else "\n"

    def __post_init__(self):
        are_betas = len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas)
        trained = set(self.trainable)
        is_each_once = 0 < len(self.trainable) == len(trained)
        is_folder = self.out_dir and not os.path.isfile(self.out_dir)
        are_texts = all(isinstance(text, str) for text in self.prepare.values())
        is_vision_frozen = self.vision and not trained & {"vision", "qformer"}
        is_llama_frozen = isinstance(self.llama, str) and "llama" not in trained
        can_cache = is_vision_frozen or not self.cache_features
        can_shard = is_llama_frozen or not self.shard
        check_options(
            self,
            ("betas", are_betas, "give two in [0, 1)"),
            ("trainable", is_each_once, "name each part once"),
            ("out_dir", is_folder, "name a folder"),
            ("prepare", are_texts, "give {path: arguments}"),
            ("cache_features", can_cache, "needs a frozen vision side"),
            ("shard", can_shard, "needs a frozen language model from files"),
            ("cuda_graphs", not (self.cuda_graphs and self.shard), "not with shard"),
        )

    def parts(self):
        """{field: path, or sizes of a new part}, the arguments of from_files."""
        names = ("vision", "qformer", "llama", "proj", "tokenizer")
        return {name: getattr(self, name) for name in names}

    def part_files(self) -> dict[str, str]:
        """{part: its file in out_dir}: trained and new parts, and any projection."""
        files = {}
        for name, source in self.parts().items():
            is_saved = name in self.trainable or isinstance(source, dict)
            if is_saved or (name == "proj" and self.vision):
                suffix = "" if name == "llama" else ".safetensors"
                files[name] = f"{self.out_dir}/{name}{suffix}"
        return files

    def data_paths(self):
        """The paths of the data and the tokenizer, which `prepare` may make."""
        paths = [self.tokenizer]
        for data in (self.data, self.heldout_data):
            paths += [data] if isinstance(data, str) else data
        return paths


def load_config(path: str, options: dict) -> Config:
    """Read a config file, then the command line's options, {name: text}, over it."""
    if not os.path.exists(path) or os.path.isdir(path):
        raise InputError(f"config file {path}: there is no such file")
    try:
        names = runpy.run_path(path)
    except (Exception, SystemExit) as e:  # it may hold any code
        raise InputError(f"config file {path}: {type(e).__name__}: {e}") from e
    settings = {}
    known = Config.__dataclass_fields__
    for name, value in names.items():
        # Modules, functions and the like are helpers.
        is_setting = isinstance(value, PLAIN) and not name.startswith("_")
        if is_setting or name in known:
            check_name(name, known, path, "begin names of your own with an underscore")
            settings[name] = str(value) if isinstance(value, Path) else value
    config = override(override(Config(), settings, path), options)
    if config.lr < config.min_lr:  # not in Config: earlier runs are still read
        raise InputError(
            f"lr = {config.lr} is below min_lr = {config.min_lr}: the rate would rise "
            f"after the warm-up; give a higher --lr, or --min_lr={config.lr} or less"
        )
    return config


def read_saved_config(folder: str) -> Config:
    """The configuration of a run, its paths of weights relative to the run's folder."""
    path = Path(folder) / "config.json"
    advice = "give the out_dir of a training run"
    if not path.is_file():
        raise InputError(f"{folder}: it has no config.json; {advice}")
    content = read_json(path)
    if "hidden_size" in content:
        raise InputError(f"{folder}: a language model's folder; {advice}")
    saved = override(Config(), content, str(path))
    paths = {}
    for name, part in saved.parts().items():
        if isinstance(part, str) and part:
            paths[name] = str(Path(folder) / part)
    return replace(saved, **paths)


def write_saved_config(config: Config):
    """Write out_dir/config.json, which leads chat.py to all parts of a run."""
    parts = config.parts() | config.part_files()
    if "llama" in config.part_files():
        parts["tokenizer"] = ""  # in the folder of the language model
    for name, path in parts.items():
        if isinstance(path, str) and path:
            parts[name] = relative_path(path, config.out_dir)
    with replacing(Path(config.out_dir, "config.json")) as temporary:
        temporary.write_text(to_json(replace(config, **parts)))
