"""Gates of rows and columns multiplied into a weight, and their gradients from that of the product: ``folds.h`` of csrc."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dampr import _C  # type: ignore[attr-defined]
from dampr.ops.gate_args import GatePair, Maybe

from . import host
from .gates import draw, fold, sample_gates_bwd
from .host import CODES, ptr


def fold_weight_fwd(weight: Tensor, bias: Maybe, gates: GatePair, dtype: torch.dtype, passing: bool = False) -> tuple[Tensor, Maybe]:
    """(z_out W z_in, z_out b) in ``dtype``; ``passing`` as in :func:`.host.new`."""
    z_in, z_out = draw(gates.input), draw(gates.output)
    if bias is not None:
        bias = (bias if z_out is None else bias * z_out).to(dtype)
    if z_in is None and z_out is None:
        return weight.to(dtype), bias
    return fold(weight, z_out, z_in, host.new(weight.shape, dtype, passing)), bias


def fold_weight_bwd(raw: Tensor, raw_bias: Maybe, weight: Tensor, bias: Maybe, gates: GatePair, needs: Sequence[bool]) -> tuple[Maybe, ...]:
    """Gradients of weight, bias and both log-alphas from those of the folded weight and bias, ``raw`` (N, K) and ``raw_bias`` (N,)."""
    return ungate(raw, raw_bias, weight, bias, gates, needs)[:4]


def ungate(
    raw: Tensor,
    raw_bias: Maybe,
    weight: Tensor,
    bias: Maybe,
    gates: GatePair,
    needs: Sequence[bool],
    *,
    fold: bool = False,
    in_place: bool = False,
) -> tuple[Maybe, ...]:
    """:func:`fold_weight_bwd` in one pass over raw and W and, if asked to ``fold``, z_out W z_in from the same pass where dtypes allow.

    ``in_place``: the weight's gradient may take the place of ``raw``.
    """
    need_w, need_b, need_in, need_out = needs
    z_in, z_out = draw(gates.input), draw(gates.output)
    db = din = dout = None
    if need_b and bias is not None and raw_bias is not None:
        db = (raw_bias if z_out is None else raw_bias * z_out).to(bias.dtype)
    if z_in is None and z_out is None:
        return raw.to(weight.dtype), db, None, None, weight.to(raw.dtype)
    raw, weight = raw.contiguous(), weight.contiguous()
    dw = host.product(raw, weight, in_place) if need_w else None
    folded = host.new(weight.shape, weight.dtype, passing=True) if fold and raw.dtype == weight.dtype else None
    dz_in = torch.empty_like(z_in) if need_in and z_in is not None else None
    dz_out = torch.empty_like(z_out) if need_out and z_out is not None else None
    args = *map(ptr, (raw, weight)), *weight.shape, *map(ptr, (z_out, z_in, dw, dz_out, dz_in))
    _C.fold_bwd(CODES[raw.dtype], CODES[weight.dtype], *args, torch.get_num_threads(), ptr(folded))
    if dz_in is not None and gates.input is not None:
        din = sample_gates_bwd(dz_in, gates.input, None)
    if dz_out is not None and gates.output is not None:
        if bias is not None and raw_bias is not None:
            dz_out += bias * raw_bias
        dout = sample_gates_bwd(dz_out, gates.output, None)
    return dw, db, din, dout, folded
