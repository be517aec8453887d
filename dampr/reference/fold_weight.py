"""W~ = W * Z, a weight times its gates."""

from __future__ import annotations

import torch

from dampr.spec import GateSpec

from .gated_linear import expand_blocks
from .gates import gate_values


def fold_weight(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    input_log_alpha: torch.Tensor | None,
    output_log_alpha: torch.Tensor | None,
    input_seed: torch.Tensor | None,
    output_seed: torch.Tensor | None,
    spec: GateSpec,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(z_out W z_in, z_out b) in ``dtype``, differentiable in every floating-point argument.

    weight: (N, K); bias: (N,) or None; log_alphas: (K,) and (N,), None without these gates.
    """
    # without gates, a 1 in the dtype that gates would have
    none = weight.new_ones((), dtype=torch.promote_types(weight.dtype, torch.float32))
    z_in = none if input_log_alpha is None else gate_values(input_log_alpha, spec, input_seed)
    z_out = none if output_log_alpha is None else gate_values(output_log_alpha, spec, output_seed)
    folded = weight * z_out.unsqueeze(-1) * z_in
    return folded.to(dtype), None if bias is None else (bias * z_out).to(dtype)


def fold_blocks(
    weight: torch.Tensor,
    log_alpha: torch.Tensor,
    seed: torch.Tensor | None,
    spec: GateSpec,
    block: tuple[int, int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """W * Z in ``dtype``, differentiable in every floating-point argument.

    weight: (N, ...), taken as a matrix of N rows; one gate for each ``block`` of it.
    """
    z = expand_blocks(gate_values(log_alpha, spec, seed), (weight.shape[0], weight.shape[1:].numel()), block)
    return (weight * z.reshape(weight.shape)).to(dtype)
