"""lm-eval under a rule, beside lm-eval's own Hugging Face model."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from bh_routing.demo import demo_folder
from bh_routing.engine.calibrate import calibrate
from bh_routing.engine.score import score
from bh_routing.engine.texts import Document, packaged_documents
from bh_routing.engine.windows import tokenize_documents
from bh_routing.errors import InputError
from bh_routing.experiments.defaults import LOCAL_TASKS
from bh_routing.integrations.lm_eval import ExpertUse, RoutedModel, task_folder
from bh_routing.models.load import LoadedModel
from bh_routing.models.routing import route
from bh_routing.nulls.calibration import Calibration
from bh_routing.rules.benjamini_hochberg import BenjaminiHochberg
from bh_routing.rules.drop import BenjaminiHochbergDrop
from bh_routing.rules.fixed import TopK

LIMIT = 3
BATCH = 4
MODERATE = BenjaminiHochberg(alpha=0.05, max_k=8, null="background")
PROMPTS = ("The king", "Once upon a time there lived in a small house by the river a", "In")


@pytest.fixture(scope="module")
def tasks() -> TaskManager:
    return TaskManager(include_path=str(task_folder()), include_defaults=False)


@pytest.fixture(scope="module")
def stock() -> HFLM:
    return HFLM(pretrained=str(demo_folder()), dtype="float32", device="cpu", batch_size=BATCH)


@pytest.fixture(scope="module")
def stock_results(stock: HFLM, tasks: TaskManager) -> dict[str, Any]:
    return evaluate(stock, tasks)


@pytest.fixture(scope="module")
def top_k_results(tasks: TaskManager) -> dict[str, Any]:
    """By name, as somebody who lives in lm-eval would."""
    arguments = {"pretrained": "demo", "method": "topk", "k": 8, "dtype": "float32"}
    return evaluate("bh_routing", tasks, model_args=arguments, batch_size=BATCH, device="cpu")


@pytest.fixture(scope="module")
def moderate_results(
    demo: LoadedModel, demo_calibration: Calibration, tasks: TaskManager
) -> dict[str, Any]:
    return evaluate(routed(demo, demo_calibration), tasks)


def evaluate(model: Any, tasks: TaskManager, **options: Any) -> dict[str, Any]:
    results: dict[str, Any] = lm_eval.simple_evaluate(
        model,
        tasks=list(LOCAL_TASKS),
        limit=LIMIT,
        bootstrap_iters=0,
        task_manager=tasks,
        **options,
    )
    return results


def routed(demo: LoadedModel, calibration: Calibration, batch_size: int = BATCH) -> RoutedModel:
    return RoutedModel(demo, rule=MODERATE, calibration=calibration, batch_size=batch_size)


def log_likelihoods(results: dict[str, Any], task: str) -> list[float]:
    return [
        float(np.ravel(answer)[0])
        for sample in results["samples"][task]
        for answer in sample["filtered_resps"]
    ]


def scores(results: dict[str, Any], task: str) -> dict[str, float]:
    return {k: v for k, v in results["results"][task].items() if isinstance(v, float)}


@pytest.mark.parametrize("task", LOCAL_TASKS)
def test_the_models_own_top_k_scores_as_the_stock_model_does(
    task: str, stock_results: dict[str, Any], top_k_results: dict[str, Any]
) -> None:
    expected = log_likelihoods(stock_results, task)
    assert len(expected) == LIMIT * (4 if task == "bh_choice" else 1)
    assert log_likelihoods(top_k_results, task) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert scores(top_k_results, task) == pytest.approx(scores(stock_results, task), rel=1e-6)


@pytest.mark.parametrize("task", LOCAL_TASKS)
def test_another_rule_changes_the_answers(
    task: str, top_k_results: dict[str, Any], moderate_results: dict[str, Any]
) -> None:
    own, ruled = (
        np.array(log_likelihoods(results, task)) for results in (top_k_results, moderate_results)
    )
    assert np.abs(own - ruled).min() > 1e-3


def test_the_results_say_which_rule_and_how_many_experts(
    top_k_results: dict[str, Any], moderate_results: dict[str, Any]
) -> None:
    own, ruled = (r["config"]["bh_routing"] for r in (top_k_results, moderate_results))
    assert own["mean_experts"] == 8
    assert 1 < ruled["mean_experts"] < 8
    assert ruled["rule"]["method"] == "bh"
    assert ruled["rule"]["alpha"] == 0.05
    assert own["tokens"] == ruled["tokens"]
    assert own["calibration_fingerprint"] is None
    assert len(ruled["calibration_fingerprint"]) == 64


def requests(strings: Sequence[tuple[Any, ...]], kind: Any) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=arguments, idx=i)
        for i, arguments in enumerate(strings)
    ]


@pytest.mark.parametrize("rule", [TopK(8), MODERATE], ids=["top_k", "bh"])
def test_rolling_log_likelihood_equals_our_own_scoring(
    rule: TopK | BenjaminiHochberg, demo: LoadedModel, demo_calibration: Calibration
) -> None:
    window = 96
    # Up to one window, and several with a part of one at the end.
    texts = [d.text[: 300 * (i + 1)] for i, d in enumerate(packaged_documents("evaluation")[:4])]
    model = RoutedModel(demo, rule=rule, calibration=demo_calibration, max_length=window)
    theirs = model.loglikelihood_rolling(requests([(t,) for t in texts], "loglikelihood_rolling"))
    documents = [Document(str(i), text, str(i), "") for i, text in enumerate(texts)]
    records = score(
        demo.model,
        demo.tokenizer,
        tokenize_documents(demo.tokenizer, documents, None),
        {"rule": rule},
        demo_calibration,
        window=window,
        stride=window,
    )
    ours = {record.document: record.nll_sum for record in records}
    assert [ours[str(i)] for i in range(len(texts))] == pytest.approx(
        [-value for value in theirs], rel=1e-5
    )


def test_padding_changes_neither_counts_nor_answers(
    demo: LoadedModel, demo_calibration: Calibration
) -> None:
    texts = [(d.text[: 80 * (i + 1)],) for i, d in enumerate(packaged_documents("evaluation")[:4])]
    padded, alone = (routed(demo, demo_calibration, batch_size=size) for size in (4, 1))
    values = [
        model.loglikelihood_rolling(requests(texts, "loglikelihood_rolling"))
        for model in (padded, alone)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert padded.expert_use == alone.expert_use
    assert padded.expert_use.tokens == sum(
        len(demo.tokenizer(text)["input_ids"]) for (text,) in texts
    )


def test_experts_of_a_text_are_those_that_route_counts(
    demo: LoadedModel, demo_calibration: Calibration
) -> None:
    text = packaged_documents("evaluation")[0].text[:400]
    model = routed(demo, demo_calibration)
    model.loglikelihood_rolling(requests([(text,)], "loglikelihood_rolling"))
    ids = [demo.tokenizer.eos_token_id, *demo.tokenizer(text)["input_ids"]][:-1]
    with route(demo.model, MODERATE, demo_calibration) as trace, torch.inference_mode():
        demo.model(torch.tensor([ids]))
    assert model.expert_use == ExpertUse(
        tokens=len(ids),
        units=trace.expert_counts.numel(),
        experts_sum=int(trace.expert_counts.sum()),
    )


@pytest.mark.parametrize("batch_size", [1, 3])
def test_generation_runs_under_the_rule_and_counts_prompts_and_fed_back_tokens(
    batch_size: int, demo: LoadedModel, demo_calibration: Calibration
) -> None:
    model = routed(demo, demo_calibration, batch_size=batch_size)
    arguments = [(prompt, {"until": ["\n\n\n"], "max_gen_toks": 5}) for prompt in PROMPTS]
    answers = model.generate_until(requests(arguments, "generate_until"))
    expected, sums = [], []
    for prompt in PROMPTS:
        inputs = demo.tokenizer(prompt, return_tensors="pt")
        with route(demo.model, MODERATE, demo_calibration) as trace:
            output = demo.model.generate(**inputs, max_new_tokens=5, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        assert demo.tokenizer.eos_token_id not in new
        expected.append(demo.tokenizer.decode(new))
        sums.append((trace.expert_counts.shape[0], int(trace.expert_counts.sum())))
    assert answers == expected
    assert model.expert_use.tokens == sum(tokens for tokens, _ in sums)
    assert model.expert_use.experts_sum == sum(experts for _, experts in sums)


def test_tokens_after_a_rows_end_of_text_do_not_count(demo: LoadedModel) -> None:
    model = RoutedModel(demo, rule=TopK(8), batch_size=2)
    inputs = torch.tensor([[5, 6], [7, 8]])
    with route(demo.model, TopK(8)) as trace:
        for step in (inputs, inputs[:, :1], inputs[:, :1]):
            demo.model(step)
    end = demo.tokenizer.eos_token_id
    generated = torch.tensor([[9, end, end], [9, 9, 9]])
    model._count_generation(trace, torch.ones(2, 2, dtype=torch.bool), generated)
    # Two prompts of two; row 0 feeds back one token before its end, row 1 both but the last.
    assert model.expert_use.tokens == 4 + 1 + 2
    assert model.expert_use.mean_experts == 8


def test_several_beams_are_refused_rather_than_miscounted(demo: LoadedModel) -> None:
    model = RoutedModel(demo, rule=TopK(8))
    options = {"until": ["\n"], "max_gen_toks": 3, "num_beams": 2, "do_sample": False}
    with pytest.raises(InputError, match="set num_beams and num_return_sequences to 1"):
        model.generate_until(requests([("The king", options)], "generate_until"))


def test_the_model_is_left_as_it_was(demo: LoadedModel, demo_calibration: Calibration) -> None:
    ids = torch.tensor([[5, 6, 7]])
    before = demo.model(ids).logits
    routed(demo, demo_calibration).loglikelihood(requests([("a", " b")], "loglikelihood"))
    assert torch.equal(demo.model(ids).logits, before)


def test_a_tokenizer_that_has_no_padding_is_left_without(demo: LoadedModel) -> None:
    tokenizer = copy.deepcopy(demo.tokenizer)
    tokenizer.pad_token = None
    model = RoutedModel(LoadedModel(demo.model, tokenizer), rule=TopK(8))
    assert model.tokenizer.pad_token is not None
    assert tokenizer.pad_token is None


def test_a_rule_that_needs_a_calibration_makes_its_own(
    demo: LoadedModel, demo_calibration: Calibration
) -> None:
    pair = requests([("The king", " and the queen")], "loglikelihood")
    by_itself = RoutedModel(demo, method="bh", alpha=0.05)
    assert by_itself.loglikelihood(pair) == routed(demo, demo_calibration).loglikelihood(pair)


def test_a_calibration_file_is_taken(
    demo: LoadedModel, demo_calibration: Calibration, tmp_path: Path
) -> None:
    demo_calibration.save(tmp_path / "demo.safetensors")
    model = RoutedModel(
        demo, method="bh", alpha=0.05, calibration=str(tmp_path / "demo.safetensors")
    )
    info = model.get_model_info()["bh_routing"]
    assert info["calibration_fingerprint"] == demo_calibration.fingerprint
    assert math.isnan(info["mean_experts"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "bh", "alpha": 0.05, "max_kk": 4}, "did you mean 'max_k'"),
        ({"alpha": 0.05}, "needs a method"),
        ({"rule": TopK(8), "k": 8}, "not both"),
        ({"method": "topk", "k": 65}, "64"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: dict[str, Any], message: str, demo: LoadedModel
) -> None:
    with pytest.raises(InputError, match=message):
        RoutedModel(demo, **arguments)


def test_blocks_of_a_request_do_not_depend_on_the_batch(demo: LoadedModel) -> None:
    rule = BenjaminiHochbergDrop(0.3, scope="block", statistic="contribution")
    texts = [document.text for document in packaged_documents("calibration")]
    calibration = calibrate(demo.model, demo.tokenizer, texts, nulls=("needed",), max_tokens=6_000)
    ids = demo.tokenizer(texts[0])["input_ids"]
    requests = [(("", ""), ids[10 * n : 10 * n + 5 + 20 * n], ids[:3]) for n in range(3)]
    means = []
    for batch_size in (1, 3):
        model = RoutedModel(demo, rule=rule, calibration=calibration, batch_size=batch_size)
        model._loglikelihood_tokens(requests, disable_tqdm=True)
        means.append(model.expert_use.mean_experts)
    assert means[0] == pytest.approx(means[1], abs=1e-3)
