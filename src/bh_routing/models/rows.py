"""Map rows of a forward pass to sequences, from the arguments of the call.

Axes: B batch, S positions of the call, T = B * S rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from bh_routing.errors import ModelError
from bh_routing.models.capture import real_tokens
from bh_routing.rules.plan import Rows


class RowsOfCall:
    """Rows of the latest call of a model's layer stack.

    Args:
        decode_batch: sequences per emulated decode step, for teacher-forced batches of independent
            sequences; None: steps are those of the call.
        end_ids: tokens that `generate` feeds to sequences that have ended; in a decode step these
            rows count as padding.
    """

    def __init__(self, *, decode_batch: int | None = None, end_ids: Collection[int] = ()) -> None:
        self._decode_batch = decode_batch
        self._end_ids = end_ids
        self._rows: Rows | None = None

    def note(self, arguments: Mapping[str, Any]) -> None:
        """Derive the rows from the arguments of a starting call."""
        names = ("input_ids", "inputs_embeds")
        tokens = next(value for name in names if (value := arguments.get(name)) is not None)
        is_real_BS = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        if (known_BS := real_tokens(arguments)) is not None:
            is_real_BS = is_real_BS & known_BS.to(tokens.device)
        if _is_continuation(arguments):
            for end_id in self._end_ids:
                is_real_BS = is_real_BS & (tokens != end_id)
        is_start_BS = torch.zeros_like(is_real_BS)
        places: Any = arguments.get("position_ids")
        has_places = isinstance(places, Tensor) and places.ndim == 2
        if has_places and arguments.get("attention_mask") is None:
            # Packed sequences: positions restart, which transformers' own masks rely on too.
            is_start_BS[:, 1:] = places.diff(dim=-1) != 1
        rows = Rows.of_batch(is_real_BS, is_start_BS)
        if self._decode_batch is not None:
            rows = rows.as_emulated_steps(self._decode_batch, tokens.shape[1])
        self._rows = rows

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


def _is_continuation(arguments: Mapping[str, Any]) -> bool:
    """Return whether a call feeds back one token of each sequence, with its past in the mask."""
    ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    if not isinstance(ids, Tensor) or not isinstance(mask, Tensor):
        return False
    return ids.shape[1] == 1 and mask.ndim == 2 and mask.shape[1] > 1


def end_ids(model: Any) -> frozenset[int]:
    """Return the end and padding tokens of a model's own generation settings."""
    settings = getattr(model, "generation_config", None)
    found: set[int] = set()
    for name in ("eos_token_id", "pad_token_id"):
        value = getattr(settings, name, None)
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(found)
