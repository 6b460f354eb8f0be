"""Fit the configurations of a run to the model's own k and its routers' limits."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

from torch import nn

from bh_routing.errors import InputError, unknown_name
from bh_routing.experiments.configurations import make_rules
from bh_routing.experiments.defaults import STANDARD_TOP_K, standard_configs
from bh_routing.experiments.specs import ConfiguredSpec
from bh_routing.models.outlook import Outlook, outlook_from_routers, read_outlook
from bh_routing.models.routers import find_routers, model_type_of
from bh_routing.models.routing import check_rule
from bh_routing.rules.base import Rule
from bh_routing.rules.catalog import make_rule

log = logging.getLogger(__name__)


SpecT = TypeVar("SpecT", bound=ConfiguredSpec)


class Fitted(NamedTuple, Generic[SpecT]):
    """A spec whose configurations the model can run."""

    spec: SpecT
    left_out: dict[str, str]
    """Standard configurations that the model can't run -> reason."""


def fit_to_model(fitted: Fitted[SpecT], outlook: Outlook) -> Fitted[SpecT]:
    """Adapt standard configurations to the model's own k; leave out those that it can't run.

    A configuration is standard until it is changed. One that the user wrote or named is never left
    out. A later call, when more of the model is known, keeps earlier results.

    Args:
        fitted: result of an earlier call, or `Fitted(spec, {})`.
        outlook: known properties of the model; without its k nothing is fitted yet.
    Raises:
        InputError: a name isn't among the configurations, or a configuration of the user can't run
            on this model.
    """
    spec, left_out = fitted
    if outlook.top_k is None:
        return fitted
    configs = select_configs(_follow(spec.configs, outlook.top_k), spec.only)
    standard = standard_configs(outlook.top_k)
    reasons = {}
    for name, _, rule in make_rules(configs, spec.budget):
        if not (reason := _why_not(rule, outlook)):
            continue
        if name in (spec.only or ()) or configs[name] != standard.get(name):
            raise InputError(f"configuration {name!r}: {reason}; use temperature 1.0")
        log.info("configuration %s is left out: %s", name, reason)
        reasons[name] = reason
    kept = {name: config for name, config in configs.items() if name not in reasons}
    return Fitted(spec.model_copy(update={"configs": kept}), left_out | reasons)


def fit_to_config(spec: SpecT) -> Fitted[SpecT]:
    """Fit a spec to the model's config.json, before the model is loaded.

    Raises:
        ModelError: the model can't be found or reached, or its family isn't supported.
        InputError: as in `fit_to_model`, or a configuration is invalid.
    """
    make_rules(spec.configs, spec.budget)
    return fit_to_model(Fitted(spec, {}), read_outlook(spec.model))


def fit_to_loaded(fitted: Fitted[SpecT], model: nn.Module) -> Fitted[SpecT]:
    """Fit a spec to a loaded model's probed routers and check every rule, without a calibration.

    Raises:
        InputError: a configuration can't run on this model.
    """
    routers = find_routers(model)
    fitted = fit_to_model(fitted, outlook_from_routers(model_type_of(model), routers))
    for named in make_rules(fitted.spec.configs, fitted.spec.budget):
        try:
            check_rule(routers, named.rule)
        except InputError as error:
            raise type(error)(f"configuration {named.name!r}: {error}") from error
    return fitted


def select_configs(
    configs: Mapping[str, dict[str, Any]], names: Iterable[str] | None
) -> dict[str, dict[str, Any]]:
    """Select configurations by name, in the order of `configs`; None selects all.

    Raises:
        InputError: a name is unknown; the error suggests the nearest one.
    """
    if names is None:
        return dict(configs)
    wanted = list(names)
    for name in wanted:
        if name not in configs:
            raise unknown_name("configuration", name, configs)
    return {name: config for name, config in configs.items() if name in wanted}


def _follow(configs: Mapping[str, dict[str, Any]], top_k: int) -> dict[str, dict[str, Any]]:
    """Set the model's own k in standard configurations and in the baseline's name."""
    written = standard_configs(STANDARD_TOP_K)
    fitting = dict(zip(written, standard_configs(top_k).items(), strict=True))
    followed: dict[str, dict[str, Any]] = {}
    for name, config in configs.items():
        if config != written.get(name):
            followed[name] = config
            continue
        own_name, own_config = fitting[name]
        if own_name not in configs or own_name == name:
            followed[own_name] = own_config
        elif make_rule(configs[own_name]) != make_rule(own_config):
            raise InputError(
                f"configuration {own_name!r} isn't the model's own top-{top_k}, which is the "
                "baseline and has this name; rename it"
            )
    if followed.keys() != configs.keys():
        log.info(
            "the model uses %d experts per token: the baseline is topk_%d, and the standard BH "
            "configurations keep at most %d",
            *(top_k,) * 3,
        )
    return followed


def _why_not(rule: Rule, outlook: Outlook) -> str:
    """Return why the model can't run this rule; empty if no reason is known."""
    if rule.temperature == 1.0 or outlook.takes_temperature is not False:
        return ""
    return (
        f"temperature {rule.temperature:g} needs a router that weighs and selects by the softmax "
        f"of its logits alone, and {outlook.model_type}'s doesn't"
    )
