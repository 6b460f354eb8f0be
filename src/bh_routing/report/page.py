"""Write report.html from one run, or compare several runs in one such file."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import pandas as pd
from jinja2 import Environment, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup
from tqdm import tqdm

import bh_routing
from bh_routing.analysis.results import load_results
from bh_routing.errors import CalibrationError, InputError
from bh_routing.report.charts import Chart, draw_charts
from bh_routing.report.charts.calibration import null_charts
from bh_routing.report.charts.quality import compared_quality
from bh_routing.report.charts.style import Picture, inline_svg, look, theme
from bh_routing.report.facts import Facts, facts_of
from bh_routing.report.markdown import context
from bh_routing.report.markdown import render as render_markdown
from bh_routing.report.text import as_float, plain
from bh_routing.report.traces import for_page, read_traces
from bh_routing.results.files import planned_keys, write_text
from bh_routing.results.records import CALIBRATION, REPORT_HTML

SCRIPTS: Final = ("page.js", "experiments.js", "tokens.js")
SECTIONS: Final = (
    ("quality", "Quality against experts", "Quality against experts used", ""),
    ("experiments", "Configurations and prompts", "", "experiments"),
    ("tokens", "Token by token", "", "tokens"),
    ("layers", "Layers and load", "Experts kept", "coactivation"),
    ("time", "Time", "Time", ""),
    ("nulls", "What alpha means", "What alpha means here", ""),
    ("expected", "Expected and measured", "Expected and measured", ""),
    ("tests", "Statistical tests", "Statistical tests", ""),
    ("conclusions", "Conclusions", "Conclusions", ""),
    ("settings", "Settings and provenance", "Settings and provenance", ""),
    ("limits", "Limitations", "Limitations", ""),
    ("recommendation", "Recommendation", "Recommendation", ""),
)
"""HTML id and title of each section, its heading in REPORT.md, and its interactive part."""
NUMBERS: Final = {
    "avg_experts_per_token": "experts",
    "avg_experts_prefill": "in prefill",
    "avg_experts_decode": "in decode",
    "num_output_tokens": "tokens",
    "inference_time_sec": "seconds",
    "tokens_per_sec": "tokens/s",
    "expert_utilization_cv": "load CV",
}
"""Columns of the table of experiments -> their headings."""
COMPARED: Final = ("spec", "model", "calibration", "provenance")
UNCOMPARED: Final = frozenset({"spec.output", "spec.resume", "provenance.started_at"})
"""Fields that always differ and don't affect results."""
_log = logging.getLogger(__name__)
_HEADING = re.compile(r"^## (.*)$", re.MULTILINE)
_PICTURE = re.compile(r"^!\[[^\n]*$", re.MULTILINE)


def write_page(folder: str | Path, output: Path | None = None) -> Path:
    """Write `report.html` from the files of a run.

    Args:
        folder: output folder of `bh-routing run`.
        output: HTML file; None: report.html in the folder.
    Returns:
        Path of the HTML file.
    Raises:
        ResultsError: the folder isn't a results folder, or one of its files is damaged.
    """
    return write_page_of(facts_of(load_results(folder)), output)


def write_page_of(facts: Facts, output: Path | None = None) -> Path:
    """Write the same from results already read."""
    configs = facts.names
    prompts = list(dict.fromkeys(facts.frame["prompt_text"]))
    data = {
        "experiments": _experiments(facts, configs, prompts),
        "numExperts": facts.model.get("num_experts", 0),
        "traces": for_page(read_traces(facts.folder, planned_keys(facts.run)), configs, prompts),
    }
    model = facts.model.get("name") or facts.folder.name
    page = _render(
        title=f"BH routing against Top-K: {plain(model, 80)}",
        verdict=_to_html(render_markdown("verdict.md.j2", **context(facts))),
        sections=_sections(facts),
        data=data,
    )
    return write_text(output or facts.folder / REPORT_HTML, page)


def write_comparison(folders: Sequence[Path], output: Path) -> Path:
    """Write an HTML comparison of several runs: differing settings, then results.

    Args:
        folders: two or more results folders.
        output: HTML file.
    Raises:
        InputError: fewer than two folders.
        ResultsError: one of them isn't a results folder.
    """
    if len(folders) < 2:
        raise InputError(f"a comparison needs two results folders or more, got {len(folders)}")
    runs = dict(zip(_names(folders), (facts_of(load_results(f)) for f in folders), strict=True))
    rendered = render_markdown("comparison.md.j2", runs=runs, differences=_differences(runs))
    differences, results = rendered.split("\n***\n")
    chart = compared_quality(runs)
    page = _render(
        title=f"Comparison of {len(runs)} runs",
        verdict=_to_html(
            f"{len(runs)} runs; their settings, model and versions are compared first."
        ),
        sections=[
            _section("differences", "Differences", differences),
            _section("results", "Results", results, {"compared_quality": chart} if chart else {}),
        ],
        data={"experiments": {}, "traces": []},
    )
    return write_text(output, page)


def _section(
    key: str, title: str, text: str, charts: Mapping[str, Chart] | None = None, widget: str = ""
) -> dict[str, Any]:
    """Return a section's variables in the template: charts by HTML id above rendered text."""
    return {"key": key, "title": title, "charts": charts or {}, "text": _to_html(text),
            "widget": widget}  # fmt: skip


def _sections(facts: Facts) -> list[dict[str, Any]]:
    """Return the sections of REPORT.md, each with its charts on top; empty ones are left out."""
    _, *pieces = _HEADING.split(render_markdown("REPORT.md.j2", **context(facts)))
    texts = dict(zip(pieces[::2], pieces[1::2], strict=True))
    charts = draw_charts(facts)
    if (facts.folder / CALIBRATION).is_file():
        try:
            nulls = null_charts(facts.folder / CALIBRATION)
            charts["nulls"] = {f"calibration_{null}": chart for null, chart in nulls.items()}
        except CalibrationError as error:
            _log.warning("report.html lacks the charts of the calibration: %s", error)
    return [
        _section(key, title, texts.get(heading, ""), charts.get(key), widget)
        for key, title, heading, widget in SECTIONS
        if texts.get(heading) or charts.get(key) or widget
    ]


def _experiments(facts: Facts, configs: list[str], prompts: list[str]) -> dict[str, Any]:
    """Return the finished experiments, with configurations and prompts by index."""
    frame = facts.frame
    columns = {name: label for name, label in NUMBERS.items() if name in frame.columns}
    categories = frame.drop_duplicates("prompt_text").set_index("prompt_text")["prompt_category"]
    texts = frame["generated_text"] if "generated_text" in frame.columns else [""] * len(frame)

    def rounded(value: Any) -> float | None:
        return float(f"{value:.5g}") if math.isfinite(as_float(value)) else None

    return {
        "configs": configs,
        "baseline": facts.baseline,
        "prompts": prompts,
        "categories": [str(categories[prompt]) for prompt in prompts],
        "columns": list(columns.values()),
        "rows": [
            [
                configs.index(row["config_name"]),
                prompts.index(row["prompt_text"]),
                [rounded(row[name]) for name in columns],
                str(text),
            ]
            for (_, row), text in zip(frame.iterrows(), texts, strict=True)
        ],
    }


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the folders' names, with as much of their paths as makes them distinct."""
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(resolved):
        twice = next(f for f in resolved if resolved.count(f) > 1)
        raise InputError(f"{twice} is named twice; name different results folders")
    for depth in range(1, 1 + max(len(path.parts) for path in resolved)):
        names = ["/".join(path.parts[-depth:]) for path in resolved]
        if len(set(names)) == len(names):
            break
    return names


def _differences(runs: Mapping[str, Facts]) -> list[tuple[str, list[Any]]]:
    """Return the settings that differ, with the value in each run."""
    flat = [
        pd.json_normalize({part: facts.run.get(part) for part in COMPARED}).to_dict("records")[0]
        for facts in runs.values()
    ]
    rows = {key: [values.get(key) for values in flat] for found in flat for key in found}
    return [
        (str(key), [v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False)
               for v in values])
        for key, values in rows.items()
        if key not in UNCOMPARED and any(value != values[0] for value in values[1:])
    ]  # fmt: skip


def _to_html(text: str) -> Markup:
    """Render the report's Markdown; embedded HTML is escaped, images give way to charts."""
    html = _markdown().render(_PICTURE.sub("", text))
    # Wide tables scroll on their own, also by keyboard, and never widen the HTML report.
    html = html.replace("<table>", '<div class="scroll" tabindex="0" role="group"><table>')
    return Markup(html.replace("</table>", "</table></div>"))


def _render(**values: Any) -> str:
    """Fill the template of the HTML report, with scripts and styles inlined."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                              lstrip_blocks=True)  # fmt: skip
    environment.filters["json"] = _json
    environment.globals["version"] = bh_routing.__version__
    colours = f":root{{{theme(dark=False)}}}:root[data-theme=dark]{{{theme(dark=True)}}}"
    environment.globals["style"] = Markup(_asset("page.css") + colours)
    environment.globals["scripts"] = [Markup(_asset(name)) for name in SCRIPTS]
    charts = [chart for part in values["sections"] for chart in part["charts"].values()]
    total = sum(len(chart.views) for chart in charts)
    with tqdm(total=total, desc=REPORT_HTML, unit="chart") as bar:

        def draw(view: Callable[[], Picture], salt: str) -> Markup:
            with look():
                figure = view()
            bar.update()
            return Markup(inline_svg(figure, salt))

        environment.globals["draw"] = draw
        return environment.from_string(_asset("report.html.j2")).render(values)


def _json(value: Any) -> Markup:
    """Serialise to JSON that can't close its enclosing script element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in ("<", ">", "&", "\u2028", "\u2029"):
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


@cache
def _markdown() -> MarkdownIt:
    return MarkdownIt("commonmark", {"html": False}).enable("table")


def _asset(name: str) -> str:
    return (files("bh_routing.report") / "assets" / name).read_text(encoding="utf-8")
