"""Typed options: a dataclass whose fields are set by --key=value."""

import argparse
import ast
import difflib
import json
import os
import sys
from dataclasses import asdict, field, fields, replace
from math import inf
from typing import get_args, get_origin

from plumbing.console import InputError

BOOLEANS = {"true": "True", "false": "False", "on": "True", "off": "False"}
BRACKETS = {"{": dict, "[": list}


def option(default, meaning: str, least=None, most=inf, choices: tuple = ()):
    """A dataclass field with its meaning for --help and the values that it allows.

    A meaning may end with its own "(default: ...)", as where "" stands for a choice.
    """
    if "(default: " not in meaning:
        meaning += f" (default: {default if default != '' else 'none'})"
    metadata = {
        "help": meaning.replace("%", "%%"),  # argparse formats it with %
        "range": (least, most),
        "choices": choices,
    }
    if default == {}:
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


def check_options(options, *rules: tuple[str, bool, str]):
    """Raise InputError for a value that its field does not allow, or a broken rule.

    options: a dataclass of `option` fields; rules: (name of a field, holds, advice).
    """
    for f in fields(options):
        _check_value(f, getattr(options, f.name))
    for name, holds, advice in rules:
        if not holds:
            raise InputError(f"{name} = {getattr(options, name)!r}: {advice}")


def _check_value(f, value):
    least, most = f.metadata["range"]
    choices = f.metadata["choices"]
    if least is not None and not least <= value <= most:  # NaN is in no range
        bounds = f"one from {least} to {most}" if most < inf else f"at least {least}"
        raise InputError(f"{f.name} = {value!r}: give {bounds}")
    if choices and value not in choices:
        names = ", ".join(choice or "none" for choice in choices)
        raise InputError(f"{f.name} = {value!r}: give one of {names}")


def override(config, values: dict, where: str = "command line"):
    """The dataclass `config` with other values; texts are parsed as the field's type.

    Raises InputError, which says `where`, for an unknown name or another type.
    """
    known = {f.name: f for f in fields(config)}
    changes = {}
    for name, value in values.items():
        check_name(name, known, where)
        if value == "none" and "" in known[name].metadata.get("choices", ()):
            value = ""
        changes[name] = _convert(name, value, known[name].type, where)
    return replace(config, **changes)


def check_name(name: str, known, where: str, advice: str = "") -> str:
    """The name, if it is known. Raises InputError with the nearest known one if not.

    advice: for a name that is near to none, instead of all known ones.
    """
    if name in known:
        return name
    initials = "".join(word[:1] for word in name.split("_"))  # learning_rate: lr
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    near = [initials] if initials in known else near
    hint = advice or "the names are: " + ", ".join(known)
    if near:
        hint = f"did you mean {near[0]}?"
    raise InputError(f"{where}: unknown name {name!r}; {hint}")


def _convert(name, value, kind, where):
    """`value` as `kind`: a type, a union of types, or a tuple of any length."""
    if get_origin(kind) is tuple:
        item_kind = get_args(kind)[0]
        return tuple(_convert(name, x, item_kind, where) for x in _items(value))
    kinds = get_args(kind) or (kind,)
    literal = _parse(value, kinds)
    if float in kinds and type(literal) is int:
        return float(literal)
    if kinds == (int,) and type(literal) is float and literal.is_integer():
        return int(literal)  # 1e3
    if type(literal) in kinds:  # True is no int here
        return literal
    names = " or ".join(k.__name__ for k in kinds)
    raise InputError(f"{where}: {name} = {literal!r} is not of type {names}")


def _parse(value, kinds=()):
    """ "1e-3" -> 0.001, "on" -> True; kept if it is a text, or no Python literal."""
    if not isinstance(value, str):
        return value
    if str in kinds and BRACKETS.get(value[:1]) not in kinds:
        return value
    try:
        return ast.literal_eval(BOOLEANS.get(value.lower(), value))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return value


def _items(value):
    """The items of "proj,qformer" or "(0.9, 0.95)", of a tuple or list; or one item."""
    literal = _parse(value)
    if isinstance(literal, str):
        return [item.strip() for item in literal.split(",")]
    return literal if isinstance(literal, (tuple, list)) else [literal]


def to_json(config) -> str:
    """A config as JSON text, one field a line."""
    return json.dumps(asdict(config), indent=1)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"command line: {message}")


def parse_args(
    argv: list[str], doc: str, positional: str, *classes
) -> tuple[list[str], dict[str, str]]:
    """(["a.jpg", "--seed", "1"], ...) -> (["a.jpg"], {"seed": "1"}); -h exits.

    The options are the fields of the dataclasses `classes`. `positional` names the
    other arguments: "SRC DST", or "[IMAGE ...]" for any number.
    """
    known = {f.name: f for each in classes for f in fields(each)}
    usage = f"python {os.path.relpath(sys.argv[0])} {positional} [--key=value ...]"
    usage = usage.replace("  ", " ")
    parser = _Parser(
        usage=usage,
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, f in known.items():
        values = "|".join(filter(None, f.metadata["choices"])) or "VALUE"
        if f.type is bool:
            values = "[true|false]"
        parser.add_argument(
            f"--{name}",
            default=argparse.SUPPRESS,
            help=f.metadata["help"],
            metavar=values,
        )
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    options = vars(parser.parse_intermixed_args(_spell_out(argv, known)))
    arguments = options.pop("arguments")
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        if equals and key in known and not os.path.exists(argument):
            raise InputError(
                f"{argument}: an option begins with two dashes, --{argument}"
            )
    if "..." not in positional and len(arguments) != len(positional.split()):
        raise InputError(f"usage: {usage}")
    return arguments, options


def read_options(argv, doc, positional, defaults, *others):
    """As parse_args: (other arguments, `defaults` overridden, options of `others`)."""
    arguments, given = parse_args(argv, doc, positional, defaults, *others)
    names = [f.name for f in fields(defaults)]
    own = {name: given.pop(name) for name in names if name in given}
    options = override(defaults, own)
    check_options(options)
    return arguments, options, given


def _spell_out(argv, known):
    """["--batch-size=4", "--resume"] -> ["--batch_size=4", "--resume=True"]."""
    words = []
    for word, following in zip(argv, [*argv[1:], ""]):
        if word.startswith("--") and word != "--help":
            key, equals, value = word.removeprefix("--").partition("=")
            name = check_name(key.replace("-", "_"), known, "command line")
            word = f"--{name}{equals}{value}"
            is_bare = not equals and following.lower() not in BOOLEANS
            if is_bare and known[name].type is bool:
                word += "=True"
        words.append(word)
    return words
