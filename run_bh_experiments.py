"""Compare Benjamini-Hochberg routing with Top-K: `python run_bh_experiments.py --model demo`.

The same as `bh-routing run`, and importable, for example in a notebook:

    import run_bh_experiments as bh

    bh.ROUTING_CONFIGS["my_custom_config"] = {"method": "bh", "alpha": 0.03, "max_k": 10}
    bh.TEST_PROMPTS.append({"text": "...", "category": "mine", "description": "..."})
    bh.main(["--model", "demo"])
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

_SOURCE = Path(globals().get("__file__", "run_bh_experiments.py")).resolve().parent / "src"
if (_SOURCE / "bh_routing").is_dir():
    # In a clone, import the clone's own package.
    sys.path.insert(0, str(_SOURCE))

try:
    from bh_routing.cli.main import main as _bh_routing
    from bh_routing.cli.main import process_arguments

    if __name__ == "__main__":
        print("importing matplotlib, pandas and scipy", file=sys.stderr, flush=True)
    from bh_routing.analysis.comparisons import analyze_results
    from bh_routing.cli.options import Overrides
    from bh_routing.experiments.defaults import ROUTING_CONFIGS, TEST_PROMPTS
    from bh_routing.report.charts import create_visualizations
    from bh_routing.report.markdown import generate_markdown_report
except ModuleNotFoundError as error:
    _PROBLEM = (
        f"run_bh_experiments.py needs the Python package {error.name!r}, which isn't installed; "
        "in a clone of the bh-routing repository run: pip install -e ."
    )
    if __name__ != "__main__":
        raise ImportError(_PROBLEM) from None
    print(_PROBLEM, file=sys.stderr)
    sys.exit(2)

__all__ = [
    "ROUTING_CONFIGS",
    "TEST_PROMPTS",
    "analyze_results",
    "create_visualizations",
    "generate_markdown_report",
    "main",
]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiments with this module's configurations, prompts and functions.

    Args:
        argv: arguments of `bh-routing run`; None: those of the process, or none in a notebook.
    Returns:
        0 success, 1 some experiments failed, 2 bad input, 130 or 143 interrupted.
    """
    flags = process_arguments() if argv is None else argv
    # Looked up now, not at import, so that replacing one of them changes the run.
    overrides = Overrides(
        configs=ROUTING_CONFIGS,
        prompts=TEST_PROMPTS,
        analyze=analyze_results,
        visualize=create_visualizations,
        report=generate_markdown_report,
    )
    return _bh_routing(["run", *flags], overrides)


if __name__ == "__main__":
    sys.exit(main())
