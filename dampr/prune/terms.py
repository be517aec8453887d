"""The types that costs are made of: widths that depend on gates, and terms that are products of widths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol


class Width(NamedTuple):
    """The number of channels that are left of a width: ``constant`` + the sum of ``weights[i]`` times variable i.

    The variables are those of :class:`.cost_widths.Variables`, or :class:`.unit_structure.Counts` for gates on
    parameters.
    """

    constant: float
    weights: Mapping[int, float] = {}


class Term(NamedTuple):
    """A part of the cost: ``bilinear`` * In * Out + ``linear`` * Out, for a layer or for one weight of a recurrent
    layer.

    Attributes:
        name: the name of the layer.
        read: In, the channels that are left of those it reads.
        written: Out, the channels that are left of those it writes.
        bilinear, linear: the coefficients.
        more: further widths by which the whole term is multiplied.
    """

    name: str
    read: Width
    written: Width
    bilinear: float
    linear: float = 0.0
    more: tuple[Width, ...] = ()


class LayerWidths(Protocol):
    """The interface of what knows how much is left of each layer."""

    def width(self, layer: Any, writes: bool) -> Width:
        """The channels that are left of those that ``layer`` writes (``writes``), or reads."""

    def heads(self, layer: Any) -> Width:
        """The heads of an attention that are left."""

    def rows(self, layer: Any) -> list[Width]:
        """For each layer and direction of a recurrent layer, the outputs that are left."""


def sum_of(widths: Sequence[Width]) -> Width:
    """The sum of several widths."""
    total: Counter[int] = Counter()
    for width in widths:
        total.update(width.weights)
    return Width(sum(width.constant for width in widths), total)


def mean_of(widths: Sequence[Width]) -> Width:
    """The mean of several widths."""
    total = sum_of(widths)
    weights = {number: weight / len(widths) for number, weight in total.weights.items()}
    return Width(total.constant / len(widths), weights)
