"""Host side of the Triton kernels: layouts, tile sizes, workspaces, launches. Equations: dampr/kernels/gates.py and gated_linear.py.

The functions are those of backend_reference and backend_cpp. Per batch: gates are folded into the weight and the vendor GEMM runs.
Per sample: one GEMM with the gates inside, or passes that gate x, y and dy around the vendor GEMM (configs.fits_one_pass). Gates without
noise are the same for every sample, so they always take the first route.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton

from dampr.kernels import configs
from dampr.kernels import gated_linear as linear_kernels
from dampr.kernels import gates as gate_kernels
from dampr.spec import SAMPLE, GateSpec

from .library import rows_of

_DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
Maybe = torch.Tensor | None
Grads = tuple[Maybe, Maybe, Maybe, Maybe, Maybe]  # of x, weight, bias, input_log_alpha, output_log_alpha
Needs = Sequence[bool]


class Gates(NamedTuple):
    """The log-alphas of a layer's gates, None where there is no gate, and their seeds, None where the rule needs none."""

    input: Maybe
    output: Maybe
    input_seed: Maybe
    output_seed: Maybe


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why the kernels cannot run tensors of this device and dtype, or None."""
    if dtype not in _DTYPE_NAMES:
        return f"it takes float32, bfloat16 and float16, not {dtype}"
    interpreted = not isinstance(gate_kernels._reduce_kernel, triton.JITFunction)
    if device.type == "cuda" or interpreted:
        return None
    return f"its kernels need a CUDA device, not {device} (TRITON_INTERPRET=1, set before triton is imported, runs them on the CPU)"


def sample_gates_fwd(log_alpha: torch.Tensor, seed: Maybe, rows: int | None, spec: GateSpec) -> torch.Tensor:
    """Gates of ``log_alpha`` (n,): float32 of shape (n,), or (rows, n) with a draw per row."""
    n, height = log_alpha.numel(), 1 if rows is None else rows
    z = _empty(log_alpha, (height, n), torch.float32)
    block_m, block_n = configs.GATE_VECTOR if height == 1 else configs.GATE_TILE
    grid = (triton.cdiv(n, block_n) * triton.cdiv(height, block_m),)
    sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "GROUPED": n % 4 == 0 or height == 1, "GATE": spec}
    _launch(gate_kernels._sample_gates_fwd_kernel, grid, log_alpha.contiguous(), seed, z, height, n, **sizes)
    return z.view(n) if rows is None else z


def sample_gates_bwd(dz: torch.Tensor, log_alpha: torch.Tensor, seed: Maybe, rows: int | None, spec: GateSpec) -> torch.Tensor:
    """Gradient (n,) of ``log_alpha`` for that of its gates, ``dz``: (n,) or (rows, n), float32."""
    n, height = log_alpha.numel(), 1 if rows is None else rows
    block_m, block_n = configs.GATE_VECTOR if height == 1 else configs.COLUMN_SUM_TILE
    splits, per_split = configs.split_rows(height, block_m, triton.cdiv(n, block_n))
    partial = _empty(dz, (splits, n), torch.float32)
    sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "GROUPED": n % 4 == 0 or height == 1, "GATE": spec}
    args = dz.contiguous(), log_alpha.contiguous(), seed, partial, height, n, per_split
    _launch(gate_kernels._sample_gates_bwd_kernel, (triton.cdiv(n, block_n), splits), *args, **sizes)
    return _reduce(partial, (n,), torch.float32)


def gated_linear_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Maybe,
    input_log_alpha: Maybe,
    output_log_alpha: Maybe,
    input_seed: Maybe,
    output_seed: Maybe,
    spec: GateSpec,
    per_sample: bool,
    keep_pre: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, pre): y = z_out * ((x * z_in) W^T + b), (..., N) in the dtype of x; pre is y before the output gate if ``keep_pre``, else empty.

    x: (..., K); weight: (N, K) and bias: (N,), in any floating dtype (float32 under autocast); log-alphas: float32, (K,) and (N,).
    """
    gates = Gates(input_log_alpha, output_log_alpha, input_seed, output_seed)
    if per_sample and spec.rule == SAMPLE and (input_log_alpha is not None or output_log_alpha is not None):
        y, pre = _per_sample_fwd(rows_of(x), weight, bias, gates, spec, keep_pre)
        shape = *x.shape[:-1], weight.shape[0]
        return y.view(shape), pre.view(shape) if keep_pre else pre
    return torch.nn.functional.linear(x, *_fold(weight, bias, gates, spec, x.dtype)), x.new_empty(0)


def gated_linear_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Maybe,
    input_log_alpha: Maybe,
    output_log_alpha: Maybe,
    input_seed: Maybe,
    output_seed: Maybe,
    pre: torch.Tensor,
    spec: GateSpec,
    per_sample: bool,
    needs: Needs,
) -> tuple[Maybe, ...]:
    """Gradients of x, weight, bias, input_log_alpha, output_log_alpha; None for one that ``needs`` does not ask for."""
    gates, shape = Gates(input_log_alpha, output_log_alpha, input_seed, output_seed), x.shape
    dy, x = rows_of(dy), rows_of(x)
    if per_sample and spec.rule == SAMPLE and (input_log_alpha is not None or output_log_alpha is not None):
        # Without a gradient of its own the output gate needs no activation; dy stands in for it, unread.
        pre = pre.reshape(dy.shape) if pre.numel() == dy.numel() else dy
        dx, *others = _per_sample_bwd(dy, x, weight, bias, gates, pre, spec, needs)
    else:
        dx, *others = _fold_bwd(dy, x, weight, bias, gates, spec, needs)
    return None if dx is None else dx.view(shape), *others


# ---- per batch: gates folded into the weight ---------------------------------------------------------------------------------------------


def _fold(weight: torch.Tensor, bias: Maybe, gates: Gates, spec: GateSpec, dtype: torch.dtype) -> tuple[torch.Tensor, Maybe]:
    """(W~, b~) in ``dtype``: the weight and the bias with their gates."""
    if gates.input is None and gates.output is None:
        return weight.to(dtype), None if bias is None else bias.to(dtype)
    (N, K), (block_n, block_k) = weight.shape, configs.FOLD_FWD_TILE
    w, folded = _rows(weight), _empty(weight, (N, K), dtype)
    folded_bias = None
    if bias is not None:
        folded_bias = bias.to(dtype) if gates.output is None else _empty(bias, (N,), dtype)
    # One column of tiles even for K = 0: it writes the bias.
    grid = (max(1, triton.cdiv(K, block_k)), triton.cdiv(N, block_n))
    args = (w, *_vectors(bias, *gates), folded, folded_bias, N, K, w.stride(0))
    _launch(linear_kernels._fold_fwd_kernel, grid, *args, BLOCK_N=block_n, BLOCK_K=block_k, GATE=spec)
    return folded, folded_bias


def _fold_bwd(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: Maybe, gates: Gates, spec: GateSpec, needs: Needs) -> Grads:
    (N, K), (block_n, block_k) = weight.shape, configs.FOLD_BWD_TILE
    dx = dy @ _fold(weight, None, gates, spec, x.dtype)[0] if needs[0] else None
    dy_sum = dy.sum(0, dtype=torch.float32) if bias is not None and (needs[2] or needs[4]) else None
    dbias = dy_sum.to(bias.dtype) if bias is not None and dy_sum is not None and needs[2] else None
    if gates.input is None and gates.output is None:
        return dx, (dy.t() @ x).to(weight.dtype) if needs[1] else None, dbias, None, None

    tiles_n, tiles_k = triton.cdiv(N, block_n), triton.cdiv(K, block_k)
    dweight = _empty(weight, (N, K), weight.dtype) if needs[1] else None
    in_partial = _empty(x, (tiles_n, K), torch.float32) if needs[3] else None
    out_partial = _empty(x, (tiles_k, N), torch.float32) if needs[4] else None
    if needs[1] or needs[3] or needs[4]:
        w, raw = _rows(weight), dy.t() @ x
        args = (raw, w, *_vectors(*gates), dweight, in_partial, out_partial, N, K, w.stride(0))
        _launch(linear_kernels._fold_bwd_kernel, (tiles_k, tiles_n), *args, BLOCK_N=block_n, BLOCK_K=block_k, GATE=spec)
    dinput = _fold_gate_bwd(in_partial, None, None, gates.input, gates.input_seed, None, spec)
    if gates.output is None:
        return dx, dweight, dbias, dinput, None
    dbias = None if bias is None or not needs[2] else _empty(bias, (N,), bias.dtype)
    doutput = _fold_gate_bwd(out_partial, bias, dy_sum, gates.output, gates.output_seed, dbias, spec)
    return dx, dweight, dbias, dinput, doutput


def _fold_gate_bwd(partial: Maybe, bias: Maybe, dy_sum: Maybe, log_alpha: Maybe, seed: Maybe, dbias: Maybe, spec: GateSpec) -> Maybe:
    """dlog_alpha of a (splits, n) workspace of dz, or None without one; fills ``dbias`` where that is asked for."""
    if log_alpha is None or (partial is None and dbias is None):
        return None
    n, (block_s, block_n) = log_alpha.numel(), configs.REDUCE_TILE
    dlog_alpha = None if partial is None else _empty(log_alpha, (n,), torch.float32)
    args = partial, *_vectors(bias, dy_sum, log_alpha), seed, dlog_alpha, dbias, 0 if partial is None else partial.shape[0], n
    grid = (triton.cdiv(n, block_n),)
    _launch(linear_kernels._fold_gate_bwd_kernel, grid, *args, BLOCK_S=block_s, BLOCK_N=block_n, GATE=spec)
    return dlog_alpha


# ---- per sample: gates inside one GEMM, or in passes of their own around the vendor GEMM -------------------------------------------------


def _per_sample_fwd(
    x: torch.Tensor, weight: torch.Tensor, bias: Maybe, gates: Gates, spec: GateSpec, keep_pre: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    (M, K), N, nothing = x.shape, weight.shape[0], x.new_empty(0)
    if not configs.fits_one_pass(M, N, K):
        x = x if gates.input is None else _gate_rows(x, gates.input, gates.input_seed, spec)
        pre = torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return pre if gates.output is None else _gate_rows(pre, gates.output, gates.output_seed, spec), pre if keep_pre else nothing
    x, w = _rows(x), _rows(weight.to(x.dtype))
    y = _empty(x, (M, N), x.dtype)
    kept = _empty(x, (M, N), x.dtype) if keep_pre else None
    tile, sizes = _gemm(M, N, K, x, spec)
    blocks = {"BLOCK_M": tile.rows, "BLOCK_N": tile.cols, "BLOCK_K": tile.depth, "EVEN": K % tile.depth == 0}
    args = (x, w, *_vectors(bias, *gates), y, kept, M, N, K, x.stride(0), w.stride(0))
    _launch(linear_kernels._gated_linear_fwd_kernel, (_tiles(M, N, tile),), *args, **blocks, **sizes)
    return y, nothing if kept is None else kept


def _per_sample_bwd(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: Maybe, gates: Gates, pre: torch.Tensor, spec: GateSpec, needs: Needs
) -> Grads:
    one_pass = configs.fits_one_pass(*x.shape[:1], *weight.shape)
    doutput = db = None
    gated_dy: Maybe = dy
    if gates.output is not None:
        wanted = not one_pass and (needs[0] or needs[1] or needs[3]), needs[4], needs[2]
        gated_dy, doutput, db = _gate_rows_bwd(dy, pre, gates.output, gates.output_seed, spec, wanted)
    elif needs[2]:
        db = dy.sum(0, dtype=torch.float32)
    dbias = None if db is None or bias is None else db.to(bias.dtype)
    if one_pass:
        dx, dinput = _one_pass_bwd_dx(dy, x, weight, gates, spec, needs)
        dweight = _one_pass_bwd_dw(dy, x, weight.dtype, gates, spec) if needs[1] else None
    else:
        dx, dinput, dweight = _passes_bwd(gated_dy, x, weight, gates, spec, needs)
    return dx, dweight, dbias, dinput, doutput


def _passes_bwd(
    gated_dy: Maybe, x: torch.Tensor, weight: torch.Tensor, gates: Gates, spec: GateSpec, needs: Needs
) -> tuple[Maybe, Maybe, Maybe]:
    """(dx, dinput_log_alpha, dweight) for ``gated_dy`` = dy * z_out, which is None only where none of them is needed."""
    dx = dinput = dweight = None
    if gated_dy is not None and (needs[0] or needs[3]):
        dx = gated_dy @ weight.to(x.dtype)
        if gates.input is not None:
            dx, dinput, _ = _gate_rows_bwd(dx, x, gates.input, gates.input_seed, spec, (needs[0], needs[3], False))
    if gated_dy is not None and needs[1]:
        gated_x = x if gates.input is None else _gate_rows(x, gates.input, gates.input_seed, spec)
        dweight = (gated_dy.t() @ gated_x).to(weight.dtype)
    return dx, dinput, dweight


def _gate_rows(t: torch.Tensor, log_alpha: torch.Tensor, seed: Maybe, spec: GateSpec) -> torch.Tensor:
    """t * z in the dtype of t (M, n)."""
    (M, n), (block_m, block_n) = t.shape, configs.GATE_TILE
    t, gated = _rows(t), _empty(t, (M, n), t.dtype)
    sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "GROUPED": n % 4 == 0, "GATE": spec}
    grid = (triton.cdiv(n, block_n) * triton.cdiv(M, block_m),)
    _launch(linear_kernels._gate_rows_fwd_kernel, grid, t, log_alpha.contiguous(), seed, gated, M, n, t.stride(0), **sizes)
    return gated


def _gate_rows_bwd(
    g: torch.Tensor, t: torch.Tensor, log_alpha: torch.Tensor, seed: Maybe, spec: GateSpec, wanted: tuple[bool, bool, bool]
) -> tuple[Maybe, Maybe, Maybe]:
    """(g z, dlog_alpha, column sum of g z) for the gradient g (M, n) of t z, those that are ``wanted``; float32 but for the first."""
    if not any(wanted):
        return None, None, None
    (M, n), (block_m, block_n) = g.shape, configs.COLUMN_SUM_TILE
    g, t = _rows(g), _rows(t) if wanted[1] else g
    splits, per_split = configs.split_rows(M, block_m, triton.cdiv(n, block_n))
    gated = _empty(g, (M, n), g.dtype) if wanted[0] else None
    gate_partial, sum_partial = (_empty(g, (splits, n), torch.float32) if want else None for want in wanted[1:])
    args = (g, t, log_alpha.contiguous(), seed, gated, gate_partial, sum_partial, M, n, g.stride(0), t.stride(0), per_split)
    sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "GROUPED": n % 4 == 0, "GATE": spec}
    _launch(linear_kernels._gate_rows_bwd_kernel, (triton.cdiv(n, block_n), splits), *args, **sizes)
    dlog_alpha, total = (None if partial is None else _reduce(partial, (n,), torch.float32) for partial in (gate_partial, sum_partial))
    return gated, dlog_alpha, total


def _one_pass_bwd_dx(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, gates: Gates, spec: GateSpec, needs: Needs
) -> tuple[Maybe, Maybe]:
    if not (needs[0] or needs[3]):
        return None, None
    (M, K), N = x.shape, weight.shape[0]
    dy, x, w = _rows(dy), _rows(x), _rows(weight.to(x.dtype))
    tile, sizes = _gemm(M, N, K, x, spec)
    dx = _empty(x, (M, K), x.dtype) if needs[0] else None
    partial = _empty(x, (triton.cdiv(M, tile.rows), K), torch.float32) if needs[3] else None
    blocks = {"BLOCK_M": tile.rows, "BLOCK_K": tile.cols, "BLOCK_N": tile.depth, "EVEN": N % tile.depth == 0}
    args = (dy, x, w, *_vectors(*gates), dx, partial, M, N, K, dy.stride(0), x.stride(0), w.stride(0))
    _launch(linear_kernels._gated_linear_bwd_dx_kernel, (_tiles(M, K, tile),), *args, **blocks, **sizes)
    return dx, None if partial is None else _reduce(partial, (K,), torch.float32)


def _one_pass_bwd_dw(dy: torch.Tensor, x: torch.Tensor, dtype: torch.dtype, gates: Gates, spec: GateSpec) -> torch.Tensor:
    (M, K), N = x.shape, dy.shape[1]
    dy, x = _rows(dy), _rows(x)
    tile, sizes = _gemm(M, N, K, x, spec)
    tiles = _tiles(N, K, tile)
    splits, per_split = configs.split_rows(M, tile.depth, tiles)
    partial = _empty(x, (splits, N, K), torch.float32 if splits > 1 else dtype)
    blocks = {"BLOCK_N": tile.rows, "BLOCK_K": tile.cols, "BLOCK_M": tile.depth, "EVEN": splits * per_split == M}
    args = (dy, x, *_vectors(*gates), partial, M, N, K, dy.stride(0), x.stride(0), per_split)
    _launch(linear_kernels._gated_linear_bwd_dw_kernel, (tiles, splits), *args, **blocks, **sizes)
    return _reduce(partial, (N, K), dtype)


# ---- shared ------------------------------------------------------------------------------------------------------------------------------


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, **sizes: Any) -> None:
    """Launch on the tensors' device; an empty grid is nothing to do. No fused multiply-add: it would move a gate's threshold."""
    if 0 in grid:
        return
    device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*args, enable_fp_fusion=False, **sizes)


def _gemm(M: int, N: int, K: int, x: torch.Tensor, spec: GateSpec) -> tuple[configs.Tile, dict[str, Any]]:
    """The tile of a GEMM and the options its kernel takes besides the blocks."""
    tile = configs.gemm_tile(M, N, K, _DTYPE_NAMES[x.dtype], _capability(x.device))
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"  # allow_tf32 sets it too
    grouped = {"IN_GROUPED": K % 4 == 0, "OUT_GROUPED": N % 4 == 0}
    launch = {"GROUP": tile.group, "num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return tile, {**grouped, **launch, "PRECISION": "tf32" if tf32 else "ieee", "GATE": spec}


@functools.cache
def _capability(device: torch.device) -> int:
    """90 for sm_90; 0 where there is none (AMD, the interpreter)."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _tiles(rows: int, cols: int, tile: configs.Tile) -> int:
    return triton.cdiv(rows, tile.rows) * triton.cdiv(cols, tile.cols)


def _reduce(partial: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Sum of a (splits, ...) workspace over its first axis, in order."""
    if partial.shape[0] == 1 and partial.dtype == dtype:
        return partial.view(shape)
    out = _empty(partial, shape, dtype)
    block_s, block_n = configs.REDUCE_TILE
    grid = (triton.cdiv(out.numel(), block_n),)
    _launch(gate_kernels._reduce_kernel, grid, partial, out, partial.shape[0], out.numel(), BLOCK_S=block_s, BLOCK_N=block_n)
    return out


def _rows(t: torch.Tensor) -> torch.Tensor:
    """``t`` (rows, cols) itself if rows are dense and, where their length allows it, start at multiples of 16; else a contiguous copy."""
    dense = t.stride(1) == 1 and t.stride(0) >= t.shape[1]
    aligned = t.shape[1] % 16 != 0 or (t.stride(0) % 16 == 0 and t.data_ptr() % 16 == 0)
    return t if dense and aligned else t.contiguous()


def _vectors(*tensors: Maybe) -> tuple[Maybe, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def _empty(like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)
