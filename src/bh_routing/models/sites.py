"""One router of a model: its facts, and the hook through which its proposal can be changed.

Two interfaces cover all families. Usually the router module returns (logits, weights, index,
*rest), the first three in any order. Otherwise it returns only logits, and its block's
`route_tokens_to_experts` turns them into weights and index (dbrx, and more in older transformers).

Axes: T tokens, E experts, K candidate slots, S shared experts, H hidden.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bh_routing.errors import ModelError

Scoring = Literal["softmax", "sigmoid", "sqrt_softplus", "probabilities", "sparsemixer"]

TRANSFORMS: Final[Mapping[Scoring, Callable[[Tensor], Tensor]]] = {
    "softmax": lambda logits_TE: logits_TE.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrt_softplus": lambda logits_TE: nn.functional.softplus(logits_TE).sqrt(),
    "probabilities": lambda logits_TE: logits_TE,
}
"""Functions from logits to weights, before any normalisation."""

BLOCK_METHOD: Final = "route_tokens_to_experts"


class Attribute(NamedTuple):
    """A tensor or number, identified by its owner and attribute name."""

    owner: Any
    name: str

    def get(self) -> Any:
        """Return the current value: a bias may have been trained or moved since the probe."""
        return getattr(self.owner, self.name)


class Groups(NamedTuple):
    """Groups of a router that selects groups first, then experts from those groups only."""

    num_groups: int
    num_chosen: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterFacts:
    """Facts that the probe established about one router."""

    num_experts: int
    """Width of the logits, including classes that compute nothing."""
    top_k: int
    scoring: Scoring
    normalises: bool
    """Whether the weights of a token sum to a constant."""
    scale: float | None
    """That constant, or the factor of raw weights; None where a gain makes it vary."""
    ranks_by: Literal["logits", "scores"]
    """Quantity that the selection compares, before `bias` is added."""
    bias: Attribute | None = None
    """Added for selection only."""
    has_gains: bool = False
    """Whether each expert's weight is multiplied by a gain per expert."""
    shares_with: int = 0
    """Shared experts whose weights are part of the normalised sum."""
    groups: Groups | None = None
    by_token: bool = False
    """Whether experts are looked up by token id, independently of the logits."""
    skips: bool = False
    """Whether the last class of the logits is no expert."""
    is_sorted: bool = False
    """Whether the probe saw the slots in descending order of weight."""
    widener: Attribute | None = None
    """Attribute that sets the number of slots; None if there is none."""
    why_not_wider: str = ""
    most_slots: int = 0
    """Largest number of slots that the router supports."""
    experts_see_input: bool = True
    """Whether the experts' input is the router's input."""

    @property
    def takes_temperature(self) -> bool:
        """Whether a temperature is defined: softmax weights and selection by the logits alone."""
        is_softmax = self.scoring in ("softmax", "probabilities")
        return is_softmax and not (self.bias or self.has_gains or self.shares_with or self.groups)

    @property
    def is_plain_softmax(self) -> bool:
        """Whether the router is a softmax followed by the k largest weights, and nothing else."""
        more = self.bias or self.groups or self.has_gains or self.shares_with or self.by_token
        is_scaled = self.scale is None or abs(self.scale - 1.0) > 1e-3
        return self.scoring == "softmax" and not (more or self.skips or is_scaled)

    def scores(self, logits_TE: Tensor) -> Tensor:
        """Return the scores that the router ranks experts by, float32, shape (T, E)."""
        logits_TE = logits_TE.float()
        if self.scoring == "probabilities" and self.bias is None:
            # Logits up to a constant, which doesn't affect any score computed from them.
            return logits_TE.clamp_min(torch.finfo(torch.float32).tiny).log()
        if self.ranks_by == "scores":
            logits_TE = TRANSFORMS[self.scoring](logits_TE)
        return logits_TE if self.bias is None else logits_TE + self.bias.get().float().view(-1)


class Proposal(NamedTuple):
    """A router's proposal for T tokens."""

    hidden_TH: Tensor
    """The router's input."""
    scores_TE: Tensor
    """Scores that the family ranks experts by, float32."""
    top_k_index_TK: Tensor
    top_k_weights_TK: Tensor
    """In the family's dtype."""
    masses_TK: Tensor
    """Summands of the family's normalisation: the weights before any gain."""
    shared_weights_TS: Tensor | None
    """Weights of shared experts that were normalised together with the slots'."""


class Decision(NamedTuple):
    """Slots passed to the experts instead of the proposal."""

    top_k_index_TK: Tensor
    top_k_weights_TK: Tensor
    shared_weights_TS: Tensor | None


Callback = Callable[[Proposal], Decision | None]
Undo = Callable[[], None]


class Routed(NamedTuple):
    """A router's output, in our order."""

    logits_TE: Tensor
    weights_TK: Tensor
    index_TK: Tensor
    rest: tuple[Any, ...] = ()


class Order(NamedTuple):
    """Positions of the parts in a router's output."""

    logits_at: int
    weights_at: int
    index_at: int

    @classmethod
    def of(cls, output: Any) -> Order | None:
        """Infer the order from dtypes and shapes; None if this isn't a router's output."""
        if not isinstance(output, tuple) or len(output) < 3:
            return None
        parts = output[:3]
        if not all(isinstance(part, Tensor) and part.ndim == 2 for part in parts):
            return None
        integers = [i for i, part in enumerate(parts) if part.dtype in (torch.int64, torch.int32)]
        if len(integers) != 1 or len({part.shape[0] for part in parts}) != 1:
            return None
        index = integers[0]
        # If the router proposes all experts, shapes are equal; the usual order has logits first.
        first, second = (i for i in range(3) if i != index)
        logits, weights = (
            (first, second) if parts[second].shape == parts[index].shape else (second, first)
        )
        fits = parts[weights].shape == parts[index].shape
        is_wide = parts[logits].shape[1] >= parts[index].shape[1]
        return cls(logits, weights, index) if fits and is_wide else None

    def unpack(self, output: tuple[Any, ...]) -> Routed:
        """Reorder a router's output into our order."""
        return Routed(
            output[self.logits_at], output[self.weights_at], output[self.index_at], output[3:]
        )

    def pack(self, routed: Routed) -> tuple[Any, ...]:
        """Reorder an output into the router's order."""
        parts = dict(zip(self, routed[:3], strict=True))
        return (parts[0], parts[1], parts[2], *routed.rest)


@dataclass(frozen=True, eq=False)
class RouterPlace:
    """A router's modules in a model, before it is probed."""

    name: str
    module: nn.Module
    block: nn.Module
    """Holds the router and the experts."""
    experts: nn.Module
    order: Order | None
    """None where the block's own method turns logits into weights and index."""

    def decide(self, hidden: Tensor, logits_TE: Tensor) -> Routed:
        """Run the block's own method on logits, bypassing any installed hook."""
        method = getattr(type(self.block), BLOCK_METHOD).__get__(self.block)
        arguments = (hidden, logits_TE)[-len(inspect.signature(method).parameters) :]
        return as_routed(logits_TE, method(*arguments))


class RoutingHook:
    """A hook bound to one model, which must not be copied with it."""

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
    """Index among the layers with a router, in execution order, from 0."""
    facts: RouterFacts

    def watch(self, callback: Callback) -> Undo:
        """Call `callback` on every proposal, and pass its decision, if any, to the experts.

        Returns:
            A function that removes the hook.
        """
        if (order := self.order) is None:
            return self._watch_block(callback)

        def hook(_: nn.Module, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> Any:
            decided = self._ask(callback, inputs[0], order.unpack(output))
            return None if decided is None else order.pack(decided)

        return self.module.register_forward_hook(RoutingHook(hook)).remove

    def linear_gate(self) -> Tensor | None:
        """Return the weight (E, H) if logits are linear in the input up to a bias, else None."""
        # Not getattr: PEFT's wrappers return the base weight, without the adapter.
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
            # The family sets expert 0 with weight 0 where a token chose no expert.
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
    """Reorder a block's weights and index, returned in either order, into our order."""
    first, second = pair
    weights_TK, index_TK = (first, second) if first.is_floating_point() else (second, first)
    return Routed(logits_TE, weights_TK, index_TK)


def fingerprint_routers(gates: Iterable[tuple[Tensor, Tensor | None]]) -> str:
    """Hash the routers' weights, rounded to bfloat16: SHA-256 in hex.

    It is the same for any dtype and device that the weights are loaded in, and in any program. It
    doesn't distinguish checkpoints that differ in other weights only.

    Args:
        gates: weight (E, H) and bias (E,) of each layer's router, in order.
    """
    digest = hashlib.sha256()
    for gate in gates:
        for tensor in gate:
            if tensor is None:
                digest.update(b"none")
                continue
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            rounded = whole.detach().to(torch.bfloat16).cpu().contiguous()
            digest.update(f"{tuple(rounded.shape)}".encode())
            digest.update(rounded.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
