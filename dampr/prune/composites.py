"""Layers that the type and the numbers given to its constructor do not determine: their description and construction.

Files use these for layers of torch that contain other layers (attention, transformer layers and their stacks), and for
the plain layers of dampr that compact leaves where torch.nn has none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dampr.nn import (
    PrunedMultiheadAttention,
    PrunedTransformerDecoderLayer,
    PrunedTransformerEncoderLayer,
    Residual,
    Scale,
    ScaledRNN,
    StackedRNN,
)
from dampr.nn.pruned.attention import attention_arguments
from dampr.nn.pruned.transformer import layer_arguments


def _expect(name: str, part: Any, *kinds: type) -> Any:
    """``part`` if it is of one of the types ``kinds``; else TypeError, which names the argument ``name``."""
    if not isinstance(part, kinds):
        raise TypeError(f"{name}={part!r}: expected {' or '.join(kind.__name__ for kind in kinds)}")
    return part


def _scale(num_features: int, dim: int) -> Scale:
    """A Scale with room for its factors, which are loaded later."""
    return Scale(torch.empty(num_features), dim)


def _residual(branch: nn.Module, scaled: bool) -> Residual:
    """A Residual around ``branch``; ``scaled``: with room for a factor, which is loaded later."""
    return Residual(_expect("branch", branch, nn.Module), torch.empty(1) if scaled else None)


def _scaled_rnn(rnn: Any) -> ScaledRNN:
    """A ScaledRNN around ``rnn`` with room for the factors of its units, which are loaded later."""
    _expect("rnn", rnn, nn.RNNBase)
    return ScaledRNN(rnn, torch.empty(rnn.num_layers * (1 + rnn.bidirectional), rnn.proj_size or rnn.hidden_size))


def _stacked_rnn(layers: Any, dropout: float) -> StackedRNN:
    """A StackedRNN of the one-layer modules ``layers``."""
    return StackedRNN(_expect("layers", layers, nn.ModuleList), dropout)


def _transformer_layer(kind: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """The constructor ``kind`` of a transformer layer, with a check of the type of its activation."""

    def build(*, activation: str | nn.Module, **arguments: Any) -> nn.Module:
        return kind(activation=_expect("activation", activation, str, nn.Module), **arguments)

    return build


def _layer_arguments(layer: Any) -> dict[str, Any]:
    """The arguments of a transformer layer of torch, from its attributes."""
    return layer_arguments(layer, layer.linear1.in_features, layer.self_attn.num_heads)


def _encoder(
    layers: Any, norm: Any, enable_nested_tensor: bool, use_nested_tensor: bool, mask_check: bool
) -> nn.Module:
    """A TransformerEncoder with these layers.

    The constructor of torch makes copies of one layer and decides from it whether nested tensors are used. Here layers
    may differ and the decision is in the file, so both are set afterwards.
    """
    checks, nothing = _expect("mask_check", mask_check, bool), nn.Identity()
    made = nn.TransformerEncoder(nothing, 0, _norm(norm), False, checks)  # type: ignore[arg-type]
    made.enable_nested_tensor = _expect("enable_nested_tensor", enable_nested_tensor, bool)
    made.use_nested_tensor = _expect("use_nested_tensor", use_nested_tensor, bool)
    return _filled(made, layers)


def _decoder(layers: Any, norm: Any) -> nn.Module:
    """A TransformerDecoder with these layers, which may differ; torch's constructor would copy one."""
    return _filled(nn.TransformerDecoder(nn.Identity(), 0, _norm(norm)), layers)  # type: ignore[arg-type]


def _transformer(custom_encoder: Any, custom_decoder: Any, **arguments: Any) -> nn.Module:
    """An nn.Transformer from its two stacks."""
    stacks = {"custom_encoder": custom_encoder, "custom_decoder": custom_decoder}
    return nn.Transformer(**{name: _expect(name, stack, nn.Module) for name, stack in stacks.items()}, **arguments)


def _norm(norm: Any) -> Any:
    """The argument ``norm`` if it is None or a module; else TypeError."""
    return norm if norm is None else _expect("norm", norm, nn.Module)


def _filled(stack: Any, layers: Any) -> nn.Module:
    """``stack`` with ``layers``, an nn.ModuleList, as its layers."""
    stack.layers, stack.num_layers = _expect("layers", layers, nn.ModuleList), len(layers)
    return stack


_ENCODER = ("layers", "norm", "enable_nested_tensor", "use_nested_tensor", "mask_check")
_TRANSFORMER = ("d_model", "nhead", "batch_first")

# type -> (a function from a layer to the arguments it is built from, some of them modules; a function that builds it)
_Kind = tuple[Callable[[Any], dict[str, Any]], Callable[..., nn.Module]]
_OWN: dict[type[nn.Module], _Kind] = {
    Scale: (lambda m: {"num_features": m.num_features, "dim": m.dim}, _scale),
    Residual: (lambda m: {"branch": m.branch, "scaled": m.scale is not None}, _residual),
    ScaledRNN: (lambda m: {"rnn": m.rnn}, _scaled_rnn),
    StackedRNN: (lambda m: {"layers": m.layers, "dropout": m.dropout}, _stacked_rnn),
    PrunedMultiheadAttention: (lambda m: m.arguments(), PrunedMultiheadAttention),
    PrunedTransformerEncoderLayer: (lambda m: m.arguments(), _transformer_layer(PrunedTransformerEncoderLayer)),
    PrunedTransformerDecoderLayer: (lambda m: m.arguments(), _transformer_layer(PrunedTransformerDecoderLayer)),
}
_KINDS: dict[type[nn.Module], _Kind] = {
    **_OWN,
    nn.MultiheadAttention: (attention_arguments, nn.MultiheadAttention),
    nn.TransformerEncoderLayer: (_layer_arguments, _transformer_layer(nn.TransformerEncoderLayer)),
    nn.TransformerDecoderLayer: (_layer_arguments, _transformer_layer(nn.TransformerDecoderLayer)),
    nn.TransformerEncoder: (lambda m: {name: getattr(m, name) for name in _ENCODER}, _encoder),
    nn.TransformerDecoder: (lambda m: {"layers": m.layers, "norm": m.norm}, _decoder),
    nn.Transformer: (
        lambda m: (
            {name: getattr(m, name) for name in _TRANSFORMER}
            | {"custom_encoder": m.encoder, "custom_decoder": m.decoder}
        ),
        _transformer,
    ),
}
BUILDERS = {kind.__name__: build for kind, (_, build) in _KINDS.items()}


def is_own(module: nn.Module) -> bool:
    """Whether a layer is of a type of dampr, which stands where the dense model had another."""
    return type(module) in _OWN


def parts_of(module: nn.Module) -> tuple[dict[str, Any], dict[str, nn.Module]] | None:
    """The arguments and the child modules that a layer is built from; None if this module does not build its type.

    Raises: TypeError if the layer has a part that data cannot describe.
    """
    if type(module) not in _KINDS:
        return None
    parts = _KINDS[type(module)][0](module)
    children = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    return {name: part for name, part in parts.items() if name not in children}, children
