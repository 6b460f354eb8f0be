"""Time decode steps of batches under rules on steps, on OLMoE-1B-7B's shape with random weights.

    python -m benchmarks.step_rules_speed

Per batch size: top-k 8 and 4, and for some sizes: Fisher mass at a threshold that drops nothing,
whose difference is the rule's own time; Fisher mass at 75 and 65 % of top-k's distinct experts; and
BH over a step's experts. Sensitivities and reference scores are made up, so only time and memory
mean anything. Columns: distinct experts read per step and layer, ms per step, fraction of the roof
(bytes that the step must read over a copy's rate), and times as fast as top-k 8.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from bh_routing.engine.decode import bind_routers, engine_of
from bh_routing.engine.session import Session
from bh_routing.engine.timing import copied_bytes_per_second
from bh_routing.experiments.bench import random_tokens
from bh_routing.experiments.pass_cost import step_cost
from bh_routing.kernels.router import step_plan_of
from bh_routing.kernels.router_step_kernel import bind
from bh_routing.models.shapes import make_olmoe_shape
from bh_routing.rules import BenjaminiHochbergDrop, FisherMass, Rule, TopK
from bh_routing.rules.router import SoftmaxFamily
from tests.rules.proposals import context_for

PROMPT_TOKENS, NUM_POSITIONS, STEPS, ROUNDS, TRIALS = 128, 256, 99, 5, 8
BATCHES, STEP_BATCHES = (1, 2, 4, 8, 16, 32, 64), (4, 16, 64)
FRACTIONS, ALPHAS = (0.75, 0.65), (0.2, 0.4)


class Bench:
    """One batch size."""

    def __init__(self, model: Any, batch: int, copied: float) -> None:
        self.engine, self.batch, self.copied = engine_of(model), batch, copied
        self.prompts = random_tokens(model, batch, PROMPT_TOKENS).tolist()
        self.first_ms = 0.0

    def session(self, routers: list[Any], num_slots: int = 8) -> Session:
        """Capture a step with these routers."""
        return Session(
            self.engine.decoder,
            routers,
            num_slots=num_slots,
            batch=self.batch,
            num_positions=NUM_POSITIONS,
        )

    def run(self, session: Session) -> tuple[float, Any]:
        """Return ms per step, and the steps' cost."""
        session.start(self.prompts)
        steps = session.run(STEPS)
        context = PROMPT_TOKENS + STEPS / 2
        cost = step_cost(self.engine.decoder, steps.kept_SLBK, context)
        return 1000 * steps.seconds / STEPS, cost

    def report(self, name: str, session: Session) -> float:
        """Print a line, and return the distinct experts."""
        self.run(session)
        runs = [self.run(session) for _ in range(ROUNDS)]
        ms, cost = statistics.median(ms for ms, _ in runs), runs[0][1]
        self.first_ms = self.first_ms or ms
        roof = 1000 * cost.bytes / self.copied
        print(
            f"{self.batch:5}  {name:28} {cost.distinct_experts:6.1f} {ms:8.3f} {roof / ms:6.2f}"
            f" {self.first_ms / ms:7.3f}",
            flush=True,
        )
        return float(cost.distinct_experts)


def measure(model: Any, batch: int, copied: float) -> None:
    """Print the lines of one batch size."""
    bench = Bench(model, batch, copied)
    routers = bind_routers(bench.engine.bind(model, TopK(8), None))
    union = bench.report("top-k 8", bench.session(routers))
    routers = bind_routers(bench.engine.bind(model, TopK(4), None))
    bench.report("top-k 4", bench.session(routers, TopK(4).num_candidates(8)))
    if batch not in STEP_BATCHES:
        return
    family = SoftmaxFamily(normalises=False)
    rule: Rule = FisherMass(0.0)
    context = context_for(rule, 64, 8, "cuda")
    plan = step_plan_of(rule, context)
    assert plan is not None and plan.cut_off_B is not None
    session = bench.session([bind(plan, rule, context, family)] * len(routers))
    bench.report("fisher_mass, drops nothing", session)
    for fraction in FRACTIONS:
        low, high = 0.0, 1.0
        for _ in range(TRIALS):
            # The captured step reads the threshold from this tensor.
            plan.cut_off_B.fill_((low + high) / 2)
            is_fewer = bench.run(session)[1].distinct_experts < fraction * union
            low, high = (low, (low + high) / 2) if is_fewer else ((low + high) / 2, high)
        bench.report(f"fisher_mass at {fraction:.0%}", session)
    for alpha in ALPHAS:
        rule = BenjaminiHochbergDrop(alpha, scope="step")
        context = context_for(rule, 64, 8, "cuda")
        step_plan = step_plan_of(rule, context)
        assert step_plan is not None
        session = bench.session([bind(step_plan, rule, context, family)] * len(routers))
        bench.report(f"{rule.method}, step, alpha {alpha}", session)


@torch.inference_mode()
def main() -> None:
    """Print the table."""
    device = torch.device("cuda")
    model, _ = make_olmoe_shape(device, torch.bfloat16)
    copied = copied_bytes_per_second(device)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {copied / 1e12:.2f} TB/s"
    )
    print("batch  rule                         experts  ms/step   roof  faster")
    for batch in BATCHES:
        measure(model, batch, copied)


if __name__ == "__main__":
    main()
