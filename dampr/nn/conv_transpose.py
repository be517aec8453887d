"""GatedConvTranspose1d, 2d and 3d, drop-ins for the transposed convolutions of ``torch.nn``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from dampr import _checks, functional, names
from dampr.gates import GateLike, place_gate

from .base import VECTOR_GRANULARITIES, GatedWeight


class GatedConvTranspose(GatedWeight, _ConvTransposeNd):
    """The code that the gated transposed convolutions of one, two and three dimensions share; see
    :class:`GatedConvTranspose2d`.
    """

    _arguments = (
        *("in_channels", "out_channels", "kernel_size", "stride", "padding", "output_padding", "groups"),
        *("dilation", "padding_mode"),
    )

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        output_padding: int | tuple[int, ...] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, ...] = 1,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        gate: GateLike = "hard_concrete",
        granularity: names.VectorGranularity = "output",
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
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
            device,
            dtype,
        )
        count = self.gates_for(self, granularity)
        self._set_granularity(granularity)
        self.per_sample = _checks.flag("per_sample", per_sample)
        self.gate = place_gate(gate, count, device, self.per_sample)

    @classmethod
    def gates_for(cls, layer: Any, granularity: Any, per_sample: bool = False, gate: Any = None) -> int:
        """The number of gates that a dense ``layer`` needs: its output channels, or its input channels for "input".

        Raises: ValueError unless ``granularity`` is "output" or "input".
        """
        _checks.one_of("granularity", granularity, VECTOR_GRANULARITIES)
        count: int = layer.out_channels if granularity == "output" else layer.in_channels
        return count

    @classmethod
    def from_dense(
        cls,
        layer: Any,
        *,
        gate: GateLike = "hard_concrete",
        granularity: names.VectorGranularity = "output",
        per_sample: bool = False,
    ) -> Any:
        """A gated layer that takes over the parameters of ``layer`` themselves, not copies.

        If fresh gates are not 1, the parameters are divided by them, so that the layer computes the same.

        Raises: TypeError unless the type of ``layer`` is exactly the dense one; ValueError or TypeError that names the
        argument.
        """
        return cls._from_dense(layer, gate, granularity, per_sample)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As the transposed convolution of torch, with the gates multiplied into its input or its output and not into
        its weight.
        """
        dims = self.weight.dim() - 2
        x = _checks.tensor("input", input)
        if x.dim() not in (dims + 1, dims + 2):
            raise ValueError(
                f"input.shape={tuple(x.shape)}: expected {dims + 2} dimensions, or {dims + 1} of one sample"
            )
        x = self._gated(x) if self.granularity == "input" else x
        y: Tensor = self._dense.forward(self, x, output_size)
        return self._gated(y) if self.granularity == "output" else y

    def _gated(self, x: Tensor) -> Tensor:
        """``x`` with its channels multiplied by the gates; an input of one sample is treated as a batch of one."""
        parameter, seed, spec = self.gate.call()
        batch = x if x.dim() == self.weight.dim() else x[None]
        per_sample = self.per_sample and seed is not None
        offset = self.gate.index_offset(batch.shape[0]) if per_sample and batch is x else 0
        y = functional.gate_activations(
            batch, parameter, dim=1, seed=seed, per_sample=per_sample, spec=spec, index_offset=offset
        )
        return y if batch is x else y[0]

    def _spread(self, values: Tensor) -> Tensor:
        """``values``, one per gate, as a tensor that broadcasts to the weight (read, written / groups, *kernel)."""
        read, written, *kernel = self.weight.shape
        ones = [1] * len(kernel)
        if self.granularity == "input":
            return values.view(read, 1, *ones)
        return (
            values.view(self.groups, 1, written)
            .expand(self.groups, read // self.groups, written)
            .reshape(read, written, *ones)
        )

    def _collect(self, t: Tensor) -> Tensor:
        """For each gate the sum of ``t``, a tensor of the weight's shape, over the weights of the gate:
        (num_gates,).
        """
        owner = self._spread(torch.arange(self.gate.num_gates, device=t.device)).expand(t.shape)
        return t.new_zeros(self.gate.num_gates).index_add(0, owner.reshape(-1), t.reshape(-1))

    def group_size(self) -> float:
        """|g|, how many parameters a gate switches off, with the bias where the gate multiplies it."""
        read, written = self.weight.shape[:2]
        positions = self.weight.shape[2:].numel()
        if self.granularity == "input":
            return written * positions
        return read // self.groups * positions + (self.bias is not None)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._describe_gates()}"


class GatedConvTranspose2d(GatedConvTranspose, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with learned gates: y = z * (conv_transpose(x, W) + b), or y = conv_transpose(x * z, W) +
    b.

    Args:
        in_channels ... dtype: as in ``nn.ConvTranspose2d``, all of them.
        gate: a family's name, a :class:`dampr.gates.Gate` subclass, or an instance to share.
        granularity: ``"output"`` (a gate per written channel, its bias included) or ``"input"`` (a gate per read
            channel).
        per_sample: in training, one draw per image instead of one per call.

    Input (B, C, H, W) or (C, H, W). Gates are multiplied in one fused pass over the activations that have them.
    ``weight`` and ``bias`` come first in ``parameters()``; a dense ``state_dict`` loads and leaves the gates as they
    are.
    A fresh layer equals the dense one in evaluation mode, to the bit.

    Raises: ValueError or TypeError that names the argument.
    """

    _dense = nn.ConvTranspose2d


class GatedConvTranspose1d(GatedConvTranspose, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` with learned gates; everything as in :class:`GatedConvTranspose2d`, in one dimension: (B,
    C, L) or (C, L).
    """

    _dense = nn.ConvTranspose1d


class GatedConvTranspose3d(GatedConvTranspose, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` with learned gates; everything as in :class:`GatedConvTranspose2d`, in three dimensions:
    (B, C, D, H, W).
    """

    _dense = nn.ConvTranspose3d
