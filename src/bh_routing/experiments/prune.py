"""Prune a checkpoint: score its experts on text and write it without the others."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from huggingface_hub import ModelCardData

from bh_routing.engine.expert_scores import MEANINGS, best_experts, find_unneeded, observe_experts
from bh_routing.engine.texts import Document, text_sha256
from bh_routing.errors import InputError
from bh_routing.experiments.calibrating import calibration_documents, name_text
from bh_routing.experiments.experiment import release_memory
from bh_routing.experiments.identity import collect_provenance
from bh_routing.experiments.specs import PruneSpec
from bh_routing.models.expert_axes import Checkpoint, block_of, check_routers, open_checkpoint
from bh_routing.models.load import load_model
from bh_routing.models.prune import reject_existing, write_pruned
from bh_routing.models.routers import find_routers, model_fingerprint
from bh_routing.results.files import render_json

log = logging.getLogger(__name__)

PRUNING_JSON: Final = "pruning.json"
"""In a pruned checkpoint: how it was made, and the kept experts of each router."""


def prune(spec: PruneSpec, documents: Sequence[Document] | None = None) -> dict[str, Any]:
    """Write a checkpoint with fewer experts per layer, which transformers loads like any other.

    Args:
        spec: the model, the number of experts, the score and the new folder.
        documents: text to score the experts on; None: the spec's.
    Returns:
        The content of pruning.json.
    Raises:
        InputError: keep, alpha or the text can't be used.
        ModelError: the model can't be loaded, routed or pruned; nothing is written.
        ResultsError: the folder exists, or can't be written.
    """
    reject_existing(spec.output)
    checkpoint = open_checkpoint(spec.model)
    if spec.keep is not None and spec.keep >= checkpoint.num_experts:
        raise InputError(
            f"keep: must be from 2 to {checkpoint.num_experts - 1}, one less than the experts of "
            f"{spec.model}, got {spec.keep}; set a smaller number"
        )
    source = "texts given from Python"
    if documents is None:
        documents = calibration_documents(spec.calibration_texts)
        source = name_text(spec.calibration_texts)
    made = _choose(spec, checkpoint, documents, source)
    release_memory()
    kept = {block_of(router): experts for router, experts in made["kept"].items()}
    if checkpoint.not_loaded:
        log.warning(
            "%d tensors that transformers doesn't load, such as %s, aren't part of the pruned "
            "checkpoint",
            len(checkpoint.not_loaded),
            checkpoint.not_loaded[0],
        )
    files = {PRUNING_JSON: render_json(made), "README.md": _card(made).encode()}
    write_pruned(checkpoint, kept, files, spec.output)
    return made


def _choose(
    spec: PruneSpec, checkpoint: Checkpoint, documents: Sequence[Document], source: str
) -> dict[str, Any]:
    """Score the experts with the loaded model, and return the content of pruning.json."""
    model, tokenizer = load_model(
        spec.model, device=spec.device, dtype=spec.dtype, device_map=spec.device_map
    )
    routers = find_routers(model)
    check_routers(checkpoint, routers, spec.model)
    num_experts = checkpoint.num_experts
    num_groups = max(s.facts.groups.num_groups if s.facts.groups else 1 for s in routers.sites)
    if spec.keep is not None and (spec.keep % num_groups or spec.keep < 2 * num_groups):
        raise InputError(
            f"keep: must be a multiple of {num_groups}, at least twice that, because the router of "
            f"{spec.model} chooses among {num_groups} groups of experts, got {spec.keep}; set "
            f"{max(2, spec.keep // num_groups) * num_groups}"
        )
    use = observe_experts(
        model,
        tokenizer,
        documents,
        by_loss=spec.score == "fisher_mass" or spec.alpha is not None,
        max_tokens=spec.max_tokens,
    )
    keep, rejected = spec.keep, None
    if spec.alpha is not None:
        # Classes of the router that are no routed expert come last.
        unneeded_LE = find_unneeded(use, spec.alpha, spec.seed)[:, :num_experts]
        rejected = unneeded_LE.sum(1).tolist()
        keep = _number_to_keep(min(rejected), num_experts, num_groups, spec.alpha)
    assert keep is not None, "the spec has keep or alpha"
    scores_LE = use.scores(spec.score, spec.seed)[:, :num_experts]
    kept_LK = best_experts(scores_LE, keep, num_groups)
    return {
        "model": Path(spec.model).name if Path(spec.model).is_dir() else spec.model,
        "model_fingerprint": model_fingerprint(model),
        "num_experts": num_experts,
        "keep": keep,
        "alpha": spec.alpha,
        "rejected_by_layer": rejected,
        "score": spec.score,
        "score_is": MEANINGS[spec.score],
        "text": {
            "source": source,
            "num_tokens": int(use.tokens_D.sum()),
            "num_documents": len(use.tokens_D),
            "sha256": text_sha256([document.text for document in documents]),
        },
        "provenance": collect_provenance(spec.seed),
        "kept": {
            site.name: experts.tolist()
            for site, experts in zip(routers.sites, kept_LK, strict=True)
        },
        "scores": {
            site.name: scores.tolist()
            for site, scores in zip(routers.sites, scores_LE, strict=True)
        },
    }


def _number_to_keep(removable: int, num_experts: int, num_groups: int, alpha: float) -> int:
    """Return the number of experts per layer that BH's fewest rejections in a layer allow.

    The smallest count of all layers, so that no layer loses more experts than were rejected in it.
    """
    removed = min(removable // num_groups, num_experts // num_groups - 2) * num_groups
    if removed < 1:
        raise InputError(
            f"alpha: at {alpha} some layer has {removable} experts that are shown not to matter to "
            f"the text, and every layer must lose equally many, {num_groups} or more; set a larger "
            "alpha, give more text, or set keep"
        )
    return num_experts - removed


def _card(made: dict[str, Any]) -> str:
    """Render the model card."""
    name, text, versions = made["model"], made["text"], made["provenance"]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["mixture-of-experts", "pruned", "bh-routing"],
        base_model=name if "/" in name else None,
    )
    number = "set by hand"
    if made["alpha"] is not None:
        number = (
            "Benjamini-Hochberg over all experts of the model rejected, at nominal alpha "
            f'{made["alpha"]}, "this expert matters to the text" (its Fisher mass is at least the '
            f"median expert's) for {min(made['rejected_by_layer'])} experts or more of each layer"
        )
    rows = {
        "experts per layer": f"{made['keep']} of {made['num_experts']}; {number}",
        "kept": f"those of the highest score `{made['score']}`: {made['score_is']}",
        "text": (
            f"{text['source']}: {text['num_tokens']:,} tokens of {text['num_documents']} "
            f"documents, SHA-256 `{text['sha256']}`"
        ),
        "original": f"{name}, fingerprint `{made['model_fingerprint']}`",
        "made by": (
            f"bh-routing {versions['bh_routing']}, torch {versions['torch']}, transformers "
            f"{versions['transformers']}, seed {versions['seed']}, {versions['started_at']}"
        ),
    }
    lines = [f"| {title} | {value} |" for title, value in rows.items()]
    return "\n".join(
        [
            f"---\n{data.to_yaml()}\n---\n",
            f"# {name} with {made['keep']} of {made['num_experts']} experts\n",
            "The original's weights without the other experts, and without any training "
            "afterwards. Plain `transformers` loads it: no code of its own is needed.\n",
            "| | |\n|:--|:--|",
            *lines,
            f"\n`{PRUNING_JSON}` lists the kept experts of every layer by their number in the "
            "original, with all scores. The licence is the original's.\n",
        ]
    )
