"""Teacher-forced quality: scores of the same tokens under each rule and the model's own top-k."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from bh_routing.engine.tally import (
    DocumentTally,
    Prediction,
    TokenScores,
    compare_predictions,
    predict,
)
from bh_routing.engine.windows import (
    TokenizedDocument,
    Window,
    check_decode_batch,
    cut_windows,
    plan_steps,
    prefix_token,
)
from bh_routing.errors import InputError
from bh_routing.kernels.experts import NAME, sparse_experts_forward
from bh_routing.kernels.router import fused_router
from bh_routing.models.capture import evaluating, text_config
from bh_routing.models.experts import experts_by
from bh_routing.models.routers import find_routers
from bh_routing.models.routing import BoundRule, bind_rule, install
from bh_routing.models.trace import count_distinct
from bh_routing.nulls.calibration import Calibration
from bh_routing.results.records import QualityRecord
from bh_routing.rules.base import Rule
from bh_routing.rules.fixed import TopK

LOGITS_BYTES = 256 * 2**20
STEP_LOGITS_BYTES = {"cpu": 0}
"""Most logits of a forward pass that joins batches of emulated steps."""
STEP_LOGITS_BYTES_ELSEWHERE = 2**30
CHUNK_BYTES = {"cpu": 4 * 2**20}
"""A chunk's logits are read several times: on a CPU they should fit into the cache."""
CHUNK_BYTES_ELSEWHERE = 256 * 2**20
BATCH_TOKENS = 4096
GROUP_TOKENS = 8192
"""Documents are scored, and their records yielded, in groups of about this many tokens."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """Windows of similar length, padded on the right."""

    windows: list[Window]
    input_ids_BS: Tensor
    attention_mask_BS: Tensor
    scored_BS: Tensor
    """True at input positions whose next token is scored."""
    targets_T: Tensor
    position_T: Tensor
    """Indices of the scored positions among all B * S."""
    decode_batch: int | None
    """Position t of each so many windows is an emulated decode step; None: no steps."""


class _Outcome(NamedTuple):
    """One window under a rule, on the host."""

    scores: TokenScores
    """Of its scored tokens."""
    kept_index_SLK: Tensor
    """Kept experts of all its tokens, -1 where dropped."""


_OWN: Final = ""
"""Name of the model's own top-k among the bound rules."""
_Memory = dict[tuple[str, tuple[int, ...]], _Outcome]
"""Rule's name and window's tokens -> outcome, for rules that don't depend on companions."""


def score(
    model: Any,
    tokenizer: Any,
    documents: Sequence[TokenizedDocument],
    rules: Mapping[str, Rule],
    calibration: Calibration | None = None,
    *,
    window: int,
    stride: int,
    batch_size: int | None = None,
    decode_batch: int | None = None,
    only: Collection[str] | None = None,
) -> Iterator[QualityRecord]:
    """Compare rules with the model's own top-k on the same tokens.

    With `decode_batch`, the tokens are scored in emulated decode steps: position t of as many
    windows of different documents is one step (`plan_steps`), still in one teacher-forced pass.
    Windows that have ended leave the step. Documents of one draw share steps. A window under a rule
    that doesn't depend on companions runs in one draw only.

    R rules cost at most R + 1 forward passes per batch: the baseline runs once, and a rule that is
    the model's own top-k costs none.

    Args:
        model: a transformers model with routers, not inside `route`.
        tokenizer: its tokenizer, for the prefix token.
        documents: documents to score.
        rules: name -> rule.
        calibration: required if a rule needs one.
        window: maximum number of input tokens per sequence, including the prefix token.
        stride: scored tokens per window, except in a document's first window.
        batch_size: maximum windows per forward pass; None: limited by tokens and logits only.
        decode_batch: sequences per emulated decode step; None: no steps.
        only: keys of the documents to score, the others being companions in steps; None: all.
    Yields:
        One record per document and rule, in groups of documents; in emulated decode steps as soon
        as a document is finished.
    Raises:
        InputError: the tokenizer has no prefix token, a rule decides by decode step and there are
            none, or there are fewer documents than sequences in a step.
    """
    check_steps(rules.values(), decode_batch)
    if decode_batch is not None:
        check_decode_batch(documents, decode_batch)
    prefix = prefix_token(tokenizer)
    routers = find_routers(model)
    top_k = TopK(k=routers.model_top_k)
    bound = {
        name: bind_rule(model, rule, calibration, fused_router)
        for name, rule in {_OWN: top_k, **rules}.items()
    }
    last = max((d.draw for d in documents), default=0)
    memory: _Memory = {}
    for group in document_groups(documents, decode_batch):
        tallies = {
            name: [DocumentTally(len(routers.sites), routers.num_experts) for _ in group]
            for name in rules
        }
        windows = [
            w if only is None or group[w.document].key in only else w.as_companion()
            for w in cut_windows(group, prefix, window, stride)
        ]
        left = Counter(w.document for w in windows if w.num_scored)
        finished: set[int] = set()
        if decode_batch is None:
            batches = _batches(windows, model, batch_size)
        else:
            plan = plan_steps(windows, [d.cluster for d in group], decode_batch, seed=group[0].draw)
            batches = _step_batches(plan, model, decode_batch, window)
        for batch in batches:
            done = Counter(w.document for w in batch.windows if w.num_scored)
            if not done:
                continue
            outcomes = _score_batch(model, bound, batch, memory)
            for name in rules:
                _add(tallies[name], batch, outcomes[name], outcomes[_OWN], routers.num_experts)
            if group[0].draw < last:
                _remember(memory, outcomes, batch, bound)
            left -= done
            finished |= done.keys() - left.keys()
            if left and decode_batch is None:
                continue
            for name, row in tallies.items():
                for number in sorted(finished):
                    yield row[number].record(name, rules[name], group[number])
            finished.clear()


def _score_batch(
    model: Any, bound: Mapping[str, BoundRule], batch: _Batch, memory: _Memory
) -> dict[str, list[_Outcome]]:
    """Return each rule's outcomes, in the order of the windows; remembered ones aren't run."""
    outcomes = {name: _recall(memory, name, batch) for name in bound}
    missing = [name for name, known in outcomes.items() if known is None]
    if missing:
        logits_PV, kept_TLK = _forward(model, bound[_OWN], batch)
        top_k = _predictions(logits_PV, batch)
        own = _split(batch, _compare(top_k, logits_PV, batch), kept_TLK)
    for name in missing:
        outcomes[name] = own
        if bound[name].rule != bound[_OWN].rule:
            logits_PV, kept_TLK = _forward(model, bound[name], batch)
            outcomes[name] = _split(batch, _compare(top_k, logits_PV, batch), kept_TLK)
    return {name: known for name, known in outcomes.items() if known is not None}


def _recall(memory: _Memory, name: str, batch: _Batch) -> list[_Outcome] | None:
    """Return the outcomes of all windows of a batch; None unless all are remembered."""
    known = [memory.get((name, tuple(w.ids))) for w in batch.windows]
    outcomes = [
        outcome
        for outcome, w in zip(known, batch.windows, strict=True)
        if outcome is not None and w.num_scored in (0, len(outcome.scores.nll_T))
    ]
    return outcomes if len(outcomes) == len(known) else None


def _remember(
    memory: _Memory,
    outcomes: Mapping[str, list[_Outcome]],
    batch: _Batch,
    bound: Mapping[str, BoundRule],
) -> None:
    for name, rule in bound.items():
        if rule.rule.unit == "step":
            continue
        for window, outcome in zip(batch.windows, outcomes[name], strict=True):
            key = name, tuple(window.ids)
            if window.num_scored or key not in memory:
                memory[key] = outcome


def check_steps(rules: Iterable[Rule], decode_batch: int | None) -> None:
    """Raise InputError if a rule decides by decode step, and there are none."""
    by_step = [rule.method for rule in rules if rule.unit == "step"]
    if decode_batch is None and by_step:
        raise InputError(
            f"rule {by_step[0]!r} decides by decode step, which must not contain a text's own "
            "future tokens; score it in emulated decode steps, such as decode_batch=16"
        )


def document_groups(
    documents: Sequence[TokenizedDocument], decode_batch: int | None = None
) -> Iterator[list[TokenizedDocument]]:
    """Split documents into groups whose windows are batched together.

    With emulated decode steps, the documents of one draw are one group.
    """
    if decode_batch is not None:
        for draw in sorted({d.draw for d in documents}):
            yield [d for d in documents if d.draw == draw]
        return
    group: list[TokenizedDocument] = []
    for document in documents:
        group.append(document)
        if sum(len(d.ids) for d in group) >= GROUP_TOKENS:
            yield group
            group = []
    if group:
        yield group


def _batches(windows: list[Window], model: Any, batch_size: int | None) -> Iterator[_Batch]:
    """Batch windows of similar length, within the bounds on tokens and logits."""
    most = min(BATCH_TOKENS, LOGITS_BYTES // (4 * text_config(model).vocab_size))
    waiting = sorted(windows, key=lambda w: -len(w.ids))
    while waiting:
        size = batch_size or max(1, most // max(1, len(waiting[0].ids) - 1))
        yield _collate(waiting[:size], model.device)
        waiting = waiting[size:]


def _step_batches(
    plan: Iterator[list[Window]], model: Any, decode_batch: int, window: int
) -> Iterator[_Batch]:
    """Join batches of emulated steps on a GPU, where launches limit small passes."""
    most = STEP_LOGITS_BYTES.get(model.device.type, STEP_LOGITS_BYTES_ELSEWHERE)
    batch_bytes = 4 * text_config(model).vocab_size * window * decode_batch
    while several := list(islice(plan, max(1, most // batch_bytes))):
        yield _collate([w for batch in several for w in batch], model.device, decode_batch)


def _collate(
    windows: list[Window], device: torch.device, decode_batch: int | None = None
) -> _Batch:
    longest = max(len(w.ids) for w in windows) - 1
    ids_BS = torch.zeros(len(windows), longest, dtype=torch.long)
    mask_BS = torch.zeros_like(ids_BS)
    scored_BS = torch.zeros_like(ids_BS, dtype=torch.bool)
    for row, window in enumerate(windows):
        length = len(window.ids) - 1
        ids_BS[row, :length] = torch.tensor(window.ids[:-1])
        mask_BS[row, :length] = 1
        scored_BS[row, window.first_scored : length] = True
    targets = [t for w in windows for t in w.ids[w.first_scored + 1 :]]
    return _Batch(
        windows,
        ids_BS.to(device),
        mask_BS.to(device),
        scored_BS,
        torch.tensor(targets, device=device),
        scored_BS.flatten().nonzero().squeeze(1).to(device),
        decode_batch,
    )


@torch.inference_mode()
def _forward(model: Any, rule: BoundRule, batch: _Batch) -> tuple[Tensor, Tensor]:
    """Return logits of all positions, (B * S, V), and kept experts of real tokens, on the host."""
    with (
        evaluating(model),
        _fast_experts(model),
        install(model, rule, decode_batch=batch.decode_batch) as trace,
    ):
        output = model(
            input_ids=batch.input_ids_BS, attention_mask=batch.attention_mask_BS, use_cache=False
        )
    return output.logits.flatten(0, 1), trace.kept_index


def _fast_experts(model: Any) -> AbstractContextManager[None]:
    """Replace torch's grouped product of float32: on a GPU it runs, and awaits, each group."""
    name = getattr(model.config, "_experts_implementation", None)
    if model.device.type != "cuda" or model.dtype != torch.float32 or name != "grouped_mm":
        return nullcontext()
    return experts_by(model, NAME, sparse_experts_forward)


def _chunks(logits_PV: Tensor, batch: _Batch) -> Iterator[Tensor]:
    """Yield chunks of the scored positions' logits; copies only if some aren't scored."""
    vocabulary = logits_PV.shape[-1]
    size = CHUNK_BYTES.get(logits_PV.device.type, CHUNK_BYTES_ELSEWHERE) // (4 * vocabulary)
    if batch.position_T.numel() == logits_PV.shape[0]:
        yield from torch.split(logits_PV, max(1, size))
        return
    for position in torch.split(batch.position_T, max(1, size)):
        yield logits_PV[position]


@torch.inference_mode()
def _predictions(logits_PV: Tensor, batch: _Batch) -> list[Prediction]:
    predictions, start = [], 0
    for chunk in _chunks(logits_PV, batch):
        end = start + chunk.shape[0]
        predictions.append(predict(chunk, batch.targets_T[start:end]))
        start = end
    return predictions


@torch.inference_mode()
def _compare(top_k: list[Prediction], logits_PV: Tensor, batch: _Batch) -> TokenScores:
    chunks = [
        compare_predictions(prediction, chunk)
        for prediction, chunk in zip(top_k, _chunks(logits_PV, batch), strict=True)
    ]
    columns = [torch.cat(column) for column in zip(*chunks, strict=True)]
    # One copy, since each waits for the device.
    nll_T, top_k_nll_T, kl_T, same_T, delta_p_T = torch.stack([c.float() for c in columns]).cpu()
    return TokenScores(nll_T, top_k_nll_T, kl_T, same_T > 0, delta_p_T)


def _split(batch: _Batch, scores: TokenScores, kept_TLK: Tensor) -> list[_Outcome]:
    """Split scores of scored tokens, and kept experts of all tokens, by window."""
    scored = [w.num_scored for w in batch.windows]
    columns = zip(*(column.split(scored) for column in scores), strict=True)
    kept = kept_TLK.split([len(w.ids) - 1 for w in batch.windows])
    return [_Outcome(TokenScores(*own), k) for own, k in zip(columns, kept, strict=True)]


def _add(
    tallies: list[DocumentTally],
    batch: _Batch,
    outcomes: list[_Outcome],
    baseline: list[_Outcome],
    num_experts: int,
) -> None:
    distinct: Sequence[Tensor | None] = [None] * len(outcomes)
    if batch.decode_batch is not None:
        kept = [outcome.kept_index_SLK for outcome in outcomes]
        longest = max(map(len, kept))
        step_T = torch.cat(
            [
                torch.arange(len(kept_SLK)) + number // batch.decode_batch * longest
                for number, kept_SLK in enumerate(kept)
            ]
        )
        distinct_TL = count_distinct(step_T, torch.cat(kept), num_experts)[step_T]
        distinct = distinct_TL.split([len(kept_SLK) for kept_SLK in kept])
    for window, outcome, own, distinct_SL in zip(
        batch.windows, outcomes, baseline, distinct, strict=True
    ):
        if not window.num_scored:
            continue
        scored = slice(window.first_scored, None)
        tallies[window.document].add(
            *(column.numpy() for column in outcome.scores),
            first_position=window.first_scored,
            kept_index_TLK=outcome.kept_index_SLK[scored],
            top_k_index_TLK=own.kept_index_SLK[scored],
            distinct_TL=None if distinct_SL is None else distinct_SL[scored],
        )
