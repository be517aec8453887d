"""x * z along one dimension."""

from __future__ import annotations

import torch

from dampr.spec import GateSpec

from .gates import along, gate_values


def gate_activations(
    x: torch.Tensor, log_alpha: torch.Tensor, seed: torch.Tensor | None, spec: GateSpec, dim: int, per_sample: bool
) -> torch.Tensor:
    """x * z along dimension ``dim``, differentiable in ``x`` and ``log_alpha``.

    per_sample: each index of the first dimension of ``x`` has a draw of its own.
    """
    z = gate_values(log_alpha, spec, seed, x.shape[0] if per_sample else None)
    return (x * along(z, x, dim)).to(x.dtype)
