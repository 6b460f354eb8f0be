"""Model families: conventions that the probe can't establish, and the table of tested families."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final, TypedDict

from bh_routing.errors import ModelError
from bh_routing.models.sites import RouterFacts, RouterSite, Scoring


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Facts about one family's router that the probe can't establish."""

    scoring: Scoring | None = None
    """Scoring function, where the probe doesn't know it."""
    normalises: bool | None = None
    """With `scoring`: whether its weights sum to a constant."""
    top_k: int | None = None
    """Experts per token, where the code ignores config.json."""
    skips: bool = False
    """Whether the last class of the logits is no expert: the token skips all experts."""


FAMILIES: Final[dict[str, Family]] = {
    # Two softmaxes, each over the logits near its own maximum; the weights aren't normalised.
    "phimoe": Family(scoring="sparsemixer", normalises=False, top_k=2),
    "zaya": Family(skips=True),
}

UNSUPPORTED: Final[dict[str, str]] = {
    "doge": "its experts are rows of an embedding, mixed without a router module",
    "jetmoe": "its router hands tokens over sorted by expert, in place of weights and indices",
    "llama4": "it runs every expert on every token, so leaving one out saves nothing",
    "nllb_moe": "it is no causal language model",
    "switch_transformers": "it is no causal language model",
}
"""Unsupported families by `model_type`, with the reason."""
TABLE_CALL: Final = "bh_routing.models.families.family_rows()"
"""For messages; the command line replaces it by its command."""


def family_of(model_type: str) -> Family:
    """Return the facts for a `config.model_type`; defaults if the probe establishes everything.

    Raises:
        ModelError: the family isn't supported.
    """
    base = model_type.removesuffix("_text")
    if base in UNSUPPORTED:
        raise ModelError(
            f"model type {model_type!r} is not supported: {UNSUPPORTED[base]}; see: {TABLE_CALL}"
        )
    return FAMILIES.get(base, Family())


FILE: Final = "families.json"
_GROUPS_FIRST: Final = "best groups first"
_TEMPERATURE_1: Final = "temperature 1 only"


class FamilyRow(TypedDict):
    """Support for one transformers family."""

    family: str
    """Its folder in `transformers.models`."""
    supported: bool
    how: str
    """How its router scores, selects and weights experts; empty if unsupported."""
    limits: list[str]
    """Its limitations, or the reason why it isn't supported."""
    versions: list[str]
    """Versions of transformers in which a tiny model of the family was routed."""


def family_rows() -> list[FamilyRow]:
    """Return all tested families, sorted by name."""
    text = resources.files("bh_routing.models").joinpath(FILE).read_text(encoding="utf-8")
    rows: list[FamilyRow] = json.loads(text)
    return rows


def takes_temperature(row: FamilyRow, *, picks_groups: bool) -> bool:
    """Whether a temperature other than 1 is defined for routers of this family.

    Args:
        row: the family's row.
        picks_groups: whether the checkpoint's router selects groups of experts first; it may
            differ in this from the family's default configuration.
    """
    if _TEMPERATURE_1 not in row["limits"]:
        return True
    return row["how"].startswith(f"softmax; {_GROUPS_FIRST}") and not picks_groups


def describe_facts(facts: RouterFacts) -> str:
    """Describe briefly how a router scores, selects and weights experts.

    Example:
        >>> describe_facts(RouterFacts(num_experts=64, top_k=8, scoring="softmax",
        ...     normalises=False, scale=1.0, ranks_by="logits"))
        'softmax; raw weights'
    """
    parts = [facts.scoring.replace("_", "-")]
    if facts.bias is not None:
        score = "logit" if facts.ranks_by == "logits" else "score"
        parts[0] += f", selects by {score} + bias"
    if facts.groups is not None:
        parts.append(_GROUPS_FIRST)
    parts.append("normalised weights" if facts.normalises else "raw weights")
    if facts.shares_with:
        parts[-1] += ", together with shared experts'"
    if facts.has_gains:
        parts[-1] += ", times a gain of each expert"
    return "; ".join(parts)


def describe_limits(facts: RouterFacts) -> list[str]:
    """List a router's limitations."""
    limits = []
    if facts.top_k == 1:
        limits.append("top-1: no slot can be dropped unless k is widened")
    if facts.skips:
        limits.append("one class of the router is no expert, and is counted as one")
    if facts.why_not_wider:
        limits.append(f"no more experts than its own top-k: {facts.why_not_wider}")
    elif facts.groups is not None:
        limits.append("no more experts than the chosen groups hold")
    if not facts.takes_temperature:
        limits.append(_TEMPERATURE_1)
    if not facts.experts_see_input:
        limits.append("no oracle rule: experts aren't given the router's input")
    return limits


def router_rows(sites: Iterable[RouterSite]) -> list[dict[str, Any]]:
    """Describe each router of a model."""
    return [
        {
            "router": site.name,
            "experts": site.facts.num_experts,
            "top_k": site.facts.top_k,
            "most": site.facts.most_slots,
            "scale": None if site.facts.scale is None else round(site.facts.scale, 3),
            "sorted": site.facts.is_sorted,
            "how": describe_facts(site.facts),
            "limits": describe_limits(site.facts),
        }
        for site in sites
    ]
