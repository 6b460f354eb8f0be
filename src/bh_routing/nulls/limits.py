"""How much calibration data is enough to decide at a given alpha, and why."""

from __future__ import annotations

from typing import Final

DRAWS_ON_FIRST_LINE: Final = 20
"""Reference scores that should lie beyond the first cut-off, whose p-value is alpha / E.

One expert can be selected only if 1 / (n + 1) <= alpha / E; at that size a single score decides.
With 20 the cut-off's tail probability has a relative sampling error of 1 / sqrt(20), about 22 %.
So a table needs n >= 20 * E / alpha.
"""

BY_EXPERT_ALPHA: Final = 0.05
"""The level that tables by expert are made for. Each expert needs 20 * E / alpha tokens outside the
top-k, so memory grows with the square of E: 13 MB a layer of 64 experts, 52 MB of 128."""

OBSERVED_TOKENS: Final = 256
"""Tokens whose scores a calibration keeps for pictures."""

MIN_TOKENS: Final = 5_000
"""Distinct tokens. The slots of one token share a hidden state: they aren't independent draws, so
the number of scores overstates how much was seen."""

MIN_DOCUMENTS: Final = 20
"""Documents. Tokens of one document share a topic: fewer documents fit a table to a few topics."""
