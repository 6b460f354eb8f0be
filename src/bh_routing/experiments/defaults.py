"""Defaults that several doors share, as plain data; all others stand in `specs.py`.

Both collections may be changed before a run: add a configuration or append a prompt.
"""

from __future__ import annotations

from typing import Any, Final

SEED: Final = 0
MAX_TOKENS: Final = 50
CALIBRATION_TOKENS: Final = 16_384
LOCAL_TASKS: Final = ("bh_cloze", "bh_choice", "bh_rolling")
"""The tasks of lm-eval that are part of the package."""

STANDARD_TOP_K: Final = 8


def standard_configs(top_k: int) -> dict[str, dict[str, Any]]:
    """Return the five standard configurations for a model that uses `top_k` experts per token.

    Example:
        >>> list(standard_configs(2))
        ['topk_2', 'bh_strict', 'bh_moderate', 'bh_loose', 'bh_adaptive']
    """
    bh = {"method": "bh", "max_k": top_k, "null": "background"}
    return {
        f"topk_{top_k}": {
            "method": "topk",
            "k": top_k,
            "description": f"Baseline: the model's own top-{top_k}",
        },
        "bh_strict": bh | {"alpha": 0.01, "description": "BH at alpha 0.01: few experts"},
        "bh_moderate": bh | {"alpha": 0.05, "description": "BH at alpha 0.05: a balanced choice"},
        "bh_loose": bh | {"alpha": 0.10, "description": "BH at alpha 0.10: more experts"},
        "bh_adaptive": bh
        | {
            "alpha": 0.05,
            "temperature": 2.0,
            "description": "BH at alpha 0.05 with router logits divided by 2",
        },
    }


ROUTING_CONFIGS: dict[str, dict[str, Any]] = standard_configs(STANDARD_TOP_K)
"""The standard configurations for OLMoE's k; on a model with another k they follow it."""

TEST_PROMPTS: list[dict[str, str]] = [
    {
        "text": "The capital of France is",
        "category": "simple",
        "description": "One fact to complete",
    },
    {
        "text": "Once upon a time, in a small house by the sea, there lived",
        "category": "simple",
        "description": "Opening of a tale",
    },
    {
        "text": "The days of the week are Monday, Tuesday,",
        "category": "simple",
        "description": "A list everybody knows",
    },
    {
        "text": "Explain in a few sentences why the sky looks blue by day and red at sunset.",
        "category": "medium",
        "description": "Explanation of an everyday sight",
    },
    {
        "text": "My neighbour grows tomatoes on her balcony, and this summer the leaves turned "
        "yellow. She watered them twice a day. The most likely reason is",
        "category": "medium",
        "description": "A cause to find in a short story",
    },
    {
        "text": "Compare travelling by train with travelling by car: what does each do better?",
        "category": "medium",
        "description": "A comparison of two things",
    },
    {
        "text": "A farmer must bring a wolf, a goat and a cabbage across a river in a boat that "
        "holds only himself and one of them. Alone together, the wolf eats the goat and the goat "
        "eats the cabbage. Step by step, he can do it like this:",
        "category": "complex",
        "description": "A puzzle in several steps",
    },
    {
        "text": "If every librarian reads, and some people who read never travel, does it follow "
        "that some librarians never travel? Give the argument, then the answer.",
        "category": "complex",
        "description": "A syllogism that doesn't hold",
    },
    {
        "text": "A town of 40,000 people wants to halve its car traffic in ten years without "
        "harming its shops. Weigh buses, cycle lanes and parking fees against each other, and "
        "propose a plan with its costs and risks.",
        "category": "complex",
        "description": "A plan with conflicting aims",
    },
    {
        "text": "def binary_search(values, target):\n"
        '    """Return the index of target in the sorted list values, or -1."""\n',
        "category": "domain-specific",
        "description": "Python code to complete",
    },
    {
        "text": "A patient comes with sudden chest pain that spreads to the left arm, sweating and "
        "shortness of breath. The first examinations to order are",
        "category": "domain-specific",
        "description": "Clinical medicine",
    },
    {
        "text": "The tenant shall return the premises in the condition in which they were handed "
        "over, fair wear and tear excepted. Under this clause the landlord may not claim",
        "category": "domain-specific",
        "description": "Contract law",
    },
]
