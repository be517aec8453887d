"""Launches of dampr/kernels/gate_activations.py."""

from __future__ import annotations

import torch

from dampr.kernels import configs
from dampr.kernels import gate_activations as kernels
from dampr.ops.gate_activations import Planes, planes
from dampr.ops.gate_args import GateArgs

from . import host
from .gates import sample_gates_bwd, sample_gates_fwd
from .host import Needs


def gate_activations_fwd(x: torch.Tensor, gate: GateArgs, dim: int) -> torch.Tensor:
    """x * z along ``dim``, in the dtype and (dense) memory format of x."""
    x, shape, _ = planes(x, dim, gate.per_sample)
    y = torch.empty_like(x)
    _gate(x, None, sample_gates_fwd(gate, gate.rows(shape.outer)), y, shape)
    return y


def gate_activations_bwd(
    dy: torch.Tensor, x: torch.Tensor, gate: GateArgs, dim: int, needs: Needs
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients of x and log_alpha; None for those that ``needs`` does not ask for."""
    x, shape, layout = planes(x, dim, gate.per_sample)
    rows = gate.rows(shape.outer)
    dx = torch.empty_like(x) if needs[0] else None
    z = sample_gates_fwd(gate, rows)
    dz = _gate(dy.contiguous(memory_format=layout), x if needs[1] else None, z, dx, shape)
    return dx, None if dz is None else sample_gates_bwd(dz, gate, rows)


def _gate(
    t: torch.Tensor, other: torch.Tensor | None, z: torch.Tensor, out: torch.Tensor | None, shape: Planes
) -> torch.Tensor | None:
    """Fill ``out`` with t * z, and return the sums of t * other in the shape of z; None without ``other``.

    ``out`` may be None.
    """
    if shape.inner == 1:
        block_m, block_n = configs.COLUMN_SUM_TILE
        blocks = configs.cdiv(shape.n, block_n)
        splits, per_split = configs.split_rows(
            max(1, shape.middle), block_m, blocks * shape.outer, configs.PASS_PROGRAMS
        )
        partial = None if other is None else host.empty(t, (shape.outer * splits, shape.n), torch.float32)
        grid = (shape.outer * splits * blocks,)
        sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "PER_OUTER": shape.per_outer}
        host.launch(
            kernels.gate_columns_kernel, grid, t, other, z, out, partial, shape.middle, shape.n, per_split, **sizes
        )
    else:
        rows, (block_m, block_n) = shape.outer * shape.middle * shape.n, configs.PLANE_TILE
        splits = shape.middle
        partial = None if other is None else host.empty(t, (shape.outer * splits, shape.n), torch.float32)
        sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "PER_OUTER": shape.per_outer}
        args = t, other, z, out, partial, rows, shape.middle, shape.n, shape.inner
        host.launch(kernels.gate_rows_of_planes_kernel, (configs.cdiv(rows, block_m),), *args, **sizes)
    if partial is None:
        return None
    if not shape.per_outer:
        return host.reduce(partial, (shape.n,), torch.float32)
    return partial.view(shape.outer, splits, shape.n).sum(1) if splits != 1 else partial
