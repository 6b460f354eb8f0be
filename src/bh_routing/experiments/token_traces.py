"""What every token of an experiment kept, written small: the file behind the token view.

Axes: T tokens, L layers, K slots.
"""

from __future__ import annotations

import base64
import zlib

import numpy as np
from numpy.typing import NDArray

_UNKNOWN = 65_535


def pack(
    expert_TLK: NDArray[np.integer],
    kept_TLK: NDArray[np.bool_],
    weight_TLK: NDArray[np.floating],
    p_TLK: NDArray[np.floating] | None,
) -> str:
    """Pack slots as `records.TokenTrace.planes` says.

    Args:
        expert_TLK: the expert of each slot, best slot first.
        kept_TLK: whether it was kept.
        weight_TLK: the weight the model gives it, in [0, 1].
        p_TLK: its p-value, in (0, 1], NaN where unknown; None if the rule has none.
    """
    expert = np.where(kept_TLK, expert_TLK, -1 - expert_TLK).astype("<i2")
    weight = np.rint(np.clip(weight_TLK, 0.0, 1.0) * 65_535).astype("<u2")
    p = np.full(expert.shape, _UNKNOWN, dtype="<u2")
    if p_TLK is not None:
        known = np.isfinite(p_TLK) & (p_TLK > 0)
        tenths = np.rint(-1000.0 * np.log10(p_TLK, where=known, out=np.zeros(p_TLK.shape)))
        p[known] = np.clip(tenths[known], 0, _UNKNOWN - 1).astype("<u2")
    raw = expert.tobytes() + weight.tobytes() + p.tobytes()
    return base64.b64encode(zlib.compress(raw)).decode("ascii")
