"""Benjamini-Hochberg expert selection for mixture-of-experts models, compared with Top-K.

    import bh_routing as bhr

    model, tokenizer = bhr.load_model("demo")
    rule = bhr.BenjaminiHochberg(alpha=0.05)
    calibration = bhr.calibrate(model, tokenizer, texts, rules=[rule])
    with bhr.route(model, rule, calibration) as trace:
        output = model.generate(**inputs)
    trace.expert_counts

Every name below loads on first use, so `import bh_routing` doesn't import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bh_routing.analysis.results import Results, load_results
    from bh_routing.api import evaluate, generate, prune, sweep
    from bh_routing.engine import Document, calibrate, median_ratios, packaged_documents
    from bh_routing.errors import (
        BHRoutingError,
        CalibrationError,
        ExperimentError,
        InputError,
        ModelError,
        ResultsError,
    )
    from bh_routing.models import ExpertTrace, load_model, route
    from bh_routing.multitest import benjamini_hochberg, benjamini_yekutieli, storey
    from bh_routing.nulls import Calibration, p_values
    from bh_routing.rules import (
        BenjaminiHochberg,
        BenjaminiHochbergDrop,
        ContributionThreshold,
        Entropy,
        ExpertBudget,
        FisherMass,
        FloorThreshold,
        HigherCriticism,
        MinP,
        OpportunisticActivation,
        OracleContribution,
        PerLayerTopK,
        RandomK,
        Rule,
        Threshold,
        TopK,
        TopP,
        benjamini_hochberg_routing,
    )

__version__ = "0.1.0"

__all__ = [
    "BHRoutingError",
    "BenjaminiHochberg",
    "BenjaminiHochbergDrop",
    "Calibration",
    "CalibrationError",
    "ContributionThreshold",
    "Document",
    "Entropy",
    "ExperimentError",
    "ExpertBudget",
    "ExpertTrace",
    "FisherMass",
    "FloorThreshold",
    "HigherCriticism",
    "InputError",
    "MinP",
    "ModelError",
    "OpportunisticActivation",
    "OracleContribution",
    "PerLayerTopK",
    "RandomK",
    "Results",
    "ResultsError",
    "Rule",
    "Threshold",
    "TopK",
    "TopP",
    "__version__",
    "benjamini_hochberg",
    "benjamini_hochberg_routing",
    "benjamini_yekutieli",
    "calibrate",
    "evaluate",
    "generate",
    "load_model",
    "load_results",
    "median_ratios",
    "p_values",
    "packaged_documents",
    "prune",
    "route",
    "storey",
    "sweep",
]

_HOMES = {
    "analysis.results": ("Results", "load_results"),
    "api": ("evaluate", "generate", "prune", "sweep"),
    "engine": ("Document", "calibrate", "median_ratios", "packaged_documents"),
    "errors": (
        "BHRoutingError",
        "CalibrationError",
        "ExperimentError",
        "InputError",
        "ModelError",
        "ResultsError",
    ),
    "models": ("ExpertTrace", "load_model", "route"),
    "multitest": ("benjamini_hochberg", "benjamini_yekutieli", "storey"),
    "nulls": ("Calibration", "p_values"),
    "rules": (
        "BenjaminiHochberg",
        "BenjaminiHochbergDrop",
        "ContributionThreshold",
        "Entropy",
        "ExpertBudget",
        "FisherMass",
        "FloorThreshold",
        "HigherCriticism",
        "MinP",
        "OpportunisticActivation",
        "OracleContribution",
        "PerLayerTopK",
        "RandomK",
        "Rule",
        "Threshold",
        "TopK",
        "TopP",
        "benjamini_hochberg_routing",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use (PEP 562)."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *__all__})
