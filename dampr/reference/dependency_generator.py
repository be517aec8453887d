"""The generator of Dep-L0 (Li and Ji 2021): a chain of layers whose activations are the log_alphas of a network."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def dependency_generator(parameters: Sequence[torch.Tensor], limit: float) -> list[torch.Tensor]:
    """a_l = limit tanh(W_l a_{l-1} + b_l) for l = 1, 2, ... with a_0 = 1; differentiable in every parameter.

    ``parameters``: W_1, b_1, W_2, b_2, ...; W_l: (widths[l], widths[l - 1]), b_l: (widths[l],).
    """
    values: list[torch.Tensor] = []
    for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
        a = values[-1] if values else weight.new_ones(weight.shape[1])
        values.append(limit * torch.tanh(torch.addmv(bias, weight, a)))
    return values
