"""The layers that gated layers are compared with: hard concrete gates written operator by operator, as in published
code, and captum's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BETA, GAMMA, ZETA, EPS = 2 / 3, -0.1, 1.1, 1e-6
Granularity = str | tuple[int, int]


def unfused_gate(log_alpha: Tensor, rows: int | None = None) -> Tensor:
    """A draw as a chain of elementwise operators, in the shape of ``log_alpha``, or (rows, *shape)."""
    shape = log_alpha.shape if rows is None else (rows, *log_alpha.shape)
    u = torch.empty(shape, device=log_alpha.device).uniform_(EPS, 1 - EPS)
    s = torch.sigmoid((torch.log(u) - torch.log(1 - u) + log_alpha) / BETA)
    return F.hardtanh(s * (ZETA - GAMMA) + GAMMA, 0, 1)


class UnfusedLinear(nn.Linear):
    """L0 linear layer, unfused.

    Per batch the gate multiplies the weight, per sample the activations, as in the published layers.
    """

    def __init__(
        self, in_features: int, out_features: int, *, granularity: Granularity = "output", per_sample: bool = False
    ) -> None:
        super().__init__(in_features, out_features)
        self.granularity, self.per_sample = granularity, per_sample
        rows, cols = (1, 1) if isinstance(granularity, str) else granularity
        shapes: dict[Granularity, tuple[int, ...]] = {"output": (out_features,), "input": (in_features,)}
        self.log_alpha = nn.Parameter(
            torch.full(shapes.get(granularity, (out_features // rows, in_features // cols)), 3.0)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.per_sample:
            z = unfused_gate(self.log_alpha, x.shape[0]).to(x.dtype)
            return (
                F.linear(x, self.weight, self.bias) * z
                if self.granularity == "output"
                else F.linear(x * z, self.weight, self.bias)
            )
        z = unfused_gate(self.log_alpha)
        if self.granularity == "output":
            return F.linear(x, self.weight * z[:, None], self.bias * z)
        if isinstance(self.granularity, tuple):
            z = z.repeat_interleave(self.granularity[0], 0).repeat_interleave(self.granularity[1], 1)
        return F.linear(x, self.weight * z, self.bias)


class CaptumLinear(nn.Linear):
    """captum's stochastic gates (the same distribution, a draw per row) in front of a dense layer.

    Raises ImportError without captum.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        from captum.module import BinaryConcreteStochasticGates

        super().__init__(in_features, out_features)
        self.gates = BinaryConcreteStochasticGates(in_features, temperature=BETA, lower_bound=GAMMA, upper_bound=ZETA)

    def forward(self, x: Tensor) -> Tensor:
        gated, _ = self.gates(x)
        return F.linear(gated, self.weight, self.bias)


class UnfusedConv2d(nn.Conv2d):
    """An L0 convolution with filter or channel gates, unfused: per batch on the weight, per sample on the
    activations.
    """

    def __init__(
        self, *args: Any, granularity: Granularity = "output", per_sample: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.granularity, self.per_sample = granularity, per_sample
        self.log_alpha = nn.Parameter(
            torch.full((self.out_channels if granularity == "output" else self.in_channels,), 3.0)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.per_sample:
            z = unfused_gate(self.log_alpha, x.shape[0]).to(x.dtype)[:, :, None, None]
            if self.granularity == "output":
                return self._conv_forward(x, self.weight, self.bias) * z
            return self._conv_forward(x * z, self.weight, self.bias)
        z = unfused_gate(self.log_alpha)
        if self.granularity == "output":
            return self._conv_forward(
                x, self.weight * z[:, None, None, None], None if self.bias is None else self.bias * z
            )
        return self._conv_forward(x, self.weight * z[:, None, None], self.bias)


class UnfusedGate(nn.Module):
    """Gates on the channels of an activation as in Dep-L0's code, unfused; with one draw per batch or per sample."""

    def __init__(self, channels: int, per_sample: bool) -> None:
        super().__init__()
        self.per_sample = per_sample
        self.log_alpha = nn.Parameter(torch.full((channels,), 3.0))

    def forward(self, x: Tensor) -> Tensor:
        z = unfused_gate(self.log_alpha, x.shape[0] if self.per_sample else 1)
        return x * z.to(x.dtype)[:, :, None, None]
