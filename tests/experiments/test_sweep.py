"""Knobs found for budgets, on the demo model and a page of text."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bh_routing.cli import main
from bh_routing.engine.calibrate import calibrate
from bh_routing.engine.texts import packaged_documents
from bh_routing.errors import InputError, ResultsError
from bh_routing.experiments.run import run
from bh_routing.experiments.search import KnobSearch, check_budgets
from bh_routing.experiments.settings import Goal
from bh_routing.experiments.specs import RunSpec, SweepSpec, make_spec
from bh_routing.experiments.sweep import default_budgets, sweep
from bh_routing.experiments.variants import parse_variants
from bh_routing.models import LoadedModel, find_routers
from bh_routing.nulls.calibration import Calibration
from bh_routing.results.records import QUALITY_JOURNAL, RUN_JSON
from bh_routing.rules.fixed import PerLayerTopK
from tests.experiments.conftest import MakeTinySpec

POINTS = ["min_p@5", "min_p@3", "top_p@5", "top_p@3"]
CURVE = ["top_p@6", "top_p@4", "top_p@2"]


def write_text(path: Path, split: str, start: int) -> Path:
    """Write the first words of three packaged documents as a text file."""
    documents = packaged_documents(split)[start : start + 3]
    words = [" ".join(document.text.split()[:60]) for document in documents]
    path.write_text("\n<|endoftext|>\n".join(words), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("texts")
    return (
        write_text(folder / "calibration.txt", "calibration", 0),
        write_text(folder / "evaluation.txt", "evaluation", 0),
    )


def sweep_into(folder: Path, texts: tuple[Path, Path], *rules: str) -> dict[str, Any]:
    spec = make_spec(
        SweepSpec,
        model="demo",
        device="cpu",
        output=folder,
        rules=rules or ["min_p", "top_p"],
        budgets=[5, 3],
        texts=[texts[1]],
        calibration_texts=[texts[0]],
        command="typed",
    )
    return sweep(spec)


@pytest.fixture(scope="module")
def finished(
    demo: LoadedModel, texts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A whole sweep; whoever changes it copies it first."""
    folder = tmp_path_factory.mktemp("sweep") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bh_routing.experiments.preparation.load_model", lambda *_, **__: demo)
        sweep_into(folder, texts)
    return folder


def scored(folder: Path) -> list[tuple[str, str]]:
    lines = [json.loads(line) for line in (folder / QUALITY_JOURNAL).read_text().splitlines()]
    records = [line["record"] for line in lines if "record" in line]
    return [(record["config_name"], record["document"]) for record in records]


def test_rules_meet_their_budgets_and_static_top_k_stands_on_both_sides(
    finished: Path,
) -> None:
    document = json.loads((finished / RUN_JSON).read_text())
    points = document["sweep"]["points"]
    assert [point["config_name"] for point in points] == POINTS
    for point in points:
        assert point["calibration_mean_experts"] == pytest.approx(point["budget"], rel=0.02)
        assert point["config"][point["knob_field"]] == point["knob"]
        assert point["unreachable"] is None
    references = document["sweep"]["references"]
    counts = [reference["k"] for reference in references]
    assert min(counts) <= 2
    assert max(counts) >= 5
    assert [point["config_name"] for point in document["sweep"]["curve_points"]] == CURVE
    assert document["provenance"]["command"] == "typed"
    names = [*POINTS, *CURVE, *(reference["config_name"] for reference in references)]
    assert {name for name, _ in scored(finished)} == set(names)
    assert len(scored(finished)) == 3 * len(names)


def test_a_killed_sweep_scores_nothing_twice_and_searches_no_knob_again(
    loaded_demo: LoadedModel, finished: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    whole = json.loads((folder / RUN_JSON).read_text())
    journal = folder / QUALITY_JOURNAL
    before = journal.read_bytes()
    # What a kill leaves: some whole lines, and a piece of the next.
    kept = before.splitlines(keepends=True)[:8]
    journal.write_bytes(b"".join(kept) + b'{"half')
    calls: list[int] = []
    router = find_routers(loaded_demo.model).sites[0].module
    handle = router.register_forward_hook(lambda *_: calls.append(1))
    resumed = sweep_into(folder, texts)
    assert resumed["sweep"] == whole["sweep"]
    assert journal.read_bytes().startswith(b"".join(kept))
    assert len(set(scored(folder))) == len(scored(folder)) == len(scored(finished))
    # Seven records were there: both of min_p whole, of top_p@5 one document. Beside the model's
    # own top-k that leaves the rest of top-p on that document, all on the others, and static ones.
    assert len(calls) == (1 + 4) + (1 + 5) + (1 + len(whole["sweep"]["references"]))
    calls.clear()
    assert sweep_into(folder, texts)["sweep"] == whole["sweep"]
    handle.remove()
    assert calls == []


def test_texts_that_share_a_document_are_refused(
    loaded_demo: LoadedModel, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    with pytest.raises(InputError, match="3 of the 3 documents to score share a passage"):
        sweep_into(folder, (texts[1], texts[1]))
    assert not folder.exists()


def test_another_sweeps_folder_is_refused_and_left_alone(
    loaded_demo: LoadedModel, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / RUN_JSON).write_text('{"identity": {}, "plans": []}')
    with pytest.raises(ResultsError, match="isn't a sweep"):
        sweep_into(tmp_path, texts)
    assert [path.name for path in tmp_path.iterdir()] == [RUN_JSON]


def test_what_was_found_runs_through_evaluate(
    finished: Path, texts: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--model", "demo", "--device", "cpu", "--text", str(texts[1]), "--json"]
    chosen = ["--config", str(finished / "sweep.json"), "--configs", "min_p@5,top_p@3"]
    assert main([*command, *chosen]) == 0
    rows = json.loads(capsys.readouterr().out)["rules"]
    assert [row["config_name"] for row in rows] == ["min_p@5", "top_p@3"]
    assert [row["mean_experts"] for row in rows] == pytest.approx([5, 3], rel=0.15)


def search(demo: LoadedModel, calibration: Calibration | None = None) -> KnobSearch:
    documents = packaged_documents("calibration")[:3]
    return KnobSearch(*demo, documents, calibration, num_tokens=150)


def test_experts_are_shared_out_over_layers_by_losses_that_are_measured_once(
    demo: LoadedModel,
) -> None:
    (variant,) = parse_variants(["per_layer_top_k"])
    first = search(demo)
    (found,) = first.find([Goal(variant=variant, budget=4.5)])
    assert isinstance(found.rule, PerLayerTopK)
    assert sum(found.rule.k) == 27
    assert len(set(found.rule.k)) > 1
    kept = first.to_documents([found])
    calls: list[int] = []
    router = find_routers(demo.model).sites[0].module
    handle = router.register_forward_hook(lambda *_: calls.append(1))
    assert search(demo).find([found.goal], known=kept) == [found]
    assert calls == []
    (other,) = search(demo).find([Goal(variant=variant, budget=3.0)], known=kept)
    handle.remove()
    # Proposals of three documents, then the model's own top-k and the rule: no layer by itself.
    assert len(calls) == 3 + 2
    assert other.mean_experts == 3.0


def test_a_budget_out_of_a_rules_reach_is_said_with_the_closest_mean(demo: LoadedModel) -> None:
    (variant,) = parse_variants(["bh:null=gaussian,max_k=4"])
    high, low = search(demo).find([Goal(variant=variant, budget=b) for b in (5.0, 3.0)])
    assert low.unreachable is None
    assert high.mean_experts == pytest.approx(4, abs=0.05)
    assert high.unreachable is not None
    assert high.unreachable.startswith("5 experts can't be reached within 2%: the closest mean")


def test_a_level_that_the_calibration_cannot_decide_is_never_chosen(demo: LoadedModel) -> None:
    words = [document.text for document in packaged_documents("calibration")[:3]]
    small = calibrate(*demo, words, nulls=["background"], max_tokens=150)
    # As if from text enough: what is left is that its tables decide no alpha below `smallest`.
    small = replace(small, num_tokens=5_000, num_documents=20)
    smallest = small.resolution("background")
    (variant,) = parse_variants(["bh"])
    (found,) = search(demo, small).find([Goal(variant=variant, budget=2.0)])
    assert found.knob == pytest.approx(smallest, abs=1e-3)
    assert found.mean_experts > 3
    assert found.unreachable is not None


@pytest.mark.parametrize("budget", [0.5, 9.0])
def test_a_budget_that_no_top_k_has_is_refused(demo: LoadedModel, budget: float) -> None:
    (variant,) = parse_variants(["top_p"])
    with pytest.raises(InputError, match=f"from 1 to the model's own 8 .* got {budget:g}"):
        search(demo).find([Goal(variant=variant, budget=budget)])


def test_evaluate_brings_a_rule_without_its_knob_to_a_budget(
    texts: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--model", "demo", "--device", "cpu", "--text", str(texts[1]), "--json"]
    rules = ["--rule", "top_p", "--rule", "top_k:k=6", "--budget", "4"]
    assert main([*command, *rules, "--calibration-text", str(texts[0])]) == 0
    rows = json.loads(capsys.readouterr().out)["rules"]
    assert [row["config_name"] for row in rows] == ["top_p@4", "top_k_k-6"]
    assert rows[0]["mean_experts"] == pytest.approx(4, rel=0.15)


def budgeted(make: MakeTinySpec, texts: tuple[Path, Path], **changes: Any) -> RunSpec:
    configs = {
        "topk_8": {"method": "topk", "k": 8},
        "strict": {"method": "min_p", "share": 0.9},
        "loose": {"method": "min_p", "share": 0.1},
    }
    return make(configs=configs, calibration_texts=[texts[0]], **changes)


def test_a_run_at_a_budget_keeps_its_knobs_when_it_goes_on(
    loaded_demo: LoadedModel, texts: tuple[Path, Path], tiny_spec: MakeTinySpec
) -> None:
    spec = budgeted(tiny_spec, texts, budget=5.0)
    first = run(spec)
    assert {record.config_name for record in first.records} == {"topk_8", "strict@5"}
    document = json.loads((spec.output / RUN_JSON).read_text())
    found = document["spec"]["configs"]["strict@5"]["share"]
    assert 0.1 < found < 0.9
    assert [setting["knob"] for setting in document["budget"]] == [found]
    again = run(spec)
    assert (again.num_run, again.num_reused) == (0, 6)
    other = run(budgeted(tiny_spec, texts, budget=4.0))
    assert (other.num_run, other.num_reused) == (3, 3)


@pytest.mark.parametrize(
    ("top_k", "budgets"),
    [(8, [6, 5, 4, 3]), (2, [1.5, 1.25, 1]), (4, [3, 2.5, 2, 1.5]), (6, [4.5, 3.75, 3, 2.25])],
)
def test_default_budgets_are_fractions_of_the_models_own_k(
    top_k: int, budgets: list[float]
) -> None:
    assert default_budgets(top_k) == budgets
    check_budgets(default_budgets(top_k), top_k)


def test_a_model_of_one_expert_per_token_has_no_budget() -> None:
    with pytest.raises(InputError, match="uses 1 expert per token"):
        default_budgets(1)
