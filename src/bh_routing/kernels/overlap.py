# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Let a kernel start while the one before it ends: programmatic dependent launch, from Hopper on.

Every program of such a row waits before it writes, and before it reads what another kernel wrote;
one without work may end at once. What they wait for has waited in its turn, so that all that came
earlier is done.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def let_next_start(OVERLAPS: tl.constexpr):
    """Allow the next kernel to start as soon as every program of this one has come here."""
    if OVERLAPS:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(OVERLAPS: tl.constexpr):
    """Wait until the kernel before this one has ended and what it wrote can be read."""
    if OVERLAPS:
        gdc_wait()
