"""Obtain a run's calibration: from a file, from the folder, or by calibrating the model."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from bh_routing.engine.calibrate import calibrate
from bh_routing.engine.texts import (
    Document,
    find_shared_passages,
    packaged_documents,
    passage_hashes,
    read_documents,
    text_sha256,
)
from bh_routing.errors import CalibrationError, InputError
from bh_routing.experiments.configurations import NamedRule
from bh_routing.experiments.defaults import CALIBRATION_TOKENS
from bh_routing.experiments.specs import CalibratedSpec, CalibrateSpec, ConfiguredSpec
from bh_routing.models.load import load_model
from bh_routing.models.routers import model_fingerprint
from bh_routing.nulls.calibration import Calibration
from bh_routing.nulls.catalog import get_null, is_calibrated
from bh_routing.nulls.cut_offs import MIN_TOKENS
from bh_routing.results.files import unwritable
from bh_routing.results.records import CALIBRATION
from bh_routing.rules.benjamini_hochberg import BenjaminiHochberg
from bh_routing.rules.noise import noise_control

USUAL_NULLS: Final = ("background", "pooled")
"""Fitted even if no rule needs them: such a rule can be added to the folder later at no cost."""

QUOTED_WORDS: Final = 10
"""Words of a shared passage that an error quotes, enough to find it."""

log = logging.getLogger(__name__)


def calibration_documents(sources: Sequence[str]) -> list[Document]:
    """Read the calibration text of a run; without sources, the packaged text.

    Raises:
        InputError: the text can't be read.
    """
    return read_documents(sources) if sources else packaged_documents("calibration")


def name_text(sources: Sequence[str]) -> str:
    """Name the calibration text of a run for its documents."""
    return f"text {', '.join(sources)}" if sources else "packaged text"


def check_held_out(
    spec: ConfiguredSpec, rules: Sequence[NamedRule], documents: Sequence[Document]
) -> None:
    """Raise InputError if a document to score shares a passage with text that a rule is fitted on.

    Args:
        spec: names the calibration or its text, and the budget of the rules.
        rules: the rules; without a null distribution and a budget nothing is fitted.
        documents: the evaluation text.
    Raises:
        InputError: a passage is in both texts; the error quotes it.
        CalibrationError: the calibration's file can't be read.
    """
    is_calibrated = any(named.rule.required_null is not None for named in rules)
    if is_calibrated and spec.calibration is not None:
        calibration = Calibration.load(spec.calibration)
        check_calibration_overlap(documents, calibration, f"calibration {spec.calibration}")
    if spec.budget is not None or (is_calibrated and spec.calibration is None):
        check_overlap(documents, calibration_documents(spec.calibration_texts))


def check_overlap(documents: Sequence[Document], calibration: Sequence[Document]) -> None:
    """Raise InputError if a document to score shares a passage with the calibration text."""
    known = passage_hashes(document.text for document in calibration)
    _reject_shared(documents, find_shared_passages(documents, known), "the calibration text")


def check_calibration_overlap(
    documents: Sequence[Document], calibration: Calibration, name: str
) -> None:
    """Raise InputError if a document to score has a passage of a calibration's text.

    A file of an earlier schema holds no passages; only its text as a whole is compared.
    """
    if len(calibration.passages):
        shared = find_shared_passages(documents, calibration.passages.numpy())
    elif calibration.text_sha256 == text_sha256([document.text for document in documents]):
        shared = [(document.name, document.text.split()) for document in documents]
    else:
        log.warning(
            "%s was saved by an earlier version, which kept no trace of its text: "
            "that it shares no passage with the scored text can't be checked",
            name,
        )
        return
    _reject_shared(documents, shared, f"the text of {name}")


def _reject_shared(
    documents: Sequence[Document], shared: Sequence[tuple[str, Sequence[str]]], where: str
) -> None:
    for name, words in shared:
        raise InputError(
            f"{len(shared)} of the {len(documents)} documents to score share a passage with "
            f"{where}, so rules would be judged on what they were fitted on; the first is "
            f"{name!r}, with '{' '.join(words[:QUOTED_WORDS])} …'; score or calibrate on other text"
        )


def obtain_calibration(
    spec: CalibratedSpec,
    rules: Sequence[NamedRule],
    model: Any,
    tokenizer: Any,
    folder: Path | None = None,
    stored: Mapping[str, Any] = MappingProxyType({}),
    usual_nulls: Sequence[str] = USUAL_NULLS,
) -> tuple[Calibration | None, dict[str, Any] | None]:
    """Load or make the calibration of a run.

    A resumed run reuses its folder's calibration if that was made from the same text, so that its
    results equal those of an uninterrupted run; missing null distributions are fitted and added.

    Args:
        spec: the calibration or its text, and the seed.
        rules: the rules that may need a calibration.
        model, tokenizer: the model to calibrate.
        folder: the folder of the results; None: nothing is reused.
        stored: run.json of an earlier run or sweep of the folder; empty if there is none.
        usual_nulls: fitted in addition to those that the rules need, if they need any.
    Returns:
        The calibration and its entry in run.json; both None if no rule needs one.
    Raises:
        CalibrationError: a file can't be read, or isn't a calibration.
        InputError: the text can't be read.
    """
    needed = sorted({n for rule in rules if (n := rule.rule.required_null) is not None})
    if not needed:
        return None, None
    if spec.calibration is not None:
        start = time.perf_counter()
        loaded = Calibration.load(spec.calibration)
        return loaded, _document(loaded, f"file {spec.calibration}", time.perf_counter() - start)
    texts = [document.text for document in calibration_documents(spec.calibration_texts)]
    source = name_text(spec.calibration_texts)
    kept = None
    if folder is not None:
        kept = _reuse(folder, stored, text_sha256(texts), model_fingerprint(model), spec.seed)
    if kept is not None and set(needed) <= set(kept.nulls):
        return kept, stored["calibration"]
    nulls = {*usual_nulls, *needed} if kept is None else {*needed} - {*kept.nulls}
    start = time.perf_counter()
    fresh = calibrate(
        model,
        tokenizer,
        texts,
        nulls=sorted(nulls),
        max_tokens=CALIBRATION_TOKENS,
        seed=spec.seed,
    )
    seconds = time.perf_counter() - start
    log.info(
        "calibrated %s on the %s: %s tokens of %d documents in %.1f s",
        ", ".join(sorted(nulls)),
        source,
        f"{fresh.num_tokens:,}",
        fresh.num_documents,
        seconds,
    )
    whole = fresh if kept is None else kept.extended_by(fresh)
    return whole, _document(whole, source, seconds)


def _reuse(
    folder: Path, stored: Mapping[str, Any], text_hash: str, fingerprint: str, seed: int
) -> Calibration | None:
    """Return the folder's calibration if a new one would have the same tables."""
    path = folder / CALIBRATION
    if not stored.get("calibration") or not path.exists():
        return None
    try:
        found = Calibration.load(path)
    except CalibrationError as error:
        log.warning("calibrating again: %s", error)
        return None
    # By table: a run that was killed while adding tables may have left either file.
    known = stored["identity"].get("tables", {})
    same = (
        found.model_fingerprint == fingerprint
        and found.text_sha256 == text_hash
        and found.seed == seed
        and all(known.get(null, own) == own for null, own in found.table_fingerprints.items())
    )
    if not same:
        return None
    log.info("using the calibration in %s", path)
    return found


def _document(calibration: Calibration, source: str, seconds: float) -> dict[str, Any]:
    return {
        "source": source,
        "seconds": seconds,
        "num_tokens": calibration.num_tokens,
        "num_documents": calibration.num_documents,
        "table_size": {null: calibration.table_size(null) for null in calibration.nulls},
        "fingerprint": calibration.fingerprint,
        "resolution": {null: calibration.resolution(null) for null in calibration.nulls},
        "text_sha256": calibration.text_sha256,
        "seed": calibration.seed,
    }


def calibrate_to_file(spec: CalibrateSpec) -> Calibration:
    """Fit the null distributions that a spec names, and save them to its file.

    Raises:
        InputError: the model, the text or a name can't be used, or the text is too small.
    """
    if spec.max_tokens < MIN_TOKENS:
        raise InputError(
            f"max_tokens: must be at least {MIN_TOKENS}, got {spec.max_tokens}: no rule takes a "
            "calibration from fewer"
        )
    names = [name for name in spec.nulls if is_calibrated(name)]
    documents = calibration_documents(spec.calibration_texts)
    model, tokenizer = load_model(
        spec.model, device=spec.device, dtype=spec.dtype, device_map=spec.device_map
    )
    texts = [document.text for document in documents]
    fitted = calibrate(
        model, tokenizer, texts, nulls=names, max_tokens=spec.max_tokens, seed=spec.seed
    )
    fitted.check_text()
    fitted.save(spec.output)
    return fitted


def save_calibration(calibration: Calibration, folder: Path) -> None:
    """Save the calibration next to the results, unless the same one is there already.

    Raises:
        ResultsError: the folder is missing or not writable.
    """
    path = folder / CALIBRATION
    if not folder.is_dir():  # `save` would create it
        raise unwritable(path, FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)))
    if path.exists():
        try:
            if Calibration.load(path).fingerprint == calibration.fingerprint:
                return
        except CalibrationError:
            log.warning("replacing %s, which can't be read", path)
    calibration.save(path)


def describe_nulls(
    rules: Sequence[NamedRule], *, num_experts: int, model_top_k: int, seed: int
) -> list[dict[str, Any]]:
    """Describe the null distributions in use: the meaning of alpha, and rules' experts on noise."""
    by_null: dict[str, dict[str, BenjaminiHochberg]] = {}
    for named in rules:
        if isinstance(named.rule, BenjaminiHochberg):
            by_null.setdefault(named.rule.null, {})[named.name] = named.rule
    return [
        {
            "name": null,
            "alpha_is": get_null(null).alpha_is,
            "meaning": get_null(null).meaning,
            "noise": [
                {"config_name": name, **asdict(result)}
                for name, result in zip(
                    own,
                    noise_control(
                        list(own.values()),
                        num_experts=num_experts,
                        model_top_k=model_top_k,
                        seed=seed,
                    ),
                    strict=True,
                )
            ],
        }
        for null, own in sorted(by_null.items())
    ]
