"""Establish by experiment how a router scores, selects and weights experts, or reject it.

The router is called on random hidden states with one change at a time: more slots, other hidden
states, another value for each tensor with one number per expert. The facts follow from the changes
in its weights and selection, never from names. The probe has no side effects: no hook fires, no
parameter is written, and the random state is restored.

Axes: T tokens, E experts, K slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from bh_routing.errors import ModelError
from bh_routing.models.capture import CapturedCall
from bh_routing.models.families import Family
from bh_routing.models.sites import TRANSFORMS, Attribute, Groups, Routed, RouterFacts, Scoring

_SPREAD: Final = 2.0
"""Standard deviation of the probe's logits: distinct, but not saturated."""
_TOLERANCE: Final = {torch.float32: 2e-4, torch.float64: 2e-4, torch.float16: 1e-2}
_COARSE: Final = 1.5e-2  # for bfloat16, whose steps are 0.4 percent
_MARGIN: Final = 3.0  # minimum error of every other explanation, in tolerances
_ERRORS: Final = (
    RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError, AssertionError,
    StrictDataclassError,
)  # fmt: skip
"""Errors that a router may raise on an unsupported top-k."""
_GROUP_NAMES: Final = ("num_group", "n_group", "num_groups", "n_groups")

Changes = Mapping[Attribute, Tensor]


class _Bench:
    """A router with its captured arguments, for repeated calls with changes."""

    def __init__(self, heard: CapturedCall) -> None:
        self.heard = heard
        self.place = heard.place
        hidden = heard.arguments[0]
        generator = torch.Generator().manual_seed(0)
        self._noise = [
            torch.randn(hidden.shape, generator=generator).to(hidden.device) for _ in range(3)
        ]
        self._dtype = hidden.dtype
        self._gain = 1.0
        spread = float(self.call().logits_TE.float().std(-1, correction=0).mean())
        if not spread > 0:
            raise ModelError(f"{self.place.name} gives every expert the same logit")
        self._gain = _SPREAD / spread

    def call(self, noise: int = 0, changes: Changes | None = None) -> Routed:
        """Route one of three sets of random hidden states, with some tensors replaced."""
        changes = changes or {}
        by_identity = {id(held.get()): value for held, value in changes.items()}
        hidden = (self._noise[noise] * self._gain).to(self._dtype)
        rest = [by_identity.get(id(value), value) for value in self.heard.arguments[1:]]
        keywords = {
            name: by_identity.get(id(value), value) for name, value in self.heard.keywords.items()
        }
        with _exchanged(changes):
            output = self.place.module.forward(hidden, *rest, **keywords)
            if self.place.order is None:
                return self.place.decide(hidden, output)
        return self.place.order.unpack(output)

    @contextmanager
    def with_top_k(self, widener: Attribute, top_k: int) -> Iterator[None]:
        before = widener.get()
        setattr(widener.owner, widener.name, top_k)
        try:
            yield
        finally:
            setattr(widener.owner, widener.name, before)


def establish(heard: CapturedCall, family: Family) -> RouterFacts:
    """Establish all facts about one router.

    Raises:
        ModelError: a fact can't be established; the message names it.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return _establish(_Bench(heard), family)


def _establish(bench: _Bench, family: Family) -> RouterFacts:
    routed = bench.call()
    num_experts, top_k = routed.logits_TE.shape[1], routed.index_TK.shape[1]
    widener = _find_widener(bench, top_k, num_experts)
    if top_k < num_experts:
        return _establish_at(bench, family, widener)
    if widener is None:
        raise ModelError(
            f"{bench.place.name} selects all {num_experts} experts and can't be asked for fewer"
        )
    # A selection of all experts reveals neither a bias nor normalisation.
    with bench.with_top_k(widener, top_k - 1):
        return replace(_establish_at(bench, family, widener), top_k=top_k)


def _establish_at(bench: _Bench, family: Family, widener: Attribute | None) -> RouterFacts:
    """Establish all facts about a router that selects fewer experts than it has."""
    routed = bench.call()
    num_experts, top_k = routed.logits_TE.shape[1], routed.index_TK.shape[1]
    roles = _roles(bench, num_experts)
    bias, gain = roles.get("bias"), roles.get("gain")
    law = _law(bench, family, widener, gain)
    by_token = _is_by_token(bench, bias)
    facts = RouterFacts(
        num_experts=num_experts,
        top_k=top_k,
        scoring=law.scoring,
        normalises=law.normalises,
        scale=law.scale,
        ranks_by="logits",
        bias=bias,
        has_gains=gain is not None,
        shares_with=law.shares_with,
        by_token=by_token,
        skips=family.skips,
        is_sorted=bool((routed.weights_TK.diff(dim=-1) <= 0).all()),
        experts_see_input=bench.heard.experts_see_input,
    )
    if not by_token:
        facts = _selection(bench, facts, widener)
    return _widening(facts, law, widener)


def _find_widener(bench: _Bench, top_k: int, num_experts: int) -> Attribute | None:
    """Find the attribute that is the router's top-k: changing it by 1 changes the slots by 1."""
    other = top_k + 1 if top_k < num_experts else top_k - 1
    place = bench.place
    owners = [*place.module.modules(), place.block]  # in PEFT's wrapper the router is a submodule
    config = getattr(place.module, "config", None)
    for owner in (*owners, *([] if config is None else [config])):
        for name, value in list(vars(owner).items()):
            if type(value) is not int or value != top_k or name.startswith("_"):
                continue
            widener = Attribute(owner, name)
            try:
                with bench.with_top_k(widener, other):
                    slots = bench.call().index_TK.shape[1]
            except _ERRORS:
                continue
            if slots == other:
                return widener
    return None


def _roles(bench: _Bench, num_experts: int) -> dict[str, Attribute]:
    """Change each tensor with one number per expert to establish its role: bias or gain."""
    place = bench.place
    owners: list[nn.Module] = [*place.module.modules(), place.block]
    base = bench.call()
    generator = torch.Generator().manual_seed(1)
    found: dict[str, Attribute] = {}
    for owner in dict.fromkeys(owners):
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is None or tensor.numel() != num_experts or not tensor.is_floating_point():
                continue
            attribute = Attribute(owner, name)
            noise = torch.rand(tensor.shape, generator=generator) + 0.5
            changed = bench.call(changes={attribute: noise.to(tensor)})
            if not torch.equal(changed.logits_TE, base.logits_TE):
                continue  # part of the logits, which the router returns
            if not torch.equal(_as_set(changed.index_TK), _as_set(base.index_TK)):
                role = "bias"
            elif not torch.equal(changed.weights_TK, base.weights_TK):
                role = "gain"
            else:
                continue
            if role in found:
                raise ModelError(f"{place.name} has two tensors that act as a {role} of experts")
            found[role] = attribute
    return found


class _Law(NamedTuple):
    """A router's weights as a function of its logits."""

    scoring: Scoring
    normalises: bool
    scale: float | None
    shares_with: int = 0
    scale_depends_on_top_k: bool = False


def _law(bench: _Bench, family: Family, widener: Attribute | None, gain: Attribute | None) -> _Law:
    if family.scoring is not None:
        return _Law(family.scoring, bool(family.normalises), None)
    narrow = bench.call()
    if widener is None:
        return _fit_law(bench, narrow, gain)
    top_k, num_experts = narrow.index_TK.shape[1], narrow.logits_TE.shape[1]
    with bench.with_top_k(widener, max(2, min(top_k + 1, num_experts - 1))):
        wide = _fit_law(bench, bench.call(), gain)
    if top_k == 1:
        # One slot doesn't identify the law, and the weights of all experts under softmax sum to 1.
        if num_experts == 2:
            wide = wide._replace(normalises=_is_constant(narrow.weights_TK, _tolerance(narrow)))
        return wide
    law = _fit_law(bench, narrow, gain)
    if (law.scoring, law.normalises) != (wide.scoring, wide.normalises):
        raise ModelError(f"{bench.place.name} weighs more slots by another law than its own")
    if law.scale is None or wide.scale is None:
        return law
    is_same = abs(law.scale - wide.scale) <= _COARSE * abs(law.scale)
    return law._replace(scale_depends_on_top_k=not is_same)


def _fit_law(bench: _Bench, routed: Routed, gain: Attribute | None) -> _Law:
    """Find the only function of the logits to which each token's weights are proportional."""
    logits_TE, weights_TK = routed.logits_TE.double(), routed.weights_TK.double()
    tolerance = _tolerance(routed)
    if gain is not None:
        weights_TK = weights_TK / gain.get().double().view(-1)[routed.index_TK]
    is_simplex = bool((logits_TE >= 0).all()) and _is_constant(logits_TE.sum(-1), tolerance)
    ratios: dict[Scoring, Tensor] = {}
    for scoring, transform in TRANSFORMS.items():
        if (scoring == "probabilities") != is_simplex:
            continue
        ratios[scoring] = weights_TK / transform(logits_TE).gather(-1, routed.index_TK)
    errors = {
        scoring: float(ratio_TK.log().std(-1, correction=0).nan_to_num(9.0).max())
        for scoring, ratio_TK in ratios.items()
    }
    fitting = [scoring for scoring, error in errors.items() if error < tolerance]
    near = [scoring for scoring, error in errors.items() if error < tolerance * _MARGIN]
    if weights_TK.shape[1] == 1:
        near = fitting = [s for s in near if _is_constant(ratios[s].flatten(), tolerance)] or near
    if len(near) != 1 or not fitting:
        raise ModelError(
            f"{bench.place.name} doesn't turn logits into weights by one of {', '.join(TRANSFORMS)}"
        )
    ratio_T = ratios[near[0]].mean(-1)
    sums_T = weights_TK.sum(-1)
    shared = _shared_weights(routed)
    scale = None if gain is not None else float
    if _is_constant(sums_T, tolerance):
        return _Law(near[0], True, scale and scale(sums_T.mean()))
    if _is_constant(ratio_T, tolerance):
        return _Law(near[0], False, scale and scale(ratio_T.mean()))
    if shared is not None and _is_constant(sums_T + shared.double().sum(-1), tolerance):
        total_T = sums_T + shared.double().sum(-1)
        return _Law(near[0], True, float(total_T.mean()), shared.shape[1])
    raise ModelError(f"the weights of {bench.place.name} are scaled by something unknown")


def _shared_weights(routed: Routed) -> Tensor | None:
    first = routed.rest[0] if routed.rest else None
    is_like_weights = (
        isinstance(first, Tensor)
        and first.ndim == 2
        and first.shape[0] == routed.weights_TK.shape[0]
        and first.is_floating_point()
    )
    return first if is_like_weights else None


def _is_by_token(bench: _Bench, bias: Attribute | None) -> bool:
    """Whether the selection is independent of the hidden states, even without a bias."""
    changes = {} if bias is None else {bias: torch.zeros_like(bias.get())}
    first, *others = (_as_set(bench.call(noise, changes).index_TK) for noise in range(3))
    return all(torch.equal(first, other) for other in others)


def _selection(bench: _Bench, facts: RouterFacts, widener: Attribute | None) -> RouterFacts:
    """Establish the scores that the selection compares, and the experts it considers."""
    groups = _declared_groups(bench, facts.num_experts)
    tries: list[RouterFacts] = []
    for ranks_by in ("logits", "scores") if facts.bias else ("logits",):
        for limited in (None, groups) if groups else (None,):
            tries.append(replace(facts, ranks_by=ranks_by, groups=limited))
    for trial in tries:
        if all(_explains(bench, trial, widener, seed) for seed in range(3)):
            return trial
    raise ModelError(
        f"{bench.place.name} selects experts that aren't the best by its logits, weights or groups"
    )


def _explains(bench: _Bench, facts: RouterFacts, widener: Attribute | None, seed: int) -> bool:
    """Whether `facts` rank every chosen expert above the others in the chosen groups."""
    changes: dict[Attribute, Tensor] = {}
    if facts.bias is not None:
        generator = torch.Generator().manual_seed(seed + 10)
        bias = facts.bias.get()
        noise = torch.rand(bias.shape, generator=generator) * (0.1, 0.5, 2.0)[seed]
        changes = {facts.bias: noise.to(bias)}
    if widener is None:
        return _is_best(bench.call(seed, changes), facts, changes)
    widest = _widest(facts)
    for slots in {facts.top_k, min(facts.top_k + 1, widest), widest}:
        with bench.with_top_k(widener, slots):
            if not _is_best(bench.call(seed, changes), facts, changes):
                return False
    return True


def _widest(facts: RouterFacts) -> int:
    if facts.groups is None:
        return facts.num_experts
    return facts.groups.num_chosen * (facts.num_experts // facts.groups.num_groups)


def _is_best(routed: Routed, facts: RouterFacts, changes: Changes) -> bool:
    index_TK = routed.index_TK
    if facts.skips:
        index_TK = index_TK.masked_fill(routed.weights_TK == 0, facts.num_experts - 1)
    with _exchanged(changes):
        scores_TE = facts.scores(routed.logits_TE)
    chosen_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(1, index_TK, True)
    open_TE = torch.ones_like(chosen_TE)
    if facts.groups is not None:
        shape = (len(chosen_TE), facts.groups.num_groups, -1)
        open_TG = chosen_TE.view(shape).any(-1)
        if bool((open_TG.sum(-1) > facts.groups.num_chosen).any()):
            return False
        open_TE = open_TG[..., None].expand(chosen_TE.view(shape).shape).reshape(chosen_TE.shape)
    worst_T = scores_TE.masked_fill(~chosen_TE, float("inf")).amin(-1)
    best_left_T = scores_TE.masked_fill(chosen_TE | ~open_TE, float("-inf")).amax(-1)
    slack = 1e-5 if routed.logits_TE.dtype == torch.float32 else _COARSE
    is_distinct = int(chosen_TE.sum()) == index_TK.numel()
    return is_distinct and bool((worst_T >= best_left_T - slack).all())


def _declared_groups(bench: _Bench, num_experts: int) -> Groups | None:
    for owner in (bench.place.module, bench.place.block):
        chosen = getattr(owner, "topk_group", None)
        for name in _GROUP_NAMES:
            count = getattr(owner, name, None)
            if not isinstance(count, int) or not isinstance(chosen, int):
                continue
            if count > chosen > 0 and num_experts % count == 0:
                return Groups(count, chosen)
    return None


def _widening(facts: RouterFacts, law: _Law, widener: Attribute | None) -> RouterFacts:
    reason = ""
    if facts.by_token:
        reason = "it looks experts up by token id"
    elif widener is None:
        reason = "no number of it sets how many experts it selects"
    elif law.scale_depends_on_top_k:
        reason = "the sum of its weights depends on how many experts it selects"
    if reason:
        return replace(facts, why_not_wider=reason, most_slots=facts.top_k)
    return replace(facts, widener=widener, most_slots=_widest(facts))


@contextmanager
def _exchanged(changes: Changes) -> Iterator[None]:
    """Replace tensors of modules inside the block, and restore the same objects after it."""
    places = []
    for (owner, name), value in changes.items():
        held: dict[str, Any] = owner._parameters if name in owner._parameters else owner._buffers
        places.append((held, name, held[name]))
        held[name] = (
            nn.Parameter(value, requires_grad=False) if held is owner._parameters else value
        )
    try:
        yield
    finally:
        for held, name, original in places:
            held[name] = original


def _as_set(index_TK: Tensor) -> Tensor:
    return index_TK.sort(dim=-1).values


def _is_constant(values: Tensor, tolerance: float) -> bool:
    return bool((values - values.mean()).abs().max() <= tolerance * values.abs().mean())


def _tolerance(routed: Routed) -> float:
    kinds = (routed.logits_TE.dtype, routed.weights_TK.dtype)
    return max(_TOLERANCE.get(kind, _COARSE) for kind in kinds)
