"""The page in a real browser: Chromium from the distribution, driven by Playwright."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bh_routing.report.page import write_page
from tests.report.conftest import MakeResults
from tests.report.page.conftest import FillPage
from tests.report.page.test_page import HOSTILE

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe")

OpenPage = Callable[..., Any]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def faults() -> list[str]:
    """Errors and network requests of the page; must stay empty."""
    return []


@pytest.fixture
def open_page(browser: Any, faults: list[str]) -> Iterator[OpenPage]:
    contexts = []

    def open_page(path: Path, width: int = 1280, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:", "blob:"))
                else faults.append(r.url))  # fmt: skip
        page.goto(path.as_uri())
        page.wait_for_selector("body[data-ready]")
        page.wait_for_selector("#token-0", state="attached")
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (1280, "light"),
        (390, "dark"),
        pytest.param(1280, "dark", marks=pytest.mark.full),
        pytest.param(390, "light", marks=pytest.mark.full),
    ],
)
def test_it_opens_without_fault_overflow_or_barrier(
    page_folder: Path, open_page: OpenPage, faults: list[str], width: int, scheme: str
) -> None:
    page = open_page(write_page(page_folder), width, scheme)
    assert faults == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    found = axe.Axe().run(page).response["violations"]
    serious = [v["id"] for v in found if v["impact"] in ("serious", "critical")]
    assert serious == []


def test_sorting_filtering_and_texts_side_by_side(
    page_folder: Path, open_page: OpenPage, faults: list[str]
) -> None:
    page = open_page(write_page(page_folder))
    column = page.locator("#experiment-table th[data-column='3'] button")
    column.click()
    column.click()
    experts = page.locator("#experiment-table tbody td.number:nth-of-type(3)").all_inner_texts()
    numbers = [float(value) for value in experts]
    assert numbers == sorted(numbers, reverse=True)
    assert len(set(numbers)) > 1

    page.select_option("#experiment-filters [name=config]", label="bh_strict")
    assert page.locator("#experiment-count").inner_text() == "1 to 12 of 12 experiments"
    page.fill("#experiment-filters [name=text]", "prompt number 11")
    assert page.locator("#experiment-table tbody tr").count() == 1

    page.click("#experiment-table tbody button")
    shown = page.locator("#texts .pair").inner_text()
    assert "A continuation of 11 by topk_8." in shown
    assert page.locator("#texts mark").all_inner_texts() == ["topk_8.", "bh_strict."]
    page.keyboard.press("Escape")
    assert faults == []


def test_tokens_are_shaded_by_experts_and_say_what_they_kept(
    page_folder: Path, open_page: OpenPage, faults: list[str]
) -> None:
    page = open_page(write_page(page_folder))
    page.select_option("#token-choice [name=config]", label="bh_strict")
    page.select_option("#token-choice [name=layer]", label="1")
    page.wait_for_selector("#token-detail th:has-text('layer 1')")
    page.hover("#token-3")
    assert "Token 4: “France ”" in page.locator("#token-detail").inner_text()
    kept = page.locator("#token-detail strong").count()
    struck = page.locator("#token-detail s").count()
    assert kept + struck == 8
    assert page.locator("#token-detail td.number").inner_text() == f"{kept} of 8"
    page.locator("#token-text").focus()
    page.keyboard.press("ArrowRight")
    assert "Token 5" in page.locator("#token-detail").inner_text()
    shades = page.eval_on_selector_all(
        "#token-text [role=option]", "all => all.map(t => t.style.background)"
    )
    assert len(set(shades)) > 1
    assert faults == []


def test_views_are_chosen_and_pairs_are_drawn(
    page_folder: Path, open_page: OpenPage, faults: list[str]
) -> None:
    page = open_page(write_page(page_folder))
    views = page.locator("#expert_counts .view")
    assert [view.is_visible() for view in views.all()] == [True] + [False] * 5
    page.select_option("select[data-chart='expert_counts']", label="bh_strict")
    assert [view.is_visible() for view in views.all()] == [False, False, True] + [False] * 3
    page.wait_for_function("document.getElementById('coactivation').width === 64")
    pixel = "document.getElementById('coactivation').getContext('2d').getImageData(%d, %d, 1, 1)"
    assert page.evaluate(f"{pixel % (0, 0)}.data[3]") == 0  # an expert with itself
    assert page.evaluate(f"{pixel % (1, 0)}.data[3]") == 255
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert faults == []


def test_a_chart_says_what_is_at_the_pointer(page_folder: Path, open_page: OpenPage) -> None:
    page = open_page(write_page(page_folder))
    svg = page.locator("#quality_vs_experts svg")
    svg.scroll_into_view_if_needed()
    box = svg.bounding_box()
    tips = json.loads(svg.get_attribute("data-tips"))
    x, y, text = next(tip for tip in tips if tip[2].startswith("bh_strict"))
    page.mouse.move(box["x"] + x * box["width"] / 1000, box["y"] + y * box["height"] / 1000)
    assert page.locator("#tip").inner_text() == text
    boxes = [marker.bounding_box() for marker in svg.locator("g > use").all()]
    at = box["x"] + x * box["width"] / 1000, box["y"] + y * box["height"] / 1000
    middles = [(b["x"] + b["width"] / 2, b["y"] + b["height"] / 2) for b in boxes if b]
    assert min(abs(at[0] - u) + abs(at[1] - v) for u, v in middles) < 3  # on the marker itself
    page.mouse.move(2, 2)
    assert page.locator("#tip").is_hidden()


def test_texts_of_charts_stand_out_in_both_themes(page_folder: Path, open_page: OpenPage) -> None:
    path = write_page(page_folder)
    colours = []
    for scheme in ("light", "dark"):
        page = open_page(path, scheme=scheme)
        label = page.locator("#quality_vs_experts svg text").first
        colours.append(label.evaluate("text => getComputedStyle(text).fill"))
    assert colours == ["rgb(28, 31, 36)", "rgb(232, 234, 238)"]


def test_hostile_texts_are_shown_as_text(
    fill_page: FillPage, make_results: MakeResults, open_page: OpenPage, faults: list[str]
) -> None:
    results = make_results(num_prompts=2)
    for column in ("prompt_text", "generated_text"):
        results[column] = HOSTILE + results[column]
    page = open_page(write_page(fill_page(results)), 390)
    page.click("#experiment-table tbody button")
    assert "</script><script>alert(1)</script>" in page.locator("#texts .pair").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert faults == []


@pytest.mark.full
def test_four_thousand_experiments_open_within_three_seconds(
    fill_page: FillPage, make_results: MakeResults, open_page: OpenPage
) -> None:
    names = {f"bh_{i}": 4.0 for i in range(19)} | {"topk_8": 8.0}
    path = write_page(fill_page(make_results(names, num_prompts=200)))
    page = open_page(path)
    opened = page.evaluate("performance.getEntriesByType('navigation')[0].domInteractive")
    assert opened < 3_000
