"""The typed configuration of a training run, and the command-line rules that every program here shares.

A config file is plain Python that assigns the fields of `Config` at its top level (configs/stage1.py). The
command line overrides any of them with `--key=value`. Unknown names and values of the wrong type are refused
with one line.
"""

import ast
import difflib
import json
import os
import runpy
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import ModuleType
from typing import get_args, get_origin


class InputError(ValueError):
    """What the user gave is wrong. The message is one line: what, where, and what to do about it."""


@dataclass(frozen=True)
class Config:
    """One training run. Empty strings mean "none"; paths are relative to the working directory."""

    # The parts. A path is a weight file (vision, qformer, proj) or folder (llama); a dict is the sizes of a
    # new, random part.
    vision: str | dict = ""              # "" trains on text alone, without pictures
    qformer: str | dict = ""             # "": none, 4 neighbouring patches make one image token (LLaMA-2)
    llama: str | dict = ""
    proj: str = ""                       # "": a new, random projection
    tokenizer: str = ""                  # tokenizer.model of a new llama; "": the one in the llama folder
    train: tuple[str, ...] = ("proj",)   # the parts that learn: any of vision, qformer, proj, llama
    image_size: int = 0                  # pixels; 0: the size that the vision part was trained with

    # The data: a path, a list of paths, or {path: weight}. A path is shards (*.tar, {00000..00099}.tar, a
    # folder of them, a .txt that lists them, or pipe:COMMAND that prints them), a folder with
    # filter_cap.json, or a .jsonl of captions and conversations. One source is drawn per batch, by weight.
    data: str | dict | list = ""
    heldout_data: str | dict | list = ""  # "": no evaluation during training
    prepare: dict = field(default_factory=dict)  # {path: python arguments that make it if missing}
    template: str = ""                   # "", "vicuna" or "llama2": what stands around a captioned image
    end_sym: str = "\n"                  # ends every answer: a text, or the control token "</s>"
    max_txt_len: int = 32                # answer tokens, end_sym included; a longer answer is cut
    clean_captions: bool = True          # lower case, no punctuation, at most 50 words (stage 1)
    chat_share: float = 0.0              # share of conversations laid out as in chat, with system text

    # The optimiser (AdamW) and its learning rate.
    batch_size: int = 64                 # samples per process and micro-batch
    grad_accum: int = 1                  # micro-batches per step
    max_steps: int = 20_000
    lr: float = 1e-4
    min_lr: float = 8e-5
    warmup_lr: float = 1e-6              # the rate of step 0
    warmup_steps: int = 5000
    weight_decay: float = 0.05           # on matrices; biases and norms have none
    betas: tuple[float, ...] = (0.9, 0.999)
    grad_clip: float = 0.0               # largest gradient norm; 0: no clipping

    # The machine.
    device: str = ""                     # "": cuda if there is one, else cpu
    dtype: str = "bfloat16"              # float32, bfloat16 or float16; parts that learn are float32
    num_workers: int = 2                 # data-loading processes per training process
    cache_features: bool = False         # compute what the frozen vision side makes of each picture only once
    cache_dir: str = "out/features"      # where that is kept, for other runs as well
    grad_checkpoint: bool = False        # less memory for LLaMA's activations, a third more of its work
    compile: bool = False                # torch.compile of all blocks
    shard: bool = False                  # share LLaMA's weights out to the processes (fully_shard)
    peak_tflops: float = 0.0             # of the device in `dtype`, for the utilisation; 0: measure it
    profile: bool = False                # trace.json of three steps, and a table of the dearest operations
    shuffle_shards: int = 8              # shards whose samples are shuffled together
    length_group: int = 1                # batches whose samples are sorted by length together; 1: unsorted
    max_bad_fraction: float = 0.1        # of the samples; a run that meets more unusable ones stops
    seed: int = 42

    # The run's folder, and what is written to it.
    out_dir: str = "out/run"
    log_interval: int = 10               # steps
    eval_interval: int = 500             # steps
    eval_samples: int = 128              # held-out samples of which the loss is taken
    show_samples: int = 2                # sample answers at each evaluation
    save_interval: int = 500             # steps
    save_dtype: str = "float32"          # or bfloat16: of the trained parts' files; states are float32
    resume: bool = False                 # go on from out_dir's last checkpoint, if there is one
    force: bool = False                  # take a projection, or a state, that was trained beside other parts
    dry_run: bool = False                # print sizes, FLOPs and memory of the run, without weights, and exit

    def __post_init__(self):
        dtypes = ("float32", "bfloat16", "float16")
        choices = {"dtype": dtypes, "save_dtype": dtypes[:2], "template": ("", "vicuna", "llama2")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                listed = ", ".join(repr(a) for a in allowed)
                raise InputError(f"{name} = {getattr(self, name)!r}: give one of {listed}")
        for name, fits, wanted in (
                ("seed", 0 <= self.seed < 2**63, "give one from 0 to 2**63 - 1"),
                ("betas", len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
                 "give two, from 0 to below 1"),
                ("train", len(self.train) == len(set(self.train)) > 0, "name one part that learns, or more"),
                ("end_sym", self.end_sym, "give what ends an answer"),
                ("out_dir", self.out_dir, "name a folder")):
            if not fits:
                raise InputError(f"{name} = {getattr(self, name)!r}: {wanted}")
        if self.cache_features and (not self.vision or {"vision", "qformer"} & set(self.train)):
            raise InputError("cache_features = True: there is no frozen vision side; switch it off")
        if self.shard and ("llama" in self.train or isinstance(self.llama, dict)):
            raise InputError("shard = True: it is for a frozen language model from files; switch it off")
        for name in ("num_workers", "peak_tflops", "lr", "min_lr", "warmup_lr", "warmup_steps",
                     "weight_decay", "grad_clip", "chat_share", "max_bad_fraction", "image_size",
                     "show_samples"):
            if not getattr(self, name) >= 0:  # nor NaN
                raise InputError(f"{name} = {getattr(self, name)}: give at least 0")
        for name in ("batch_size", "grad_accum", "max_steps", "max_txt_len", "shuffle_shards", "length_group",
                     "log_interval", "eval_interval", "eval_samples", "save_interval"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name)}: give at least 1")


def parse_args(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """["a.jpg", "--seed=1"] -> (["a.jpg"], {"seed": "1"}). Raises InputError for an option without value."""
    positional, options = [], {}
    for arg in argv:
        if not arg.startswith("--"):
            positional.append(arg)
        elif "=" not in arg:
            raise InputError(f"option {arg}: write it as {arg}=value")
        else:
            key, value = arg[2:].split("=", 1)
            options[key.replace("-", "_")] = value
    return positional, options


def override(config, options: dict, where: str = "command line"):
    """The dataclass `config` with `options` put in, each checked; text is parsed as the field's type asks."""
    types = {f.name: f.type for f in fields(config)}
    checked = {}
    for key, value in options.items():
        if key not in types:
            near = difflib.get_close_matches(key, types, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "the names are: " + ", ".join(types)
            raise InputError(f"{where}: unknown name {key!r}; {hint}")
        checked[key] = _typed(key, value, types[key], where)
    return replace(config, **checked)


def _typed(key, value, kind, where):
    """`value` as type `kind`: an int will do for a float, and text, unless wanted, is read as a literal."""
    kinds = get_args(kind) if get_origin(kind) is not tuple and get_args(kind) else (kind,)
    if isinstance(value, str) and (str not in kinds or {"{": dict, "[": list}.get(value[:1]) in kinds):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError):
            pass
    for k in kinds:
        if k is float and type(value) is int:
            return float(value)
        if get_origin(k) is tuple:
            item = get_args(k)[0]
            value = (value,) if isinstance(value, item) else value
            if isinstance(value, (tuple, list)) and all(isinstance(v, item) for v in value):
                return tuple(value)
        elif type(value) is k:
            return value
    wanted = " or ".join(getattr(k, "__name__", str(k)) if get_origin(k) is None else str(k) for k in kinds)
    raise InputError(f"{where}: {key} = {value!r} is not of type {wanted}")


def load_config(path: str, options: dict[str, str]) -> Config:
    """Read a config file, then the command line's `options` over it.

    Raises InputError for a missing or faulty file, an unknown name, or a value of the wrong type."""
    if not Path(path).is_file():
        raise InputError(f"config file {path}: there is no such file")
    try:
        names = runpy.run_path(path)
    except Exception as e:
        raise InputError(f"config file {path}: {type(e).__name__}: {e}") from e
    settings = {k: v for k, v in names.items() if not k.startswith("_") and not isinstance(v, ModuleType)}
    return override(override(Config(), settings, path), options)


def read_saved_config(folder: str) -> Config:
    """The configuration that a run saved in its folder; the paths in it are relative to that folder."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: not a run's folder, it has no config.json; give the out_dir of a "
                         "training run")
    try:
        content = json.loads(path.read_text())
    except ValueError as e:
        raise InputError(f"{path}: not valid JSON ({e}); the run has to be started again") from e
    if not isinstance(content, dict):
        raise InputError(f"{path}: it should hold a JSON object; the run has to be started again")
    saved = override(Config(), content, str(path))
    given = {k: v for k in PATHS if isinstance(v := getattr(saved, k), str) and v}
    return replace(saved, **{k: str(Path(folder) / v) for k, v in given.items()})


PATHS = ("vision", "qformer", "llama", "proj", "tokenizer")  # the fields that name a weight file


def to_json(config) -> str:
    """A config as JSON text, one field a line."""
    return json.dumps(asdict(config), indent=1)


def run_main(main):
    """Call `main(argv)`; an InputError becomes one line on stderr and exit status 2. With --help, print the
    program's docstring instead."""
    try:
        if {"-h", "--help"} & set(sys.argv[1:]):
            print(sys.modules["__main__"].__doc__)
        else:
            main(sys.argv[1:])
    except InputError as e:
        message = str(e).strip().splitlines()[-1]  # of an error in a data worker, the last line of its report
        print(f"error: {message.removeprefix('configs.schema.InputError: ')}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as e:  # no permission, no room
        print(f"error: {e.filename or 'a file'}: {e.strerror or e}", file=sys.stderr)
        sys.exit(2)
