"""The scores of experts equal plain computations, and BH's alpha bounds the needed ones lost."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bh_routing.engine.expert_scores import (
    ExpertUse,
    Score,
    best_experts,
    find_unneeded,
    observe_experts,
)
from bh_routing.engine.texts import Document
from bh_routing.errors import InputError
from bh_routing.models import load_model
from bh_routing.models.load import LoadedModel
from bh_routing.stats.bootstrap import RESAMPLES

TEXTS = ("The river ran.", "Water boils.")
DOCUMENTS = [Document(f"text-{i}", text, f"text-{i}", "text") for i, text in enumerate(TEXTS)]
LAYER = 5
"""The last layer: a changed weight changes no later choice of experts."""


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_model("demo", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def use(demo: LoadedModel) -> ExpertUse:
    return observe_experts(*demo, DOCUMENTS, by_loss=True, max_tokens=1_000)


def record(calls: list[Any], _: nn.Module, arguments: Any, output: Any) -> None:
    """A hook that keeps a call's arguments and output."""
    calls.append((arguments, output))


class Routed:
    """The routed slots of one layer on all texts, by hooks of our own."""

    def __init__(self, demo: LoadedModel) -> None:
        self.hidden: list[Tensor] = []
        self.slots: list[tuple[int, int, float, Tensor]] = []
        """Document, expert, weight, hidden state."""
        block = demo.model.model.layers[LAYER].mlp
        for number, text in enumerate(TEXTS):
            ids = demo.tokenizer(text, return_tensors="pt").input_ids
            calls: list[Any] = []
            hook = block.gate.register_forward_hook(partial(record, calls))
            with torch.no_grad():
                demo.model(ids)
            hook.remove()
            ((hidden,), (_, weights, index)) = calls[0]
            for token, state in enumerate(hidden.reshape(-1, hidden.shape[-1])):
                for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
                    self.slots.append((number, expert, float(weight), state))
        self.experts = block.experts

    def output(self, expert: int, state: Tensor) -> Tensor:
        """One expert's output, from its weights."""
        gate, up = (self.experts.gate_up_proj[expert] @ state).chunk(2)
        return torch.as_tensor(self.experts.down_proj[expert] @ (nn.functional.silu(gate) * up))


@pytest.fixture(scope="module")
def routed(demo: LoadedModel) -> Routed:
    return Routed(demo)


def test_reap_is_the_mean_weighted_norm_over_the_tokens_routed_to_an_expert(
    use: ExpertUse, routed: Routed
) -> None:
    scores_E = use.scores("reap", seed=0)[LAYER]
    for expert in range(64):
        own = [(w, h) for _, e, w, h in routed.slots if e == expert]
        terms = [weight * float(routed.output(expert, state).norm()) for weight, state in own]
        expected = sum(terms) / len(terms) if terms else 0.0
        assert float(scores_E[expert]) == pytest.approx(expected, rel=1e-4)
    assert 0 < int((scores_E > 0).sum()) < 64


def test_frequency_counts_the_tokens_routed_to_an_expert(use: ExpertUse, routed: Routed) -> None:
    counts = [sum(e == expert for _, e, _, _ in routed.slots) for expert in range(64)]
    assert use.scores("frequency", seed=0)[LAYER].tolist() == counts
    assert use.tokens_D.tolist() == [
        len([s for s in routed.slots if s[0] == d]) / 8 for d in (0, 1)
    ]


def test_fisher_mass_equals_the_gradients_of_a_plain_last_layer(
    demo: LoadedModel, use: ExpertUse, routed: Routed
) -> None:
    model = demo.model
    squares: list[list[float]] = [[] for _ in range(64)]
    masses = [0.0] * 64
    for number, text in enumerate(TEXTS):
        ids = demo.tokenizer(text, return_tensors="pt").input_ids
        calls: list[Any] = []
        after = model.model.layers[LAYER].post_attention_layernorm
        hook = after.register_forward_hook(partial(record, calls))
        with torch.no_grad():
            model(ids)
        hook.remove()
        ((residual,), _) = calls[0]
        own = [(e, w, h) for document, e, w, h in routed.slots if document == number]
        outputs = torch.stack([routed.output(expert, state) for expert, _, state in own])
        weights = torch.tensor([w for _, w, _ in own], requires_grad=True)
        mixed = (weights[:, None] * outputs).view(ids.shape[1], 8, -1).sum(1)
        logits = model.lm_head(model.model.norm(residual[0] + mixed))
        loss = nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum")
        (gradients,) = torch.autograd.grad(loss, weights)
        for (expert, weight, _), gradient in zip(own, gradients.tolist(), strict=True):
            squares[expert].append(gradient**2)
            masses[expert] += weight**2
    scores = use.scores("fisher_mass", seed=0)[LAYER].tolist()
    expected = [m * sum(s) / max(1, len(s)) for m, s in zip(masses, squares, strict=True)]
    assert scores == pytest.approx(expected, rel=1e-3, abs=1e-9)
    assert sum(score > 0 for score in scores) > 10


def test_random_scores_depend_on_the_seed_alone(use: ExpertUse) -> None:
    first, again, other = (use.scores("random", seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first.argsort(-1), other.argsort(-1))


def test_scores_without_gradients_observe_no_loss(demo: LoadedModel, use: ExpertUse) -> None:
    plain = observe_experts(*demo, DOCUMENTS, by_loss=False, max_tokens=1_000)
    scores: tuple[Score, ...] = ("reap", "frequency")
    for score in scores:
        torch.testing.assert_close(plain.scores(score, 0), use.scores(score, 0), rtol=1e-5, atol=0)
    assert int(plain.squares_LE.count_nonzero()) == 0


def test_a_duplicate_text_counts_once(demo: LoadedModel, use: ExpertUse) -> None:
    twice = observe_experts(*demo, DOCUMENTS * 2, by_loss=False, max_tokens=1_000)
    assert torch.equal(twice.counts_LE, use.counts_LE)


def make_use(masses_DE: Tensor, clusters: tuple[str, ...] | None = None) -> ExpertUse:
    """One layer in which every document has 100 tokens, with the given Fisher masses."""
    ones_LE = torch.ones(1, masses_DE.shape[1], dtype=torch.float64)
    return ExpertUse(
        counts_LE=ones_LE, contributions_LE=ones_LE, squares_LE=ones_LE,
        squared_weights_DLE=masses_DE.double()[:, None],
        tokens_D=torch.full((len(masses_DE),), 100),
        clusters=clusters or tuple(map(str, range(len(masses_DE)))),
    )  # fmt: skip


def test_alpha_bounds_the_fraction_of_rejected_experts_that_matter() -> None:
    # 20 simulated texts of 40 documents. 100 of 200 experts have exactly the median's mean, 50 a
    # larger one and 50 a smaller one, so BH's bound is alpha x 150 / 200 = 0.15.
    generator = torch.Generator().manual_seed(0)
    means_E = torch.tensor([1.0] * 100 + [1.6] * 50 + [0.6] * 50)
    fractions, num_rejected = [], 0
    for trial in range(20):
        noise_DE = torch.exp(0.5 * torch.randn(40, 200, generator=generator) - 0.125)
        rejected_E = find_unneeded(make_use(means_E * noise_DE), alpha=0.2, seed=trial)[0]
        num_rejected += int(rejected_E.sum())
        fractions.append(float(rejected_E[:150].sum() / rejected_E.sum().clamp_min(1)))
    assert num_rejected > 20 * 45
    assert 0.03 < sum(fractions) / len(fractions) <= 0.15


def test_more_experts_are_rejected_at_a_larger_alpha_and_none_without_evidence() -> None:
    generator = torch.Generator().manual_seed(1)
    masses_DE = torch.rand(30, 100, generator=generator) * torch.linspace(0.5, 2.0, 100)
    counts = [int(find_unneeded(make_use(masses_DE), a, seed=0).sum()) for a in (0.01, 0.1, 0.5)]
    assert 0 < counts[0] < counts[1] < counts[2]
    same = torch.rand(30, 100, generator=generator)
    assert int(find_unneeded(make_use(same), alpha=0.05, seed=0).sum()) <= 2


def test_experts_that_no_token_uses_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(2)
    masses_DE = torch.rand(30, 50, generator=generator) + 1
    masses_DE[:, :5] = 0
    rejected_E = find_unneeded(make_use(masses_DE), alpha=0.05, seed=0)[0]
    assert rejected_E[:5].all()
    assert 1 / (RESAMPLES + 1) < 5 / 50 * 0.05, "the smallest p is below BH's line"


def test_documents_of_one_cluster_are_no_independent_evidence() -> None:
    generator = torch.Generator().manual_seed(3)
    masses_DE = torch.rand(30, 100, generator=generator) * torch.linspace(0.5, 2.0, 100)
    repeated = masses_DE.repeat(4, 1)
    own = tuple(str(i % 30) for i in range(120))
    alone, clustered = (
        find_unneeded(make_use(masses, clusters), 0.05, seed=0)
        for masses, clusters in ((masses_DE, None), (repeated, own))
    )
    assert torch.equal(alone, clustered)
    with pytest.raises(InputError, match="at least 3 independent documents, got 2"):
        find_unneeded(make_use(masses_DE, ("a", "b") * 15), 0.05, seed=0)


def test_the_best_experts_stay_equally_many_of_each_group() -> None:
    scores_LE = torch.tensor([[5.0, 9.0, 7.0, 8.0, 1.0, 2.0, 4.0, 3.0]])
    assert best_experts(scores_LE, keep=4).tolist() == [[0, 1, 2, 3]]
    assert best_experts(scores_LE, keep=4, num_groups=2).tolist() == [[1, 3, 6, 7]]
    assert best_experts(torch.zeros(1, 8), keep=3).tolist() == [[0, 1, 2]]
