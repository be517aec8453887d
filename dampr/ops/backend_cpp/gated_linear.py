"""Gates on features: the whole layer in one call where it is tiny, else in the weight or on the activations."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dampr.ops import routes
from dampr.ops.gate_args import GatePair, Maybe, gate_dtype
from dampr.ops.library import gates_activations, rows_of
from dampr.spec import SAMPLE

from . import products, small_linear
from .fold_weight import fold_weight_fwd, ungate
from .gates import draw, gate_rows, gate_rows_bwd
from .routes import route


def gated_linear_fwd(x: Tensor, weight: Tensor, bias: Maybe, gates: GatePair, keep_pre: bool) -> tuple[Tensor, Tensor]:
    if small_linear.takes(x, weight, *gates[:2], gates.spec):
        y, pre = small_linear.fwd(x, weight, bias, *gates, keep_pre)
        return y, x.new_empty(0) if pre is None else pre
    drawn = gates.spec.rule == SAMPLE
    if routes.forced_name() is not None:  # raises where it cannot serve this call
        granularity, same = "input" if gates.output_log_alpha is None else "output", x.dtype == weight.dtype
        n, k = weight.shape
        route(x.shape[:-1].numel(), n, k, x.dtype, granularity, gates.per_sample, drawn=drawn and same)
    nothing = x.new_empty(0)
    if not (gates.per_sample or gates_activations(x, weight)):
        return products.linear(x, *fold_weight_fwd(weight, bias, gates, x.dtype, passing=True), drawn), nothing
    if gates.input is not None:
        x = gate_rows(rows_of(x), gates.input).view(x.shape)
    pre = products.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), drawn)
    if gates.output is None:
        return pre, nothing
    y = gate_rows(rows_of(pre), gates.output).view(pre.shape)
    return y, pre if keep_pre else nothing


def gated_linear_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Maybe, gates: GatePair, pre: Tensor, needs: Sequence[bool]
) -> tuple[Maybe, ...]:
    if small_linear.takes(x, weight, *gates[:2], gates.spec):
        return tuple(small_linear.bwd(dy, x, weight, bias, *gates[:4], pre if pre.numel() else None, *gates[4:], needs))
    rows, dy = rows_of(x), rows_of(dy)
    kept = pre.numel() == dy.numel()  # a forward that was compiled for all sizes keeps nothing
    if gates.per_sample or (gates_activations(x, weight) and (kept or not needs[4])):
        # Without a gradient of its own the output gate needs no activation; dy stands in for it, unread.
        before = rows_of(pre) if kept else dy
        dx, *others = _bwd_on_activations(dy, rows, weight, bias, gates, before, needs)
    else:
        dx, *others = bwd_fold(dy, rows, weight, bias, gates, needs)
    return None if dx is None else dx.view(x.shape), *others


def bwd_fold(dy: Tensor, x: Tensor, weight: Tensor, bias: Maybe, gates: GatePair, needs: Sequence[bool]) -> tuple[Maybe, ...]:
    need_x, need_w, need_b, need_in, need_out = needs
    sum_dy = dy.sum(0, dtype=gate_dtype(x)) if bias is not None and (need_b or need_out) else None
    if not (need_w or need_in or need_out):
        z_out = draw(gates.output) if need_b else None
        db = None if sum_dy is None or bias is None else (sum_dy if z_out is None else sum_dy * z_out).to(bias.dtype)
        dx = products.to_inputs(dy, fold_weight_fwd(weight, None, gates, x.dtype, passing=True)[0]) if need_x else None
        return dx, None, db, None, None
    raw = products.to_weight(dy, x, passing=True)  # (N, K): the weight gradient of the dense layer
    *grads, folded = ungate(raw, sum_dy, weight, bias, gates, needs[1:], fold=need_x, in_place=True)
    if need_x and folded is None:
        folded, _ = fold_weight_fwd(weight, None, gates, x.dtype, passing=True)
    return None if folded is None or not need_x else products.to_inputs(dy, folded), *grads


def _bwd_on_activations(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Maybe, gates: GatePair, pre: Tensor, needs: Sequence[bool]
) -> tuple[Maybe, ...]:
    need_x, need_w, need_b, need_in, need_out = needs
    dx = dw = din = dout = None
    if gates.output is not None:
        grads = gate_rows_bwd(pre, dy, gates.output, dx=True, xz=False, dlog_alpha=need_out, passing=True)
        assert grads.dx is not None
        dy, dout = grads.dx, grads.dlog_alpha
    db = dy.sum(0).to(bias.dtype) if need_b and bias is not None else None
    back = products.to_inputs(dy, weight.to(x.dtype)) if need_x or need_in else None
    xz: Maybe = x
    if gates.input is None:
        dx = back
    elif back is not None:
        dx, xz, din = gate_rows_bwd(x, back, gates.input, dx=need_x, xz=need_w, dlog_alpha=need_in, in_place=True)
    elif need_w:
        xz = gate_rows(x, gates.input)
    if need_w and xz is not None:
        dw = products.to_weight(dy, xz, passing=gates.output is None).to(weight.dtype)
    return dx, dw, db, din, dout
