"""A tiny layer in one call each way, products included (``small.h`` of csrc).

Calls are what takes its time, those of Python too, so every argument is written out here: lists and loops over them cost as much as the
arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dampr import _C  # type: ignore[attr-defined]
from dampr.ops import routes
from dampr.ops.gate_args import Maybe
from dampr.spec import SAMPLE, GateSpec

from .host import CODES
from .routes import is_small


def takes(x: Tensor, weight: Tensor, in_la: Maybe, out_la: Maybe, spec: GateSpec) -> bool:
    """Whether the layer is computed so. Not without gates that are drawn, where the layer is the dense one to the bit."""
    forced = routes.forced_name()
    N, K = weight.shape
    return (
        (is_small(x.numel() // max(K, 1), N, K) if forced is None else forced == "small")
        and spec.rule == SAMPLE
        and (in_la is not None or out_la is not None)
        and (dtype := x.dtype) == weight.dtype
        and (dtype == torch.float32 or dtype == torch.float64)
    )


def fwd(
    x: Tensor,
    weight: Tensor,
    bias: Maybe,
    in_la: Maybe,
    out_la: Maybe,
    in_seed: Maybe,
    out_seed: Maybe,
    spec: GateSpec,
    per_sample: bool,
    keep_pre: bool,
) -> tuple[Tensor, Maybe]:
    """y, and what is kept: with ``keep_pre`` y before the output gates."""
    N, K = weight.shape
    y = x.new_empty((*x.shape[:-1], N))
    pre = torch.empty_like(y) if keep_pre else None
    x, weight = x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    in_la = None if in_la is None else in_la.contiguous()
    out_la = None if out_la is None else out_la.contiguous()
    _C.small_fwd(
        spec,
        CODES[x.dtype],
        x.numel() // K if K else y.numel() // max(N, 1),
        N,
        K,
        x.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if in_la is None else in_la.data_ptr(),
        0 if out_la is None else out_la.data_ptr(),
        0 if in_seed is None else in_seed.data_ptr(),
        0 if out_seed is None else out_seed.data_ptr(),
        per_sample,
        y.data_ptr(),
        0 if pre is None else pre.data_ptr(),
    )
    return y, pre


def bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Maybe,
    in_la: Maybe,
    out_la: Maybe,
    in_seed: Maybe,
    out_seed: Maybe,
    pre: Maybe,
    spec: GateSpec,
    per_sample: bool,
    needs: Sequence[bool],
) -> tuple[Maybe, ...]:
    """The gradients of x, weight, bias and both gates, those that are needed; a ``pre`` that was not kept is computed again."""
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
        spec,
        CODES[x.dtype],
        x.numel() // K if K else dy.numel() // max(N, 1),
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
        per_sample,
        0 if pre is None else pre.data_ptr(),
        0 if dx is None else dx.data_ptr(),
        0 if dweight is None else dweight.data_ptr(),
        0 if dbias is None else dbias.data_ptr(),
        0 if din is None else din.data_ptr(),
        0 if dout is None else dout.data_ptr(),
    )
    return dx, dweight, dbias, din, dout
