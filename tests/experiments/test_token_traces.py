"""Traces of a real run on the demo model: they show what its experiments counted."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bh_routing.analysis.results import load_results
from bh_routing.experiments.run import run
from bh_routing.models.load import LoadedModel
from bh_routing.report.traces import read_traces, unpack
from bh_routing.results.records import TOKEN_TRACES
from tests.experiments.conftest import TINY_CONFIGS, TINY_PROMPTS, MakeTinySpec

pytestmark = pytest.mark.usefixtures("loaded_demo")


def test_traces_show_what_the_experiments_counted(
    tiny_spec: MakeTinySpec, demo: LoadedModel
) -> None:
    wider = {
        **TINY_CONFIGS,
        "wide": {"method": "bh", "alpha": 0.2, "null": "gaussian", "max_k": 10},
    }
    spec = tiny_spec(configs=wider, token_traces=2)
    run(spec)
    details = load_results(spec.output).details
    traces = read_traces(spec.output)
    assert len(traces) == 6
    for trace in traces:
        slots = unpack(trace)
        counts_TL = slots.kept.sum(axis=2)
        detail = details[trace.config_name, trace.prompt_text]
        np.testing.assert_allclose(counts_TL.mean(axis=0), detail.experts_by_layer, atol=1e-9)
        assert len(trace.tokens) == len(counts_TL)
        assert "".join(trace.tokens).startswith(trace.prompt_text)
        assert trace.slots == (10 if trace.config_name == "wide" else 8)
        np.testing.assert_allclose(slots.weight.sum(axis=2), 1.0, atol=1e-3)
        assert (np.diff(slots.weight, axis=2) <= 0).all()
        has_p = trace.config_name != "topk_8"
        assert np.isfinite(slots.p).all() == has_p


def test_going_on_traces_only_what_is_new(
    tiny_spec: MakeTinySpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny_spec(token_traces=1)
    run(spec)
    before = (spec.output / TOKEN_TRACES).read_text(encoding="utf-8").splitlines()
    traced: list[str] = []
    from bh_routing.experiments import token_traces

    trace_tokens = token_traces.trace_tokens

    def counting(subject: object, cell: object, ids: object) -> object:
        traced.append(cell.prompt.text)  # type: ignore[attr-defined]
        return trace_tokens(subject, cell, ids)  # type: ignore[arg-type]

    monkeypatch.setattr(token_traces, "trace_tokens", counting)
    run(tiny_spec(token_traces=2))
    after = (spec.output / TOKEN_TRACES).read_text(encoding="utf-8").splitlines()
    assert traced == [TINY_PROMPTS[1]["text"]] * 2
    assert set(before) < set(after)
    assert {json.loads(line)["config_name"] for line in after} == set(TINY_CONFIGS)
    run(tiny_spec(token_traces=0))
    assert not (spec.output / TOKEN_TRACES).exists()
