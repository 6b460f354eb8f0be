"""The weights that a decode step reads, for all decoders of the common layout.

The layout is norm, attention with rotary positions, residual, norm, router and experts, residual.
Models with another layout are rejected; the error names the difference. A model may match all names
and still compute something else, which the caller must detect by comparing logits.

Axes: V vocabulary, H hidden, E experts, D head dimension, P positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from bh_routing.errors import ModelError

PROJECTIONS: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
HEAD_NORMS: Final = ("q_norm", "k_norm")
LAYER_NORMS: Final = ("input_layernorm", "post_attention_layernorm")
ROTARY_TYPES: Final = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose table of angles is independent of the sequence length."""


class UndecodableError(ModelError):
    """The decode engine doesn't support this model or rule."""


class Norm(NamedTuple):
    """A root-mean-square norm."""

    weight: Tensor
    eps: float


class Attention(NamedTuple):
    """Weights of one layer's attention, each (out, in)."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    query_norm: Norm | None
    """Over the whole row or over each head, by the number of weights; None in most families."""
    key_norm: Norm | None


class Layer(NamedTuple):
    """One decoder layer."""

    input_norm: Norm
    attention: Attention
    experts_norm: Norm
    gate_EH: Tensor
    experts: Any
    """Module with transformers' experts interface."""


class Decoder(NamedTuple):
    """A whole model."""

    embedding_VH: Tensor
    layers: tuple[Layer, ...]
    norm: Norm
    head_VH: Tensor
    cos_PD: Tensor
    """In the model's dtype, one row per position."""
    sin_PD: Tensor
    """As cos_PD, with the first half of each row negated: x cos + roll(x, D / 2) sin rotates x."""
    num_heads: int
    num_key_heads: int
    scaling: float

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return int(self.cos_PD.shape[1])


def read_decoder(model: Any, blocks: Sequence[nn.Module], num_positions: int) -> Decoder:
    """Read a transformers decoder whose layers' router blocks are `blocks`, in order.

    Raises:
        UndecodableError: the layout differs; the message names the difference.
    """
    inner: Any = getattr(model, "model", None)
    head: Any = getattr(model, "lm_head", None)
    if not isinstance(inner, nn.Module) or not isinstance(head, nn.Linear) or _bias(head):
        raise UndecodableError("it isn't a decoder with a plain lm_head")
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise UndecodableError("its layers are spread over several devices")
    _check_children(inner, {"embed_tokens", "layers", "norm", "rotary_emb"})
    layers: Any = inner.layers
    if len(layers) != len(blocks):
        raise UndecodableError(f"{len(layers) - len(blocks)} of its layers have no router")
    config = model.config
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        raise UndecodableError("not all of its layers attend to everything")
    if getattr(config, "sliding_window", None) is not None:
        raise UndecodableError("its attention slides")
    if getattr(config, "clip_qkv", None) is not None:
        raise UndecodableError("it clips queries, keys and values")
    # Before the code below, which relies on names that another attention may lack.
    read_layers = tuple(
        _read_layer(layer, block) for layer, block in zip(layers, blocks, strict=True)
    )
    attention = layers[0].self_attn
    cos_PD, sin_PD = _rotary_table(inner, num_positions)
    dim = cos_PD.shape[1]
    if attention.head_dim != dim:
        raise UndecodableError("only part of each head is rotated")
    decoder = Decoder(
        embedding_VH=model.get_input_embeddings().weight,
        layers=read_layers,
        norm=_read_norm(inner.norm),
        head_VH=head.weight,
        cos_PD=cos_PD,
        sin_PD=sin_PD,
        num_heads=attention.q_proj.out_features // dim,
        num_key_heads=attention.k_proj.out_features // dim,
        scaling=float(attention.scaling),
    )
    _check_all_is_read(model, decoder)
    return decoder


def _check_all_is_read(model: nn.Module, decoder: Decoder) -> None:
    """Reject a model with a parameter that no step reads, such as an adapter's."""
    read = {id(tensor) for tensor in (decoder.embedding_VH, decoder.norm.weight, decoder.head_VH)}
    for layer in decoder.layers:
        norms = (layer.input_norm, layer.experts_norm, *layer.attention[4:])
        read |= {id(norm.weight) for norm in norms if norm is not None}
        read |= {id(tensor) for tensor in (*layer.attention[:4], layer.gate_EH)}
        read |= {id(tensor) for tensor in layer.experts.parameters(recurse=False)}
    if unread := [name for name, tensor in model.named_parameters() if id(tensor) not in read]:
        raise UndecodableError(f"a step wouldn't read {unread[0]}")


def _read_layer(layer: nn.Module, block: nn.Module) -> Layer:
    block_name = next((name for name, child in layer.named_children() if child is block), "")
    _check_children(layer, {"self_attn", block_name, *LAYER_NORMS})
    gate_name = next((name for name, _ in block.named_children() if name != "experts"), "")
    _check_children(block, {gate_name, "experts"})
    gate: Any = block.get_submodule(gate_name)
    if [name for name, _ in gate.named_parameters()] != ["weight"]:
        raise UndecodableError("its router is more than one matrix")
    attention: Any = layer.get_submodule("self_attn")
    has_norms = hasattr(attention, "q_norm")
    _check_children(attention, {*PROJECTIONS, *(HEAD_NORMS if has_norms else ())})
    for name in PROJECTIONS:
        if _bias(getattr(attention, name)):
            raise UndecodableError(f"its {name} has a bias")
    norms = [_read_norm(layer.get_submodule(name)) for name in LAYER_NORMS]
    return Layer(
        input_norm=norms[0],
        attention=Attention(
            *(getattr(attention, name).weight for name in PROJECTIONS),
            *(_read_norm(getattr(attention, name)) if has_norms else None for name in HEAD_NORMS),
        ),
        experts_norm=norms[1],
        gate_EH=gate.weight,
        experts=block.get_submodule("experts"),
    )


def _read_norm(norm: Any) -> Norm:
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if eps is None or [name for name, _ in norm.named_parameters()] != ["weight"]:
        raise UndecodableError(f"{type(norm).__name__} isn't a root-mean-square norm")
    return Norm(norm.weight, float(eps))


def _check_children(module: nn.Module, names: set[str]) -> None:
    found = {name for name, _ in module.named_children()}
    # Modules without parameters, such as activations, are checked by comparing logits.
    parts = {
        name for name in found - names if any(True for _ in module.get_submodule(name).parameters())
    }
    own = {name for name, _ in module.named_parameters(recurse=False)}
    if unlike := sorted((names - found) | parts | own):
        raise UndecodableError(
            f"{type(module).__name__} is laid out otherwise ({', '.join(unlike)})"
        )


def _bias(linear: Any) -> bool:
    return getattr(linear, "bias", None) is not None


def _rotary_table(inner: Any, num_positions: int) -> tuple[Tensor, Tensor]:
    if getattr(inner.rotary_emb, "rope_type", None) not in ROTARY_TYPES:
        raise UndecodableError("its rotary angles depend on the length of the text")
    weight = inner.embed_tokens.weight
    positions = torch.arange(num_positions, device=weight.device).unsqueeze(0)
    cos, sin = inner.rotary_emb(weight[:1].unsqueeze(0), positions)
    cos_PD, sin_PD = cos[0].contiguous(), sin[0].clone()
    sin_PD[:, : sin_PD.shape[1] // 2].neg_()
    return cos_PD, sin_PD
