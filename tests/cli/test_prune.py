"""`bh-routing prune`, `bhr.prune`, and the other commands on a pruned checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import bh_routing as bhr
from bh_routing.cli.main import main
from tests.cli.test_bad_input import expect
from tests.families.checkpoints import save_tiny

FEW = ["--max-tokens", "2000", "--device", "cpu"]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with 48 experts, by REAP."""
    folder = tmp_path_factory.mktemp("pruned") / "demo-48"
    made = ["prune", "demo", "--keep", "48", "--score", "reap", "--output", str(folder), *FEW]
    assert main(made) == 0
    return folder


def test_pruning_json_and_the_model_card_state_how_it_was_made(pruned: Path) -> None:
    made = json.loads((pruned / "pruning.json").read_text())
    assert (made["model"], made["keep"], made["num_experts"]) == ("demo", 48, 64)
    assert made["score"] == "reap"
    assert made["text"]["num_tokens"] <= 2000
    for router, kept in made["kept"].items():
        scores = made["scores"][router]
        assert sorted(scores[e] for e in kept) == sorted(scores)[16:]
        assert kept == sorted(kept)
    card = (pruned / "README.md").read_text()
    for fact in ("48 of 64", "`reap`", "packaged text", made["text"]["sha256"], "bh-routing"):
        assert fact in card
    assert card.startswith("---\nlibrary_name: transformers\n")


def test_evaluate_and_sweep_take_a_pruned_checkpoint_as_any_local_model(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--model", str(pruned), "--device", "cpu", "--tokens", "600"]
    rules = ["--rule", "topk:k=8", "--rule", "topk:k=6"]
    assert main(["evaluate", *common, *rules, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rules"]
    assert [row["mean_experts"] for row in rows] == [8, 6]
    sweep = ["sweep", *common, "--output", str(tmp_path / "sweep"), "--budget", "6"]
    assert main([*sweep, "--rule", "top_p"]) == 0
    run = json.loads((tmp_path / "sweep" / "run.json").read_text())
    assert run["model"]["num_experts"] == 48


def test_alpha_keeps_what_the_layer_with_the_fewest_rejections_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = ["prune", "demo", "--alpha", "0.3", "--output", str(tmp_path / "pruned"), "--json"]
    assert main([*made, "--max-tokens", "4000", "--device", "cpu"]) == 0
    document = json.loads(capsys.readouterr().out)
    rejected = document["rejected_by_layer"]
    assert 0 < min(rejected) < max(rejected)
    assert document["keep"] == 64 - min(rejected)
    card = (tmp_path / "pruned" / "README.md").read_text()
    assert 'nominal alpha 0.3, "this expert matters to the text"' in card


def test_bhr_prune_scores_on_given_texts(tmp_path: Path) -> None:
    texts = ["The river ran to the sea.", "Water boils at a hundred degrees."]
    made = bhr.prune(
        "demo", tmp_path / "pruned", keep=40, score="frequency", texts=texts, device="cpu"
    )
    assert made["text"]["num_documents"] == 2
    assert {len(kept) for kept in made["kept"].values()} == {40}
    model, _ = bhr.load_model(str(tmp_path / "pruned"), device="cpu")
    assert model.config.num_experts == 40
    with pytest.raises(bhr.ResultsError, match="pruned exists"):
        bhr.prune("demo", tmp_path / "pruned", keep=40)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            [],
            "alpha lets a test decide; give one of them, got keep=None, alpha=None",
        ),
        (["--keep", "8", "--alpha", "0.1"], "give one of them, got keep=8, alpha=0.1"),
        (
            ["--keep", "64"],
            "--keep must be from 2 to 63, one less than the experts of demo, got 64",
        ),
        (["--keep", "1"], "--keep must be greater than or equal to 2, got 1"),
        (["--alpha", "1"], "--alpha must be less than 1, got 1.0"),
        (["--keep", "8", "--score", "weight"], "'weight' is not one of"),
        (
            ["--alpha", "1e-6", "--max-tokens", "300", "--device", "cpu"],
            "--alpha at 1e-06 some layer has 0 experts that are shown not to matter to the text",
        ),
    ],
)
def test_a_bad_choice_ends_in_one_sentence_and_writes_nothing(
    options: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "pruned"
    expect(["prune", "demo", "--output", str(output), *options], sentence, capsys)
    assert not list(tmp_path.iterdir())


def test_groups_of_experts_lose_equally_many(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny("deepseek_v3", tmp_path / "tiny")
    prune = ["prune", str(folder), "--output", str(tmp_path / "pruned"), *FEW]
    for keep in ("10", "4"):
        expect([*prune, "--keep", keep], f"4 groups of experts, got {keep}; set 8", capsys)
    assert main([*prune, "--keep", "12", "--score", "random"]) == 0
    made = json.loads((tmp_path / "pruned" / "pruning.json").read_text())
    assert made["model"] == "tiny", "a path of this machine is nobody else's business"
    for kept in made["kept"].values():
        assert [sum(e // 4 == group for e in kept) for group in range(4)] == [3, 3, 3, 3]


def test_an_unsupported_model_is_rejected_before_its_weights_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny("olmoe", tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    prune = ["prune", str(folder), "--keep", "8", "--output", str(tmp_path / "pruned")]
    expect(prune, "is quantised by fp8", capsys)
    assert not (tmp_path / "pruned").exists()


def test_a_model_of_the_hub_is_pruned_from_the_cache(tmp_path: Path) -> None:
    cached = tmp_path / "hub" / "models--org--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("a" * 40)
    save_tiny("olmoe", cached / "snapshots" / ("a" * 40))
    command = [sys.executable, "-m", "bh_routing", "prune", "org/tiny", "--keep", "12"]
    done = subprocess.run(
        [*command, "--score", "random", "--output", str(tmp_path / "pruned"), *FEW],
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pruned" / "README.md").read_text().startswith("---\nbase_model: org/tiny\n")
