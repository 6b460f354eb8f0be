"""Greedy decoding without what `generate` does beside the model.

Prefill is transformers' own forward pass under `install`. Then each step writes one token a text:
keys and values have their place from the start, the router decides in one kernel, only kept experts
are read, and on CUDA the whole step is one graph.

Tokens are those of plain `generate` but for ties: sums are taken in another order, so two tokens or
two experts that are equal up to rounding may change places. Random-k draws by the logits' very
bits, so it draws other numbers of the same distribution.

Axes: B texts written side by side, S steps, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from bh_routing.engine.decode_session import Session
from bh_routing.engine.quickest import bind_quickest, is_plain_softmax
from bh_routing.kernels.decode_layout import UndecodableError, read_decoder
from bh_routing.kernels.experts import NAME, sparse_experts_forward
from bh_routing.kernels.router import fused_router
from bh_routing.kernels.router_sorted import sorted_router
from bh_routing.kernels.router_twin import Router, SoftmaxFamily, twin_router
from bh_routing.models.backends import experts_by
from bh_routing.models.discovery import find_routers
from bh_routing.models.routing import BoundRule, check_calibration, install
from bh_routing.models.trace import DROPPED, ExpertTrace
from bh_routing.nulls.calibration import Calibration
from bh_routing.rules.base import Rule
from bh_routing.rules.top_k import TopK

FEWEST_POSITIONS: Final = 256
MOST_POSITIONS: Final = 32_768
PROBED_TOKENS: Final = 8
LARGEST_ERROR: Final = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}
"""Root mean square of what logits may differ from the model's own, over theirs: rounding is below,
which may also exchange two experts that are about equal; another layout is far above."""


class Decoded(NamedTuple):
    """Texts that were continued."""

    token_SB: Tensor
    """int64, on the host; the first row comes out of the prefill."""
    trace: ExpertTrace
    prefill_sec: float
    """Until the first token was known."""
    decode_sec: float
    has_nan: bool
    """Whether a token was chosen from logits that hold NaN or infinity."""


class Engine:
    """One model's decoder, with a session for each rule, batch and length met so far.

    Args:
        model: a transformers model, not inside `route`.
    Raises:
        UndecodableError: it isn't laid out as `kernels.decode_layout` says, or computes something
            else; plain `generate` is what remains.
    """

    def __init__(self, model: Any) -> None:
        self.startup_sec = 0.0
        """Time spent on making sessions: compiling kernels, capturing graphs."""
        self._bound: dict[Any, BoundRule] = {}
        self._sessions: dict[Any, Session] = {}
        routers = find_routers(model)
        context = getattr(model.config, "max_position_embeddings", None) or MOST_POSITIONS
        blocks = [site.block for site in routers.sites]
        self.decoder = read_decoder(model, blocks, min(context, MOST_POSITIONS))
        self._compare_logits(model, TopK(routers.model_top_k))

    def bind(self, model: Any, rule: Rule, calibration: Calibration | None) -> BoundRule:
        """Bind a rule as `bind_rule` does, once; check its calibration every time."""
        key = (rule, calibration)
        if key not in self._bound:
            self._bound[key] = bind_quickest(model, rule, calibration)
        else:
            # Weights may have been changed in place: trained, or merged with an adapter's.
            check_calibration(model, self._bound[key].routers, rule, calibration)
        return self._bound[key]

    def session(self, bound: BoundRule, batch: int, length: int) -> Session:
        """Return a session for `batch` texts of up to `length` positions.

        Raises:
            UndecodableError: the rule, or so long a text, can't be decoded here.
        """
        most = self.decoder.cos_PD.shape[0]
        if length > most:
            raise UndecodableError(f"a text of {length} positions is longer than its {most}")
        num_positions = min(most, max(FEWEST_POSITIONS, 1 << (length - 1).bit_length()))
        key = (bound, batch, num_positions)
        if key not in self._sessions:
            start = time.perf_counter()
            self._sessions[key] = self._make_session(bound, batch, num_positions)
            self.startup_sec += time.perf_counter() - start
        return self._sessions[key]

    def _make_session(self, bound: BoundRule, batch: int, num_positions: int) -> Session:
        num_slots = bound.rule.num_candidates(bound.routers.model_top_k)
        return Session(
            self.decoder,
            bind_routers(bound),
            num_slots=num_slots,
            batch=batch,
            num_positions=num_positions,
        )

    @torch.inference_mode()
    def _compare_logits(self, model: Any, rule: Rule) -> None:
        """Write one token as the model itself does; names alone don't say what is computed."""
        bound = self.bind(model, rule, None)
        vocabulary = self.decoder.head_VH.shape[0]
        token_1P = torch.arange(1, PROBED_TOKENS + 1, device=model.device).unsqueeze(0)
        token_1P = token_1P * 7919 % vocabulary
        expected_V = model(input_ids=token_1P).logits[0, -1].float()
        session = self.session(bound, 1, PROBED_TOKENS)
        cache = model(input_ids=token_1P[:, :-1], use_cache=True).past_key_values
        session.start(cache, token_1P[:, -1])
        session.run(PROBED_TOKENS - 1, 1, ())
        difference_V = session.state.logits_BV[0].float() - expected_V
        error = float(difference_V.norm() / expected_V.norm())
        if not error <= LARGEST_ERROR.get(session.state.logits_BV.dtype, 0.0):
            raise UndecodableError(f"what is read off its layers gives other logits ({error:.2g})")


class _Snapshot(NamedTuple):
    """Everything of a model that an engine takes over when it is made.

    Values of parameters aren't among it: the engine reads them where they are.
    """

    config: str
    modules: list[Any]
    parameters: list[Any]
    buffers: dict[str, Tensor]

    @classmethod
    def of(cls, model: Any) -> _Snapshot:
        return cls(
            model.config.to_json_string(use_diff=False),
            [
                (name, type(module), [item for item in vars(module).items() if _is_setting(*item)])
                for name, module in model.named_modules()
            ],
            [
                (name, p.data_ptr(), p.device, p.dtype, p.shape, p.stride())
                for name, p in model.named_parameters()
            ],
            {name: buffer.detach().clone() for name, buffer in model.named_buffers()},
        )

    def is_of(self, model: Any) -> bool:
        now = _Snapshot.of(model)
        return (
            now[:3] == self[:3]
            and now.buffers.keys() == self.buffers.keys()
            and all(
                buffer.device == self.buffers[name].device
                and torch.equal(buffer, self.buffers[name])
                for name, buffer in now.buffers.items()
            )
        )


def _is_setting(name: str, value: Any) -> bool:
    return not name.startswith("_") and isinstance(value, bool | int | float | str | None)


_engines: Final[WeakKeyDictionary[nn.Module, tuple[_Snapshot, Engine | UndecodableError]]] = (
    WeakKeyDictionary()
)


def engine_of(model: Any) -> Engine:
    """Return the model's engine, made at the first call and whenever the model was changed.

    Raises:
        UndecodableError: there can be none.
    """
    _refuse_hooks(model)
    snapshot, engine = _engines.get(model, (None, None))
    if engine is None or snapshot is None or not snapshot.is_of(model):
        try:
            engine = Engine(model)
        except UndecodableError as error:
            engine = error
        _engines[model] = _Snapshot.of(model), engine
    if isinstance(engine, UndecodableError):
        raise engine
    return engine


def _refuse_hooks(model: Any) -> None:
    # A step calls no module, so that no hook would see it; transformers' own only collect outputs.
    for name, module in model.named_modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if not getattr(hook, "__module__", "").startswith("transformers."):
                raise UndecodableError(f"{name or 'the model'} has a forward hook")


def startup_seconds(model: Any) -> float | None:
    """Time that the model's engine took for compiling and capturing; None without one."""
    _, engine = _engines.get(model, (None, None))
    return engine.startup_sec if isinstance(engine, Engine) else None


def bind_routers(bound: BoundRule) -> list[Router]:
    """Bind a rule to each layer's logits: in one kernel, else in one sort, else as the twin does.

    Raises:
        UndecodableError: the rule or the routers need more than logits.
    """
    if bound.rule.needs_output_norms:
        raise UndecodableError(f"rule {bound.rule.method!r} runs the experts before it decides")
    routers = []
    for site, context in zip(bound.routers.sites, bound.contexts, strict=True):
        if not is_plain_softmax(site.facts):
            raise UndecodableError("its router does more than a softmax and its k largest")
        family = SoftmaxFamily(normalises=site.facts.normalises)
        router = fused_router(bound.rule, context, family)
        router = router or sorted_router(bound.rule, context, family)
        routers.append(router or twin_router(bound.rule, context, family))
    return routers


def _quickest_experts(model: Any) -> AbstractContextManager[None]:
    # On a CPU the model has its own since it was loaded.
    if model.device.type != "cuda":
        return nullcontext()
    return experts_by(model, NAME, sparse_experts_forward)


@torch.inference_mode()
def decode_greedily(
    model: Any,
    token_BP: Tensor,
    rule: Rule,
    calibration: Calibration | None = None,
    *,
    max_new_tokens: int,
    end_ids: Collection[int] = (),
) -> Decoded:
    """Continue texts of equal lengths under a rule.

    Args:
        model: a transformers model, not inside `route`.
        token_BP: prompts, int64, (B, P), on the model's device.
        rule: which experts stay.
        calibration: what the rule's null needs.
        max_new_tokens: tokens to write, at least 1.
        end_ids: ends the writing as soon as each text's newest token is one of these.
    Returns:
        Tokens, what was kept (of the fed-back tokens too, as under `generate`), and times.
    Raises:
        UndecodableError: neither model nor rule was run; `generate` under `route` does the same.
        CalibrationError, InputError: as `route` raises them.
    """
    engine = engine_of(model)
    bound = engine.bind(model, rule, calibration)
    batch, length = token_BP.shape
    session = engine.session(bound, batch, length + max_new_tokens)
    start = time.perf_counter()
    with _quickest_experts(model), install(model, bound) as trace:
        output = model(input_ids=token_BP, use_cache=True, logits_to_keep=1)
    top_B, first_B = output.logits[:, -1].max(-1)
    first = first_B.tolist()
    prefill_sec = time.perf_counter() - start
    position = session.start(output.past_key_values, first_B)
    has_ended = all(token in end_ids for token in first)
    steps = session.run(position, 0 if has_ended else max_new_tokens - 1, end_ids)
    for kept_LBK in steps.kept_SLBK:
        for layer, kept_BK in enumerate(kept_LBK):
            trace.record(layer, kept_BK, kept_BK != DROPPED)
    token_SB = torch.cat([first_B.cpu().unsqueeze(0), steps.token_SB])
    has_nan = steps.has_nan or not bool((top_B < torch.inf).all())
    return Decoded(token_SB, trace, prefill_sec, steps.seconds, has_nan)
