"""Routing goes through torch.compile, as one graph."""

from __future__ import annotations

import shutil

import pytest
import torch

from tests.families import checks
from tests.families.misses import hold
from tests.families.zoo import family_names

# What torch warns of while it traces is transformers' own code, and inductor's own.
pytestmark = pytest.mark.filterwarnings("ignore")
every_family = pytest.mark.parametrize("family", family_names())

DIVERSE = ("deepseek_v3", "gemma4", "gpt_oss", "olmoe", "qwen3_moe")
"""Groups with a bias, probabilities, softmax after selection, raw and normalised softmax."""


@every_family
def test_a_compiled_model_keeps_what_the_eager_one_keeps(family: str) -> None:
    hold(checks.compiled_prefill_counts_alike, family, implementations=("batched_mm",))


@pytest.mark.full
@every_family
def test_a_compiled_bfloat16_model_keeps_what_the_eager_one_keeps(family: str) -> None:
    hold(checks.compiled_prefill_counts_alike, family, torch.bfloat16)


@pytest.mark.parametrize("family", DIVERSE[:2])
def test_a_rule_after_compilation_is_never_ignored(family: str) -> None:
    hold(checks.a_rule_after_compilation_is_never_ignored, family, implementations=("batched_mm",))


@pytest.mark.full
@every_family
def test_a_rule_after_compilation_is_never_ignored_in_any_family(family: str) -> None:
    hold(checks.a_rule_after_compilation_is_never_ignored, family, implementations=("batched_mm",))


@pytest.mark.full
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("family", DIVERSE)
def test_inductor_keeps_what_the_eager_model_keeps(family: str) -> None:
    hold(checks.inductor_prefill_counts_alike, family, implementations=("batched_mm",))
