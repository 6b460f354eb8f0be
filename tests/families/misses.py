"""Which family misses which claim, and why: the only such list, kept true by the tests.

A test fails when a listed family starts to work, or an unlisted one stops.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import pytest
import torch
from torch._dynamo.exc import UserError

from bh_routing.errors import InputError, ModelError
from tests.families import checks
from tests.families.checks import IMPLEMENTATIONS, Check, family_subject
from tests.families.zoo import family_names


class Miss(NamedTuple):
    """A family's way to miss a claim."""

    error: type[Exception]
    message: str
    """A regular expression that the error's text matches."""


REFUSED: Final = {
    "doge": Miss(ModelError, "'doge' is not supported: its experts are rows of an embedding"),
    "jetmoe": Miss(ModelError, "'jetmoe' is not supported: its router hands tokens over sorted"),
    "llama4": Miss(ModelError, "'llama4_text' is not supported: it runs every expert"),
}
"""Families that `route` refuses altogether."""

MISSES: Final[dict[Check, dict[str, Miss]]] = {
    checks.pruning_equals_the_familys_own_smaller_top_k: {
        # Its hash layer's own top-k is the width of a table of random experts.
        "deepseek_v4": Miss(AssertionError, "not close"),
        # Its own top-k is always 2, whatever the configuration says.
        "phimoe": Miss(AssertionError, "not close"),
        # Its own top-k is 1.
        "zaya": Miss(AssertionError, "pruning did nothing"),
    },
    checks.counts_vary_by_token: {
        # Its own top-k is 1.
        "zaya": Miss(AssertionError, r"tensor\(\[1\]\)"),
    },
    checks.widening_adds_to_the_models_own: {
        "deepseek_v4": Miss(InputError, "at most 4 .*looks experts up by token id"),
        "openai_privacy_filter": Miss(InputError, "at most 4 .*sum of its weights depends"),
        "phimoe": Miss(InputError, "at most 2 .*no number of it sets"),
    },
}

_BY_ITSELF: Final = "data-dependent"
"""torch's word for it: transformers' own code of these families can't be traced as one graph."""

_UNTRACEABLE: Final = {
    "dbrx": Miss(UserError, _BY_ITSELF),  # a loop over experts
    "longcat_flash": Miss(UserError, _BY_ITSELF),  # the same
    "qwen4_exp": Miss(UserError, _BY_ITSELF),  # its attention counts blocks
    "step3p7": Miss(UserError, _BY_ITSELF),  # a loop over experts
}
MISSES[checks.compiled_prefill_counts_alike] = _UNTRACEABLE
MISSES[checks.a_rule_after_compilation_is_never_ignored] = _UNTRACEABLE

LEAST: Final[dict[Check, int]] = {
    checks.keeping_everything_changes_nothing: 66,
    checks.a_second_route_is_refused: 66,
    checks.pruning_equals_the_familys_own_smaller_top_k: 62,
    checks.counts_vary_by_token: 66,
    checks.dropped_experts_are_never_read: 66,
    checks.widening_adds_to_the_models_own: 60,
    checks.compiled_prefill_counts_alike: 60,
    checks.a_rule_after_compilation_is_never_ignored: 60,
}
"""How many families a claim must hold for."""


def miss_of(check: Check, family: str) -> Miss | None:
    """Return how a family misses a claim, None if it doesn't."""
    return REFUSED.get(family) or MISSES.get(check, {}).get(family)


def hold(
    check: Check,
    family: str,
    dtype: torch.dtype = torch.float32,
    implementations: tuple[str, ...] = IMPLEMENTATIONS,
) -> None:
    """Assert that a claim holds for a family, or that the family misses it as listed."""
    subject = family_subject(family, dtype, implementations)
    miss = miss_of(check, family)
    if miss is None:
        check(subject)
        return
    with pytest.raises(miss.error, match=miss.message):
        check(subject)


def families_that_work(check: Check) -> list[str]:
    """Names of the installed families that a claim holds for."""
    return [name for name in family_names() if miss_of(check, name) is None]
