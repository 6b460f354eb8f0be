"""Seven checks of the whole tool on the real demo model: `python test_bh_experiments.py`.

Works in a clone without installation if the dependencies are present. pytest runs the same
functions: `pytest test_bh_experiments.py`.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

_SOURCE = Path(__file__).resolve().parent / "src"
if (_SOURCE / "bh_routing").is_dir() and str(_SOURCE) not in sys.path:
    sys.path.insert(0, str(_SOURCE))

try:
    import numpy as np
    import torch
    from scipy import stats

    import bh_routing as bhr
    from bh_routing.cli import main as bh_routing_command
    from bh_routing.experiments.defaults import ROUTING_CONFIGS, TEST_PROMPTS
    from bh_routing.rules.catalog import make_rule
except ModuleNotFoundError as error:
    print(
        f"test_bh_experiments.py needs the Python package {error.name!r}, which isn't installed; "
        "in a clone of the bh-routing repository run: make setup, then "
        ".venv/bin/python test_bh_experiments.py",
        file=sys.stderr,
    )
    sys.exit(2)

MAX_TOKENS = 12
CONFIGS = "topk_8,bh_moderate"
FILES = ("bh_routing_results.csv", "run.json", "records.jsonl", "experiment_log.txt")
REPORT_FILES = ("analysis_summary.json", "REPORT.md")
PLOTS = (
    "avg_experts_comparison.png",
    "inference_time_comparison.png",
    "expert_utilization_cv.png",
    "experts_by_category.png",
    "experts_vs_latency.png",
)


class CheckFailed(AssertionError):
    """A check failed."""


class Demo(NamedTuple):
    """The demo model with tokenizer and calibration."""

    model: Any
    tokenizer: Any
    calibration: bhr.Calibration


def expect(claim: bool, text: str) -> None:
    """Fail with `text` unless the claim holds."""
    if not claim:
        raise CheckFailed(text)


@cache
def demo() -> Demo:
    """Load and calibrate the demo model once."""
    model, tokenizer = bhr.load_model("demo", device="cpu")
    texts = bhr.packaged_documents("calibration")
    return Demo(model, tokenizer, bhr.calibrate(model, tokenizer, texts))


@cache
def scratch() -> Path:
    """Return a folder for this process's runs, removed at exit."""
    folder = Path(tempfile.mkdtemp(prefix="bh_routing_checks_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def saved() -> Path:
    """Save the calibration to a file, so that runs needn't repeat it."""
    path = scratch() / "calibration.safetensors"
    demo().calibration.save(path)
    return path


def run_suite(folder: Path, prompts: str) -> None:
    """Run two configurations on some prompts from the command line."""
    arguments = ["run", "--model", "demo", "--device", "cpu", "--output", str(folder)]
    arguments += ["--configs", CONFIGS, "--prompts", prompts, "--max-tokens", str(MAX_TOKENS)]
    arguments += ["--checkpoint-interval", "2", "--no-eval", "--calibration", str(saved())]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = bh_routing_command(arguments)
    expect(code == 0, f"bh-routing {' '.join(arguments)} ended with {code}: {said.getvalue()}")


@cache
def mini_suite() -> Path:
    """Run two configurations on three prompts once."""
    run_suite(scratch() / "mini_suite", "1-3")
    return scratch() / "mini_suite"


def journal_keys(folder: Path) -> list[str]:
    """Return the keys of a journal's experiments, in order of completion."""
    lines = (folder / "records.jsonl").read_text("utf-8").splitlines()
    return [entry["key"] for line in lines if "record" in (entry := json.loads(line))]


def test_benjamini_hochberg_equals_scipy() -> None:
    """BH correctness: same rejections as scipy, including ties, zeros and ones."""
    random = np.random.default_rng(0)
    for num_experts in (1, 8, 64):
        p = random.random((2_000, num_experts)) ** random.integers(1, 6, (2_000, 1))
        p[::3] = np.round(p[::3], 2)
        for alpha in (0.01, 0.05, 0.10):
            mask = bhr.benjamini_hochberg(torch.from_numpy(p), alpha=alpha).numpy()
            reference = stats.false_discovery_control(p, axis=-1) <= alpha
            expect(
                np.array_equal(mask, reference),
                f"{(mask != reference).sum()} decisions differ at alpha {alpha}, E {num_experts}",
            )


def test_the_demo_model_loads_and_calibrates() -> None:
    """Initialisation: model, tokenizer and a matching calibration."""
    model, _, calibration = demo()
    expect(calibration.num_layers == model.config.num_hidden_layers, "a layer has no calibration")
    expect(calibration.num_experts == model.config.num_experts, "an expert has no calibration")
    expect(calibration.num_tokens >= 5_000, f"only {calibration.num_tokens} calibration tokens")


def test_every_configuration_applies_and_leaves_no_trace() -> None:
    """Applying configurations: counts within bounds, and the model is unchanged afterwards."""
    model, tokenizer, calibration = demo()
    inputs = tokenizer(TEST_PROMPTS[1]["text"], return_tensors="pt")
    with torch.no_grad():
        before = model(**inputs).logits
        for name, config in ROUTING_CONFIGS.items():
            with bhr.route(model, make_rule(config), calibration) as trace:
                model(**inputs)
            low, high = int(trace.expert_counts.min()), int(trace.expert_counts.max())
            expect(1 <= low <= high <= 8, f"{name} kept between {low} and {high} experts")
            if name == "topk_8":
                expect(low == high == 8, f"topk_8 kept between {low} and {high} experts")
            else:
                expect(low < high, f"{name} kept {low} experts for every token")
        after = model(**inputs).logits
    expect(torch.equal(before, after), "the model's logits changed after leaving route()")


def test_top_k_generates_what_transformers_generates() -> None:
    """One experiment: topk_8 generates the same tokens as transformers' `generate`."""
    model, tokenizer, _ = demo()
    inputs = tokenizer(TEST_PROMPTS[0]["text"], return_tensors="pt")
    options = {"max_new_tokens": MAX_TOKENS, "do_sample": False}
    plain = model.generate(**inputs, **options)
    with bhr.route(model, bhr.TopK(8)) as trace:
        routed = model.generate(**inputs, **options)
    expect(torch.equal(plain, routed), "topk_8 and plain generate wrote different tokens")
    expect(bool((trace.expert_counts == 8).all()), "topk_8 did not keep 8 experts everywhere")


def test_a_mini_suite_writes_its_rows() -> None:
    """2 x 3 mini suite: two configurations on three prompts give six rows."""
    folder = mini_suite()
    missing = [name for name in FILES if not (folder / name).is_file()]
    expect(not missing, f"the run left out {', '.join(missing)}")
    rows = bhr.load_results(folder).experiments
    expect(len(rows) == 6, f"expected 6 rows, got {len(rows)}")
    expect(set(rows["status"]) == {"ok"}, f"some experiments failed: {list(rows['error'])}")
    means = rows.groupby("config_name")["avg_experts_per_token"].mean()
    expect(means["topk_8"] == 8.0, f"topk_8 used {means['topk_8']} experts")
    expect(1.0 < means["bh_moderate"] < 8.0, f"bh_moderate used {means['bh_moderate']} experts")


def test_analysis_and_report_are_made() -> None:
    """Analysis and report: the summary has comparisons, the report embeds every plot."""
    folder = mini_suite()
    missing = [name for name in REPORT_FILES if not (folder / name).is_file()]
    missing += [name for name in PLOTS if not (folder / "plots" / name).is_file()]
    expect(not missing, f"the run left out {', '.join(missing)}")
    summary = json.loads((folder / "analysis_summary.json").read_text("utf-8"))
    comparison = summary["comparisons"]["bh_moderate"]["avg_experts_per_token"]
    expect(comparison["n"] == 3, f"three prompts should pair, {comparison['n']} did")
    expect(comparison["mean_difference"] < 0, "bh_moderate did not use fewer experts than topk_8")
    report = (folder / "REPORT.md").read_text("utf-8")
    unseen = [name for name in PLOTS if f"plots/{name}" not in report]
    expect(not unseen, f"the report doesn't show {', '.join(unseen)}")


def test_a_run_goes_on_where_it_stopped() -> None:
    """Checkpoint and resume: finished experiments aren't rerun, and snapshots are readable."""
    folder = scratch() / "resume"
    run_suite(folder, "1")
    finished = journal_keys(folder)
    snapshot = json.loads((folder / "checkpoints" / "latest_checkpoint.json").read_text("utf-8"))
    expect(snapshot["completed"] == 2, f"the snapshot counts {snapshot['completed']}, not 2")
    run_suite(folder, "1-3")
    keys = journal_keys(folder)
    expect(keys[:2] == finished, "finished experiments changed")
    expect(len(keys) == len(set(keys)) == 6, f"6 experiments expected, the journal has {len(keys)}")


CHECKS: dict[str, Callable[[], None]] = {
    "BH correctness": test_benjamini_hochberg_equals_scipy,
    "initialisation": test_the_demo_model_loads_and_calibrates,
    "applying configurations": test_every_configuration_applies_and_leaves_no_trace,
    "one experiment": test_top_k_generates_what_transformers_generates,
    "2x3 mini suite": test_a_mini_suite_writes_its_rows,
    "analysis and report": test_analysis_and_report_are_made,
    "checkpoint and resume": test_a_run_goes_on_where_it_stopped,
}


def main() -> int:
    """Run all checks and print their results; return 0 if all passed, else 1."""
    num_passed = 0
    for number, (name, check) in enumerate(CHECKS.items(), start=1):
        start = time.perf_counter()
        problem = ""
        try:
            check()
        except Exception as error:  # noqa: BLE001  # a failed check must not stop the others
            problem = f"{type(error).__name__}: {error}"
        num_passed += not problem
        verdict = "FAILED" if problem else "passed"
        seconds = time.perf_counter() - start
        print(f"{number}/{len(CHECKS)} {name:<24} {verdict} ({seconds:.1f} s)", flush=True)
        if problem:
            print(f"    {problem}", flush=True)
    print(f"{num_passed} of {len(CHECKS)} checks passed")
    return 0 if num_passed == len(CHECKS) else 1


if __name__ == "__main__":
    sys.exit(main())
