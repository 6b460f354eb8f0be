"""Results folders with everything that the page can show, hand-made and seeded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bh_routing.experiments.token_traces import pack
from bh_routing.results.records import TOKEN_TRACES, ExperimentDetail, TokenTrace
from tests.report.conftest import FillFolder, MakeResults, build_quality

LAYERS, EXPERTS, SLOTS = 2, 64, 8
TEXTS = ["The", "capital", "of", "France", "is", "Paris", ",", "they", "say"]

FillPage = Callable[[pd.DataFrame], Path]


def detail_of(kept_TLK: np.ndarray, expert_TLK: np.ndarray) -> ExperimentDetail:
    """What a run's journal would hold of these slots."""
    counts_TL = kept_TLK.sum(axis=2)
    return ExperimentDetail(
        experts_by_layer=counts_TL.mean(axis=0).tolist(),
        count_histogram=[np.bincount(c_T, minlength=SLOTS + 1).tolist() for c_T in counts_TL.T],
        expert_load=[
            np.bincount(expert_TLK[:, layer][kept_TLK[:, layer]], minlength=EXPERTS).tolist()
            for layer in range(LAYERS)
        ],
    )


@pytest.fixture
def fill_page(fill_folder: FillFolder) -> FillPage:
    """Write the rows, a journal, token traces and a summary with quality."""

    def fill(results: pd.DataFrame) -> Path:
        folder = fill_folder(results)
        rng = np.random.default_rng(3)
        journal, traces = [], []
        for _, row in results.iterrows():
            mean = row["avg_experts_per_token"]
            shape = (len(TEXTS), LAYERS, SLOTS)
            expert_TLK = rng.permuted(np.tile(np.arange(EXPERTS), (*shape[:2], 1)), axis=2)
            expert_TLK = expert_TLK[..., :SLOTS]
            kept_TLK = np.arange(SLOTS) < rng.integers(1, max(2, round(2 * mean)), (*shape[:2], 1))
            weight_TLK = -np.sort(-rng.dirichlet(np.ones(SLOTS), shape[:2]), axis=2)
            record = {k: None if v != v else v for k, v in row.items()}
            detail = asdict(detail_of(kept_TLK, expert_TLK))
            journal.append(json.dumps({"record": record, "detail": detail}))
            trace = TokenTrace(
                key="k",
                config_name=row["config_name"],
                prompt_text=row["prompt_text"],
                tokens=[f"{text} " for text in TEXTS],
                num_prompt_tokens=5,
                layers=LAYERS,
                slots=SLOTS,
                model_top_k=SLOTS,
                planes=pack(expert_TLK, kept_TLK, weight_TLK, weight_TLK / 10),
            )
            traces.append(json.dumps(asdict(trace)))
        (folder / "records.jsonl").write_text("\n".join(journal) + "\n", encoding="utf-8")
        (folder / TOKEN_TRACES).write_text("\n".join(traces) + "\n", encoding="utf-8")
        summary = json.dumps({"quality": build_quality()})
        (folder / "analysis_summary.json").write_text(summary, encoding="utf-8")
        return folder

    return fill


@pytest.fixture
def page_folder(fill_page: FillPage, make_results: MakeResults) -> Path:
    """The standard run with all that a page can show."""
    return fill_page(make_results())
