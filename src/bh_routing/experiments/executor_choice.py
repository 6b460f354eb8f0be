"""From the options of a command to the executor that they ask for."""

from __future__ import annotations

from bh_routing.experiments.executors import Executor, SerialExecutor
from bh_routing.experiments.experiment import Subject
from bh_routing.experiments.ray_executor import RayExecutor, RaySettings
from bh_routing.experiments.spec import RunSpec
from bh_routing.experiments.threads import choose_threads


def make_executor(spec: RunSpec, subject: Subject) -> Executor:
    """Return the executor that a spec names; nothing is started before it is entered."""
    if spec.executor == "local":
        return SerialExecutor(subject)
    settings = RaySettings(
        address=spec.ray_address,
        num_workers=spec.workers,
        threads=choose_threads(subject.model).decode,
    )
    return RayExecutor(spec.model, spec.dtype, subject, settings)
