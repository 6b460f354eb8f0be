"""Options of commands, derived from the fields of specs, and the overrides that `main` accepts."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from bh_routing.errors import InputError
from bh_routing.experiments.specs import COMMAS, NO_OPTION


@dataclass(frozen=True, kw_only=True, slots=True)
class Overrides:
    """Configurations, prompts and functions in place of the library's own; None: the library's."""

    configs: dict[str, dict[str, Any]] | None = None
    """Name -> configuration."""
    prompts: list[dict[str, Any]] | None = None
    """Prompts as plain data."""
    analyze: Callable[[Any], dict[str, Any]] | None = None
    """Table of experiments -> summary."""
    visualize: Callable[[Any, Any], Any] | None = None
    """Table and folder -> plots."""
    report: Callable[[Any, dict[str, Any], Any], Any] | None = None
    """Table, summary and folder -> report."""
    command: str | None = None
    """The command line; set by `main`."""


JsonOption = Annotated[bool, typer.Option("--json", help="Print the results as JSON on stdout.")]

SHORTHANDS: Final = {"dtype": ("no_fp16", "float32")}
"""Field -> a flag that sets it, and the value that it sets."""


def with_options(*models: type[BaseModel]) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Give a command an option per field of the models; it receives a dict of values per model.

    A field's name is the option's, its docstring the help and its default the default. The option
    of a list may be repeated and is called after one item: `rules` is `--rule`. A list of `Names`
    is one word with commas. Errors name options in place of fields, as `name_options` does.

    The command's parameters are the context, a dict per model, and options of its own.
    """

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        context, *rest = inspect.signature(command, eval_str=True).parameters.values()
        derived = [dict(_options(model)) for model in models]
        own = [context, *rest[len(models) :]]
        parameters = [*own, *(option for part in derived for option in part.values())]
        flags = {p.name: _flag(p.name, get_args(p.annotation)[0]) for p in parameters[len(own) :]}

        @functools.wraps(command)
        def run(**given: Any) -> int:
            parts = [{name: given.pop(name) for name in part} for part in derived]
            for values in parts:
                _expand(values)
            try:
                return command(given.pop(context.name), *parts, **given)
            except InputError as error:
                raise type(error)(name_options(str(error), flags)) from error

        signature = inspect.Signature([p.replace(kind=p.KEYWORD_ONLY) for p in parameters])
        setattr(run, "__signature__", signature)  # noqa: B010  # mypy doesn't know the attribute
        run.__annotations__ = {}
        return run

    return decorate


def _options(model: type[BaseModel]) -> Iterator[tuple[str, inspect.Parameter]]:
    for name, field in model.model_fields.items():
        if NO_OPTION in field.metadata:
            continue
        yield name, _option(name, field)
        if name in SHORTHANDS:
            variable, value = SHORTHANDS[name]
            text = f"The same as --{name} {value}: more exact, with twice the memory."
            option = typer.Option(f"--{variable.replace('_', '-')}", help=text)
            yield variable, _parameter(variable, bool, option, False)


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    kind, *about = _parts(field.annotation)
    default = field.get_default(call_default_factory=True)
    if get_origin(kind) is list and COMMAS in [*about, *field.metadata]:
        kind, default = str, ",".join(default) if default else None
    elif get_origin(kind) is list:
        (item,) = get_args(kind)
        kind = list[_parts(item)[0]]  # type: ignore[misc]
    # Of what is on by default, typer names both flags: --resume and --no-resume.
    flags = [] if kind is bool and default else [_flag(name, kind)]
    option = typer.Option(*flags, help=" ".join((field.description or "").split()))
    if field.is_required():
        return _parameter(name, kind, option, inspect.Parameter.empty)
    return _parameter(name, kind | None if default is None else kind, option, default)


def _flag(name: str, kind: Any) -> str:
    word = name.replace("_", "-")
    return f"--{word.removesuffix('s') if get_origin(kind) is list else word}"


def name_options(text: str, flags: Mapping[str, str]) -> str:
    """Spell the keywords in a message of the library as options.

    Args:
        text: begins with the name of a field, or the number of an item, and a colon, or has
            `name="value"` in it.
        flags: field -> option.
    Example:
        >>> name_options('device_map="auto" needs accelerate', {"device_map": "--device-map"})
        '--device-map auto needs accelerate'
        >>> name_options("budget 2: must be at least 1", {"budgets": "--budget"})
        '--budget must be at least 1'
    """
    flags = {**flags, **{f"{name.removesuffix('s')} #": flag for name, flag in flags.items()}}

    def spell(match: re.Match[str]) -> str:
        flag = flags.get(re.sub(r"\d+$", "#", match[1]))
        return match[0] if flag is None else f"{flag} {match[2]}"

    return re.sub(r'\b(\w+)="([^"]+)"', spell, re.sub(r"^(\w+(?: \d+)?): ()", spell, text))


def _parameter(name: str, kind: Any, option: Any, default: Any) -> inspect.Parameter:
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, keyword, annotation=Annotated[kind, option], default=default)


def _parts(annotation: Any) -> list[Any]:
    """Return a type without None and annotations, followed by the annotations."""
    if get_origin(annotation) is Annotated:
        inner, *about = get_args(annotation)
        return [*_parts(inner), *about]
    if get_origin(annotation) in (Union, UnionType):
        (inner,) = (part for part in get_args(annotation) if part is not NoneType)
        return _parts(inner)
    return [annotation]


def _expand(values: dict[str, Any]) -> None:
    """Replace shorthands by the fields that they set."""
    for name, (variable, value) in SHORTHANDS.items():
        if not values.pop(variable, False):
            continue
        if values[name] not in ("auto", value):
            raise InputError(
                f"--{variable.replace('_', '-')} and --{name} {values[name]} exclude each other; "
                "give one"
            )
        values[name] = value


OLD_SPELLINGS: Final = {
    "run": {"--eval-text": "--text", "--eval-tokens": "--tokens"},
    "sweep": {"--rules": "--rule", "--budgets": "--budget"},
    "calibrate": {"--text": "--calibration-text"},
}
"""Command -> an option's old spelling -> the new one; kept for one release."""


def spell_anew(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Replace old spellings of options in a command line.

    Returns:
        The new command line, and a sentence per old spelling.
    Example:
        >>> spell_anew(["sweep", "--budgets=5,4"])[0]
        ['sweep', '--budget', '5', '--budget', '4']
    """
    old = OLD_SPELLINGS.get(arguments[0], {}) if arguments else {}
    rest, found, used = list(arguments), list[str](), dict[str, None]()
    while rest:
        word, equals, value = rest.pop(0).partition("=")
        if word not in old:
            found.append(word + equals + value)
            continue
        used[word] = None
        values = [value] if equals else rest[:1]
        rest = rest if equals else rest[1:]
        if word == "--budgets":
            values = [item for value in values for item in value.replace(",", " ").split()]
        found += [part for value in values for part in (old[word], value)] or [old[word]]
    return found, [
        f"{word} is now {old[word]}; the next release drops the old spelling" for word in used
    ]
