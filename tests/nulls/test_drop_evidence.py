"""The evidence for BH-drop is counted as docs/method.md says, and the page shows what was measured.

Axes: T tokens, K slots.
"""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import other_seeds, transfer, wrong_drops
from benchmarks.other_seeds import read_documents
from benchmarks.transfer import static_at
from benchmarks.wrong_drops import HERE, METHOD
from bh_routing.experiments.wrong_drops import Counts, count, share
from bh_routing.rules import BenjaminiHochberg, BenjaminiHochbergDrop, Rule

KEEP_TK = torch.tensor([[1, 0, 0], [1, 1, 1], [1, 1, 0]], dtype=torch.bool)
MATTERED_TK = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)


def counted(rule: Rule) -> Counts:
    return Counts(*count(rule, KEEP_TK, MATTERED_TK).tolist())


def test_of_three_dropped_slots_the_one_that_mattered_is_wrong() -> None:
    counts = counted(BenjaminiHochbergDrop(0.1))
    assert (counts.units, counts.kept, counts.mattered) == (3, 6, 3)
    assert (counts.chosen, counts.wrong) == (3, 1)
    # 1 of 2 at the first token, nothing dropped at the second, 0 of 1 at the third.
    assert counts.token_shares == pytest.approx(0.5)


def test_a_block_is_one_family_and_the_last_may_be_short() -> None:
    counts = counted(BenjaminiHochbergDrop(0.1, scope="block", block_tokens=2))
    assert (counts.blocks, counts.block_shares) == (2, pytest.approx(1 / 2))
    counts = counted(BenjaminiHochbergDrop(0.1, scope="block", block_tokens=3))
    assert (counts.blocks, counts.block_shares) == (1, pytest.approx(1 / 3))


def test_of_bh_select_a_kept_slot_that_did_not_matter_is_wrong() -> None:
    counts = counted(BenjaminiHochberg(0.1))
    assert (counts.chosen, counts.wrong) == (6, 4)
    assert counts.token_shares == pytest.approx(0 / 1 + 2 / 3 + 2 / 2)


def test_a_share_weighs_tokens_and_has_no_interval_where_there_are_two_clusters() -> None:
    found = share([1.0, 3.0], [2.0, 10.0], ["a", "b"])
    assert found["estimate"] == pytest.approx(4 / 12)
    assert found["low"] is None
    assert share([0.0], [0.0], ["a"]) == {"estimate": None, "low": None, "high": None}


@pytest.mark.parametrize(
    ("mean", "loss"), [(4.0, 0.3), (4.5, 0.25), (7.5, 0.025), (8.0, 0.0)], ids=str
)
def test_static_top_k_at_a_fractional_mean_lies_between_its_neighbours(
    mean: float, loss: float
) -> None:
    assert static_at(mean, [0.6, 0.3, 0.2, 0.1, 0.05]) == pytest.approx(loss)


def test_a_corpus_that_is_cut_short_gives_its_whole_documents(tmp_path: Path) -> None:
    whole = [f"document {number} " + "word " * number for number in range(400)]
    packed = lzma.compress("\n<|endoftext|>\n".join(whole).encode() + b"\n<|endoftext|>\n")
    (tmp_path / "train.txt.xz").write_bytes(packed[: len(packed) * 2 // 3])
    found = read_documents(tmp_path / "train.txt.xz")
    assert 10 < len(found) < 400
    assert found == [text.strip() for text in whole[: len(found)]]


def measured(name: str) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
    return results


@pytest.mark.parametrize(
    ("name", "excerpt"),
    [
        ("wrong_drops", wrong_drops.render(measured("wrong_drops"), "sensitivity, norm")),
        ("transfer", transfer.render(measured("transfer"))),
        ("other_seeds", other_seeds.render(measured("other_seeds"))),
    ],
    ids=["wrong_drops", "transfer", "other_seeds"],
)
def test_the_page_shows_what_was_measured(name: str, excerpt: str) -> None:
    assert f"{excerpt}<!-- {name}: end -->" in METHOD.read_text(encoding="utf-8")


def test_by_token_the_mean_share_of_wrong_drops_keeps_below_its_line() -> None:
    rows = [r for r in measured("wrong_drops")["rows"] if r["variant"].startswith("bh_drop token")]
    assert len(rows) == 4 * 6 * 4
    for row in rows:
        assert row["per_token"]["low"] <= row["alpha"] * row["share_mattered"]
