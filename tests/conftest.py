"""What every test may rely on: no network, one thread, and the demo model loaded once."""

from __future__ import annotations

import os

# Before any import of transformers: a test that reaches for the network must fail at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
