"""Fold gates into the gain and bias of a norm, and compute their gradients. Such a vector is a weight with one column,
so ``folds.h`` of csrc does both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dampr.ops.gate_args import GateArgs

from .fold_weight import fold_into
from .fold_weight import unfold as unfold_weight


def fold(weight: Tensor, bias: Tensor | None, gate: GateArgs) -> tuple[Tensor, Tensor | None]:
    """(z weight, z bias) in the dtype of ``weight``, which has to be contiguous."""
    gain = torch.empty_like(weight)
    return gain, fold_into(gain, weight, bias, gate.on_rows(), weight.numel(), 1)


def unfold(
    dgain: Tensor, dshift: Tensor | None, weight: Tensor, bias: Tensor | None, gate: GateArgs, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of weight, bias and log_alpha, those that ``needs`` asks for.

    dgain, dshift: the gradients of the results of :func:`fold`. ``dgain`` may be overwritten.
    """
    need_w, need_b, need_gate = needs
    dgain = dgain.contiguous()
    dw = None if not need_w else dgain if dgain.dtype == weight.dtype else torch.empty_like(weight)
    raw_bias = None if bias is None else dshift
    db, _, dgate = unfold_weight(
        dgain, raw_bias, weight, bias, gate.on_rows(), weight.numel(), 1, (need_w, need_b, False, need_gate), dw
    )
    return dw, db, dgate
