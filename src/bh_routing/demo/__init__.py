"""The packaged checkpoint: a small OLMoE that was really trained, with its text and its card."""

from __future__ import annotations

from pathlib import Path

CALIBRATION_TEXT = "calibration.txt.xz"
EVALUATION_TEXT = "evaluation.txt.xz"


def demo_folder() -> Path:
    """Return the folder that holds the checkpoint and its two text files."""
    return Path(__file__).parent
