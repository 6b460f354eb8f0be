"""Capture the proposals of the unmodified model's routers, and count what rules keep of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bh_routing.engine.texts import Document, as_documents
from bh_routing.engine.windows import (
    TokenizedDocument,
    Window,
    cut_windows,
    plan_steps,
    prefix_token,
    tokenize_documents,
)
from bh_routing.errors import InputError
from bh_routing.models.capture import evaluating
from bh_routing.models.routers import Routers, describe_model, find_routers
from bh_routing.models.routing import bind_rule, install, layer_context
from bh_routing.models.trace import DROPPED, count_distinct
from bh_routing.nulls.calibration import Calibration
from bh_routing.rules.base import LayerContext, MixingRule, Rule, Unit
from bh_routing.rules.plan import Candidates, Rows, Selector, keep_best

MEMORY_BYTES: Final = 2**30
"""Maximum memory for the proposals of a text."""
WINDOW: Final = 1024
"""Longest sequence whose weights are compared."""
_SLOT_BYTES: Final = 16  # index, weight and norm
_ROW_BYTES: Final = 16  # sequence and position


@dataclass(frozen=True, slots=True)
class Proposals:
    """Candidates of every layer for the same tokens, on their layers' devices."""

    layers: tuple[Candidates, ...]
    counted_T: Tensor
    """Bool: False for tokens that are context only."""


@dataclass(frozen=True, eq=False)
class _Recorder(MixingRule):
    """Keeps the model's own top-k and records the proposals."""

    method: ClassVar[str] = "recorder"
    seen: tuple[list[Candidates], ...]
    num_slots: int
    with_norms: bool

    @property
    def unit(self) -> Unit:
        return "block"

    @property
    def needs_output_norms(self) -> bool:
        return self.with_norms

    def most_kept(self, model_top_k: int) -> int:
        return self.num_slots

    def bind(self, context: LayerContext) -> Selector:
        mine, model_top_k = self.seen[context.layer], context.model_top_k

        def select(candidates: Candidates) -> Tensor:
            keep_TK = keep_best(candidates, model_top_k)
            assert candidates.rows is not None, "the unit isn't the token"
            is_real_T = candidates.rows.sequence_T >= 0
            if not is_real_T.all():
                candidates = _select_rows(candidates, is_real_T)
            mine.append(candidates)
            return keep_TK

        return select


def _select_rows(candidates: Candidates, is_real_T: Tensor) -> Candidates:
    logits_TE, index_TK, weights_TK, norms_TK, rows, _ = candidates
    return Candidates(
        logits_TE[is_real_T],
        index_TK[is_real_T],
        weights_TK[is_real_T],
        None if norms_TK is None else norms_TK[is_real_T],
        None if rows is None else Rows(*(field_T[is_real_T] for field_T in rows)),
    )


def tokens_that_fit(routers: Routers) -> int:
    """Return the number of tokens whose proposals fit into MEMORY_BYTES."""
    layer_bytes = 4 * routers.num_experts + _SLOT_BYTES * routers.model_top_k + _ROW_BYTES
    return MEMORY_BYTES // (len(routers.sites) * layer_bytes)


@torch.inference_mode()
def capture_proposals(
    model: Any,
    tokenizer: Any,
    documents: Sequence[TokenizedDocument],
    *,
    window: int,
    num_candidates: int,
    with_norms: bool = False,
    decode_batch: int | None = None,
) -> Proposals:
    """Run the unmodified model over documents and return its routers' proposals.

    Args:
        model: a transformers model with routers, not inside `route`.
        tokenizer: its tokenizer, for the prefix token.
        documents: text of at most `tokens_that_fit` tokens.
        window: maximum number of input tokens per forward pass.
        num_candidates: slots that the routers propose, at least the model's own k.
        with_norms: run every candidate expert and keep the norm of its output.
        decode_batch: sequences per emulated decode step; None: no steps.
    Raises:
        InputError: the tokenizer has no prefix token.
    """
    routers = find_routers(model)
    seen: tuple[list[Candidates], ...] = tuple([] for _ in routers.sites)
    counted = []
    windows = list(cut_windows(documents, prefix_token(tokenizer), window, stride=window))
    batches: Iterable[list[Window]] = ([w] for w in windows)
    if decode_batch is not None:
        batches = plan_steps(windows, [d.cluster for d in documents], decode_batch, seed=0)
    recorder = bind_rule(model, _Recorder(seen, num_candidates, with_norms))
    with (
        evaluating(model),
        install(model, recorder, decode_batch=decode_batch),
    ):
        for batch in batches:
            inputs = [torch.tensor(w.ids[:-1]) for w in batch]
            ids_BS = pad_sequence(inputs, batch_first=True).to(model.device)
            length_B1 = torch.tensor([[len(ids)] for ids in inputs], device=model.device)
            position_S = torch.arange(ids_BS.shape[1], device=model.device)
            is_real_BS = position_S < length_B1
            model(ids_BS, attention_mask=is_real_BS.long(), use_cache=False, logits_to_keep=1)
            first_B1 = torch.tensor([[w.first_scored] for w in batch], device=model.device)
            counted.append((position_S >= first_B1)[is_real_BS])
    return Proposals(tuple(_join(calls) for calls in seen), torch.cat(counted))


def median_ratios(
    model: Any, tokenizer: Any, texts: Sequence[str | Document], *, max_tokens: int | None = None
) -> tuple[float, ...]:
    """Return each layer's median of the second largest weight over the largest, on a text.

    As `ratio` of FloorThreshold with `min_k` 1, a token keeps more than its best expert in half of
    the cases.

    Args:
        model: a transformers model with routers, not inside `route`.
        tokenizer: its tokenizer.
        texts: calibration texts.
        max_tokens: tokens in total, spread over the documents; None: all.
    Raises:
        InputError: a token uses one expert only, or there is no text.
    Source: Lu et al. (2024), "Not All Experts are Equal", arXiv 2402.14800, and its repository
        Lucky-Lance/Expert_Sparsity (read: method/dynamic_skipping.py).
    """
    routers = find_routers(model)
    if routers.model_top_k < 2:
        raise InputError(
            "ratios need a model that uses at least 2 experts per token, got 1; choose another"
        )
    context = describe_model(model).context_length
    proposals = capture_proposals(
        model,
        tokenizer,
        tokenize_documents(tokenizer, as_documents(texts), max_tokens),
        window=min(WINDOW, context or WINDOW),
        num_candidates=routers.model_top_k,
    )
    ratios = []
    for layer in proposals.layers:
        best_T2 = layer.top_k_weights_TK[proposals.counted_T.to(layer.top_k_weights_TK.device)]
        first_T, second_T = best_T2.float().topk(2).values.T
        ratios.append(float((second_T / first_T).quantile(0.5)))
    return tuple(ratios)


def _join(calls: list[Candidates]) -> Candidates:
    norms = [c.output_norms_TK for c in calls if c.output_norms_TK is not None]
    joined = Candidates(
        router_logits_TE=torch.cat([c.router_logits_TE for c in calls]),
        top_k_index_TK=torch.cat([c.top_k_index_TK for c in calls]),
        top_k_weights_TK=torch.cat([c.top_k_weights_TK for c in calls]),
        output_norms_TK=torch.cat(norms) if norms else None,
        rows=_join_rows([c.rows for c in calls if c.rows is not None]),
    )
    calls.clear()  # so that only one layer at a time is in memory twice
    return joined


def _join_rows(calls: Sequence[Rows]) -> Rows:
    """Concatenate rows of calls that share neither a sequence nor a decode step."""
    joined, num_sequences, num_steps = [], 0, 0
    for rows in calls:
        joined.append(
            Rows(
                rows.sequence_T + num_sequences,
                rows.position_T,
                torch.where(rows.step_T >= 0, rows.step_T + num_steps, -1),
            )
        )
        num_sequences += int(rows.sequence_T.max()) + 1
        num_steps += int(rows.step_T.max()) + 1
    return Rows(*(torch.cat(fields) for fields in zip(*joined, strict=True)))


@torch.inference_mode()
def mean_experts(
    rule: Rule, proposals: Proposals, routers: Routers, calibration: Calibration | None = None
) -> float:
    """Return the mean number of proposed slots that a rule keeps per counted token and layer.

    The rule is bound without checks: a search also tries levels that `bind_rule` rejects.

    Raises:
        CalibrationError: the calibration lacks a reference that the rule needs.
    """
    kept = []
    for layer, candidates in enumerate(proposals.layers):
        device = candidates.router_logits_TE.device
        select = rule.bind(layer_context(routers, layer, rule, calibration, device))
        counted_T = proposals.counted_T.to(device)
        kept.append(select(candidates)[counted_T].sum().to(proposals.counted_T.device))
    units = len(kept) * int(proposals.counted_T.sum())
    return int(torch.stack(kept).sum()) / units


@torch.inference_mode()
def mean_distinct_experts(
    rule: Rule, proposals: Proposals, routers: Routers, calibration: Calibration | None = None
) -> float:
    """Return the mean number of distinct experts in a counted token's decode step, over layers.

    The proposals must be captured with a `decode_batch`; else as `mean_experts`.

    Raises:
        CalibrationError: the calibration lacks a reference that the rule needs.
    """
    total = 0
    for layer, candidates in enumerate(proposals.layers):
        device = candidates.router_logits_TE.device
        assert candidates.rows is not None, "captured with rows"
        select = rule.bind(layer_context(routers, layer, rule, calibration, device))
        kept_TK = torch.where(select(candidates), candidates.top_k_index_TK, DROPPED)
        step_T = candidates.rows.step_T
        distinct_S1 = count_distinct(step_T, kept_TK[:, None], routers.num_experts)
        total += int(distinct_S1[step_T[proposals.counted_T.to(device)]].sum())
    return total / (len(proposals.layers) * int(proposals.counted_T.sum()))
