"""What can't be read off a family's modules or found by experiment: one row where there is need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from bh_routing.errors import ModelError
from bh_routing.models.sites import Scoring


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Facts about one family's router that no experiment shows."""

    scoring: Scoring | None = None
    """The law of its weights, where it is none that the probe knows."""
    normalises: bool | None = None
    """With `scoring`: whether its weights sum to a constant."""
    top_k: int | None = None
    """Experts per token, where the code fixes them whatever config.json says."""
    skips: bool = False
    """Whether the last class of the logits is no expert: the token goes round all of them."""


FAMILIES: Final[dict[str, Family]] = {
    # Two softmaxes, each over what is close to its own winner; their weights aren't normalised.
    "phimoe": Family(scoring="sparsemixer", normalises=False, top_k=2),
    "zaya": Family(skips=True),
}

REFUSED: Final[dict[str, str]] = {
    "doge": "its experts are rows of an embedding, mixed without a router module",
    "jetmoe": "its router hands tokens over sorted by expert, in place of weights and indices",
    "llama4": "it runs every expert on every token, so leaving one out saves nothing",
    "nllb_moe": "it is no causal language model",
    "switch_transformers": "it is no causal language model",
}
"""Families that are known and not supported, by `model_type`, and why."""


def family_of(model_type: str) -> Family:
    """Return the row of a `config.model_type`; an empty one where experiments show everything.

    Raises:
        ModelError: the family is known not to be supported.
    """
    base = model_type.removesuffix("_text")
    if base in REFUSED:
        raise ModelError(
            f"model type {model_type!r} is not supported: {REFUSED[base]}; see: bh-routing models"
        )
    return FAMILIES.get(base, Family())
