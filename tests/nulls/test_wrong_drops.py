"""Wrong drops are counted as docs/method.md says. Axes: T tokens, K slots."""

from __future__ import annotations

import pytest
import torch

from benchmarks.wrong_drops import Counts, count, share
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
