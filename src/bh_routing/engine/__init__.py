"""Calibration, generation and scoring."""

from bh_routing.engine.calibrate import calibrate
from bh_routing.engine.generate import Generation, generate_greedy
from bh_routing.engine.proposals import median_ratios
from bh_routing.engine.texts import Document, packaged_documents, read_documents

__all__ = [
    "Document",
    "Generation",
    "calibrate",
    "generate_greedy",
    "median_ratios",
    "packaged_documents",
    "read_documents",
]
