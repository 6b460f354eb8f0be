"""Records and file names of a results folder.

Experiments and analysis both import this module and nothing from each other. `docs/columns.md` is
generated from the definitions of the fields.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

SCHEMA_VERSION: Final = 1

JOURNAL: Final = "records.jsonl"
RESULTS_CSV: Final = "bh_routing_results.csv"
SUMMARY_JSON: Final = "analysis_summary.json"
REPORT_MD: Final = "REPORT.md"
REPORT_HTML: Final = "report.html"
LOG: Final = "experiment_log.txt"
RUN_JSON: Final = "run.json"
CHECKPOINT: Final = "checkpoints/latest_checkpoint.json"
CALIBRATION: Final = "calibration.safetensors"
PLOTS: Final = "plots"

PRUNING_PART: Final = "pruning"
EVIDENCE_PARTS: Final = ("equal_cost", "decode_steps", "nulls", "wrong_drops", PRUNING_PART)
"""Parts of the protocol of docs/evidence.md; each has a folder of its name."""
CALIBRATION_PART: Final = "calibration"
"""Runs first: the other parts but pruning need its file."""
ESTIMATE_PART: Final = "estimate"
PROTOCOL_JSON: Final = "protocol.json"
OUTCOME_JSON: Final = "outcome.json"
ESTIMATE_JSON: Final = "estimate.json"
WRONG_DROPS_JSON: Final = "wrong_drops.json"
PRUNING_TABLE_JSON: Final = "pruning.json"
NULL_RULES_JSON: Final = "rules.json"
EVIDENCE_JSON: Final = "evidence.json"
EVIDENCE_MD: Final = "EVIDENCE.md"

BASELINE: Final = "baseline"
"""Key in run.json: the configuration that the others are compared with."""
LEFT_OUT: Final = "left_out"
"""Key in run.json: standard configurations that the model can't run -> the reason."""
ALTERNATIVES: Final = "alternatives"
"""Key in run.json: rules scored in addition to the configurations, and commands that run a rule."""

STATUS_OK: Final = "ok"
STATUS_FAILED: Final = "failed"


def json_digest(value: Any) -> str:
    """Return the SHA-256 of plain JSON data, independent of key order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def line_checksum(previous: str, body: Mapping[str, Any]) -> str:
    """Return the checksum over a journal's line and the preceding line's checksum.

    Args:
        previous: the preceding line's checksum; for the first line, the journal's seed.
        body: the line without its own checksum.
    """
    return json_digest([previous, body])


def journal_seed(identity: Mapping[str, Any]) -> str:
    """Return the seed of a journal's checksums: a hash of most of run.json's identity.

    It excludes the calibration's tables (`calibration` in an older version), because the first
    configuration that needs further tables adds them to the folder, and the model's name, because
    the fingerprint is more specific.
    """
    left_out = ("tables", "calibration", "model")
    return json_digest({k: v for k, v in identity.items() if k not in left_out})


def column(text: str, **kwargs: Any) -> Any:
    """Declare a field of a record with its definition."""
    return field(metadata={"definition": text}, **kwargs)


def measured(text: str) -> Any:
    """Declare a number that is NaN until it is measured, with its definition."""
    return column(text, default=math.nan)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExperimentRecord:
    """One row of `bh_routing_results.csv`: one configuration on one prompt.

    A unit of the expert columns is one (token, layer) pair, over the prompt's tokens and the
    generated tokens that were fed back (all but the last).
    """

    config_name: str = column("Name of the routing configuration.")
    prompt_text: str = column("The prompt as given.")
    prompt_category: str = column("Category of the prompt, such as simple or domain-specific.")
    prompt_description: str = column("One phrase on the purpose of the prompt.")
    generated_text: str = column("Greedy continuation, special tokens removed.", default="")
    num_input_tokens: int = column("Tokens of the prompt.", default=0)
    num_output_tokens: int = column("Tokens generated, an end-of-text token included.", default=0)
    avg_experts_per_token: float = measured("Mean experts kept, over units.")
    std_experts_per_token: float = measured(
        "Standard deviation of experts kept, over units (denominator n)."
    )
    min_experts: float = measured("Fewest experts kept in a unit.")
    max_experts: float = measured("Most experts kept in a unit.")
    avg_experts_prefill: float = measured("Mean experts kept, over units of prompt tokens.")
    avg_experts_decode: float = measured(
        "Mean experts kept, over units of fed-back tokens; NaN if there were none."
    )
    inference_time_sec: float = measured("Wall time of generation, prefill and decode, in seconds.")
    prefill_time_sec: float = measured("Seconds until the first token.")
    decode_time_sec: float = measured("Seconds from the first token on.")
    tokens_per_sec: float = measured("num_output_tokens / inference_time_sec.")
    expert_utilization_cv: float = measured(
        "Coefficient of variation (std / mean, denominator n) of assignments over the experts "
        "of a layer, averaged over layers."
    )
    expert_utilization_cv_noise: float = measured(
        "The value of expert_utilization_cv that a perfectly uniform router is expected to show "
        "at this number of assignments: sampling noise alone."
    )
    expert_utilization_max_min_ratio: float = measured(
        "Assignments of a layer's most used expert over those of its least used one, averaged "
        "over layers; NaN where a layer has an unused expert."
    )
    expert_utilization_note: str = column("Why the ratio is NaN, if it is.", default="")
    status: str = column("ok or failed.", default=STATUS_OK)
    error: str = column("One sentence with the remedy, if the experiment failed.", default="")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExperimentDetail:
    """Details of an experiment that reports need but that are too long for a CSV row."""

    output_token_ids: list[int] = field(default_factory=list)
    """Generated token ids, in order."""
    experts_by_layer: list[float] = field(default_factory=list)
    """Mean experts kept in each layer."""
    count_histogram: list[list[int]] = field(default_factory=list)
    """[layer][c]: tokens that kept c experts, c from 0."""
    expert_load: list[list[int]] = field(default_factory=list)
    """[layer][expert]: tokens that kept this expert."""
    peak_memory_bytes: int | None = None
    """Peak device memory of the experiment; None on CPU."""


CSV_COLUMNS: Final = tuple(f.name for f in fields(ExperimentRecord))
TIME_COLUMNS: Final = (
    "inference_time_sec",
    "prefill_time_sec",
    "decode_time_sec",
    "tokens_per_sec",
)


def column_definitions(record: Any = ExperimentRecord) -> dict[str, str]:
    """Return name -> definition of every column of a record, in the CSV's order."""
    return {f.name: str(f.metadata["definition"]) for f in fields(record)}


QUALITY_JOURNAL: Final = "quality.jsonl"
EARLY_POSITIONS: Final = 128
"""Positions of a window that count as early: they have little context and few preceding drops."""
KL_BIN_EDGES: Final = tuple(10.0 ** (-8 + i / 8) for i in range(81))
"""Edges of the KL histogram in nats: eight bins per decade from 1e-8 to 1e2."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityRecord:
    """One line of `quality.jsonl`: one configuration on one document, teacher-forced.

    Every token is compared with the model's own top-k on the same token. Sums are over scored
    tokens, so they can be added over documents.
    """

    config_name: str
    """For display only: one name may refer to several rules."""
    rule: dict[str, Any]
    """The rule with all its fields; with `document_key` it identifies a record."""
    document: str
    """For display only: unique among the documents that were scored together."""
    document_key: str
    """Hash of the document's text, place of the first scored token, and after "#" the draw
    of step companions, if it isn't the first."""
    cluster: str
    """Documents of one cluster, such as chapters of one book, aren't independent draws."""
    domain: str
    tokens: int
    """Scored tokens."""
    nll_sum: float
    """Negative log-likelihood under the rule, in nats."""
    top_k_nll_sum: float
    """The same under the model's own top-k."""
    kl_sum: float
    """KL(top-k || rule) over the full vocabulary, float32, in nats; clamped at 0 per token."""
    kl_max: float
    kl_histogram: list[int]
    """Tokens by KL: below the first of KL_BIN_EDGES, between neighbouring edges, above the last."""
    same_top1: int
    """Tokens for which rule and top-k rank the same token first."""
    delta_p_sum: float
    """p(correct token) under the rule minus p under top-k."""
    delta_p_square_sum: float
    early_tokens: int
    """Scored tokens among the first EARLY_POSITIONS of their window."""
    early_delta_nll_sum: float
    """NLL under the rule minus NLL under top-k, over the early tokens."""
    experts_sum: int
    """Experts kept, over units: pairs of (scored token, layer)."""
    units: int
    expert_load: list[list[int]]
    """[layer][expert]: scored tokens that kept this expert."""
    count_histogram: list[list[int]]
    """[layer][c]: scored tokens that kept c experts."""
    jaccard_sum: list[float]
    """[layer]: |kept and top-k's| / |kept or top-k's|, summed over scored tokens."""
    distinct_experts_sum: int | None = None
    """Distinct experts that the token's decode step kept, over units; None without steps."""

    @property
    def draw(self) -> int:
        """Number of the draw of step companions, from 0."""
        return int(self.document_key.partition("#")[2] or 0)


TASK_OUTCOMES: Final = "lm_eval_outcomes.jsonl"
TASK_SUMMARY: Final = "lm_eval.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskOutcome:
    """One line of `lm_eval_outcomes.jsonl`: one configuration on one item of an lm-eval task."""

    config_name: str
    task: str
    filter: str
    """lm-eval's name of the filter applied to the answers before scoring."""
    item: int
    """lm-eval's index of the item."""
    item_hash: str
    """lm-eval's hash of the item, the same for every configuration."""
    cluster: str
    """Items of one cluster, such as passages of one document, aren't independent draws."""
    metrics: dict[str, float | list[float]]
    """Values that lm-eval aggregates: a number per item, or a sum and its weight, such as
    log-likelihood and bytes. Metrics of another shape are left out."""


TIMINGS: Final = "timings.csv"


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundTiming:
    """One row of `timings.csv`: one configuration in one round of interleaved timings."""

    key: str = column("Key of the timed experiment in records.jsonl; its name may be redefined.")
    round: int = column(
        "From 1: one prompt under every configuration, in an order of its own (that of the rows)."
    )
    config_name: str = column("Name of the routing configuration.")
    prompt_text: str = column("The prompt as given.")
    num_input_tokens: int = column("Tokens of the prompt.")
    num_output_tokens: int = column("Tokens generated, an end-of-text token included.")
    prefill_time_sec: float = column("Seconds until the first token.")
    decode_time_sec: float = column("Seconds from the first token on.")


TIMING_COLUMNS: Final = tuple(f.name for f in fields(RoundTiming))

TOKEN_TRACES: Final = "token_traces.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenTrace:
    """One line of `token_traces.jsonl`: every slot of one experiment's tokens."""

    key: str
    """Key of the experiment in the journal."""
    config_name: str
    prompt_text: str
    tokens: list[str]
    """Text of each routed token, the prompt's first."""
    num_prompt_tokens: int
    layers: int
    slots: int
    """Candidate slots per token and layer, by the family's own weight, largest first."""
    model_top_k: int
    """The model's own k: it alone would use the first `model_top_k` slots."""
    planes: str
    """Base64 of zlib of three little-endian arrays, each (tokens, layers, slots). int16: the
    expert e if it was kept, -1 - e if it was dropped. uint16: its fraction of the candidates'
    weight times 65,535, rounded.
    uint16: -1000 log10 p, rounded, 65,534 at most; 65,535 where the rule has no p-value."""
