"""The reference of a pruned model: the original, with -inf as the logits of removed experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from bh_routing.models import find_routers
from bh_routing.models.expert_axes import Checkpoint, block_of

PRODUCTS = (functional.linear, torch.matmul, Tensor.matmul)


class _Masked(TorchFunctionMode):
    """Puts -inf into the columns of a product with a router's weight."""

    def __init__(self, removed: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._removed = removed
        self.num_masked = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func not in PRODUCTS:
            return output
        for tensor in args:
            if isinstance(tensor, Tensor) and tensor.data_ptr() in self._removed:
                self.num_masked += 1
                return output.index_fill(-1, self._removed[tensor.data_ptr()], float("-inf"))
        return output


@contextmanager
def without_experts(
    model: Any, checkpoint: Checkpoint, kept: Mapping[str, Sequence[int]]
) -> Iterator[None]:
    """Give removed experts the logit -inf, and the correction bias -inf, inside the block.

    Args:
        model: a float32 model: a router's cast of its weight to float32 then makes no copy.
        checkpoint: the model's, which knows the routers' weights.
        kept: block -> the experts that stay.
    """
    gone = {
        block: torch.tensor([e for e in range(checkpoint.num_experts) if e not in {*stay}])
        for block, stay in kept.items()
    }
    removed: dict[int, Tensor] = {}
    for name, axis in checkpoint.axes.items():
        weight = model.get_submodule(name.rpartition(".")[0]).__getattr__(name.rpartition(".")[2])
        if weight.ndim == 2 and axis.axis == 0 and ".experts." not in name:
            block = next(block for block in kept if name.startswith(f"{block}."))
            removed[weight.data_ptr()] = gone[block]
    assert len(removed) == len(kept), "every router has one matrix"
    biases = []
    for site in find_routers(model).sites:
        if site.facts.bias is not None:
            bias = site.facts.bias.get().data
            biases.append((bias, bias.clone()))
            bias.view(-1)[gone[block_of(site.name)]] = float("-inf")
    try:
        with _Masked(removed) as masked:
            yield
        assert masked.num_masked >= len(kept), "every router's logits were masked"
    finally:
        for bias, before in biases:
            bias.copy_(before)
