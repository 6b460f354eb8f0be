"""The configuration of a server: a YAML file with a rule and its calibration.

rule: {method: bh_drop, alpha: 0.3, scope: step_population}
calibration: model.safetensors
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

from packaging.specifiers import SpecifierSet
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from bh_routing.errors import CalibrationError, InputError
from bh_routing.experiments.configurations import YAML_ERRORS, RejectedYaml, load_yaml
from bh_routing.experiments.spec_errors import describe_error
from bh_routing.models.sites import fingerprint_routers
from bh_routing.nulls.calibration import Calibration
from bh_routing.results.records import json_digest
from bh_routing.rules.base import Rule
from bh_routing.rules.catalog import make_rule, rule_to_config

TESTED: Final = SpecifierSet(">=0.26,<0.33")
"""Versions of vLLM whose router interface the plugin was written for."""
VARIABLE: Final = "BH_ROUTING_CONFIG"
"""Environment variable with the path of the configuration; unset: the plugin does nothing."""
OWN_KEY: Final = "bh_routing"
"""Key of vLLM's `additional_config` with the path, or the configuration itself."""


class ServingConfig(BaseModel):
    """The content of a configuration file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rule: dict[str, Any]
    """A method and its fields."""
    calibration: Path | None = None
    """File made by `bh-routing calibrate`; relative to the folder of the configuration file."""
    prefill_rule: dict[str, Any] | None = None
    """Rule of prefill tokens, for a rule that decides by decode step; None: the model's own top-k.
    """


class ServedRule(NamedTuple):
    """A configuration with its rules made and its calibration read."""

    rule: Rule
    prefill_rule: Rule | None
    calibration: Calibration | None
    digest: str
    """Identifies rules and calibration, for vLLM's compile cache."""


def read_config(source: Path | Mapping[str, Any]) -> ServedRule:
    """Read and check a configuration.

    Args:
        source: a YAML file, or its content.
    Raises:
        InputError: it can't be read, has an unknown key, or a rule that can't be served.
        CalibrationError: the calibration is missing, can't be read, or lacks what a rule needs.
    """
    where, folder, values = OWN_KEY, Path(), source
    if isinstance(source, Path):
        where, folder, values = f"configuration {source}", source.parent, _read_yaml(source)
    if not isinstance(values, Mapping):
        raise InputError(
            f"{where} must be a mapping with rule: and calibration:, got "
            f"{'nothing' if values is None else type(values).__name__}; for example "
            "rule: {method: top_k, k: 4}"
        )
    try:
        config = ServingConfig(**{str(key): value for key, value in values.items()})
    except ValidationError as error:
        text = describe_error(error, ServingConfig).replace("the run has", "it has", 1)
        raise InputError(f"{where}: {text}") from None
    try:
        return _served(config, folder)
    except InputError as error:
        raise type(error)(f"{where}: {error}" if isinstance(source, Path) else str(error)) from None


@cache
def read_config_file(path: Path) -> ServedRule:
    """Read a configuration once per process."""
    return read_config(path)


def config_of(additional: Any) -> ServedRule | None:
    """Return the configuration of this process, None if there is none.

    Args:
        additional: vLLM's `additional_config`.
    Raises:
        InputError, CalibrationError: as in `read_config`, or two configurations are given.
    """
    own = additional.get(OWN_KEY) if isinstance(additional, Mapping) else None
    path = os.environ.get(VARIABLE)
    if own is not None and path:
        raise InputError(
            f"{VARIABLE}={path} and {OWN_KEY!r} of --additional-config both name a configuration; "
            "give one"
        )
    if own is None:
        return read_config_file(Path(path).absolute()) if path else None
    return read_config_file(Path(own).absolute()) if isinstance(own, str) else read_config(own)


def _read_yaml(path: Path) -> Any:
    try:
        return load_yaml(path.read_bytes())
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"configuration {path} can't be read ({reason}); set {VARIABLE} to a YAML file, or "
            "unset it to serve without a rule"
        ) from error
    except (RejectedYaml, *YAML_ERRORS) as error:
        problem = " ".join(str(error).split())[:200]
        raise InputError(
            f"configuration {path} isn't valid YAML ({problem}); correct it"
        ) from error


def _served(config: ServingConfig, folder: Path) -> ServedRule:
    rule = make_rule(config.rule)
    prefill_rule = None if config.prefill_rule is None else make_rule(config.prefill_rule)
    for each in (rule, prefill_rule):
        if each is not None:
            _check_servable(each)
    if prefill_rule is not None and (rule.unit != "step" or prefill_rule.unit != "token"):
        raise InputError(
            "prefill_rule must decide per token, and the rule per decode step, got "
            f"{prefill_rule.method!r} per {prefill_rule.unit} and {rule.method!r} per "
            f"{rule.unit}; leave out prefill_rule"
        )
    calibration = None
    nulls = [null for each in (rule, prefill_rule) if each and (null := each.required_null)]
    if nulls:
        if config.calibration is None:
            raise CalibrationError(
                f"rule {rule.method!r} needs a calibration with {', '.join(nulls)}; run: "
                f"bh-routing calibrate --nulls {','.join(nulls)} --model NAME --output FILE, and "
                "give that FILE as calibration"
            )
        calibration = Calibration.load(folder / config.calibration)
        for null in nulls:
            calibration.table_size(null)
    parts = [
        rule_to_config(rule),
        prefill_rule and rule_to_config(prefill_rule),
        calibration and calibration.fingerprint,
    ]
    return ServedRule(rule, prefill_rule, calibration, json_digest(parts)[:16])


def _check_servable(rule: Rule) -> None:
    """Raise InputError if no server can run the rule."""
    if rule.needs_output_norms:
        raise InputError(
            f"rule {rule.method!r} needs the output of every candidate expert, which a server "
            "doesn't compute; choose another rule"
        )
    if rule.unit == "block":
        raise InputError(
            f"rule {rule.method!r} with scope 'block' decides over a sequence's tokens in one "
            "forward pass, and a server cuts prompts into chunks; choose scope token, population "
            "or a scope of steps"
        )


def check_version(version: str) -> None:
    """Raise InputError if a version of vLLM is outside the tested range."""
    if version not in TESTED:
        raise InputError(
            f"vLLM {version} is outside the tested range {TESTED}; run: pip install 'vllm{TESTED}'"
        )


def check_fit(
    served: ServedRule,
    gates: Sequence[tuple[Tensor, Tensor | None]],
    *,
    num_experts: int,
    model_top_k: int,
) -> None:
    """Raise InputError or CalibrationError if a rule or the calibration doesn't fit a model.

    Without gates, a router's weight and bias per layer, the calibration isn't compared.
    """
    for rule in (served.rule, served.prefill_rule):
        if rule is None:
            continue
        rule.check(num_experts=num_experts, model_top_k=model_top_k)
        if (most := rule.most_kept(model_top_k)) > model_top_k:
            raise InputError(
                f"rule {rule.method!r} keeps up to {most} experts per token, a served layer has "
                f"places for {model_top_k}; ask for no more than that"
            )
        if gates and served.calibration is not None and rule.required_null is not None:
            served.calibration.check(
                null=rule.required_null,
                alpha=rule.smallest_alpha(num_experts),
                num_layers=len(gates),
                num_experts=num_experts,
                model_top_k=model_top_k,
                router_fingerprint=fingerprint_routers(gates),
            )
