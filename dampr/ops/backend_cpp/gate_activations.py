"""Multiply activations by gates along one dimension: calls of ``planes.h`` in csrc."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dampr import _C  # type: ignore[attr-defined]
from dampr.ops.gate_activations import planes
from dampr.ops.gate_args import GateArgs

from .gates import gate_rows, gate_rows_bwd, sample_gates_bwd, sample_gates_fwd
from .host import CODES, ptr


def gate_activations_fwd(x: Tensor, gate: GateArgs, dim: int) -> Tensor:
    """x * z along dimension ``dim``."""
    x, shape, _ = planes(x, dim, gate.per_sample)
    if gate.per_sample and shape.middle == shape.inner == 1:
        return gate_rows(x.view(shape.outer, shape.n), gate).view(x.shape)
    z = sample_gates_fwd(gate, gate.rows(shape.outer))
    out = torch.empty_like(x)
    _C.gate_planes_fwd(CODES[x.dtype], ptr(x), *shape[:4], ptr(z), gate.per_sample, ptr(out), torch.get_num_threads())
    return out


def gate_activations_bwd(
    dy: Tensor, x: Tensor, gate: GateArgs, dim: int, needs: Sequence[bool], over_x: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and log_alpha; ``over_x``: that of x may be written over x."""
    x, shape, layout = planes(x, dim, gate.per_sample)
    dy, rows = dy.contiguous(memory_format=layout), gate.rows(shape.outer)
    if gate.per_sample and shape.middle == shape.inner == 1:
        flat = x.view(shape.outer, shape.n), dy.view(shape.outer, shape.n)
        grads = gate_rows_bwd(*flat, gate, dx=needs[0], xz=False, dlog_alpha=needs[1])
        return None if grads.dx is None else grads.dx.view(x.shape), grads.dlog_alpha
    z = sample_gates_fwd(gate, rows)
    dx, dz = (x if over_x else torch.empty_like(x)) if needs[0] else None, torch.empty_like(z) if needs[1] else None
    args = *map(ptr, (dy, x)), *shape[:4], ptr(z), gate.per_sample, *map(ptr, (dx, dz))
    _C.gate_planes_bwd(CODES[x.dtype], *args, torch.get_num_threads())
    return dx, None if dz is None else sample_gates_bwd(dz, gate, rows)
