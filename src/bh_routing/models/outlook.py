"""Facts about a model's routers that determine which default configurations it can run."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from transformers import PretrainedConfig

from bh_routing.models.families import family_of, family_rows, takes_temperature
from bh_routing.models.load import read_config
from bh_routing.models.routers import Routers

TOP_K_FIELDS: Final = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_k",
    "moe_topk",
    "moe_top_k",
)


class Outlook(NamedTuple):
    """Facts about a model's routers; None if unknown."""

    model_type: str
    top_k: int | None
    """Experts per token in the model's own routing."""
    takes_temperature: bool | None
    """Whether a temperature other than 1 is defined for its routers."""


def read_outlook(name: str) -> Outlook:
    """Read the outlook from config.json and the table of families, without reading weights.

    Raises:
        ModelError: the model can't be found or reached, or its family isn't supported.
    """
    return outlook_from_config(read_config(name))


def outlook_from_config(config: PretrainedConfig) -> Outlook:
    """Return the outlook for a configuration; None for facts that depend on the weights.

    Example:
        >>> from transformers import MixtralConfig
        >>> outlook_from_config(MixtralConfig())
        Outlook(model_type='mixtral', top_k=2, takes_temperature=True)
    """
    text: Any = config.get_text_config()
    # The transformers folder of the class: a model type may have a suffix.
    family = type(text).__module__.split(".")[-2]
    row = next((row for row in family_rows() if row["family"] == family), None)
    picks_groups = (getattr(text, "n_group", None) or 1) > 1
    picks_groups &= getattr(text, "topk_method", None) != "greedy"
    return Outlook(
        model_type=config.model_type,
        top_k=family_of(family).top_k or _top_k(text),
        takes_temperature=row and takes_temperature(row, picks_groups=picks_groups),
    )


def outlook_from_routers(model_type: str, routers: Routers) -> Outlook:
    """Return the outlook from the probed routers of a loaded model."""
    return Outlook(
        model_type=model_type,
        top_k=routers.model_top_k,
        takes_temperature=all(site.facts.takes_temperature for site in routers.sites),
    )


def _top_k(text: Any) -> int | None:
    """Return the experts per token; None if not given or if layers differ."""
    for holder in (text, getattr(text, "ffn_config", None)):
        for field in TOP_K_FIELDS:
            value = getattr(holder, field, None)
            values = set(value) if isinstance(value, list | tuple) else {value}
            if len(values) == 1 and isinstance(k := values.pop(), int) and k > 0:
                return k
    return None
