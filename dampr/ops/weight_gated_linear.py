"""y = x (Z * W)^T + b, a gate on each weight or on each block of weights, as one op forward and one op backward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dampr import reference

from .backends import select
from .gate_args import GateArgs, unpack
from .library import define, or_empty, wanted
from .node import Node, Planned, apply, needs_dispatcher


def _fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    log_alpha: Tensor,
    seed: Tensor | None,
    spec: Sequence[float],
    block: Sequence[int],
) -> Tensor:
    """Implementation of ``dampr::weight_gated_linear_fwd``: y (..., N) for x (..., K) and weight (N, K).

    log_alpha: (gates,), one for each block of ``block`` = (rows, cols) weights. seed: int64 (1,); None if nothing is
    drawn. spec: the fields of a :class:`dampr.spec.GateSpec` as floats.
    """
    gate = GateArgs(log_alpha, seed, unpack(spec))
    y: Tensor = select(x.device, x.dtype).weight_gated_linear_fwd(x, weight, bias, gate, tuple(block))
    return y


def _fwd_fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    """The empty result of :func:`_fwd`, (..., N)."""
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    log_alpha: Tensor,
    seed: Tensor | None,
    spec: Sequence[float],
    block: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Implementation of ``dampr::weight_gated_linear_bwd``: the gradients of x, weight, bias and log_alpha.

    dy: (..., N); the other arguments are those of :func:`_fwd`. A gradient is None where ``needs``, four bools, is
    False.
    """
    gate = GateArgs(log_alpha, seed, unpack(spec))
    grads: tuple[Tensor | None, ...] = select(x.device, x.dtype).weight_gated_linear_bwd(
        dy, x, weight, bias, gate, tuple(block), needs
    )
    return grads


def _bwd_fake(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The empty results of :func:`_bwd`: like x, weight, bias and log_alpha, the first four arguments after ``dy``.

    ``rest``: weight, bias, log_alpha, seed, spec, block, needs. A gradient that nobody needs has shape (0,), because an
    operator cannot return None.
    """
    inputs, needs = (x, *rest[:3]), rest[-1]
    return tuple(
        t.new_empty(t.shape) if need and t is not None else x.new_empty(0)
        for t, need in zip(inputs, needs, strict=True)
    )


_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor log_alpha, Tensor? seed, float[] spec, int[2] block"
fwd = define(f"weight_gated_linear_fwd({_INPUTS}) -> Tensor", _fwd, _fwd_fake)
bwd = define(
    f"weight_gated_linear_bwd(Tensor dy, {_INPUTS}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
    lambda grads, dy, x, *_: or_empty(grads, x),
)


@register_flop_formula(torch.ops.dampr.weight_gated_linear_fwd)
def _fwd_flops(x_shape: Any, weight_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """The floating-point operations of the dense layer; the arithmetic of gates is not counted."""
    return 2 * math.prod(x_shape) * int(weight_shape[0])


@register_flop_formula(torch.ops.dampr.weight_gated_linear_bwd)
def _bwd_flops(dy_shape: Any, x_shape: Any, weight_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """The floating-point operations of the products for dx and dW.

    A gradient that nobody needs has an empty shape in ``out_shape`` and counts nothing.
    """
    return (
        2
        * math.prod(x_shape)
        * int(weight_shape[0])
        * sum(math.prod(shape) > 0 for shape in (out_shape[0], out_shape[1]))
    )


class _WeightGatedLinear(Node):
    """The autograd function that runs through the dispatcher, with the operators ``fwd`` and ``bwd``."""

    tensors = 5
    plain = staticmethod(reference.weight_gated_linear)

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return fwd(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.constants = inputs[5:]
        ctx.save_for_backward(*inputs[:5])

    @staticmethod
    def fused(ctx: Any, dy: Tensor) -> Any:
        needs = list(ctx.needs_input_grad[:4])
        grads = bwd(dy, *ctx.saved_tensors, *ctx.constants, needs)
        return (*wanted(grads, needs), None, None, None)


class _PlannedWeightGated(Planned):
    """The autograd function that calls a backend directly, with the plan (route) that the forward chose."""

    tensors = 5

    @staticmethod
    def plain(*inputs: Any) -> Tensor:
        *given, plan = inputs
        return reference.weight_gated_linear(*(*given, plan.spec, plan.block))

    @staticmethod
    def by_operators(ctx: Any, dy: Tensor) -> Any:
        inputs, needs, plan = ctx.saved_tensors[:5], ctx.needs_input_grad[:4], ctx.constants[0]
        return (*wanted(bwd(dy, *inputs, plan.spec, plan.block, needs), needs), None, None)


_apply_planned = _PlannedWeightGated.apply_at_once


def weight_gated_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: GateArgs, block: tuple[int, int]
) -> Tensor:
    """y (..., N) = x (Z * W)^T + b, differentiable.

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N,) or None.
        gate: log_alpha (gates,), seed and spec of the gates.
        block: (rows, cols), the weights that share one gate; (1, 1) for a gate on each weight.

    It does not check its arguments; :func:`dampr.functional.gated_linear` does.
    """
    log_alpha, seed, spec, _ = gate
    if not needs_dispatcher((x, weight, bias, log_alpha)):
        backend = select(x.device, x.dtype)
        if hasattr(backend, "plan_weights"):
            planned: Tensor = _apply_planned(
                x, weight, bias, log_alpha, seed, backend.plan_weights(x, weight, spec, block)
            )
            return planned
    y: Tensor = apply(_WeightGatedLinear, x, weight, bias, log_alpha, seed, spec, block)
    return y
