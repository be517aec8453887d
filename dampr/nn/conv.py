"""GatedConv1d, GatedConv2d and GatedConv3d, drop-ins for the convolutions of ``torch.nn``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from dampr import _checks, functional
from dampr.gates import GateLike, place_gate
from dampr.spec import GateSpec

from .base import GatedWeight, Granularity


class GatedConv(GatedWeight, _ConvNd):
    """The code that the gated convolutions of one, two and three dimensions share; see :class:`GatedConv2d`."""

    _arguments = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    )
    _function: Callable[..., Tensor]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        gate: GateLike = "hard_concrete",
        granularity: Granularity | Tensor = "output",
        per_sample: bool = False,
    ) -> None:
        # The dense constructor first: it knows how to refuse channels that its groups do not divide.
        self._dense.__init__(
            self,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        _checks.flag("per_sample", per_sample)
        count = self._gate_count(
            granularity, per_sample, out_channels, in_channels, groups, self.weight.shape[2:], gate
        )
        self._set_granularity(granularity)
        self.per_sample = _checks.flag("per_sample", per_sample)
        self.gate = place_gate(gate, count, device, self.per_sample)

    def forward(self, input: Tensor) -> Tensor:
        """The gated convolution of ``input``, a batch or one sample. The granularity says what the gates multiply; if
        the open gates are one slice, only that slice of the weight is used.
        """
        x = input
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        gate, granularity = self.gate, self.granularity
        parameter, seed, spec = gate.call() if granularity != "index" else self._gates_by_index()
        opened = self._open_range() if gate.open_slice is not None else None
        if opened is not None:
            return self._on_slice(x, padding, parameter[opened], spec, opened)
        function, shape = self._function, (self.stride, padding, self.dilation, self.groups)
        how: dict[str, Any] = {"seed": seed, "spec": spec}
        if self.per_sample and seed is not None:
            batched = x.dim() == self.weight.dim()
            how |= {"per_sample": True, "index_offset": gate.index_offset(x.shape[0]) if batched else 0}
        if granularity == "output":
            return function(x, self.weight, self.bias, *shape, output_gate=parameter, **how)
        if granularity == "input":
            return function(x, self.weight, self.bias, *shape, input_gate=parameter, **how)
        block = granularity if isinstance(granularity, tuple) else None
        return function(x, self.weight, self.bias, *shape, weight_gate=parameter, block=block, **how)

    def _on_slice(self, x: Tensor, padding: Any, parameter: Tensor, spec: GateSpec, opened: slice) -> Tensor:
        """The forward if the open gates are one contiguous slice of filters or channels: a convolution with these
        alone.

        Args:
            x: the input, padded already where ``padding_mode`` asks for it.
            padding: the padding that is left to the convolution.
            parameter: the gate parameters of the slice.
            spec: how gates follow from the parameters; nothing is drawn.
            opened: the slice, of filters or of input channels by ``granularity``.

        Returns: the output with all filters; closed ones are 0.
        """
        dims = self.weight.dim() - 2
        if self.granularity == "input":
            x = x.narrow(-1 - dims, opened.start, opened.stop - opened.start)
            weight = self.weight[:, opened]
            return self._function(
                x, weight, self.bias, self.stride, padding, self.dilation, input_gate=parameter, spec=spec
            )
        weight, bias = self.weight[opened], None if self.bias is None else self.bias[opened]
        y = self._function(x, weight, bias, self.stride, padding, self.dilation, output_gate=parameter, spec=spec)
        return F.pad(y, (*[0] * (2 * dims), opened.start, self.out_channels - opened.stop))

    @classmethod
    def from_dense(
        cls,
        layer: Any,
        *,
        gate: GateLike = "hard_concrete",
        granularity: Granularity | Tensor = "output",
        per_sample: bool = False,
    ) -> Any:
        """A gated layer that takes over the parameters of ``layer`` themselves, not copies.

        If fresh gates are not 1, the parameters are divided by them, so that the layer computes the same.

        Raises: TypeError unless the type of ``layer`` is exactly the dense one; ValueError or TypeError that names the
        argument.
        """
        return cls._from_dense(layer, gate, granularity, per_sample)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._describe_gates()}"


class GatedConv2d(GatedConv, nn.Conv2d):
    """``nn.Conv2d`` with learned gates: y = z * (conv(x, W) + b), y = conv(x * z, W) + b, or y = conv(x, Z * W) + b.

    Args:
        in_channels ... dtype: as in ``nn.Conv2d``, all of them, ``padding="same"`` and every ``padding_mode`` included.
        gate: a family's name, a :class:`dampr.gates.Gate` subclass, or an instance to share.
        granularity: ``"output"`` (a gate per filter, its bias included), ``"input"`` (a gate per channel), ``"weight"``
            (a gate per weight) or ``(rows, cols)``: a gate for each ``rows`` filters times ``cols`` channels of a
            group, with all their kernel positions; (1, 1) is a gate per kernel. Any other grouping: an int64 tensor of
            the shape of ``weight``, which gate each weight has.
        per_sample: in training, one draw per image instead of one per call; ``"output"`` and ``"input"`` only.

    Input (B, C, H, W) or (C, H, W); channels last in, channels last out. ``weight`` and ``bias`` come first in
    ``parameters()``; a dense ``state_dict`` loads and leaves the gates as they are. A fresh layer equals the dense one
    in evaluation mode, to the bit.

    Put gates after a BatchNorm that follows (``dampr.convert`` does): a channel closed before it is not zero but a
    constant after it.

    Raises: ValueError or TypeError that names the argument.
    """

    _dense = nn.Conv2d
    _function = staticmethod(functional.gated_conv2d)


class GatedConv1d(GatedConv, nn.Conv1d):
    """``nn.Conv1d`` with learned gates; everything as in :class:`GatedConv2d`, in one dimension: (B, C, L) or (C,
    L).
    """

    _dense = nn.Conv1d
    _function = staticmethod(functional.gated_conv1d)


class GatedConv3d(GatedConv, nn.Conv3d):
    """``nn.Conv3d`` with learned gates; everything as in :class:`GatedConv2d`, in three dimensions: (B, C, D, H,
    W) or (C, D, H, W).
    """

    _dense = nn.Conv3d
    _function = staticmethod(functional.gated_conv3d)
