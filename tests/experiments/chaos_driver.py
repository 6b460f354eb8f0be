"""Run, break something, resume, and count what was lost: faults drawn from a seed.

    python -m tests.experiments.chaos_driver FOLDER FAULTS SEED

The model is loaded once and every run is a fork. A fault hits a run at one of its own write calls,
or its files afterwards; then the same run is started again. If that is refused, nothing may have
changed, and the remedy that the refusal names is applied. At the end each folder must hold what an
uninterrupted run holds. Prints what happened to each fault as JSON.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
import typer

from bh_routing.analysis.results import load_results
from bh_routing.cli.console import interruptible
from bh_routing.errors import BHRoutingError
from bh_routing.experiments import preparation
from bh_routing.experiments.run import run
from bh_routing.experiments.specs import RunSpec
from bh_routing.models.load import LoadedModel, load_model
from bh_routing.results.records import JOURNAL, QUALITY_JOURNAL
from tests.experiments.kill_driver import make_run, read_keys, read_rows

JOURNALS: Final = (JOURNAL, QUALITY_JOURNAL)
KILLED: Final = -signal.SIGKILL
REFUSED: Final = 2
PAGE: Final = 4096
PATIENCE_SEC: Final = 120.0
CONFIGS: Final[dict[str, dict[str, Any]]] = {
    f"topk_{k}": {"method": "topk", "k": k} for k in (8, 4)
}

Fault = Callable[[], None]
"""What happens in the child at the write call that was drawn."""


class Outcome(NamedTuple):
    """What one fault did, and what was left after the resume."""

    kind: str
    code: int
    """Exit code of the run that was hit; minus the signal's number if it was killed."""
    refused: bool
    """Whether the resume was refused until the remedy was applied."""
    changed_when_refused: bool
    lost: int
    """Lines of the journals that were whole, and untouched by the fault, and are gone."""
    twice: int
    """Keys that stand in a journal twice."""
    unreadable: bool
    """Whether the folder isn't, in the end, what an uninterrupted run leaves."""


def make_small_run(root: Path, name: str) -> RunSpec:
    """Return the spec of a run that writes much for the little that it computes."""
    changes = {"max_tokens": 1, "token_traces": 0, "timing_rounds": 0, "configs": CONFIGS}
    return make_run(root, name).model_copy(update=changes)


class Writes:
    """Counts the process's own write calls, and does something at one of them.

    Args:
        number: the call, from 1.
        fault: what is done there; None: nothing.
        share: of the bytes that are written before the fault.
        marker: a file that is made when the call is reached.
    """

    def __init__(
        self, number: int = 0, fault: Fault | None = None, share: float = 1.0, marker: str = ""
    ) -> None:
        self.count = 0
        self._number = number
        self._fault = fault
        self._share = share
        self._marker = marker

    def install(self) -> None:
        """Replace the functions through which files are written."""
        for name in ("write", "fsync", "replace", "ftruncate"):
            setattr(os, name, self._counted(name, getattr(os, name)))

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            self.count += 1
            if self._fault is None or self.count != self._number:
                return real(*arguments, **keywords)
            os.mkdir(self._marker)
            if name == "write":
                descriptor, data = arguments
                real(descriptor, data[: int(self._share * len(data))])
            self._fault()
            return real(*arguments, **keywords) if name != "write" else len(arguments[1])

        return call


def start(spec: RunSpec, writes: Writes) -> int:
    """Do the run in a fork; return its exit code as the command line would, or -signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            writes.install()
            with interruptible("go on"):
                code = run(spec).exit_code
        except BHRoutingError:
            code = REFUSED
        except typer.Exit as ending:
            code = ending.exit_code
        finally:
            os._exit(code)
    return wait(child)


def wait(child: int) -> int:
    """Return the exit code of a child; kill it if it hangs."""
    deadline = time.monotonic() + PATIENCE_SEC
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError(f"a run hung for {PATIENCE_SEC:.0f} s")


def count_writes(spec: RunSpec) -> int:
    """Do an uninterrupted run and return how many write calls it made."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        writes = Writes()
        real = os.write
        writes.install()
        code = run(spec).exit_code
        real(write_end, str(writes.count).encode())
        os._exit(code)
    assert wait(child) == 0, "the uninterrupted run failed"
    return int(os.read(read_end, 20))


def kill() -> None:
    """End the process on the spot, as a power cut does."""
    os.kill(os.getpid(), signal.SIGKILL)


def terminate() -> None:
    """Ask the process to end."""
    os.kill(os.getpid(), signal.SIGTERM)


def fill_the_disk() -> None:
    """Answer a write as a full disk does."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def can_mount(folder: Path) -> bool:
    """Say whether this process may mount a tmpfs."""
    if not mount(folder, PAGE):
        return False
    subprocess.run(["umount", folder], check=True)
    return True


def mount(folder: Path, size: int, *options: str) -> bool:
    """Mount a tmpfs of `size` bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = ",".join([f"size={size}", *options])
    command = ["mount", "-t", "tmpfs", "-o", flags, "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def read_files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def whole_lines(folder: Path) -> dict[str, list[bytes]]:
    """The lines of each journal that have their line end."""
    found = {}
    for name in JOURNALS:
        path = folder / name
        found[name] = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return found


def keys_of(path: Path) -> list[str]:
    """The keys of a journal, none if there is no such file."""
    return read_keys(path) if path.exists() else []


class Chaos:
    """Faults on runs into folders below `root`, all drawn from one generator."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.random = random.Random(seed)
        whole = make_small_run(root, "whole")
        self.num_writes = count_writes(whole)
        self.rows = read_rows(whole.output)
        self.keys = [keys_of(whole.output / name) for name in JOURNALS]
        self.num_bytes = sum(len(content) for content in read_files(whole.output).values())
        self.kinds: dict[str, Callable[[RunSpec], Outcome]] = {
            "killed at a write": lambda spec: self._at_a_write(spec, "killed at a write", kill),
            "SIGTERM": lambda spec: self._at_a_write(spec, "SIGTERM", terminate),
            "write refused": lambda spec: self._at_a_write(spec, "write refused", fill_the_disk),
            "folder moved away": self._moved,
            "file truncated": lambda spec: self._damaged(spec, "file truncated", self._cut),
            "bit flipped": lambda spec: self._damaged(spec, "bit flipped", self._flip),
        }
        if can_mount(root / "probe"):
            self.kinds["small disk full"] = self._small_disk

    def run(self, num_faults: int) -> list[Outcome]:
        """Let faults of every kind happen in turn."""
        kinds = list(self.kinds.values())
        return [
            kinds[number % len(kinds)](make_small_run(self.root, f"fault-{number}"))
            for number in range(num_faults)
        ]

    def _hit(self, spec: RunSpec, fault: Fault) -> int:
        """Let a fault happen at one of a run's write calls; return the run's exit code."""
        marker = self.root / f"{spec.output.name}-hit"
        while True:
            number, share = self.random.randint(1, self.num_writes), self.random.random()
            code = start(spec, Writes(number, fault, share, str(marker)))
            if marker.exists():
                return code
            # How often derived files are written depends on the time it takes.
            shutil.rmtree(spec.output)

    def _at_a_write(self, spec: RunSpec, kind: str, fault: Fault) -> Outcome:
        code = self._hit(spec, fault)
        return self._resume(spec, kind, code, whole_lines(spec.output))

    def _small_disk(self, spec: RunSpec) -> Outcome:
        size = PAGE * self.random.randint(2, max(3, self.num_bytes // PAGE))
        assert mount(spec.output, size)
        try:
            code = start(spec, Writes())
            lines = whole_lines(spec.output)
            mount(spec.output, 2**26, "remount")
            return self._resume(spec, "small disk full", code, lines)
        finally:
            subprocess.run(["umount", spec.output], check=True)

    def _moved(self, spec: RunSpec) -> Outcome:
        away = spec.output.with_name(f"{spec.output.name}-away")
        code = self._hit(spec, lambda: os.rename(spec.output, away))
        assert not spec.output.exists(), "a folder that vanished was made again"
        away.rename(spec.output)
        return self._resume(spec, "folder moved away", code, whole_lines(spec.output))

    def _damaged(self, spec: RunSpec, kind: str, damage: Callable[[bytes], bytes]) -> Outcome:
        stop_early = self.random.random() < 0.5
        code = self._hit(spec, kill) if stop_early else start(spec, Writes())
        files = read_files(spec.output)
        if not any(files.values()):
            return self._resume(spec, kind, code, whole_lines(spec.output))
        name = self.random.choice([name for name, content in files.items() if content])
        path = spec.output / name
        path.write_bytes(damage(files[name]))
        surviving = {
            journal: [line for line in lines if line in files.get(journal, b"").split(b"\n")]
            for journal, lines in whole_lines(spec.output).items()
        }

        def put_back() -> None:
            path.write_bytes(files[name])

        return self._resume(spec, kind, code, surviving, put_back)

    def _cut(self, content: bytes) -> bytes:
        return content[: self.random.randrange(len(content))]

    def _flip(self, content: bytes) -> bytes:
        place = self.random.randrange(len(content))
        changed = bytearray(content)
        changed[place] ^= 1 << self.random.randrange(8)
        return bytes(changed)

    def _resume(
        self,
        spec: RunSpec,
        kind: str,
        code: int,
        lines: dict[str, list[bytes]],
        remedy: Fault | None = None,
    ) -> Outcome:
        before = read_files(spec.output) if spec.output.exists() else {}
        again = start(spec, Writes())
        refused = again == REFUSED
        changed = refused and read_files(spec.output) != before
        if refused and remedy is not None:
            remedy()
            again = start(spec, Writes())
        kept = whole_lines(spec.output)
        keys = [keys_of(spec.output / name) for name in JOURNALS]
        return Outcome(
            kind=kind,
            code=code,
            refused=refused,
            changed_when_refused=changed,
            lost=sum(line not in kept[name] for name in JOURNALS for line in lines[name]),
            twice=sum(len(found) - len(set(found)) for found in keys),
            unreadable=again != 0 or not self._is_whole(spec.output, keys),
        )

    def _is_whole(self, folder: Path, keys: list[list[str]]) -> bool:
        same_keys = [set(found) for found in keys] == [set(found) for found in self.keys]
        try:
            return same_keys and read_rows(folder) == self.rows and bool(load_results(folder))
        except BHRoutingError:
            return False


def main(root: Path, num_faults: int, seed: int) -> dict[str, Any]:
    """Do it, and return what happened."""
    torch.set_num_threads(1)
    loaded: LoadedModel = load_model("demo", device="cpu")
    setattr(preparation, "load_model", lambda *_, **__: loaded)  # noqa: B010
    chaos = Chaos(root, seed)
    outcomes = [outcome._asdict() for outcome in chaos.run(num_faults)]
    return {"seed": seed, "write_calls": chaos.num_writes, "outcomes": outcomes}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
