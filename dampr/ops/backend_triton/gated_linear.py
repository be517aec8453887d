"""Launches of dampr/kernels/gated_linear.py and gated_linear_live.py: linear layers with gates on features.

Per batch: the gates are folded into the weight and the library's GEMM runs, or a GEMM skips closed blocks ("live"). Per
sample: one GEMM with the gates inside, or passes that multiply x, y and dy by gates around the library's GEMM. Gates
that are not drawn are the same for every sample, so they take a route per batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from dampr.kernels import configs
from dampr.kernels import gated_linear as linear_kernels
from dampr.kernels import gated_linear_live as live_kernels
from dampr.ops.gate_args import GateArgs, GatePair
from dampr.ops.library import rows_of
from dampr.ops.plan import Plan
from dampr.spec import GateSpec

from . import host
from .host import Needs
from .routes import route

PER_SAMPLE = "one_pass", "passes"
Grads = tuple[
    torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None
]  # of x, weight, bias, input_log_alpha, output_log_alpha


def plan_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    in_la: torch.Tensor | None,
    out_la: torch.Tensor | None,
    in_seed: torch.Tensor | None,
    out_seed: torch.Tensor | None,
    spec: GateSpec,
    per_sample: bool,
    learns: bool,
) -> Plan:
    """The plan of a call; ``learns``: whether the output gates need a gradient.

    Raises: ValueError if a forced route cannot serve the call.
    """
    gates = GatePair(in_la, out_la, in_seed, out_seed, spec, per_sample)
    name = _route(x, weight, gates)
    keep = learns if per_sample else name == "fold" and host.keeps_cast(x, weight)
    return Plan(name, _fwd, _bwd, spec, x.shape[:-1].numel(), per_sample, keep)


def _fwd(
    plan: Plan,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    in_la: torch.Tensor | None,
    out_la: torch.Tensor | None,
    in_seed: torch.Tensor | None,
    out_seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(y, what is kept for the backward) by a plan: the folded weight, or y before the output gates, or None."""
    gates = GatePair(in_la, out_la, in_seed, out_seed, plan.spec, plan.per_sample)
    if plan.route == "fold":
        folded, folded_bias = fold_weight_fwd(weight, bias, gates, x.dtype)
        return torch.nn.functional.linear(x, folded, folded_bias), folded if plan.keep else None
    y, pre = gated_linear_fwd(x, weight, bias, gates, plan.keep, plan.route)
    return y, pre if plan.keep else None


def _bwd(
    plan: Plan, dy: torch.Tensor, tensors: Sequence[torch.Tensor | None], needs: Needs
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of x, weight, bias and both log_alphas by a plan; ``tensors``: those of the forward, and the kept
    one.
    """
    x, weight, bias, in_la, out_la, in_seed, out_seed, kept = tensors
    assert x is not None
    assert weight is not None
    gates = GatePair(in_la, out_la, in_seed, out_seed, plan.spec, plan.per_sample)
    if plan.route == "fold":
        dx, *others = _fold_bwd(rows_of(dy), rows_of(x), weight, bias, gates, needs[:5], kept)
        return None if dx is None else dx.view(x.shape), *others
    return gated_linear_bwd(dy, x, weight, bias, gates, x.new_empty(0) if kept is None else kept, needs[:5], plan.route)


def gated_linear_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gates: GatePair,
    keep_pre: bool,
    name: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, pre): y = z_out * ((x * z_in) W^T + b), (..., N) in the dtype of x; pre is y before the output gates if
    ``keep_pre``, else empty.

    Args:
        x: (..., K).
        weight, bias: (N, K) and (N,), of any floating dtype (float32 under autocast).
        gates: float32 log_alphas, (K,) and (N,).
        keep_pre: whether to return pre.
        name: the route, if it was chosen before.
    """
    name = _route(x, weight, gates) if name is None else name
    if name in PER_SAMPLE:
        y, pre = _per_sample_fwd(rows_of(x), weight, bias, gates, keep_pre, name)
        shape = *x.shape[:-1], weight.shape[0]
        return y.view(shape), pre.view(shape) if keep_pre else pre
    if name == "live":
        y = gated_linear_live_fwd(x, weight, bias, gates)
    else:
        y = torch.nn.functional.linear(x, *fold_weight_fwd(weight, bias, gates, x.dtype))
    if not keep_pre:
        return y, x.new_empty(0)
    return y, torch.nn.functional.linear(
        x, *fold_weight_fwd(weight, bias, gates._replace(output_log_alpha=None), x.dtype)
    )


def gated_linear_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gates: GatePair,
    pre: torch.Tensor,
    needs: Needs,
    name: str | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of x, weight, bias, input_log_alpha and output_log_alpha; None where ``needs`` is False."""
    shape, name = x.shape, _route(x, weight, gates) if name is None else name
    dy, x = rows_of(dy), rows_of(x)
    if name in PER_SAMPLE:
        # if the output gate needs no gradient, ``pre`` was not kept; ``dy`` takes its place and is not read
        pre = pre.reshape(dy.shape) if pre.numel() == dy.numel() else dy
        dx, *others = _per_sample_bwd(dy, x, weight, bias, gates, pre, needs, name)
    else:
        dx, *others = _fold_bwd(dy, x, weight, bias, gates, needs)
    return None if dx is None else dx.view(shape), *others


def _any(gates: GatePair) -> bool:
    """Whether there are gates."""
    return gates.input_log_alpha is not None or gates.output_log_alpha is not None


def _route(x: torch.Tensor, weight: torch.Tensor, gates: GatePair) -> str:
    """The name of the route of a call."""
    if not _any(gates):
        return "fold"
    N, K = weight.shape
    granularity = "input" if gates.output_log_alpha is None else "output"
    return route(x.shape[:-1].numel(), N, K, x.dtype, granularity, gates.per_sample, x.device)[0]


# ---- per batch: gates folded into the weight


def fold_weight_fwd(
    weight: torch.Tensor, bias: torch.Tensor | None, gates: GatePair, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(z_out W z_in, z_out b) in ``dtype``; weight: (N, K)."""
    if not _any(gates):
        return weight.to(dtype), None if bias is None else bias.to(dtype)
    (N, K), (block_n, block_k) = weight.shape, configs.FOLD_FWD_TILE
    w, folded = host.rows(weight), host.empty(weight, (N, K), dtype)
    folded_bias = None
    if bias is not None:
        folded_bias = bias.to(dtype) if gates.output is None else host.empty(bias, (N,), dtype)
    # One column of tiles even for K = 0: it writes the bias.
    grid = (max(1, configs.cdiv(K, block_k)) * configs.cdiv(N, block_n),)
    args = (w, *host.vectors(bias, *gates[:4]), folded, folded_bias, N, K, w.stride(0))
    host.launch(linear_kernels.fold_fwd_kernel, grid, *args, BLOCK_N=block_n, BLOCK_K=block_k, GATE=gates.spec)
    return folded, folded_bias


def _fold_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gates: GatePair,
    needs: Needs,
    folded: torch.Tensor | None = None,
) -> Grads:
    """The gradients for rows dy (M, N) and x (M, K); ``folded``: the folded weight, if the forward kept it."""
    if needs[0] and folded is None:
        folded = fold_weight_fwd(weight, None, gates, x.dtype)[0]
    dx = dy @ folded if needs[0] and folded is not None else None
    dy_sum = dy.sum(0, dtype=torch.float32) if bias is not None and (needs[2] or needs[4]) else None
    raw = dy.t() @ x if needs[1] or needs[3] or needs[4] else None
    return dx, *fold_weight_bwd(raw, dy_sum, weight, bias, gates, needs[1:])


def fold_weight_bwd(
    raw: torch.Tensor | None,
    raw_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gates: GatePair,
    needs: Needs,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The gradients of weight, bias and both log_alphas from those of the folded weight ``raw`` (N, K) and bias (N,).

    ``raw`` may be None if only the gradient of the bias is needed.
    """
    (N, K), (block_n, block_k) = weight.shape, configs.FOLD_BWD_TILE
    dbias = raw_bias.to(bias.dtype) if bias is not None and raw_bias is not None and needs[1] else None
    if not _any(gates):
        return None if raw is None else raw.to(weight.dtype), dbias, None, None
    tiles_n, tiles_k = configs.cdiv(N, block_n), configs.cdiv(K, block_k)
    dweight = host.empty(weight, (N, K), weight.dtype) if needs[0] else None
    in_partial = host.empty(weight, (tiles_n, K), torch.float32) if needs[2] else None
    out_partial = host.empty(weight, (tiles_k, N), torch.float32) if needs[3] else None
    if raw is not None:
        w = host.rows(weight)
        args = (raw.contiguous(), w, *host.vectors(*gates[:4]), dweight, in_partial, out_partial, N, K, w.stride(0))
        host.launch(
            linear_kernels.fold_bwd_kernel,
            (tiles_k * tiles_n,),
            *args,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            GATE=gates.spec,
        )
    dinput = fold_gate_bwd(in_partial, gates.input)
    if gates.output is None:
        return dweight, dbias, dinput, None
    dbias = None if bias is None or not needs[1] else host.empty(bias, (N,), bias.dtype)
    raw_bias = None if raw_bias is None else raw_bias.float()
    doutput = fold_gate_bwd(out_partial, gates.output, bias, raw_bias, dbias)
    return dweight, dbias, dinput, doutput


def fold_gate_bwd(
    partial: torch.Tensor | None,
    gate: GateArgs | None,
    bias: torch.Tensor | None = None,
    dy_sum: torch.Tensor | None = None,
    dbias: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """dlog_alpha from a workspace of dz, (splits, n); None if there is no workspace. Fills ``dbias`` if it is given."""
    if gate is None or (partial is None and dbias is None):
        return None
    n, (block_s, block_n) = gate.log_alpha.numel(), configs.REDUCE_TILE
    dlog_alpha, splits = (None, 0) if partial is None else (host.empty(partial, (n,), torch.float32), partial.shape[0])
    args = partial, *host.vectors(bias, dy_sum, gate.log_alpha), gate.seed, dlog_alpha, dbias, splits, n
    grid = (configs.cdiv(n, block_n),)
    host.launch(linear_kernels.fold_gate_bwd_kernel, grid, *args, BLOCK_S=block_s, BLOCK_N=block_n, GATE=gate.spec)
    return dlog_alpha


# ---- per batch: a GEMM over live blocks


def gated_linear_live_fwd(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gates: GatePair
) -> torch.Tensor:
    """y of :func:`gated_linear_fwd` with one draw per batch, by a GEMM that skips blocks of input features, and output
    tiles, whose gates are all 0.
    """
    rows, (N, K) = rows_of(x), weight.shape
    tile = configs.live_tile(rows.shape[0], N, K, *host.machine(x))
    y = _live_gemm(rows, weight, bias, gates, _live_blocks(rows, gates, K, tile.depth), tile)
    return y.view(*x.shape[:-1], N)


class Live(NamedTuple):
    """The input gates in the form in which the GEMM reads them, on the device of x.

    Attributes:
        z: the gate values, (K,).
        blocks: the indices of the blocks of features with an open gate, increasing, int32.
        number: how many such blocks there are, (1,).
    """

    z: torch.Tensor
    blocks: torch.Tensor
    number: torch.Tensor


def _live_blocks(x: torch.Tensor, gates: GatePair, K: int, depth: int) -> Live:
    """Draw the input gates and list the blocks of ``depth`` features that have an open one."""
    z = host.empty(x, (K,), torch.float32)
    live, count = (host.empty(x, (size,), torch.int32) for size in (configs.cdiv(K, depth), 1))
    log_alpha, _, seed, _ = host.vectors(*gates[:4])
    sizes = {"BLOCKS": configs.LIVE_BLOCKS, "BLOCK_K": depth, "GATE": gates.spec}
    host.launch(live_kernels.live_blocks_kernel, (1,), log_alpha, seed, z, live, count, K, **sizes)
    return Live(z, live, count)


def _live_gemm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gates: GatePair, live: Live, tile: configs.Tile
) -> torch.Tensor:
    """Launch the GEMM over these blocks."""
    (M, K), N = x.shape, weight.shape[0]
    x, w = host.rows(x), host.rows(weight.to(x.dtype))
    y = host.empty(x, (M, N), x.dtype)
    blocks = {"BLOCK_M": tile.rows, "BLOCK_N": tile.cols, "BLOCK_K": tile.depth, "EVEN": K % tile.depth == 0}
    bias, _, log_alpha, _, seed = host.vectors(bias, *gates[:4])
    args = (x, w, bias, live.z, log_alpha, seed, live.blocks, live.number, y, M, N, K, x.stride(0), w.stride(0))
    sizes = host.gemm_options(tile, x, gates.spec)
    host.launch(live_kernels.gated_linear_live_fwd_kernel, (host.tiles(M, N, tile),), *args, **blocks, **sizes)
    return y


# ---- per sample: gates inside one GEMM, or in passes of their own around the vendor GEMM


def _per_sample_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gates: GatePair,
    keep_pre: bool,
    name: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, y before the output gates or an empty tensor) with a draw for each row, by the route ``name``."""
    (M, K), N, nothing = x.shape, weight.shape[0], x.new_empty(0)
    if (_route(x, weight, gates) if name is None else name) == "passes":
        x = x if gates.input is None else _gate_rows(x, gates.input)
        pre = torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return pre if gates.output is None else _gate_rows(pre, gates.output), pre if keep_pre else nothing
    x, w = host.rows(x), host.rows(weight.to(x.dtype))
    y = host.empty(x, (M, N), x.dtype)
    kept = host.empty(x, (M, N), x.dtype) if keep_pre else None
    tile = configs.gemm_tile(M, N, K, *host.machine(x))
    blocks = {"BLOCK_M": tile.rows, "BLOCK_N": tile.cols, "BLOCK_K": tile.depth, "EVEN": K % tile.depth == 0}
    args = (x, w, *host.vectors(bias, *gates[:4]), y, kept, M, N, K, x.stride(0), w.stride(0))
    host.launch(
        linear_kernels.gated_linear_fwd_kernel,
        (host.tiles(M, N, tile),),
        *args,
        **blocks,
        **_grouped(N, K),
        **host.gemm_options(tile, x, gates.spec),
    )
    return y, nothing if kept is None else kept


def _per_sample_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gates: GatePair,
    pre: torch.Tensor,
    needs: Needs,
    name: str,
) -> Grads:
    """The gradients with a draw for each row, by the route ``name``; ``pre``: y before the output gates."""
    one_pass = name == "one_pass"
    doutput = db = None
    gated_dy: torch.Tensor | None = dy
    if gates.output is not None:
        wanted = not one_pass and (needs[0] or needs[1] or needs[3]), needs[4], needs[2]
        gated_dy, doutput, db = _gate_rows_bwd(dy, pre, gates.output, wanted)
    elif needs[2]:
        db = dy.sum(0, dtype=torch.float32)
    dbias = None if db is None or bias is None else db.to(bias.dtype)
    if one_pass:
        dx, dinput = _one_pass_bwd_dx(dy, x, weight, gates, needs)
        dweight = _one_pass_bwd_dw(dy, x, weight.dtype, gates) if needs[1] else None
    else:
        dx, dinput, dweight = _passes_bwd(gated_dy, x, weight, gates, needs)
    return dx, dweight, dbias, dinput, doutput


def _passes_bwd(
    gated_dy: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, gates: GatePair, needs: Needs
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(dx, dinput_log_alpha, dweight) from ``gated_dy`` = dy * z_out, which is None only if none of them is needed."""
    dx = dinput = dweight = None
    if gated_dy is not None and (needs[0] or needs[3]):
        dx = gated_dy @ weight.to(x.dtype)
        if gates.input is not None:
            dx, dinput, _ = _gate_rows_bwd(dx, x, gates.input, (needs[0], needs[3], False))
    if gated_dy is not None and needs[1]:
        gated_x = x if gates.input is None else _gate_rows(x, gates.input)
        dweight = (gated_dy.t() @ gated_x).to(weight.dtype)
    return dx, dinput, dweight


def _gate_rows(t: torch.Tensor, gate: GateArgs) -> torch.Tensor:
    """t * z in the dtype of t (M, n)."""
    (M, n), (block_m, block_n) = t.shape, configs.GATE_TILE
    t, gated = host.rows(t), host.empty(t, (M, n), t.dtype)
    sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "GROUPED": n % 4 == 0, "GATE": gate.spec}
    grid = (configs.cdiv(n, block_n) * configs.cdiv(M, block_m),)
    args = t, gate.log_alpha.contiguous(), gate.seed, gated, M, n, t.stride(0)
    host.launch(linear_kernels.gate_rows_fwd_kernel, grid, *args, **sizes)
    return gated


def _gate_rows_bwd(
    g: torch.Tensor, t: torch.Tensor, gate: GateArgs, wanted: tuple[bool, bool, bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(g z, dlog_alpha, sums of g z over rows) for y = t z with gradient g (M, n); None for those that are not
    ``wanted``.

    The last two are float32.
    """
    if not any(wanted):
        return None, None, None
    (M, n), (block_m, block_n) = g.shape, configs.COLUMN_SUM_TILE
    g, t = host.rows(g), host.rows(t) if wanted[1] else g
    splits, per_split = configs.split_rows(M, block_m, configs.cdiv(n, block_n), configs.PASS_PROGRAMS)
    gated = host.empty(g, (M, n), g.dtype) if wanted[0] else None
    gate_partial, sum_partial = (host.empty(g, (splits, n), torch.float32) if want else None for want in wanted[1:])
    args = (
        g,
        t,
        gate.log_alpha.contiguous(),
        gate.seed,
        gated,
        gate_partial,
        sum_partial,
        M,
        n,
        g.stride(0),
        t.stride(0),
        per_split,
    )
    sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "GROUPED": n % 4 == 0, "GATE": gate.spec}
    host.launch(linear_kernels.gate_rows_bwd_kernel, (configs.cdiv(n, block_n), splits), *args, **sizes)
    dlog_alpha, total = (
        None if partial is None else host.reduce(partial, (n,), torch.float32)
        for partial in (gate_partial, sum_partial)
    )
    return gated, dlog_alpha, total


def _one_pass_bwd_dx(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, gates: GatePair, needs: Needs
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(dx, dinput_log_alpha) by one GEMM with the gates inside."""
    if not (needs[0] or needs[3]):
        return None, None
    (M, K), N = x.shape, weight.shape[0]
    dy, x, w = host.rows(dy), host.rows(x), host.rows(weight.to(x.dtype))
    tile = configs.gemm_tile(M, N, K, *host.machine(x))
    dx = host.empty(x, (M, K), x.dtype) if needs[0] else None
    partial = host.empty(x, (configs.cdiv(M, tile.rows), K), torch.float32) if needs[3] else None
    blocks = {"BLOCK_M": tile.rows, "BLOCK_K": tile.cols, "BLOCK_N": tile.depth, "EVEN": N % tile.depth == 0}
    args = (dy, x, w, *host.vectors(*gates[:4]), dx, partial, M, N, K, dy.stride(0), x.stride(0), w.stride(0))
    host.launch(
        linear_kernels.gated_linear_bwd_dx_kernel,
        (host.tiles(M, K, tile),),
        *args,
        **blocks,
        **_grouped(N, K),
        **host.gemm_options(tile, x, gates.spec),
    )
    return dx, None if partial is None else host.reduce(partial, (K,), torch.float32)


def _one_pass_bwd_dw(dy: torch.Tensor, x: torch.Tensor, dtype: torch.dtype, gates: GatePair) -> torch.Tensor:
    """dweight (N, K) in ``dtype`` by one GEMM with the gates inside."""
    (M, K), N = x.shape, dy.shape[1]
    dy, x = host.rows(dy), host.rows(x)
    tile = configs.gemm_tile(M, N, K, *host.machine(x))
    tiles = host.tiles(N, K, tile)
    splits, per_split = configs.split_rows(M, tile.depth, tiles)
    partial = host.empty(x, (splits, N, K), torch.float32 if splits > 1 else dtype)
    blocks = {"BLOCK_N": tile.rows, "BLOCK_K": tile.cols, "BLOCK_M": tile.depth, "EVEN": splits * per_split == M}
    args = (dy, x, *host.vectors(*gates[:4]), partial, M, N, K, dy.stride(0), x.stride(0), per_split)
    host.launch(
        linear_kernels.gated_linear_bwd_dw_kernel,
        (tiles, splits),
        *args,
        **blocks,
        **_grouped(N, K),
        **host.gemm_options(tile, x, gates.spec),
    )
    return host.reduce(partial, (N, K), dtype)


def _grouped(N: int, K: int) -> dict[str, bool]:
    """The constants IN_GROUPED and OUT_GROUPED: whether a row of gates starts at a multiple of four, so that one call
    of the random generator serves four gates.
    """
    return {"IN_GROUPED": K % 4 == 0, "OUT_GROUPED": N % 4 == 0}
