"""Choose how a step of decoding is computed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final

from bh_routing.kernels.decode_layout import Decoder
from bh_routing.kernels.decode_torch import DecodeState, Step, bind_torch
from bh_routing.kernels.router_twin import Router

# Triton is optional, and this module can't be imported without it.
_FEW: Final[Any] = import_module("bh_routing.kernels.decode_few") if find_spec("triton") else None


def bind_step(decoder: Decoder, state: DecodeState, routers: Sequence[Router]) -> Step:
    """Return the step that is quickest here: for one text on a GPU kernels, else plain torch."""
    if (
        _FEW is not None
        and decoder.embedding_VH.is_cuda
        and _FEW.serves(decoder, len(state.token_B))
    ):
        step: Step = _FEW.bind_few(decoder, state, routers)
        return step
    return bind_torch(decoder, state, routers)
