"""Check the prerequisites of a run: `bh-routing doctor`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from huggingface_hub import constants
from packaging.requirements import Requirement
from torch import Tensor

from bh_routing.errors import BHRoutingError
from bh_routing.models.load import hub_answers, load_model
from bh_routing.models.routing import route
from bh_routing.multitest import benjamini_hochberg
from bh_routing.nulls import get_null
from bh_routing.rules.benjamini_hochberg import BenjaminiHochberg

State = Literal["ok", "warning", "problem"]
"""warning: an experiment with the demo model works nevertheless; problem: it doesn't."""

DISTRIBUTION: Final = "bh-routing"
_LITTLE_MEMORY: Final = 2 * 2**30
_LITTLE_SPACE: Final = 2**30


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    check: str
    state: State
    text: str
    remedy: str = ""
    """Empty if none is needed."""


def examine(output: Path) -> list[Finding]:
    """Check versions, devices, memory, Triton, the routed demo model, the hub and the disk.

    Args:
        output: folder for the results; nothing is left in it.
    """
    return [
        check_versions(importlib.metadata.requires(DISTRIBUTION) or []),
        _check_devices(),
        _check_memory(),
        _check_triton(),
        _check_routing(),
        check_hub(hub_answers),
        check_writing(output),
    ]


def check_statistics(
    tokens: int, reject: Callable[[Tensor, float], Tensor] = benjamini_hochberg
) -> tuple[list[dict[str, Any]], list[Finding]]:
    """Measure BH's false discovery rate where the null distribution is true.

    Logits of 64 experts are independent N(0, 1), and 0 to 7 of them per token are shifted by 4.
    There the theorem bounds the rate by alpha; a measurement whose 95 % interval lies above alpha
    means that this installation computes a different procedure.

    Args:
        tokens: tokens per measurement.
        reject: maps p-values of shape (tokens, experts) and alpha to rejections.
    Returns:
        The measured rates, and one finding per level.
    """
    generator = torch.Generator().manual_seed(0)
    num_planted_T1 = torch.randint(8, (tokens, 1), generator=generator)
    is_planted_TE = torch.rand(tokens, 64, generator=generator).argsort(dim=-1) < num_planted_T1
    logits_TE = torch.randn(tokens, 64, generator=generator) + 4.0 * is_planted_TE
    p_TE = get_null("gaussian").p_from_score(logits_TE)
    rows, findings = [], []
    for alpha in (0.05, 0.10):
        rejected_TE = reject(p_TE, alpha)
        num_false_T = (rejected_TE & ~is_planted_TE).sum(dim=-1)
        false_T = num_false_T.double() / rejected_TE.sum(dim=-1).clamp_min(1)
        rate, margin = float(false_T.mean()), 1.96 * float(false_T.std()) / tokens**0.5
        low, high = max(0.0, rate - margin), min(1.0, rate + margin)
        rows.append({"alpha": alpha, "tokens": tokens, "fdr": rate, "low": low, "high": high})
        text = f"false discovery rate {rate:.3f} ({low:.3f} to {high:.3f}), {tokens:,} tokens"
        is_kept = low <= alpha
        remedy = "the theorem promises at most α: install torch and bh-routing again"
        findings.append(
            Finding(f"BH at α {alpha:.2f}", "ok" if is_kept else "problem", text,
                    "" if is_kept else remedy)
        )  # fmt: skip
    return rows, findings


def check_versions(requirements: Sequence[str]) -> Finding:
    """Compare installed versions with the package's requirements, such as "torch>=2.11,<3"."""
    wrong, found = [], {}
    for requirement in map(Requirement, requirements):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found[requirement.name] = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(found[requirement.name], prereleases=True):
            wrong.append(
                f"{requirement.name} is {found[requirement.name]}, needed {requirement.specifier}"
            )
    text = f"Python {platform.python_version()}, " + ", ".join(
        f"{name} {found[name]}" for name in ("torch", "transformers", "numpy") if name in found
    )
    if wrong:
        # Nearby versions mostly work; the routing check decides whether these do.
        return Finding("versions", "warning", "; ".join(wrong), "run: pip install bh-routing")
    return Finding("versions", "ok", text)


def _check_devices() -> Finding:
    if not torch.cuda.is_available():
        return Finding(
            "device", "warning", "no CUDA device", "the CPU serves, slowly for large models"
        )
    names = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        names.append(f"{name}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free")
    return Finding("device", "ok", "; ".join(names))


def _check_memory() -> Finding:
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = (page * os.sysconf(name) for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        return Finding("memory", "warning", "unknown on this system", "the demo model needs 1 GiB")
    text = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free, {os.cpu_count()} cores"
    if free < _LITTLE_MEMORY:
        return Finding("memory", "warning", text, "close something, or use --model demo")
    return Finding("memory", "ok", text)


def _check_triton() -> Finding:
    if importlib.util.find_spec("triton") is not None:
        return Finding("triton", "ok", f"triton {importlib.metadata.version('triton')}")
    if not torch.cuda.is_available():
        return Finding("triton", "ok", "not installed, and only needed on a GPU")
    return Finding("triton", "warning", "not installed", 'run: pip install "bh-routing[gpu]"')


def _check_routing() -> Finding:
    """Route one forward pass of the demo model, as every run does."""
    try:
        model, tokenizer = load_model("demo", device="cpu")
        inputs = tokenizer("The old man", return_tensors="pt")
        rule = BenjaminiHochberg(0.05, null="gaussian")
        with torch.inference_mode(), route(model, rule) as trace:
            model(**inputs, use_cache=False)
        mean = float(trace.expert_counts.float().mean())
    # Any error that another version of transformers raises here is the finding.
    except (
        BHRoutingError,
        AttributeError,
        IndexError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        reason = " ".join(str(error).split())[:200]
        return Finding(
            "routing",
            "problem",
            f"the demo model can't be routed ({type(error).__name__}: {reason})",
            "install a version of transformers that bh-routing asks for: pip install bh-routing",
        )
    return Finding("routing", "ok", f"the demo model uses {mean:.1f} experts a token under BH")


def check_hub(answers: Callable[[], bool]) -> Finding:
    """Check that the Hugging Face hub answers within 5 s."""
    if answers():
        return Finding("hub", "ok", f"{constants.ENDPOINT} answers")
    reason = "is switched off by HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "doesn't answer"
    return Finding(
        "hub",
        "warning",
        f"{constants.ENDPOINT} {reason}",
        "models in the local cache, folders and --model demo work",
    )


def check_writing(output: Path) -> Finding:
    """Write a file to the output folder and remove it."""
    folder = output.absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as probe:
            probe.write(b"0")
            probe.flush()
            os.fsync(probe.fileno())
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding(
            "writing", "problem", f"{folder} can't be written to ({error.strerror})",
            "choose another folder: --output FOLDER",
        )  # fmt: skip
    text = f"{folder} takes files, {free / 2**30:.1f} GiB free"
    if free < _LITTLE_SPACE:
        return Finding("writing", "warning", text, "make room: a large run writes up to 1 GiB")
    return Finding("writing", "ok", text)
