"""One router of a model: what is known of it, and the one place where its proposal can be changed.

Two shapes cover every family. In the usual one the router module itself returns (logits, weights,
index, *rest), the three in some order; in the other it returns logits only and its block's
`route_tokens_to_experts` turns them into weights and index (dbrx, and more in older transformers).

Axes: T tokens, E experts, K candidate slots, S shared experts, H hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor, nn

from bh_routing.errors import ModelError

Scoring = Literal["softmax", "sigmoid", "sqrt_softplus", "probabilities", "sparsemixer"]

TRANSFORMS: Final[Mapping[Scoring, Callable[[Tensor], Tensor]]] = {
    "softmax": lambda logits_TE: logits_TE.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrt_softplus": lambda logits_TE: nn.functional.softplus(logits_TE).sqrt(),
    "probabilities": lambda logits_TE: logits_TE,
}
"""From what a router returns in its first place to a weight, before any normalisation."""

BLOCK_METHOD: Final = "route_tokens_to_experts"


class Held(NamedTuple):
    """A tensor or a number by the module and the name under which it is held."""

    owner: Any
    name: str

    def get(self) -> Any:
        """Return its value of now: a bias may have been trained, or moved, since it was found."""
        return getattr(self.owner, self.name)


class Groups(NamedTuple):
    """A router that picks groups first, then experts from those groups only."""

    num_groups: int
    num_chosen: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterFacts:
    """What the probe established about one router."""

    num_experts: int
    """Width of its logits; classes that compute nothing are counted."""
    top_k: int
    scoring: Scoring
    normalises: bool
    """Whether the weights of a token sum to a constant."""
    scale: float | None
    """That constant, or the factor of raw weights; None where a gain makes it vary."""
    ranks_by: Literal["logits", "scores"]
    """What the selection compares, before `bias` is added."""
    bias: Held | None = None
    """Added for selection only."""
    has_gains: bool = False
    """Whether each expert's weight is multiplied by a number of its own."""
    shares_with: int = 0
    """Shared experts whose weights are part of the sum that is normalised."""
    groups: Groups | None = None
    by_token: bool = False
    """Whether experts are looked up by token id, whatever the logits say."""
    skips: bool = False
    """Whether the last class of the logits is no expert."""
    is_sorted: bool = False
    """Whether the slots came in the order of their weights wherever the probe looked."""
    widener: Held | None = None
    """The number to set for more slots; None if that doesn't work."""
    why_not_wider: str = ""
    most_slots: int = 0
    """How many slots can be asked for."""
    experts_see_input: bool = True
    """Whether the experts are given what the router was given."""

    @property
    def takes_temperature(self) -> bool:
        """Whether logits / T gives exactly what the family itself would make of it."""
        is_softmax = self.scoring in ("softmax", "probabilities")
        return is_softmax and not (self.bias or self.has_gains or self.shares_with or self.groups)

    def scores(self, logits_TE: Tensor) -> Tensor:
        """Return what the router ranks experts by, float32, shape (T, E)."""
        logits_TE = logits_TE.float()
        if self.scoring == "probabilities" and self.bias is None:
            # As logits up to a constant, to which every score that we take of them is blind.
            return logits_TE.clamp_min(torch.finfo(torch.float32).tiny).log()
        if self.ranks_by == "scores":
            logits_TE = TRANSFORMS[self.scoring](logits_TE)
        return logits_TE if self.bias is None else logits_TE + self.bias.get().float().view(-1)


class Proposal(NamedTuple):
    """What a router proposes for T tokens."""

    hidden_TH: Tensor
    """The router's input."""
    scores_TE: Tensor
    """Float32: what the family ranks experts by."""
    top_k_index_TK: Tensor
    top_k_weights_TK: Tensor
    """In the family's dtype."""
    masses_TK: Tensor
    """What the family sums where it normalises: the weights, before any gain."""
    shared_weights_TS: Tensor | None
    """Weights of shared experts that were normalised together with the slots'."""


class Decision(NamedTuple):
    """What goes to the experts instead."""

    top_k_index_TK: Tensor
    top_k_weights_TK: Tensor
    shared_weights_TS: Tensor | None


Callback = Callable[[Proposal], Decision | None]
Undo = Callable[[], None]


class Routed(NamedTuple):
    """A router's answer, whatever the order in which it came."""

    logits_TE: Tensor
    weights_TK: Tensor
    index_TK: Tensor
    rest: tuple[Any, ...] = ()


class Order(NamedTuple):
    """Where in a router's answer each part stands."""

    logits_at: int
    weights_at: int
    index_at: int

    @classmethod
    def of(cls, output: Any) -> Order | None:
        """Read the order off dtypes and shapes; None if this is no router's answer."""
        if not isinstance(output, tuple) or len(output) < 3:
            return None
        parts = output[:3]
        if not all(isinstance(part, Tensor) and part.ndim == 2 for part in parts):
            return None
        integers = [i for i, part in enumerate(parts) if part.dtype in (torch.int64, torch.int32)]
        if len(integers) != 1 or len({part.shape[0] for part in parts}) != 1:
            return None
        index = integers[0]
        # The usual order, with logits first, wins where the router proposes every expert.
        first, second = (i for i in range(3) if i != index)
        logits, weights = (
            (first, second) if parts[second].shape == parts[index].shape else (second, first)
        )
        fits = parts[weights].shape == parts[index].shape
        is_wide = parts[logits].shape[1] >= parts[index].shape[1]
        return cls(logits, weights, index) if fits and is_wide else None

    def unpack(self, output: tuple[Any, ...]) -> Routed:
        """Bring a router's answer into our order."""
        return Routed(
            output[self.logits_at], output[self.weights_at], output[self.index_at], output[3:]
        )

    def pack(self, routed: Routed) -> tuple[Any, ...]:
        """Bring an answer back into the router's order."""
        parts = dict(zip(self, routed[:3], strict=True))
        return (parts[0], parts[1], parts[2], *routed.rest)


@dataclass(frozen=True, eq=False)
class RouterPlace:
    """Where a router stands in a model, before anything is known of it."""

    name: str
    module: nn.Module
    block: nn.Module
    """Holds the router and the experts."""
    experts: nn.Module
    order: Order | None
    """None where the block's own method turns logits into weights and index."""

    def decide(self, hidden: Tensor, logits_TE: Tensor) -> Routed:
        """Run the block's method on logits, past whatever is installed."""
        method = getattr(type(self.block), BLOCK_METHOD).__get__(self.block)
        arguments = (hidden, logits_TE)[-len(inspect.signature(method).parameters) :]
        return as_routed(logits_TE, method(*arguments))


class RoutingHook:
    """A hook that answers for one model: it must not be copied along with it."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = hook

    def __call__(self, *call: Any) -> Any:
        return self._hook(*call)

    def __reduce__(self) -> Any:
        raise ModelError(
            "a model can't be copied or pickled inside route(), the copy would stay routed; do it "
            "before the block or after it"
        )


@dataclass(frozen=True, eq=False)
class RouterSite(RouterPlace):
    """One mixture-of-experts layer's router."""

    layer: int
    """0 for the first layer that has a router, counting only such layers, in order of running."""
    facts: RouterFacts

    def watch(self, callback: Callback) -> Undo:
        """Call `callback` on every proposal; what it returns, if anything, goes to the experts.

        Returns:
            A function that takes the hook out again.
        """
        if (order := self.order) is None:
            return self._watch_block(callback)

        def hook(_: nn.Module, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> Any:
            decided = self._ask(callback, inputs[0], order.unpack(output))
            return None if decided is None else order.pack(decided)

        return self.module.register_forward_hook(RoutingHook(hook)).remove

    def linear_gate(self) -> Tensor | None:
        """Return the weight (E, H) that makes the logits, but for a bias; None if none does."""
        # Not by getattr: PEFT's wrappers answer with the weight that they add to.
        weight = self.module._parameters.get("weight")
        is_ranked_by_logits = self.facts.ranks_by == "logits" and self.facts.bias is None
        if not is_ranked_by_logits or self.facts.scoring == "probabilities":
            return None
        return weight

    def _watch_block(self, callback: Callback) -> Undo:
        before = vars(self.block).get(BLOCK_METHOD)
        original = getattr(self.block, BLOCK_METHOD)
        seen: list[Tensor] = [torch.empty(0)]

        def hook(_: nn.Module, inputs: tuple[Any, ...], __: Tensor) -> None:
            seen[0] = inputs[0]

        def method(*arguments: Tensor) -> tuple[Tensor, Tensor]:
            pair: tuple[Tensor, Tensor] = original(*arguments)
            decided = self._ask(callback, seen[0], as_routed(arguments[-1], pair))
            if decided is None:
                return pair
            _, weights_TK, index_TK, _ = decided
            has_weights_first = pair[0].is_floating_point()
            return (weights_TK, index_TK) if has_weights_first else (index_TK, weights_TK)

        handle = self.module.register_forward_hook(RoutingHook(hook))
        setattr(self.block, BLOCK_METHOD, method)

        def undo() -> None:
            handle.remove()
            if before is None:
                delattr(self.block, BLOCK_METHOD)
            else:
                setattr(self.block, BLOCK_METHOD, before)

        return undo

    def _ask(self, callback: Callback, hidden: Tensor, routed: Routed) -> Routed | None:
        facts, index_TK = self.facts, routed.index_TK
        if facts.skips:
            # The family itself writes expert 0 with weight 0 where the token chose no expert.
            index_TK = index_TK.masked_fill(routed.weights_TK == 0, facts.num_experts - 1)
        masses_TK = routed.weights_TK
        if facts.has_gains:
            masses_TE = TRANSFORMS[facts.scoring](routed.logits_TE.float())
            masses_TK = masses_TE.gather(-1, index_TK)
        proposal = Proposal(
            hidden_TH=hidden.reshape(-1, hidden.shape[-1]),
            scores_TE=facts.scores(routed.logits_TE),
            top_k_index_TK=index_TK,
            top_k_weights_TK=routed.weights_TK,
            masses_TK=masses_TK,
            shared_weights_TS=routed.rest[0] if facts.shares_with else None,
        )
        decision = callback(proposal)
        if decision is None:
            return None
        index_TK, weights_TK, shared_TS = decision
        if facts.skips:
            index_TK = index_TK.masked_fill(index_TK == facts.num_experts - 1, 0)
        rest = routed.rest if shared_TS is None else (shared_TS, *routed.rest[1:])
        return Routed(routed.logits_TE, weights_TK, index_TK, rest)


def as_routed(logits_TE: Tensor, pair: tuple[Tensor, Tensor]) -> Routed:
    """Bring a block's weights and index, in whichever order it returns them, into ours."""
    first, second = pair
    weights_TK, index_TK = (first, second) if first.is_floating_point() else (second, first)
    return Routed(logits_TE, weights_TK, index_TK)
