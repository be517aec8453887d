"""Layers that multiply each channel by a factor and compute nothing else, and PReLU, which has a slope for each
channel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from dampr.nn import GatedActivation
from dampr.nn import Scale as ScaleLayer

from ..terms import LayerWidths, Term
from .base import Kind, Passing


class Scale(Passing):
    """``dampr.nn.Scale``, one constant factor for each channel.

    It is what compaction leaves of gates on activations, and it stands for such gates in the plain copy of a model.
    """

    types = (ScaleLayer,)
    gates_values = resizes = True
    size_written = ""  # num_features is a property, computed from the factors

    def width(self, layer: Any, writes: bool) -> int:
        return int(layer.num_features)

    def places(self, layer: Any, writes: bool) -> list[tuple[str, int]]:
        return [("scale", 0)]

    def axes(self, writes: bool) -> dict[str, int]:
        return {"scale": 0} if writes else {}

    def params(self, name: str, layer: Any, widths: LayerWidths, own: int, counted: set[Any]) -> Iterator[Term]:
        """As for a layer without a kind: the factors are a buffer, so they do not count as parameters."""
        yield from Kind.params(self, name, layer, widths, own, counted)


class Activation(Kind):
    """A layer of dampr that multiplies activations by gates."""

    types = (GatedActivation,)

    def width(self, layer: Any, writes: bool) -> int:
        return int(layer.num_features)


class PReLU(Passing):
    """``nn.PReLU``, whose weight has a slope for each channel."""

    types = (nn.PReLU,)
    resizes = follows = from_file = True
    size_written = "num_parameters"

    def resize(self, layer: Any, shape: tuple[int, ...], keeps_groups: bool) -> None:
        layer.num_parameters = shape[0]
