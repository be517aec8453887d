"""The CPU backend: gates in C++ (:mod:`dampr._C`, raw pointers), matrix products by torch's own GEMM.

Per batch the gates are folded into the weight, one pass before the GEMM and one pass over the raw weight gradient after it. Per sample
they are drawn while the activations are multiplied, and drawn again in the backward. Derivations: docs/kernels.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from dampr import _C  # type: ignore[attr-defined]
from dampr.spec import GateSpec

from . import routes
from .library import choose_activations, gates_activations, rows_of

_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why this backend cannot run tensors of this device and dtype, or None."""
    if device.type != "cpu":
        return f"it runs on cpu tensors, not on {device.type}"
    if dtype not in _CODES:
        return f"it takes float32, float64, bfloat16 and float16, not {dtype}"
    return None


def describe() -> str:
    """The instruction set in use."""
    return f"instruction set {_C.isa()}"


def route(M: int, N: int, K: int, dtype: torch.dtype, granularity: str | tuple[int, int], per_sample: bool) -> tuple[str, str]:
    """(name, reason) of the route of x (M, K) through W (N, K); names as in :mod:`.routes`. Raises ValueError for a forced one it lacks."""
    if granularity == "weight" or isinstance(granularity, tuple):
        routes.forced(("fold",), granularity, per_sample)
        return "fold", "one pass multiplies the gates into the weight, then torch's GEMM runs"
    if per_sample:
        routes.forced(("passes",), granularity, per_sample)
        return "passes", "every row has gates of its own: they are drawn while the activations are multiplied"
    if routes.forced(("fold", "activations"), granularity, per_sample) is not None:
        return str(routes.forced_name()), "forced by forced_route"
    if choose_activations(M, N, K):
        return (
            "activations",
            f"{M} rows are fewer than the {min(N, K)} of the weight's smaller side, so activations are smaller",
        )
    return "fold", f"{M} rows: the weight is the smaller operand, and one pass multiplies the gates into it"


def _gate_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _ptr(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _draw(log_alpha: Tensor | None, seed: Tensor | None, spec: GateSpec) -> Tensor | None:
    return None if log_alpha is None else sample_gates_fwd(log_alpha, seed, None, spec)


def sample_gates_fwd(log_alpha: Tensor, seed: Tensor | None, rows: int | None, spec: GateSpec) -> Tensor:
    log_alpha = log_alpha.contiguous()
    n = log_alpha.numel()
    z = log_alpha.new_empty(n if rows is None else (rows, n))
    _C.gates_fwd(spec, _CODES[z.dtype], _ptr(log_alpha), _ptr(seed), 1 if rows is None else rows, n, _ptr(z), torch.get_num_threads())
    return z


def sample_gates_bwd(dz: Tensor, log_alpha: Tensor, seed: Tensor | None, rows: int | None, spec: GateSpec) -> Tensor:
    log_alpha, dz = log_alpha.contiguous(), dz.to(log_alpha.dtype).contiguous()
    out = torch.empty_like(log_alpha)
    rows = 1 if rows is None else rows
    _C.gates_bwd(
        spec, _CODES[out.dtype], _ptr(log_alpha), _ptr(seed), rows, log_alpha.numel(), _ptr(dz), _ptr(out), torch.get_num_threads()
    )
    return out


def _over(raw: Tensor, like: Tensor) -> Tensor:
    """Where a product with gates goes: over the temporary ``raw`` it is made of, if dtypes allow, so that no new memory is touched."""
    return raw if raw.dtype == like.dtype else torch.empty_like(like)


def _fold(weight: Tensor, z_out: Tensor | None, z_in: Tensor | None, dtype: torch.dtype) -> Tensor:
    """weight * z_out[:, None] * z_in[None, :], rounded once to ``dtype``."""
    if z_out is None and z_in is None:
        return weight.to(dtype)
    weight = weight.contiguous()
    out = torch.empty(weight.shape, dtype=dtype)
    _C.fold_fwd(
        _CODES[weight.dtype], _CODES[dtype], _ptr(weight), *weight.shape, _ptr(z_out), _ptr(z_in), _ptr(out), torch.get_num_threads()
    )
    return out


def _gate_rows(x: Tensor, log_alpha: Tensor, seed: Tensor | None, spec: GateSpec, per_sample: bool) -> Tensor:
    """x * z, with a draw per row or one for all; x: (M, n)."""
    if not per_sample:
        z = sample_gates_fwd(log_alpha, seed, None, spec)
        # A product that keeps the strides of x keeps the path of the GEMM, and so its rounding, as in the dense layer.
        return _fold(x, None, z, x.dtype) if x.is_contiguous() else (x * z).to(x.dtype)
    x = x.contiguous()
    out = torch.empty_like(x)
    _C.gate_rows_fwd(spec, _CODES[x.dtype], _ptr(x), *x.shape, _ptr(log_alpha.contiguous()), _ptr(seed), _ptr(out), torch.get_num_threads())
    return out


class _RowGrads(NamedTuple):
    """g * z, x * z and dlog_alpha = sum_m x g z'; None where not asked for."""

    dx: Tensor | None
    xz: Tensor | None
    dlog_alpha: Tensor | None


def _gate_rows_bwd(
    x: Tensor,
    g: Tensor,
    log_alpha: Tensor,
    seed: Tensor | None,
    spec: GateSpec,
    per_sample: bool,
    *,
    dx: bool,
    xz: bool,
    dlog_alpha: bool,
    in_place: bool = False,
) -> _RowGrads:
    """For the gradient g of x * z, both (M, n): whichever is asked for, from one redraw; ``in_place``: dx may take the place of g."""
    x, g, log_alpha = x.contiguous(), g.contiguous(), log_alpha.contiguous()
    threads, gated = torch.get_num_threads(), (g if in_place else torch.empty_like(x)) if dx else None
    if per_sample:
        out = _RowGrads(gated, torch.empty_like(x) if xz else None, torch.empty_like(log_alpha) if dlog_alpha else None)
        _C.gate_rows_bwd(spec, _CODES[x.dtype], _ptr(x), _ptr(g), *x.shape, _ptr(log_alpha), _ptr(seed), *map(_ptr, out), threads)
        return out
    z = sample_gates_fwd(log_alpha, seed, None, spec)
    dz = torch.empty_like(z) if dlog_alpha else None
    if gated is not None or dz is not None:
        _C.fold_bwd(_CODES[g.dtype], _CODES[x.dtype], _ptr(g), _ptr(x), *x.shape, 0, _ptr(z), _ptr(gated), 0, _ptr(dz), threads)
    grad = None if dz is None else sample_gates_bwd(dz, log_alpha, seed, None, spec)
    return _RowGrads(gated, _fold(x, None, z, x.dtype) if xz else None, grad)


def gated_linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_log_alpha: Tensor | None,
    output_log_alpha: Tensor | None,
    input_seed: Tensor | None,
    output_seed: Tensor | None,
    spec: GateSpec,
    per_sample: bool,
    keep_pre: bool,
) -> tuple[Tensor, Tensor]:
    nothing = x.new_empty(0)
    if routes.forced_name() is not None:  # raises where it cannot serve this call
        granularity = "input" if output_log_alpha is None else "output"
        route(x.shape[:-1].numel(), weight.shape[0], weight.shape[1], x.dtype, granularity, per_sample)
    if not (per_sample or gates_activations(x, weight)):
        z_in, z_out = _draw(input_log_alpha, input_seed, spec), _draw(output_log_alpha, output_seed, spec)
        if bias is not None:
            bias = (bias if z_out is None else bias * z_out).to(x.dtype)
        return linear(x, _fold(weight, z_out, z_in, x.dtype), bias), nothing
    if input_log_alpha is not None:
        x = _gate_rows(rows_of(x), input_log_alpha, input_seed, spec, per_sample).view(x.shape)
    pre = linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    if output_log_alpha is None:
        return pre, nothing
    y = _gate_rows(rows_of(pre), output_log_alpha, output_seed, spec, per_sample).view(pre.shape)
    return y, pre if keep_pre else nothing


def gated_linear_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_log_alpha: Tensor | None,
    output_log_alpha: Tensor | None,
    input_seed: Tensor | None,
    output_seed: Tensor | None,
    pre: Tensor,
    spec: GateSpec,
    per_sample: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    rows, dy = rows_of(x), rows_of(dy)
    gates = (input_log_alpha, output_log_alpha, input_seed, output_seed, spec)
    if per_sample or gates_activations(x, weight):
        # Without a gradient of its own the output gate needs no activation; dy stands in for it, unread.
        before = rows_of(pre) if pre.numel() == dy.numel() else dy
        grads = _bwd_on_activations(dy, rows, weight, bias, *gates, before, per_sample, needs)
    else:
        grads = _bwd_fold(dy, rows, weight, bias, *gates, needs)
    dx = grads[0]
    return (None if dx is None else dx.view(x.shape), *grads[1:])


def _bwd_fold(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_log_alpha: Tensor | None,
    output_log_alpha: Tensor | None,
    input_seed: Tensor | None,
    output_seed: Tensor | None,
    spec: GateSpec,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    need_x, need_w, need_b, need_in, need_out = needs
    z_in, z_out = _draw(input_log_alpha, input_seed, spec), _draw(output_log_alpha, output_seed, spec)
    dx = dw = db = din = dout = None
    if need_x:
        dx = dy @ _fold(weight, z_out, z_in, x.dtype)
    sum_dy = dy.sum(0, dtype=_gate_dtype(x)) if bias is not None and (need_b or need_out) else None
    if need_b and bias is not None and sum_dy is not None:
        db = (sum_dy if z_out is None else sum_dy * z_out).to(bias.dtype)
    if need_w or need_in or need_out:
        raw = dy.t() @ x  # (N, K): the weight gradient of the dense layer
        if z_in is None and z_out is None:
            dw = raw.to(weight.dtype)
        else:
            weight = weight.contiguous()
            dw = _over(raw, weight) if need_w else None
            dz_in = torch.empty_like(z_in) if need_in and z_in is not None else None
            dz_out = torch.empty_like(z_out) if need_out and z_out is not None else None
            outputs = map(_ptr, (dw, dz_out, dz_in))
            codes = _CODES[raw.dtype], _CODES[weight.dtype]
            _C.fold_bwd(*codes, _ptr(raw), _ptr(weight), *weight.shape, _ptr(z_out), _ptr(z_in), *outputs, torch.get_num_threads())
            if dz_in is not None and input_log_alpha is not None:
                din = sample_gates_bwd(dz_in, input_log_alpha, input_seed, None, spec)
            if dz_out is not None and output_log_alpha is not None:
                if bias is not None and sum_dy is not None:
                    dz_out += bias * sum_dy
                dout = sample_gates_bwd(dz_out, output_log_alpha, output_seed, None, spec)
    return dx, dw, db, din, dout


def _bwd_on_activations(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_log_alpha: Tensor | None,
    output_log_alpha: Tensor | None,
    input_seed: Tensor | None,
    output_seed: Tensor | None,
    spec: GateSpec,
    pre: Tensor,
    per_sample: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    need_x, need_w, need_b, need_in, need_out = needs
    dx = dw = din = dout = None
    if output_log_alpha is not None:
        grads = _gate_rows_bwd(pre, dy, output_log_alpha, output_seed, spec, per_sample, dx=True, xz=False, dlog_alpha=need_out)
        assert grads.dx is not None
        dy, dout = grads.dx, grads.dlog_alpha
    db = dy.sum(0).to(bias.dtype) if need_b and bias is not None else None
    back = dy @ weight.to(x.dtype) if need_x or need_in else None
    xz: Tensor | None = x
    if input_log_alpha is None:
        dx = back
    elif back is not None:
        dx, xz, din = _gate_rows_bwd(
            x, back, input_log_alpha, input_seed, spec, per_sample, dx=need_x, xz=need_w, dlog_alpha=need_in, in_place=True
        )
    elif need_w:
        xz = _gate_rows(x, input_log_alpha, input_seed, spec, per_sample)
    if need_w and xz is not None:
        dw = (dy.t() @ xz).to(weight.dtype)
    return dx, dw, db, din, dout


def _gate_weight(
    weight: Tensor, log_alpha: Tensor, seed: Tensor | None, spec: GateSpec, block: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """weight * Z, rounded once to ``dtype``: drawn while it is multiplied where each weight has a gate, else drawn first and spread."""
    weight, log_alpha = weight.contiguous(), log_alpha.contiguous()
    out = torch.empty(weight.shape, dtype=dtype)
    if block == (1, 1):
        codes = _CODES[weight.dtype], _CODES[dtype]
        _C.gate_weights_fwd(spec, *codes, _ptr(weight), weight.numel(), _ptr(log_alpha), _ptr(seed), _ptr(out), torch.get_num_threads())
        return out
    z = sample_gates_fwd(log_alpha, seed, None, spec)
    codes = _CODES[weight.dtype], _CODES[dtype]
    _C.fold_blocks_fwd(*codes, _ptr(weight), *weight.shape, *block, _ptr(z), _ptr(out), torch.get_num_threads())
    return out


def weight_gated_linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, log_alpha: Tensor, seed: Tensor | None, spec: GateSpec, block: tuple[int, int]
) -> Tensor:
    if routes.forced_name() is not None:
        route(x.shape[:-1].numel(), weight.shape[0], weight.shape[1], x.dtype, block, False)
    return linear(x, _gate_weight(weight, log_alpha, seed, spec, block, x.dtype), None if bias is None else bias.to(x.dtype))


def weight_gated_linear_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    log_alpha: Tensor,
    seed: Tensor | None,
    spec: GateSpec,
    block: tuple[int, int],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    need_x, need_w, need_b, need_gate = needs
    rows, dy = rows_of(x), rows_of(dy)
    dx = (dy @ _gate_weight(weight, log_alpha, seed, spec, block, x.dtype)).view(x.shape) if need_x else None
    db = dy.sum(0).to(bias.dtype) if need_b and bias is not None else None
    if not (need_w or need_gate):
        return dx, None, db, None
    raw = dy.t() @ rows  # (N, K): the weight gradient of the dense layer
    weight, log_alpha = weight.contiguous(), log_alpha.contiguous()
    dw = _over(raw, weight) if need_w else None
    codes, threads = (_CODES[raw.dtype], _CODES[weight.dtype]), torch.get_num_threads()
    if block == (1, 1):
        dlog_alpha = torch.empty_like(log_alpha) if need_gate else None
        args = _ptr(raw), _ptr(weight), weight.numel(), _ptr(log_alpha), _ptr(seed), _ptr(dw), _ptr(dlog_alpha)
        _C.gate_weights_bwd(spec, *codes, *args, threads)
        return dx, dw, db, dlog_alpha
    z = sample_gates_fwd(log_alpha, seed, None, spec)
    dz = torch.empty_like(log_alpha) if need_gate else None
    _C.fold_blocks_bwd(*codes, _ptr(raw), _ptr(weight), *weight.shape, *block, _ptr(z), _ptr(dw), _ptr(dz), threads)
    return dx, dw, db, None if dz is None else sample_gates_bwd(dz, log_alpha, seed, None, spec)
