"""y = z_out * ((x * z_in) W^T + b), with one draw of the gates per batch or one per sample.

The forward and the backward are one operator each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dampr import reference

from ._torch import as_no_view, is_view
from .backends import select
from .gate_args import PAIR, GatePair
from .library import define, gates_activations, or_empty, wanted
from .node import Node, Planned, apply, needs_dispatcher
from .skip_closed import among_open, on_open_gates


def _fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_la: Tensor | None,
    out_la: Tensor | None,
    in_seed: Tensor | None,
    out_seed: Tensor | None,
    spec: Sequence[float],
    per_sample: bool,
    keep_pre: bool,
) -> tuple[Tensor, Tensor]:
    """Implementation of ``dampr::gated_linear_fwd``: (y, pre) for x (..., K) and weight (N, K).

    Args:
        in_la, out_la: log_alpha of input gates (K,) and output gates (N,); None without these gates.
        in_seed, out_seed: int64 (1,); None if nothing is drawn.
        spec: the fields of a :class:`dampr.spec.GateSpec` as floats.
        keep_pre: whether to return ``pre``, y before the output gate, (..., N), for the backward; it is empty
            otherwise.
    """
    gates = GatePair.of(in_la, out_la, in_seed, out_seed, spec, per_sample)
    y, pre = select(x.device, x.dtype).gated_linear_fwd(x, weight, bias, gates, keep_pre)
    # autograd raises if the result of a custom function is a view that is then changed in place
    return as_no_view(y, y.shape) if is_view(y) else y, pre


def _fwd_fake(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The empty results of :func:`_fwd`; the last argument is ``keep_pre``."""
    shape, keep_pre = (*x.shape[:-1], weight.shape[0]), rest[-1]
    return x.new_empty(shape), x.new_empty(shape if keep_pre else (0,))


def _bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_la: Tensor | None,
    out_la: Tensor | None,
    in_seed: Tensor | None,
    out_seed: Tensor | None,
    pre: Tensor,
    spec: Sequence[float],
    per_sample: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Implementation of ``dampr::gated_linear_bwd``: the gradients of x, weight, bias, in_la and out_la.

    dy: (..., N). pre: what the forward returned. A gradient is None where ``needs``, five bools, is False.
    """
    gates = GatePair.of(in_la, out_la, in_seed, out_seed, spec, per_sample)
    grads: tuple[Tensor | None, ...] = select(x.device, x.dtype).gated_linear_bwd(
        dy, x, weight, bias, gates, pre, needs
    )
    return grads


def _bwd_fake(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The empty results of :func:`_bwd`, like the first five arguments after ``dy``.

    ``rest``: weight, bias, in_la, out_la, the remaining arguments, and ``needs``. A gradient that nobody needs has
    shape (0,), because an operator cannot return None.
    """
    inputs, needs = (x, *rest[:4]), rest[-1]
    return tuple(
        t.new_empty(t.shape) if need and t is not None else x.new_empty(0)
        for t, need in zip(inputs, needs, strict=True)
    )


_HOW = "float[] spec, bool per_sample"
fwd = define(
    f"gated_linear_fwd(Tensor x, Tensor weight, Tensor? bias, {PAIR}, {_HOW}, bool keep_pre) -> (Tensor, Tensor)",
    _fwd,
    _fwd_fake,
)
bwd = define(
    f"gated_linear_bwd(Tensor dy, Tensor x, Tensor weight, Tensor? bias, {PAIR}, Tensor pre, {_HOW}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
    lambda grads, dy, x, *_: or_empty(grads, x),
)


@register_flop_formula(torch.ops.dampr.gated_linear_fwd)
def _fwd_flops(x_shape: Any, weight_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """The floating-point operations of the dense layer; the arithmetic of gates is not counted."""
    return 2 * math.prod(x_shape) * int(weight_shape[0])


@register_flop_formula(torch.ops.dampr.gated_linear_bwd)
def _bwd_flops(dy_shape: Any, x_shape: Any, weight_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """The floating-point operations of the products for dx and dW.

    A gradient that nobody needs has an empty shape in ``out_shape`` and counts nothing.
    """
    wanted = sum(math.prod(shape) > 0 for shape in (out_shape[0], out_shape[1]))
    return 2 * math.prod(x_shape) * int(weight_shape[0]) * wanted


class _GatedLinear(Node):
    """The autograd function for calls that torch's dispatcher must see (compiled, traced or profiled ones).

    It calls the registered operators ``fwd`` and ``bwd``. Its inputs are those of ``fwd``. It returns (y, pre): pre is
    the activation before the output gates, which the backward needs, or an empty tensor if it was not kept.
    """

    tensors = 7  # x, weight, bias, and log_alpha and seed of the input and the output gate

    @staticmethod
    def plain(*inputs: Any) -> tuple[Tensor, Tensor]:
        return reference.gated_linear(*inputs[:9]), inputs[0].new_empty(0)

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return fwd(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pre = output[1]
        ctx.mark_non_differentiable(pre)
        ctx.constants = inputs[7:]
        ctx.save_for_backward(*inputs[:7], pre)

    @staticmethod
    def fused(ctx: Any, dy: Tensor, _: Any) -> Any:
        tensors, (spec, per_sample, _) = ctx.saved_tensors, ctx.constants
        x, weight, pre = tensors[0], tensors[1], tensors[-1]
        needs = list(ctx.needs_input_grad[:5])
        if needs[4] and pre.numel() != dy.numel() and (per_sample or gates_activations(x, weight)):
            raise RuntimeError(
                "the activation before the output gate was not kept: requires_grad of output_gate changed since the "
                "forward"
            )
        grads = bwd(dy, *tensors, spec, per_sample, needs)
        return (*wanted(grads, needs), None, None, None, None, None)


class _PlannedLinear(Planned):
    """The autograd function that calls a backend directly, with the plan (route) that the forward chose."""

    tensors = 7

    @staticmethod
    def plain(*inputs: Any) -> Tensor:
        *given, plan = inputs
        return reference.gated_linear(*(*given, plan.spec, plan.per_sample))

    @staticmethod
    def by_operators(ctx: Any, dy: Tensor) -> Any:
        (*inputs, pre), needs, plan = ctx.saved_tensors, ctx.needs_input_grad[:5], ctx.constants[0]
        pre = dy.new_empty(0) if pre is None or plan.route == "fold" else pre
        return (*wanted(bwd(dy, *inputs, pre, plan.spec, plan.per_sample, needs), needs), None, None, None)


class _SmallLinear(_PlannedLinear):
    """As :class:`_PlannedLinear`, for tiny layers. It is a class of its own so that profilers show which route a call
    took.
    """


_apply_planned = _PlannedLinear.apply_at_once
_apply_small = _SmallLinear.apply_at_once


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gates: GatePair) -> Tensor:
    """y (..., N) = z_out * ((x * z_in) W^T + b), differentiable.

    x: (..., K); weight: (N, K); bias: (N,) or None. Rows and columns of closed gates are left out of the product where
    that is faster.

    It does not check its arguments; :func:`dampr.functional.gated_linear` does.
    """
    in_la, out_la, in_seed, out_seed, spec, per_sample = gates
    if not needs_dispatcher((x, weight, bias, in_la, out_la)):
        backend = select(x.device, x.dtype)
        if hasattr(backend, "plan_linear"):
            learns = out_la is not None and out_la.requires_grad and torch.is_grad_enabled()
            plan = backend.plan_linear(x, weight, in_la, out_la, in_seed, out_seed, spec, per_sample, learns)
            if plan.looks:
                work, forced = x.numel() * weight.shape[0], plan.route == "live"
                part = among_open(x, weight, bias, gates, work, whole_linear, None, forced, backend.skip_closed)
                if part is not None:
                    return part
            node = _apply_small if plan.route == "small" else _apply_planned
            y: Tensor = node(x, weight, bias, in_la, out_la, in_seed, out_seed, plan)
            return y
    part = on_open_gates(x, weight, bias, gates, x.numel() * weight.shape[0], whole_linear)
    return whole_linear(x, weight, bias, gates) if part is None else part


def whole_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gates: GatePair) -> Tensor:
    """What :func:`gated_linear` computes, in one operator each for forward and backward, with closed gates multiplied
    too.
    """
    out_la = gates.output_log_alpha
    learns = out_la is not None and out_la.requires_grad and torch.is_grad_enabled()
    keep_pre = learns and (gates.per_sample or gates_activations(x, weight))
    y: Tensor = apply(_GatedLinear, x, weight, bias, *gates, keep_pre)[0]
    return y
