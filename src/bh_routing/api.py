"""The jobs of the command line as functions of a loaded model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from bh_routing.analysis.quality import QualityOptions, quality_table
from bh_routing.analysis.sweep import SweepTables, compare_points
from bh_routing.analysis.sweep_records import SWEEP, make_sweep
from bh_routing.engine.calibrate import calibrate
from bh_routing.engine.expert_scores import Score
from bh_routing.engine.generate import RoutedGeneration, generate_batch
from bh_routing.engine.score import check_steps
from bh_routing.engine.texts import Document, as_documents, packaged_documents
from bh_routing.errors import InputError
from bh_routing.experiments import defaults
from bh_routing.experiments.calibrating import check_calibration_overlap, check_overlap
from bh_routing.experiments.evaluate import score_loaded
from bh_routing.experiments.experiment import Subject
from bh_routing.experiments.preparation import check_prompts
from bh_routing.experiments.prune import prune as prune_checkpoint
from bh_routing.experiments.quality_text import prepare_text
from bh_routing.experiments.search import KnobSearch, check_budgets, check_fractions
from bh_routing.experiments.settings import Goal
from bh_routing.experiments.specs import DISTINCT_NEEDS_STEPS, PruneSpec, make_spec
from bh_routing.experiments.sweep import curve_goals, describe_references, score_settings
from bh_routing.experiments.variants import variants_of
from bh_routing.models.routers import describe_model
from bh_routing.models.routing import bind_rule
from bh_routing.nulls.calibration import Calibration
from bh_routing.results.records import QualityRecord
from bh_routing.rules.base import Rule, check_count
from bh_routing.rules.catalog import name_rules
from bh_routing.stats.clustered import NON_INFERIORITY_MARGIN


def evaluate(
    model: Any,
    tokenizer: Any,
    rules: Mapping[str, Rule] | Iterable[Rule],
    texts: Sequence[str | Document],
    calibration: Calibration | None = None,
    *,
    max_tokens: int | None = None,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    decode_batch: int | None = None,
    margin: float = NON_INFERIORITY_MARGIN,
    seed: int = defaults.SEED,
) -> pd.DataFrame:
    """Compare rules with the model's own top-k on the same tokens, as `bh-routing evaluate` does.

    Args:
        model: a transformers model with routers, not inside `route`.
        tokenizer: its tokenizer.
        rules: name -> rule, or rules alone, which are then named after their fields.
        texts: held-out texts or documents; the documents' clusters are the units of the intervals.
        calibration: what `calibrate` returned; needed if a rule needs one.
        max_tokens: scored tokens in total, spread over the documents; None: all.
        window: input tokens of a forward pass; None: the model's context, at most 1,024.
        stride: scored tokens of each window after a document's first; None: the window.
        batch_size: windows per forward pass; None: as many as fit the memory limits.
        decode_batch: sequences per emulated decode step, each of another document; rules that
            decide by step need it. None: no steps.
        margin: largest increase of the loss, in nats per token, that counts as none.
        seed: seed of the bootstrap.
    Returns:
        One row per rule, with the columns of quality.csv (docs/columns.md).
    Raises:
        InputError: a rule or text can't be used, or a text was calibrated on.
        CalibrationError: a rule needs a calibration, or another one.
        ExperimentError: the model gave NaN or infinity.
    """
    named, documents = name_rules(rules), as_documents(texts)
    for rule in named.values():
        bind_rule(model, rule, calibration)
    if calibration is not None and any(rule.required_null for rule in named.values()):
        check_calibration_overlap(documents, calibration, "the calibration")
    text = prepare_text(
        tokenizer,
        describe_model(model),
        documents,
        max_tokens=max_tokens,
        window=window,
        stride=stride,
        batch_size=batch_size,
        decode_batch=decode_batch,
    )
    check_steps(named.values(), decode_batch)
    records = score_loaded(Subject(model, tokenizer, calibration), text, named)
    rows = pd.DataFrame(map(asdict, quality_table(records, QualityOptions(margin, seed=seed))))
    is_nested = [isinstance(value, tuple | dict) for value in rows.iloc[0]]
    return rows.drop(columns=rows.columns[is_nested])


def sweep(
    model: Any,
    tokenizer: Any,
    rules: Mapping[str, Rule] | Iterable[Rule],
    budgets: Sequence[float],
    texts: Sequence[str | Document],
    calibration_texts: Sequence[str | Document] | None = None,
    *,
    calibration: Calibration | None = None,
    max_tokens: int | None = None,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    decode_batch: int | None = None,
    cost: Literal["experts", "distinct"] = "experts",
    seed: int = defaults.SEED,
) -> pd.DataFrame:
    """Compare rules at equal cost, as `bh-routing sweep` does.

    Each rule's tuning parameter is set on calibration text for each budget; the rules and static
    top-k are then scored on other text.

    Args:
        model, tokenizer, rules, texts, max_tokens, window, stride, batch_size, decode_batch: as in
            `evaluate`.
        budgets: mean experts per token, from 1 to the model's own k; with cost "distinct",
            fractions of the distinct experts that the model's own top-k reads in a decode step.
        cost: "experts" is the mean experts per token; "distinct" is the mean distinct experts per
            decode step, and needs `decode_batch`.
        calibration_texts: texts that parameters are set on; None: the packaged calibration text.
        calibration: what `calibrate` returned; None: fitted on the calibration texts if a rule
            needs one.
        seed: seed of the calibration and of the bootstrap.
    Returns:
        One row per rule and budget, after static top-k: the columns of points.csv, then those of
        comparisons.csv against each reference at the same cost, as `top_k_answer` and so on
        (docs/columns.md). References are static top-k and, among the rules, top-p and per-layer
        top-k, or with cost "distinct" BH-drop per token, OEA and the budget by gate mass.
    Raises:
        InputError: a rule, budget or text can't be used, or a text was calibrated on.
        CalibrationError: the calibration doesn't serve a rule.
        ExperimentError: the model gave NaN or infinity.
    """
    variants, documents = variants_of(rules), as_documents(texts)
    source = packaged_documents("calibration") if calibration_texts is None else calibration_texts
    sources = as_documents(source)
    facts = describe_model(model)
    if (cost == "distinct") != (decode_batch is not None):
        raise InputError(f"{DISTINCT_NEEDS_STEPS}, got cost={cost!r}, decode_batch={decode_batch}")
    budgets = _check_budget_list(budgets, None if decode_batch else facts.model_top_k)
    check_overlap(documents, sources)
    sizes = {
        "window": window,
        "stride": stride,
        "batch_size": batch_size,
        "decode_batch": decode_batch,
    }
    text = prepare_text(tokenizer, facts, documents, max_tokens=max_tokens, **sizes)
    if calibration is not None:
        check_calibration_overlap(documents, calibration, "the calibration")
    elif needy := [v.anywhere() for v in variants if v.anywhere().required_null]:
        calibration = calibrate(model, tokenizer, sources, rules=needy, seed=seed)
    search = KnobSearch(
        model, tokenizer, sources, calibration, batch_size=batch_size, decode_batch=decode_batch
    )
    goals = [Goal(variant=v, budget=b) for v in variants for b in budgets]
    found = search.find([*goals, *curve_goals(search, variants, budgets)])
    settings, curve_settings = found[: len(goals)], found[len(goals) :]
    if all(setting.unreachable for setting in settings):
        raise InputError(f"no rule can meet a budget: {settings[0].unreachable}")
    subject = Subject(model, tokenizer, calibration)
    records: list[QualityRecord] = []

    def score_all(part: Mapping[str, Rule]) -> list[QualityRecord]:
        records.extend(score_loaded(subject, text, part))
        return records

    references = score_settings(settings, curve_settings, score_all, search)
    content = {
        "references": describe_references(references, search),
        "points": search.to_documents(settings),
        "curve_points": search.to_documents(curve_settings),
    }
    made = make_sweep({SWEEP: content}, records)
    return _sweep_rows(compare_points(made, QualityOptions(seed=seed)))


def _sweep_rows(tables: SweepTables) -> pd.DataFrame:
    """Join the points at the budgets with their comparisons, one set of columns per reference."""
    rows = pd.DataFrame(map(asdict, tables.points)).query("not is_curve_only")
    rows = rows.drop(columns=["domain", "is_curve_only"])
    whole = tables.comparisons.query("domain == 'all'").set_index("config_name")
    for reference, compared in whole.groupby("reference", sort=False):
        values = compared.loc[:, "answer":"saved_high"].add_prefix(f"{reference}_")
        rows = rows.join(values, on="config_name")
    return rows.reset_index(drop=True)


def _check_budget_list(budgets: Sequence[float], model_top_k: int | None) -> list[float]:
    try:
        found = list(dict.fromkeys(map(float, budgets)))
    except (TypeError, ValueError):
        found = []
    if not found or isinstance(budgets, str):
        raise InputError(f"budgets must be a list of numbers such as [5, 4], got {budgets!r}")
    if model_top_k is None:
        check_fractions(found)
    else:
        check_budgets(found, model_top_k)
    return found


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    rule: Rule,
    calibration: Calibration | None = None,
    *,
    max_new_tokens: int = defaults.MAX_TOKENS,
    batch_size: int = 1,
) -> list[RoutedGeneration]:
    """Continue each prompt greedily under a rule, with the decode engine where it can run.

    The texts are those of `model.generate(do_sample=False)` inside `route`. Where the engine can't
    run, that is what generates them, and the log says why.

    Args:
        model: a transformers model with `generate`, not inside `route`.
        tokenizer: its tokenizer; if it has a chat template, a prompt is a user's message in it.
        prompts: texts to continue, of any lengths.
        rule: the rule.
        calibration: what `calibrate` returned; needed if the rule needs one.
        max_new_tokens: most tokens generated per prompt.
        batch_size: prompts that are continued together; a rule on decode steps decides for all of
            them that haven't ended.
    Returns:
        One result per prompt, with `text` and `expert_counts`, and with its batch's times in
        `generation`.
    Raises:
        InputError: a prompt, the rule, max_new_tokens or batch_size can't be used.
        CalibrationError: the rule needs a calibration, or another one.
    """
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise InputError(f"prompts must be a list of strings, got {prompts!r}; write [prompt]")
    check_count("max_new_tokens", max_new_tokens)
    check_count("batch_size", batch_size)
    (rule,) = name_rules([rule]).values()
    bind_rule(model, rule, calibration)
    check_prompts(prompts, max_new_tokens, tokenizer, describe_model(model))
    batches = (prompts[at : at + batch_size] for at in range(0, len(prompts), batch_size))
    return [
        result
        for batch in batches
        for result in generate_batch(model, tokenizer, batch, max_new_tokens, rule, calibration)
    ]


def prune(
    model: str,
    output: Path | str,
    *,
    keep: int | None = None,
    alpha: float | None = None,
    score: Score = "fisher_mass",
    texts: Sequence[str | Document] | None = None,
    max_tokens: int = defaults.CALIBRATION_TOKENS,
    device: Literal["auto", "cuda", "cpu"] = "auto",
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    device_map: Literal["auto"] | None = None,
    seed: int = defaults.SEED,
) -> dict[str, Any]:
    """Write a checkpoint with fewer experts per layer, as `bh-routing prune` does.

    Args:
        model: `demo`, a folder with a checkpoint, or a Hugging Face id.
        output: the new folder.
        keep: experts that stay in each layer; give this or alpha.
        alpha: false discovery rate at which Benjamini-Hochberg over all experts rejects "this
            expert matters to the text"; the layer with the fewest rejections decides for all.
        score: "reap", "fisher_mass", "frequency" or "random": each layer's best experts stay.
        texts: text to score the experts on; None: the packaged calibration text.
        max_tokens: tokens of the texts to use, spread over them.
        device, dtype, device_map: as in `load_model`, for scoring; the weights are copied as they
            are stored.
        seed: seed of the random score, and of the test's bootstrap.
    Returns:
        The content of pruning.json: the kept experts by router, all scores, and provenance.
    Raises:
        InputError: keep, alpha or a text can't be used.
        ModelError: the model can't be loaded, routed or pruned; nothing is written.
        ResultsError: the folder exists, or can't be written.
    """
    spec = make_spec(
        PruneSpec, model=model, output=output, keep=keep, alpha=alpha, score=score,
        max_tokens=max_tokens, device=device, dtype=dtype, device_map=device_map, seed=seed,
    )  # fmt: skip
    return prune_checkpoint(spec, None if texts is None else as_documents(texts))
