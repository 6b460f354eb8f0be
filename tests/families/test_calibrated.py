"""Calibration, BH-select and BH-drop, end to end on families that score in different ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import pytest
import torch
from torch import Tensor, nn

from bh_routing.engine.calibrate import calibrate
from bh_routing.engine.texts import packaged_documents
from bh_routing.models import find_routers, route
from bh_routing.nulls.calibration import Calibration
from bh_routing.rules import BenjaminiHochberg, BenjaminiHochbergDrop, FisherMass
from bh_routing.rules.base import LayerContext, Rule
from bh_routing.rules.plan import Candidates, Selector
from tests.families.checks import family_subject, prefill
from tests.families.zoo import VOCABULARY

Passes = dict[nn.Module, list[tuple[Tensor, Tensor]]]

RANKS_BY: Final[dict[str, Callable[[Any, Tensor], Tensor]]] = {
    "deepseek_v3": lambda router, logits: logits.sigmoid() + router.e_score_correction_bias,
    "deepseek_v4": lambda router, logits: (
        nn.functional.softplus(logits).sqrt() + router.e_score_correction_bias
    ),
    "gemma4": lambda _, probabilities: probabilities.log(),
    "gpt_oss": lambda _, logits: logits,
    "mixtral": lambda _, logits: logits,
    "olmoe": lambda _, logits: logits,
}
"""Family -> (its router, what that returns first) -> what its top-k compares, as its code says."""

every_kind = pytest.mark.parametrize("family", RANKS_BY)


class Letters:
    """A tokenizer: every letter is a token of the tiny models' vocabulary."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(letter) % (VOCABULARY - 3) for letter in text]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


@cache
def calibrated(family: str) -> tuple[Calibration, Passes]:
    """Calibrate the tiny model of a family, and listen to what its routers return meanwhile."""
    model = family_subject(family).model
    passes: Passes = {}

    def listen(router: nn.Module, _: Any, output: tuple[Tensor, ...]) -> None:
        passes.setdefault(router, []).append((output[0], output[2]))

    hooks = [site.module.register_forward_hook(listen) for site in find_routers(model).sites]
    try:
        calibration = calibrate(
            model,
            Letters(),
            [document.text for document in packaged_documents("calibration")],
            nulls=("background", "needed"),
            max_tokens=5_120,
        )
    finally:
        for hook in hooks:
            hook.remove()
    return calibration, passes


@every_kind
@pytest.mark.parametrize(
    "rule",
    [
        BenjaminiHochberg(alpha=0.1, max_k=4),
        BenjaminiHochbergDrop(alpha=0.3, statistic="contribution"),
    ],
    ids=["bh", "bh_drop"],
)
def test_counts_vary_under_a_calibrated_rule(family: str, rule: Rule) -> None:
    calibration, _ = calibrated(family)
    model = family_subject(family).model
    with route(model, rule, calibration) as trace:
        assert prefill(model).isfinite().all()
    assert 1 <= trace.expert_counts.min() < trace.expert_counts.max() <= 4


@every_kind
def test_the_background_is_of_the_score_that_the_family_ranks_by(family: str) -> None:
    calibration, passes = calibrated(family)
    for site in find_routers(family_subject(family).model).sites:
        if hasattr(site.module, "tid2eid"):
            continue  # looks experts up, ranks none
        scores_TE, own_TK = (torch.cat(parts) for parts in zip(*passes[site.module], strict=True))
        ranked_TE = RANKS_BY[family](site.module, scores_TE.float())
        is_outside_TE = torch.ones_like(ranked_TE, dtype=torch.bool).scatter(1, own_TK, False)
        middle_T1 = ranked_TE.quantile(0.5, dim=-1, keepdim=True)
        expected_N = (ranked_TE - middle_T1)[is_outside_TE].sort().values
        table_N = calibration.table("background", site.layer).sorted_scores_N
        torch.testing.assert_close(table_N, expected_N, rtol=1e-4, atol=1e-5)


@every_kind
@pytest.mark.parametrize("refill", [5, 8])
def test_a_refilled_rule_weighs_experts_like_the_models_own_top_k(family: str, refill: int) -> None:
    if family == "deepseek_v4":
        pytest.skip("it can't propose more than its own top-k")
    calibration, _ = calibrated(family)
    model, routers = family_subject(family).model, find_routers(family_subject(family).model)
    own_k = routers.model_top_k
    seen: list[Tensor] = []

    @dataclass(frozen=True)
    class Listener(FisherMass):
        """Records the weights that a rule is given for the model's own top-k."""

        def bind(self, context: LayerContext) -> Selector:
            select = super().bind(context)

            def listen(candidates: Candidates) -> Tensor:
                order_TK = candidates.router_logits_TE.gather(1, candidates.top_k_index_TK)
                own_TK = order_TK.argsort(dim=1, descending=True, stable=True)[:, :own_k]
                seen.append(candidates.top_k_weights_TK.gather(1, own_TK))
                return select(candidates)

            return listen

    own: list[Tensor] = []
    wide: list[Tensor] = []
    for found, number in ((own, None), (wide, refill)):
        rule = Listener(0.0, statistic="contribution", refill=number)
        with route(model, rule, calibration) as trace:
            values = prefill(model)
        found += [values, trace.expert_counts, *seen]
        seen.clear()
    for narrow_values, wide_values in zip(own, wide, strict=True):
        torch.testing.assert_close(wide_values, narrow_values, rtol=1e-4, atol=1e-5)
