"""Where the numbers come from: settings, machine, null, and the limits of it all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from bh_routing.records import LEFT_OUT
from bh_routing.report import findings
from bh_routing.report.blocks import bullets, section, table, text_table
from bh_routing.report.facts import Facts, child
from bh_routing.report.text import (
    MISSING,
    as_float,
    code,
    interval,
    markdown,
    number,
    percent,
    plain,
)

RULE_FIELDS = ("alpha", "null", "temperature", "min_k", "max_k", "k", "procedure", "on_empty",
               "weights")  # fmt: skip


def left_out_sentence(facts: Facts) -> str:
    """Which standard configurations the model can't run, and why."""
    reasons = child(facts.run, LEFT_OUT)
    left_out = "; ".join(f"{code(name)}, since {markdown(why)}" for name, why in reasons.items())
    return f"**Left out**: {left_out}." if left_out else ""


def settings(facts: Facts) -> str:
    """Configurations and provenance, from run.json."""
    if not facts.run:
        return section(
            "Settings and provenance",
            "There is no run.json beside these results, so settings, versions and machine are "
            "unknown.",
        )
    rows = [[name, value] for name, value in _facts(facts) if value]
    return section(
        "Settings and provenance",
        _configurations(facts),
        text_table(["what", "value"], rows) if rows else "",
    )


def _configurations(facts: Facts) -> str:
    configs = child(facts.spec, "configs")
    if not configs:
        return ""
    rows = []
    for name, config in configs.items():
        given = config if isinstance(config, Mapping) else {}
        fields = [
            f"{field} {markdown(_value(given[field]), 40)}"
            for field in RULE_FIELDS
            if given.get(field) is not None
        ]
        rows.append(
            [code(name), code(given.get("method", "")), ", ".join(fields) or MISSING,
             markdown(given.get("description", ""), 120)]
        )  # fmt: skip
    return text_table(["configuration", "method", "fields", "description"], rows)


def _template(run: Mapping[str, object]) -> str:
    is_applied = child(run, "identity").get("chat_template")
    return ", each a user's message in the tokenizer's chat template" if is_applied else ""


def _value(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else plain(value)


def _facts(facts: Facts) -> list[tuple[str, str]]:
    model, spec = facts.model, facts.spec
    versions, timing = child(facts.run, "provenance"), child(facts.run, "timing")
    calibration = child(facts.run, "calibration")
    parameters = as_float(model.get("num_parameters"))
    memory = as_float(facts.run.get("peak_memory_bytes")) / 1e9
    shape = (
        f"{number(model.get('num_layers'), 0)} layers of {number(model.get('num_experts'), 0)} "
        f"experts, top-{number(model.get('model_top_k'), 0)}"
    )
    return [
        ("Model", _joined(code(model.get("name")), shape if model else "", _millions(parameters))),
        ("Weights", code(model.get("fingerprint"), 20) if model.get("fingerprint") else ""),
        ("Device", _joined(*(markdown(model.get(k), 60)
                             for k in ("device", "device_name", "dtype")))),
        ("Prompts", f"{facts.num_prompts()}, up to {number(spec.get('max_tokens'), 0)} new tokens "
                    f"each, greedy{_template(facts.run)}" if spec else ""),
        ("Calibration", _calibration(calibration)),
        ("Time", _timing(timing)),
        ("Peak memory", f"{number(memory, 2)} GB" if math.isfinite(memory) else ""),
        ("Versions", ", ".join(f"{markdown(k, 30)} {markdown(versions[k], 40)}"
                               for k in ("bh_routing", "torch", "transformers", "numpy", "python")
                               if versions.get(k))),
        ("Machine", _joined(markdown(versions.get("platform"), 80), _cores(versions))),
        ("Revision", code(versions.get("git_revision")) if versions.get("git_revision") else ""),
        ("Seed", markdown(versions.get("seed")) if versions.get("seed") is not None else ""),
        ("Started", markdown(versions.get("started_at"), 40)),
    ]  # fmt: skip


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part and part != MISSING)


def _millions(parameters: float) -> str:
    if not math.isfinite(parameters):
        return ""
    big = parameters >= 1e9
    return f"{number(parameters / (1e9 if big else 1e6), 1)} {'billion' if big else 'million'} " \
           "parameters"  # fmt: skip


def _cores(versions: Mapping[str, Any]) -> str:
    cores, threads = versions.get("cpu_count"), versions.get("threads")
    return (
        f"{cores} cores, {threads} thread{'' if threads == 1 else 's'}" if cores and threads else ""
    )


def _calibration(calibration: Mapping[str, Any]) -> str:
    if not calibration:
        return ""
    tokens, documents = as_float(calibration.get("num_tokens")), calibration.get("num_documents")
    size = f"{tokens:,.0f} tokens of {documents} documents" if math.isfinite(tokens) else ""
    seconds = as_float(calibration.get("seconds"))
    took = f"in {number(seconds, 1)} s" if math.isfinite(seconds) else ""
    return _joined(markdown(calibration.get("source"), 120), f"{size} {took}".strip())


def _timing(timing: Mapping[str, Any]) -> str:
    parts = {"load_sec": "loading", "calibrate_sec": "calibrating",
             "experiments_sec": "experiments", "quality_sec": "quality"}  # fmt: skip
    return _joined(
        *(
            f"{label} {number(timing[name], 1)} s"
            for name, label in parts.items()
            if math.isfinite(as_float(timing.get(name)))
        )
    )


def nulls(facts: Facts) -> str:
    """What alpha is under each null in use, and what the null keeps on pure noise."""
    described = [null for null in facts.run.get("nulls") or [] if isinstance(null, Mapping)]
    parts: list[str] = []
    for null in described:
        parts.append(
            f"**{code(null.get('name'))}**: alpha is {markdown(null.get('meaning'), 400)}."
        )
        noise = null.get("noise")
        rows = [_noise_row(entry) for entry in noise] if isinstance(noise, list) else []
        header = [
            "configuration",
            "alpha",
            "experts on noise",
            "tokens with any",
            "95 % interval, %",
            "tokens tried",
        ]
        parts.append(table(header, rows) if rows else "It was not tried on noise.")
    how = (
        "The p-values rest on a null: what router scores look like when nothing stands out. "
        "The test of it is logits of pure noise, where an error rate of alpha would let about "
        "that share of tokens have any rejection at all. The experts on noise are those that the "
        "configuration itself keeps, with its procedure, `min_k`, `max_k` and `on_empty`."
    )
    return section("What alpha means here", how if parts else "", *parts)


def _noise_row(entry: Mapping[str, Any]) -> list[str]:
    low, high = as_float(entry.get("share_any_low")), as_float(entry.get("share_any_high"))
    tokens = as_float(entry.get("tokens"))
    return [
        code(entry.get("config_name")),  # missing in a folder of an earlier version
        f"{as_float(entry.get('alpha')):g}",
        number(entry.get("mean_experts")),
        percent(entry.get("share_any"), 1),
        interval(100 * low, 100 * high, 1),
        f"{tokens:,.0f}" if math.isfinite(tokens) else MISSING,
    ]


def _times(facts: Facts) -> str:
    where = findings.place(facts.run)
    if facts.table.speed_ups or where.is_one_machine:
        return "Times are of one machine and of batch size 1."
    text = f", measured on {where.text}: differences in time may be theirs" if where.text else ""
    return f"Times are of batch size 1{text}."


def limitations(facts: Facts) -> str:
    """What these numbers can't say."""
    items = [
        f"The {facts.num_prompts()} prompts aren't a random sample of what people write: tests and "
        "intervals over them speak of these prompts.",
        "Experts of one token share a hidden state, so neither independence nor positive "
        "dependence of the p-values is given. Read *BH at nominal alpha under the fitted null*, "
        "not *the false discovery rate is bounded*.",
        "Texts are greedy, one a prompt: nothing is said about sampling.",
        f"{_times(facts)} Where several texts are generated in one batch they share the experts "
        "that are read, and dropping some saves less.",
    ]
    if facts.quality:
        items.insert(
            0,
            "Quality is next-token loss on one evaluation text, not performance on tasks.",
        )
    else:
        items.insert(0, "Quality was not measured: fewer experts is not the same as no loss.")
    parameters = as_float(facts.model.get("num_parameters"))
    if parameters < 1e8:
        items.append(
            f"The model is small ({_millions(parameters)}). How a large model takes to fewer "
            "experts can differ in size and in kind."
        )
    return section("Limitations", bullets(items))
