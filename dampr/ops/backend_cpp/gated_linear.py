"""Linear layers with gates on features: a tiny layer in one call, others with the gates in the weight or on the
activations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dampr.ops import routes
from dampr.ops.gate_args import GateArgs, GatePair
from dampr.ops.plan import Plan
from dampr.ops.skip_closed import WORK
from dampr.spec import SAMPLE, GateSpec

from . import host, products, small_linear
from .fold_weight import fold_into, fold_weight_fwd, unfold
from .gates import draw, gate_rows, gate_rows_bwd
from .routes import decide


def plan_linear(
    x: Tensor,
    weight: Tensor,
    in_la: Tensor | None,
    out_la: Tensor | None,
    in_seed: Tensor | None,
    out_seed: Tensor | None,
    spec: GateSpec,
    per_sample: bool,
    learns: bool,
) -> Plan:
    """The plan of a call; ``learns``: whether the output gates need a gradient.

    Raises: ValueError if a forced route cannot serve the call.
    """
    N, K = weight.shape
    M = x.numel() // K if K else x.shape[:-1].numel()
    dtype, drawn = x.dtype, spec.rule == SAMPLE
    forced = routes.stack[-1][0] if routes.stack else None
    route = decide(
        forced, M, N, K, dtype, "input" if out_la is None else "output", per_sample, drawn and dtype == weight.dtype
    )
    way, gated = route, in_la is not None or out_la is not None
    if route == "live" or (route == "small" and not gated):  # without gates the layer is the dense one to the bit
        way = "activations" if routes.are_smaller(M, N, K) else "fold"
    looks = gated and not per_sample and (M * N * K >= WORK if forced is None else forced == "live")
    keep = learns and (per_sample or way == "activations")
    onednn = way != "small" and products.by_onednn(M, N, K, dtype)
    return Plan(route, *WAYS[way], spec, M, per_sample, keep, onednn, drawn, looks)


def gated_linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, gates: GatePair, keep_pre: bool
) -> tuple[Tensor, Tensor]:
    """Implementation of the operator: (y, y before the output gates if ``keep_pre``, else an empty tensor)."""
    plan = plan_linear(x, weight, *gates, False)._replace(keep=keep_pre)
    y, pre = plan.forward(plan, x, weight, bias, *gates[:4])
    return y, x.new_empty(0) if pre is None else pre


def gated_linear_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gates: GatePair, pre: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Implementation of the operator's backward: the gradients of x, weight, bias and both log_alphas."""
    plan = plan_linear(x, weight, *gates, False)
    kept = pre.numel() == dy.numel()  # a forward that was compiled for all sizes keeps nothing
    if plan.backward is bwd_on_activations and needs[4] and not (kept or gates.per_sample):
        plan = plan._replace(backward=bwd_fold)
    grads: tuple[Tensor | None, ...] = plan.backward(
        plan, dy, (x, weight, bias, *gates[:4], pre if kept and pre.numel() else None), needs
    )
    return grads


def fwd_fold(
    plan: Plan,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_la: Tensor | None,
    out_la: Tensor | None,
    in_seed: Tensor | None,
    out_seed: Tensor | None,
) -> tuple[Tensor, None]:
    """(y, None), with the gates multiplied into the weight."""
    if in_la is None and out_la is None:
        folded, gated_bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    else:
        folded = host.scratch.views[weight.shape, None, x.dtype]
        gates = GatePair(in_la, out_la, in_seed, out_seed, plan.spec)
        gated_bias = fold_into(folded, weight.contiguous(), bias, gates, *weight.shape)
    return products.linear(x, folded, gated_bias, plan.onednn and plan.drawn), None


def bwd_fold(
    plan: Plan, dy: Tensor, tensors: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight, bias and both log_alphas, with the gates multiplied into the weight."""
    x, weight, bias, in_la, out_la, in_seed, out_seed, *_ = tensors
    assert x is not None
    assert weight is not None
    need_x, need_w, need_b, need_in, need_out = needs[:5]
    gates, (n_out, n_in) = GatePair(in_la, out_la, in_seed, out_seed, plan.spec), weight.shape
    rows, dy = (x, dy) if x.dim() == 2 else (x.reshape(plan.rows, n_in), dy.reshape(plan.rows, n_out))
    raw_bias = dy.sum(0, dtype=host.WIDE[x.dtype]) if bias is not None and (need_b or need_out) else None
    folded = dw = db = din = dout = None
    if need_w or need_in or need_out:
        raw = products.to_weight(
            dy, rows, plan.onednn, in_scratch=True
        )  # (N, K): the weight gradient of the dense layer
        if in_la is None and out_la is None:
            dw, db = raw.to(weight.dtype), None if raw_bias is None or bias is None else raw_bias.to(bias.dtype)
        else:
            raw, weight = raw.contiguous(), weight.contiguous()
            same = raw.dtype == weight.dtype
            if need_w:
                # over ``raw`` where it fits, so that no new memory is touched
                dw = raw if same else torch.empty_like(weight)
            folded = host.scratch.views[weight.shape, None, weight.dtype] if need_x and same else None
            db, din, dout = unfold(raw, raw_bias, weight, bias, gates, n_out, n_in, needs[1:5], dw, folded)
    elif raw_bias is not None and bias is not None:
        z_out = draw(gates.output)
        db = (raw_bias if z_out is None else raw_bias * z_out).to(bias.dtype)
    if not need_x:
        return None, dw, db, din, dout
    if folded is None:
        folded, _ = fold_weight_fwd(weight, None, gates, x.dtype, in_scratch=True)
    return products.to_inputs(dy, folded, plan.onednn).view(x.shape), dw, db, din, dout


def fwd_on_activations(
    plan: Plan,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_la: Tensor | None,
    out_la: Tensor | None,
    in_seed: Tensor | None,
    out_seed: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """(y, y before the output gates if the plan keeps it), with the gates multiplied into x and y."""
    n_out, n_in = weight.shape
    if in_la is not None:
        rows = x if x.dim() == 2 else x.reshape(plan.rows, n_in)
        x = gate_rows(rows, GateArgs(in_la, in_seed, plan.spec, plan.per_sample)).view(x.shape)
    pre = products.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), plan.onednn and plan.drawn)
    if out_la is None:
        return pre, None
    rows = pre if pre.dim() == 2 else pre.reshape(plan.rows, n_out)
    return gate_rows(rows, GateArgs(out_la, out_seed, plan.spec, plan.per_sample)).view(
        pre.shape
    ), pre if plan.keep else None


def bwd_on_activations(
    plan: Plan, dy: Tensor, tensors: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight, bias and both log_alphas, with the gates multiplied into x and y."""
    x, weight, bias, in_la, out_la, in_seed, out_seed, pre = tensors
    assert x is not None
    assert weight is not None
    need_x, need_w, need_b, need_in, need_out = needs[:5]
    n_out, n_in = weight.shape
    rows, dy = (x, dy) if x.dim() == 2 else (x.reshape(plan.rows, n_in), dy.reshape(plan.rows, n_out))
    dx = dw = din = dout = None
    if out_la is not None:
        # if the output gate needs no gradient, ``pre`` was not kept; ``dy`` takes its place and is not read
        before = dy if pre is None else pre.reshape(dy.shape)
        gate = GateArgs(out_la, out_seed, plan.spec, plan.per_sample)
        gated, _, dout = gate_rows_bwd(before, dy, gate, dx=True, xz=False, dlog_alpha=need_out, in_scratch=True)
        assert gated is not None
        dy = gated
    db = dy.sum(0).to(bias.dtype) if need_b and bias is not None else None
    back = products.to_inputs(dy, weight.to(x.dtype), plan.onednn) if need_x or need_in else None
    xz: Tensor | None = rows
    if in_la is None:
        dx = back
    else:
        gate = GateArgs(in_la, in_seed, plan.spec, plan.per_sample)
        if back is not None:
            dx, xz, din = gate_rows_bwd(rows, back, gate, dx=need_x, xz=need_w, dlog_alpha=need_in, in_place=True)
        elif need_w:
            xz = gate_rows(rows, gate)
    if need_w and xz is not None:
        dw = products.to_weight(dy, xz, plan.onednn, in_scratch=out_la is None).to(weight.dtype)
    return None if dx is None else dx.view(x.shape), dw, db, din, dout


WAYS = {
    "small": (small_linear.fwd, small_linear.bwd),
    "fold": (fwd_fold, bwd_fold),
    "activations": (fwd_on_activations, bwd_on_activations),
    "passes": (fwd_on_activations, bwd_on_activations),
}
