"""A rule written in one word on the command line: `bh:alpha=0.02,max_k=6`."""

from __future__ import annotations

import re
from typing import Any

import yaml

from bh_routing.errors import InputError


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
        config[field.strip()] = yaml.safe_load(value)
    name = re.sub(r"[^A-Za-z0-9_.+-]+", "-", text.strip().replace(":", "_").replace(",", "_"))
    return name[:64], config
