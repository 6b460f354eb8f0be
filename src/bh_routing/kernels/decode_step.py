"""Choose how a step of decoding is computed."""

from __future__ import annotations

from collections.abc import Sequence

from bh_routing.kernels.decode_layout import Decoder
from bh_routing.kernels.decode_torch import DecodeState, Step, bind_torch
from bh_routing.kernels.router_twin import Router


def bind_step(decoder: Decoder, state: DecodeState, routers: Sequence[Router]) -> Step:
    """Return the step that is quickest here: for one text on a GPU kernels, else plain torch."""
    return bind_torch(decoder, state, routers)
