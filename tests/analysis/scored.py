"""Scored documents with known truths, made without any model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bh_routing.results.records import KL_BIN_EDGES, QualityRecord

LAYERS, EXPERTS = 2, 8


def scored_documents(
    config_name: str,
    *,
    documents: int = 42,
    clusters: int | None = None,
    delta: float = 0.02,
    spread: float = 0.02,
    seed: int = 0,
    kept: int = 2,
    rule: Mapping[str, Any] | None = None,
) -> list[QualityRecord]:
    """Documents whose loss per token is `delta` above top-k's, give or take `spread` by cluster.

    `spread` and `delta` both 0 give the reference itself. Lengths are the same for every rule. By
    default the rule is static top-k under names such as `topk_4`, and unknown under others.
    """
    lengths = np.random.default_rng(123).integers(150, 400, documents)
    rng = np.random.default_rng(seed)
    own = rng.normal(0, spread, documents) if spread else np.zeros(documents)
    if rule is None:
        k = config_name.removeprefix("topk_")
        rule = {"method": "top_k", "k": int(k)} if k.isdigit() else {}
    records = []
    for i, tokens in enumerate(lengths.tolist()):
        cluster = i if clusters is None else i % clusters
        shift = float(tokens * (delta + own[cluster])) if delta or spread else 0.0
        same = shift == 0.0
        kl = 0.0 if same else 0.05
        histogram = [0] * (len(KL_BIN_EDGES) + 1)
        histogram[int(np.searchsorted(KL_BIN_EDGES, kl, side="right"))] = tokens
        counts = rng.multinomial(tokens * kept, np.full(EXPERTS, 1 / EXPERTS), LAYERS)
        records.append(
            QualityRecord(
                config_name=config_name,
                rule=dict(rule),
                document=f"document {i:03}",
                document_key=f"hash of {i:03}",
                cluster=f"book {cluster}",
                domain=("prose", "code")[i % 2],
                tokens=tokens,
                nll_sum=3.0 * tokens + shift,
                top_k_nll_sum=3.0 * tokens,
                kl_sum=kl * tokens,
                kl_max=kl * 1.02,
                kl_histogram=histogram,
                same_top1=tokens if same else int(0.9 * tokens),
                delta_p_sum=-0.01 * tokens * (not same),
                delta_p_square_sum=0.0004 * tokens * (not same),
                early_tokens=min(128, tokens),
                early_delta_nll_sum=shift * 128 / tokens,
                experts_sum=tokens * LAYERS * kept,
                units=tokens * LAYERS,
                expert_load=counts.tolist(),
                count_histogram=[[0] * kept + [tokens] for _ in range(LAYERS)],
                jaccard_sum=[0.5 * tokens, 0.25 * tokens],
            )
        )
    return records
