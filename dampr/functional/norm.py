"""Norms whose gain and bias carry gates: no activation is touched, and the gates' gradients fall out of those of gain and bias."""

from __future__ import annotations

import torch
from torch import Tensor

from dampr import _checks, ops
from dampr.spec import SAMPLE, GateSpec

from .gates import DRAWN

Maybe = Tensor | None


def gated_affine(
    gate: Tensor, weight: Tensor | None, bias: Tensor | None, *, seed: int | Tensor | None = None, spec: GateSpec = DRAWN
) -> tuple[Tensor, Tensor | None]:
    """(z weight, z bias): the gain and bias of a norm with a gate for each channel, to be given to ``batch_norm`` or ``layer_norm``.

    Args:
        gate: gate parameters, (C,), float32 or float64.
        weight, bias: gain and bias, (C,), any floating dtype, or None: a gain of 1, no bias.
        seed: the noise, an int in [0, 2^63) or an int64 tensor of shape (1,); not needed by a deterministic ``spec``.
        spec: the gate function, from :func:`dampr.spec.hard_concrete`; drawn by default.

    Returns: gain and bias in the dtype of ``weight`` (float32 without one). Differentiable in every argument.

    Raises: TypeError or ValueError that names the argument.
    """
    _checks.tensor("gate", gate)
    if weight is None:
        weight = torch.ones_like(gate)
    log_alpha = _checks.gate_parameter("gate", gate, weight.numel(), "channel", weight)
    noise = _checks.seed_tensor("seed", seed, weight.device) if spec.rule == SAMPLE else None
    # A gain is a weight with one column, and its rows carry the gates.
    gain, shift = ops.fold_weight(weight.view(-1, 1), bias, None, log_alpha, None, noise, spec, weight.dtype)
    return gain.view(weight.shape), shift
