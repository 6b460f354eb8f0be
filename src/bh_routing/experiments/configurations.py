"""Configurations: from a YAML file or one word on the command line to rules."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bh_routing.errors import InputError, unknown_name
from bh_routing.experiments import defaults
from bh_routing.experiments.spec_errors import describe_error, shorten
from bh_routing.experiments.specs import Choice, ModelSpec, Prompt, PromptChoice
from bh_routing.rules.base import Rule
from bh_routing.rules.catalog import get_rule, make_rule, name_of_text, rule_to_config
from bh_routing.rules.fixed import TopK

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+@-]{0,63}")


class NamedRule(NamedTuple):
    """A configuration with validated fields."""

    name: str
    description: str
    rule: Rule


def make_rules(
    configs: Mapping[str, Mapping[str, Any]], budget: float | None = None
) -> list[NamedRule]:
    """Make a rule per configuration, in order.

    Args:
        configs: name -> configuration.
        budget: with a budget, a configuration may lack its rule's tuning parameter.
    Raises:
        InputError: a name or a field is invalid; the message starts with the configuration.
    """
    return [_make_rule(name, config, budget is not None) for name, config in configs.items()]


def _make_rule(name: str, config: Mapping[str, Any], may_lack_knob: bool) -> NamedRule:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(
            f"configuration name {shorten(str(name))!r} must be 1 to 64 letters, digits, or "
            "_ . + @ - and start with a letter or digit; rename it"
        )
    fields = dict(config)
    description = fields.pop("description", "")
    if not isinstance(description, str):
        raise InputError(
            f"configuration {name!r}: description must be a text, got {description!r}; quote it"
        )
    if "method" not in fields:
        raise InputError(f"configuration {name!r} has no method; add for example method: bh")
    try:
        return NamedRule(name, description, make_rule(_placeholder(fields, may_lack_knob) | fields))
    except InputError as error:
        raise InputError(f"configuration {name!r}: {error}") from error


def _placeholder(fields: Mapping[str, Any], may_lack_knob: bool) -> dict[str, Any]:
    knob = get_rule(fields).knob if may_lack_knob else None
    if knob is None or knob is TopK.knob:
        return {}
    return knob.fields(knob.scale.value_at(sum(knob.scale.ends(model_top_k=1)) / 2), num_layers=1)


def find_baseline(rules: Sequence[NamedRule], model_top_k: int) -> str | None:
    """Return the name of the baseline that other configurations are compared with.

    It is the model's own top-k, or else the first static top-k; None without either.
    """
    static = [named for named in rules if isinstance(named.rule, TopK)]
    own = [named for named in static if named.rule == TopK(model_top_k)]
    return next((named.name for named in [*own, *static]), None)


def resolved(spec: ModelSpec, rules: Sequence[NamedRule]) -> dict[str, Any]:
    """Return the spec as plain JSON data, with all fields of each rule."""
    content = spec.model_dump(mode="json")
    content["configs"] = {
        named.name: {**rule_to_config(named.rule), "description": named.description}
        for named in rules
    }
    return content


def parse_rule(text: str) -> tuple[str, dict[str, Any]]:
    """Parse `method:field=value,…` into a configuration's name and fields.

    Raises:
        InputError: the text doesn't have that form.
    Example:
        >>> parse_rule("bh:alpha=0.02,max_k=6")
        ('bh_alpha-0.02_max_k-6', {'method': 'bh', 'alpha': 0.02, 'max_k': 6})
    """
    method, _, rest = text.strip().partition(":")
    config: dict[str, Any] = {"method": method.strip()}
    for item in filter(None, (part.strip() for part in rest.split(","))):
        field, equals, value = item.partition("=")
        if not equals or not value.strip():
            raise InputError(
                f"rule {text!r} must be method:field=value,field=value, got {item!r} in it; for "
                "example bh:alpha=0.05,max_k=8"
            )
        if field.strip() in config:
            raise InputError(f"rule {text!r} gives {field.strip()} twice; remove one")
        try:
            config[field.strip()] = load_yaml(value)
        except (*YAML_ERRORS, RejectedYaml) as error:
            problem = " ".join(str(error).split())[:100]
            raise InputError(
                f"rule {text!r} has the value {value!r}, which isn't valid YAML ({problem}); write "
                "a number or a word"
            ) from error
    return name_of_text(text), config


def rule_text(rule: Rule) -> str | None:
    """Return the text that `parse_rule` turns into this rule; None for a rule with a list.

    Example:
        >>> rule_text(make_rule({"method": "bh", "alpha": 0.02, "max_k": None}))
        'bh:alpha=0.02'
    """
    config = rule_to_config(rule)
    given = {f.name: config[f.name] for f in fields(rule) if config[f.name] != f.default}  # type: ignore[arg-type]
    if any(isinstance(value, list) for value in given.values()):
        return None
    words = (value if isinstance(value, str) else json.dumps(value) for value in given.values())
    shown = ",".join(f"{name}={word}" for name, word in zip(given, words, strict=True))
    return f"{rule.method}:{shown}" if shown else rule.method


_SIGNED: Final = "-+0123456789"
SIZE_LIMIT_BYTES: Final = 1_000_000
YAML_ERRORS: Final = (
    yaml.YAMLError,
    ValueError,
    RecursionError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
)
"""PyYAML raises its own errors and others, such as KeyError for `!!bool maybe`."""


class ConfigFile(BaseModel):
    """The content of a configuration file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    configs: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Name -> configuration, as in `ROUTING_CONFIGS`."""
    prompts: list[Prompt] = Field(default_factory=list)
    """Prompts, as in `TEST_PROMPTS`."""


_TYPES: Final = (
    ("null", re.compile(r"(?:~|null|Null|NULL|)$"), ("~", "n", "N", "")),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), tuple("tTfF")),
    ("int", re.compile(r"(?:[-+]?(?:0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+)$"), tuple(_SIGNED)),
    (
        "float",
        re.compile(
            r"[-+]?(?:[0-9]+[eE][-+]?[0-9]+"
            r"|(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$"
            r"|\.(?:nan|NaN|NAN)$"
        ),
        (*_SIGNED, "."),
    ),
)
"""Tag, pattern and first characters of its plain scalars, by YAML 1.2 rather than PyYAML's 1.1.

In 1.1 `1e-2` is a string, `on` and `no` are booleans, 010 is 8 and 2026-01-31 is a date.
"""


class _Loader(yaml.SafeLoader):
    """A safe loader that rejects duplicate keys and aliases."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {  # type: ignore[misc]
        first: [(f"tag:yaml.org,2002:{tag}", form) for tag, form, all_ in _TYPES if first in all_]
        for first in (*_SIGNED, *"~nNtTfF.", "")
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = key_node.value
            if isinstance(key, str) and key in seen:
                raise RejectedYaml(
                    f"has the name {key!r} twice (line {key_node.start_mark.line + 1}); YAML would "
                    "keep only the last: rename or remove one"
                )
            if isinstance(key, str):
                seen.add(key)
                # Keys are always strings: `null` is a field of rules.
                key_node.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep=deep)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            # Nested aliases can expand a few lines to gigabytes.
            raise RejectedYaml(
                f"uses a YAML alias (*{event.anchor}, line {event.start_mark.line + 1}), which "
                "isn't supported; write the value out"
            )
        return super().compose_node(parent, index)


class RejectedYaml(Exception):
    """The text holds an unsupported construct; the message continues after the file's name."""


def load_yaml(content: str | bytes) -> Any:
    """Load YAML 1.2's plain types, with string keys, and without duplicate keys, aliases or dates.

    Raises:
        RejectedYaml: the content has an alias or a duplicate key.
        YAML_ERRORS: the content isn't YAML.
    """
    return yaml.load(content, Loader=_Loader)  # derived from SafeLoader


def read_config_file(path: Path) -> ConfigFile:
    """Read and check a YAML file of configurations and prompts.

    Raises:
        InputError: the file can't be read, isn't YAML, or has an unknown key.
    """
    try:
        with path.open("rb") as file:
            content = file.read(SIZE_LIMIT_BYTES + 1)
    except FileNotFoundError:
        raise InputError(f"configuration file {path} doesn't exist; check --config") from None
    except OSError as error:
        raise InputError(
            f"configuration file {path} can't be read ({error.strerror}); check --config"
        ) from error
    if len(content) > SIZE_LIMIT_BYTES:
        raise InputError(
            f"configuration file {path} is larger than {SIZE_LIMIT_BYTES:,} bytes; is it the right "
            "file?"
        )
    try:
        values = load_yaml(content)
    except RejectedYaml as refusal:
        raise InputError(f"configuration file {path} {refusal}") from None
    except YAML_ERRORS as error:
        problem = " ".join(str(error).split())
        raise InputError(
            f"configuration file {path} isn't valid YAML ({problem[:200]}); correct it"
        ) from error
    return _checked(path, values)


def _checked(path: Path, values: Any) -> ConfigFile:
    if values is None:
        raise InputError(f"configuration file {path} is empty; add configs: or prompts:")
    if not isinstance(values, dict):
        raise InputError(
            f"configuration file {path} must be a mapping with configs: and prompts:, got a "
            f"{type(values).__name__}; see docs/configurations.md for an example"
        )
    try:
        return ConfigFile(**{str(key): value for key, value in values.items()})
    except ValidationError as error:
        text = describe_error(error, ConfigFile, {"prompts": Prompt})
        raise InputError(
            f"configuration file {path}: {text.replace('the run has', 'it has', 1)}"
        ) from None


def add_config_file(
    path: Path,
    configs: Mapping[str, dict[str, Any]],
    prompts: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Append a file's configurations and prompts to given ones.

    Raises:
        InputError: the file is invalid, or a configuration's name is taken.
    """
    content = read_config_file(path)
    for name in content.configs:
        if name in configs:
            raise InputError(
                f"configuration file {path} defines {name!r}, which exists already; choose "
                "another name"
            )
    added = [prompt.model_dump() for prompt in content.prompts]
    return {**configs, **content.configs}, [*map(dict, prompts), *added]


def choose(
    choice: Choice,
    configs: Mapping[str, dict[str, Any]] | None = None,
    prompts: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Return the fields of a spec that a user's choice sets.

    Prompts are selected here, configurations once the model is known.

    Args:
        choice: the user's choice.
        configs, prompts: those to choose from; None: the library's.
    Raises:
        InputError: the file, a rule or a prompt's number or category is invalid.
    """
    configs = defaults.ROUTING_CONFIGS if configs is None else configs
    prompts = defaults.TEST_PROMPTS if prompts is None else prompts
    if choice.config is not None:
        configs, prompts = add_config_file(choice.config, configs, prompts)
    written = dict(parse_rule(text) for text in choice.rules)
    if written and choice.config is None and choice.configs is None:
        fields: dict[str, Any] = {"configs": written}
    else:
        only = None if choice.configs is None else [*choice.configs, *written]
        fields = {"configs": {**configs, **written}, "only": only}
    if isinstance(choice, PromptChoice):
        fields["prompts"] = select_prompts(prompts, choice.prompts)
    return fields


def select_prompts(
    prompts: Sequence[Mapping[str, Any]], items: Iterable[str] | None
) -> list[dict[str, Any]]:
    """Select the prompts that `items` name, in the order of `prompts`; None selects all.

    Args:
        prompts: mappings with a `category`.
        items: each is a number (the first prompt is 1), a range such as 2-4, or a category.
    Raises:
        InputError: a number is out of range, or a name isn't a category.
    Example:
        >>> prompts = [{"text": t, "category": c} for t, c in ["ax", "by", "cx"]]
        >>> [p["text"] for p in select_prompts(prompts, ["1", "y"])]
        ['a', 'b']
    """
    if items is None:
        return [dict(prompt) for prompt in prompts]
    kept: set[int] = set()
    for item in items:
        kept.update(_prompt_numbers(prompts, item))
    return [dict(prompt) for number, prompt in enumerate(prompts, start=1) if number in kept]


def _prompt_numbers(prompts: Sequence[Mapping[str, Any]], item: str) -> list[int]:
    """Return the prompt numbers, from 1, that one item of `--prompts` denotes."""
    match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", item)
    if match:
        first = int(match[1])
        last = int(match[2] or first)
        if not 1 <= first <= last <= len(prompts):
            raise InputError(
                f"prompt numbers run from 1 to {len(prompts)}, got {item}; for example 1,3-5"
            )
        return list(range(first, last + 1))
    categories = [str(prompt.get("category", "custom")) for prompt in prompts]
    if item not in categories:
        raise unknown_name("category of prompts", item, dict.fromkeys(categories))
    return [number for number, name in enumerate(categories, start=1) if name == item]
