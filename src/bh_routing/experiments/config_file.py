"""Configurations as users write them: a YAML file, or one word on the command line."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bh_routing.errors import InputError
from bh_routing.experiments.specs import Prompt, describe_error
from bh_routing.rules.catalog import name_of_text


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
        except (*YAML_ERRORS, RefusedYaml) as error:
            problem = " ".join(str(error).split())[:100]
            raise InputError(
                f"rule {text!r} has the value {value!r}, which isn't valid YAML ({problem}); write "
                "a number or a word"
            ) from error
    return name_of_text(text), config


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
"""Besides its own errors PyYAML raises others, such as KeyError for `!!bool maybe`."""


class ConfigFile(BaseModel):
    """The content of a configuration file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    configs: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Name -> configuration, as in `ROUTING_CONFIGS`."""
    prompts: list[Prompt] = Field(default_factory=list)
    """Prompts, as in `TEST_PROMPTS`."""


class Selection(NamedTuple):
    """Configurations and prompts, as the user's unchecked plain data."""

    configs: dict[str, dict[str, Any]]
    prompts: list[dict[str, Any]]


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
                raise RefusedYaml(
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
            raise RefusedYaml(
                f"uses a YAML alias (*{event.anchor}, line {event.start_mark.line + 1}), which "
                "isn't supported; write the value out"
            )
        return super().compose_node(parent, index)


class RefusedYaml(Exception):
    """The text holds an unsupported construct; the message continues after the file's name."""


def load_yaml(content: str | bytes) -> Any:
    """Load YAML 1.2's plain types, with string keys, and without duplicate keys, aliases or dates.

    Raises:
        RefusedYaml: the content has an alias or a duplicate key.
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
    except RefusedYaml as refusal:
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
) -> Selection:
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
    return Selection(
        {**configs, **content.configs}, [*(dict(prompt) for prompt in prompts), *added]
    )
