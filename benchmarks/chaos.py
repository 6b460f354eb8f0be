"""Inject seeded faults into runs, resume them, and write the table of docs/reliability.md.

    python -m benchmarks.chaos [FAULTS] [SEED]

tests/experiments/chaos_driver.py defines the faults and the criterion for lost work; the ordinary
tests run it with ten faults.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
PAGE: Final = ROOT / "docs" / "reliability.md"
MARKS: Final = ("<!-- chaos -->\n", "<!-- /chaos -->")


def main() -> None:
    faults, seed = sys.argv[1:3] if len(sys.argv) > 2 else ("200", "8")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.experiments.chaos_driver", folder, faults, seed]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    before, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0])
    _, after = rest.split(MARKS[1])
    table = render(json.loads(done.stdout))
    PAGE.write_text(f"{before}{MARKS[0]}{table}{MARKS[1]}{after}", encoding="utf-8")


def render(found: dict[str, Any]) -> str:
    """Return the table, with one row per kind of fault, and a line on its provenance."""
    lines = [
        "| fault | times | resume rejected at first | lost | done twice | not whole in the end |",
        "|---|---|---|---|---|---|",
    ]
    outcomes = found["outcomes"]
    for kind in [*dict.fromkeys(outcome["kind"] for outcome in outcomes), "all"]:
        own = [outcome for outcome in outcomes if kind in (outcome["kind"], "all")]
        counts = [sum(outcome[name] for outcome in own) for name in COUNTED]
        lines.append(f"| {kind} | {len(own)} | {' | '.join(map(str, counts))} |")
    changed = sum(outcome["changed_when_refused"] for outcome in outcomes)
    lines.append("")
    lines.append(
        f"Folders that a rejection changed: {changed}. Seed {found['seed']}; an uninterrupted run "
        f"made {found['write_calls']} write calls. {datetime.now(UTC):%Y-%m-%d}, "
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}."
    )
    return "\n".join(lines) + "\n"


COUNTED: Final = ("refused", "lost", "twice", "unreadable")


if __name__ == "__main__":
    main()
