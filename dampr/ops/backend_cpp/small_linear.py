"""A tiny layer in one call for the forward and one for the backward, products included: ``small.h`` of csrc.

Calls take most of its time, also calls in Python. So every argument is written out: lists and loops over arguments take
as long as the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dampr import _C  # type: ignore[attr-defined]
from dampr.ops.plan import Plan

from .host import CODES


def fwd(
    plan: Plan,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_la: Tensor | None,
    out_la: Tensor | None,
    in_seed: Tensor | None,
    out_seed: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """(y, what is kept for the backward): y before the output gates if the plan keeps it, else None."""
    N, K = weight.shape
    y = x.new_empty((*x.shape[:-1], N))
    pre = torch.empty_like(y) if plan.keep else None
    x, weight = x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    in_la = None if in_la is None else in_la.contiguous()
    out_la = None if out_la is None else out_la.contiguous()
    _C.small_fwd(
        plan.spec,
        CODES[x.dtype],
        plan.rows,
        N,
        K,
        x.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if in_la is None else in_la.data_ptr(),
        0 if out_la is None else out_la.data_ptr(),
        0 if in_seed is None else in_seed.data_ptr(),
        0 if out_seed is None else out_seed.data_ptr(),
        plan.per_sample,
        y.data_ptr(),
        0 if pre is None else pre.data_ptr(),
    )
    return y, pre


def bwd(plan: Plan, dy: Tensor, tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight, bias and both log_alphas, those that ``needs`` asks for.

    If y before the output gates was not kept, it is computed again.
    """
    x, weight, bias, in_la, out_la, in_seed, out_seed, pre = tensors
    assert x is not None
    assert weight is not None
    N, K = weight.shape
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    in_la = None if in_la is None else in_la.contiguous()
    out_la = None if out_la is None else out_la.contiguous()
    dx = torch.empty_like(x) if needs[0] else None
    dweight = torch.empty_like(weight) if needs[1] else None
    dbias = torch.empty_like(bias) if needs[2] and bias is not None else None
    din = torch.empty_like(in_la) if needs[3] and in_la is not None else None
    dout = torch.empty_like(out_la) if needs[4] and out_la is not None else None
    _C.small_bwd(
        plan.spec,
        CODES[x.dtype],
        plan.rows,
        N,
        K,
        dy.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if in_la is None else in_la.data_ptr(),
        0 if out_la is None else out_la.data_ptr(),
        0 if in_seed is None else in_seed.data_ptr(),
        0 if out_seed is None else out_seed.data_ptr(),
        plan.per_sample,
        0 if pre is None else pre.data_ptr(),
        0 if dx is None else dx.data_ptr(),
        0 if dweight is None else dweight.data_ptr(),
        0 if dbias is None else dbias.data_ptr(),
        0 if din is None else din.data_ptr(),
        0 if dout is None else dout.data_ptr(),
    )
    return dx, dweight, dbias, din, dout
