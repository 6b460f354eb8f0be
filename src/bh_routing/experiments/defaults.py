"""What `run` does when nothing else is asked for: every default, written once, as plain data.

Both collections may be changed before a run: add a configuration or append a prompt.
"""

from __future__ import annotations

from typing import Any, Final

MODEL: Final = "allenai/OLMoE-1B-7B-0924"
OUTPUT: Final = "results"
MAX_TOKENS: Final = 50
CHECKPOINT_INTERVAL: Final = 5
DEVICE: Final = "auto"
DTYPE: Final = "auto"
SEED: Final = 0
EXECUTOR: Final = "local"
CHAT_TEMPLATE: Final = "auto"
CALIBRATION_TOKENS: Final = 16_384
EVAL_TOKENS: Final = 3_000
TOKEN_TRACES: Final = 12
TIMING_ROUNDS: Final = 8

ROUTING_CONFIGS: dict[str, dict[str, Any]] = {
    "topk_8": {
        "method": "topk",
        "k": 8,
        "description": "Baseline: eight experts for every token",
    },
    "bh_strict": {
        "method": "bh",
        "alpha": 0.01,
        "max_k": 8,
        "null": "background",
        "description": "BH at alpha 0.01: few experts",
    },
    "bh_moderate": {
        "method": "bh",
        "alpha": 0.05,
        "max_k": 8,
        "null": "background",
        "description": "BH at alpha 0.05: a balanced choice",
    },
    "bh_loose": {
        "method": "bh",
        "alpha": 0.10,
        "max_k": 8,
        "null": "background",
        "description": "BH at alpha 0.10: more experts",
    },
    "bh_adaptive": {
        "method": "bh",
        "alpha": 0.05,
        "temperature": 2.0,
        "max_k": 8,
        "null": "background",
        "description": "BH at alpha 0.05 with router logits divided by 2",
    },
}

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
