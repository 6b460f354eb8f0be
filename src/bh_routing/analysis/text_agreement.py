"""How far generated texts stay those of Top-K: the free-running side of quality.

One early difference changes every later token, so this measures when texts part, not how bad
the other text is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from bh_routing.analysis.paired import MeanInterval, mean_interval
from bh_routing.records import ExperimentDetail


@dataclass(frozen=True, kw_only=True, slots=True)
class TextAgreement:
    """Greedy texts of one configuration beside the baseline's, averaged over prompts."""

    config_name: str
    prompts: int
    """Prompts with tokens on both sides."""
    left_out: int
    """Prompts of the baseline without."""
    identical: int
    """Prompts whose texts are the same, token for token."""
    prefix_share: float
    """Longest common prefix over the longer text's tokens."""
    prefix_share_low: float
    prefix_share_high: float
    """Ends of the 95 % t interval over prompts, cut to 0 and 1."""
    agreement_share: float
    """Positions that hold the same token over the longer text's tokens."""
    agreement_share_low: float
    agreement_share_high: float
    prefix_tokens_median: float
    """Median over prompts of the longest common prefix, in tokens."""


def text_agreement(
    details: Mapping[tuple[str, str], ExperimentDetail], baseline: str
) -> dict[str, TextAgreement]:
    """Compare each configuration's token ids with the baseline's on the same prompts.

    Args:
        details: (config_name, prompt_text) -> detail, as in `Results.details`.
        baseline: name of the configuration to agree with.
    Returns:
        Configuration -> agreement, without the baseline, in the order of `details`; NaN where no
        prompt has tokens on both sides.
    """
    reference = {
        prompt: detail.output_token_ids
        for (name, prompt), detail in details.items()
        if name == baseline
    }
    names = dict.fromkeys(name for name, _ in details if name != baseline)
    return {name: _agreement(name, details, reference) for name in names}


def _agreement(
    name: str,
    details: Mapping[tuple[str, str], ExperimentDetail],
    reference: Mapping[str, Sequence[int]],
) -> TextAgreement:
    prefixes, prefix_shares, agreement_shares, identical = [], [], [], 0
    for prompt, expected in reference.items():
        detail = details.get((name, prompt))
        # A failed experiment has no tokens: that is no text, not a text that disagrees.
        if detail is None or not detail.output_token_ids or not expected:
            continue
        got = detail.output_token_ids
        longer = max(len(got), len(expected))
        same = [a == b for a, b in zip(got, expected, strict=False)]
        prefix = next((i for i, equal in enumerate(same) if not equal), len(same))
        prefixes.append(prefix)
        prefix_shares.append(prefix / longer)
        agreement_shares.append(sum(same) / longer)
        identical += prefix == longer
    prefix_mean, agreement_mean = _share_interval(prefix_shares), _share_interval(agreement_shares)
    return TextAgreement(
        config_name=name,
        prompts=len(prefixes),
        left_out=len(reference) - len(prefixes),
        identical=identical,
        prefix_share=prefix_mean.mean,
        prefix_share_low=prefix_mean.low,
        prefix_share_high=prefix_mean.high,
        agreement_share=agreement_mean.mean,
        agreement_share_low=agreement_mean.low,
        agreement_share_high=agreement_mean.high,
        prefix_tokens_median=float(median(prefixes)) if prefixes else float("nan"),
    )


def _share_interval(shares: Sequence[float]) -> MeanInterval:
    interval = mean_interval(shares)
    if math.isnan(interval.low):
        return interval
    return interval._replace(low=max(0.0, interval.low), high=min(1.0, interval.high))
