"""Transformers models: loading, finding routers, routing under a rule, and the trace."""

from bh_routing.models.load import LoadedModel, load_model
from bh_routing.models.routers import ModelFacts, describe_model, find_routers, model_fingerprint
from bh_routing.models.routing import route
from bh_routing.models.trace import ExpertTrace

__all__ = [
    "ExpertTrace",
    "LoadedModel",
    "ModelFacts",
    "describe_model",
    "find_routers",
    "load_model",
    "model_fingerprint",
    "route",
]
