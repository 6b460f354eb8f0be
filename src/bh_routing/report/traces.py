"""Token traces, unpacked into arrays or packed for the HTML report."""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from bh_routing.results.journal import Journal
from bh_routing.results.records import TOKEN_TRACES, TokenTrace

PAGE_BYTES: Final = 3_000_000
"""Limit on the embedded traces, in bytes of text; prompts beyond it are left out."""

_TRACE: Final = TypeAdapter(TokenTrace)


class Slots(NamedTuple):
    """Slots of one experiment, best first: arrays of shape (tokens, layers, slots)."""

    expert: NDArray[np.int64]
    kept: NDArray[np.bool_]
    weight: NDArray[np.float64]
    p: NDArray[np.float64]
    """p-values; NaN if the rule has none."""


def read_traces(folder: Path, planned: Container[str] | None = None) -> list[TokenTrace]:
    """Read the traces of a folder; empty if it has none.

    Args:
        folder: folder of the run.
        planned: keys of the experiments whose traces are kept; None: all.
    Raises:
        ResultsError: a line isn't a trace, or its numbers don't match its declared shape.
    """
    found: dict[tuple[str, str], TokenTrace] = {}
    for trace in Journal.read(folder / TOKEN_TRACES, _parse).items:
        if planned is None or trace.key in planned:
            found[trace.config_name, trace.prompt_text] = trace
    return list(found.values())


def _parse(entry: dict[str, Any]) -> TokenTrace:
    trace = _TRACE.validate_python(entry)
    unpack(trace)
    return trace


def unpack(trace: TokenTrace) -> Slots:
    """Return a trace's slots as arrays.

    Raises:
        ValueError, TypeError, OverflowError, zlib.error: its numbers don't match its shape.
    """
    shape = (3, len(trace.tokens), trace.layers, trace.slots)
    # Bounded: a few bytes of zlib can expand to gigabytes.
    raw = zlib.decompressobj().decompress(base64.b64decode(trace.planes), 2 * math.prod(shape) + 1)
    planes = np.frombuffer(raw, dtype="<i2").reshape(shape)
    expert, (weight, p) = planes[0].astype(np.int64), planes[1:].view("<u2").astype(np.float64)
    return Slots(
        expert=np.where(expert < 0, -1 - expert, expert),
        kept=expert >= 0,
        weight=weight / 65535.0,
        p=np.where(p == 65535, np.nan, 10.0 ** (-p / 1000.0)),
    )


def for_page(traces: Iterable[TokenTrace], configs: list[str], prompts: list[str]) -> list[Any]:
    """Return the traces within the limit, prompt by prompt, in the format of tokens.js."""
    ordered = sorted(
        (t for t in traces if t.config_name in configs and t.prompt_text in prompts),
        key=lambda t: (prompts.index(t.prompt_text), configs.index(t.config_name)),
    )
    chosen, used = [], 0
    for trace in ordered:
        used += len(trace.planes) + sum(map(len, trace.tokens))
        if used > PAGE_BYTES:
            break
        chosen.append(
            {
                "config": configs.index(trace.config_name),
                "prompt": prompts.index(trace.prompt_text),
                "tokens": trace.tokens,
                "promptTokens": trace.num_prompt_tokens,
                "layers": trace.layers,
                "slots": trace.slots,
                "topK": trace.model_top_k,
                "planes": trace.planes,
            }
        )
    return chosen
