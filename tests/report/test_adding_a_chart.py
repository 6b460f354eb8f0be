"""The worked example of docs/adding-a-chart.md becomes a chart in every format."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pandas as pd
import pytest

from bh_routing.report import create_visualizations
from bh_routing.report.charts import chart
from bh_routing.report.page import write_page
from tests.report.conftest import FillFolder

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-chart.md"


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's function, run as it stands."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    file = tmp_path / "worked_example_of_a_chart.py"
    file.write_text(code, encoding="utf-8")
    monkeypatch.setattr(chart, "CHARTS", dict(chart.CHARTS))
    runpy.run_path(str(file))


@pytest.mark.usefixtures("example")
def test_one_function_becomes_png_svg_pdf_and_html(
    results: pd.DataFrame, fill_folder: FillFolder
) -> None:
    folder = fill_folder(results)
    for kind, start in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
        create_visualizations(results, folder, {}, kind)
        assert (folder / "plots" / f"generation_speed.{kind}").read_bytes().startswith(start)
    text = write_page(folder).read_text()
    assert 'id="generation_speed"' in text
    mean = results.loc[results["config_name"] == "bh_strict", "tokens_per_sec"].mean()
    assert f"bh_strict: {mean:.2f}" in text
    assert re.search(r"<figcaption>\w+ generates \d+ tokens per second</figcaption>", text)


def test_a_section_that_does_not_exist_is_named() -> None:
    with pytest.raises(AssertionError, match="'speed' is none of the sections quality, layers"):
        chart.chart("speed")
