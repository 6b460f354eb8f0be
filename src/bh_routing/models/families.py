"""What can't be read off a family's modules: one row for each family of transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from bh_routing.errors import ModelError

Scoring = Literal["softmax"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Facts about one family's router."""

    scoring: Scoring
    """How the router turns logits into weights; temperature needs softmax."""
    normalises: Callable[[Any], bool]
    """Router module -> whether its kept weights are scaled to a fixed sum."""
    top_k_attribute: str = "top_k"
    """The router's own number of experts a token; widening sets it."""


FAMILIES: dict[str, Family] = {
    "olmoe": Family(scoring="softmax", normalises=lambda router: bool(router.norm_topk_prob)),
}


def family_of(model_type: str) -> Family:
    """Return the facts for a `config.model_type`.

    Raises:
        ModelError: the family isn't supported.
    """
    if model_type not in FAMILIES:
        raise ModelError(
            f"model type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}; "
            "use one of these, for example --model demo"
        )
    return FAMILIES[model_type]
