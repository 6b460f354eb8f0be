"""The public functions on the demo model."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest

import bh_routing as bhr
from bh_routing.cli.calibrate import calibrate as cli_calibrate
from bh_routing.models import LoadedModel


@pytest.mark.parametrize(
    ("asked", "fitted"),
    [
        ({}, ("background",)),
        ({"rules": [bhr.BenjaminiHochberg(0.1, null="pooled"), bhr.TopK(4)]}, ("pooled",)),
        ({"rules": {"a": bhr.ContributionThreshold(0.1, statistic="contribution")}}, ("needed",)),
        (
            {"rules": [bhr.BenjaminiHochberg(), bhr.BenjaminiHochberg(0.1)], "nulls": ["pooled"]},
            ("background", "pooled"),
        ),
    ],
)
def test_what_rules_need_is_fitted_and_nothing_else(
    demo: LoadedModel, asked: dict[str, Any], fitted: tuple[str, ...]
) -> None:
    texts = [document.text for document in bhr.packaged_documents("calibration")[:2]]
    assert bhr.calibrate(*demo, texts, max_tokens=60, **asked).nulls == fitted


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"rules": [bhr.TopK(4), bhr.TopP(0.8)]}, "no calibration is needed by top_k, top_p"),
        ({"rules": ["bh"]}, "a rule must be an object .* got 'bh' of type str"),
        ({"rules": [bhr.BenjaminiHochberg]}, "a rule must be an object .* of type ABCMeta"),
        ({"rules": bhr.TopK(4)}, r"must be a list .* got TopK\(k=4.*; for one rule write \[rule\]"),
        ({"rules": "bh"}, "must be a list .* got 'bh'"),
        ({"nulls": ["backgroud"]}, "did you mean 'background'"),
    ],
)
def test_what_cannot_be_fitted_is_rejected_in_one_sentence(
    demo: LoadedModel, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(bhr.InputError, match=message):
        bhr.calibrate(*demo, ["some text"], **asked)


def test_a_parameter_has_one_default_wherever_it_is() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(bhr.BenjaminiHochberg)}
    for function in (
        bhr.benjamini_hochberg_routing,
        bhr.benjamini_hochberg,
        bhr.benjamini_yekutieli,
        bhr.storey,
        bhr.p_values,
    ):
        for name, parameter in inspect.signature(function).parameters.items():
            if name in fields and name != "null" and parameter.default is not parameter.empty:
                assert parameter.default == fields[name], f"{function.__name__}: {name}"
    command = inspect.signature(cli_calibrate).parameters
    for name in ("max_tokens", "seed"):
        ours = inspect.signature(bhr.calibrate).parameters[name].default
        assert ours == command[name].default, name
    assert command["nulls"].default == fields["null"]
