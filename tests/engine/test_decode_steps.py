"""Emulated decode steps: position t of a batch of different documents is step t."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch

from bh_routing.engine.proposals import capture_proposals, mean_distinct_experts, median_ratios
from bh_routing.engine.score import STEP_LOGITS_BYTES, score
from bh_routing.engine.windows import TokenizedDocument, cut_windows, plan_steps, prefix_token
from bh_routing.errors import InputError
from bh_routing.models import LoadedModel, find_routers, route
from bh_routing.models.trace import DROPPED, count_distinct
from bh_routing.results.records import QualityRecord
from bh_routing.rules import ExpertBudget, FloorThreshold, OpportunisticActivation, Rule, TopK, TopP
from bh_routing.rules.step import StepRule

LENGTHS = (40, 9, 40, 23, 31, 40, 5)


@pytest.fixture(scope="module")
def documents(demo: LoadedModel) -> list[TokenizedDocument]:
    text = demo.tokenizer(" ".join(f"{i} of many words." for i in range(400)))["input_ids"]
    return [
        TokenizedDocument(
            key=f"{i}:0", name=f"{i}", cluster=f"{i // 2}", domain="x", ids=text[30 * i :][:length]
        )
        for i, length in enumerate(LENGTHS)
    ]


def records_of(
    demo: LoadedModel, documents: list[TokenizedDocument], batch: int, **more: Any
) -> dict[tuple[str, str], QualityRecord]:
    rules = {"own": TopK(8), "four": TopK(4), "top_p": TopP(0.5)}
    found = score(
        *demo, documents, rules, window=16, stride=16, decode_batch=batch, **more
    )  # fmt: skip
    return {(r.config_name, r.document_key): r for r in found}


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_batches_hold_different_documents_and_every_window_once(
    documents: list[TokenizedDocument], batch: int
) -> None:
    windows = list(cut_windows(documents, 0, window=16, stride=16))
    batches = list(plan_steps(windows, [d.cluster for d in documents], batch, seed=3))
    scored = Counter(id(w) for b in batches for w in b if w.num_scored)
    assert scored == Counter(id(w) for w in windows)
    for one in batches:
        assert len(one) == batch
        assert len({w.document for w in one}) == batch


def test_clusters_of_a_batch_differ_as_long_as_some_are_left(
    documents: list[TokenizedDocument],
) -> None:
    windows = list(cut_windows(documents, 0, window=64, stride=64))
    clusters = [d.cluster for d in documents]
    first = next(plan_steps(windows, clusters, 4, seed=0))
    assert len({clusters[w.document] for w in first}) == 4


def test_another_seed_draws_other_companions(documents: list[TokenizedDocument]) -> None:
    windows = list(cut_windows(documents, 0, window=64, stride=64))
    clusters = [d.cluster for d in documents]
    companions = {
        frozenset(w.document for w in next(plan_steps(windows, clusters, 3, seed)))
        for seed in range(8)
    }
    assert len(companions) > 2


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_losses_of_token_rules_do_not_depend_on_the_batch(
    demo: LoadedModel, documents: list[TokenizedDocument], batch: int
) -> None:
    rules = {"own": TopK(8), "four": TopK(4), "top_p": TopP(0.5)}
    plain = score(*demo, documents, rules, window=16, stride=16)
    found = records_of(demo, documents, batch)
    for record in plain:
        other = found[record.config_name, record.document_key]
        assert other.nll_sum == pytest.approx(record.nll_sum, rel=1e-4)
        assert other.tokens == record.tokens
        assert other.expert_load == record.expert_load
        assert record.distinct_experts_sum is None


def test_distinct_experts_are_those_of_a_loop_over_steps(
    demo: LoadedModel, documents: list[TokenizedDocument]
) -> None:
    found = records_of(demo, documents, 3)
    prefix = prefix_token(demo.tokenizer)
    windows = list(cut_windows(documents, prefix, window=16, stride=16))
    expected: Counter[str] = Counter()
    plan = list(plan_steps(windows, [d.cluster for d in documents], 3, seed=0))
    for batch in plan:
        traces = []
        for window in batch:
            with route(demo.model, TopK(4)) as trace, torch.inference_mode():
                demo.model(torch.tensor([window.ids[:-1]]))
            traces.append(trace.kept_index)
        for row, window in enumerate(batch):
            for t in range(window.first_scored, len(window.ids) - 1):
                for layer in range(traces[row].shape[1]):
                    running = [k[t, layer] for k in traces if t < len(k)]
                    experts = set(torch.cat(running).tolist()) - {DROPPED}
                    expected[documents[window.document].key] += len(experts)
    for key, total in expected.items():
        assert found["four", key].distinct_experts_sum == total


def test_at_batch_one_distinct_experts_are_the_kept_ones(
    demo: LoadedModel, documents: list[TokenizedDocument]
) -> None:
    for record in records_of(demo, documents, 1).values():
        assert record.distinct_experts_sum == record.experts_sum


def test_scoring_some_documents_gives_the_records_of_scoring_all(
    demo: LoadedModel, documents: list[TokenizedDocument]
) -> None:
    everything = records_of(demo, documents, 3)
    some = records_of(demo, documents, 3, only={"1:0", "5:0"})
    assert {key for _, key in some} == {"1:0", "5:0"}
    assert some == {at: everything[at] for at in some}


def test_documents_of_another_draw_are_no_companions(
    demo: LoadedModel, documents: list[TokenizedDocument]
) -> None:
    again = [replace(d, key=f"{d.key}#1", draw=1) for d in documents]
    both = records_of(demo, [*documents, *again], 3)
    once = records_of(demo, documents, 3)
    assert {at: both[at] for at in once} == once
    pairs = [(r, both[name, f"{key}#1"]) for (name, key), r in once.items()]
    assert all(a.nll_sum == pytest.approx(b.nll_sum, rel=1e-4) for a, b in pairs)
    assert any(a.distinct_experts_sum != b.distinct_experts_sum for a, b in pairs)


def count_passes(demo: LoadedModel, documents: list[TokenizedDocument], rules: Any) -> int:
    calls: list[int] = []
    router = find_routers(demo.model).sites[0].module
    handle = router.register_forward_hook(lambda *_: calls.append(1))
    list(score(*demo, documents, rules, window=16, stride=16, decode_batch=3))
    handle.remove()
    return len(calls)


def test_a_window_under_a_rule_on_tokens_runs_in_one_draw_only(
    demo: LoadedModel, documents: list[TokenizedDocument]
) -> None:
    both = [replace(d, key=f"{d.key}#{draw}", draw=draw) for draw in (0, 1) for d in documents]
    on_tokens: dict[str, Rule] = {"own": TopK(8), "four": TopK(4), "top_p": TopP(0.5)}
    on_steps: dict[str, Rule] = {"oea": OpportunisticActivation(3)}
    windows = list(cut_windows(documents, 0, window=16, stride=16))
    first, second = (
        len(list(plan_steps(windows, [d.cluster for d in documents], 3, seed))) for seed in (0, 1)
    )
    assert count_passes(demo, both, on_tokens) == 3 * first
    assert count_passes(demo, both, on_steps) == 2 * first + 2 * second
    assert count_passes(demo, both, on_tokens | on_steps) == 4 * first + 2 * second


def exact(record: QualityRecord) -> dict[str, Any]:
    """Return what doesn't depend on rounding."""
    fields = asdict(record).items()
    return {name: value for name, value in fields if not isinstance(value, float)}


@pytest.mark.parametrize("only", [None, {"1:0#1"}, {"0:0", "1:0#1"}])
def test_a_draw_has_the_records_of_scoring_it_alone(
    demo: LoadedModel, documents: list[TokenizedDocument], only: set[str] | None
) -> None:
    again = [replace(d, key=f"{d.key}#1", draw=1) for d in documents]
    both = records_of(demo, [*documents, *again], 3, only=only)
    alone = records_of(demo, again, 3, only=only)
    for (name, key), record in alone.items():
        assert both[name, key].nll_sum == pytest.approx(record.nll_sum, rel=1e-5)
        assert exact(both[name, key]) == exact(record)


def test_joined_batches_share_no_step(
    demo: LoadedModel, documents: list[TokenizedDocument], monkeypatch: pytest.MonkeyPatch
) -> None:
    rules: dict[str, Rule] = {"oea": OpportunisticActivation(2), "xshare": ExpertBudget(9)}
    options: dict[str, Any] = {"window": 16, "stride": 16, "decode_batch": 3}
    apart = list(score(*demo, documents, rules, **options))
    monkeypatch.setitem(STEP_LOGITS_BYTES, "cpu", 2**30)
    passes = count_passes(demo, documents, rules)
    joined = {(r.config_name, r.document): r for r in score(*demo, documents, rules, **options)}
    assert passes == 1 + len(rules)
    for record in apart:
        other = joined[record.config_name, record.document]
        assert other.nll_sum == pytest.approx(record.nll_sum, rel=1e-5)
        assert other.distinct_experts_sum == record.distinct_experts_sum
        assert other.expert_load == record.expert_load


def test_too_few_documents_are_named(demo: LoadedModel, documents: list[TokenizedDocument]) -> None:
    with pytest.raises(InputError, match=r"decode_batch must be from 1 to .*, 7, .* got 8"):
        records_of(demo, documents, 8)


def test_proposals_in_steps_give_the_scored_mean(
    demo: LoadedModel, documents: list[TokenizedDocument]
) -> None:
    routers = find_routers(demo.model)
    proposals = capture_proposals(
        *demo, documents, window=16, num_candidates=8, decode_batch=3
    )  # fmt: skip
    own = [r for (name, _), r in records_of(demo, documents, 3).items() if name == "own"]
    scored = sum(r.distinct_experts_sum or 0 for r in own) / sum(r.units for r in own)
    assert mean_distinct_experts(TopK(8), proposals, routers) == pytest.approx(scored, rel=1e-3)
    assert mean_distinct_experts(TopK(2), proposals, routers) < scored


@pytest.mark.parametrize("rule", [ExpertBudget(12), OpportunisticActivation(3)])
def test_a_refilled_rule_reads_the_same_experts_of_the_same_proposals(
    rule: StepRule, demo: LoadedModel, documents: list[TokenizedDocument]
) -> None:
    routers, reads = find_routers(demo.model), []
    for refill in (None, 20):
        mine = replace(rule, refill=refill)
        proposals = capture_proposals(
            *demo, documents, window=16, num_candidates=mine.num_candidates(8), decode_batch=3
        )  # fmt: skip
        reads.append(mean_distinct_experts(mine, proposals, routers))
    assert reads[0] == reads[1]


@pytest.mark.parametrize("max_tokens", [None, 10])
def test_ratios_are_medians_of_the_second_largest_weight_over_the_largest(
    max_tokens: int | None, demo: LoadedModel
) -> None:
    texts = ["The castle stood on a hill above the town.", "A recipe for bread begins with flour."]
    ratios = median_ratios(*demo, texts, max_tokens=max_tokens)
    ratios_LT: list[list[float]] = [[] for _ in find_routers(demo.model).sites]
    passes = []
    for text in texts:
        ids = demo.tokenizer(text)["input_ids"][: max_tokens and max_tokens // 2]
        prefixed = torch.tensor([[prefix_token(demo.tokenizer), *ids]])[:, :-1]
        passes.append(prefixed)
        logits = demo.model(prefixed, output_router_logits=True).router_logits
        for own, layer_TE in zip(ratios_LT, logits, strict=True):
            first, second = layer_TE.softmax(-1).topk(2).values.T
            own += (second / first).tolist()
    assert ratios == pytest.approx([float(np.median(own)) for own in ratios_LT], rel=1e-5)
    with route(demo.model, FloorThreshold(min_k=1, ratio=ratios)) as trace:
        for prefixed in passes:
            demo.model(prefixed)
    has_several_T = trace.expert_counts[:, 0] > 1
    assert abs(int(has_several_T.sum()) - len(has_several_T) / 2) <= 1, (
        "half of them, by definition"
    )


def test_dropped_slots_and_empty_steps_count_nothing() -> None:
    kept_TLK = torch.tensor([[[0, 3]], [[3, DROPPED]], [[1, 2]]])
    assert count_distinct(torch.tensor([0, 0, 2]), kept_TLK, 4).tolist() == [[2], [0], [2]]


def test_generation_counts_decode_steps_only_and_no_pad(demo: LoadedModel) -> None:
    tokenizer = demo.tokenizer
    prompts = ["The sea is", "A long walk through the old town and"]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    with route(demo.model, TopK(3)) as trace:
        demo.model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert trace.distinct_experts.shape == (4, 6)
    last = trace.kept_index[-2:, 0].flatten().tolist()
    assert trace.distinct_experts[-1, 0] == len(set(last) - {DROPPED})
    trace.clear()
    assert trace.distinct_experts.numel() == 0
