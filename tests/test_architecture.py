"""The written rules of the house hold, and each check bites where a rule is broken."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import typer

import bh_routing
from bh_routing.cli.main import app
from tests import architecture
from tests.architecture import Module, Modules

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
MODULES = architecture.read_modules(SOURCE)
FILES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for folder in ("src", "tests", "tools", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
} | {path.name: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.py"))}

PUBLIC_NAMES = [
    "BHRoutingError",
    "BenjaminiHochberg",
    "BenjaminiHochbergDrop",
    "Calibration",
    "CalibrationError",
    "ContributionThreshold",
    "Document",
    "Entropy",
    "ExperimentError",
    "ExpertBudget",
    "ExpertTrace",
    "FisherMass",
    "FloorThreshold",
    "HigherCriticism",
    "InputError",
    "MinP",
    "ModelError",
    "OpportunisticActivation",
    "OracleContribution",
    "PerLayerTopK",
    "RandomK",
    "Results",
    "ResultsError",
    "Rule",
    "Threshold",
    "TopK",
    "TopP",
    "__version__",
    "benjamini_hochberg",
    "benjamini_hochberg_routing",
    "benjamini_yekutieli",
    "calibrate",
    "evaluate",
    "generate",
    "load_model",
    "load_results",
    "median_ratios",
    "p_values",
    "packaged_documents",
    "prune",
    "route",
    "storey",
    "sweep",
]

MODULE_CHECKS: list[tuple[Callable[[Modules], list[str]], Mapping[str, str]]] = [
    (architecture.relative_imports, {"rules.base": "from ..errors import InputError"}),
    (architecture.upward_imports, {"nulls.base": "import bh_routing.rules"}),
    (architecture.upward_imports, {"kernels.experts": "from bh_routing.models import load"}),
    (architecture.upward_imports, {"analysis.results": "from bh_routing.nulls import NULLS"}),
    (architecture.upward_imports, {"experiments.run": "from bh_routing.analysis import results"}),
    (architecture.upward_imports, {"analysis.results": "from bh_routing.report import text"}),
    (architecture.homeless_modules, {"attic": "shelf = 1"}),
    (architecture.strangers, {"report.facts": "import torch"}),
    (architecture.strangers, {"analysis.results": "from safetensors.torch import load_file"}),
    (architecture.strangers, {"engine.generate": "from transformers import AutoTokenizer"}),
    (architecture.strangers, {"experiments.store": "import pickle"}),
    (
        architecture.cycles,
        {
            "rules.base": "from bh_routing.rules.catalog import make_rule",
            "rules.catalog": "from bh_routing.rules.base import Rule",
        },
    ),
    (
        architecture.own_imports_inside_functions,
        {"rules.base": "def f():\n    from bh_routing import errors"},
    ),
    (architecture.work_at_import, {"engine.generate": "import torch\ntorch.manual_seed(0)"}),
    (
        architecture.work_at_import,
        {"models.load": "try:\n    x = 1\nfinally:\n    y = 1"},
    ),
    (architecture.nameless_files, {"engine.utils": "pass"}),
]

FILE_CHECKS: list[tuple[Callable[[Mapping[str, str]], list[str]], str]] = [
    (architecture.long_files, "x = 1\n" * 401),
    (architecture.long_functions, "def f():\n" + "    x = 1\n" * 60),
    (architecture.long_functions, "class A:\n    def __init__(self):\n" + "        x = 1\n" * 40),
    (architecture.forbidden_syntax, "try:\n    f()\nexcept:\n    pass"),
    (architecture.forbidden_syntax, "from math import *"),
    (architecture.forbidden_syntax, "load(name, trust_remote_code=True)"),
    (architecture.forbidden_syntax, "torch.load(path)"),
]


@pytest.mark.parametrize(
    "check", dict.fromkeys(check for check, _ in MODULE_CHECKS), ids=lambda check: check.__name__
)
def test_the_package_keeps_the_rule(check: Callable[[Modules], list[str]]) -> None:
    assert check(MODULES) == []


@pytest.mark.parametrize(
    "check", dict.fromkeys(check for check, _ in FILE_CHECKS), ids=lambda check: check.__name__
)
def test_every_file_keeps_the_rule(check: Callable[[Mapping[str, str]], list[str]]) -> None:
    assert check(FILES) == []


@pytest.mark.parametrize(("check", "sources"), MODULE_CHECKS)
def test_the_check_bites_where_a_module_breaks_the_rule(
    check: Callable[[Modules], list[str]], sources: Mapping[str, str]
) -> None:
    names = {f"bh_routing.{name}": text for name, text in sources.items()}
    assert len(check({name: Module(name, text) for name, text in names.items()})) == 1


@pytest.mark.parametrize(("check", "text"), FILE_CHECKS)
def test_the_check_bites_where_a_file_breaks_the_rule(
    check: Callable[[Mapping[str, str]], list[str]], text: str
) -> None:
    assert len(check({"bad.py": text})) == 1


def test_the_public_names_are_frozen() -> None:
    assert bh_routing.__all__ == PUBLIC_NAMES
    assert set(PUBLIC_NAMES) <= set(dir(bh_routing))


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_a_public_name_resolves(name: str) -> None:
    assert getattr(bh_routing, name) is not None


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'best_rule'"):
        bh_routing.best_rule  # noqa: B018


def run_python(code: str, folder: Path) -> str:
    """Run code in a new interpreter that sees only the package's source."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={"PYTHONPATH": str(SOURCE), "PATH": "", "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_importing_the_package_takes_less_than_a_tenth_of_a_second(tmp_path: Path) -> None:
    code = (
        "import time; start = time.perf_counter(); import bh_routing;"
        "print(time.perf_counter() - start)"
    )
    # The best of five: what is promised is the work, not the load of the machine.
    assert min(float(run_python(code, tmp_path)) for _ in range(5)) < 0.1


@pytest.mark.parametrize(
    "home", ["", ".results.records", ".errors", ".stats", ".analysis", ".report", ".cli"]
)
def test_what_only_reads_never_loads_torch(home: str, tmp_path: Path) -> None:
    code = (
        f"import sys, bh_routing{home};"
        "print(*sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    assert run_python(code, tmp_path).strip() == ""


def test_importing_every_module_changes_nothing_outside(tmp_path: Path) -> None:
    code = """
import importlib, logging, os, random, sys, warnings
import matplotlib, matplotlib.pyplot, numpy, pandas, scipy.stats, torch, transformers
import transformers.integrations.moe
import datasets, lm_eval.models.huggingface, pydantic, tqdm, typer, yaml

def state():
    return {
        "random": random.getstate(),
        "numpy": numpy.random.get_state()[1].tolist(),
        "torch": torch.initial_seed(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "cuda": torch.cuda.is_initialized(),
        "logging": (logging.root.handlers[:], logging.root.level),
        "transformers": transformers.logging.get_verbosity(),
        "warnings": len(warnings.filters),
        "matplotlib": dict(matplotlib.rcParams),
        "pandas": pandas.get_option("display.max_rows"),
        "environment": dict(os.environ),
        "path": sys.path[:],
        "files": os.listdir(),
    }

before = state()
for name in MODULE_NAMES:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Optional: what can't be imported changes nothing.
        if error.name not in ("triton", "vllm", "prometheus_client"):
            raise
after = state()
print(*[key for key in before if before[key] != after[key]])
""".replace("MODULE_NAMES", repr([name for name in MODULES if not name.endswith("__main__")]))
    assert run_python(code, tmp_path).strip() == ""


MODEL = "--model --device --dtype --no-fp16 --device-map --seed"
CALIBRATED = f"{MODEL} --calibration --calibration-text"
SCORED = (
    f"{CALIBRATED} --text --tokens --batch-size --decode-batch --executor --ray-address --workers"
)
CHOSEN = "--config --configs --rule --budget"
FLAGS = {
    "run": (
        f"{SCORED} {CHOSEN} --prompts --output --max-tokens --checkpoint-interval --no-resume "
        "--chat-template --no-eval --token-traces --timing-rounds --track --json"
    ),
    "calibrate": f"{MODEL} --output --calibration-text --nulls --max-tokens --plots --json",
    "evaluate": f"{SCORED} {CHOSEN} --window --stride --margin --output --json",
    "sweep": f"{SCORED} --window --stride --output --cost --budget --rule --json",
    "prune": (
        "model --device --dtype --no-fp16 --device-map --seed --output --keep --alpha --score "
        "--calibration-text --max-tokens --json"
    ),
    "evidence": (
        "model --device --dtype --no-fp16 --device-map --seed --output --parts --tokens "
        "--calibration-tokens --jobs --estimate --json"
    ),
    "lm-eval": (
        f"{CALIBRATED} {CHOSEN} --tasks --include-path --limit --num-fewshot --batch-size "
        "--chat-template --output --json"
    ),
    "export": "folder --to --output",
    "models": "--check --device --no-fp16 --json",
    "doctor": "--output --statistics --tokens --json",
    "bench": "part --model --device --batches --lengths --tokens --rounds --compiled --json",
    "report": "folders --output --format --track",
    "serve": "model --rule --config --configs --calibration --prefill-rule --check",
}
"""In this table stands what scripts of users may contain: nothing may vanish from it silently."""


def test_the_commands_and_their_flags_are_frozen() -> None:
    commands = getattr(typer.main.get_command(app), "commands")  # noqa: B009  # click's own type
    flags = {
        name: {
            flag
            for parameter in command.params
            for flag in parameter.secondary_opts or parameter.opts
            if flag != "--help"
        }
        for name, command in commands.items()
    }
    assert flags == {name: set(text.split()) for name, text in FLAGS.items()}
