"""Paths, and the original's golden numbers with its weights, converted."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from configs.prompts import IMAGE
from configs.schema import Config
from llama import Tokenizer
from model import MiniGPT4
from tools import convert

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "assets/tiny"  # the committed weights
EXAMPLE = str(TINY / "example.png")
GOLDEN = ROOT / "tests/golden"
TOKENIZER = Tokenizer(GOLDEN / "tokenizer" / "tokenizer.model")
IMAGE_ROW = -200  # stands for one image token in the golden ids
torch.set_num_threads(1)  # at these sizes more threads only slow each other down


def readable(value) -> str | None:
    """An id of a test's parameter: the words of a command, or the keys of a dict."""
    if isinstance(value, (list, tuple, dict)):
        return " ".join(map(str, value))[:40] or "nothing"
    return None  # pytest's own


class Case(NamedTuple):
    """One batch of three samples: the inputs, and the original's results."""

    config: Config  # template, end_sym and max_txt_len of the case
    answers: list[str]
    prompts: list[str]  # the original's, one for each instruction; none in stage 1
    drawn: int | None  # index of the prompt used for this batch
    ids: list[list[int]]  # without padding, with IMAGE
    targets: list[list[int]]  # as long as ids
    loss: float
    gradients: dict[str, torch.Tensor]  # "weight", "bias" of the projection


class Conversation(NamedTuple):
    """A conversation of two turns about the first picture."""

    questions: list[str]
    answer: str  # to the first question, as the second turn's history has it
    ids: list[list[int]]  # the whole context of each turn, with IMAGE
    generated: list[tuple[list[int], str]]  # live: ids and text of each answer


class Golden:
    """One variant of a golden folder: its cases, inputs, results, and the model.

    Variants are "qformer" and "noqformer". The small and the full set have different
    layouts; the methods hide this.
    """

    def __init__(self, folder: Path, variant: str):
        noq = "_noq" if variant == "noqformer" else ""
        self.folder, self.variant = folder, variant
        self.cases = json.loads((folder / "cases.json").read_text())
        self.io = load_file(folder / f"io{noq}.safetensors")
        weights = load_file(folder / "weights.safetensors")
        if noq:
            weights |= load_file(folder / "weights_noq.safetensors")
        self.weights = {
            k: t.float() / 64 if t.dtype == torch.int8 else t
            for k, t in weights.items()
        }
        at = folder / "tokenizer" / "tokenizer.model"
        self.tokenizer = Tokenizer(at if at.is_file() else folder / "tokenizer.model")
        self.full = (folder / "optim.json").is_file()
        self.n_image_tokens = 8 if variant == "qformer" else 4

    def model(self) -> MiniGPT4:
        """The original's model in float32, converted by tools/convert.py."""
        with tempfile.TemporaryDirectory() as folder:
            files = self.convert(Path(folder))
            model = MiniGPT4.from_files(**files, dtype="float32", trainable=())
        model.tokenizer = self.tokenizer  # the copy in the folder is gone
        return model

    def convert(self, folder: Path) -> dict[str, str]:
        """Write the original's files and convert them -> arguments of from_files."""
        given = {
            k: t.contiguous()
            for k, t in self.weights.items()
            if not (
                self.variant == "noqformer"
                and k.startswith(("Qformer.", "query_tokens"))
            )
        }
        whole, hub = folder / "original.pth", folder / "hub"
        torch.save({"model": given}, whole)
        hub.mkdir()
        llama = {
            k.removeprefix("llama_model."): t
            for k, t in given.items()
            if k.startswith("llama_model.")
        }
        save_file(llama, hub / "model.safetensors")
        (hub / "config.json").write_text(json.dumps(self.cases["config"]["llama"]))
        shutil.copyfile(self.tokenizer.path, hub / "tokenizer.model")
        files = {
            "vision": str(folder / "vision.safetensors"),
            "qformer": str(folder / "qformer.safetensors"),
            "proj": str(folder / "proj.safetensors"),
            "llama": str(folder / "llama"),
        }
        convert.main(
            ["vision", str(whole), files["vision"], "--n_layers=3", "--heads=4"]
        )
        if self.variant == "qformer":
            convert.main(["qformer", str(whole), files["qformer"], "--heads=4"])
        else:
            files["qformer"] = None
        convert.main(["proj", str(whole), files["proj"]])
        convert.main(["llama", str(hub), files["llama"], "--check=False"])
        return files

    @property
    def images(self) -> torch.Tensor:
        """Normalized pictures, float32 (3, 3, S, S)."""
        return self.io["images"].float()

    def case(self, name: str, template: str) -> Case:
        if self.full:
            case = self.cases["variants"][self.variant]["loss"][name]
            inputs, drawn, rows = (
                case,
                case["prompt_choice_index"],
                case["sequence_layout_ids"],
            )
            lengths = [sum(row) for row in case["attention_mask"]]
        else:
            case, inputs = (
                self.cases["loss"][self.variant][name],
                self.cases["loss_inputs"][name],
            )
            drawn, rows, lengths = (
                inputs["prompt_index"],
                case["input_ids"],
                case["attention_len"],
            )
        config = Config(
            template=template,
            end_sym=inputs["end_sym"],
            max_txt_len=inputs["max_txt_len"],
        )
        ids = [
            [IMAGE if i == IMAGE_ROW else i for i in row[:n]]
            for row, n in zip(rows, lengths)
        ]
        targets = [row[:n] for row, n in zip(case["labels"], lengths)]
        prefix = f"{'loss.' if self.full else ''}{name}.grad.llama_proj."
        gradients = {k: self.io[prefix + k] for k in ("weight", "bias")}
        return Case(
            config,
            inputs["answer"],
            inputs["prompt_list"],
            drawn,
            ids,
            targets,
            case["loss"],
            gradients,
        )

    def schedules(self) -> dict[str, tuple[Config, list[tuple[int, float]]]]:
        """name -> (config with that schedule, [(step, learning rate)])."""
        given = (
            json.loads((self.folder / "optim.json").read_text())["schedules"]
            if self.full
            else self.cases["lr"]
        )
        return {
            name: (
                _with_schedule(Config(), s),
                [(r["step"], r["lr"]) for r in s["lr"]] if self.full else s["step_lr"],
            )
            for name, s in given.items()
        }

    def adamw(
        self, name: str, config: Config
    ) -> tuple[Config, list[int], list[float], list[float]]:
        """Name of a run -> config with its schedule; steps, rates, losses (one more).

        The runs are "adamw5" and "adamw5_biglr".
        """
        if self.full:
            optim = json.loads((self.folder / "optim.json").read_text())
            run = optim["adamw"][self.variant + name.removeprefix("adamw5")]
            schedule = run.get("schedule") or optim["schedules"]["stage2"]
            steps, rates, losses = (
                [s[k] for s in run["steps"]] for k in ("step", "lr", "loss_before_step")
            )
        else:
            run = self.cases["adamw"][self.variant][name]
            schedule, steps, rates, losses = (
                run["schedule"],
                run["steps"],
                run["lr"],
                run["loss_before_step"],
            )
        return (
            _with_schedule(config, schedule),
            steps,
            rates,
            losses + [run["loss_after"]],
        )

    def pictures(self) -> list[tuple[Path, int, torch.Tensor]]:
        """(file, side in pixels, the original's preprocessed float32 (3, S, S))."""
        if self.full:
            results = load_file(self.folder / "preproc" / "preproc.safetensors")
            named = [
                (*k.split("@"), t) for k, t in results.items() if "resized" not in k
            ]
            return [
                (self.folder / "preproc" / name, int(size), t)
                for name, size, t in named
            ]
        results = load_file(self.folder / "preproc.safetensors")
        return [(self.folder / "images" / name, 28, t) for name, t in results.items()]

    def captions(self) -> list[tuple[str, str, list[int]]]:
        """(web caption, cleaned, ids of the cleaned one with a newline)."""
        if self.full:
            return [
                (c["in"], c["out"], c["ids_of_out_plus_newline"])
                for c in self._texts("captions")
            ]
        return self.cases["captions"]

    def strings(self) -> list[tuple[str, list[int]]]:
        """(text, ids without BOS)."""
        if self.full:
            return [(s["text"], s["ids"]) for s in self._texts("tokenizer")]
        return self.cases["tokenizer"]["strings"]

    def _texts(self, key):
        return json.loads((self.folder / "preproc" / "preproc.json").read_text())[key]

    def conversation(self, template: str, kind: str = "scripted") -> Conversation:
        """A scripted conversation, or the "live" one with the model's own answers.

        Only the full set has a live one.
        """
        chat, generated = self._chat(template), []
        if not self.full:
            segments = [chat["turn1_segment_ids"], chat["turn2_segment_ids"]]
            questions, answer = [chat["question1"], chat["question2"]], chat["answer1"]
        else:
            turns = [chat[kind]["turn1"], chat[kind]["turn2"]]
            segments = [t["segment_ids"] for t in turns]
            questions, answer = [chat["Q1"], chat["Q2"]], chat["A1_scripted"]
            if kind == "live":
                # without the BOS of generate()
                generated = [(t["output_ids"][1:], t["answer_text"]) for t in turns]
                answer = generated[0][1]
        ids = [[*a, *[IMAGE] * self.n_image_tokens, *b] for a, b in segments]
        return Conversation(questions, answer, ids, generated)

    def _chat(self, template):
        chats = (
            self.cases["variants"][self.variant]["chat"]
            if self.full
            else self.cases["chat"]
        )
        return chats["vicuna0" if template == "vicuna" else template]

    def generation(self, template: str, kind: str = "greedy") -> dict[str, dict]:
        """Runs by name, such as "greedy_turn2_rp1.05".

        Each has "new_tokens", ids; some have "eos_token_id" or "stop_words_ids".
        """
        if self.full:
            runs = self._chat(template)["scripted"]["generation"]
        else:
            runs = self.cases["generation"][self.variant][
                "vicuna0" if template == "vicuna" else template
            ]
            runs = {
                k: {"new_tokens": v} for k, v in runs.items() if isinstance(v, list)
            }
        return {k: v for k, v in runs.items() if k.startswith(kind)}


def _with_schedule(config, s):
    return Config(
        **vars(config)
        | {
            "lr": s["init_lr"],
            "min_lr": s["min_lr"],
            "warmup_lr": s["warmup_lr"],
            "warmup_steps": s["warmup_steps"],
            "max_steps": s["max_epoch"] * s["iters_per_epoch"],
        }
    )
