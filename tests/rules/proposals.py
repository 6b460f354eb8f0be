"""Slots as a router would propose them. Axes: T tokens, E experts, K slots."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from bh_routing.nulls import ReferenceTable, RouterPass, get_null
from bh_routing.nulls.contributions import (
    ALL_STEPS,
    NEEDED_STEPS,
    OF_SLOTS,
    STEP_SIZES,
    Contributions,
    Definition,
    Statistic,
)
from bh_routing.rules import Candidates, LayerContext, Rows, Rule

NUM_EXPERTS = 64
MODEL_TOP_K = 8


def random_logits(num_tokens: int, num_experts: int = NUM_EXPERTS, seed: int = 0) -> Tensor:
    """Noise with a few signals a token, as many as the token's number modulo 12."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(num_tokens, num_experts, generator=generator)
    rank_TE = torch.rand(num_tokens, num_experts, generator=generator).argsort(-1).argsort(-1)
    is_signal_TE = rank_TE < (torch.arange(num_tokens) % 12).unsqueeze(-1)
    return logits_TE + 4 * is_signal_TE


def propose(
    logits_TE: Tensor, num_slots: int = MODEL_TOP_K, *, shuffled: bool = False, seed: int = 0
) -> Candidates:
    """Propose the best slots of one sequence, with raw softmax weights, by logit or shuffled.

    The norm of a slot's expert output is made up from its weight and its expert.
    """
    order_TE = logits_TE.float().argsort(dim=-1, descending=True, stable=True)
    index_TK = order_TE[:, :num_slots]
    if shuffled:
        generator = torch.Generator().manual_seed(seed)
        order_TK = torch.rand(index_TK.shape, generator=generator).argsort(dim=-1)
        index_TK = index_TK.gather(-1, order_TK)
    weights_TK = logits_TE.float().softmax(-1).gather(-1, index_TK)
    norms_TK = 0.5 + (index_TK * 0.37 + weights_TK).frac()
    rows = Rows.of_batch(torch.ones(1, len(logits_TE)) > 0, torch.zeros(1, len(logits_TE)) > 0)
    return Candidates(logits_TE, index_TK, weights_TK, norms_TK, rows)


def context_for(
    rule: Rule, num_experts: int = NUM_EXPERTS, model_top_k: int = MODEL_TOP_K, device: str = "cpu"
) -> LayerContext:
    """A layer whose reference, if the rule needs one, comes from other random logits."""
    table = contributions = None
    if rule.required_null in OF_SLOTS:
        contributions = made_up_contributions(num_experts, model_top_k)
    elif rule.required_null is not None:
        logits_TE = random_logits(2_000, num_experts, seed=99)
        seen = RouterPass(
            router_logits_TE=logits_TE,
            top_k_index_TK=logits_TE.topk(model_top_k).indices,
            hidden_states_TH=logits_TE,
            gate_EH=torch.eye(num_experts),
        )
        table = get_null(rule.required_null).table_of(seen)
    return LayerContext(
        layer=0,
        num_experts=num_experts,
        model_top_k=model_top_k,
        device=torch.device(device),
        table=table,
        contributions=contributions,
    )


def made_up_contributions(num_experts: int, model_top_k: int) -> Contributions:
    """Three layers in which the slots of other random logits mattered by a noisy score."""
    generator = torch.Generator().manual_seed(98)
    slots = propose(random_logits(2_000, num_experts, seed=97), model_top_k)
    scale_LE = 0.5 + torch.rand(3, num_experts, generator=generator)
    scales: dict[Statistic, Tensor] = {
        "contribution": scale_LE,
        "weight": torch.ones_like(scale_LE),
        "sensitivity": 2 * scale_LE.flip(0),
        "layer_sensitivity": 3 * scale_LE,
    }
    scores = {
        name: slots.top_k_weights_TK * scale[0, slots.top_k_index_TK]
        for name, scale in scales.items()
    }
    noise_TK = torch.rand(slots.top_k_weights_TK.shape, generator=generator)
    truth_TK = scores["contribution"] * (0.5 + noise_TK)
    is_needed_TK = truth_TK > truth_TK.median()
    definitions: tuple[Definition, ...] = ("norm", "loss")
    # More tokens have larger masses, and so have the masses of needed pairs.
    all_BN = torch.stack([scores["sensitivity"].flatten() * size**0.5 for size in STEP_SIZES])
    needed_BN = torch.stack([row[is_needed_TK.flatten()] for row in all_BN])
    return Contributions(
        residual_norms_L=torch.tensor([1.0, 2.0, 3.0]),
        scales=scales,
        all_scores={name: ReferenceTable.from_scores(s) for name, s in scores.items()},
        needed_scores={
            (name, definition): ReferenceTable.from_scores(s[is_needed_TK])
            for name, s in scores.items()
            for definition in definitions
        },
        steps={
            ALL_STEPS: all_BN.sort(dim=-1).values,
            NEEDED_STEPS: needed_BN.sort(dim=-1).values,
        },
    )


class OneDevice(TorchDispatchMode):
    """Every operation takes tensors of one device, as CUDA demands; of `only`, if it is given."""

    def __init__(self, only: str | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.only = only

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        leaves = tree_leaves((args, kwargs))
        devices = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}
        allowed = devices if self.only is None else {self.only}
        assert len(devices) <= 1 and devices <= allowed, f"{func} takes tensors of {devices}"
        return func(*args, **(kwargs or {}))


def changed(candidates: Candidates, change: Callable[[Tensor], Tensor]) -> Candidates:
    """Apply the same change to every tensor of some candidates."""
    return tree_map_only(Tensor, change, candidates)  # type: ignore[no-any-return]


def kept_experts(candidates: Candidates, keep_TK: Tensor) -> Tensor:
    """Bool (T, E): which experts a token keeps, whatever the order of its slots."""
    kept_TE = torch.zeros_like(candidates.router_logits_TE, dtype=torch.bool)
    return kept_TE.scatter(-1, candidates.top_k_index_TK, keep_TK)
