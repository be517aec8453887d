"""GatedLinear, a drop-in for ``nn.Linear``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dampr import _checks, functional
from dampr.gates import GateLike, place_gate
from dampr.spec import GateSpec

from .base import GatedWeight, Granularity


class GatedLinear(GatedWeight, nn.Linear):
    """``nn.Linear`` with learned gates: y = z * (x W^T + b), y = (x * z) W^T + b, or y = x (Z * W)^T + b.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        gate: a family's name, a :class:`dampr.gates.Gate` subclass, or an instance to share.
        granularity: ``"output"`` (a gate per row of ``weight``, its bias included), ``"input"`` (a gate per column),
            ``"weight"`` (a gate per weight) or ``(rows, cols)`` (a gate per block, in row-major order; partial blocks
            at the edges have gates too). For any other grouping: an int64 tensor of the shape of ``weight`` that holds
            the number of each weight's gate; the attribute ``granularity`` is then ``"index"``.
        per_sample: in training, one draw per row of the input flattened to (rows, in_features) instead of one per call;
            ``"output"`` and ``"input"`` only.

    Input (..., in_features), output (..., out_features). ``weight`` and ``bias`` come first in ``parameters()``; a
    dense ``state_dict`` loads and leaves the gates as they are. A fresh layer equals the dense one in evaluation mode,
    to the bit (for an input of three or more dimensions that is not contiguous: to rounding, because ``nn.Linear`` then
    adds the bias in a step of its own).

    Raises: ValueError or TypeError that names the argument.
    """

    _dense = nn.Linear
    _arguments = ("in_features", "out_features")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        gate: GateLike = "hard_concrete",
        granularity: Granularity | Tensor = "output",
        per_sample: bool = False,
    ) -> None:
        _checks.flag("per_sample", per_sample)
        super().__init__(in_features, out_features, bias, device, dtype)
        count = self._gate_count(granularity, per_sample, out_features, in_features, gate=gate)
        self._set_granularity(granularity)
        self.per_sample = _checks.flag("per_sample", per_sample)
        self.gate = place_gate(gate, count, device, self.per_sample)

    def forward(self, input: Tensor) -> Tensor:
        """The gated linear layer of ``input``, (..., in_features). The granularity says what the gates multiply; if the
        open gates are one slice, only that slice of the weight is used.
        """
        x = input
        if self.sharded:
            return self._on_shards(x)
        gate, granularity, each = self.gate, self.granularity, self.per_sample
        parameter, seed, spec = gate.call() if granularity != "index" else self._gates_by_index()
        how: dict[str, Any] = {"seed": seed, "spec": spec}
        if each and seed is not None:
            how |= {"per_sample": True, "index_offset": gate.index_offset(math.prod(x.shape[:-1]))}
        opened = self._open_range() if gate.open_slice is not None else None
        if opened is not None:
            return self._on_slice(x, parameter[opened], spec, opened)
        if granularity == "output":
            return functional.gated_linear(x, self.weight, self.bias, output_gate=parameter, **how)
        if granularity == "input":
            return functional.gated_linear(x, self.weight, self.bias, input_gate=parameter, **how)
        block = granularity if isinstance(granularity, tuple) else (1, 1)
        return functional.gated_linear(x, self.weight, self.bias, weight_gate=parameter, block=block, **how)

    def _on_shards(self, x: Tensor) -> Tensor:
        """The forward when parameters are DTensors (tensor parallelism)."""
        from . import sharded  # loads torch.distributed.tensor

        return sharded.linear(self, x)

    def _on_slice(self, x: Tensor, parameter: Tensor, spec: GateSpec, opened: slice) -> Tensor:
        """The forward when the open gates are one contiguous slice of rows or columns: a product with that slice of the
        weight alone.

        Args:
            x: (..., in_features).
            parameter: the gate parameters of the slice, (opened.stop - opened.start,).
            spec: how gates follow from the parameters; nothing is drawn.
            opened: the slice of open gates, of outputs or inputs by ``granularity``.

        Returns: (..., out_features), 0 for closed outputs.
        """
        if self.granularity == "input":
            return functional.gated_linear(
                x[..., opened], self.weight[:, opened], self.bias, input_gate=parameter, spec=spec
            )
        bias = None if self.bias is None else self.bias[opened]
        y = functional.gated_linear(x, self.weight[opened], bias, output_gate=parameter, spec=spec)
        return nn.functional.pad(y, (opened.start, self.out_features - opened.stop))

    @classmethod
    def from_dense(
        cls,
        layer: nn.Linear,
        *,
        gate: GateLike = "hard_concrete",
        granularity: Granularity | Tensor = "output",
        per_sample: bool = False,
    ) -> GatedLinear:
        """A gated layer that takes over the parameters of ``layer`` themselves, not copies.

        Where fresh gates are not 1, the parameters are divided by them, so that the layer computes the same.

        Raises: TypeError unless the type of ``layer`` is exactly ``nn.Linear``; ValueError or TypeError that names the
        argument.
        """
        gated: GatedLinear = cls._from_dense(layer, gate, granularity, per_sample)
        return gated

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._describe_gates()}"
