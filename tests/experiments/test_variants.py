"""Rules without their knob, written in one word each."""

from __future__ import annotations

import pytest

from bh_routing.errors import InputError
from bh_routing.experiments.configurations import parse_rule
from bh_routing.experiments.specs import SweepSpec, make_spec
from bh_routing.experiments.variants import parse_variants
from bh_routing.rules import BenjaminiHochbergDrop, PerLayerTopK, RandomK


def test_a_comma_before_a_field_belongs_to_the_rule_before_it() -> None:
    found = parse_variants(["min_p, bh_drop:scope=block,statistic=contribution,top_k,bh"])
    assert [variant.name for variant in found] == ["min_p", "bh_drop-block-contribution", "bh"]
    assert found[1].at(0.25) == BenjaminiHochbergDrop(0.25, scope="block", statistic="contribution")


def test_the_default_names_the_row_of_population_bh() -> None:
    found = parse_variants(make_spec(SweepSpec, output="any").rules)
    assert len(found) == 9
    labels = [variant.label for variant in found]
    assert "contribution_threshold-sensitivity (= population BH)" in labels


def test_a_mean_is_turned_into_the_fields_that_have_it() -> None:
    random_k, per_layer = parse_variants(["random_k:seed=3", "per_layer_top_k"])
    assert random_k.at(4.5) == RandomK.at_mean(4.5, seed=3)
    assert per_layer.at(4.5, num_layers=4) == PerLayerTopK((5, 5, 4, 4))


def test_long_rules_that_begin_alike_have_names_of_their_own() -> None:
    names = {parse_rule(f"top_p:p=0.{'1' * 70}{end}")[0] for end in "12"}
    assert len(names) == 2
    assert all(len(name) <= 64 for name in names)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("bh:alpha=0.1", "sets 'alpha', which is what the sweep turns"),
        ("random_k:shares=1", "sets 'shares'"),
        ("bh_dropp", "did you mean 'bh_drop'"),
        ("bh:nul=gaussian", "did you mean 'null'"),
        ("top_p,min_p,top_p", "'top_p' is there twice"),
        ("bh,bh:null=background", "'bh:null=background' is there twice"),
        ("bh_drop:needed=loss,min_k=2,bh_drop:min_k=2,needed=loss", "is there twice"),
        ("top_k", "no rule is left"),
        ("bh:null", "field=value"),
    ],
)
def test_a_wrong_rule_is_named(text: str, match: str) -> None:
    with pytest.raises(InputError, match=match):
        parse_variants([text])
