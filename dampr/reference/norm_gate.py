"""Batch norm, then gates, then a ReLU, in plain PyTorch."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from dampr.spec import GateSpec

from .gates import along, gate_values


def norm_gate(
    x: torch.Tensor,
    gain: torch.Tensor | None,
    bias: torch.Tensor | None,
    log_alpha: torch.Tensor,
    seed: torch.Tensor | None,
    statistics: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    spec: GateSpec,
    per_sample: bool,
    relu: bool,
) -> torch.Tensor:
    """act(z batch_norm(x)), in the dtype of x (B, C, ...); ``statistics``: (mean, var), or None for those of x."""
    mean, var = statistics or (None, None)
    y = F.batch_norm(x, mean, var, gain, bias, statistics is None, 0.0, eps)
    z = gate_values(log_alpha, spec, seed, x.shape[0] if per_sample else None)
    y = (y * along(z, x, 1)).to(x.dtype)
    return F.relu(y) if relu else y
