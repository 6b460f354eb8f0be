"""Teacher-forced quality: scores of the same tokens under each rule and the model's own top-k."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bh_routing.engine.quickest import bind_quickest
from bh_routing.engine.windows import TokenizedDocument, Window, cut_windows, prefix_token
from bh_routing.models.capture import evaluating, text_config
from bh_routing.models.routers import find_routers
from bh_routing.models.routing import BoundRule, install
from bh_routing.models.trace import DROPPED, count_experts
from bh_routing.nulls.calibration import Calibration
from bh_routing.results.records import EARLY_POSITIONS, KL_BIN_EDGES, QualityRecord
from bh_routing.rules.base import Rule
from bh_routing.rules.catalog import rule_to_config
from bh_routing.rules.fixed import TopK

Floats = NDArray[np.floating[Any]]


class DocumentTally:
    """Float64 sums over one document's scored tokens under one rule."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._num_experts = num_experts
        self._sums = dict.fromkeys(
            ("nll", "top_k_nll", "kl", "delta_p", "delta_p_square", "early_delta_nll"), 0.0
        )
        self._tokens = self._early_tokens = self._same_top1 = 0
        self._kl_max = 0.0
        self._kl_histogram = np.zeros(len(KL_BIN_EDGES) + 1, dtype=np.int64)
        self._expert_counts = torch.zeros(num_layers, num_experts, dtype=torch.int64)
        self._count_histogram = np.zeros((num_layers, num_experts + 1), dtype=np.int64)
        self._jaccard = np.zeros(num_layers)

    def add(
        self,
        nll_T: Floats,
        top_k_nll_T: Floats,
        kl_T: Floats,
        same_top1_T: NDArray[np.bool_],
        delta_p_T: Floats,
        *,
        first_position: int,
        kept_index_TLK: Tensor,
        top_k_index_TLK: Tensor,
    ) -> None:
        """Add the scored tokens of one window; the first is at `first_position`."""
        kl_T = np.maximum(kl_T.astype(np.float64), 0.0)
        with np.errstate(invalid="ignore"):  # inf - inf is NaN, which the caller detects
            delta_nll_T = nll_T.astype(np.float64) - top_k_nll_T
        early = max(0, min(EARLY_POSITIONS - first_position, len(nll_T)))
        for name, values in {
            "nll": nll_T,
            "top_k_nll": top_k_nll_T,
            "kl": kl_T,
            "delta_p": delta_p_T,
            "delta_p_square": delta_p_T.astype(np.float64) ** 2,
            "early_delta_nll": delta_nll_T[:early],
        }.items():
            self._sums[name] += float(values.sum(dtype=np.float64))
        self._tokens += len(nll_T)
        self._early_tokens += early
        self._same_top1 += int(same_top1_T.sum())
        self._kl_max = float(kl_T.max(initial=self._kl_max))  # numpy's max propagates NaN
        bins = np.searchsorted(KL_BIN_EDGES, kl_T, side="right")
        self._kl_histogram += np.bincount(bins, minlength=len(self._kl_histogram))
        self._add_experts(kept_index_TLK, top_k_index_TLK)

    def _add_experts(self, kept_index_TLK: Tensor, top_k_index_TLK: Tensor) -> None:
        self._expert_counts += count_experts(kept_index_TLK, self._num_experts)
        counts_TL = (kept_index_TLK != DROPPED).sum(-1).numpy()
        for layer, histogram in enumerate(self._count_histogram):
            histogram += np.bincount(counts_TL[:, layer], minlength=len(histogram))
        same_TL = (kept_index_TLK[..., :, None] == top_k_index_TLK[..., None, :]) & (
            kept_index_TLK[..., :, None] != DROPPED
        )
        both_TL = same_TL.sum((-1, -2)).numpy()
        top_k_TL = (top_k_index_TLK != DROPPED).sum(-1).numpy()
        self._jaccard += (both_TL / (counts_TL + top_k_TL - both_TL)).sum(0)

    def record(self, config_name: str, rule: Rule, document: TokenizedDocument) -> QualityRecord:
        """Return the finished record."""
        widest = int(np.flatnonzero(self._count_histogram.any(axis=0)).max(initial=0))
        return QualityRecord(
            config_name=config_name,
            rule=rule_to_config(rule),
            document=document.name,
            document_key=document.key,
            cluster=document.cluster,
            domain=document.domain,
            tokens=self._tokens,
            **{f"{name}_sum": value for name, value in self._sums.items()},
            kl_max=self._kl_max,
            kl_histogram=self._kl_histogram.tolist(),
            same_top1=self._same_top1,
            early_tokens=self._early_tokens,
            experts_sum=int(self._expert_counts.sum()),
            units=self._tokens * len(self._jaccard),
            expert_counts=self._expert_counts.tolist(),
            count_histogram=self._count_histogram[:, : widest + 1].tolist(),
            jaccard_sum=self._jaccard.tolist(),
        )


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


class _Forward(NamedTuple):
    logits_PV: Tensor
    """Of all positions, P = B * S, in the model's dtype."""
    kept_index_TLK: Tensor
    """Kept experts of scored positions, -1 where dropped; on the host."""


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
) -> Iterator[QualityRecord]:
    """Compare rules with the model's own top-k on the same tokens.

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
    Yields:
        One record per document and rule, in groups of documents.
    Raises:
        InputError: the tokenizer has no prefix token.
    """
    prefix = prefix_token(tokenizer)
    routers = find_routers(model)
    own = bind_quickest(model, TopK(k=routers.model_top_k))
    bound = {name: bind_quickest(model, rule, calibration) for name, rule in rules.items()}
    for group in document_groups(documents):
        tallies = {
            name: [DocumentTally(len(routers.sites), routers.num_experts) for _ in group]
            for name in rules
        }
        windows = list(cut_windows(group, prefix, window, stride))
        for batch in _batches(windows, model, batch_size):
            baseline = _forward(model, own, batch)
            top_k = _predictions(baseline.logits_PV, batch)
            for name, rule in bound.items():
                ruled = baseline if rule.rule == own.rule else _forward(model, rule, batch)
                scores = _compare(top_k, ruled.logits_PV, batch)
                _add(tallies[name], batch, scores, baseline, ruled)
        for name, row in tallies.items():
            for document, tally in zip(group, row, strict=True):
                yield tally.record(name, rules[name], document)


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
    documents: Sequence[TokenizedDocument],
) -> Iterator[list[TokenizedDocument]]:
    """Split documents into groups whose windows are batched together."""
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


def _collate(windows: list[Window], device: torch.device) -> _Batch:
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
    )


@torch.inference_mode()
def _forward(model: Any, rule: BoundRule, batch: _Batch) -> _Forward:
    with evaluating(model), install(model, rule) as trace:
        output = model(
            input_ids=batch.input_ids_BS, attention_mask=batch.attention_mask_BS, use_cache=False
        )
    is_scored_T = batch.scored_BS[batch.attention_mask_BS.bool().cpu()]
    return _Forward(output.logits.flatten(0, 1), trace.kept_index[is_scored_T])


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
        count = len(window.ids) - 1 - window.first_scored
        part = slice(start, start + count)
        tallies[window.document].add(
            *(column[part].numpy() for column in scores),
            first_position=window.first_scored,
            kept_index_TLK=ruled.kept_index_TLK[part],
            top_k_index_TLK=baseline.kept_index_TLK[part],
        )
        start += count
