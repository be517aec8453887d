"""The list of kinds, and the kind of a layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from .attention import Attention, PrunedAttention
from .base import Counted, Kind
from .convolution import Convolution, TransposedConvolution
from .embedding import Embedding, EmbeddingBag
from .factor import Activation, PReLU, Scale
from .linear import Linear, TransposedLinear
from .norm import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from .recurrent import Cell, Recurrent, Stacked

KINDS: tuple[Kind, ...] = (
    Linear(),
    Convolution(),
    TransposedConvolution(),
    BatchNorm(),
    InstanceNorm(),
    LayerNorm(),
    RMSNorm(),
    GroupNorm(),
    Embedding(),
    EmbeddingBag(),
    Recurrent(),
    Stacked(),
    Cell(),
    Attention(),
    PrunedAttention(),
    Scale(),
    Activation(),
    PReLU(),
    TransposedLinear(),
)
"""Every kind except depthwise convolutions, which have the type of other convolutions. The first that fits counts."""

OTHER = Kind()
"""The kind of all other layers."""


_known: WeakKeyDictionary[type, Kind] = (
    WeakKeyDictionary()
)  # weak keys: torch makes a type for each parametrized module


def kind_of(layer: Any) -> Kind:
    """The kind of a layer; :data:`OTHER` for a layer that no kind fits, and for an object that is not a layer."""
    cls = type(layer)
    kind = _known.get(cls)
    if kind is None:
        kind = _known[cls] = next((kind for kind in KINDS if kind.fits(cls)), OTHER)
    return kind.of(layer)


def counted_in(model: nn.Module) -> Iterator[tuple[str, Any, Counted]]:
    """Name, layer and kind of each layer in a model whose multiply-accumulates and time are computed by layer."""
    for name, layer in model.named_modules():
        kind = kind_of(layer)
        if isinstance(kind, Counted):
            yield name, layer, kind


def channel_count(layer: Any, writes: bool) -> int:
    """How many channels a layer writes (``writes``) or reads; for a norm or an activation, how many it has."""
    return kind_of(layer).width(layer, writes)
