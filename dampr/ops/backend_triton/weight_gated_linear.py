"""Launches of dampr/kernels/weight_gated_linear.py: linear layers with gates on weights and on blocks of weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dampr.kernels import configs
from dampr.kernels import weight_gated_linear as weight_kernels
from dampr.ops.gate_args import GateArgs
from dampr.ops.library import rows_of
from dampr.ops.plan import Plan
from dampr.spec import GateSpec

from . import host
from .gated_linear import fold_gate_bwd
from .gates import sample_gates_fwd
from .host import Needs
from .routes import route


def plan_weights(x: torch.Tensor, weight: torch.Tensor, spec: GateSpec, block: tuple[int, int]) -> Plan:
    """The plan of a call. Raises ValueError if a forced route cannot serve it."""
    M, (N, K) = x.shape[:-1].numel(), weight.shape
    name = route(M, N, K, x.dtype, block, False, x.device)[0]
    return Plan(name, _fwd, _bwd, spec, M, keep=name == "fold" and host.keeps_cast(x, weight), block=block)


def _fwd(
    plan: Plan,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    log_alpha: torch.Tensor,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(y, the folded weight if the plan keeps it, else None)."""
    gate = GateArgs(log_alpha, seed, plan.spec)
    if not plan.keep:
        return weight_gated_linear_fwd(x, weight, bias, gate, plan.block, plan.route), None
    folded = fold_blocks_fwd(weight, gate, plan.block, x.dtype)
    return torch.nn.functional.linear(x, folded, None if bias is None else bias.to(x.dtype)), folded


def _bwd(
    plan: Plan, dy: torch.Tensor, tensors: Sequence[torch.Tensor | None], needs: Needs
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of x, weight, bias and log_alpha by a plan; ``tensors``: those of the forward, and the kept one."""
    x, weight, bias, log_alpha, seed, folded = tensors
    assert x is not None
    assert weight is not None
    assert log_alpha is not None
    return weight_gated_linear_bwd(
        dy, x, weight, bias, GateArgs(log_alpha, seed, plan.spec), plan.block, needs[:4], folded
    )


def weight_gated_linear_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gate: GateArgs,
    block: tuple[int, int],
    name: str | None = None,
) -> torch.Tensor:
    """y = x (W * Z)^T + b, (..., N) in the dtype of x, with a gate for each ``block`` = (R, C) of weights.

    Args:
        x: (..., K).
        weight, bias: (N, K) and (N,), of any floating dtype (float32 under autocast).
        gate: float32 log_alphas, (ceil(N / R) ceil(K / C),), row by row.
        block: (R, C).
        name: the route, if it was chosen before.
    """
    if (plan_weights(x, weight, gate.spec, block).route if name is None else name) == "small_m":
        N, rows = weight.shape[0], rows_of(x)
        return _small_m_fwd(rows, weight, bias, gate).view(*x.shape[:-1], N)
    folded = fold_blocks_fwd(weight, gate, block, x.dtype)
    return torch.nn.functional.linear(x, folded, None if bias is None else bias.to(x.dtype))


def weight_gated_linear_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gate: GateArgs,
    block: tuple[int, int],
    needs: Needs,
    folded: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The gradients of x, weight, bias and log_alpha; None for those that ``needs`` does not ask for.

    ``folded``: W * Z, if the forward kept it.
    """
    shape, dy, x = x.shape, rows_of(dy), rows_of(x)
    dx = dbias = dweight = dlog_alpha = None
    if needs[0]:
        dx = (dy @ (fold_blocks_fwd(weight, gate, block, x.dtype) if folded is None else folded)).view(shape)
    if needs[1] or needs[3]:
        dweight, dlog_alpha = fold_blocks_bwd(dy.t() @ x, weight, gate, block, (needs[1], needs[3]))
    if needs[2] and bias is not None:
        dbias = dy.sum(0, dtype=torch.float32).to(bias.dtype)
    return dx, dweight, dbias, dlog_alpha


def fold_blocks_fwd(weight: torch.Tensor, gate: GateArgs, block: tuple[int, int], dtype: torch.dtype) -> Any:
    """W * Z in ``dtype``; weight: (N, K)."""
    return _gate_weight(weight, dtype, None, gate, block)[0]


def fold_blocks_bwd(
    raw: torch.Tensor, weight: torch.Tensor, gate: GateArgs, block: tuple[int, int], needs: Needs
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients of weight and log_alpha from that of the folded weight, ``raw`` (N, K)."""
    wanted = weight.dtype if needs[0] else None, weight if needs[1] else None
    return _gate_weight(raw, *wanted, gate, block)


def _gate_weight(
    t: torch.Tensor, dtype: torch.dtype | None, weight: torch.Tensor | None, gate: GateArgs, block: tuple[int, int]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(t Z in ``dtype``, dlog_alpha) for t (N, K), where dlog_alpha = z' times the sums of ``weight`` t over each gate.

    The first is None without ``dtype``, the second without ``weight``.
    """
    gated = None if dtype is None else host.empty(t, (t.shape[0], t.shape[1]), dtype)
    if tuple(block) != (1, 1):
        return gated, _gate_blocks(t, gated, weight, gate, block)
    dlog_alpha = None if weight is None else host.empty(t, gate.log_alpha.shape, torch.float32)
    args = *host.vectors(t, weight, gate.log_alpha), gate.seed, gated, dlog_alpha, t.numel()
    grid = (configs.cdiv(t.numel(), configs.WEIGHT_BLOCK),)
    host.launch(weight_kernels.gate_weights_kernel, grid, *args, BLOCK=configs.WEIGHT_BLOCK, GATE=gate.spec)
    return gated, dlog_alpha


def _gate_blocks(
    t: torch.Tensor, gated: torch.Tensor | None, weight: torch.Tensor | None, gate: GateArgs, block: tuple[int, int]
) -> torch.Tensor | None:
    """Fill ``gated`` with t Z for gates on blocks; returns dlog_alpha, or None without ``weight``."""
    N, K = t.shape
    R, C = max(1, min(block[0], N)), max(1, min(block[1], K))  # a block larger than the matrix is one of its size
    across = configs.cdiv(K, C)
    block_r, block_g, block_c = configs.block_tile(R, C, max(1, across))
    groups = configs.cdiv(N, R) * configs.cdiv(across, block_g)
    splits, per_split = configs.split_rows(R, block_r, groups)
    t, w = host.rows(t), None if weight is None else host.rows(weight)
    partial = None if w is None else host.empty(t, (splits, gate.log_alpha.numel()), torch.float32)
    args = (
        t,
        w,
        sample_gates_fwd(gate, None),
        gated,
        partial,
        N,
        K,
        t.stride(0),
        0 if w is None else w.stride(0),
        per_split,
    )
    sizes = {"R": R, "C": C, "BLOCK_R": block_r, "BLOCK_G": block_g, "BLOCK_C": block_c}
    host.launch(weight_kernels.gate_blocks_kernel, (groups, splits), *args, **sizes)
    return fold_gate_bwd(partial, gate)


def _small_m_fwd(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gate: GateArgs) -> torch.Tensor:
    """y by the route "small_m": a GEMM that draws the gates of the weights that it reads."""
    (M, K), N = x.shape, weight.shape[0]
    x = host.rows(x)
    tile = configs.small_m_tile(M, N, K, *host.machine(x))
    tiles = configs.cdiv(N, tile.rows) * configs.cdiv(M, tile.cols)
    splits, per_split = configs.split_rows(K, tile.depth, tiles)
    partial = host.empty(x, (splits, M, N), torch.float32 if splits > 1 else x.dtype)
    blocks = {
        "BLOCK_N": tile.rows,
        "BLOCK_M": tile.cols,
        "BLOCK_K": tile.depth,
        "EVEN": splits * per_split == K,
        "GROUPED": K % 4 == 0,
    }
    args = x, *host.vectors(weight, bias, gate.log_alpha), gate.seed, partial, M, N, K, x.stride(0), per_split
    sizes = host.gemm_options(tile, x, gate.spec)
    host.launch(weight_kernels.weight_gated_linear_fwd_kernel, (tiles, splits), *args, **blocks, **sizes)
    return host.reduce(partial, (M, N), x.dtype)
