"""The decode engine: the sessions of one model, and greedy decoding with them."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from bh_routing.engine.session import Session
from bh_routing.kernels.decode_layout import UndecodableError, read_decoder
from bh_routing.kernels.router import fused_router, fused_step_router
from bh_routing.models.routers import find_routers
from bh_routing.models.routing import BoundRule, bind_rule, check_calibration
from bh_routing.models.trace import ExpertTrace
from bh_routing.nulls.calibration import Calibration
from bh_routing.rules.base import Rule
from bh_routing.rules.fixed import TopK
from bh_routing.rules.router import Router, SoftmaxFamily, reference_router

FEWEST_POSITIONS: Final = 256
MOST_POSITIONS: Final = 32_768
PROBED_TOKENS: Final = 8
MOST_BUCKETED: Final = 64
"""Sequences up to which a batch on a GPU is filled up to a power of two."""
LARGEST_ERROR: Final = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}
"""Tolerance: RMS difference of logits, relative to the RMS of the model's own. Rounding is below,
even where it exchanges two nearly equal experts; a different layout is far above."""


class Decoded(NamedTuple):
    """Generated continuations of a batch."""

    token_ids: list[list[int]]
    """Of each sequence, including an end-of-text token."""
    traces: list[ExpertTrace]
    """Of each sequence."""
    prefill_sec: float
    """Until the first tokens are on the host."""
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

    def session(
        self, bound: BoundRule, batch: int, length: int, longest_prompt: int = PROBED_TOKENS
    ) -> Session:
        """Return a session for at least `batch` sequences of up to `length` positions.

        Raises:
            UndecodableError: the rule or the length isn't supported.
        """
        most = self.decoder.cos_PD.shape[0]
        if length > most:
            raise UndecodableError(f"a text of {length} positions is longer than its {most}")
        num_positions = min(most, max(FEWEST_POSITIONS, 1 << (length - 1).bit_length()))
        if self.decoder.embedding_VH.is_cuda and batch <= MOST_BUCKETED:
            batch = 1 << (batch - 1).bit_length()
        key = (bound, batch, num_positions)
        start = time.perf_counter()
        if key not in self._sessions:
            self._sessions[key] = self._make_session(bound, batch, num_positions)
        self._sessions[key].prepare(longest_prompt)
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
        """Compare the logits after prefill and a step with the model's: names don't suffice."""
        bound = self.bind(model, rule, None)
        vocabulary = self.decoder.head_VH.shape[0]
        tokens = [7919 * number % vocabulary for number in range(1, PROBED_TOKENS + 1)]
        token_1P = torch.tensor([tokens], device=model.device)
        expected_V = model(input_ids=token_1P).logits[0, -1].float()
        session = self.session(bound, 1, PROBED_TOKENS)
        session.start([tokens[:-1]])
        session.state.token_B.fill_(tokens[-1])
        session.advance()
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
    _reject_hooks(model)
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


def _reject_hooks(model: Any) -> None:
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


@torch.inference_mode()
def decode_greedily(
    model: Any,
    prompts: Sequence[Sequence[int]],
    rule: Rule,
    calibration: Calibration | None = None,
    *,
    max_new_tokens: int,
    end_ids: Collection[int] = (),
) -> Decoded:
    """Continue a batch of prompts, of any lengths, under a rule.

    Args:
        model: a transformers model, not inside `route`.
        prompts: token ids, at least one per prompt.
        rule: decides which slots stay.
        calibration: reference distributions, if the rule's null needs a table.
        max_new_tokens: tokens to generate per sequence, at least 1.
        end_ids: tokens that end a sequence, which from then on neither votes nor counts.
    Returns:
        Tokens, kept experts (of the fed-back tokens too, as in `generate`), and times.
    Raises:
        UndecodableError: the engine doesn't support the model or rule; nothing was generated. Use
            `generate` under `route` instead.
        CalibrationError, InputError: as in `route`.
    """
    engine = engine_of(model)
    bound = engine.bind(model, rule, calibration)
    longest = max(map(len, prompts))
    # The last token isn't fed back.
    session = engine.session(bound, len(prompts), longest + max_new_tokens - 1, longest)
    start = time.perf_counter()
    session.start(prompts, end_ids)
    session.state.token_B.tolist()
    prefill_sec = time.perf_counter() - start
    steps = session.run(max_new_tokens - 1)
    ids = zip(steps.token_SB.T.tolist(), steps.num_tokens_B, strict=True)
    return Decoded(
        [tokens[:count] for tokens, count in ids],
        session.traces(steps, bound.routers.num_experts),
        prefill_sec,
        steps.seconds,
        steps.has_nan,
    )
