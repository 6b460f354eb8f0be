"""README says what is so: its examples run, its flags exist, its links lead somewhere."""

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
from bh_routing.experiments.config_file import read_config_file
from bh_routing.nulls import NULLS
from bh_routing.rules import RULES
from tools import write_columns

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/reading-order.md", "docs/decisions.md")

ROUTE_UNDER_THE_NEW_RULE = """
model, tokenizer = bhr.load_model("demo", device="cpu")
inputs = tokenizer("The old man walked down to the river", return_tensors="pt")
with bhr.route(model, AboveMean(factor=0.9)) as trace:
    model(**inputs)
assert 1 <= trace.expert_counts.min() < trace.expert_counts.max() <= 8, trace.expert_counts
"""


class Block(NamedTuple):
    """One fenced block under a `<!-- tested -->` comment."""

    language: str
    text: str
    file: str
    """Where the block's text belongs, "" for something to run."""


def readme_blocks() -> list[Block]:
    """The blocks that README says are tested, in order."""
    pattern = r"<!-- tested(?:: (\S+))? -->\n```(\w+)\n(.*?)^```"
    found = re.findall(pattern, README, flags=re.DOTALL | re.MULTILINE)
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
    """The folder of somebody who has typed every tested block of README, in order."""
    folder = tmp_path_factory.mktemp("reader")
    blocks = readme_blocks()
    for block in blocks:
        if block.file:
            (folder / block.file).write_text(block.text, encoding="utf-8")
    to_run = [block for block in blocks if not block.file]
    groups = [
        (language, "\n".join(block.text for block in group))
        for language, group in groupby(to_run, key=lambda block: block.language)
    ]
    for number, (language, text) in enumerate(groups, start=1):
        last = ROUTE_UNDER_THE_NEW_RULE if number == len(groups) else ""
        run_block(language, text + last, folder)
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
    python = next(block.text for block in readme_blocks() if "bh.ROUTING_CONFIGS" in block.text)
    literal = re.search(r"= (\{.*?^\})", python, flags=re.DOTALL | re.MULTILINE)
    assert literal is not None
    assert content.configs["my_custom_config"] == yaml.safe_load(literal[1])
    assert [prompt.category for prompt in content.prompts] == ["mine"]


def test_every_flag_that_readme_names_exists() -> None:
    group = typer.main.get_command(app)
    flags = {"--help"}
    for command in getattr(group, "commands").values():  # noqa: B009  # click's type isn't ours
        flags |= {flag for parameter in command.params for flag in parameter.opts}
    # Flags of other programs.
    flags |= {"--strict", "--version"}
    named = set(re.findall(r"(?<![\w<!-])--[a-z][a-z0-9-]*", README))
    assert named - flags == set()


def test_the_table_of_methods_and_the_nulls_are_the_catalogs() -> None:
    table = README.partition("| method | keeps |")[2].partition("\n\n")[0]
    first_cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}
    assert named - {"topk"} == set(RULES)
    nulls = re.search(r"`null` \((.*?)\)", README, flags=re.DOTALL)
    assert nulls is not None
    assert set(re.findall(r"`(\w+)`", nulls[1])) == set(NULLS)


def test_every_command_that_readme_names_exists() -> None:
    commands = set(getattr(typer.main.get_command(app), "commands"))  # noqa: B009
    assert set(re.findall(r"bh-routing (run|[a-z-]+) (?:--|results)", README)) <= commands
    targets = set(re.findall(r"^make ([a-z-]+)", README, flags=re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets <= set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_and_path_leads_somewhere(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", text)
    missing = [link for link in links if not (ROOT / name).parent.joinpath(link).exists()]
    named = re.findall(
        r"`((?:src|tests|tools|docs|cli|experiments|models|rules|nulls|multitest"
        r"|analysis|report|engine)/[\w./-]+\.\w+)`",
        text,
    )
    places = (ROOT, ROOT / "src" / "bh_routing")
    missing += [path for path in named if not any((place / path).exists() for place in places)]
    # README's example of a rule to add is the one file that isn't there.
    assert set(missing) <= {"src/bh_routing/rules/above_mean.py"}


def test_the_table_of_columns_is_what_the_records_say() -> None:
    assert (ROOT / "docs" / "columns.md").read_text(encoding="utf-8") == write_columns.render()
