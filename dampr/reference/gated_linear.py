"""y = z_out * ((x * z_in) W^T + b), and y = x (Z * W)^T + b.

Equations of the gates: :mod:`dampr.spec`.
"""

from __future__ import annotations

import math

import torch

from dampr.spec import GateSpec

from .gates import gate_values


def gated_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    input_log_alpha: torch.Tensor | None,
    output_log_alpha: torch.Tensor | None,
    input_seed: torch.Tensor | None,
    output_seed: torch.Tensor | None,
    spec: GateSpec,
    per_sample: bool,
) -> torch.Tensor:
    """y = z_out * ((x * z_in) W^T + b), (..., N), differentiable in every floating-point argument.

    x: (..., K); weight: (N, K); bias: (N,) or None; log_alphas: (K,) and (N,), None without these gates. per_sample:
    each row of ``x``, flattened to (M, K), has a draw of its own.

    The output gate multiplies the bias too, in training and in evaluation. (The published L0 convolution drops the bias
    in training.)
    """
    leading = x.shape[:-1]
    rows = math.prod(leading) if per_sample else None  # numel() would be a number of its own under export
    if rows is not None:
        x = x.reshape(rows, x.shape[-1])
    if input_log_alpha is not None:
        x = x * gate_values(input_log_alpha, spec, input_seed, rows).to(x.dtype)
    y = torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    if output_log_alpha is not None:
        y = y * gate_values(output_log_alpha, spec, output_seed, rows).to(y.dtype)
    return y.reshape(*leading, weight.shape[0]) if per_sample else y


def expand_blocks(z: torch.Tensor, shape: tuple[int, int], block: tuple[int, int]) -> torch.Tensor:
    """Block gates as a matrix of ``shape`` (N, K): entry (n, k) is gate (n // R) * ceil(K / C) + k // C for ``block``
    (R, C).

    z: the gates, flat.
    """
    (n_out, n_in), (rows, cols) = shape, block
    grid = z.view(-(n_out // -rows), -(n_in // -cols))
    return grid.repeat_interleave(rows, 0)[:n_out].repeat_interleave(cols, 1)[:, :n_in]


def weight_gated_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    log_alpha: torch.Tensor,
    seed: torch.Tensor | None,
    spec: GateSpec,
    block: tuple[int, int],
) -> torch.Tensor:
    """y = x (Z * W)^T + b, (..., N), with a gate on each ``block`` of the weight (N, K); (1, 1) is a gate on each
    weight.

    The bias has no gate. x: (..., K).
    """
    z = expand_blocks(gate_values(log_alpha, spec, seed), (weight.shape[0], weight.shape[1]), block)
    gated = (weight * z).to(x.dtype)
    return torch.nn.functional.linear(x, gated, None if bias is None else bias.to(x.dtype))
