"""The source stays as small, and as plainly written, as it was made."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.measure_house import House, measure

HOUSE = measure()
MOST = House(
    lines=34_815,
    files=167,
    record_types=169,
    import_percent=7.85,
    prose_words=51_880,
    what_per_thousand=0.5,
    beside_per_thousand=0.05,
    spec_modules=63,
)


@pytest.mark.parametrize("figure", House._fields)
def test_the_house_keeps_its_bounds(figure: str) -> None:
    assert getattr(HOUSE, figure) <= getattr(MOST, figure)


def test_every_figure_is_counted(tmp_path: Path) -> None:
    package = tmp_path / "bh_routing" / "experiments"
    package.mkdir(parents=True)
    (package / "run.py").write_text(
        '"""What is run."""\n'
        "from typing import NamedTuple\n"
        "from bh_routing.experiments.other import follow\n\n\n"
        "class Pair(NamedTuple):\n"
        '    """Beside each other."""\n\n\n'
        "def run(spec):\n"
        "    # what follows\n"
        "    value = spec.value\n"
        "    follow(value)\n"
    )
    (package / "other.py").write_text("def follow(value):\n    return value\n")
    house = measure(tmp_path)
    assert house == House(
        lines=15,
        files=2,
        record_types=1,
        import_percent=100 * 2 / 15,
        prose_words=8,
        what_per_thousand=250,
        beside_per_thousand=125,
        spec_modules=2,
    )
