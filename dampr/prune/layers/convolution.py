"""Convolutions: plain ones with or without groups, depthwise and transposed ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from dampr.nn import GatedConv1d, GatedConv2d, GatedConv3d

from ..places import Places
from ..terms import LayerWidths, Term, Width
from .base import Entry, Kind, Passing, torch_type, weight_term
from .linear import Gemm

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class OfConvolutions(Kind):
    """What plain and transposed convolutions have in common: sizes and groups."""

    reads = follows = from_file = True
    size_written, size_read = "out_channels", "in_channels"

    def tensors(self, layer: Any, entry: Entry) -> dict[str, list[Places]]:
        """As for other layers; an entry with "groups" is that of a depthwise convolution, which has one place for both
        sides.
        """
        # A depthwise convolution with one channel left has groups=1, so only the entry tells that it is depthwise.
        return _DEPTHWISE.tensors(layer, entry) if "groups" in entry else super().tensors(layer, entry)

    def sizes(self, layer: Any, entry: Entry) -> dict[str, int]:
        return _DEPTHWISE.sizes(layer, entry) if "groups" in entry else super().sizes(layer, entry)

    def resize(self, layer: Any, shape: tuple[int, ...], keeps_groups: bool) -> None:
        """Set the channels and, unless ``keeps_groups``, the groups. The dimension 1 of the weight has the channels of
        one group.
        """
        written, read = (self.weight_dim(writes) for writes in (True, False))
        if layer.groups > 1 and not keeps_groups:
            layer.groups = shape[0] * layer.groups // (layer.in_channels if written else layer.out_channels)
        for dim, name in ((read, "in_channels"), (written, "out_channels")):
            setattr(layer, name, shape[dim] * (layer.groups if dim == 1 else 1))


class Convolution(OfConvolutions, Gemm):
    """A plain convolution, with or without groups."""

    types = CONVOLUTIONS
    twins = ((nn.Conv1d, GatedConv1d), (nn.Conv2d, GatedConv2d), (nn.Conv3d, GatedConv3d))

    def of(self, layer: Any) -> Kind:
        """A depthwise convolution has the type of a plain one but the kind :class:`Depthwise`."""
        return _DEPTHWISE if is_depthwise(layer) else self

    def pads(self, layer: Any) -> bool:
        """Whether zeros surround the input; other padding modes repeat values of the input, so a constant input stays
        one.
        """
        return layer.padding_mode == "zeros" and any(layer._reversed_padding_repeated_twice)

    def narrow(self, layer: Any, read: int, written: int, within: bool) -> nn.Module:
        """A convolution with fewer channels in each group (``within``), or else with fewer groups of the same size."""
        groups = layer.groups
        if groups > 1 and not within:
            groups = max(1, round(groups * written / layer.out_channels))
        each = layer.out_channels // layer.groups if not within else max(1, round(written / groups))
        how = layer.kernel_size, layer.stride, layer.padding, layer.dilation, groups, layer.bias is not None
        convolution: nn.Module = torch_type(layer)(
            read * groups, written if layer.groups == 1 else each * groups, *how, layer.padding_mode
        )
        return convolution


class Depthwise(Passing, Convolution):
    """A convolution in which each output channel depends on the input channel of the same number alone."""

    shares_gates = False

    def tensors(self, layer: Any, entry: Entry) -> dict[str, list[Places]]:
        """As for layers with one element for each channel; the entry's "groups" is a number and no side."""
        return super().tensors(layer, {side: own for side, own in entry.items() if side != "groups"})

    def sizes(self, layer: Any, entry: Entry) -> dict[str, int]:
        """All channels and groups are one number, that of the entry's output."""
        if "heads" in entry or "out" not in entry:
            return {}
        return dict.fromkeys(("out_channels", "in_channels", "groups"), entry["out"]["before"])

    def macs(self, name: str, layer: Any, widths: LayerWidths, uses: int, projections: int) -> Iterator[Term]:
        """One term, proportional to the number of channels, because each output channel reads one input channel
        alone.
        """
        if uses:
            yield Term(name, Width(1), widths.width(layer, True), uses * layer.weight[0].numel())

    def timed_widths(self, layer: Any, widths: LayerWidths) -> tuple[Width, Width]:
        """The time depends on one width, which counts as written."""
        return Width(1), widths.width(layer, True)


class TransposedConvolution(OfConvolutions):
    """A transposed convolution. Its weight is (read, written, *kernel), unlike that of other layers."""

    types = (nn.modules.conv._ConvTransposeNd,)

    def weight_dim(self, writes: bool) -> int:
        """The weight is (read, written, *kernel): dimension 1 has what the layer writes."""
        return int(writes)

    def side(self, layer: Any, own: str, dim: int) -> bool | None:
        """True (what the layer writes) for dimension 1 of the weight, False (what it reads) for dimension 0, and None
        for the bias, because the weight decides its side.
        """
        if layer.groups != 1:
            return super().side(layer, own, dim)
        return dim == 1 if own == "weight" else None

    def params(self, name: str, layer: Any, widths: LayerWidths, own: int, counted: set[Any]) -> Iterator[Term]:
        """As for other convolutions; with groups the parameters are constant, because such a layer is not cut."""
        if layer.groups != 1:
            yield from super().params(name, layer, widths, own, counted)
            return
        yield weight_term(name, layer, widths, layer.weight not in counted, bias=layer.bias is not None)
        counted.add(layer.weight)


def is_depthwise(layer: Any) -> bool:
    """Whether each output channel of a convolution depends on the input channel of the same number alone."""
    return (
        isinstance(layer, CONVOLUTIONS) and layer.groups > 1 and layer.groups == layer.in_channels == layer.out_channels
    )


_DEPTHWISE = Depthwise()
