"""Teacher-forced quality: scores of the same tokens under each rule and the model's own top-k."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bh_routing.engine.tally import DocumentTally
from bh_routing.engine.windows import (
    TokenizedDocument,
    Window,
    check_decode_batch,
    cut_windows,
    plan_steps,
    prefix_token,
)
from bh_routing.errors import InputError
from bh_routing.kernels.router import fused_router
from bh_routing.models.capture import evaluating, text_config
from bh_routing.models.routers import find_routers
from bh_routing.models.routing import BoundRule, bind_rule, install
from bh_routing.models.trace import count_distinct
from bh_routing.nulls.calibration import Calibration
from bh_routing.results.records import QualityRecord
from bh_routing.rules.base import Rule
from bh_routing.rules.fixed import TopK

LOGITS_BYTES = 256 * 2**20
CHUNK_BYTES = {"cpu": 4 * 2**20}
"""A chunk's logits are read several times: on a CPU they should fit into the cache."""
CHUNK_BYTES_ELSEWHERE = 256 * 2**20
BATCH_TOKENS = 4096
GROUP_TOKENS = 8192
"""Documents are scored, and their records yielded, in groups of about this many tokens."""


class TokenScores(NamedTuple):
    """Comparison of each scored token; float32 or bool, shape (T,)."""

    nll_T: Tensor
    top_k_nll_T: Tensor
    kl_T: Tensor
    """KL(top-k || rule) in nats; may be slightly negative due to rounding."""
    same_top1_T: Tensor
    delta_p_T: Tensor


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
    is_step: bool
    """Whether position t of all windows is an emulated decode step."""


class _Forward(NamedTuple):
    logits_PV: Tensor
    """Of all positions, P = B * S, in the model's dtype."""
    kept_index_TLK: Tensor
    """Kept experts of scored positions, -1 where dropped; on the host."""
    distinct_TL: Tensor | None
    """Distinct experts of each scored position's emulated decode step; None without steps."""


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
    Windows that have ended leave the step. Documents of one draw share steps.

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
    own = bind_rule(model, TopK(k=routers.model_top_k), fuse=fused_router)
    bound = {
        name: bind_rule(model, rule, calibration, fused_router) for name, rule in rules.items()
    }
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
            batches = (_collate(b, model.device, is_step=True) for b in plan)
        for batch in batches:
            done = Counter(w.document for w in batch.windows if w.num_scored)
            if not done:
                continue
            baseline = _forward(model, own, batch)
            top_k = _predictions(baseline.logits_PV, batch)
            for name, rule in bound.items():
                ruled = baseline if rule.rule == own.rule else _forward(model, rule, batch)
                scores = _compare(top_k, ruled.logits_PV, batch)
                _add(tallies[name], batch, scores, baseline, ruled)
            left -= done
            finished |= done.keys() - left.keys()
            if left and decode_batch is None:
                continue
            for name, row in tallies.items():
                for number in sorted(finished):
                    yield row[number].record(name, rules[name], group[number])
            finished.clear()


def check_steps(rules: Iterable[Rule], decode_batch: int | None) -> None:
    """Raise InputError if a rule decides by decode step, and there are none."""
    by_step = [rule.method for rule in rules if rule.unit == "step"]
    if decode_batch is None and by_step:
        raise InputError(
            f"rule {by_step[0]!r} decides by decode step, which must not contain a text's own "
            "future tokens; score it in emulated decode steps, such as decode_batch=16"
        )


class Prediction(NamedTuple):
    """The baseline's prediction of T tokens, computed once and compared with every rule."""

    log_probs_TV: Tensor
    """Float32."""
    probs_TV: Tensor
    top1_T: Tensor
    correct_T: Tensor
    """Log-probability of the correct next token."""
    targets_T: Tensor


def predict(logits_TV: Tensor, targets_T: Tensor) -> Prediction:
    """Return the prediction for logits of any float dtype."""
    log_probs_TV = logits_TV.float().log_softmax(-1)
    return Prediction(
        log_probs_TV,
        log_probs_TV.exp(),
        logits_TV.argmax(-1),
        log_probs_TV.gather(1, targets_T[:, None]).squeeze(1),
        targets_T,
    )


def compare_predictions(top_k: Prediction, rule_logits_TV: Tensor) -> TokenScores:
    """Compare two predictions of the same tokens over the full vocabulary, in float32.

    Args:
        top_k: prediction of the model's own top-k.
        rule_logits_TV: logits under the rule, any float dtype, (T, V).
    Returns:
        Scores per token; comparing a prediction with itself gives a KL of exactly 0.
    """
    rule_TV = rule_logits_TV.float().log_softmax(-1)
    correct_T = rule_TV.gather(1, top_k.targets_T[:, None]).squeeze(1)
    # Differences first: separate sums would cancel to rounding noise. A token with probability 0
    # adds nothing, even if both logits are -inf.
    log_ratio_TV = (top_k.log_probs_TV - rule_TV).masked_fill_(top_k.probs_TV == 0, 0.0)
    return TokenScores(
        nll_T=-correct_T,
        top_k_nll_T=-top_k.correct_T,
        kl_T=torch.linalg.vecdot(top_k.probs_TV, log_ratio_TV),
        same_top1_T=top_k.top1_T == rule_logits_TV.argmax(-1),
        delta_p_T=correct_T.exp() - top_k.correct_T.exp(),
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
        yield _collate(waiting[:size], model.device, is_step=False)
        waiting = waiting[size:]


def _collate(windows: list[Window], device: torch.device, *, is_step: bool) -> _Batch:
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
        is_step,
    )


@torch.inference_mode()
def _forward(model: Any, rule: BoundRule, batch: _Batch) -> _Forward:
    with evaluating(model), install(model, rule, emulates_steps=batch.is_step) as trace:
        output = model(
            input_ids=batch.input_ids_BS, attention_mask=batch.attention_mask_BS, use_cache=False
        )
    is_real_BS = batch.attention_mask_BS.bool().cpu()
    is_scored_T = batch.scored_BS[is_real_BS]
    kept_TLK, distinct_TL = trace.kept_index, None
    if batch.is_step:
        step_T = is_real_BS.nonzero()[:, 1]
        distinct_TL = count_distinct(step_T, kept_TLK, rule.routers.num_experts)[step_T]
        distinct_TL = distinct_TL[is_scored_T]
    return _Forward(output.logits.flatten(0, 1), kept_TLK[is_scored_T], distinct_TL)


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
    return TokenScores(*(torch.cat(column).cpu() for column in zip(*chunks, strict=True)))


def _add(
    tallies: list[DocumentTally],
    batch: _Batch,
    scores: TokenScores,
    baseline: _Forward,
    ruled: _Forward,
) -> None:
    start = 0
    for window in batch.windows:
        count = window.num_scored
        if not count:
            continue
        part = slice(start, start + count)
        tallies[window.document].add(
            *(column[part].numpy() for column in scores),
            first_position=window.first_scored,
            kept_index_TLK=ruled.kept_index_TLK[part],
            top_k_index_TLK=baseline.kept_index_TLK[part],
            distinct_TL=None if ruled.distinct_TL is None else ruled.distinct_TL[part],
        )
        start += count
