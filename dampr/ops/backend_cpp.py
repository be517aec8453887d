"""The CPU backend: gates in C++ (:mod:`dampr._C`, raw pointers), matrix products by torch's own GEMM.

Per batch the gates are folded into the weight, one pass before the GEMM and one pass over the raw weight gradient after it. Per sample
they are drawn while the activations are multiplied, and drawn again in the backward. Derivations: docs/kernels.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from dampr import _C  # type: ignore[attr-defined]
from dampr.spec import SAMPLE, GateSpec

from .library import rows_of

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


def _gate_rows(x: Tensor, log_alpha: Tensor, seed: Tensor | None, spec: GateSpec) -> Tensor:
    """x * z with a draw per row; x: (M, n)."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _C.gate_rows_fwd(spec, _CODES[x.dtype], _ptr(x), *x.shape, _ptr(log_alpha.contiguous()), _ptr(seed), _ptr(out), torch.get_num_threads())
    return out


def _gate_rows_bwd(
    x: Tensor, g: Tensor, log_alpha: Tensor, seed: Tensor | None, spec: GateSpec, *, dx: bool, xz: bool, dlog_alpha: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """From one redraw whichever is asked for of g * z, x * z and sum_m x g z'; x, g: (M, n)."""
    x, g, log_alpha = x.contiguous(), g.contiguous(), log_alpha.contiguous()
    out = (torch.empty_like(x) if dx else None, torch.empty_like(x) if xz else None, torch.empty_like(log_alpha) if dlog_alpha else None)
    _C.gate_rows_bwd(
        spec, _CODES[x.dtype], _ptr(x), _ptr(g), *x.shape, _ptr(log_alpha), _ptr(seed), *map(_ptr, out), torch.get_num_threads()
    )
    return out


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
    if not (per_sample and spec.rule == SAMPLE):
        z_in, z_out = _draw(input_log_alpha, input_seed, spec), _draw(output_log_alpha, output_seed, spec)
        if bias is not None:
            bias = (bias if z_out is None else bias * z_out).to(x.dtype)
        y = linear(x, _fold(weight, z_out, z_in, x.dtype), bias)
        return y, y.detach().clone() if keep_pre and z_out is None else nothing
    rows = rows_of(x)
    if input_log_alpha is not None:
        rows = _gate_rows(rows, input_log_alpha, input_seed, spec)
    pre = linear(rows, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    y = pre if output_log_alpha is None else _gate_rows(pre, output_log_alpha, output_seed, spec)
    shape = (*x.shape[:-1], weight.shape[0])
    return y.view(shape), pre.view(shape) if keep_pre and y is not pre else nothing


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
    if per_sample and spec.rule == SAMPLE:
        grads = _bwd_per_sample(dy, rows, weight, bias, *gates, rows_of(pre) if pre.numel() else None, needs)
    else:
        grads = _bwd_per_batch(dy, rows, weight, bias, *gates, needs)
    dx = grads[0]
    return (None if dx is None else dx.view(x.shape), *grads[1:])


def _bwd_per_batch(
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
            dw = torch.empty_like(weight) if need_w else None
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


def _bwd_per_sample(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_log_alpha: Tensor | None,
    output_log_alpha: Tensor | None,
    input_seed: Tensor | None,
    output_seed: Tensor | None,
    spec: GateSpec,
    pre: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    need_x, need_w, need_b, need_in, need_out = needs
    dx = db = dw = din = dout = None
    if output_log_alpha is not None:
        # Without its own gradient the output gate needs no pre-gate activation; dy stands in for it, unread.
        operand = dy if pre is None else pre
        gated, _, dout = _gate_rows_bwd(operand, dy, output_log_alpha, output_seed, spec, dx=True, xz=False, dlog_alpha=need_out)
        assert gated is not None
        dy = gated
    if need_b and bias is not None:
        db = dy.sum(0).to(bias.dtype)
    if input_log_alpha is None:
        dx = dy @ weight.to(x.dtype) if need_x else None
        dw = (dy.t() @ x).to(weight.dtype) if need_w else None
        return dx, dw, db, None, dout
    if need_x or need_in:
        dx, xz, din = _gate_rows_bwd(
            x, dy @ weight.to(x.dtype), input_log_alpha, input_seed, spec, dx=need_x, xz=need_w, dlog_alpha=need_in
        )
    else:
        xz = _gate_rows(x, input_log_alpha, input_seed, spec) if need_w else None
    if xz is not None:
        dw = (dy.t() @ xz).to(weight.dtype)
    return dx, dw, db, din, dout
