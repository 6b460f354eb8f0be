"""Triton kernels of the prefill: norms with the residual sum, and rotated heads into the cache.

Rounding follows the model. Axes: B sequences, P positions, T their tokens, N heads, D head
dimension, H hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from bh_routing.kernels.decode import DecodeState
from bh_routing.kernels.decode_layout import Decoder, Norm
from bh_routing.kernels.decode_triton import IS_INTERPRETED

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls


@triton.jit
def _add_and_normalise(
    hidden, added, weight, total, normed, eps,
    H: tl.constexpr, P: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    """Add two rows, and normalise the sum: rounded before the weight is applied."""
    start = tl.program_id(0).to(tl.int64) * H
    column_P = tl.arange(0, P)
    inside_P = column_P < H
    hidden_P = tl.load(hidden + start + column_P, inside_P, 0.0)
    if ADDS:
        hidden_P += tl.load(added + start + column_P, inside_P, 0.0)
        tl.store(total + start + column_P, hidden_P, inside_P)
    hidden_32 = hidden_P.to(tl.float32)
    scale = tl.rsqrt(tl.sum(hidden_32 * hidden_32, 0) / H + eps)
    weight_P = tl.load(weight + column_P, inside_P, 0.0)
    tl.store(normed + start + column_P, (hidden_32 * scale).to(hidden_P.dtype) * weight_P, inside_P)


@triton.jit
def _place(
    rows, norm_weight, cos, sin, is_real, out, eps, num_positions, capacity,
    COUNT: tl.constexpr, N: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr,
    ROTATES: tl.constexpr,
):  # fmt: skip
    """Write one token's COUNT heads, normalised and rotated if so, where attention reads them.

    Padding becomes zeros.
    """
    token = tl.program_id(0)
    position = token % num_positions
    n_N1, d_1D = tl.arange(0, N)[:, None], tl.arange(0, D)[None, :]
    inside_ND = (n_N1 < COUNT) & (d_1D < D)
    place_ND, other_ND = n_N1 * D + d_1D, n_N1 * D + (d_1D + D // 2) % D
    rows += token.to(tl.int64) * COUNT * D
    here_ND = tl.load(rows + place_ND, inside_ND, 0.0)
    if ROTATES:
        there_ND = tl.load(rows + other_ND, inside_ND, 0.0)
        if NORM != "none":
            here_32 = here_ND.to(tl.float32)
            sums_N1 = tl.sum(here_32 * here_32, 1, keep_dims=True)
            if NORM == "row":
                scale_N1 = tl.rsqrt(tl.sum(sums_N1, 0, keep_dims=True) / (COUNT * D) + eps)
                weight_ND = tl.load(norm_weight + place_ND, inside_ND, 0.0)
                other_weight_ND = tl.load(norm_weight + other_ND, inside_ND, 0.0)
            else:
                scale_N1 = tl.rsqrt(sums_N1 / D + eps)
                weight_ND = tl.load(norm_weight + d_1D)
                other_weight_ND = tl.load(norm_weight + (d_1D + D // 2) % D)
            dtype = here_ND.dtype
            there_ND = (there_ND.to(tl.float32) * scale_N1).to(dtype) * other_weight_ND
            here_ND = (here_32 * scale_N1).to(dtype) * weight_ND
        cos_1D, sin_1D = tl.load(cos + position * D + d_1D), tl.load(sin + position * D + d_1D)
        here_ND = here_ND * cos_1D + there_ND * sin_1D
    here_ND = tl.where(tl.load(is_real + token) != 0, here_ND, 0.0)
    head_N1 = (token // num_positions).to(tl.int64) * COUNT + n_N1
    target_ND = (head_N1 * capacity + position) * D + d_1D
    tl.store(out + target_ND, here_ND.to(out.dtype.element_ty), inside_ND)


def serves(decoder: Decoder) -> bool:
    """Whether these kernels support the decoder."""
    dim = decoder.head_dim
    return dim & (dim - 1) == 0 and (IS_INTERPRETED or decoder.embedding_VH.is_cuda)


def add_and_normalise(
    hidden_TH: Tensor, added_TH: Tensor | None, norm: Norm
) -> tuple[Tensor, Tensor]:
    """Return the sum of both, and its norm."""
    hidden = hidden_TH.shape[1]
    total_TH = hidden_TH if added_TH is None else torch.empty_like(hidden_TH)
    normed_TH = torch.empty_like(hidden_TH)
    _add_and_normalise[(len(hidden_TH),)](
        hidden_TH, added_TH, norm.weight, total_TH, normed_TH, norm.eps, H=hidden,
        P=triton.next_power_of_2(hidden), ADDS=added_TH is not None, num_warps=8,
    )  # fmt: skip
    return total_TH, normed_TH


def place_heads(
    decoder: Decoder, state: DecodeState, number: int, normed_TH: Tensor, is_real_BP: Tensor
) -> Tensor:
    """Write keys and values of real tokens to a layer's cache; return queries, (B, N, P, D)."""
    attention, dim = decoder.layers[number].attention, decoder.head_dim
    batch, num_positions = is_real_BP.shape
    query_BNPD = normed_TH.new_empty(batch, decoder.num_heads, num_positions, dim)
    for matrix, norm, out in (
        (attention.query, attention.query_norm, query_BNPD),
        (attention.key, attention.key_norm, state.keys[number]),
        (attention.value, None, state.values[number]),
    ):
        count = len(matrix) // dim
        kind = "none" if norm is None else "head" if norm.weight.numel() == dim else "row"
        _place[(len(normed_TH),)](
            functional.linear(normed_TH, matrix), norm and norm.weight, decoder.cos_PD,
            decoder.sin_PD, is_real_BP, out, norm.eps if norm else 0.0, num_positions,
            out.shape[2], COUNT=count, N=triton.next_power_of_2(count), D=dim, NORM=kind,
            ROTATES=matrix is not attention.value, num_warps=4,
        )  # fmt: skip
    return query_BNPD
