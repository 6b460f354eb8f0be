"""Map rows of a forward pass to sequences, from the arguments of the call.

Axes: B batch, S positions of the call, T = B * S rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bh_routing.errors import ModelError
from bh_routing.models.capture import real_tokens
from bh_routing.rules.base import Rows


class RowsOfCall:
    """Rows of the latest call of a model's layer stack.

    Args:
        emulates_steps: number rows as emulated decode steps, for teacher-forced batches of
            independent sequences.
    """

    def __init__(self, *, emulates_steps: bool = False) -> None:
        self._emulates_steps = emulates_steps
        self._rows: Rows | None = None

    def note(self, arguments: Mapping[str, Any]) -> None:
        """Derive the rows from the arguments of a starting call."""
        names = ("input_ids", "inputs_embeds")
        tokens = next(value for name in names if (value := arguments.get(name)) is not None)
        is_real_BS = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        if (known_BS := real_tokens(arguments)) is not None:
            is_real_BS = is_real_BS & known_BS.to(tokens.device)
        is_start_BS = torch.zeros_like(is_real_BS)
        places: Any = arguments.get("position_ids")
        has_places = isinstance(places, Tensor) and places.ndim == 2
        if has_places and arguments.get("attention_mask") is None:
            # Packed sequences: positions restart, which transformers' own masks rely on too.
            is_start_BS[:, 1:] = places.diff(dim=-1) != 1
        rows = Rows.of_batch(is_real_BS, is_start_BS)
        self._rows = rows.as_emulated_steps() if self._emulates_steps else rows

    def of(self, num_rows: int, device: torch.device) -> Rows:
        """Return the rows of the running call.

        Raises:
            ModelError: a router's number of rows differs from the call's.
        """
        known = 0 if self._rows is None else len(self._rows.sequence_T)
        if self._rows is None or known != num_rows:
            raise ModelError(
                f"a router sees {num_rows} tokens of a forward pass of {known}, so blocks of a "
                "sequence can't be told apart; choose scope token or population"
            )
        return self._rows.to(device)
