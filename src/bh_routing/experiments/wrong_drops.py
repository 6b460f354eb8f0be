"""Measure how often a dropped slot mattered, for rules with an alpha, on held-out text.

One pass of the unmodified model over the text. Each rule decides on the router's proposals and is
judged by the true contribution of each slot: a slot mattered if that is above the threshold from
the calibration text, by the rule's own definition. BH-select tests another hypothesis: there,
"wrong" is a selected slot that didn't matter by norm, which shows that its alpha isn't a bound on
that. Axes: S positions, T tokens, K slots, G blocks, R rules, D documents, F fields of Counts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from bh_routing.engine.observe import LayerSlots, SlotObserver
from bh_routing.engine.windows import TokenizedDocument
from bh_routing.errors import CalibrationError
from bh_routing.models.routers import find_routers
from bh_routing.models.routing import BoundRule, bind_rule
from bh_routing.models.sites import Proposal
from bh_routing.nulls.calibration import Calibration
from bh_routing.rules.base import Rule
from bh_routing.rules.benjamini_hochberg import BenjaminiHochberg
from bh_routing.rules.drop import BenjaminiHochbergDrop
from bh_routing.rules.plan import Candidates, Rows
from bh_routing.stats.clustered import estimate_ratio

ALPHAS: Final = (0.01, 0.02, 0.05, 0.10, 0.20, 0.40)
"""The usual levels, then beyond those that leave 5 and 4 of 8 experts (about 0.16 and 0.28). Half
of all slots matter by definition, so a bound of 0.5 or more is void."""
WINDOW: Final = 1024
ALL_DOMAINS: Final = "all"

log = logging.getLogger(__name__)

Read = Callable[[Tensor], list[tuple[Candidates, LayerSlots]]]


class Judged(NamedTuple):
    """A rule, and the calibration for its decisions and their judgement."""

    name: str
    rule: Rule
    calibration: Calibration


class Counts(NamedTuple):
    """Sums over tokens and layers, as scalars or arrays."""

    units: Any
    """Token-layer pairs."""
    kept: Any
    chosen: Any
    """Slots whose hypothesis the rule rejected: dropped slots, or BH-select's selected slots."""
    wrong: Any
    mattered: Any
    token_shares: Any
    """Sum over units of wrong / chosen, 0 if none is chosen."""
    blocks: Any
    """Families of tests: tokens, or the blocks of scope "block"."""
    block_shares: Any
    """Sum over blocks of wrong / chosen, 0 if none is chosen."""


def count(rule: Rule, keep_TK: Tensor, mattered_TK: Tensor) -> Tensor:
    """Count the decisions in one layer of one window: the fields of Counts, float64, shape (F,)."""
    if isinstance(rule, BenjaminiHochbergDrop):
        chosen_TK, wrong_TK = ~keep_TK, ~keep_TK & mattered_TK
    else:
        chosen_TK, wrong_TK = keep_TK, keep_TK & ~mattered_TK
    by_block = isinstance(rule, BenjaminiHochbergDrop) and rule.scope == "block"
    size = rule.block_tokens if isinstance(rule, BenjaminiHochbergDrop) and by_block else 1
    chosen_T, wrong_T = chosen_TK.sum(-1).double(), wrong_TK.sum(-1).double()
    chosen_G, wrong_G = (
        torch.stack([block.sum() for block in column_T.split(size)]) if by_block else column_T
        for column_T in (chosen_T, wrong_T)
    )
    counts = Counts(
        units=torch.tensor(len(chosen_T)),
        kept=keep_TK.sum(),
        chosen=chosen_T.sum(),
        wrong=wrong_T.sum(),
        mattered=mattered_TK.sum(),
        token_shares=(wrong_T / chosen_T.clamp_min(1)).sum(),
        blocks=torch.tensor(len(chosen_G)),
        block_shares=(wrong_G / chosen_G.clamp_min(1)).sum(),
    )
    return torch.stack([value.to(keep_TK.device, torch.float64) for value in counts])


@contextmanager
def reader(model: Any) -> Iterator[Read]:
    """Yield a function from a window (1, S) to each layer's proposals and true slots."""
    routers = find_routers(model)
    device = model.device
    scores: list[Tensor] = []

    def keep(proposal: Proposal) -> None:
        scores.append(proposal.scores_TE.detach())

    with ExitStack() as undo:
        for site in routers.sites:
            undo.callback(site.watch(keep))
        observer = SlotObserver(model, routers, by_loss=True)
        undo.callback(observer.close)

        def read(ids_1S: Tensor) -> list[tuple[Candidates, LayerSlots]]:
            scores.clear()
            is_real_1S = torch.ones_like(ids_1S, dtype=torch.bool, device=device)
            rows = Rows.of_batch(is_real_1S, torch.zeros_like(is_real_1S))
            seen = []
            for scores_TE, host in zip(scores, observer.read(ids_1S.to(device)), strict=False):
                slots = LayerSlots(*(column.to(device) for column in host))
                proposed = Candidates(scores_TE, slots.experts, slots.weights, rows=rows)
                seen.append((proposed, slots))
            return seen

        yield read


def judge(
    model: Any, text: Sequence[TokenizedDocument], judged: Sequence[Judged]
) -> NDArray[np.float64]:
    """Count every rule's decisions on every document, shape (D, R, F)."""
    bound = [bind_rule(model, rule, calibration) for _, rule, calibration in judged]
    counts_D = []
    with reader(model) as read:
        for document in tqdm(text, desc="wrong drops", unit="document"):
            counts_RF = torch.zeros(len(judged), len(Counts._fields), dtype=torch.float64)
            for start in range(0, len(document.ids), WINDOW):
                seen = read(torch.tensor([document.ids[start : start + WINDOW]]))
                for layer, (candidates, slots) in enumerate(seen):
                    counts_RF += _count_all(judged, bound, layer, candidates, slots)
            counts_D.append(counts_RF)
    return torch.stack(counts_D).numpy()


@torch.no_grad()
def _count_all(
    judged: Sequence[Judged],
    bound: Sequence[BoundRule],
    layer: int,
    candidates: Candidates,
    slots: LayerSlots,
) -> Tensor:
    rows = []
    for (_, rule, calibration), ready in zip(judged, bound, strict=True):
        assert calibration.contributions is not None  # made with "needed_by_loss"
        definition = rule.needed if isinstance(rule, BenjaminiHochbergDrop) else "norm"
        mattered_TK = slots.truth(definition) > calibration.contributions.cuts[definition]
        rows.append(count(rule, ready.selectors[layer](candidates), mattered_TK))
    return torch.stack(rows).cpu()


def share(values: Any, weights: Any, clusters: Sequence[str]) -> dict[str, float | None]:
    """Return a ratio over documents with its 95 % interval over clusters, clipped to [0, 1]."""
    if not np.any(weights):
        return {"estimate": None, "low": None, "high": None}
    ratio = estimate_ratio(values, weights, clusters)
    ends = (float(np.clip(end[0], 0, 1)) for end in ratio.interval(0.95))
    low, high = (end if np.isfinite(end) else None for end in ends)
    return {"estimate": float(ratio.estimate_R[0]), "low": low, "high": high}


def describe(
    item: Judged, counts_DF: NDArray[np.float64], text: Sequence[TokenizedDocument], domain: str
) -> dict[str, Any]:
    """Return one row: a rule on the documents of one domain, or of all."""
    chosen = [i for i, d in enumerate(text) if domain in (ALL_DOMAINS, d.domain)]
    clusters = [text[i].cluster for i in chosen]
    counts = Counts(*counts_DF[chosen].T)
    drops = isinstance(item.rule, BenjaminiHochbergDrop)
    share_mattered = counts.mattered.sum() / (counts.units.sum() * item.calibration.model_top_k)
    return {
        "variant": item.name,
        "wrong": "dropped though it mattered" if drops else "selected though it didn't matter",
        "alpha": getattr(item.rule, "alpha", None),
        "domain": domain,
        "clusters": len(set(clusters)),
        "mean_experts": counts.kept.sum() / counts.units.sum(),
        "share_mattered": share_mattered,
        "per_token": share(counts.token_shares, counts.units, clusters),
        "per_block": share(counts.block_shares, counts.blocks, clusters),
        "pooled": share(counts.wrong, counts.chosen, clusters),
    }


def judge_rules(
    model: Any, text: Sequence[TokenizedDocument], calibration: Calibration
) -> list[dict[str, Any]]:
    """Judge every rule with an alpha, at every alpha that the calibration can resolve.

    Args:
        model: a transformers model that gives gradients, not inside `route`.
        text: held-out documents.
        calibration: fitted with the null distributions "background" and "needed_by_loss".
    Returns:
        A row per rule, alpha and domain, after one of all domains: `describe`.
    Raises:
        CalibrationError: the model gives no gradients.
    """
    judged = variants(calibration, model)
    counts_DRF = judge(model, text, judged)
    domains = (ALL_DOMAINS, *sorted({document.domain for document in text}))
    return [
        describe(item, counts_DRF[:, number], text, domain)
        for number, item in enumerate(judged)
        for domain in domains
    ]


def variants(calibration: Calibration, model: Any) -> list[Judged]:
    """Return all rules with an alpha, at every alpha that the calibration can resolve."""
    named: dict[str, Callable[[float], Rule]] = {}
    for statistic in ("sensitivity", "contribution"):
        for needed in ("norm", "loss"):
            for scope in ("token", "block", "population"):
                named[f"bh_drop {scope}, {statistic}, {needed}"] = partial(
                    BenjaminiHochbergDrop,
                    scope=scope,
                    statistic=statistic,
                    needed=needed,
                )
    selects = {"background": ("bh", "by", "storey"), "gaussian": ("bh",)}
    for null, procedures in selects.items():
        for procedure in procedures:
            named[f"bh {null}, {procedure}"] = partial(
                BenjaminiHochberg,
                null=null,
                procedure=procedure,  # type: ignore[arg-type]
            )
    found = []
    for name, make in named.items():
        for alpha in ALPHAS:
            try:
                bind_rule(model, make(alpha), calibration)
            except CalibrationError as error:
                log.info("left out: %s at %g: %s", name, alpha, error)
                continue
            found.append(Judged(name, make(alpha), calibration))
    return found
