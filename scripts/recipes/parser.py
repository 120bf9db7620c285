# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Options as dataclasses, from a command line, a file or Python; nothing is imported that takes seconds.

A field is an option: its type says what it takes, with limits as in `Annotated[int, Limits(1, 9)]`. Values are checked
wherever they come from.
"""

import dataclasses
import json
import math
import operator
import re
import sys
import typing
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from contextlib import suppress
from copy import copy
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from attnres_convert import InputError, reading
from attnres_convert.cli import quieten_torchao
from transformers import HfArgumentParser


def option(default=dataclasses.MISSING, help: str = "", **of_argparse):
    """A field of [`Options`]; without a default it must be given. `positional=True`: it has no `--name`."""
    is_filled_later = isinstance(default, (list, dict))
    kind, value = ("default_factory", lambda: copy(default)) if is_filled_later else ("default", default)
    return dataclasses.field(**{kind: value}, metadata={"help": help, **of_argparse})


@dataclasses.dataclass(frozen=True)
class Limits:
    """Finite numbers from `lowest` to `highest`, but none of `without`."""

    lowest: float
    highest: float = math.inf
    without: tuple[float, ...] = ()

    def check(self, value: float, name: str):
        is_finite = isinstance(value, int) or math.isfinite(value)
        if is_finite and self.lowest <= value <= self.highest and value not in self.without:
            return
        limits = f"more than {self.lowest}" if self.lowest in self.without else f"at least {self.lowest}"
        if self.highest < math.inf:
            limits += f" and {'less than' if self.highest in self.without else 'at most'} {self.highest}"
        elif isinstance(value, float):
            limits += " and finite"
        raise InputError(f"{name} {value} is out of range: it must be {limits}.")


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@dataclasses.dataclass(kw_only=True)
class Options:
    """What a command takes.

    Raises:
        InputError: a value is of a wrong type, out of range, or doesn't go with the others.
    """

    either = ""  # what else the usage shows

    def __post_init__(self):
        for name, kind in typing.get_type_hints(type(self), include_extras=True).items():
            setattr(self, name, fitted(getattr(self, name), kind, flag(name)))
        for field in dataclasses.fields(self):
            if getattr(self, field.name) == [] != default_of(field):
                raise InputError(f"{flag(field.name)} is empty; give a value.")
        self.check()

    def check(self):
        """Refuses what can't work together."""

    def words(self) -> list[str]:
        """The options that aren't at their defaults, as words of a command line."""
        positional, words = [], []
        for field in (field for _, own in grouped(type(self)) for field in own):
            value, default = getattr(self, field.name), default_of(field)
            if value == default or value in ([], {}):
                continue
            values = as_words(value)
            if value is False:
                words.append(flag(f"no_{field.name}"))
            elif field.metadata.get("positional"):
                positional += values
            elif value == "" or len(values) == 1 and values[0].startswith("-"):
                words.append(f"{flag(field.name)}={values[0]}")
            else:
                words += [flag(field.name), *values]
        return positional + words


def grouped(kind: type[Options]) -> list[tuple[str, list[dataclasses.Field]]]:
    """The fields in groups, by the class that has them, the one that is most special first."""
    fields, groups = {field.name: field for field in dataclasses.fields(kind)}, []
    for base in kind.__mro__:
        if own := [fields.pop(name) for name in base.__dict__.get("__annotations__", ()) if name in fields]:
            groups.append((base.group, own))
    return groups


def default_of(field: dataclasses.Field):
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def fitted(value, kind, name: str):
    """`value` as a value of the type `kind`: a text for a path, one value for a list of one.

    Raises:
        InputError: it is of another type, or out of the limits.
    """
    if typing.get_origin(kind) is typing.Annotated:
        value = fitted(value, kind.__origin__, name)
        kind.__metadata__[0].check(value, name)
        return value
    choices = typing.get_args(kind)
    if type(None) in choices:
        return None if value is None else fitted(value, choices[0], name)
    if typing.get_origin(kind) is typing.Literal:
        if value not in choices:
            raise InputError(f"{name} is {value!r}; it must be one of {', '.join(choices)}.")
        return value
    if typing.get_origin(kind) is list:
        values = [value] if isinstance(value, (str, Path)) else value
        if not isinstance(values, (list, tuple)):
            raise InputError(f"{name} must be a list, not {reading.kind_of(value)}.")
        return [fitted(item, choices[0], name) for item in values]
    if kind is dict:
        return fitted_fields(value, name)
    if kind is Path and isinstance(value, str) or kind is str and isinstance(value, Path):
        value = kind(value)
    if kind is int and hasattr(value, "__index__") and not isinstance(value, bool):
        return operator.index(value)  # also of numpy
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e308:
        return float(value)
    if not isinstance(value, kind) or isinstance(value, bool) and kind is not bool:
        wanted = "a path" if kind is Path else reading.kind_of(kind())
        raise InputError(f"{name} must be {wanted}, not {reading.kind_of(value)}.")
    if "\0" in str(value):
        raise InputError(f"{name} holds a null byte.")
    return value


def fitted_fields(value, name: str) -> dict:
    """Fields with values that JSON knows, from a dictionary or from words FIELD=VALUE."""
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        return dict(field_value(word, name) for word in value)
    try:
        return dict(json.loads(json.dumps(dict(value))))
    except (TypeError, ValueError):
        raise InputError(f"{name} must be fields with values that JSON knows.") from None


def field_value(word: str, name: str) -> tuple:
    """What FIELD=VALUE stands for; a value that is no JSON is a text."""
    field, equals, value = word.partition("=")
    if not equals:
        raise InputError(f"{name} {word}: give FIELD=VALUE")
    try:
        json.loads(value)
    except ValueError:
        return field, value
    except RecursionError:
        pass  # the next says it
    return field, reading.parse_json(value, f"{name} {field}")


def as_words(value) -> list[str]:
    """The value of an option as words of a command line."""
    if isinstance(value, dict):
        texts = {name: f"{name}={inner}" for name, inner in value.items() if isinstance(inner, str)}
        is_plain = {name: field_value(text, name)[1] == value[name] for name, text in texts.items()}
        return [texts[name] if is_plain.get(name) else f"{name}={json.dumps(value[name])}" for name in value]
    return [] if value is True else list(map(str, value if isinstance(value, list) else [value]))


def kinds_of(kind: type[Options], name: str) -> tuple:
    """The type of an option, and what it is made of: float and None of `float | None`."""
    hint = typing.get_type_hints(kind)[name]
    return hint, *typing.get_args(hint)


def takes_one_value(kind: type[Options], name: str) -> bool:
    """Whether an option is neither a flag nor a list."""
    kinds = kinds_of(kind, name)
    return not any(typing.get_origin(inner) is list for inner in kinds) and kinds[0] not in (bool, dict)


NOT_GIVEN = object()


class Lists(Action):
    """For an option of several values, which holds them all if it is given several times, and none if given without."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if before is NOT_GIVEN or not values else [*before, *values])


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        if isinstance(action.default, list) and action.default:
            return f"{action.help} (default: {' '.join(action.default)})"
        is_empty = action.default in (None, "", [], {}) or isinstance(action.default, bool)
        is_told = is_empty or "default" in action.help or not action.option_strings
        return action.help if is_told else super()._get_help_string(action)


class CommandParser(HfArgumentParser):
    """transformers' parser, with names as they are usually written, positional arguments, and options in groups by the
    class that has them."""

    def _add_dataclass_arguments(self, dtype):
        hints = typing.get_type_hints(dtype)
        for title, fields in grouped(dtype):
            group = self.add_argument_group(title)
            for field in map(copy, fields):
                field.type = hints[field.name]
                self._add_option(group, field)

    def _add_option(self, group, field: dataclasses.Field):
        details, before = dict(field.metadata), len(self._actions)
        if details.pop("positional", False):
            many = {"nargs": "+"} if typing.get_origin(field.type) is list else {"type": field.type}
            group.add_argument(field.name, **many, **details)
            return
        if field.type is bool:  # transformers' flags would take the word behind them for their value
            for value, name in ((True, field.name), (False, f"no_{field.name}")):
                shown = details if value != field.default else {**details, "help": SUPPRESS}  # undoes what a file says
                group.add_argument(flag(name), dest=field.name, action="store_const", const=value, **shown)
            return
        any_number = {"nargs": "*"} if details.get("action") is Lists else {}
        field.metadata, field.type = details, list[str] if field.type is dict else field.type
        self._parse_dataclass_field(group, field)
        for action in self._actions[before:]:
            action.option_strings = [word for word in action.option_strings if "_" not in word]
            vars(action).update(any_number)

    def given(self, words: list[str] | None) -> dict:
        """What some words say, and nothing else."""
        for action in self._actions:
            action.required = False  # a file may have it
        names = [action.dest for action in self._actions if action.dest != "help"]
        found = vars(self.parse_args(words, Namespace(**dict.fromkeys(names, NOT_GIVEN))))
        return {name: value for name, value in found.items() if value is not NOT_GIVEN}

    def error(self, message: str):
        raise InputError(message)


def made(kind: type[Options], values: dict) -> Options:
    """The options `kind` of some values.

    Raises:
        InputError: they can't be those, or one is missing.
    """
    if missing := [name_of(field) for field in required(kind) if field.name not in values]:
        raise InputError(f"the following arguments are required: {', '.join(missing)}")
    return kind(**values)


def required(kind: type[Options]) -> list[dataclasses.Field]:
    return [field for _, own in grouped(kind) for field in own if default_of(field) is dataclasses.MISSING]


def name_of(field: dataclasses.Field) -> str:
    return field.name if field.metadata.get("positional") else flag(field.name)


def usage(kind: type[Options]) -> str:
    words = ["%(prog)s"]
    for field in required(kind):
        value, is_many = field.name.upper(), typing.get_origin(field.type) is list
        value = f"{value} [{value} ...]" if is_many else value
        words.append(value if field.metadata.get("positional") else f"{flag(field.name)} {value}")
    return " ".join([*words, kind.either, "[options]; --help lists them"]).replace("  ", " ")


def values_of_file(path: Path, kind: type[Options]) -> dict:
    """The values of options in a YAML or JSON file, by name; numbers may be written as texts, as 1e-3 is one in YAML.

    Raises:
        InputError: it can't be read, or has something that is no option.
    """
    values, hints = {}, typing.get_type_hints(kind)
    for key, value in reading.parse_yaml(reading.read_text(path.absolute()), str(path)).items():
        name = key.replace("-", "_")
        if name not in hints:
            raise InputError(f"{path}: there is no option {key!r}; --help lists them.")
        if isinstance(value, str):
            number = next((kind for kind in (int, float) if kind in (hints[name], *typing.get_args(hints[name]))), str)
            with suppress(ValueError):
                value = number(value)
        if value is not None:
            values[name] = value
    return values


def read_words(kind: type[Options], words: list[str]) -> Options:
    """The options `kind` from words of a command line.

    Raises:
        InputError: they can't be those.
    """
    return made(kind, CommandParser(kind).given(words))


def need(extra: str):
    """Ends a command with one line where a package of an extra isn't installed."""
    for line in metadata.requires("attnres") or ():
        name = re.match(r"[\w-]+", line)[0]
        spec = find_spec(name) if line.endswith(f'extra == "{extra}"') else sys
        if spec is None or getattr(spec, "origin", name) is None:  # a folder of that name is no package
            program = Path(sys.argv[0]).name
            raise SystemExit(f"{program}: {name} isn't installed; pip install 'attnres[{extra}]'")


def parse(kind: type[Options], name: str, doc: str, argv: list[str] | None = None, shown: Callable[[str], str] = str):
    """The options `kind` of a command, from its words and what its `--config-file` holds; the words count more.

    Args:
        name: of the script, without its suffix.
        doc: its docstring, which begins with an example.
        argv: by default the words that the program was called with.
        shown: what of a message may be printed.
    """
    quieten_torchao()  # before anything imports it
    example, description = doc.split("\n\n", 1)
    program = Path(sys.argv[0]).name
    if program.startswith("attnres-"):
        example = example.replace(f"python scripts/{name}.py", program)
    else:
        program = f"{name}.py"
    texts = {"description": description, "epilog": f"example: {example}", "formatter_class": HelpFormatter}
    parser = CommandParser(kind, prog=program, usage=usage(kind), **texts)
    parser.add_argument("--config-file", type=Path, metavar="FILE", help="YAML or JSON file with options by name; "
        "those of the command line count more")  # fmt: skip
    try:
        given = parser.given(argv)
        path = given.pop("config_file", None)
        values = values_of_file(path, kind) if path else {}
        for name, hint in typing.get_type_hints(kind).items():
            if hint is dict and name in values and name in given:
                given[name] = {**fitted_fields(values[name], flag(name)), **fitted_fields(given[name], flag(name))}
        return made(kind, {**values, **given})
    except InputError as error:
        parser.print_usage(sys.stderr)
        parser.exit(2, f"{parser.prog}: error: {shown(str(error)).rstrip('.')}\n")
