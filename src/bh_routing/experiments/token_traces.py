"""The slots kept for every token of an experiment, in compact form for the report's token view.

Traces are made after the experiments, in one pass over each sequence: nothing is recorded during
timed generation. A rule whose unit isn't the token may decide differently in that pass.

Axes: T tokens, L layers, K slots.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from bh_routing.engine.generate import encode_prompt
from bh_routing.errors import ResultsError
from bh_routing.experiments.executors import Cell
from bh_routing.experiments.experiment import Subject
from bh_routing.models.routing import BoundRule, bind_rule, install
from bh_routing.models.sites import Proposal
from bh_routing.results.files import render_json_lines, write_atomically
from bh_routing.results.journal import Journal, as_object
from bh_routing.results.records import JOURNAL, TOKEN_TRACES, TokenTrace
from bh_routing.rules.plan import Candidates

MAX_TOKENS: Final = 256
"""Maximum number of traced tokens per sequence."""
_UNKNOWN: Final = 65_535


def write_token_traces(
    folder: Path, subject: Subject, grid: Sequence[Cell], num_prompts: int
) -> None:
    """Trace the first prompts of every configuration and write `token_traces.jsonl`.

    Args:
        folder: the run's folder; its journal holds the generated tokens.
        subject: model, tokenizer and calibration.
        grid: the experiments of the run; those missing from the journal are skipped.
        num_prompts: prompts per configuration; 0 removes the file.
    """
    path = folder / TOKEN_TRACES
    if num_prompts == 0:
        path.unlink(missing_ok=True)
        return
    texts = list(dict.fromkeys(cell.prompt.text for cell in grid))[:num_prompts]
    wanted = {cell.key: cell for cell in grid if cell.prompt.text in texts}
    known = _known_traces(path)
    generated = {
        line["key"]: line["detail"]["output_token_ids"]
        for line in Journal.read(folder / JOURNAL, as_object).items
        if line["key"] in wanted and line["record"]["status"] == "ok"
    }
    traces = []
    for key, token_ids in tqdm(generated.items(), desc="token traces"):
        if key in known:
            traces.append(known[key])
        elif (trace := trace_tokens(subject, wanted[key], token_ids)) is not None:
            traces.append(asdict(trace))
    write_atomically(path, render_json_lines(traces))


@torch.inference_mode()
def trace_tokens(subject: Subject, cell: Cell, token_ids: Sequence[int]) -> TokenTrace | None:
    """Run the model over a prompt and its continuation, and record every slot.

    Args:
        subject: model, tokenizer and calibration.
        cell: the experiment.
        token_ids: generated tokens; the last was never fed back and isn't traced.
    Returns:
        The trace; None for a model whose routers propose different numbers of slots.
    """
    model, tokenizer = subject.model, subject.tokenizer
    prompt_ids = encode_prompt(tokenizer, cell.prompt.text)
    ids = [*prompt_ids, *token_ids[:-1]][:MAX_TOKENS]
    bound = bind_rule(model, cell.named_rule.rule, subject.calibration)
    seen: dict[int, Proposal] = {}
    with ExitStack() as undo:
        for site in bound.routers.sites:

            def watch(proposal: Proposal, layer: int = site.layer) -> None:
                seen[layer] = proposal

            # Before the rule's own hook, to record the router's unmodified proposal.
            undo.callback(site.watch(watch))
        trace = undo.enter_context(install(model, bound))
        model(torch.tensor([ids], device=model.device), use_cache=False, logits_to_keep=1)
    layers = [_slots(bound, layer, seen[layer]) for layer in range(len(bound.routers.sites))]
    if len({index_TK.shape for index_TK, _, _ in layers}) > 1:
        return None
    expert_TLK, weight_TLK, p_TLK = (np.stack(a, axis=1) for a in zip(*layers, strict=True))
    kept_TLK = trace.kept_index.numpy() >= 0
    order_TLK = np.argsort(-weight_TLK, axis=2, kind="stable")
    planes = [
        np.take_along_axis(a, order_TLK, 2) for a in (expert_TLK, kept_TLK, weight_TLK, p_TLK)
    ]
    return TokenTrace(
        key=cell.key,
        config_name=cell.named_rule.name,
        prompt_text=cell.prompt.text,
        tokens=[tokenizer.decode([token]) for token in ids],
        num_prompt_tokens=min(len(prompt_ids), len(ids)),
        layers=expert_TLK.shape[1],
        slots=expert_TLK.shape[2],
        model_top_k=bound.routers.model_top_k,
        planes=pack(*planes),
    )


def _slots(bound: BoundRule, layer: int, proposal: Proposal) -> tuple[NDArray[Any], ...]:
    """Return expert, fraction of the weight, and p-value of each slot of one layer."""
    index_TK, weights_TK = proposal.top_k_index_TK, proposal.top_k_weights_TK.float()
    fraction_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp_min(1e-30)
    p_TK = torch.full_like(fraction_TK, float("nan"))
    if (p_values := bound.rule.slot_p_values(bound.contexts[layer])) is not None:
        p_TK = p_values(Candidates(proposal.scores_TE, index_TK, proposal.top_k_weights_TK))
    return index_TK.cpu().numpy(), fraction_TK.cpu().numpy(), p_TK.double().cpu().numpy()


def pack(
    expert_TLK: NDArray[np.integer],
    kept_TLK: NDArray[np.bool_],
    weight_TLK: NDArray[np.floating],
    p_TLK: NDArray[np.floating],
) -> str:
    """Pack slots in the format of `records.TokenTrace.planes`.

    Args:
        expert_TLK: the expert of each slot, best slot first.
        kept_TLK: whether the slot was kept.
        weight_TLK: its fraction of the candidates' weight, in [0, 1].
        p_TLK: its p-value, in (0, 1]; NaN if there is none.
    """
    expert = np.where(kept_TLK, expert_TLK, -1 - expert_TLK).astype("<i2")
    weight = np.rint(np.clip(weight_TLK, 0.0, 1.0) * 65_535).astype("<u2")
    p = np.full(expert.shape, _UNKNOWN, dtype="<u2")
    known = np.isfinite(p_TLK) & (p_TLK > 0)
    p[known] = np.clip(np.rint(-1000.0 * np.log10(p_TLK[known])), 0, _UNKNOWN - 1).astype("<u2")
    raw = expert.tobytes() + weight.tobytes() + p.tobytes()
    return base64.b64encode(zlib.compress(raw)).decode("ascii")


def _known_traces(path: Path) -> dict[str, dict[str, Any]]:
    """Return the traces of an earlier run by key; none if the file is damaged."""
    try:
        return {trace["key"]: trace for trace in Journal.read(path, as_object).items}
    except (ResultsError, KeyError):
        return {}
