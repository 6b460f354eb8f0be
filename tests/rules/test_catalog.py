"""Rules from configurations such as YAML gives."""

from __future__ import annotations

from typing import Any

import pytest

from bh_routing.errors import InputError
from bh_routing.rules import BenjaminiHochberg, TopK, make_rule, rule_to_config


def test_a_users_own_configuration_becomes_a_rule() -> None:
    config = {
        "method": "bh",
        "alpha": 0.03,
        "temperature": 1.5,
        "min_k": 2,
        "max_k": 10,
        "description": "between strict and moderate",
    }
    assert make_rule(config) == BenjaminiHochberg(0.03, temperature=1.5, min_k=2, max_k=10)


@pytest.mark.parametrize("method", ["topk", "top_k"])
def test_both_names_of_top_k_give_the_rule_and_the_catalogs_name_comes_back(method: str) -> None:
    rule = make_rule({"method": method, "k": 8})
    assert rule == TopK(8)
    assert rule_to_config(rule)["method"] == "top_k"


def test_a_configuration_says_every_default() -> None:
    assert rule_to_config(BenjaminiHochberg(0.05)) == {
        "method": "bh",
        "alpha": 0.05,
        "temperature": 1.0,
        "min_k": 1,
        "max_k": None,
        "null": "background",
        "procedure": "bh",
        "on_empty": "min_k",
        "weights": "model",
        "temperature_weights": "mass",
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "needs a method; known: top_k, bh, bh_drop, "),
        ({"method": "bhh", "alpha": 0.05}, "unknown method 'bhh'; .*did you mean 'bh'"),
        ({"method": 3}, "unknown method '3'"),
        ({"method": ["bh"]}, "unknown method"),
        ({"method": "bh", "alfa": 0.05}, "unknown key of method 'bh' 'alfa'; .*'alpha'"),
        ({"method": "topk", "alpha": 0.05}, "unknown key of method 'top_k' 'alpha'"),
        ({"method": "bh_drop"}, "method 'bh_drop' needs the key 'alpha'"),
        ({"method": "topk"}, "method 'top_k' needs the key 'k'"),
        ({"method": "per_layer_top_k", "k": 4}, "k must be a list with one whole number a layer"),
        ({"method": "bh", "alpha": None}, "alpha must be a number"),
        ({"method": "bh", "alpha": 0.05, "null": ["gaussian"]}, "unknown null"),
        ({"method": "bh", "alpha": 0.05, 3: 4}, "unknown key of method 'bh' '3'"),
    ],
)
def test_a_configuration_that_is_no_rule_is_refused(config: dict[Any, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_rule(config)
