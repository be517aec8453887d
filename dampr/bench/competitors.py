"""What a gated layer is compared with: hard concrete gates written the way the published code writes them, op by op."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BETA, GAMMA, ZETA, EPS = 2 / 3, -0.1, 1.1, 1e-6


def unfused_gate(log_alpha: Tensor, rows: int | None = None) -> Tensor:
    """A draw as a chain of elementwise ops: (n,), or (rows, n)."""
    shape = log_alpha.shape if rows is None else (rows, *log_alpha.shape)
    u = torch.empty(shape, device=log_alpha.device).uniform_(EPS, 1 - EPS)
    s = torch.sigmoid((torch.log(u) - torch.log(1 - u) + log_alpha) / BETA)
    return F.hardtanh(s * (ZETA - GAMMA) + GAMMA, 0, 1)


class UnfusedLinear(nn.Linear):
    """L0 linear layer, unfused. Per batch the gate multiplies the weight, per sample the activations, as in the published layers."""

    def __init__(self, in_features: int, out_features: int, *, granularity: str = "output", per_sample: bool = False) -> None:
        super().__init__(in_features, out_features)
        self.granularity, self.per_sample = granularity, per_sample
        self.log_alpha = nn.Parameter(torch.full((out_features if granularity == "output" else in_features,), 3.0))

    def forward(self, x: Tensor) -> Tensor:
        on_output = self.granularity == "output"
        if self.per_sample:
            z = unfused_gate(self.log_alpha, x.shape[0]).to(x.dtype)
            return F.linear(x, self.weight, self.bias) * z if on_output else F.linear(x * z, self.weight, self.bias)
        z = unfused_gate(self.log_alpha)
        if on_output:
            return F.linear(x, self.weight * z[:, None], self.bias * z)
        return F.linear(x, self.weight * z, self.bias)
