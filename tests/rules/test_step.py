"""Rules on decode steps. Axes: B tokens of a step, T tokens, E experts, K slots."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from bh_routing.errors import CalibrationError, InputError
from bh_routing.nulls.contributions import NEEDED_STEPS
from bh_routing.rules import (
    BenjaminiHochbergDrop,
    Candidates,
    ContributionThreshold,
    ExpertBudget,
    FisherMass,
    FloorThreshold,
    OpportunisticActivation,
    Rows,
    Rule,
    TopK,
)
from bh_routing.rules.step import Between, reject_in_steps, step_experts
from tests.rules.proposals import (
    MODEL_TOP_K,
    NUM_EXPERTS,
    changed,
    context_for,
    kept_experts,
    propose,
    random_logits,
)

STEP_RULES: list[Rule] = [
    BenjaminiHochbergDrop(0.3, scope="step"),
    BenjaminiHochbergDrop(0.3, scope="step_population"),
    FisherMass(0.4),
    FisherMass(0.4, exponent=1.3),
    OpportunisticActivation(2),
    ExpertBudget(20),
    ExpertBudget(20, by="fisher_mass"),
]
STEP_RULES += [dataclasses.replace(rule, refill=12) for rule in STEP_RULES]  # type: ignore[type-var]
EVERY_STEP_RULE = pytest.mark.parametrize("rule", STEP_RULES, ids=str)


def in_step(num_tokens: int, seed: int = 3, num_slots: int = MODEL_TOP_K) -> Candidates:
    """One decode step of that many sequences."""
    rows = Rows.of_step(num_tokens, torch.device("cpu"))
    return propose(random_logits(num_tokens, seed=seed), num_slots)._replace(rows=rows)


def read_experts(candidates: Candidates, keep_TK: torch.Tensor) -> set[int]:
    return set(candidates.top_k_index_TK[keep_TK].tolist())


@EVERY_STEP_RULE
@pytest.mark.parametrize("num_tokens", [2, 5, 16, 100])
def test_the_order_of_the_sequences_changes_no_sequence(rule: Rule, num_tokens: int) -> None:
    candidates = in_step(num_tokens, num_slots=rule.num_candidates(MODEL_TOP_K))
    select = rule.bind(context_for(rule))
    keep_TK = select(candidates)
    order_T = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(5))
    shuffled = changed(candidates, lambda tensor: tensor[order_T])
    assert torch.equal(select(shuffled), keep_TK[order_T])


@EVERY_STEP_RULE
def test_steps_of_one_call_do_not_touch_each_other_and_padding_never_votes(rule: Rule) -> None:
    candidates = propose(random_logits(30, seed=4), rule.num_candidates(MODEL_TOP_K))
    step_T = torch.tensor([0, 1, -1, 2, 1] * 6)
    rows = Rows(torch.where(step_T < 0, -1, 0), torch.zeros_like(step_T), step_T)
    select = rule.bind(context_for(rule))
    keep_TK = select(candidates._replace(rows=rows))
    for step in range(3):
        at_T = step_T == step
        alone = changed(candidates, lambda tensor, at=at_T: tensor[at])  # type: ignore[misc]
        alone = alone._replace(rows=Rows.of_step(int(at_T.sum()), torch.device("cpu")))
        assert torch.equal(select(alone), keep_TK[at_T])
    assert bool((keep_TK[step_T < 0].sum(-1) < 8).all())


@EVERY_STEP_RULE
def test_a_step_reads_fewer_experts_and_prefill_keeps_the_models_own(rule: Rule) -> None:
    num_slots = rule.num_candidates(MODEL_TOP_K)
    candidates = in_step(16, num_slots=num_slots)
    select = rule.bind(context_for(rule))
    keep_TK = select(candidates)
    assert bool(keep_TK.any(-1).all())
    read = read_experts(candidates, keep_TK)
    assert read < set(candidates.top_k_index_TK[:, :MODEL_TOP_K].flatten().tolist())
    # A token keeps every slot of its own whose expert is read, by whichever token.
    own_TK = candidates.top_k_index_TK[:, :MODEL_TOP_K]
    assert torch.equal(keep_TK[:, :MODEL_TOP_K], torch.isin(own_TK, torch.tensor(sorted(read))))
    is_own_TK = (torch.arange(num_slots) < MODEL_TOP_K).expand(16, -1)
    assert torch.equal(select(propose(random_logits(16, seed=3), num_slots)), is_own_TK)


@EVERY_STEP_RULE
@pytest.mark.parametrize("refill", [9, 12, 64])
@pytest.mark.parametrize("num_tokens", [2, 16, 64])
def test_refilling_takes_the_next_best_experts_that_are_read_and_reads_no_other(
    rule: Rule, refill: int, num_tokens: int
) -> None:
    narrow, wide = (dataclasses.replace(rule, refill=number) for number in (None, refill))  # type: ignore[type-var]
    read = read_experts(step := in_step(num_tokens), narrow.bind(context_for(rule))(step))
    candidates = in_step(num_tokens, num_slots=refill)
    shuffled, back_TK = _shuffle_slots(candidates, seed=6)
    keep_TK = wide.bind(context_for(rule))(shuffled).gather(-1, back_TK)
    for kept, experts in zip(keep_TK.tolist(), candidates.top_k_index_TK.tolist(), strict=True):
        expected = [expert for expert in experts if expert in read][:MODEL_TOP_K]
        assert [e for e, is_kept in zip(experts, kept, strict=True) if is_kept] == expected
    assert read_experts(candidates, keep_TK) == read


def _shuffle_slots(candidates: Candidates, seed: int) -> tuple[Candidates, torch.Tensor]:
    """Shuffle each token's slots; also return the place of each old slot."""
    generator = torch.Generator().manual_seed(seed)
    order_TK = torch.rand(candidates.top_k_index_TK.shape, generator=generator).argsort(dim=-1)
    shuffled = candidates._replace(
        top_k_index_TK=candidates.top_k_index_TK.gather(-1, order_TK),
        top_k_weights_TK=candidates.top_k_weights_TK.gather(-1, order_TK),
    )
    return shuffled, order_TK.argsort(dim=-1)


@pytest.mark.parametrize("refill", [None, 12])
@pytest.mark.parametrize("min_k", [1, 3])
@pytest.mark.parametrize(
    ("by_step", "by_token"),
    [
        (
            BenjaminiHochbergDrop(alpha, scope="step"),
            BenjaminiHochbergDrop(alpha, statistic="sensitivity", needed="loss"),
        )
        for alpha in (0.02, 0.1, 0.3, 0.6)
    ]
    + [
        (
            BenjaminiHochbergDrop(alpha, scope="step_population"),
            BenjaminiHochbergDrop(alpha, scope="population", needed="loss"),
        )
        for alpha in (1e-9, 0.1, 0.4)
    ]
    + [(FisherMass(0.1, exponent=e), ContributionThreshold(0.1)) for e in (1.0, 1.7, 2.0, 3.0)],
    ids=str,
)
def test_a_step_of_one_token_is_decided_by_the_rule_on_tokens_bit_for_bit(
    by_step: Rule, by_token: Rule, min_k: int, refill: int | None
) -> None:
    by_step, by_token = (dataclasses.replace(r, min_k=min_k) for r in (by_step, by_token))  # type: ignore[type-var]
    by_step = dataclasses.replace(by_step, refill=refill)  # type: ignore[type-var]
    own = propose(random_logits(400, seed=8), shuffled=True)
    candidates = propose(random_logits(400, seed=8), by_step.num_candidates(8), shuffled=True)
    every_T = torch.arange(400)
    rows = Rows(every_T, torch.zeros_like(every_T), every_T)
    expected_TK = by_token.bind(context_for(by_token))(own)
    got_TK = by_step.bind(context_for(by_step))(candidates._replace(rows=rows))
    assert torch.equal(kept_experts(candidates, got_TK), kept_experts(own, expected_TK))


@pytest.mark.parametrize("refill", [None, 12])
def test_oea_in_a_step_of_one_token_is_static_top_k(refill: int | None) -> None:
    rule, top_k = OpportunisticActivation(3, refill=refill), TopK(3)
    for token in range(16):
        candidates = in_step(1, seed=token, num_slots=refill or MODEL_TOP_K)
        expected_TK = top_k.bind(context_for(top_k))(candidates)
        assert torch.equal(rule.bind(context_for(rule))(candidates), expected_TK)


def test_oea_reads_the_union_of_the_k0_best_and_fills_from_it() -> None:
    candidates = in_step(6)
    rule = OpportunisticActivation(2)
    keep_TK = rule.bind(context_for(rule))(candidates)
    union = set(candidates.top_k_index_TK[:, :2].flatten().tolist())
    expected_TK = torch.tensor(
        [[expert in union for expert in row] for row in candidates.top_k_index_TK.tolist()]
    )
    assert torch.equal(keep_TK, expected_TK)


def test_a_budget_reads_the_largest_sums_of_weights_and_each_tokens_best() -> None:
    candidates = in_step(6)
    rule = ExpertBudget(5)
    keep_TK = rule.bind(context_for(rule))(candidates)
    sums: dict[int, float] = {}
    pairs = zip(
        candidates.top_k_index_TK.flatten().tolist(),
        candidates.top_k_weights_TK.flatten().tolist(),
        strict=True,
    )
    for expert, weight in pairs:
        sums[expert] = sums.get(expert, 0.0) + weight
    read = set(sorted(sums, key=lambda e: -sums[e])[:5])
    read |= set(candidates.top_k_index_TK[:, 0].tolist())
    for keep_K, row in zip(keep_TK.tolist(), candidates.top_k_index_TK.tolist(), strict=True):
        assert keep_K == [expert in read for expert in row]


def test_masses_add_up_over_the_tokens_of_a_step_alone() -> None:
    scores_TK = torch.tensor([[3.0, 1.0], [4.0, 2.0], [9.0, 9.0], [5.0, 7.0]])
    index_TK = torch.tensor([[0, 1], [0, 2], [0, 1], [0, 2]])
    step_T1 = torch.tensor([[0], [0], [-1], [1]])
    experts = step_experts(scores_TK, index_TK, step_T1, num_experts=4, num_steps=len(step_T1))
    assert experts.norms_SE[:2].tolist() == [[5.0, 1.0, 2.0, 0.0], [5.0, 0.0, 7.0, 0.0]]
    assert experts.is_present_SE[:2].sum(-1).tolist() == [3, 2]
    assert not experts.is_present_SE[2:].any()


def test_sums_do_not_depend_on_the_order_in_which_they_are_taken() -> None:
    scores = torch.rand(7, generator=torch.Generator().manual_seed(0)) ** 8
    index_TK = step_T1 = torch.zeros(7, 1, dtype=torch.int64)
    sums = {
        float(
            step_experts(
                scores[list(order), None], index_TK, step_T1, num_experts=1, num_steps=1
            ).norms_SE[0, 0]
        )
        for order in itertools.islice(itertools.permutations(range(7)), 0, 5_040, 50)
    }
    assert len(sums) == 1


def test_bh_counts_the_experts_of_its_own_step() -> None:
    p_SE = torch.tensor([[0.01, 0.04, 0.5, 0.0], [0.01, 0.04, 0.5, 0.0]], dtype=torch.float64)
    is_present_SE = torch.tensor([[True, True, False, False], [True, True, True, False]])
    rejected_SE = reject_in_steps(p_SE, is_present_SE, alpha=0.04)
    assert rejected_SE.tolist() == [[True, True, False, False], [True, False, False, False]]


def test_values_between_calibrated_sizes_are_linear_in_the_log_of_the_size() -> None:
    values = Between.values([0.0, 1.0, 2.0, -torch.inf, 4.0, 5.0, 6.0])
    assert values[[1, 2, 4, 16, 32, 64]].tolist() == [0.0, 1.0, 2.0, 4.0, 5.0, 6.0]
    assert float(values[3]) == pytest.approx(torch.tensor(3.0).log2().item())
    assert values[[5, 8, 12]].tolist() == [-torch.inf] * 3


def test_a_calibration_without_steps_is_rejected_with_the_remedy() -> None:
    rule = BenjaminiHochbergDrop(0.3, scope="step")
    context = context_for(rule)
    assert context.contributions is not None
    old = dataclasses.replace(context.contributions, steps={})
    assert NEEDED_STEPS not in old.tensors()
    with pytest.raises(CalibrationError, match=r"needed_steps.*run: bh_routing\.calibrate"):
        rule.bind(dataclasses.replace(context, contributions=old))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BenjaminiHochbergDrop(0.1, scope="step", statistic="weight"), "sensitivity"),
        (lambda: FisherMass(-1.0), "threshold must be"),
        (lambda: FisherMass(0.1, exponent=3.5), "exponent must be a number from 1 to 3, got 3.5"),
        (lambda: OpportunisticActivation(0), "k0 must be"),
        (lambda: OpportunisticActivation(2, refill=True), "refill must be a whole number"),
        (lambda: FisherMass(0.1, refill=0), "refill must be a whole number of at least 1, got 0"),
        (lambda: BenjaminiHochbergDrop(0.1, refill=12), "refill is for the scopes.*'token'"),
        (lambda: BenjaminiHochbergDrop(0.1, scope="population", refill=9), "'population'"),
        (lambda: ExpertBudget(0), "budget must be"),
        (lambda: ExpertBudget(4, by="mass"), "by.*mass"),  # type: ignore[arg-type]
        (lambda: FloorThreshold(0, 0.5), "min_k must be"),
        (lambda: FloorThreshold(1, []), "one per layer"),  # type: ignore[arg-type]
        (lambda: FloorThreshold(1, [0.5, 2.0]), "ratio of layer 1"),  # type: ignore[arg-type]
    ],
)
def test_a_value_out_of_range_is_rejected(make: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()  # type: ignore[operator]


@EVERY_STEP_RULE
@pytest.mark.parametrize(
    ("refill", "message"), [(7, "at least 8.*got 7"), (65, "at most the 64 experts.*got 65")]
)
def test_refill_is_from_the_models_own_k_to_all_experts(
    rule: Rule, refill: int, message: str
) -> None:
    rule = dataclasses.replace(rule, refill=refill)  # type: ignore[type-var]
    with pytest.raises(InputError, match=f"refill must be {message}"):
        rule.check(num_experts=NUM_EXPERTS, model_top_k=MODEL_TOP_K)


def test_a_floor_threshold_keeps_its_floor_and_compares_with_its_layers_ratio() -> None:
    candidates = Candidates(
        router_logits_TE=torch.tensor([[0.0, 4.0, 3.0, 2.0, 1.0]]),
        top_k_index_TK=torch.tensor([[3, 1, 4, 2]]),
        top_k_weights_TK=torch.tensor([[3.0, 8.0, 1.0, 4.0]]) / 16,
    )

    def kept(rule: FloorThreshold) -> list[bool]:
        context = context_for(rule, num_experts=5, model_top_k=4)
        answer: list[bool] = rule.bind(context)(candidates)[0].tolist()
        return answer

    assert kept(FloorThreshold(1, 0.5)) == [False, True, False, True]
    assert kept(FloorThreshold(3, 0.5)) == [True, True, False, True]
    assert kept(FloorThreshold(1, (0.3, 1.0))) == [True, True, False, True]
