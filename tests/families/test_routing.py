"""Under `route`, a model of every family does what it is told and nothing else."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version

from bh_routing.models import find_routers
from tests.families import checks
from tests.families.checks import IMPLEMENTATIONS, Check, Subject
from tests.families.misses import MISSES, MOST_MISSES, REFUSED, hold, miss_of
from tests.families.zoo import NUM_EXPERTS, family_names, left_out, tiny_model

every_family = pytest.mark.parametrize("family", family_names())
newest_only = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="older: fewer families"
)
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.full)]
)


@every_family
def test_keeping_everything_changes_no_bit(family: str) -> None:
    hold(checks.keeping_everything_changes_nothing, family)


@every_family
def test_keeping_everything_changes_no_bit_in_bfloat16(family: str) -> None:
    # One implementation of the experts a family; the full tier tries all.
    own = IMPLEMENTATIONS[family_names().index(family) % len(IMPLEMENTATIONS)]
    hold(checks.keeping_everything_changes_nothing, family, torch.bfloat16, (own,))


@pytest.mark.full
@every_family
def test_keeping_everything_changes_no_bit_in_bfloat16_and_every_implementation(
    family: str,
) -> None:
    hold(checks.keeping_everything_changes_nothing, family, torch.bfloat16)


@every_family
def test_a_second_route_is_refused(family: str) -> None:
    hold(checks.a_second_route_is_refused, family)


@every_family
def test_pruning_equals_the_familys_own_smaller_top_k(family: str) -> None:
    hold(checks.pruning_equals_the_familys_own_smaller_top_k, family)


@every_family
def test_preserving_the_mass_is_the_convention_of_a_family_that_normalises(family: str) -> None:
    hold(checks.preserving_the_mass_is_the_convention_of_a_family_that_normalises, family)


def test_gains_of_experts_are_no_part_of_the_mass_that_is_preserved() -> None:
    model = tiny_model("gemma4")
    for site in find_routers(model).sites:
        site.module.get_parameter("per_expert_scale").copy_(torch.linspace(0.3, 3.0, NUM_EXPERTS))
    checks.preserving_the_mass_is_the_convention_of_a_family_that_normalises(
        Subject(model=model, with_top_k=lambda _: model)
    )


@every_family
@every_dtype
def test_counts_vary_by_token(family: str, dtype: torch.dtype) -> None:
    hold(checks.counts_vary_by_token, family, dtype)


@every_family
@every_dtype
def test_dropped_experts_are_never_read(family: str, dtype: torch.dtype) -> None:
    hold(checks.dropped_experts_are_never_read, family, dtype)


@every_family
@every_dtype
def test_widening_adds_to_the_models_own(family: str, dtype: torch.dtype) -> None:
    hold(checks.widening_adds_to_the_models_own, family, dtype)


@newest_only
@pytest.mark.parametrize("check", MOST_MISSES, ids=lambda check: check.__name__)
def test_a_claim_holds_for_enough_families(check: Check) -> None:
    assert len(family_names()) >= 70
    missing = [family for family in family_names() if miss_of(check, family)]
    assert len(missing) <= MOST_MISSES[check]


@newest_only
def test_every_listed_miss_is_of_an_installed_family() -> None:
    assert {*REFUSED}.union(*MISSES.values()) <= {*family_names()}
    assert left_out() == ("nllb_moe", "switch_transformers", "vitpose_backbone")
