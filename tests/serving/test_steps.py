"""Rules by decode step see exactly the decode tokens of each step that vLLM's scheduler makes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bh_routing.models.load import LoadedModel
from bh_routing.models.routing import route
from bh_routing.nulls.calibration import Calibration
from bh_routing.rules.catalog import make_rule
from bh_routing.serving.layer import ServedLayer
from bh_routing.serving.telemetry import log
from tests.serving.conftest import write_yaml
from tests.serving.offline import complete, engine
from tests.serving.steps import Call, check_calls

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.timeout(1200)]

RULES: list[dict[str, Any]] = [
    {"method": "bh_drop", "alpha": 0.3, "scope": "step_population"},
    {"method": "bh_drop", "alpha": 0.4, "scope": "step_population", "refill": 16},
]
MORE_RULES: list[dict[str, Any]] = [
    {"method": "bh_drop", "alpha": 0.3, "scope": "step"},
    {"method": "oea", "k0": 3},
    {"method": "oea", "k0": 2, "refill": 64},
]


def continue_together(
    demo: LoadedModel, prompts: list[list[int]], max_tokens: int
) -> list[list[int]]:
    """Continue left-padded prompts in one batch with transformers."""
    reversed_BS = pad_sequence(
        [torch.tensor(ids[::-1]) for ids in prompts], batch_first=True, padding_value=1
    )
    ids_BS = reversed_BS.flip(1)
    lengths_B1 = torch.tensor([[len(ids)] for ids in prompts])
    mask_BS = (torch.arange(ids_BS.shape[1]).flip(0) < lengths_B1).long()
    output = demo.model.generate(
        ids_BS, attention_mask=mask_BS, max_new_tokens=max_tokens, min_new_tokens=max_tokens,
        do_sample=False,
    )  # fmt: skip
    found: list[list[int]] = output[:, ids_BS.shape[1] :].tolist()
    return found


@pytest.mark.parametrize(
    "config",
    [*RULES, *(pytest.param(config, marks=pytest.mark.full) for config in MORE_RULES)],
    ids=lambda config: "-".join(map(str, config.values())),
)
def test_eight_requests_generate_the_tokens_of_a_batch_inside_route(
    config: dict[str, Any],
    demo: LoadedModel,
    prompts: list[list[int]],
    served_calibration: Calibration,
    calibration_file: Path,
    checkpoint: str,
    tmp_path: Path,
) -> None:
    content = {"rule": config, "calibration": str(calibration_file)}
    with engine(write_yaml(tmp_path / "config.yaml", content), checkpoint) as llm:
        served = complete(llm, prompts)
    with route(demo.model, make_rule(config), served_calibration) as trace:
        wanted = continue_together(demo, prompts, 24)
    assert served == wanted
    assert float(trace.distinct_experts.float().mean()) < 35


@pytest.fixture
def served_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the plugin logs: vLLM's loggers don't propagate."""
    log.addHandler(caplog.handler)
    yield caplog
    log.removeHandler(caplog.handler)


CACHE_SENTENCE = "--no-enable-prefix-caching turns it off"


def test_staggered_requests_are_decided_by_the_steps_that_they_share(
    prompts: list[list[int]],
    served_calibration: Calibration,
    calibration_file: Path,
    checkpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    served_log: pytest.LogCaptureFixture,
) -> None:
    from vllm import SamplingParams

    calls: list[Call] = []
    layers: dict[int, int] = {}
    decide = ServedLayer.decide

    def record(layer: Any, logits_TE: Tensor, weights_TK: Tensor, index_TK: Tensor) -> Any:
        decided = decide(layer, logits_TE, weights_TK, index_TK)
        number = layers.setdefault(id(layer), len(layers))
        step_T = layer._rows.of(len(index_TK)).step_T.clone()
        calls.append(Call(number, logits_TE, weights_TK, index_TK, *decided, step_T))
        return decided

    monkeypatch.setattr(ServedLayer, "decide", record)
    rule = {"method": "bh_drop", "alpha": 0.3, "scope": "step_population"}
    content = {"rule": rule, "calibration": str(calibration_file)}
    config = write_yaml(tmp_path / "config.yaml", content)
    # A prompt is cut into chunks of at most 16 tokens, which share steps with decode tokens; a last
    # chunk of one token looks like one.
    long = [prompts[0] * 5, [*prompts[1] * 2, 5]]
    arrivals = {0: prompts[0], 1: prompts[3], 2: prompts[1], 3: long[0], 4: long[0][::-1]}
    arrivals |= {6: long[1][:17], 7: prompts[2][:1]}
    lengths = {0: 12, 1: 40, 2: 6, 3: 8, 4: 40, 6: 5, 7: 3}
    # One is cancelled while it decodes, one while its prompt is read.
    cancelled = {5: "4", 8: "1"}
    produced: dict[str, int] = {}
    with engine(config, checkpoint, max_num_batched_tokens=32, enable_prefix_caching=False) as llm:
        steps = 0
        llm_engine = llm.llm_engine
        calls.clear()
        while steps <= max(arrivals) or llm_engine.has_unfinished_requests():
            if steps in arrivals:
                greedy = SamplingParams(temperature=0, max_tokens=lengths[steps], ignore_eos=True)
                llm_engine.add_request(str(steps), {"prompt_token_ids": arrivals[steps]}, greedy)
            if steps in cancelled:
                llm_engine.abort_request([cancelled[steps]])
            for output in llm_engine.step():
                produced[output.request_id] = len(output.outputs[0].token_ids)
            steps += 1
    prefill, decode = check_calls(calls, make_rule(rule), served_calibration)
    assert 1 < produced["1"] < lengths[1]
    assert "4" not in produced
    whole = {str(number): length for number, length in lengths.items() if number not in (1, 4)}
    assert whole.items() <= produced.items()
    assert decode == 6 * sum(length - 1 for length in produced.values())
    first_chunks = sum(len(ids) for number, ids in arrivals.items() if number != 4)
    assert 6 * first_chunks < prefill < 6 * sum(map(len, arrivals.values()))
    assert CACHE_SENTENCE not in served_log.text
    sizes = {int((call.step_T >= 0).sum()) for call in calls}
    assert len(sizes) > 3


def test_chunks_of_prompts_follow_the_prefill_rule(
    prompts: list[list[int]],
    calibration_file: Path,
    checkpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    served_log: pytest.LogCaptureFixture,
) -> None:
    passes: list[tuple[list[int], list[int]]] = []
    decide = ServedLayer.decide

    def record(layer: Any, logits_TE: Tensor, weights_TK: Tensor, index_TK: Tensor) -> Any:
        decided = decide(layer, logits_TE, weights_TK, index_TK)
        is_decode_T = layer._rows.of(len(index_TK)).step_T >= 0
        counts_T = (decided[0] > 0).sum(-1)
        passes.append((counts_T[~is_decode_T].tolist(), counts_T[is_decode_T].tolist()))
        return decided

    monkeypatch.setattr(ServedLayer, "decide", record)
    content = {
        "rule": {"method": "oea", "k0": 2}, "prefill_rule": {"method": "top_k", "k": 5},
    }  # fmt: skip
    batch = [prompts[0], prompts[1] * 6, prompts[2] * 5]
    config = write_yaml(tmp_path / "config.yaml", content)
    with engine(config, checkpoint, max_num_batched_tokens=16, max_num_seqs=4) as llm:
        passes.clear()
        answers = complete(llm, batch, max_tokens=12)
    assert [len(answer) for answer in answers] == [12] * 3
    assert sum(len(prefill) for prefill, _ in passes) == 6 * sum(map(len, batch))
    assert {count for prefill, _ in passes for count in prefill} == {5}
    # A chunk of a prompt shares forward passes with tokens that decode alone, and with two of them.
    assert {len(decode) for prefill, decode in passes if prefill} >= {0, 1, 2}
    assert {tuple(decode) for _, decode in passes if len(decode) == 1} == {(2,)}
    assert {count for _, decode in passes for count in decode} > {2}
    assert CACHE_SENTENCE in served_log.text
