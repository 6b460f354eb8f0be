"""The worked example of docs/adding-a-rule.md passes what every rule must pass."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bh_routing.rules import RULES, Rule, catalog
from tests.rules import test_conformance as suite

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-rule.md"
NAME = "worked_example_of_a_rule"


@pytest.fixture
def gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The page's class, with the page's catalog line carried out."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    file = tmp_path / f"{NAME}.py"
    file.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(NAME, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, NAME, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(catalog, "RULES", {**RULES, "gap": module.Gap})
    yield module.Gap


@pytest.mark.parametrize("ratio", [0.3, 0.9, 1.0])
def test_the_worked_example_passes_the_suite(gap: Any, ratio: float) -> None:
    rule: Rule = gap(ratio)
    for claim in (
        suite.test_a_selector_says_yes_or_no_to_each_slot_and_keeps_at_least_one,
        suite.test_the_same_token_is_decided_alike_alone_and_in_any_batch,
        suite.test_the_order_of_the_slots_does_not_matter,
        suite.test_the_kept_slots_are_the_best_by_logit_where_a_rule_says_so,
        suite.test_selecting_leaves_its_input_as_it_was,
        suite.test_selecting_makes_no_host_sync,
        suite.test_a_selector_compiles_into_one_graph,
        suite.test_no_tokens_are_no_trouble,
        suite.test_a_rule_survives_its_configuration,
        suite.test_a_rule_is_frozen_and_can_be_a_key,
    ):
        claim(rule)


def test_the_pages_line_of_examples_makes_rules(gap: Any) -> None:
    (line,) = re.findall(r'"gap": \[(.*)\],', PAGE.read_text(encoding="utf-8"))
    ratios = [float(ratio) for ratio in re.findall(r"Gap\(([\d.]+)\)", line)]
    assert [gap(ratio).ratio for ratio in ratios] == [0.3, 0.9, 1.0]
