"""A rule written in one word on the command line: `bh:alpha=0.02,max_k=6`."""

from __future__ import annotations

import re
from typing import Any, Final

from bh_routing.errors import InputError
from bh_routing.experiments.config_file import YAML_ERRORS, RefusedYaml, load_yaml
from bh_routing.records import json_digest

_NAME_LENGTH: Final = 64


def parse_rule(text: str) -> tuple[str, dict[str, Any]]:
    """Turn `method:field=value,…` into a configuration's name and its fields.

    Raises:
        InputError: the text isn't of that form.
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
    name = re.sub(r"[^A-Za-z0-9_.+-]+", "-", text.strip().replace(":", "_").replace(",", "_"))
    if len(name) > _NAME_LENGTH:  # two long rules may begin alike
        name = f"{name[: _NAME_LENGTH - 9]}-{json_digest(text)[:8]}"
    return name, config
