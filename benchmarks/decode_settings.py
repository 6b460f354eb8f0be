"""Time a decode step at batch size 1 on a GPU, for several block sizes and numbers of warps.

    python benchmarks/decode_settings.py

The shape is OLMoE-1B-7B's with random weights, bfloat16. Each line has a setting, the milliseconds
per step at Top-K 8, Top-K 4 and BH at about 4 experts (medians of 5 rounds of 150 steps after 128
tokens, sessions in random order), and the speed-ups of the latter two over the first.
"""

from __future__ import annotations

import random
import statistics
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch

import bh_routing.kernels.decode_triton as few
import bh_routing.kernels.experts_triton as experts
from bh_routing.engine.decode import bind_routers, decode_greedily, engine_of
from bh_routing.engine.session import Session
from bh_routing.experiments.bench import random_tokens, rule_at_mean
from bh_routing.models.shapes import make_olmoe_shape
from bh_routing.rules import Rule, TopK

PROMPT_TOKENS, NUM_POSITIONS, STEPS, ROUNDS = 128, 512, 150, 5
MODULES: Any = {"few": few, "experts": experts}  # Any: the patched names are Final
SETTINGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "attend by 2 warps": {"few.ATTEND_WARPS": 2},
    "attend by 8 warps": {"few.ATTEND_WARPS": 8},
    "parts of 32": {"few.POSITIONS_IN_A_PART": 32},
    "parts of 32, 2 warps": {"few.POSITIONS_IN_A_PART": 32, "few.ATTEND_WARPS": 2},
    "parts of 128": {"few.POSITIONS_IN_A_PART": 128},
    "attention by 8 rows": {"few.ROWS": few.ROWS | {"attention": 8}},
    "output by 4 rows": {"few.ROWS": few.ROWS | {"output": 4}},
    "gate by 2 rows": {"few.ROWS": few.ROWS | {"gate": 2}},
    "head by 8 rows": {"few.ROWS": few.ROWS | {"head": 8}},
    "up 4 x 2048, 8 warps": {"experts.UP": experts.Block(4, 2048, 1, 8)},
    "up 2 x 2048, 4 warps": {"experts.UP": experts.Block(2, 2048, 1, 4)},
    "down 1 row, 2 warps": {"experts.DOWN": experts.Block(1, 1024, 4, 2)},
    "down 4 rows, 2 slots": {"experts.DOWN": experts.Block(4, 1024, 2, 4)},
}


def make_sessions(engine: Any, model: Any, rules: list[Rule], setting: dict[str, Any]) -> Any:
    """Capture a decode step of each rule."""
    with ExitStack() as stack:
        for key, value in setting.items():
            module, name = key.split(".")
            stack.enter_context(patch.object(MODULES[module], name, value))
        return [
            Session(
                engine.decoder,
                bind_routers(engine.bind(model, rule, None)),
                num_slots=rule.num_candidates(8),
                batch=1,
                num_positions=NUM_POSITIONS,
            )
            for rule in rules
        ]


@torch.inference_mode()
def main() -> None:
    """Print one line per setting."""
    model, _ = make_olmoe_shape(torch.device("cuda"), torch.bfloat16)
    engine = engine_of(model)
    prompt = random_tokens(model, 1, PROMPT_TOKENS, seed=1).tolist()

    def mean_of(rule: Rule) -> float:
        (trace,) = decode_greedily(model, prompt, rule, max_new_tokens=STEPS).traces
        return float(trace.expert_counts[PROMPT_TOKENS:].float().mean())

    bh = rule_at_mean(mean_of, 4.0, 8)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {bh}: {mean_of(bh):.2f}")
    rules: list[Rule] = [TopK(8), TopK(4), bh]
    sessions = {
        (name, number): session
        for name, setting in SETTINGS.items()
        for number, session in enumerate(make_sessions(engine, model, rules, setting))
    }
    times: dict[tuple[str, int], list[float]] = {key: [] for key in sessions}
    for round_ in range(ROUNDS + 1):
        for key in random.Random(round_).sample(list(sessions), len(sessions)):
            session = sessions[key]
            session.start(prompt)
            seconds = session.run(STEPS).seconds / STEPS
            if round_:
                times[key].append(1000 * seconds)
    for name in SETTINGS:
        first, *others = (statistics.median(times[name, number]) for number in range(len(rules)))
        steps = "  ".join(f"{ms:.4f}" for ms in (first, *others))
        print(f"{name:22}  {steps}   {'  '.join(f'{first / ms:.3f}' for ms in others)}")


if __name__ == "__main__":
    main()
