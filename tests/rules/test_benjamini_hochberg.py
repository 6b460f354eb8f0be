"""BH-select against the explicit route over p-values, and its limits.

Axes: T tokens, E experts, K slots.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bh_routing.errors import CalibrationError, InputError
from bh_routing.multitest import count_rejected
from bh_routing.multitest.step_up import harmonic_number
from bh_routing.nulls import NULLS, ReferenceTable, get_null, p_values
from bh_routing.rules import BenjaminiHochberg, Candidates, LayerContext
from bh_routing.rules.benjamini_hochberg import OnEmpty
from tests.rules.proposals import (
    MODEL_TOP_K,
    NUM_EXPERTS,
    context_for,
    kept_experts,
    propose,
    random_logits,
)


def by_p_values(rule: BenjaminiHochberg, candidates: Candidates, context: LayerContext) -> Tensor:
    """Reference implementation: p-values, BH's count, limits, the best slots one by one.

    Where experts have tables of their own, the count is that of rejected slots, best by p-value.
    """
    p_TE = p_values(candidates.router_logits_TE, rule.null, context.table, rule.temperature)
    counts = count_rejected(p_TE, rule.alpha, rule.procedure).tolist()
    keep_TK = torch.zeros_like(candidates.top_k_index_TK, dtype=torch.bool)
    for token, count in enumerate(counts):
        p = p_TE[token, candidates.top_k_index_TK[token]].tolist()
        if get_null(rule.null).by_expert:
            rejected = p_TE[token].sort().values[:count].tolist()
            count = sum(value in rejected for value in p)
        else:
            p = [0.0] * len(p)
        if count == 0 and rule.on_empty == "model_k":
            count = context.model_top_k
        count = min(max(count, rule.min_k), rule.max_k or context.model_top_k)
        logits = candidates.router_logits_TE[token, candidates.top_k_index_TK[token]].tolist()
        best_first = sorted(range(len(logits)), key=lambda slot: (p[slot], -logits[slot], slot))
        for slot in best_first[:count]:
            keep_TK[token, slot] = True
    return keep_TK


@pytest.mark.parametrize("null", NULLS)
@pytest.mark.parametrize(
    "rule",
    [
        BenjaminiHochberg(0.05),
        BenjaminiHochberg(0.01, temperature=0.25),
        BenjaminiHochberg(0.10, procedure="by"),
        BenjaminiHochberg(0.30, min_k=3, max_k=12),
        BenjaminiHochberg(0.02, on_empty="model_k", max_k=6),
    ],
    ids=str,
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "rounded"])
def test_the_kept_set_equals_the_route_over_p_values(
    null: str, rule: BenjaminiHochberg, precision: str
) -> None:
    rule = BenjaminiHochberg(**(vars(rule) | {"null": null}))
    logits_TE = random_logits(300, seed=5)
    if precision != "float32":  # ties
        logits_TE = logits_TE.bfloat16().float() if precision == "bfloat16" else logits_TE.round()
    candidates = propose(logits_TE, rule.num_candidates(MODEL_TOP_K), shuffled=True)
    context = context_for(rule)
    assert torch.equal(rule.bind(context)(candidates), by_p_values(rule, candidates, context))


@pytest.mark.parametrize("null", NULLS)
def test_a_larger_alpha_keeps_a_superset(null: str) -> None:
    candidates = propose(random_logits(400), 16, shuffled=True)
    kept = []
    for alpha in (0.001, 0.01, 0.05, 0.1, 0.5, 0.9):
        rule = BenjaminiHochberg(alpha, null=null, max_k=16)
        kept.append(rule.bind(context_for(rule))(candidates))
    assert all(bool((small <= large).all()) for small, large in itertools.pairwise(kept))


def test_by_keeps_a_subset_of_bh() -> None:
    candidates = propose(random_logits(400))
    bh, by = (
        rule.bind(context_for(rule))(candidates)
        for rule in (BenjaminiHochberg(0.1), BenjaminiHochberg(0.1, procedure="by"))
    )
    assert bool((by <= bh).all())
    assert int(by.sum()) < int(bh.sum())


def test_signals_are_kept_and_counts_vary_within_the_limits() -> None:
    logits_TE = random_logits(120)  # token t has t modulo 12 signals
    rule = BenjaminiHochberg(0.05, null="gaussian", min_k=2, max_k=10)
    candidates = propose(logits_TE, rule.num_candidates(MODEL_TOP_K))
    counts_T = rule.bind(context_for(rule))(candidates).sum(dim=-1)
    assert int(counts_T.min()) == 2
    assert int(counts_T.max()) == 10
    assert int((counts_T == 5).sum()) > 0


def test_the_count_is_taken_over_all_ranks_before_it_is_limited() -> None:
    # Ranks 1 to 4 lie above their lines; rank 5 is below and carries them, beyond max_k = 3.
    table = ReferenceTable.from_scores(torch.arange(1.0, 100.0))  # p = (100 - ceil(s) + 1) / 100
    logits = torch.tensor([[91.0, 91.0, 91.0, 91.0, 91.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    context = LayerContext(
        layer=0, num_experts=11, model_top_k=3, device=torch.device("cpu"), table=table
    )
    rule = BenjaminiHochberg(0.25, max_k=3)
    assert p_values(logits, "background", table)[0, 0] == 0.10
    assert int(rule.bind(context)(propose(logits, 3)).sum()) == 3


@pytest.mark.parametrize(
    ("on_empty", "min_k", "max_k", "expected"),
    [("min_k", 1, 8, 1), ("min_k", 3, 8, 3), ("model_k", 1, 10, 8), ("model_k", 1, 5, 5),
     ("model_k", 9, 10, 9)],
)  # fmt: skip
def test_a_token_in_which_nothing_stands_out_keeps_what_on_empty_says(
    on_empty: OnEmpty, min_k: int, max_k: int, expected: int
) -> None:
    logits = torch.linspace(-1, 1, NUM_EXPERTS).unsqueeze(0)
    rule = BenjaminiHochberg(0.05, null="gaussian", on_empty=on_empty, min_k=min_k, max_k=max_k)
    candidates = propose(logits, rule.num_candidates(MODEL_TOP_K))
    assert int(rule.bind(context_for(rule))(candidates).sum()) == expected


def test_on_empty_leaves_tokens_with_a_rejection_alone() -> None:
    candidates = propose(random_logits(200))
    rules = [BenjaminiHochberg(0.05, null="gaussian", on_empty=way) for way in ("min_k", "model_k")]
    low, high = (rule.bind(context_for(rule))(candidates).sum(dim=-1) for rule in rules)
    changed = low != high
    assert bool((low[changed] == 1).all())
    assert bool((high[changed] == 8).all())
    assert 0 < int(changed.sum()) < 200


@pytest.mark.parametrize("null", ["gaussian", "background", "pooled"])
def test_the_temperature_changes_the_mixture_and_not_the_selection(null: str) -> None:
    candidates = propose(random_logits(100))
    kept = [
        rule.bind(context_for(rule))(candidates)
        for rule in (BenjaminiHochberg(0.05, null=null, temperature=t) for t in (0.5, 1.0, 2.0))
    ]
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[1], kept[2])


def test_widening_keeps_a_prefix_of_the_familys_own_top_10() -> None:
    rule = BenjaminiHochberg(0.03, temperature=1.5, min_k=2, max_k=10)
    candidates = propose(random_logits(300), rule.num_candidates(MODEL_TOP_K))
    keep_TK = rule.bind(context_for(rule))(candidates)
    assert keep_TK.shape[-1] == 10
    assert bool((keep_TK.int().diff(dim=-1) <= 0).all())
    assert int(keep_TK.sum(dim=-1).max()) == 10


def test_tokens_keep_experts_of_their_own_row() -> None:
    logits_TE = torch.zeros(4, 16)
    logits_TE[torch.arange(4), torch.tensor([3, 9, 0, 15])] = 50.0
    logits_TE += torch.linspace(-1, 1, 16)
    rule = BenjaminiHochberg(0.05, null="gaussian")
    candidates = propose(logits_TE)
    kept_TE = kept_experts(candidates, rule.bind(context_for(rule, 16))(candidates))
    assert kept_TE.nonzero().tolist() == [[0, 3], [1, 9], [2, 0], [3, 15]]


def test_a_null_that_needs_a_table_is_refused_without_one() -> None:
    context = LayerContext(layer=0, num_experts=64, model_top_k=8, device=torch.device("cpu"))
    with pytest.raises(CalibrationError, match="null 'background' needs a calibration"):
        BenjaminiHochberg(0.05).bind(context)


def test_the_level_a_table_must_decide_is_the_procedures_own() -> None:
    assert BenjaminiHochberg(0.05).smallest_alpha(64) == 0.05
    by = BenjaminiHochberg(0.05, procedure="by").smallest_alpha(64)
    assert by == 0.05 / harmonic_number(64)


def test_only_tabled_nulls_require_a_calibration() -> None:
    required = {null: BenjaminiHochberg(0.05, null=null).required_null for null in NULLS}
    assert required == {
        "background": "background",
        "background_studentized": "background_studentized",
        "gaussian": None,
        "per_expert": "per_expert",
        "permutation": "permutation",
        "pooled": "pooled",
        "softmax": None,
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": 1.5}, r"alpha must be in \(0, 1\), got 1.5"),
        ({"alpha": "0.05"}, r"alpha must be a number in \(0, 1\), got '0.05'"),
        ({"min_k": 9, "max_k": 8}, "min_k must be at most max_k, got min_k=9 and max_k=8"),
        ({"min_k": 0}, "min_k must be a whole number of at least 1, got 0"),
        ({"max_k": 2.5}, "max_k must be a whole number of at least 1, got 2.5"),
        ({"null": "gausian"}, "unknown null 'gausian'; .* did you mean 'gaussian'"),
        ({"procedure": "holm"}, "unknown procedure 'holm'; known: bh, by"),
        ({"on_empty": "modelk"}, "did you mean 'model_k'"),
    ],
)
def test_a_field_out_of_range_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BenjaminiHochberg(**({"alpha": 0.05} | fields))  # type: ignore[arg-type]
