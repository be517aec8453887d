"""y = z_out * (conv(x * z_in, Z * W) + b) in one to three dimensions."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from dampr.spec import GateSpec

from .gated_linear import expand_blocks
from .gates import along, gate_values


def gated_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    input_log_alpha: torch.Tensor | None,
    output_log_alpha: torch.Tensor | None,
    input_seed: torch.Tensor | None,
    output_seed: torch.Tensor | None,
    spec: GateSpec,
    per_sample: bool,
    **arguments: Any,
) -> torch.Tensor:
    """y = z_out * (conv(x * z_in, weight) + bias), (B, N, ...), differentiable in every floating-point argument.

    x: (B, C, ...). weight: (N, C / groups, ...). input_log_alpha: (C,), output_log_alpha: (N,); None for no gates.
    per_sample: one draw for each of the B samples. ``arguments``: stride, padding, dilation and groups of ``conv2d``.
    """
    rows = x.shape[0] if per_sample else None
    if input_log_alpha is not None:
        x = x * along(gate_values(input_log_alpha, spec, input_seed, rows), x, 1).to(x.dtype)
    y = _convolve(x, weight.to(x.dtype), bias, arguments)
    if output_log_alpha is not None:
        y = y * along(gate_values(output_log_alpha, spec, output_seed, rows), y, 1).to(y.dtype)
    return y


def weight_gated_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    log_alpha: torch.Tensor,
    seed: torch.Tensor | None,
    spec: GateSpec,
    block: tuple[int, int] | None,
    **arguments: Any,
) -> torch.Tensor:
    """y = conv(x, Z * weight) + bias, with a gate on each weight, or on each block of weights.

    block: (filters, channels) that share a gate at all kernel positions; None for a gate on each weight. The bias has
    no gate.
    """
    z = gate_values(log_alpha, spec, seed)
    if block is not None:
        z = expand_blocks(z, (weight.shape[0], weight.shape[1]), block).reshape(
            *weight.shape[:2], *[1] * (weight.dim() - 2)
        )
        gated = weight * z
    else:
        gated = weight * z.view(weight.shape)
    return _convolve(x, gated.to(x.dtype), bias, arguments)


def _convolve(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, arguments: dict[str, Any]
) -> torch.Tensor:
    """torch's convolution for the number of dimensions of x."""
    convolve: Any = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}[x.dim()]
    y: torch.Tensor = convolve(x, weight, None if bias is None else bias.to(x.dtype), **arguments)
    return y
