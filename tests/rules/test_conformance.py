"""What every rule must do, checked on every rule of the catalog.

A new rule adds its examples here and is tested by all of this. Axes: T tokens, E experts, K slots.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from bh_routing.errors import InputError
from bh_routing.rules import (
    RULES,
    BenjaminiHochberg,
    BenjaminiHochbergDrop,
    ContributionThreshold,
    Entropy,
    ExpertBudget,
    FisherMass,
    FloorThreshold,
    HigherCriticism,
    MinP,
    OpportunisticActivation,
    OracleContribution,
    PerLayerTopK,
    RandomK,
    Rows,
    Rule,
    Threshold,
    TopK,
    TopP,
    make_rule,
    rule_to_config,
)
from tests.rules.proposals import (
    MODEL_TOP_K,
    NUM_EXPERTS,
    OneDevice,
    changed,
    context_for,
    kept_experts,
    propose,
    random_logits,
)

EXAMPLES: dict[str, list[Rule]] = {
    "top_k": [TopK(1), TopK(3), TopK(8), TopK(12)],
    "bh": [
        BenjaminiHochberg(0.05),
        BenjaminiHochberg(0.01, null="gaussian"),
        BenjaminiHochberg(0.10, null="gaussian", procedure="by", on_empty="model_k"),
        BenjaminiHochberg(0.03, temperature=1.5, min_k=2, max_k=10),
        BenjaminiHochberg(0.05, null="softmax", temperature=0.5),
        BenjaminiHochberg(0.05, null="pooled", max_k=4, on_empty="model_k"),
        BenjaminiHochberg(0.05, procedure="storey"),
        BenjaminiHochberg(0.1, null="per_expert"),
        BenjaminiHochberg(0.2, null="per_expert", procedure="storey", max_k=12, on_empty="model_k"),
        BenjaminiHochberg(0.10, null="gaussian", procedure="storey", max_k=12),
    ],
    "bh_drop": [
        BenjaminiHochbergDrop(0.2),
        BenjaminiHochbergDrop(0.5, statistic="weight", min_k=3),
        BenjaminiHochbergDrop(0.4, scope="block", block_tokens=16, needed="loss"),
        BenjaminiHochbergDrop(0.4, scope="block", block_tokens=1_000),
        BenjaminiHochbergDrop(0.4, scope="population", statistic="sensitivity"),
        BenjaminiHochbergDrop(1e-9, scope="population"),
        BenjaminiHochbergDrop(0.3, scope="step"),
        BenjaminiHochbergDrop(0.3, scope="step_population", min_k=2, refill=12),
    ],
    "fisher_mass": [
        FisherMass(0.0),
        FisherMass(0.3),
        FisherMass(9.0, exponent=1.5, min_k=2, refill=9),
    ],
    "oea": [OpportunisticActivation(3), OpportunisticActivation(1, refill=64)],
    "expert_budget": [ExpertBudget(1), ExpertBudget(2, by="fisher_mass", min_k=2, refill=8)],
    "contribution_threshold": [
        ContributionThreshold(0.0),
        ContributionThreshold(0.03, min_k=2),
        ContributionThreshold(9.0),
    ],
    "oracle_contribution": [OracleContribution(0.03), OracleContribution(9.0, min_k=2)],
    "per_layer_top_k": [PerLayerTopK((3,)), PerLayerTopK((10, 2, 2))],
    "top_p": [TopP(0.4), TopP(0.9, weights="preserve_mass"), TopP(1.0)],
    "min_p": [MinP(0.01), MinP(0.5), MinP(1.0)],
    "floor_threshold": [FloorThreshold(1, 0.5), FloorThreshold(3, (0.9, 0.2, 0.4))],
    "threshold": [Threshold(0.02), Threshold(0.2), Threshold(1.0)],
    "entropy": [Entropy(0.05), Entropy(0.4, temperature=2.0), Entropy(100.0)],
    "higher_criticism": [
        HigherCriticism(2.0, null="gaussian"),
        HigherCriticism(1.0, max_k=12),
        HigherCriticism(-5.0, max_k=4),
    ],
    "random_k": [
        RandomK((0.0, 1.0, 2.0, 1.0)),
        RandomK.at_mean(4.25, seed=3),
        RandomK((0.1,) * 12),
    ],
}
EVERY_RULE = pytest.mark.parametrize(
    "rule", [rule for rules in EXAMPLES.values() for rule in rules], ids=str
)
LOGITS_TE = random_logits(200)


def test_every_rule_of_the_catalog_has_examples() -> None:
    assert set(EXAMPLES) == set(RULES)
    assert all(rule.method == method for method, rules in EXAMPLES.items() for rule in rules)


@EVERY_RULE
def test_a_selector_says_yes_or_no_to_each_slot_and_keeps_at_least_one(rule: Rule) -> None:
    candidates = propose(LOGITS_TE, rule.num_candidates(MODEL_TOP_K), shuffled=True)
    keep_TK = rule.bind(context_for(rule))(candidates)
    assert keep_TK.dtype == torch.bool
    assert keep_TK.shape == candidates.top_k_index_TK.shape
    assert bool(keep_TK.any(dim=-1).all())


@EVERY_RULE
def test_the_same_token_is_decided_alike_alone_and_in_any_batch(rule: Rule) -> None:
    candidates = propose(LOGITS_TE, rule.num_candidates(MODEL_TOP_K))
    select = rule.bind(context_for(rule))
    keep_TK = select(candidates)
    if rule.unit != "token":
        pytest.skip("its neighbours move a token's line")
    order_T = torch.randperm(len(LOGITS_TE), generator=torch.Generator().manual_seed(1))
    shuffled = changed(candidates, lambda tensor: tensor[order_T])
    assert torch.equal(select(shuffled), keep_TK[order_T])
    for token in (0, 7, 199):
        alone = changed(candidates, lambda tensor, at=token: tensor[at : at + 1])  # type: ignore[misc]
        assert torch.equal(select(alone), keep_TK[token : token + 1])


@EVERY_RULE
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_a_sequence_is_decided_alike_alone_and_in_any_batch_with_any_padding(
    rule: Rule, side: str
) -> None:
    if rule.unit == "step":
        pytest.skip("a call of one position is a decode step: see test_step.py")
    lengths, width = (30, 1, 77, 50), 80
    select = rule.bind(context_for(rule))
    num_slots = rule.num_candidates(MODEL_TOP_K)
    logits_BSE = random_logits(len(lengths) * width, seed=7).unflatten(0, (len(lengths), width))
    is_real_BS = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        start = {"left": width - length, "right": 0, "both": (width - length) // 2}[side]
        is_real_BS[row, start : start + length] = True
    batch = propose(logits_BSE.flatten(0, 1), num_slots)
    batch = batch._replace(rows=Rows.of_batch(is_real_BS, torch.zeros_like(is_real_BS)))
    keep_BSK = select(batch).unflatten(0, is_real_BS.shape)
    for row, is_real_S in enumerate(is_real_BS):
        alone = propose(logits_BSE[row, is_real_S], num_slots)
        assert torch.equal(select(alone), keep_BSK[row, is_real_S])


@EVERY_RULE
def test_binding_twice_decides_alike(rule: Rule) -> None:
    candidates = propose(LOGITS_TE, rule.num_candidates(MODEL_TOP_K))
    first, second = (rule.bind(context_for(rule))(candidates) for _ in range(2))
    assert torch.equal(first, second)


@EVERY_RULE
def test_the_order_of_the_slots_does_not_matter(rule: Rule) -> None:
    num_slots = rule.num_candidates(MODEL_TOP_K)
    select = rule.bind(context_for(rule))
    in_order, shuffled = (propose(LOGITS_TE, num_slots, shuffled=way) for way in (False, True))
    assert torch.equal(
        kept_experts(in_order, select(in_order)), kept_experts(shuffled, select(shuffled))
    )


@EVERY_RULE
def test_the_kept_slots_are_the_best_by_logit_where_a_rule_says_so(rule: Rule) -> None:
    candidates = propose(LOGITS_TE, rule.num_candidates(MODEL_TOP_K))  # best first
    keep_TK = rule.bind(context_for(rule))(candidates).int()
    is_prefix = bool((keep_TK.diff(dim=-1) <= 0).all())
    assert is_prefix or not rule.keeps_best_by_logit


@EVERY_RULE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_decision_depends_on_values_and_not_on_their_dtype(
    rule: Rule, dtype: torch.dtype
) -> None:
    logits_TE = LOGITS_TE.to(torch.bfloat16)
    candidates = propose(logits_TE.float(), rule.num_candidates(MODEL_TOP_K))
    weights_TK = candidates.top_k_weights_TK.to(torch.bfloat16).float()
    candidates = candidates._replace(top_k_weights_TK=weights_TK)
    select = rule.bind(context_for(rule))
    other = candidates._replace(
        router_logits_TE=logits_TE.to(dtype), top_k_weights_TK=candidates.top_k_weights_TK.to(dtype)
    )
    assert torch.equal(select(other), select(candidates))


@EVERY_RULE
def test_selecting_leaves_its_input_as_it_was(rule: Rule) -> None:
    candidates = propose(LOGITS_TE.clone(), rule.num_candidates(MODEL_TOP_K), shuffled=True)
    before = changed(candidates, torch.clone)
    rule.bind(context_for(rule))(candidates)
    pairs = zip(tree_leaves(before), tree_leaves(candidates), strict=True)
    assert all(one is other or torch.equal(one, other) for one, other in pairs)


@EVERY_RULE
def test_selecting_makes_no_host_sync(rule: Rule) -> None:
    # A meta tensor has no values: whatever would read one raises.
    context = context_for(rule, device="meta")
    on_meta = changed(
        propose(LOGITS_TE, rule.num_candidates(MODEL_TOP_K)), lambda tensor: tensor.to("meta")
    )
    select, p_values = rule.bind(context), rule.slot_p_values(context)
    with OneDevice(only="meta"):  # a copy from the host would be a sync too
        assert select(on_meta).is_meta
        assert p_values is None or p_values(on_meta).is_meta


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@EVERY_RULE
def test_a_gpu_decides_like_the_cpu_and_never_syncs(rule: Rule) -> None:
    candidates = propose(LOGITS_TE, rule.num_candidates(MODEL_TOP_K), shuffled=True)
    expected_TK = rule.bind(context_for(rule))(candidates)
    select = rule.bind(context_for(rule, device="cuda"))
    on_gpu = changed(candidates, lambda tensor: tensor.cuda())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the mode itself, which is a prototype
            torch.cuda.set_sync_debug_mode("error")
        keep_TK = select(on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(keep_TK.cpu(), expected_TK)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@EVERY_RULE
def test_a_reference_on_either_device_serves_a_layer_on_either(rule: Rule) -> None:
    candidates = propose(LOGITS_TE, rule.num_candidates(MODEL_TOP_K))
    context = context_for(rule)
    expected_TK = rule.bind(context)(candidates)
    for device, other in (("cuda", "cpu"), ("cpu", "cuda")):
        known = {
            name: value and value.to(torch.device(other))
            for name, value in (("table", context.table), ("contributions", context.contributions))
        }
        moved = dataclasses.replace(context, device=torch.device(device), **known)  # type: ignore[arg-type]
        there = changed(candidates, lambda tensor, at=device: tensor.to(at))  # type: ignore[misc]
        assert torch.equal(rule.bind(moved)(there).cpu(), expected_TK)


@EVERY_RULE
def test_a_selector_compiles_into_one_graph(rule: Rule) -> None:
    candidates = propose(LOGITS_TE, rule.num_candidates(MODEL_TOP_K), shuffled=True)
    select = rule.bind(context_for(rule))
    torch.compiler.reset()
    compiled = torch.compile(select, backend="eager", fullgraph=True)
    assert torch.equal(compiled(candidates), select(candidates))


@EVERY_RULE
def test_no_tokens_are_no_trouble(rule: Rule) -> None:
    candidates = propose(torch.empty(0, NUM_EXPERTS), rule.num_candidates(MODEL_TOP_K))
    assert rule.bind(context_for(rule))(candidates).shape == candidates.top_k_index_TK.shape


@EVERY_RULE
def test_at_least_the_models_own_slots_are_asked_for(rule: Rule) -> None:
    assert rule.num_candidates(MODEL_TOP_K) >= MODEL_TOP_K
    assert rule.num_candidates(2) >= 2


@EVERY_RULE
def test_a_token_keeps_no_more_than_the_rule_says(rule: Rule) -> None:
    candidates = propose(LOGITS_TE, rule.num_candidates(MODEL_TOP_K))
    counts_T = rule.bind(context_for(rule))(candidates).sum(dim=-1)
    assert int(counts_T.max()) <= rule.most_kept(MODEL_TOP_K) <= candidates.top_k_index_TK.shape[-1]


GENEROUS: list[dict[str, Any]] = [
    *({"method": "bh", "alpha": 0.9, "null": null} for null in ("gaussian", "pooled", "softmax")),
    {"method": "bh", "alpha": 0.9, "null": "gaussian", "procedure": "storey"},
    {"method": "bh", "alpha": 0.01, "null": "gaussian", "procedure": "by", "on_empty": "model_k"},
    {"method": "bh", "alpha": 0.9, "null": "gaussian", "max_k": None},
    {"method": "higher_criticism", "threshold": -9.0, "null": "gaussian"},
    {"method": "higher_criticism", "threshold": -9.0, "null": "gaussian", "max_k": None},
    {"method": "bh_drop", "alpha": 1e-6},
    {"method": "contribution_threshold", "threshold": 0.0},
    {"method": "oracle_contribution", "threshold": 0.0},
    {"method": "top_p", "p": 1.0},
    {"method": "min_p", "share": 1e-6},
    {"method": "threshold", "threshold": 1e-9},
    {"method": "entropy", "scale": 100.0},
]


@pytest.mark.parametrize(("num_experts", "model_top_k"), [(64, 8), (8, 2), (4, 4)])
@pytest.mark.parametrize("config", GENEROUS, ids=str)
def test_unless_told_otherwise_a_rule_keeps_at_most_the_models_own_k(
    config: dict[str, Any], num_experts: int, model_top_k: int
) -> None:
    rule = make_rule(config)
    rule.check(num_experts=num_experts, model_top_k=model_top_k)
    assert rule.num_candidates(model_top_k) == model_top_k
    candidates = propose(random_logits(100, num_experts), rule.num_candidates(model_top_k))
    counts_T = rule.bind(context_for(rule, num_experts, model_top_k))(candidates).sum(dim=-1)
    assert int(counts_T.max()) <= rule.most_kept(model_top_k) == model_top_k


@pytest.mark.parametrize(("num_experts", "model_top_k"), [(64, 8), (8, 2), (4, 4)])
@pytest.mark.parametrize(
    "config",
    [
        {"method": "bh", "alpha": 0.05},
        {"method": "bh_drop", "alpha": 0.05},
        {"method": "contribution_threshold", "threshold": 0.05},
        {"method": "oracle_contribution", "threshold": 0.05},
    ],
    ids=str,
)
def test_a_min_k_above_what_a_rule_can_keep_is_rejected_before_any_token(
    config: dict[str, Any], num_experts: int, model_top_k: int
) -> None:
    at_most = make_rule(config | {"min_k": model_top_k})
    at_most.check(num_experts=num_experts, model_top_k=model_top_k)
    above = make_rule(config | {"min_k": model_top_k + 1})
    with pytest.raises(InputError, match=f"min_k must be at most {model_top_k}, .* got"):
        above.check(num_experts=num_experts, model_top_k=model_top_k)


@EVERY_RULE
def test_a_rule_survives_its_configuration(rule: Rule) -> None:
    config = rule_to_config(rule)
    assert config["method"] == rule.method
    assert make_rule(config | {"description": "anything"}) == rule


@EVERY_RULE
def test_a_rule_is_frozen_and_can_be_a_key(rule: Rule) -> None:
    assert {rule: 1}[rule] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.temperature = 3.0


@EVERY_RULE
def test_more_experts_than_there_are_is_refused_before_any_token(rule: Rule) -> None:
    rule.check(num_experts=NUM_EXPERTS, model_top_k=MODEL_TOP_K)
    if rule.num_candidates(1) <= 2:
        return
    with pytest.raises(InputError, match="at most the 2 experts of a layer"):
        rule.check(num_experts=2, model_top_k=1)


@EVERY_RULE
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weights", "renormalise"),
        ("temperature", 0.0),
        ("temperature", "hot"),
        ("temperature_weights", "rough"),
    ],
)
def test_a_mixture_out_of_range_is_refused(rule: Rule, field: str, value: object) -> None:
    with pytest.raises(InputError, match=f"{field}.*{value}"):
        make_rule(rule_to_config(rule) | {field: value})
