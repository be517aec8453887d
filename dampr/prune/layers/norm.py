"""Norms, with parameters or without."""

from __future__ import annotations

from typing import Any, TypeGuard

from torch import nn

from dampr.gates import GateLike
from dampr.nn import GatedBatchNorm1d, GatedBatchNorm2d, GatedBatchNorm3d, GatedLayerNorm, GatedSyncBatchNorm
from dampr.nn.base import Granularity

from .base import CannotCutError, Kind, Passing, PerChannel


class _Norm(Passing):
    """A norm that normalises each channel by itself, so channels can go."""

    normalises = resizes = follows = from_file = True
    affine = "affine"

    def width(self, layer: Any, writes: bool) -> int:
        return int(layer.num_features)

    def resize(self, layer: Any, shape: tuple[int, ...], keeps_groups: bool) -> None:
        layer.num_features = shape[0]


class BatchNorm(_Norm):
    """BatchNorm of any dimension, and SyncBatchNorm."""

    types = (nn.modules.batchnorm._BatchNorm,)
    twins = (
        (nn.BatchNorm1d, GatedBatchNorm1d),
        (nn.BatchNorm2d, GatedBatchNorm2d),
        (nn.BatchNorm3d, GatedBatchNorm3d),
        (nn.SyncBatchNorm, GatedSyncBatchNorm),
    )
    gates_values = batch_statistics = True

    def gated(self, layer: Any, gate: GateLike, granularity: Granularity, per_sample: bool) -> Any:
        """The norm with gates on its output channels; the granularity of the layer before it has no meaning here."""
        return self.twin(layer).from_dense(layer, gate=gate, per_sample=per_sample)


class InstanceNorm(_Norm):
    """InstanceNorm; BatchNorms match the kind above first."""

    types = (nn.modules.batchnorm._NormBase,)


class _OverChannels(Kind):
    """A norm with statistics over several channels, so cutting a channel changes the others."""

    normalises = follows = from_file = True

    def side(self, layer: Any, own: str, dim: int) -> bool | None:
        """Raise CannotCutError, because no side of such a norm can lose a channel by itself."""
        raise CannotCutError("{layer} computes statistics over its channels")


class LayerNorm(_OverChannels, PerChannel):
    """LayerNorm; only the last dimension counts as its channels."""

    types = (nn.LayerNorm,)
    twins = ((nn.LayerNorm, GatedLayerNorm),)
    gates_values = writes_last = True
    affine = "elementwise_affine"

    def gated(self, layer: Any, gate: GateLike, granularity: Granularity, per_sample: bool) -> Any:
        """The norm with gates that has its statistics over the open channels only.

        With statistics over all channels, a closed channel would still change the others and could not be cut. The
        granularity has no meaning for a norm.
        """
        return self.twin(layer).from_dense(layer, gate=gate, per_sample=per_sample, statistics="open")

    def width(self, layer: Any, writes: bool) -> int:
        return int(layer.normalized_shape[-1])

    def resize(self, layer: Any, shape: tuple[int, ...], keeps_groups: bool) -> None:
        layer.normalized_shape = tuple(shape)


class RMSNorm(_OverChannels):
    """``nn.RMSNorm``; it has no type with gates."""

    types = (nn.RMSNorm,)
    from_file = False

    def resize(self, layer: Any, shape: tuple[int, ...], keeps_groups: bool) -> None:
        layer.normalized_shape = tuple(shape)


class GroupNorm(_OverChannels):
    """``nn.GroupNorm``; groups of channels have common statistics."""

    types = (nn.GroupNorm,)

    def resize(self, layer: Any, shape: tuple[int, ...], keeps_groups: bool) -> None:
        """Set the number of channels, and of groups in proportion."""
        layer.num_groups = max(1, shape[0] * layer.num_groups // layer.num_channels)  # one group has them all
        layer.num_channels = shape[0]


def without_activation(layer: nn.Module) -> nn.Module:
    """The norm of a gated norm's dense form, which is a Sequential of norm and activation if the gated norm computes
    both.
    """
    return layer[0] if isinstance(layer, nn.Sequential) else layer


def counts_open(layer: Any) -> TypeGuard[GatedLayerNorm]:
    """Whether a layer is a gated LayerNorm whose statistics are those of the open channels only."""
    return isinstance(layer, GatedLayerNorm) and layer.statistics == "open"
