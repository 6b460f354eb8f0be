"""The decode engine: greedy decoding in fixed memory, one CUDA graph per step on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from bh_routing.engine.timing import captured
from bh_routing.kernels.decode import DecodeState, bind_step
from bh_routing.kernels.decode_layout import Decoder, UndecodableError, read_decoder
from bh_routing.kernels.experts import NAME, sparse_experts_forward
from bh_routing.kernels.router import fused_router, fused_step_router
from bh_routing.models.experts import experts_by
from bh_routing.models.routers import find_routers
from bh_routing.models.routing import BoundRule, bind_rule, check_calibration, install
from bh_routing.models.trace import DROPPED, ExpertTrace
from bh_routing.nulls.calibration import Calibration
from bh_routing.rules.base import Rule
from bh_routing.rules.fixed import TopK
from bh_routing.rules.router import Router, SoftmaxFamily, reference_router

STEPS_IN_A_BURST: Final = 16
"""Steps between host syncs: end-of-text tokens are detected only then, and later tokens are
discarded."""


class Steps(NamedTuple):
    """Output of a session's decode steps."""

    token_SB: Tensor
    """int64, on the host."""
    kept_SLBK: Tensor
    """int16, on the session's device: kept expert of each slot, -1 where dropped."""
    has_nan: bool
    """Whether a token was chosen from logits that hold NaN or infinity."""
    seconds: float


class Session:
    """Buffers and graph for one rule, batch size and maximum length, reused between runs.

    Args:
        decoder: the model's weights.
        routers: the rule, bound to each layer.
        num_slots: slots that each router proposes.
        batch: batch size.
        num_positions: maximum number of positions per sequence.
    """

    def __init__(
        self,
        decoder: Decoder,
        routers: Sequence[Router],
        *,
        num_slots: int,
        batch: int,
        num_positions: int,
    ) -> None:
        self.state = DecodeState.empty(
            decoder, batch=batch, num_positions=num_positions, num_slots=num_slots
        )
        step = bind_step(decoder, self.state, routers)
        self.advance: Callable[[], None] = step
        """Generate one token per sequence; on CUDA it launches without a host sync."""
        if self.state.token_B.is_cuda:
            with torch.inference_mode():
                self.advance = captured(step)

    def start(self, cache: Any, token_B: Tensor) -> int:
        """Copy transformers' cache of a prompt and the first tokens; return their position."""
        length = int(cache.layers[0].keys.shape[2])
        for number, layer in enumerate(cache.layers):
            self.state.keys[number, :, :, :length] = layer.keys
            self.state.values[number, :, :, :length] = layer.values
        self.state.token_B.copy_(token_B)
        self.state.position_B.fill_(length)
        self.state.logits_BV.zero_()
        return length

    def run(self, first: int, num_steps: int, end_ids: Collection[int]) -> Steps:
        """Decode from position `first` until the latest tokens of all sequences are end tokens.

        The host waits for the device only after each burst of steps.
        """
        clock = _Clock(self.state.token_B.device)
        burst = STEPS_IN_A_BURST if self.state.token_B.is_cuda else 1
        done = 0
        while done < num_steps:
            for _ in range(min(burst, num_steps - done)):
                self.advance()
                clock.tick()
            done = min(done + burst, num_steps)
            if end_ids and (ends := self._count_until_end(first, done, end_ids)) is not None:
                done = ends
                break
        end = first + done
        return Steps(
            self.state.token_PB[first:end].cpu(),
            self.state.kept_PLBK[first:end],
            not bool((self.state.top_PB[first:end] < torch.inf).all()),
            clock.seconds(done),
        )

    def _count_until_end(self, first: int, done: int, end_ids: Collection[int]) -> int | None:
        rows = self.state.token_PB[first : first + done].tolist()
        return next((n for n, row in enumerate(rows, 1) if all(t in end_ids for t in row)), None)


class _Clock:
    """Time until the end of each step, by CUDA events on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._ticks: list[Any] = []
        self._is_cuda = device.type == "cuda"
        self.tick()

    def tick(self) -> None:
        if self._is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._ticks.append(event)
        else:
            self._ticks.append(time.perf_counter())

    def seconds(self, ticks: int) -> float:
        first, last = self._ticks[0], self._ticks[ticks]
        if not self._is_cuda:
            return float(last - first)
        last.synchronize()
        return float(first.elapsed_time(last)) / 1000


FEWEST_POSITIONS: Final = 256
MOST_POSITIONS: Final = 32_768
PROBED_TOKENS: Final = 8
LARGEST_ERROR: Final = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}
"""Tolerance: RMS difference of logits, relative to the RMS of the model's own. Rounding is below,
even where it exchanges two nearly equal experts; a different layout is far above."""


class Decoded(NamedTuple):
    """Generated continuations of a batch."""

    token_SB: Tensor
    """int64, on the host; the first row comes from the prefill."""
    trace: ExpertTrace
    prefill_sec: float
    """Until the first token is on the host."""
    decode_sec: float
    has_nan: bool
    """Whether a token was chosen from logits that hold NaN or infinity."""


class Engine:
    """One model's decoder, with cached sessions by rule, batch size and length.

    Args:
        model: a transformers model, not inside `route`.
    Raises:
        UndecodableError: the model's layout differs from that in `kernels.decode_layout`, or its
            logits from the decoder's; use `generate` instead.
    """

    def __init__(self, model: Any) -> None:
        self.startup_sec = 0.0
        """Time to create sessions: compiling kernels, capturing graphs."""
        self._bound: dict[Any, BoundRule] = {}
        self._sessions: dict[Any, Session] = {}
        routers = find_routers(model)
        context = getattr(model.config, "max_position_embeddings", None) or MOST_POSITIONS
        blocks = [site.block for site in routers.sites]
        self.decoder = read_decoder(model, blocks, min(context, MOST_POSITIONS))
        self._compare_logits(model, TopK(routers.model_top_k))

    def bind(self, model: Any, rule: Rule, calibration: Calibration | None) -> BoundRule:
        """Bind a rule as `bind_rule` does, and cache it; check its calibration on every call."""
        key = (rule, calibration)
        if key not in self._bound:
            self._bound[key] = bind_rule(model, rule, calibration, fused_router)
        else:
            # Weights may have changed in place, by training or by merging an adapter.
            check_calibration(model, self._bound[key].routers, rule, calibration)
        return self._bound[key]

    def session(self, bound: BoundRule, batch: int, length: int) -> Session:
        """Return a session for `batch` sequences of up to `length` positions.

        Raises:
            UndecodableError: the rule or the length isn't supported.
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
        """Compare the logits of one decode step with the model's: equal names don't suffice."""
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
    """The state of a model that an engine copies on creation.

    Parameter values aren't included: the engine reads them in place.
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
    """Return the model's cached engine, created anew if the model has changed.

    Raises:
        UndecodableError: the engine doesn't support the model.
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
    # A step calls no module, so hooks wouldn't run; transformers' own only collect outputs.
    for name, module in model.named_modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if not getattr(hook, "__module__", "").startswith("transformers."):
                raise UndecodableError(f"{name or 'the model'} has a forward hook")


def startup_seconds(model: Any) -> float | None:
    """Return the compile and capture time of the model's engine; None without an engine."""
    _, engine = _engines.get(model, (None, None))
    return engine.startup_sec if isinstance(engine, Engine) else None


def bind_routers(bound: BoundRule) -> list[Router]:
    """Bind a rule to each layer: as kernels where there are some, else in torch.

    Raises:
        UndecodableError: the rule needs expert outputs, or a router isn't a plain softmax.
    """
    if bound.rule.needs_output_norms:
        raise UndecodableError(f"rule {bound.rule.method!r} runs the experts before it decides")
    routers = []
    for site, context in zip(bound.routers.sites, bound.contexts, strict=True):
        if not site.facts.is_plain_softmax:
            raise UndecodableError("its router does more than a softmax and its k largest")
        family = SoftmaxFamily(normalises=site.facts.normalises)
        router = fused_router(bound.rule, context, family)
        router = router or fused_step_router(bound.rule, context, family)
        routers.append(router or reference_router(bound.rule, context, family))
    return routers


def _fused_experts(model: Any) -> AbstractContextManager[None]:
    # On a CPU, `load_model` has already set the implementation.
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
    """Continue a batch of prompts of equal length under a rule.

    Args:
        model: a transformers model, not inside `route`.
        token_BP: prompts, int64, (B, P), on the model's device.
        rule: decides which slots stay.
        calibration: reference distributions, if the rule's null needs a table.
        max_new_tokens: tokens to generate per sequence, at least 1.
        end_ids: generation ends once the latest tokens of all sequences are among these.
    Returns:
        Tokens, kept experts (of the fed-back tokens too, as in `generate`), and times.
    Raises:
        UndecodableError: the engine doesn't support the model or rule; nothing was generated. Use
            `generate` under `route` instead.
        CalibrationError, InputError: as in `route`.
    """
    engine = engine_of(model)
    bound = engine.bind(model, rule, calibration)
    batch, length = token_BP.shape
    session = engine.session(bound, batch, length + max_new_tokens)
    start = time.perf_counter()
    with _fused_experts(model), install(model, bound) as trace:
        output = model(input_ids=token_BP, use_cache=True, logits_to_keep=1)
    top_B, first_B = output.logits[:, -1].max(-1)
    first = first_B.tolist()
    prefill_sec = time.perf_counter() - start
    position = session.start(output.past_key_values, first_B)
    has_ended = all(token in end_ids for token in first)
    steps = session.run(position, 0 if has_ended else max_new_tokens - 1, end_ids)
    for kept_LBK in steps.kept_SLBK:
        trace.begin(None, is_step=True)
        for layer, kept_BK in enumerate(kept_LBK):
            trace._record(layer, kept_BK, kept_BK != DROPPED)
    token_SB = torch.cat([first_B.cpu().unsqueeze(0), steps.token_SB])
    has_nan = steps.has_nan or not bool((top_B < torch.inf).all())
    return Decoded(token_SB, trace, prefill_sec, steps.seconds, has_nan)
