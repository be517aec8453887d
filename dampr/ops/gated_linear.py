"""y = z_out * ((x * z_in) W^T + b), gates per batch or per sample, as one op forward and one op backward."""

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
    gates = GatePair.of(in_la, out_la, in_seed, out_seed, spec, per_sample)
    y, pre = select(x.device, x.dtype).gated_linear_fwd(x, weight, bias, gates, keep_pre)
    # autograd lets nobody change a view in place
    return as_no_view(y, y.shape) if is_view(y) else y, pre


def _fwd_fake(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
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
    gates = GatePair.of(in_la, out_la, in_seed, out_seed, spec, per_sample)
    grads: tuple[Tensor | None, ...] = select(x.device, x.dtype).gated_linear_bwd(
        dy, x, weight, bias, gates, pre, needs
    )
    return grads


def _bwd_fake(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
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
    """What the dense layer costs: gates are not counted."""
    return 2 * math.prod(x_shape) * int(weight_shape[0])


@register_flop_formula(torch.ops.dampr.gated_linear_bwd)
def _bwd_flops(dy_shape: Any, x_shape: Any, weight_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Two products where both gradients are wanted; the shapes of unwanted ones are empty."""
    wanted = sum(math.prod(shape) > 0 for shape in (out_shape[0], out_shape[1]))
    return 2 * math.prod(x_shape) * int(weight_shape[0]) * wanted


class _GatedLinear(Node):
    tensors = 7

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
    """A tiny layer, of which calls take the time."""


_apply_planned = _PlannedLinear.apply_at_once
_apply_small = _SmallLinear.apply_at_once


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gates: GatePair) -> Tensor:
    """Differentiable gated linear map; arguments are taken as checked (:func:`dampr.functional.gated_linear`
    checks).
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
    """The same in one operator each way, whatever is closed."""
    out_la = gates.output_log_alpha
    learns = out_la is not None and out_la.requires_grad and torch.is_grad_enabled()
    keep_pre = learns and (gates.per_sample or gates_activations(x, weight))
    y: Tensor = apply(_GatedLinear, x, weight, bias, *gates, keep_pre)[0]
    return y
