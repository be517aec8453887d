"""One operator for all gates of a model: it draws z = gate(log_alpha, U(seed, index)) and computes the penalty sum(cost
P(z != 0)). Both together need one draw and one backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dampr import reference
from dampr.spec import GateSpec

from .node import Node, apply
from .sample_gates import bwd, fwd


class _Bank(Node):
    """The autograd function of the draw and the penalty: (log_alpha (n,), seed (1,), cost (n,), spec) -> (z (n,),
    penalty, a scalar).
    """

    tensors = 3

    @staticmethod
    def plain(log_alpha: Tensor, seed: Tensor, cost: Tensor, spec: Any) -> Any:
        z = reference.gate_values(log_alpha, spec, seed, None)
        return z, torch.dot(reference.open_probability(log_alpha, spec), cost)

    @staticmethod
    def forward(ctx: Any, log_alpha: Tensor, seed: Tensor, cost: Tensor, spec: Any) -> Any:  # type: ignore[override]
        z = fwd(log_alpha, seed, None, spec)
        p = reference.open_probability(log_alpha, spec)
        ctx.save_for_backward(log_alpha, seed, cost, p)
        ctx.constants = (spec,)
        return z, torch.dot(p, cost)

    @staticmethod
    def fused(ctx: Any, dz: Tensor, dpenalty: Tensor) -> Any:
        log_alpha, seed, cost, p = ctx.saved_tensors
        gradient = bwd(dz, log_alpha, seed, None, *ctx.constants)
        return gradient.addcmul_(torch.ops.aten.sigmoid_backward(cost, p), dpenalty), None, None, None


class _Joined(torch.autograd.Function):
    """The vector whose consecutive parts in memory are the given parameters; its gradient is split among them. Nothing
    is copied.
    """

    @staticmethod
    def forward(ctx: Any, flat: Tensor, sizes: Sequence[int], *parameters: Tensor) -> Tensor:  # type: ignore[override]
        ctx.sizes = sizes
        return flat.view_as(flat)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return None, None, *gradient.split(ctx.sizes)


def joined(flat: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """``flat``, (sum of n,), connected by a graph to ``parameters``, (n,) each, which lie one after the other in its
    memory.
    """
    out: Tensor = _Joined.apply(flat, [p.numel() for p in parameters], *parameters)  # type: ignore[no-untyped-call]
    return out


def gate_bank(log_alpha: Tensor, seed: Tensor, cost: Tensor, spec: GateSpec) -> tuple[Tensor, Tensor]:
    """(z, (n,); the expected cost, a scalar) of drawn hard concrete gates; differentiable in ``log_alpha``;
    arguments are not checked.
    """
    z, penalty = apply(_Bank, log_alpha, seed, cost, spec)
    return z, penalty
