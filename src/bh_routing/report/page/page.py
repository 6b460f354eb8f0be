"""Write report.html: gather the contents of the folder and fill the template."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

import bh_routing
from bh_routing.analysis.results import load_results
from bh_routing.errors import CalibrationError
from bh_routing.report.charts import Chart, draw_charts
from bh_routing.report.charts.calibration import null_charts
from bh_routing.report.charts.style import Picture, inline_svg, look, theme
from bh_routing.report.facts import Facts, facts_of
from bh_routing.report.files import write_text
from bh_routing.report.markdown import context
from bh_routing.report.markdown import render as render_markdown
from bh_routing.report.page.experiments import experiment_table
from bh_routing.report.page.traces import for_page, read_traces
from bh_routing.report.text import plain
from bh_routing.results.records import CALIBRATION, REPORT_HTML

SCRIPTS: Final = ("page.js", "experiments.js", "tokens.js")
_log = logging.getLogger(__name__)
_HEADING = re.compile(r"^## (.*)$", re.MULTILINE)
_PICTURE = re.compile(r"^!\[[^\n]*$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """One section of the HTML report."""

    key: str
    title: str
    charts: Mapping[str, Chart]
    """HTML id -> chart."""
    text: Markup
    """Tables and sentences below the charts."""
    widget: str = ""
    """Name of the section's interactive part, if any."""


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
    parts = _sections(facts)
    configs = facts.names
    prompts = list(dict.fromkeys(facts.table.frame["prompt_text"]))
    data = {
        "experiments": experiment_table(facts, configs, prompts),
        "numExperts": facts.model.get("num_experts", 0),
        "traces": for_page(read_traces(facts.folder), configs, prompts),
    }
    model = facts.model.get("name") or facts.folder.name
    page = render(
        "report.html.j2",
        title=f"BH routing against Top-K: {plain(model, 80)}",
        verdict=[to_html(render_markdown("verdict.md.j2", **context(facts)))],
        sections=parts,
        data=data,
    )
    return write_text(output or facts.folder / REPORT_HTML, page)


def _sections(facts: Facts) -> list[Section]:
    """Return the sections of REPORT.md, each with its charts on top."""
    _, *pieces = _HEADING.split(render_markdown("REPORT.md.j2", **context(facts)))
    texts = dict(zip(pieces[::2], pieces[1::2], strict=True))
    shown = _charts(facts)

    def part(key: str, title: str, heading: str = "", widget: str = "") -> Section:
        text = to_html(texts.get(heading or title, ""))
        charts = shown.get(key, {})
        return Section(key=key, title=title, charts=charts, text=text, widget=widget)

    parts = [
        part("quality", "Quality against experts", "Quality against experts used"),
        part("experiments", "Configurations and prompts", widget="experiments"),
        part("tokens", "Token by token", widget="tokens"),
        part("layers", "Layers and load", "Experts kept", widget="coactivation"),
        part("time", "Time"),
        part("nulls", "What alpha means", "What alpha means here"),
        part("expected", "Expected and measured"),
        part("tests", "Statistical tests"),
        part("conclusions", "Conclusions"),
        part("settings", "Settings and provenance"),
        part("limits", "Limitations"),
    ]
    return [p for p in parts if p.text or p.charts or p.widget]


def _charts(facts: Facts) -> dict[str, dict[str, Chart]]:
    """Return section -> name -> chart."""
    shown = draw_charts(facts) if facts.names else {}
    if (facts.folder / CALIBRATION).is_file():
        try:
            nulls = null_charts(facts.folder / CALIBRATION)
            shown["nulls"] = {f"calibration_{null}": chart for null, chart in nulls.items()}
        except CalibrationError as error:
            _log.warning("report.html lacks the charts of the calibration: %s", error)
    return shown


def to_html(text: str) -> Markup:
    """Render the report's Markdown; embedded HTML is escaped, images give way to charts."""
    html = _markdown().render(_PICTURE.sub("", text))
    # Wide tables scroll on their own, also by keyboard, and never widen the HTML report.
    html = html.replace("<table>", '<div class="scroll" tabindex="0" role="group"><table>')
    return Markup(html.replace("</table>", "</table></div>"))


def render(template: str, **values: Any) -> str:
    """Fill a template of this package; scripts and styles are inlined."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                              lstrip_blocks=True)  # fmt: skip
    environment.filters["json"] = _json
    environment.globals["version"] = bh_routing.__version__
    environment.globals["draw"] = _draw
    colours = f":root{{{theme(dark=False)}}}:root[data-theme=dark]{{{theme(dark=True)}}}"
    environment.globals["style"] = Markup(_asset("page.css") + colours)
    environment.globals["scripts"] = [Markup(_asset(name)) for name in SCRIPTS]
    return environment.from_string(_asset(template)).render(values)


def _draw(view: Callable[[], Picture], salt: str) -> Markup:
    with look():
        figure = view()
    return Markup(inline_svg(figure, salt))


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
    return (files("bh_routing.report.page") / "assets" / name).read_text(encoding="utf-8")
