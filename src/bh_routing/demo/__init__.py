"""The packaged checkpoint: a small trained OLMoE, with its text and model card."""

from __future__ import annotations

from pathlib import Path

CALIBRATION_TEXT = "calibration.txt.xz"
EVALUATION_TEXT = "evaluation.txt.xz"


def demo_folder() -> Path:
    """Return the folder of the checkpoint and its two text files."""
    return Path(__file__).parent
