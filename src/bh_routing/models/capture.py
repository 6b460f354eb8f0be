"""Find a model's routers in one short forward pass, with hooks on every block with experts.

Axes: T tokens, E experts, K slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bh_routing.errors import ModelError
from bh_routing.models.sites import BLOCK_METHOD, Order, Routed, RouterPlace, as_routed

NUM_TOKENS: Final = 12


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CapturedCall:
    """A captured router call."""

    place: RouterPlace
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    experts_see_input: bool
    is_finite: bool
    """Whether the router, its logits and its weights hold no NaN, and no weight is infinite."""


class _Block:
    """Calls captured in one block with experts."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module
        self.experts: nn.Module = getattr(module, "experts")  # noqa: B009  # Tensor | Module
        self.children = [
            (child_name, child)
            for child_name, child in module.named_children()
            if child is not self.experts
        ]
        self.calls: list[tuple[str, nn.Module, tuple[Any, ...], dict[str, Any], Any]] = []
        self.decided: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []
        self.given: list[tuple[Any, ...]] = []

    def watch(self, order: list[_Block]) -> Iterator[Callable[[], None]]:
        """Install the block's hooks and yield a function that removes each."""

        def on_child(name: str) -> Callable[..., None]:
            def hook(child: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                self.calls.append((name, child, args, kwargs, output))

            return hook

        def on_experts(_: nn.Module, args: Any, kwargs: Any) -> None:
            self.given.append((*args, *kwargs.values()))
            order.append(self)

        for name, child in self.children:
            yield child.register_forward_hook(on_child(name), with_kwargs=True).remove
        yield self.experts.register_forward_pre_hook(on_experts, with_kwargs=True).remove
        if hasattr(type(self.module), BLOCK_METHOD):
            original = getattr(self.module, BLOCK_METHOD)

            def method(*arguments: Tensor) -> tuple[Tensor, Tensor]:
                pair: tuple[Tensor, Tensor] = original(*arguments)
                self.decided.append((arguments[-1], pair))
                return pair

            setattr(self.module, BLOCK_METHOD, method)
            yield lambda: delattr(self.module, BLOCK_METHOD)

    def router_call(self) -> CapturedCall:
        """Return the captured call of the child that is the router.

        Raises:
            ModelError: no child is a router, or the experts' input differs from its output.
        """
        if len(self.given) > 1:
            raise ModelError(f"{self.name} runs {len(self.given)} times in one forward pass")
        for name, child, arguments, keywords, output in self.calls:
            order, routed = self._answer(output)
            if routed is None or not arguments or not isinstance(arguments[0], Tensor):
                continue
            given = [value for value in self.given[0] if isinstance(value, Tensor)]
            expected = (routed.index_TK, routed.weights_TK)
            if len(given) < 3 or not all(map(_equal, given[1:3], expected)):
                raise ModelError(f"the experts of {self.name} aren't given the router's slots")
            full_name = f"{self.name}.{name}" if self.name else name
            hidden = arguments[0].reshape(-1, arguments[0].shape[-1])
            return CapturedCall(
                place=RouterPlace(full_name, child, self.module, self.experts, order),
                arguments=arguments,
                keywords=keywords,
                experts_see_input=_equal(given[0].reshape(-1, given[0].shape[-1]), hidden),
                is_finite=bool(routed.weights_TK.isfinite().all())
                and not any(
                    bool(tensor.isnan().any())
                    for tensor in (routed.logits_TE, *child.parameters(), *child.buffers())
                ),
            )
        raise ModelError(f"no module of {self.name} returns router logits, weights and indices")

    def _answer(self, output: Any) -> tuple[Order | None, Routed | None]:
        if not self.decided:
            order = Order.of(output)
            return order, None if order is None else order.unpack(output)
        logits, pair = self.decided[0]
        is_logits = isinstance(output, Tensor) and _equal(output, logits)
        return None, as_routed(logits, pair) if is_logits else None


def capture_routers(model: nn.Module) -> list[CapturedCall]:
    """Run a short sequence through the model and return its routers in execution order.

    Only routers of the text model are found, not those of a vision tower.

    Raises:
        ModelError: the pass fails, or a block's structure is unknown.
    """
    blocks = [
        _Block(name, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "experts", None), nn.Module)
    ]
    order: list[_Block] = []
    with ExitStack() as undo:
        for block in blocks:
            for remove in block.watch(order):
                undo.callback(remove)
        undo.enter_context(_undisturbed(model))
        _read_text(model)
    return [block.router_call() for block in dict.fromkeys(order)]


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluate without gradients; restore the random state and every training flag."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with (
        evaluating(model),
        torch.random.fork_rng(devices=[d.index or 0 for d in devices]),
        torch.no_grad(),
    ):
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, without dropout, and restore every module's mode."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def _read_text(model: Any) -> None:
    vocabulary = int(getattr(text_config(model), "vocab_size", 0) or NUM_TOKENS)
    device = next(model.parameters()).device
    # Evenly spread, and clear of the first ids, which tend to be padding.
    ids = torch.linspace(vocabulary / 8, vocabulary * 5 / 8, NUM_TOKENS, device=device).long()[None]
    try:
        # Not model(): a compiled call would ignore the hooks.
        model.forward(input_ids=ids, use_cache=False)
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"a forward pass over text fails ({reason})") from error


def text_config(model: nn.Module) -> Any:
    """Return the configuration of the text model; None if the model has no configuration."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def text_stack_of(model: nn.Module, places: Sequence[RouterPlace]) -> nn.Module:
    """Return the innermost transformers model that contains all routers, else the model itself.

    Wrappers such as PEFT's call this module directly, not the modules around it.
    """
    routers = {place.module for place in places}
    around = [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and routers.issubset(module.modules())
    ]
    return around[-1] if around else model


def real_tokens(arguments: Mapping[str, Any]) -> Tensor | None:
    """Return a mask of the positions that are tokens, from a forward call's arguments.

    Args:
        arguments: arguments of the text model's `forward`, by name.
    Returns:
        Bool tensor (B, S), False at padding; None if the call has no usable mask.
    """
    mask, cache = arguments.get("attention_mask"), arguments.get("past_key_values")
    inputs = arguments.get("input_ids")
    inputs = arguments.get("inputs_embeds") if inputs is None else inputs
    if isinstance(mask, dict):  # one per attention type; a sliding window's is narrower
        masks = [value for value in mask.values() if isinstance(value, Tensor)]
        mask = max(masks, key=lambda value: value.shape[-1], default=None)
    if not isinstance(mask, Tensor) or not isinstance(inputs, Tensor):
        return None
    num_positions = inputs.shape[1]
    if mask.ndim == 2:
        return mask[:, -num_positions:].bool()
    if mask.ndim != 4 or num_positions == 1:
        return None
    # A 4D mask for a cache of fixed length: every token attends to itself, padding doesn't.
    sees_BSP = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    return sees_BSP.diagonal(int(cache.get_seq_length()) if cache else 0, dim1=1, dim2=2)


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and bool(
        ((first == second) | (first.isnan() & second.isnan())).all()
    )
