"""What a result depends on beside its spec: versions, machine, revision, memory."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import bh_routing

_GIT_TIMEOUT_SEC = 5.0


def collect_provenance(seed: int) -> dict[str, Any]:
    """Return versions, machine, seed, revision and start, as in run.json."""
    return {
        **library_versions(),
        "python": platform.python_version(),
        "numpy": metadata.version("numpy"),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "git_revision": git_revision(Path(bh_routing.__file__).parent),
        "seed": seed,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def library_versions() -> dict[str, str]:
    """Return the versions that a greedy text may depend on."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    return {"bh_routing": bh_routing.__version__, **versions}


def git_revision(folder: Path) -> str | None:
    """Return the revision that tracks `folder`, with `-dirty` if changed; None outside git."""
    # A virtual environment inside somebody else's clone isn't tracked by it.
    if not _git(folder, "ls-files", "__init__.py"):
        return None
    return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_SEC,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def device_name(device: torch.device) -> str:
    """Return the product's name; of a CPU whose name isn't known the architecture's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):  # Linux alone has this file, and not on every architecture the name
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_memory_bytes(device: torch.device) -> int:
    """Return the highest memory use so far: of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
