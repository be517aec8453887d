"""The CPU backend: gates in C++ (:mod:`dampr._C`, raw pointers), matrix products by torch's own GEMM.

Per batch the gates are folded into the weight, one pass before the GEMM and one pass over the raw weight gradient after it. Per sample
they are drawn while the activations are multiplied, and drawn again in the backward. Derivations: docs/kernels.md.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from dampr import _C  # type: ignore[attr-defined]
from dampr.spec import SAMPLE, GateSpec

from . import routes
from .gate_activations import planes
from .library import choose_activations, gates_activations, rows_of

_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
SMALL = 2**18  # multiply-adds up to which one call that does all, products included, beats several that are each faster


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


def route(
    M: int,
    N: int,
    K: int,
    dtype: torch.dtype,
    granularity: str | tuple[int, int],
    per_sample: bool,
    device: torch.device | None = None,
    drawn: bool = True,
) -> tuple[str, str]:
    """(name, reason) of the route of x (M, K) through W (N, K); names as in :mod:`.routes`. Raises ValueError for a forced one it lacks.

    ``drawn``: whether gates are drawn. Deterministic ones never go the small route: a fresh layer equals the dense one to the bit there.
    """
    if granularity == "weight" or isinstance(granularity, tuple):
        routes.forced_linear(("fold",), granularity, per_sample)
        return "fold", "one pass multiplies the gates into the weight, then torch's GEMM runs"
    small = ("small",) if drawn and dtype in (torch.float32, torch.float64) else ()
    if routes.forced_linear((*small, *(("passes",) if per_sample else ("fold", "activations"))), granularity, per_sample) is not None:
        return str(routes.forced_name()), "forced by forced_route"
    if small and M * N * K <= SMALL:
        return "small", f"{M * N * K} multiply-adds: one call that does all is faster than several"
    if per_sample:
        return "passes", "every row has gates of its own: they are drawn while the activations are multiplied"
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


def _is_small(x: Tensor, weight: Tensor, input_log_alpha: Tensor | None, output_log_alpha: Tensor | None, spec: GateSpec) -> bool:
    """Whether the extension computes the whole layer in one call. Not without gates, where the layer is the dense one to the bit."""
    forced = routes.forced_name()
    return (
        (x.numel() * weight.shape[0] <= SMALL if forced is None else forced == "small")
        and (input_log_alpha is not None or output_log_alpha is not None)
        and spec.rule == SAMPLE
        and x.dtype == weight.dtype
        and (x.dtype == torch.float32 or x.dtype == torch.float64)
    )


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """To be held on to while the extension works with their addresses."""
    return [None if t is None else t.contiguous() for t in tensors]


def _sizes(x: Tensor, weight: Tensor) -> tuple[int, int, int, int]:
    """(dtype code, M, N, K)."""
    return _CODES[x.dtype], x.shape[:-1].numel(), *weight.shape


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


def _product(raw: Tensor, like: Tensor, in_place: bool) -> Tensor:
    """Where ``raw`` times gates goes, in the dtype of ``like``: over ``raw`` where allowed, so that no new memory is touched."""
    return raw if in_place and raw.dtype == like.dtype else torch.empty_like(like)


_kept = threading.local()


def _new(shape: torch.Size, dtype: torch.dtype, passing: bool) -> Tensor:
    """An empty tensor. ``passing``: one that no caller will see, used up before the next such; its memory stays with the thread.

    A large allocation is fresh memory, which is cleared page by page when it is first written: 4 MB take longer than multiplying as much.
    """
    if not passing:
        return torch.empty(shape, dtype=dtype)
    kept: Tensor | None = getattr(_kept, "memory", None)
    size = shape.numel() * dtype.itemsize
    if kept is None or kept.numel() < size:
        kept = _kept.memory = torch.empty(size, dtype=torch.uint8)
    return kept[:size].view(dtype).view(shape)


def _fold(weight: Tensor, z_out: Tensor | None, z_in: Tensor | None, dtype: torch.dtype, passing: bool = False) -> Tensor:
    """weight * z_out[:, None] * z_in[None, :], rounded once to ``dtype``; ``passing`` as in :func:`_new`."""
    if z_out is None and z_in is None:
        return weight.to(dtype)
    weight = weight.contiguous()
    out = _new(weight.shape, dtype, passing)
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
    if _is_small(x, weight, input_log_alpha, output_log_alpha, spec):
        y = x.new_empty((*x.shape[:-1], weight.shape[0]))
        pre = torch.empty_like(y) if keep_pre else nothing
        held = _contiguous(x, weight, bias, input_log_alpha, output_log_alpha)
        seeds = _ptr(input_seed), _ptr(output_seed)
        _C.small_fwd(spec, *_sizes(x, weight), *map(_ptr, held), *seeds, per_sample, y.data_ptr(), _ptr(pre) if keep_pre else 0)
        return y, pre
    if routes.forced_name() is not None:  # raises where it cannot serve this call
        granularity = "input" if output_log_alpha is None else "output"
        N, K = weight.shape
        route(x.shape[:-1].numel(), N, K, x.dtype, granularity, per_sample, drawn=spec.rule == SAMPLE and x.dtype == weight.dtype)
    if not (per_sample or gates_activations(x, weight)):
        gates = input_log_alpha, output_log_alpha, input_seed, output_seed, spec
        return linear(x, *fold_weight_fwd(weight, bias, *gates, x.dtype, passing=True)), nothing
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
    if _is_small(x, weight, input_log_alpha, output_log_alpha, spec):
        held = _contiguous(dy, x, weight, bias, input_log_alpha, output_log_alpha)
        grads = [torch.empty_like(t) if need and t is not None else None for t, need in zip(held[1:], needs, strict=True)]
        seeds = _ptr(input_seed), _ptr(output_seed)
        _C.small_bwd(spec, *_sizes(x, weight), *map(_ptr, held), *seeds, per_sample, pre.data_ptr(), *map(_ptr, grads))
        return tuple(grads)
    rows, dy = rows_of(x), rows_of(dy)
    gates = (input_log_alpha, output_log_alpha, input_seed, output_seed, spec)
    if per_sample or gates_activations(x, weight):
        # Without a gradient of its own the output gate needs no activation; dy stands in for it, unread.
        before = rows_of(pre) if pre.numel() == dy.numel() else dy
        dx, *others = _bwd_on_activations(dy, rows, weight, bias, *gates, before, per_sample, needs)
    else:
        dx, *others = _bwd_fold(dy, rows, weight, bias, *gates, needs)
    return None if dx is None else dx.view(x.shape), *others


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
    gates = input_log_alpha, output_log_alpha, input_seed, output_seed, spec
    sum_dy = dy.sum(0, dtype=_gate_dtype(x)) if bias is not None and (need_b or need_out) else None
    if not (need_w or need_in or need_out):
        z_out = _draw(output_log_alpha, output_seed, spec) if need_b else None
        db = None if sum_dy is None or bias is None else (sum_dy if z_out is None else sum_dy * z_out).to(bias.dtype)
        dx = dy @ fold_weight_fwd(weight, None, *gates, x.dtype, passing=True)[0] if need_x else None
        return dx, None, db, None, None
    raw = dy.t() @ x  # (N, K): the weight gradient of the dense layer
    *grads, folded = _ungate(raw, sum_dy, weight, bias, *gates, needs[1:], fold=need_x, in_place=True)
    if need_x and folded is None:
        folded, _ = fold_weight_fwd(weight, None, *gates, x.dtype, passing=True)
    return None if folded is None or not need_x else dy @ folded, *grads


def fold_weight_fwd(
    weight: Tensor,
    bias: Tensor | None,
    input_log_alpha: Tensor | None,
    output_log_alpha: Tensor | None,
    input_seed: Tensor | None,
    output_seed: Tensor | None,
    spec: GateSpec,
    dtype: torch.dtype,
    passing: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(z_out W z_in, z_out b) in ``dtype``; weight: (N, K); ``passing`` as in :func:`_new`."""
    z_in, z_out = _draw(input_log_alpha, input_seed, spec), _draw(output_log_alpha, output_seed, spec)
    if bias is not None:
        bias = (bias if z_out is None else bias * z_out).to(dtype)
    return _fold(weight, z_out, z_in, dtype, passing), bias


def fold_weight_bwd(
    raw: Tensor,
    raw_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    input_log_alpha: Tensor | None,
    output_log_alpha: Tensor | None,
    input_seed: Tensor | None,
    output_seed: Tensor | None,
    spec: GateSpec,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of weight, bias and both log-alphas from those of the folded weight and bias, ``raw`` (N, K) and ``raw_bias`` (N,)."""
    gates = input_log_alpha, output_log_alpha, input_seed, output_seed, spec
    return _ungate(raw, raw_bias, weight, bias, *gates, needs)[:4]


def _ungate(
    raw: Tensor,
    raw_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    input_log_alpha: Tensor | None,
    output_log_alpha: Tensor | None,
    input_seed: Tensor | None,
    output_seed: Tensor | None,
    spec: GateSpec,
    needs: Sequence[bool],
    fold: bool = False,
    in_place: bool = False,
) -> tuple[Tensor | None, ...]:
    """:func:`fold_weight_bwd` in one pass over raw and W and, if asked to ``fold``, z_out W z_in from the same pass where dtypes allow.

    ``in_place``: the weight's gradient may take the place of ``raw``.
    """
    need_w, need_b, need_in, need_out = needs
    z_in, z_out = _draw(input_log_alpha, input_seed, spec), _draw(output_log_alpha, output_seed, spec)
    db = din = dout = None
    if need_b and bias is not None and raw_bias is not None:
        db = (raw_bias if z_out is None else raw_bias * z_out).to(bias.dtype)
    if z_in is None and z_out is None:
        return raw.to(weight.dtype), db, None, None, weight.to(raw.dtype)
    raw, weight = raw.contiguous(), weight.contiguous()
    dw = _product(raw, weight, in_place) if need_w else None
    folded = _new(weight.shape, weight.dtype, passing=True) if fold and raw.dtype == weight.dtype else None
    dz_in = torch.empty_like(z_in) if need_in and z_in is not None else None
    dz_out = torch.empty_like(z_out) if need_out and z_out is not None else None
    args = *map(_ptr, (raw, weight)), *weight.shape, *map(_ptr, (z_out, z_in, dw, dz_out, dz_in))
    _C.fold_bwd(_CODES[raw.dtype], _CODES[weight.dtype], *args, torch.get_num_threads(), _ptr(folded))
    if dz_in is not None and input_log_alpha is not None:
        din = sample_gates_bwd(dz_in, input_log_alpha, input_seed, None, spec)
    if dz_out is not None and output_log_alpha is not None:
        if bias is not None and raw_bias is not None:
            dz_out += bias * raw_bias
        dout = sample_gates_bwd(dz_out, output_log_alpha, output_seed, None, spec)
    return dw, db, din, dout, folded


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


def fold_blocks_fwd(
    weight: Tensor,
    log_alpha: Tensor,
    seed: Tensor | None,
    spec: GateSpec,
    block: tuple[int, int],
    dtype: torch.dtype,
    passing: bool = False,
) -> Tensor:
    """weight * Z, rounded once to ``dtype``: drawn while it is multiplied where each weight has a gate, else drawn first and spread.

    ``passing`` as in :func:`_new`.
    """
    weight, log_alpha = weight.contiguous(), log_alpha.contiguous()
    out = _new(weight.shape, dtype, passing)
    codes = _CODES[weight.dtype], _CODES[dtype]
    if block == (1, 1):
        _C.gate_weights_fwd(spec, *codes, _ptr(weight), weight.numel(), _ptr(log_alpha), _ptr(seed), _ptr(out), torch.get_num_threads())
        return out
    z = sample_gates_fwd(log_alpha, seed, None, spec)
    _C.fold_blocks_fwd(*codes, _ptr(weight), *weight.shape, *block, _ptr(z), _ptr(out), torch.get_num_threads())
    return out


def fold_blocks_bwd(
    raw: Tensor, weight: Tensor, log_alpha: Tensor, seed: Tensor | None, spec: GateSpec, block: tuple[int, int], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of weight and log_alpha from that of the folded weight, ``raw`` (N, K)."""
    return _ungate_blocks(raw, weight, log_alpha, seed, spec, block, needs)[:2]


def _ungate_blocks(
    raw: Tensor,
    weight: Tensor,
    log_alpha: Tensor,
    seed: Tensor | None,
    spec: GateSpec,
    block: tuple[int, int],
    needs: Sequence[bool],
    fold: bool = False,
    in_place: bool = False,
) -> tuple[Tensor | None, ...]:
    """:func:`fold_blocks_bwd` and weight * Z, as :func:`_ungate` does it for gates on features."""
    raw, weight, log_alpha = raw.contiguous(), weight.contiguous(), log_alpha.contiguous()
    dw = _product(raw, weight, in_place) if needs[0] else None
    folded = _new(weight.shape, weight.dtype, passing=True) if fold and raw.dtype == weight.dtype else None
    grad = torch.empty_like(log_alpha) if needs[1] else None
    codes, threads = (_CODES[raw.dtype], _CODES[weight.dtype]), torch.get_num_threads()
    if block == (1, 1):
        args = _ptr(raw), _ptr(weight), weight.numel(), *map(_ptr, (log_alpha, seed, dw, grad))
        _C.gate_weights_bwd(spec, *codes, *args, threads, _ptr(folded))
        return dw, grad, folded
    z = sample_gates_fwd(log_alpha, seed, None, spec)
    _C.fold_blocks_bwd(*codes, _ptr(raw), _ptr(weight), *weight.shape, *block, *map(_ptr, (z, dw, grad)), threads, _ptr(folded))
    return dw, None if grad is None else sample_gates_bwd(grad, log_alpha, seed, None, spec), folded


def weight_gated_linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, log_alpha: Tensor, seed: Tensor | None, spec: GateSpec, block: tuple[int, int]
) -> Tensor:
    if routes.forced_name() is not None:
        route(x.shape[:-1].numel(), weight.shape[0], weight.shape[1], x.dtype, block, False)
    return linear(
        x, fold_blocks_fwd(weight, log_alpha, seed, spec, block, x.dtype, passing=True), None if bias is None else bias.to(x.dtype)
    )


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
    dw = grad = folded = None
    if need_w or need_gate:
        raw = dy.t() @ rows  # (N, K): the weight gradient of the dense layer
        dw, grad, folded = _ungate_blocks(raw, weight, log_alpha, seed, spec, block, (need_w, need_gate), fold=need_x, in_place=True)
    if need_x and folded is None:
        folded = fold_blocks_fwd(weight, log_alpha, seed, spec, block, x.dtype, passing=True)
    db = dy.sum(0).to(bias.dtype) if need_b and bias is not None else None
    return None if folded is None else (dy @ folded).view(x.shape), dw, db, grad


def gate_activations_fwd(x: Tensor, log_alpha: Tensor, seed: Tensor | None, spec: GateSpec, dim: int, per_sample: bool) -> Tensor:
    x, shape, _ = planes(x, dim, per_sample)
    if per_sample and shape.middle == shape.inner == 1:
        return _gate_rows(x.view(shape.outer, shape.n), log_alpha, seed, spec, True).view(x.shape)
    z = sample_gates_fwd(log_alpha, seed, shape.outer if per_sample else None, spec)
    out = torch.empty_like(x)
    _C.gate_planes_fwd(_CODES[x.dtype], _ptr(x), *shape[:4], _ptr(z), per_sample, _ptr(out), torch.get_num_threads())
    return out


def gate_activations_bwd(
    dy: Tensor,
    x: Tensor,
    log_alpha: Tensor,
    seed: Tensor | None,
    spec: GateSpec,
    dim: int,
    per_sample: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    x, shape, layout = planes(x, dim, per_sample)
    dy = dy.contiguous(memory_format=layout)
    if per_sample and shape.middle == shape.inner == 1:
        rows = shape.outer, shape.n
        flat = x.view(rows), dy.view(rows), log_alpha, seed, spec
        grads = _gate_rows_bwd(*flat, True, dx=needs[0], xz=False, dlog_alpha=needs[1])
        return None if grads.dx is None else grads.dx.view(x.shape), grads.dlog_alpha
    z = sample_gates_fwd(log_alpha, seed, shape.outer if per_sample else None, spec)
    dx, dz = torch.empty_like(x) if needs[0] else None, torch.empty_like(z) if needs[1] else None
    _C.gate_planes_bwd(_CODES[x.dtype], *map(_ptr, (dy, x)), *shape[:4], _ptr(z), per_sample, *map(_ptr, (dx, dz)), torch.get_num_threads())
    return dx, None if dz is None else sample_gates_bwd(dz, log_alpha, seed, shape.outer if per_sample else None, spec)


def conv_route(
    weight: tuple[int, ...], groups: int, granularity: str | tuple[int, int], per_sample: bool, pointwise: bool, device: torch.device
) -> tuple[str, str]:
    """(name, reason) of the route of a convolution with a weight of this shape; ``pointwise``: it is a linear map on channels last.

    A 1 x 1 convolution stays one unless told otherwise: oneDNN's is as fast as the linear map, and on deep layers twice as fast. Raises
    ValueError where a forced route cannot serve the call.
    """
    vectors = granularity in ("input", "output", "both")
    possible = ("passes",) if per_sample else ("fold", "linear") if vectors and pointwise else ("fold",)
    name = routes.forced(possible, granularity, per_sample)
    if name is not None:
        return name, "forced by forced_route"
    if per_sample:
        return "passes", "every image has gates of its own: passes over the activations around torch's convolution"
    return "fold", "one pass multiplies the gates into the filters, then torch's convolution runs"


def norm_gate_fwd(
    x: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    log_alpha: Tensor,
    seed: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    spec: GateSpec,
    per_sample: bool,
    relu: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    x, shape, _ = planes(x, 1, per_sample)
    code, threads, given = _CODES[x.dtype], torch.get_num_threads(), mean is not None
    if mean is None or var is None:
        mean, var = torch.empty_like(log_alpha), torch.empty_like(log_alpha)
        _C.norm_stats(code, _ptr(x), *shape[:4], _ptr(mean), _ptr(var), threads)
    z = sample_gates_fwd(log_alpha, seed, shape.outer if per_sample else None, spec)
    gain, bias, mean, var = vectors = _contiguous(gain, bias, mean, var)
    out = torch.empty_like(x)
    _C.norm_gate_fwd(code, _ptr(x), *shape[:4], _ptr(z), per_sample, *map(_ptr, vectors), eps, relu, _ptr(out), threads)
    return (out, None, None) if given else (out, mean, var)


def norm_gate_bwd(
    dy: Tensor,
    x: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    log_alpha: Tensor,
    seed: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    spec: GateSpec,
    per_sample: bool,
    relu: bool,
    training: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    x, shape, layout = planes(x, 1, per_sample)
    dy, rows = dy.contiguous(memory_format=layout), shape.outer if per_sample else None
    z = sample_gates_fwd(log_alpha, seed, rows, spec)
    vectors = _contiguous(gain, bias, mean, var)
    dx = torch.empty_like(x) if needs[0] else None
    dgain, dbias, dz = (torch.empty_like(t) if need else None for t, need in zip((log_alpha, log_alpha, z), needs[1:], strict=True))
    how = *map(_ptr, vectors), eps, relu, training
    outputs = map(_ptr, (dx, dgain, dbias, dz))
    _C.norm_gate_bwd(_CODES[x.dtype], _ptr(dy), _ptr(x), *shape[:4], _ptr(z), per_sample, *how, *outputs, torch.get_num_threads())
    return dx, dgain, dbias, None if dz is None else sample_gates_bwd(dz, log_alpha, seed, rows, spec)
