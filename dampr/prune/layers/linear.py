"""Linear layers, and what they share with convolutions: the output is one product with one weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dampr.nn import GatedLinear

from ..terms import LayerWidths, Term
from .base import Call, Counted, Kind, weight_term

_CONV1D = "transformers.pytorch_utils.Conv1D"


class Gemm(Counted):
    """A layer whose output is one product of its input with its weight, plus a bias."""

    reads = gemm = shares_gates = resizes = follows = from_file = True

    def side(self, layer: Any, own: str, dim: int) -> bool | None:
        """Dimension 0 of the weight is what the layer writes, all others what it reads; CannotCutError for a layer with
        groups.
        """
        if getattr(layer, "groups", 1) != 1:
            return super().side(layer, own, dim)
        if dim:
            return False
        return True if own == "weight" else None

    def params(self, name: str, layer: Any, widths: LayerWidths, own: int, counted: set[Any]) -> Iterator[Term]:
        """One term, proportional to the number of channels that the layer reads times the number that it writes. A
        weight that several layers share counts once.
        """
        yield weight_term(name, layer, widths, layer.weight not in counted, bias=layer.bias is not None)
        counted.add(layer.weight)

    def narrow_call(self, layer: Any, call: Call, read: int) -> Call:
        """The same call with the first ``read`` channels of the input, copied so that it is laid out in memory as
        before.
        """
        args, kwargs = call
        x, *_ = (*args, *kwargs.values())
        narrow = x.narrow(x.dim() + self.input_axis(layer), 0, read)
        return (narrow.clone(memory_format=torch.preserve_format),), {}


class Linear(Gemm):
    """``nn.Linear``; the channels are its features."""

    types = (nn.Linear,)
    twins = ((nn.Linear, GatedLinear),)
    writes_last = True
    size_written, size_read = "out_features", "in_features"

    def resize(self, layer: Any, shape: tuple[int, ...], keeps_groups: bool) -> None:
        layer.out_features, layer.in_features = shape

    def narrow(self, layer: Any, read: int, written: int, within: bool) -> nn.Module:
        return nn.Linear(read, written, layer.bias is not None)


class TransposedLinear(Kind):
    """``Conv1D`` of transformers, a linear layer whose weight is (read, written).

    Its type is compared by its full name, so that transformers is not imported here. A type that dampr or torch derives
    from it, to put gates on its weight, counts too.
    """

    follows = True

    def fits(self, cls: type) -> bool:
        return any(f"{kind.__module__}.{kind.__qualname__}" == _CONV1D for kind in cls.__mro__[:3])

    def resize(self, layer: Any, shape: tuple[int, ...], keeps_groups: bool) -> None:
        layer.nx, layer.nf = shape
