"""Which family misses which claim, and why: the only such list, kept true by the tests.

A test fails when a listed family starts to work, or an unlisted one stops.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import pytest
import torch
import transformers
from packaging.version import Version
from torch._dynamo.exc import UserError

from bh_routing.errors import InputError, ModelError
from tests.families import checks
from tests.families.checks import IMPLEMENTATIONS, Check, family_subject


class Miss(NamedTuple):
    """A family's way to miss a claim."""

    error: type[Exception]
    message: str
    """A regular expression that the error's text matches."""


REFUSED: Final[dict[str, Miss]] = {
    "doge": Miss(ModelError, "'doge' is not supported: its experts are rows of an embedding"),
    "jetmoe": Miss(ModelError, "'jetmoe' is not supported: its router hands tokens over sorted"),
    "llama4": Miss(ModelError, "'llama4_text' is not supported: it runs every expert"),
}
"""Families that `route` refuses altogether."""

_NO_ROUTER: Final = Miss(ModelError, "can't be routed: no m")
_BROKEN: Final = Miss(ModelError, "can't be routed: a forward pass over text fails")

OLDER: Final = {
    "5.17": {"aria": _NO_ROUTER, "longcat_flash": _NO_ROUTER},
    "5.12": {
        "deepseek_ocr2": _BROKEN,
        "deepseek_v2": _BROKEN,
        "granitemoe": _NO_ROUTER,
        "granitemoehybrid": _NO_ROUTER,
        "granitemoeshared": _NO_ROUTER,
    },
}
"""Refused as well up to these versions of transformers, whose code of the family was another."""

_INSTALLED: Final = Version(transformers.__version__).release[:2]
for _version, _refused in OLDER.items():
    if Version(_version).release >= _INSTALLED:
        REFUSED.update(_refused)

FLOAT32_ONLY: Final[set[str]] = {"deepseek_v4"} if _INSTALLED <= (5, 17) else set()
"""Families whose untouched tiny model can't run in bfloat16: their own code mixes types."""

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

MOST_MISSES: Final[dict[Check, int]] = {
    checks.keeping_everything_changes_nothing: 4,
    checks.a_second_route_is_refused: 4,
    checks.pruning_equals_the_familys_own_smaller_top_k: 8,
    checks.counts_vary_by_token: 4,
    checks.dropped_experts_are_never_read: 4,
    checks.widening_adds_to_the_models_own: 10,
    checks.compiled_prefill_counts_alike: 10,
    checks.a_rule_after_compilation_is_never_ignored: 10,
}
"""How many of the newest transformers' 70 families may miss a claim."""


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
    if dtype != torch.float32 and family in FLOAT32_ONLY:
        pytest.skip("the untouched model can't run in this type")
    subject = family_subject(family, dtype, implementations)
    miss = miss_of(check, family)
    if miss is None:
        check(subject)
        return
    with pytest.raises(miss.error, match=miss.message):
        check(subject)
