"""Find the value of a rule's tuning parameter at which it uses a given mean number of experts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Final

from scipy.optimize import brentq
from tqdm import tqdm

from bh_routing.engine.proposals import (
    Proposals,
    capture_proposals,
    mean_distinct_experts,
    mean_experts,
    tokens_that_fit,
)
from bh_routing.engine.score import score
from bh_routing.engine.texts import Document
from bh_routing.engine.windows import check_decode_batch, cut_pieces
from bh_routing.errors import CalibrationError, InputError
from bh_routing.experiments.quality_text import QualityText, prepare_text
from bh_routing.experiments.settings import Goal, Setting, recall_settings
from bh_routing.experiments.variants import LAYER_TOKENS, LayerLosses, Variant, measure_layer_losses
from bh_routing.models.routers import describe_model, find_routers
from bh_routing.models.routing import bind_rule, check_calibration, check_rule
from bh_routing.nulls.calibration import Calibration
from bh_routing.results.journal import digest
from bh_routing.results.records import QualityRecord
from bh_routing.rules.base import Rule
from bh_routing.rules.catalog import make_rule
from bh_routing.rules.fixed import PerLayerTopK, TopK
from bh_routing.rules.step import StepRule

SEARCH_TOKENS: Final = 4_000
"""Tokens of calibration text, spread over its documents: they determine a mean to about 0.6 %."""
PIECE_TOKENS: Final = 256
"""Longest sequence in emulated decode steps of calibration text."""
TOLERANCE: Final = 0.02
"""Relative difference between mean and budget beyond which the budget counts as unreachable."""
CLOSE_ENOUGH: Final = 0.005
"""Relative difference between mean and budget up to which nothing is corrected."""
MAX_CORRECTIONS: Final = 2
_HIT: Final = 5e-4
_STEP: Final = 1e-4


class KnobSearch:
    """Search for tuning parameters on calibration text.

    Args:
        model, tokenizer: as for `score`.
        documents: calibration text; a search reads the start of each document.
        calibration: required if a variant needs one.
        num_tokens: maximum number of tokens of the text.
        batch_size: windows per forward pass; None: as many as memory bounds allow.
        decode_batch: sequences per emulated decode step; a budget is then a fraction of the mean
            distinct experts that the model's own top-k reads in a step. None: a budget is a mean
            number of experts per token.
    Raises:
        InputError: the text has no tokens, or too few for such steps.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        documents: Sequence[Document],
        calibration: Calibration | None,
        num_tokens: int = SEARCH_TOKENS,
        batch_size: int | None = None,
        decode_batch: int | None = None,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._documents = documents
        self._calibration = calibration
        self._routers = find_routers(model)
        self._facts = facts = describe_model(model)
        if decode_batch is not None:
            num_tokens = max(num_tokens, decode_batch * PIECE_TOKENS)
        most = min(num_tokens, tokens_that_fit(self._routers))
        self.text: QualityText = prepare_text(
            tokenizer, facts, documents, max_tokens=most, batch_size=batch_size
        )
        if decode_batch is not None:
            pieces = list(cut_pieces(self.text.documents, min(PIECE_TOKENS, self.text.window)))
            check_decode_batch(pieces, decode_batch)
            self.text = replace(self.text, documents=pieces, decode_batch=decode_batch)
        self._searched = [
            facts.fingerprint,
            facts.dtype,
            facts.device,
            self.text.sha256,
            self.text.max_tokens,
            self.text.window,
            *([decode_batch] if decode_batch else []),
        ]
        self._proposals: dict[tuple[int, bool], Proposals] = {}
        self._means: dict[Rule, float] = {}
        self._ends: dict[str, tuple[float, float]] = {}
        self._layer_losses: LayerLosses | None = None

    @property
    def model_top_k(self) -> int:
        """The model's own experts per token."""
        return self._routers.model_top_k

    @property
    def num_tokens(self) -> int:
        """Number of tokens that a search reads."""
        return sum(len(document.ids) for document in self.text.documents)

    def find(self, goals: Sequence[Goal], known: Sequence[Mapping[str, Any]] = ()) -> list[Setting]:
        """Find a setting for every goal, in order.

        Args:
            goals: variants and budgets.
            known: settings, as returned by `to_documents` of this search or another; matching ones
                aren't searched again.
        Raises:
            InputError: a variant can't run on this model, or a budget is out of range.
            CalibrationError: a variant can't run with this calibration at any parameter value.
        """
        if self.text.decode_batch is None:
            check_budgets([goal.budget for goal in goals], self._routers.model_top_k)
        else:
            check_fractions([goal.budget for goal in goals])
        # Losses by layer are measured without tables, as for a rule that reads none.
        self._layer_losses = self._layer_losses or LayerLosses.recall(known, self._key(None))
        found = recall_settings(goals, known, self.key_of, self._at)
        open_goals = {g.config_name: g for g in goals if g.config_name not in found}
        found |= self._search(open_goals)
        return [found[goal.config_name] for goal in goals]

    def estimate(self, goal: Goal) -> Rule:
        """Find a variant's rule on captured proposals alone, without running it.

        Dropped experts change later proposals, so the rule's own mean differs by a few percent.

        Raises:
            InputError, CalibrationError: as in `find`.
        """
        check_budgets([goal.budget], self._routers.model_top_k)
        return self._at(goal.variant, self._value(goal.variant, goal.budget))

    def to_documents(self, settings: Iterable[Setting]) -> list[dict[str, Any]]:
        """Return plain data for `find`'s `known`, with the layer losses of allocated budgets."""
        losses = self._layer_losses
        kept = {} if losses is None else {"layer_losses": losses.to_document()}
        return [
            setting.to_document(self.key_of(setting.goal.variant))
            | (kept if _is_shared_out(setting.goal.variant) else {})
            for setting in settings
        ]

    def key_of(self, variant: Variant) -> str:
        """Identify everything that a setting depends on, except its goal."""
        return self._key(variant.anywhere().required_null)

    def _key(self, null: str | None) -> str:
        tables = self._calibration.table_fingerprints if self._calibration is not None else {}
        return digest([*self._searched, tables.get(null or "")])

    @cached_property
    def own_reads(self) -> float:
        """Mean distinct experts that the model's own top-k reads in a step of the text."""
        return self._mean_of_proposals(TopK(k=self._routers.model_top_k))

    def cost(self, rule: Rule) -> float:
        """Return a rule's cost on the captured proposals, in the unit of a budget."""
        mean = self._mean_of_proposals(rule)
        return mean if self.text.decode_batch is None else mean / self.own_reads

    def _mean_of_proposals(self, rule: Rule) -> float:
        if self.text.decode_batch is not None and isinstance(rule, StepRule):
            rule = replace(rule, refill=None)  # reads the same experts
        if rule not in self._means:
            key = (rule.num_candidates(self._routers.model_top_k), rule.needs_output_norms)
            if key not in self._proposals:
                self._proposals[key] = capture_proposals(
                    self._model,
                    self._tokenizer,
                    self.text.documents,
                    window=self.text.window,
                    num_candidates=key[0],
                    with_norms=key[1],
                    decode_batch=self.text.decode_batch,
                )
            mean = mean_experts if self.text.decode_batch is None else mean_distinct_experts
            self._means[rule] = mean(rule, self._proposals[key], self._routers, self._calibration)
        return self._means[rule]

    def _search(self, goals: Mapping[str, Goal]) -> dict[str, Setting]:
        targets = {name: goal.budget for name, goal in goals.items()}
        values = {
            name: self._value(goal.variant, goal.budget)
            for name, goal in tqdm(goals.items(), desc="search", unit="rule", disable=not goals)
        }
        best: dict[str, Setting] = {}
        for corrections in range(MAX_CORRECTIONS + 1):
            if not values:
                break
            again = {}
            for name, setting in self._run(goals, values, corrections).items():
                if name not in best or _miss(setting) < _miss(best[name]):
                    best[name] = setting
                if _miss(setting) > CLOSE_ENOUGH:
                    targets[name] += setting.goal.budget - setting.cost
                    value = self._value(setting.goal.variant, targets[name])
                    if value != setting.knob:
                        again[name] = value
            values = again
        return best

    def _at(self, variant: Variant, value: float) -> Rule:
        if not _is_shared_out(variant):
            return variant.at(value, len(self._routers.sites))
        shared = self._measured_layer_losses().share_out(value)
        return make_rule({**variant.config, "k": shared.k})

    def _measured_layer_losses(self) -> LayerLosses:
        if self._layer_losses is None:
            text = prepare_text(
                self._tokenizer,
                self._facts,
                self._documents,
                max_tokens=min(LAYER_TOKENS, self.num_tokens),
            )
            self._layer_losses = measure_layer_losses(self._model, self._tokenizer, text)
        return self._layer_losses

    def _value(self, variant: Variant, target: float) -> float:
        """Find the admissible value whose mean on the proposals is closest to the target."""
        value_at = variant.knob.scale.value_at
        if variant.name not in self._ends:
            self._ends[variant.name] = self._start(variant), self._end(variant)
        low, high = self._ends[variant.name]
        missed: dict[float, float] = {}

        def excess(place: float) -> float:
            mean = self.cost(self._at(variant, value_at(place)))
            missed[place] = abs(mean - target)
            return 0.0 if missed[place] <= _HIT * target else mean - target

        if excess(low) * excess(high) < 0:
            brentq(excess, low, high, xtol=_STEP, maxiter=60, disp=False)
        return value_at(min(missed, key=missed.__getitem__))

    def _start(self, variant: Variant) -> float:
        """Find the lowest position on the scale that the calibration can resolve.

        Only levels have such a limit, and a larger level never needs more resolution.
        """
        low, high = variant.knob.scale.ends(self._routers.model_top_k)[0], self._end(variant)
        value_at = variant.knob.scale.value_at
        bind_rule(self._model, self._at(variant, value_at(high)), self._calibration)
        if self._is_admissible(self._at(variant, value_at(low))):
            return low
        return _edge(lambda p: self._is_admissible(self._at(variant, value_at(p))), high, low)

    def _end(self, variant: Variant) -> float:
        """Find the highest position on the scale that the model allows: it has so many experts."""
        low, high = variant.knob.scale.ends(self._routers.model_top_k)
        value_at = variant.knob.scale.value_at

        def fits(place: float) -> bool:
            try:
                check_rule(self._routers, self._at(variant, value_at(place)))
            except InputError:
                return False
            return True

        return high if fits(high) or not fits(low) else _edge(fits, low, high)

    def _is_admissible(self, rule: Rule) -> bool:
        try:
            check_calibration(self._model, self._routers, rule, self._calibration)
        except CalibrationError:
            return False
        return True

    def _run(
        self, goals: Mapping[str, Goal], values: Mapping[str, float], corrections: int
    ) -> dict[str, Setting]:
        """Score the rules at these values, together with one pass of the model's own top-k."""
        rules = {name: self._at(goals[name].variant, value) for name, value in values.items()}
        once: dict[Rule, str] = {}  # whole numbers meet several budgets
        for name, rule in rules.items():
            once.setdefault(rule, name)
        records: dict[str, list[QualityRecord]] = defaultdict(list)
        title = f"correction {corrections}" if corrections else "measure"
        total = self.num_tokens * len(once)
        model, tokenizer, text = self._model, self._tokenizer, self.text
        records_of = partial(
            score,
            *(model, tokenizer, text.documents, {n: r for r, n in once.items()}, self._calibration),
            batch_size=text.batch_size,
            decode_batch=text.decode_batch,
        )
        with tqdm(total=total, unit="token", desc=title, unit_scale=True) as bar:
            for record in records_of(window=text.window, stride=text.stride):
                records[record.config_name].append(record)
                bar.update(record.tokens)
        return {
            name: self._setting(
                goals[name], rules[name], value, records[once[rules[name]]], corrections
            )
            for name, value in values.items()
        }

    def _setting(
        self,
        goal: Goal,
        rule: Rule,
        value: float,
        records: Sequence[QualityRecord],
        corrections: int,
    ) -> Setting:
        units = sum(r.units for r in records)
        mean = cost = sum(r.experts_sum for r in records) / units
        unit = "experts"
        if self.text.decode_batch is not None:
            cost = sum(r.distinct_experts_sum or 0 for r in records) / units / self.own_reads
            unit = "of the distinct experts"
        rise = sum(r.nll_sum - r.top_k_nll_sum for r in records) / sum(r.tokens for r in records)
        unreachable = None
        # Whole numbers miss a step's distinct experts: they are compared at what they read.
        is_exact = self.text.decode_batch is None or not isinstance(value, int)
        if is_exact and abs(cost / goal.budget - 1) > TOLERANCE:
            unreachable = (
                f"{goal.budget:g} {unit} can't be reached within {TOLERANCE:.0%}: the closest mean "
                f"on calibration text is {cost:.2f}, at {goal.variant.knob.name} {value:.4g}"
            )
        return Setting(
            goal=goal,
            rule=rule,
            knob=value,
            mean_experts=mean,
            cost=cost,
            delta_nll=rise,
            corrections=corrections,
            unreachable=unreachable,
        )


def _edge(holds: Callable[[float], bool], inside: float, outside: float) -> float:
    """Return the position next to `outside` at which a condition still holds, by bisection."""
    while abs(outside - inside) > _STEP:
        middle = (inside + outside) / 2
        if holds(middle):
            inside = middle
        else:
            outside = middle
    return inside


def check_budgets(budgets: Sequence[float], model_top_k: int) -> None:
    """Raise InputError unless each budget is a mean from 1 to the model's own k."""
    for budget in budgets:
        if not 1 <= budget <= model_top_k:
            raise InputError(
                f"a budget must be from 1 to the model's own {model_top_k} experts a token, got "
                f"{budget:g}"
            )


def check_fractions(budgets: Sequence[float]) -> None:
    """Raise InputError unless each budget is a fraction of the model's own top-k's reads."""
    for budget in budgets:
        if not 0 < budget <= 1:
            raise InputError(
                "a budget of distinct experts must be a fraction, in (0, 1], of those that the "
                f"model's own top-k reads, got {budget:g}; such as 0.75"
            )


def _is_shared_out(variant: Variant) -> bool:
    return variant.method == PerLayerTopK.method


def _miss(setting: Setting) -> float:
    return abs(setting.cost / setting.goal.budget - 1)
