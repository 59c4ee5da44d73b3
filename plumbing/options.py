"""Typed options: a dataclass whose fields are set by --key=value."""

import argparse
import ast
import difflib
import json
import os
import sys
from contextlib import suppress
from dataclasses import asdict, field, fields, replace
from math import inf
from types import UnionType
from typing import get_args, get_origin

from plumbing.console import InputError


def option(default, meaning: str, least=None, most=inf, choices: tuple = ()):
    """A dataclass field with its meaning for --help and the values that check_options allows."""
    kind = {"default_factory": dict} if default == {} else {"default": default}
    about = f"{meaning} (default: {default!r})".replace(
        "%", "%%"
    )  # argparse formats it with %
    return field(
        **kind, metadata={"help": about, "range": (least, most), "choices": choices}
    )


def check_options(options, *rules: tuple[str, bool, str]):
    """Raise InputError for a value that its field does not allow, or a broken rule (name, holds, advice)."""
    for f in fields(options):
        value, (least, most), choices = (
            getattr(options, f.name),
            f.metadata["range"],
            f.metadata["choices"],
        )
        if least is not None and not least <= value <= most:  # true for NaN
            bounds = (
                f"at least {least}" if most == inf else f"one from {least} to {most}"
            )
            raise InputError(f"{f.name} = {value!r}: give {bounds}")
        if choices and value not in choices:
            raise InputError(
                f"{f.name} = {value!r}: give one of {', '.join(c or 'none' for c in choices)}"
            )
    for name, holds, advice in rules:
        if not holds:
            raise InputError(f"{name} = {getattr(options, name)!r}: {advice}")


def override(config, values: dict, where: str = "command line"):
    """The dataclass `config` with `values` put in; texts are parsed as the field's type asks."""
    types = {f.name: f.type for f in fields(config)}
    return replace(
        config,
        **{
            check_name(k, types, where): _typed(k, value, types[k], where)
            for k, value in values.items()
        },
    )


def check_name(name: str, known, where: str) -> str:
    """The name, if it is known. Raises InputError with the nearest known one otherwise."""
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}?" if near else "the names are: " + ", ".join(known)
    raise InputError(f"{where}: unknown name {name!r}; {hint}")


def _typed(name, value, kind, where):
    """`value` as type `kind`. A text is read as a Python literal where `kind` is not a text."""
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if isinstance(value, str) and (
        str not in kinds or {"{": dict, "[": list}.get(value[:1]) in kinds
    ):
        with suppress(Exception):  # else it stays a text
            spelled = {"true": "True", "false": "False", "on": "True", "off": "False"}
            value = ast.literal_eval(spelled.get(value.lower(), value))
    if get_origin(kind) is tuple:  # a Python tuple, its only item, or "proj,qformer"
        items = (
            [x.strip() for x in value.split(",")] if isinstance(value, str) else value
        )
        items = items if isinstance(items, (tuple, list)) else [items]
        return tuple(_typed(name, item, get_args(kind)[0], where) for item in items)
    for k in kinds:
        if type(value) is k or k is float and type(value) is int:
            return k(value)
    raise InputError(
        f"{where}: {name} = {value!r} is not of type {' or '.join(k.__name__ for k in kinds)}"
    )


def to_json(config) -> str:
    """A config as JSON text, one field a line."""
    return json.dumps(asdict(config), indent=1)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"command line: {message}")


def parse_args(
    argv: list[str], doc: str, positional: str, *classes
) -> tuple[list[str], dict[str, str]]:
    """(["a.jpg", "--seed", "1"], ...) -> (["a.jpg"], {"seed": "1"}); the options are the fields of `classes`.
    `positional` names the other arguments: "SRC DST", or "[IMAGE ...]" for any number. -h exits."""
    options = {f.name: f for cls in classes for f in fields(cls)}
    usage = f"python {os.path.relpath(sys.argv[0])} {positional} [--key=value ...]"
    parser = _Parser(
        usage=usage,
        description=doc,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, f in options.items():
        parser.add_argument(
            f"--{name}",
            default=argparse.SUPPRESS,
            help=f.metadata["help"],
            metavar="|".join(filter(None, f.metadata["choices"])) or "VALUE",
        )
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    words = []
    for word, following in zip(argv, [*argv[1:], ""]):
        if word.startswith("--") and word != "--help":
            key, equals, value = word[2:].partition("=")
            key = check_name(key.replace("-", "_"), options, "command line")
            is_value = following.lower() in ("true", "false", "on", "off")
            bare = options[key].type is bool and not equals and not is_value
            word = f"--{key}=True" if bare else f"--{key}{equals}{value}"
        words.append(word)
    given = vars(parser.parse_intermixed_args(words))
    arguments = given.pop("arguments")
    if "..." not in positional and len(arguments) != len(positional.split()):
        raise InputError(f"usage: {usage}")
    return arguments, given
