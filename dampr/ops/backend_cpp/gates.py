"""Gates drawn by themselves, and in the same pass multiplied into activations: ``rows.h`` of csrc."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dampr import _C  # type: ignore[attr-defined]
from dampr.ops.gate_args import GateArgs, Maybe

from .fold_weight import fold_into, unfold
from .host import CODES, new, ptr


def sample_gates_fwd(gate: GateArgs, rows: int | None, start: int = 0) -> Tensor:
    log_alpha = gate.log_alpha.contiguous()
    n = log_alpha.numel()
    z = log_alpha.new_empty(n if rows is None else (rows, n))
    sizes = 1 if rows is None else rows, n
    _C.gates_fwd(gate.spec, CODES[z.dtype], ptr(log_alpha), ptr(gate.seed), *sizes, ptr(z), torch.get_num_threads(), start)
    return z


def sample_gates_bwd(dz: Tensor, gate: GateArgs, rows: int | None, start: int = 0) -> Tensor:
    log_alpha = gate.log_alpha.contiguous()
    dz, out = dz.to(log_alpha.dtype).contiguous(), torch.empty_like(log_alpha)
    sizes = 1 if rows is None else rows, log_alpha.numel()
    _C.gates_bwd(gate.spec, CODES[out.dtype], ptr(log_alpha), ptr(gate.seed), *sizes, ptr(dz), ptr(out), torch.get_num_threads(), start)
    return out


def draw(gate: GateArgs | None) -> Maybe:
    """One draw for all rows, or None."""
    return None if gate is None else sample_gates_fwd(gate, None)


def gate_rows(x: Tensor, gate: GateArgs) -> Tensor:
    """x * z; x: (M, n)."""
    if not gate.per_sample:
        if not x.is_contiguous():  # a product with the strides of x keeps the path of the GEMM, and so its rounding, as in the dense layer
            return (x * sample_gates_fwd(gate, None)).to(x.dtype)
        (rows, n), out = x.shape, torch.empty_like(x)
        fold_into(out, x, None, gate.on_columns(), rows, n)
        return out
    x, log_alpha = x.contiguous(), gate.log_alpha.contiguous()
    out = torch.empty_like(x)
    _C.gate_rows_fwd(gate.spec, CODES[x.dtype], ptr(x), *x.shape, ptr(log_alpha), ptr(gate.seed), ptr(out), torch.get_num_threads())
    return out


class RowGrads(NamedTuple):
    """g * z, x * z and dlog_alpha = sum_m x g z'; None where not asked for."""

    dx: Maybe
    xz: Maybe
    dlog_alpha: Maybe


def gate_rows_bwd(
    x: Tensor, g: Tensor, gate: GateArgs, *, dx: bool, xz: bool, dlog_alpha: bool, in_place: bool = False, passing: bool = False
) -> RowGrads:
    """For the gradient g of x * z, both (M, n): whichever is asked for, from one redraw.

    ``in_place``: dx may take the place of g; ``passing``: dx is used up before the next such (:func:`.host.new`).
    """
    x, g, log_alpha = x.contiguous(), g.contiguous(), gate.log_alpha.contiguous()
    threads, gated = torch.get_num_threads(), (g if in_place else new(x.shape, x.dtype, passing)) if dx else None
    if gate.per_sample:
        out = RowGrads(gated, torch.empty_like(x) if xz else None, torch.empty_like(log_alpha) if dlog_alpha else None)
        _C.gate_rows_bwd(gate.spec, CODES[x.dtype], ptr(x), ptr(g), *x.shape, ptr(log_alpha), ptr(gate.seed), *map(ptr, out), threads)
        return out
    product = torch.empty_like(x) if xz else None
    if gated is None and product is None and not dlog_alpha:
        return RowGrads(None, None, None)
    rows, n = x.shape
    _, grad, _ = unfold(g, None, x, None, gate.on_columns(), rows, n, (False, False, dlog_alpha, False), gated, product)
    return RowGrads(gated, product, grad)
