"""Fit reference distributions of nulls on text, in one pass of the unmodified model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bh_routing.engine.observe import SlotObserver, join_windows, summarize
from bh_routing.engine.steps import step_tables
from bh_routing.engine.texts import Document, as_documents, passage_hashes, text_sha256
from bh_routing.engine.windows import spread_tokens
from bh_routing.errors import CalibrationError, InputError
from bh_routing.models.capture import evaluating, text_config
from bh_routing.models.routers import Routers, find_routers, model_fingerprint, reject_routed
from bh_routing.models.sites import Callback, Proposal, RouterSite, fingerprint_routers
from bh_routing.nulls.base import ReferenceTable, RouterPass
from bh_routing.nulls.calibration import Calibration
from bh_routing.nulls.catalog import get_null, is_calibrated
from bh_routing.nulls.contributions import OF_SLOTS, STEPS, Contributions, needed_null
from bh_routing.nulls.cut_offs import OBSERVED_TOKENS
from bh_routing.nulls.reservoir import Reservoir, reservoir_capacity, row_capacity
from bh_routing.rules.base import Rule
from bh_routing.rules.benjamini_hochberg import BenjaminiHochberg
from bh_routing.rules.catalog import name_rules


def calibrate(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str | Document],
    *,
    rules: Iterable[Rule] | Mapping[str, Rule] | None = None,
    nulls: Sequence[str] = (),
    max_tokens: int = 16_384,
    seed: int = 0,
) -> Calibration:
    """Fit what rules need, layer by layer, on calibration text.

    Args:
        model: a transformers model with routers, not inside `route`.
        tokenizer: its tokenizer.
        texts: texts or documents, diverse ones for a better reference; duplicates count once.
        rules: all that they need is fitted; without rules and nulls, what `bh` needs.
        nulls: names of further nulls to fit; "needed" observes each slot's contribution, which
            doubles the time, "needed_by_loss" its gradient too, and "needed_steps" also draws
            decode steps from the observed slots.
        max_tokens: total number of tokens, spread evenly over the documents.
        seed: seed of the sampling that keeps a table at its fixed size.
    Returns:
        A new calibration, valid for this model only.
    Raises:
        InputError: there is no text, an unknown null, or no rule that needs a calibration.
        ModelError: the model has no routers, or they are inside `route`.
        CalibrationError: router logits aren't finite; the message names the router.
    """
    nulls = _nulls_to_fit(rules, nulls)
    routers = find_routers(model)
    reject_routed(site.module for site in routers.sites)
    text_only = [document.text for document in as_documents(texts)]
    read = tokenize_distinct(tokenizer, text_only)
    documents = list(read.values())
    tabled = [name for name in nulls if name not in OF_SLOTS]
    # Seeded by layer, not by null: a table doesn't depend on the nulls fitted with it.
    reservoirs = {
        (name, site.layer): _reservoir(name, routers.num_experts, (seed, 0, site.layer))
        for name in tabled
        for site in routers.sites
    }
    taken = spread_tokens([len(ids) for ids in documents], max_tokens)
    windows = cut_windows(model, documents, taken)
    logits = {
        site.layer: Reservoir(OBSERVED_TOKENS, (seed, 1, site.layer), site.facts.num_experts)
        for site in routers.sites
    }
    with ExitStack() as undo, evaluating(model):
        for site in routers.sites:
            undo.callback(site.watch(_observe(site, tabled, reservoirs, logits[site.layer])))
        contributions = _read(model, routers, windows, set(nulls), seed)
    return Calibration(
        tables={
            null: tuple(_table(null, reservoirs[null, site.layer]) for site in routers.sites)
            for null in tabled
        },
        observed={
            null: tuple(get_null(null).score(logits[site.layer].rows()) for site in routers.sites)
            for null in {**dict.fromkeys(tabled), "gaussian": None}
        },
        contributions=contributions,
        num_layers=len(routers.sites),
        num_experts=routers.num_experts,
        model_top_k=routers.model_top_k,
        model_fingerprint=model_fingerprint(model),
        router_fingerprint=_router_fingerprint(routers),
        text_sha256=text_sha256(text_only),
        passages=torch.from_numpy(passage_hashes(_texts_read(tokenizer, read, taken))),
        num_tokens=sum(taken),
        num_documents=len(documents),
        seed=seed,
        table_capacity=reservoir_capacity(routers.num_experts),
    )


def _router_fingerprint(routers: Routers) -> str:
    gates = [
        (weight, site.module._parameters.get("bias"))
        for site in routers.sites
        if (weight := site.linear_gate()) is not None
    ]
    return fingerprint_routers(gates) if len(gates) == len(routers.sites) else ""


def _nulls_to_fit(
    rules: Iterable[Rule] | Mapping[str, Rule] | None, nulls: Sequence[str]
) -> list[str]:
    """Return the names of what is to be fitted, each once, or raise InputError."""
    given = [] if rules is None else list(name_rules(rules).values())
    if not given and not nulls:
        return [BenjaminiHochberg.null]
    for name in nulls:
        is_calibrated(name)
    needed = [null for rule in given if (null := rule.required_null) is not None]
    if not needed and not nulls:
        methods = ", ".join(dict.fromkeys(rule.method for rule in given))
        raise InputError(f"no calibration is needed by {methods}; use the rules without one")
    return list(dict.fromkeys([*nulls, *needed]))


def tokenize_distinct(tokenizer: Any, texts: Iterable[str]) -> dict[str, list[int]]:
    """Return the token ids of each text, without empty ones; InputError if none is left."""
    read = {text: ids for text in texts if (ids := tokenizer(text, verbose=False)["input_ids"])}
    if not read:
        raise InputError("the calibration text is empty; give at least one document")
    return read


def _texts_read(
    tokenizer: Any, documents: Mapping[str, list[int]], taken: Sequence[int]
) -> Iterator[str]:
    """Yield the part of each document that was read, as text."""
    for (text, ids), length in zip(documents.items(), taken, strict=True):
        if length == len(ids):
            yield text
        else:
            yield tokenizer.decode(ids[:length], skip_special_tokens=True)


def cut_windows(
    model: Any, documents: Sequence[list[int]], taken: Sequence[int]
) -> list[tuple[int, Tensor]]:
    """Cut the start of each document, by number, into windows within the model's context."""
    context = int(getattr(text_config(model), "max_position_embeddings", None) or 2048)
    return [
        (number, torch.tensor([ids[start : min(start + context, length)]]))
        for number, (ids, length) in enumerate(zip(documents, taken, strict=True))
        for start in range(0, length, context)
    ]


def _reservoir(null: str, num_experts: int, seed: Sequence[int]) -> Reservoir:
    if get_null(null).by_expert:
        return Reservoir(row_capacity(num_experts), seed, row_length=num_experts)
    return Reservoir(reservoir_capacity(num_experts), seed)


def _table(null: str, reservoir: Reservoir) -> ReferenceTable:
    if get_null(null).by_expert:
        return ReferenceTable.by_expert(reservoir.rows())
    return reservoir.table()


def _observe(
    site: RouterSite,
    nulls: Sequence[str],
    reservoirs: Mapping[tuple[str, int], Reservoir],
    logits: Reservoir,
) -> Callback:
    def observe(proposal: Proposal) -> None:
        scores_TE = proposal.scores_TE.detach()
        if not bool(torch.isfinite(scores_TE).all()):
            raise CalibrationError(
                f"router {site.name} gave NaN or infinite logits on the calibration text; "
                "the checkpoint is damaged or the dtype too narrow: try float32"
            )
        hidden_TH = proposal.hidden_TH.detach()
        gate_EH = site.linear_gate()
        bias_E = None if gate_EH is None else getattr(site.module, "bias", None)
        seen = RouterPass(scores_TE, proposal.top_k_index_TK, hidden_TH, gate_EH, bias_E)
        logits.add(scores_TE)
        for null in nulls:
            reservoirs[null, site.layer].add(get_null(null).reference_of(seen))

    return observe


def _read(
    model: Any,
    routers: Routers,
    windows: Sequence[tuple[int, Tensor]],
    nulls: set[str],
    seed: int,
) -> Contributions | None:
    """Run the model over the windows; observe slots and losses only if a null needs them."""
    bar = tqdm(windows, desc="calibration", unit="window")
    if not nulls & set(OF_SLOTS):
        with torch.inference_mode():
            for _, window in bar:
                model(window.to(model.device), use_cache=False, logits_to_keep=1)
        return None
    observer = SlotObserver(
        model, routers, by_loss=bool(nulls & {needed_null("sensitivity", "loss"), STEPS})
    )
    try:
        seen = [(number, observer.read(window.to(model.device))) for number, window in bar]
    finally:
        observer.close()
    capacity = reservoir_capacity(routers.num_experts)
    layers = join_windows([slots for _, slots in seen])
    contributions = summarize(layers, routers.num_experts, capacity, seed)
    if STEPS not in nulls:
        return contributions
    lengths = [(number, len(slots[0].experts)) for number, slots in seen if slots]
    steps = step_tables(
        layers,
        routers.model_top_k,
        contributions.scales["sensitivity"],
        torch.cat([torch.full((length,), number) for number, length in lengths]),
        capacity=capacity,
        seed=seed,
    )
    return replace(contributions, steps=steps)
