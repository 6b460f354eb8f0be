"""Measure the routers' fraction of a CPU decode step, for Top-K and BH on the demo model.

python benchmarks/router_share.py
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import transformers

from bh_routing.engine.calibrate import calibrate
from bh_routing.engine.decode import bind_routers, engine_of
from bh_routing.engine.session import Session
from bh_routing.engine.texts import packaged_documents
from bh_routing.experiments.bench import PROMPT_TOKENS, random_tokens
from bh_routing.models.load import load_model
from bh_routing.rules import BenjaminiHochberg, Rule, TopK
from bh_routing.rules.router import RoutedSlots, Router

STEPS, ROUNDS = 200, 11
RULES = (
    TopK(8),
    BenjaminiHochberg(alpha=0.05, max_k=8),
    BenjaminiHochberg(alpha=0.5, max_k=8, null="gaussian"),
)


class Timed:
    """A router that accumulates its time."""

    def __init__(self, router: Router) -> None:
        self.router, self.seconds = router, 0.0

    def __call__(
        self, router_logits_TE: torch.Tensor, is_real_BS: torch.Tensor | None = None, /
    ) -> RoutedSlots:
        start = time.perf_counter()
        slots = self.router(router_logits_TE, is_real_BS)
        self.seconds += time.perf_counter() - start
        return slots


@torch.inference_mode()
def measure(model: Any, rule: Rule, calibration: Any) -> tuple[float, float, float]:
    """Return milliseconds per step, the routers' fraction (medians) and the mean experts kept."""
    engine = engine_of(model)
    bound = engine.bind(model, rule, calibration)
    prompt = random_tokens(model, 1, PROMPT_TOKENS).tolist()
    routers = [Timed(router) for router in bind_routers(bound)]
    session = Session(
        engine.decoder, routers, num_slots=8, batch=1, num_positions=PROMPT_TOKENS + STEPS
    )
    milliseconds, shares = [], []
    for round_ in range(ROUNDS + 1):
        session.start(prompt)
        before = sum(router.seconds for router in routers)
        steps = session.run(STEPS - 1)
        if round_:
            milliseconds.append(1000 * steps.seconds / (STEPS - 1))
            shares.append((sum(router.seconds for router in routers) - before) / steps.seconds)
    mean = float((steps.kept_SLBK >= 0).sum(-1).float().mean())
    return statistics.median(milliseconds), statistics.median(shares), mean


def main() -> None:
    """Print one line per rule."""
    torch.set_num_threads(1)
    model, tokenizer = load_model("demo", device="cpu")
    texts = [document.text for document in packaged_documents("calibration")]
    calibration = calibrate(model, tokenizer, texts, nulls=("background",))
    print(
        f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    for rule in RULES:
        step, share, mean = measure(model, rule, calibration)
        print(f"{step:6.2f} ms a step, routers {share:6.1%}, {mean:5.2f} experts  {rule}")


if __name__ == "__main__":
    main()
