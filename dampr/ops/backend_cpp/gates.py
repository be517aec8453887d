"""Draw gates, alone or while activations are multiplied by them: calls of ``rows.h`` in csrc."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dampr import _C  # type: ignore[attr-defined]
from dampr.ops.gate_args import GateArgs

from .host import CODES, scratch


def sample_gates_fwd(gate: GateArgs, rows: int | None, start: int = 0) -> Tensor:
    """Gate values, (n,) or (rows, n); the noise of the first gate has the index ``start``."""
    log_alpha = gate.log_alpha.contiguous()
    n = log_alpha.numel()
    z = log_alpha.new_empty(n if rows is None else (rows, n))
    seed, sizes = 0 if gate.seed is None else gate.seed.data_ptr(), (1 if rows is None else rows, n)
    args = log_alpha.data_ptr(), seed, *sizes, z.data_ptr(), torch.get_num_threads(), start
    _C.gates_fwd(gate.spec, CODES[z.dtype], *args)
    return z


def sample_gates_bwd(dz: Tensor, gate: GateArgs, rows: int | None, start: int = 0) -> Tensor:
    """dlog_alpha, (n,), for the gradient ``dz`` of the values."""
    log_alpha = gate.log_alpha.contiguous()
    dz, out = dz.to(log_alpha.dtype).contiguous(), torch.empty_like(log_alpha)
    seed, sizes = 0 if gate.seed is None else gate.seed.data_ptr(), (1 if rows is None else rows, log_alpha.numel())
    args = log_alpha.data_ptr(), seed, *sizes, dz.data_ptr(), out.data_ptr(), torch.get_num_threads(), start
    _C.gates_bwd(gate.spec, CODES[out.dtype], *args)
    return out


def draw(gate: GateArgs | None) -> Tensor | None:
    """The values of gates with one draw for all rows, (n,); None without gates."""
    return None if gate is None else sample_gates_fwd(gate, None)


def gate_rows(x: Tensor, gate: GateArgs) -> Tensor:
    """x * z in the dtype of x; x: (M, n), z: (n,) or drawn for each row."""
    log_alpha = gate.log_alpha.contiguous()
    seed = 0 if gate.seed is None else gate.seed.data_ptr()
    code = CODES[x.dtype]
    if not gate.per_sample:
        # keep the strides of x, because the GEMM chooses its path, and so its rounding, by them; a fresh layer must
        # equal the dense one to the bit
        if not x.is_contiguous():
            return (x * sample_gates_fwd(gate, None)).to(x.dtype)
        out = torch.empty_like(x)
        args = code, code, x.data_ptr(), 0, *x.shape, 0, log_alpha.data_ptr(), 0, seed, out.data_ptr(), 0
        _C.fold_gates_fwd(gate.spec, *args, torch.get_num_threads())
        return out
    x = x.contiguous()
    out = torch.empty_like(x)
    args = x.data_ptr(), *x.shape, log_alpha.data_ptr(), seed, out.data_ptr()
    _C.gate_rows_fwd(gate.spec, code, *args, torch.get_num_threads())
    return out


class RowGrads(NamedTuple):
    """g * z, x * z and dlog_alpha = sum_m x g z'; None where not asked for."""

    dx: Tensor | None
    xz: Tensor | None
    dlog_alpha: Tensor | None


def gate_rows_bwd(
    x: Tensor,
    g: Tensor,
    gate: GateArgs,
    *,
    dx: bool,
    xz: bool,
    dlog_alpha: bool,
    in_place: bool = False,
    in_scratch: bool = False,
) -> RowGrads:
    """The backward of y = x * z, given the gradient g of y, both (M, n): g * z (the gradient of x), x * z and
    dlog_alpha, those that are asked for.

    The gates are drawn once more. ``in_place``: g * z may be written over g. ``in_scratch``: it is in
    :data:`.host.scratch`.
    """
    x, g, log_alpha = x.contiguous(), g.contiguous(), gate.log_alpha.contiguous()
    gated = product = grad = None
    if dx:
        gated = g if in_place else scratch.views[x.shape, None, x.dtype] if in_scratch else torch.empty_like(x)
    if xz:
        product = torch.empty_like(x)
    if dlog_alpha:
        grad = torch.empty_like(log_alpha)
    out = RowGrads(gated, product, grad)
    to_dx, to_xz = 0 if gated is None else gated.data_ptr(), 0 if product is None else product.data_ptr()
    to_grad, seed = 0 if grad is None else grad.data_ptr(), 0 if gate.seed is None else gate.seed.data_ptr()
    code, at, g_at = CODES[x.dtype], x.data_ptr(), g.data_ptr()
    (rows, n), la, threads = x.shape, log_alpha.data_ptr(), torch.get_num_threads()
    if gate.per_sample:
        _C.gate_rows_bwd(gate.spec, code, at, g_at, rows, n, la, seed, to_dx, to_xz, to_grad, threads)
    elif dx or xz or dlog_alpha:
        args = code, code, g_at, 0, at, 0, rows, n, 0, la, 0, seed, to_dx, 0, 0, to_grad, to_xz
        _C.fold_gates_bwd(gate.spec, *args, threads)
    return out
