"""The plain layers of dampr that compact leaves where torch.nn has none, as data: how files describe them, and how they are built anew."""

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
)

_ATTENTION = ("embed_dim", "num_heads", "dropout", "bias", "add_bias_kv", "add_zero_attn", "kdim", "vdim", "batch_first", "heads")


def _scale(num_features: int, dim: int) -> Scale:
    return Scale(torch.empty(num_features), dim)


def _residual(branch: nn.Module, scaled: bool) -> Residual:
    if not isinstance(branch, nn.Module):
        raise TypeError(f"branch={branch!r}: expected a layer")
    return Residual(branch, torch.empty(1) if scaled else None)


def _scaled_rnn(rnn: Any) -> ScaledRNN:
    if not isinstance(rnn, nn.RNNBase):
        raise TypeError(f"rnn={rnn!r}: expected a recurrent layer")
    return ScaledRNN(rnn, torch.empty(rnn.num_layers * (1 + rnn.bidirectional), rnn.proj_size or rnn.hidden_size))


# type -> (what it is built from, of which the modules are children; what builds it)
_KINDS: dict[type[nn.Module], tuple[Callable[[Any], dict[str, Any]], Callable[..., nn.Module]]] = {
    Scale: (lambda m: {"num_features": m.num_features, "dim": m.dim}, _scale),
    Residual: (lambda m: {"branch": m.branch, "scaled": m.scale is not None}, _residual),
    ScaledRNN: (lambda m: {"rnn": m.rnn}, _scaled_rnn),
    PrunedMultiheadAttention: (lambda m: {name: getattr(m, name) for name in _ATTENTION}, PrunedMultiheadAttention),
    PrunedTransformerEncoderLayer: (lambda m: m.arguments(), PrunedTransformerEncoderLayer),
    PrunedTransformerDecoderLayer: (lambda m: m.arguments(), PrunedTransformerDecoderLayer),
}
BUILDERS = {kind.__name__: build for kind, (_, build) in _KINDS.items()}


def parts_of(module: nn.Module) -> tuple[dict[str, Any], dict[str, nn.Module]] | None:
    """The arguments and the child modules that a layer is built from; None for one that is not of dampr. Raises TypeError for no data."""
    if type(module) not in _KINDS:
        return None
    parts = _KINDS[type(module)][0](module)
    children = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    return {name: part for name, part in parts.items() if name not in children}, children
