"""README and docs are true: their examples run, their flags exist, their links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
import yaml

from bh_routing.analysis.results import load_results
from bh_routing.cli.main import app
from bh_routing.cli.options import OLD_SPELLINGS
from bh_routing.experiments.configurations import read_config_file
from bh_routing.nulls import NULLS
from bh_routing.rules import RULES
from tools import write_columns

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in DOCUMENTS}
TESTED = ("README.md", "docs/guide.md", "docs/configurations.md", "docs/python.md")
"""The pages with examples, in the order in which a reader types them."""
OTHERS_FLAGS = {
    *("--version", "--strict"),  # ours, and mypy's
    *("--head", "--address", "--block", "--port", "--overlap"),  # ray and srun
    *("--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task"),  # sbatch
    *("--model_args", "--include_path"),  # lm-eval
    *("--moe-backend", "--additional-config", "--kv-cache-memory-bytes"),  # vLLM
    "--no-enable-prefix-caching",
    "--no-deps",  # pip
    "--min-words",  # what docs/adding-an-option.md adds
}


class Block(NamedTuple):
    """One fenced block under a `<!-- tested -->` comment."""

    language: str
    text: str
    file: str
    """Where the block's text belongs, "" for something to run."""


def marked_blocks() -> list[Block]:
    """The blocks that pages mark as tested, in order."""
    pattern = r"<!-- tested(?:: (\S+))? -->\n```(\w+)\n(.*?)^```"
    text = "\n".join(PAGES[name] for name in TESTED)
    found = re.findall(pattern, text, flags=re.DOTALL | re.MULTILINE)
    return [Block(language, text, file) for file, language, text in found]


def run_block(language: str, text: str, folder: Path) -> None:
    """Run a block as a reader would, with the package and the root scripts in reach."""
    command = {"bash": ["bash", "-e", "-c"], "python": [sys.executable, "-c"]}[language]
    tools = str(Path(sys.executable).parent)
    environment = os.environ | {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
    }
    done = subprocess.run(
        [*command, text],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def reader_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of somebody who has typed every tested block, in order."""
    folder = tmp_path_factory.mktemp("reader")
    blocks = marked_blocks()
    for block in blocks:
        if block.file:
            (folder / block.file).write_text(block.text, encoding="utf-8")
    to_run = [block for block in blocks if not block.file]
    groups = [
        (language, "\n".join(block.text for block in group))
        for language, group in groupby(to_run, key=lambda block: block.language)
    ]
    for language, text in groups:
        run_block(language, text, folder)
    return folder


@pytest.mark.timeout(600)
def test_the_six_experiment_start_gives_six_rows(reader_folder: Path) -> None:
    experiments = load_results(reader_folder / "results").experiments
    assert len(experiments) == 6
    assert set(experiments["status"]) == {"ok"}


@pytest.mark.timeout(600)
def test_the_custom_configuration_goes_from_two_to_ten_experts(reader_folder: Path) -> None:
    experiments = load_results(reader_folder / "results_custom").experiments
    row = experiments.set_index("config_name").loc["my_custom_config"]
    assert row["min_experts"] >= 2
    assert 8 < row["max_experts"] <= 10


@pytest.mark.timeout(600)
def test_the_exports_and_the_plot_are_there(reader_folder: Path) -> None:
    suffixes = {path.suffix for path in (reader_folder / "results").iterdir()}
    assert {".xlsx", ".tex"} <= suffixes
    assert (reader_folder / "counts.png").stat().st_size > 0


@pytest.mark.timeout(600)
def test_the_yaml_example_says_the_same_as_the_python_example(reader_folder: Path) -> None:
    content = read_config_file(reader_folder / "my.yaml")
    python = next(block.text for block in marked_blocks() if "bh.ROUTING_CONFIGS" in block.text)
    literal = re.search(r"= (\{.*?^\})", python, flags=re.DOTALL | re.MULTILINE)
    assert literal is not None
    assert content.configs["my_custom_config"] == yaml.safe_load(literal[1])
    assert [prompt.category for prompt in content.prompts] == ["mine"]


def test_readme_is_a_front_page() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 200


def test_no_page_with_examples_is_left_out() -> None:
    assert {name for name, text in PAGES.items() if "<!-- tested" in text} == set(TESTED)


def scripts_flags() -> set[str]:
    """Flags of what pages name besides `bh-routing`: benchmarks and tools."""
    scripts = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "tools").glob("*.py")]
    sources = "".join(path.read_text(encoding="utf-8") for path in scripts)
    return set(re.findall(r"add_argument\(\s*\"(--[a-z-]+)\"", sources))


@pytest.mark.parametrize("name", PAGES)
def test_every_flag_that_a_page_names_exists(name: str) -> None:
    group = typer.main.get_command(app)
    flags = {"--help"}.union(scripts_flags(), OTHERS_FLAGS, *OLD_SPELLINGS.values())
    for command in getattr(group, "commands").values():  # noqa: B009  # click's type isn't ours
        flags |= {
            flag
            for parameter in command.params
            for flag in (*parameter.opts, *parameter.secondary_opts)
        }
    named = set(re.findall(r"(?<![\w<!-])--[a-z][a-z0-9_-]*", PAGES[name]))
    assert named - flags == set()


def test_the_table_of_methods_and_the_nulls_are_the_catalogs() -> None:
    page = PAGES["docs/configurations.md"]
    table = page.partition("| method | kept slots |")[2].partition("\n\n")[0]
    first_cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}
    assert named - {"topk"} == set(RULES)
    nulls = re.search(r"\| `null` \|(.*?)\|", page)
    assert nulls is not None
    assert set(re.findall(r"`(\w+)`", nulls[1])) == set(NULLS)


@pytest.mark.parametrize("name", PAGES)
def test_every_command_that_a_page_names_exists(name: str) -> None:
    commands = set(getattr(typer.main.get_command(app), "commands"))  # noqa: B009
    named = re.findall(r"bh-routing ([a-z-]+) (?:--|results)", PAGES[name])
    assert set(named) <= commands
    targets = set(re.findall(r"(?:^|`)make ([a-z-]+)(?:`|$| +#)", PAGES[name], flags=re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets <= set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name: str) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]+))?\)", PAGES[name])
    for path, anchor in links:
        target = (ROOT / name).parent.joinpath(path).resolve() if path else ROOT / name
        assert target.exists(), path
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{path}#{anchor}"


def anchors(text: str) -> set[str]:
    """Names of a page's headings in links, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_every_file_that_a_page_names_exists(name: str) -> None:
    named = re.findall(
        r"`((?:src|tests|tools|docs|benchmarks|cli|experiments|models|rules|nulls|multitest"
        r"|analysis|report|engine|kernels|results)/[\w./-]+\.\w+)`",
        PAGES[name],
    )
    places = (ROOT, ROOT / "src" / "bh_routing")
    missing = {path for path in named if not any((place / path).exists() for place in places)}
    # The files that the pages for contributors add, and those of a run.
    assert missing <= {"src/bh_routing/rules/gap.py", "results/REPORT.md", "results/report.html"}


def test_the_table_of_columns_is_what_the_records_say() -> None:
    assert (ROOT / "docs" / "columns.md").read_text(encoding="utf-8") == write_columns.render()
