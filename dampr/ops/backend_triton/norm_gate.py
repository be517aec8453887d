"""Launches of dampr/kernels/norm_gate.py."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dampr.kernels import configs
from dampr.kernels import norm_gate as kernels
from dampr.ops.gate_activations import Planes, planes
from dampr.ops.gate_args import GateArgs
from dampr.ops.norm_gate import Norm, Running

from . import host
from .gates import sample_gates_bwd, sample_gates_fwd
from .host import Needs


class _Cut(NamedTuple):
    """The division of a tensor among the programs of a pass.

    Attributes:
        columns: whether channels lie along the columns of a tile, else each row of a tile is one plane of a channel.
        block: the tile, (rows, columns).
        programs: how many there are.
        outer: the number of places (samples or planes) that are divided on their own.
        length: the elements of a channel at one place.
        pieces: into how many pieces these are divided, each with sums of its own.
        step: the elements of one piece.
    """

    columns: bool
    block: tuple[int, int]
    programs: int
    outer: int
    length: int
    pieces: int
    step: int


def norm_gate_fwd(
    x: torch.Tensor,
    norm: Norm,
    gate: GateArgs,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    running: Running | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(y, mean, var); y has the dtype and the (dense) memory format of x, the last two are None if they were given.

    ``running``: statistics to update, float32 and contiguous; the kernel that joins the partial statistics does it.
    """
    x, shape, _ = planes(x, 1, gate.per_sample)
    batch = mean is None or var is None
    if mean is None or var is None:
        mean, var = _statistics(x, shape, running)
    y, z = torch.empty_like(x), sample_gates_fwd(gate, gate.rows(shape.outer))
    _pass(x, None, z, host.vectors(norm.gain, norm.bias, mean, var), None, y, None, shape, norm)
    return (y, mean, var) if batch else (y, None, None)


def norm_gate_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    norm: Norm,
    gate: GateArgs,
    mean: torch.Tensor,
    var: torch.Tensor,
    training: bool,
    needs: Needs,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The gradients of x, gain, bias and log_alpha; None for those that ``needs`` does not ask for."""
    x, shape, layout = planes(x, 1, gate.per_sample)
    dy, rows = dy.contiguous(memory_format=layout), gate.rows(shape.outer)
    z, vectors = sample_gates_fwd(gate, rows), host.vectors(norm.gain, norm.bias, mean, var)
    sums = dz = dx = None
    if training or any(needs[1:]):
        cut = _cut(shape)
        partial = host.empty(x, (cut.outer * cut.pieces, 2 * shape.n), torch.float32)
        if not x.numel():
            partial.zero_()
        _pass(x, dy, z, vectors, None, None, partial, shape, norm)
        dz = torch.empty_like(z) if needs[3] else None
        sums = _finish(partial, z, vectors, dz, shape)
    if needs[0]:
        dx = torch.empty_like(x)
        _pass(x, dy, z, vectors, sums if training else None, dx, None, shape, norm)
    dlog_alpha = None if dz is None else sample_gates_bwd(dz, gate, rows)
    dgain, dbias = (None if sums is None or not need else sums[i] for i, need in ((1, needs[1]), (0, needs[2])))
    return dx, dgain, dbias, dlog_alpha


def _cut(shape: Planes, columns: tuple[int, int] = configs.COLUMN_SUM_TILE) -> _Cut:
    """How to divide the tensor: rows into pieces if channels lie along columns (tiles of ``columns``), else each
    plane.
    """
    most = configs.NORM_MAX_PARTS if shape.per_outer else configs.NORM_MAX_SPLITS
    if shape.inner == 1:
        block_m, block_n = block = columns
        blocks = configs.cdiv(shape.n, block_n)
        pieces, step = configs.split_rows(shape.middle, block_m, blocks * shape.outer, configs.PASS_PROGRAMS, most)
        return _Cut(True, block, shape.outer * pieces * blocks, shape.outer, shape.middle, pieces, step)
    block_m, block_n = block = configs.PLANE_TILE
    blocks = configs.cdiv(shape.outer * shape.middle * shape.n, block_m)
    pieces, step = configs.split_rows(shape.inner, block_n, blocks, configs.PASS_PROGRAMS, most)
    return _Cut(False, block, blocks * pieces, shape.outer * shape.middle, shape.inner, pieces, step)


def _statistics(x: torch.Tensor, shape: Planes, running: Running | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, biased variance) of each channel, (n,); zeros if x is empty. Also updates ``running``."""
    if not x.numel():
        return host.empty(x, (shape.n,), torch.float32).zero_(), host.empty(x, (shape.n,), torch.float32).zero_()
    together = Planes(1, shape.outer * shape.middle, shape.n, shape.inner, False)
    cut = _cut(together, configs.COLUMN_MEAN_TILE)
    parts = cut.outer * cut.pieces
    means, spreads = (host.empty(x, (parts, shape.n), torch.float32) for _ in range(2))
    sizes = dict(zip(("BLOCK_M", "BLOCK_N"), cut.block, strict=True))
    if cut.columns:
        host.launch(
            kernels.norm_stats_columns_kernel,
            (cut.programs,),
            x,
            means,
            spreads,
            cut.length,
            shape.n,
            cut.step,
            **sizes,
        )
    else:
        numbers = together.middle * shape.n, shape.n, shape.inner, cut.step, cut.pieces
        host.launch(kernels.norm_stats_rows_kernel, (cut.programs,), x, means, spreads, *numbers, **sizes)
    mean, var = (host.empty(x, (shape.n,), torch.float32) for _ in range(2))
    block_s, block_n = configs.NORM_JOIN_TILE
    count = x.numel() // shape.n
    kept, momentum = ((None, None, None), 0.0) if running is None else (running[:3], running.momentum)
    # the weights of the old statistics, of the new mean, and of the new biased variance
    shares = 1.0 - momentum, momentum, momentum * count / max(1, count - 1)
    args = (
        means,
        spreads,
        mean,
        var,
        *kept,
        parts,
        shape.n,
        cut.length,
        cut.step,
        cut.pieces,
        count,
        *map(float, shares),
    )
    host.launch(
        kernels.norm_stats_join_kernel, (configs.cdiv(shape.n, block_n),), *args, BLOCK_S=block_s, BLOCK_N=block_n
    )
    return mean, var


def _pass(
    x: torch.Tensor,
    dy: torch.Tensor | None,
    z: torch.Tensor,
    vectors: tuple[torch.Tensor | None, ...],
    sums: torch.Tensor | None,
    out: torch.Tensor | None,
    partial: torch.Tensor | None,
    shape: Planes,
    norm: Norm,
) -> None:
    """Fill ``out`` with y or dx, or ``partial`` with sums, by what is None; see dampr/kernels/norm_gate.py."""
    if not x.numel():
        return
    cut = _cut(shape)
    sizes = dict(zip(("BLOCK_M", "BLOCK_N"), cut.block, strict=True)) | {
        "EPS": norm.eps,
        "RELU": norm.relu,
        "PER_OUTER": shape.per_outer,
    }
    tensors, count = (x, dy, z, *vectors, sums, out, partial), shape.outer * shape.middle * shape.inner
    if cut.columns:
        host.launch(
            kernels.norm_gate_columns_kernel, (cut.programs,), *tensors, shape.middle, shape.n, cut.step, count, **sizes
        )
    else:
        numbers = shape.outer * shape.middle * shape.n, shape.middle, shape.n, shape.inner, cut.step, cut.pieces, count
        host.launch(kernels.norm_gate_rows_kernel, (cut.programs,), *tensors, *numbers, **sizes)


def _finish(
    partial: torch.Tensor,
    z: torch.Tensor,
    vectors: tuple[torch.Tensor | None, ...],
    dz: torch.Tensor | None,
    shape: Planes,
) -> torch.Tensor:
    """(dbias, dgain) as (2, n), from ``partial`` (outer, parts, 2, n), the sums of the pass; also fills ``dz``."""
    if not shape.per_outer:
        partial = host.reduce(partial, (1, 2 * shape.n), torch.float32)
    block_s, block_n = configs.NORM_FINISH_TILE
    blocks = configs.cdiv(shape.n, block_n)
    splits, step = configs.split_rows(shape.outer, block_s, blocks)
    shares = host.empty(partial, (splits, 2 * shape.n), torch.float32)
    args = partial, z, *vectors[:2], dz, shares, shape.outer, partial.shape[0] // max(1, shape.outer), shape.n, step
    host.launch(kernels.norm_gate_finish_kernel, (splits * blocks,), *args, BLOCK_S=block_s, BLOCK_N=block_n)
    return host.reduce(shares, (2, shape.n), torch.float32)
