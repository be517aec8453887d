"""A batch norm and the gates behind it in one pass: ``norms.h`` of csrc."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dampr import _C  # type: ignore[attr-defined]
from dampr.ops.gate_activations import planes
from dampr.ops.gate_args import GateArgs, Maybe
from dampr.ops.norm_gate import Norm

from .gates import sample_gates_bwd, sample_gates_fwd
from .host import CODES, contiguous, ptr


def norm_gate_fwd(x: Tensor, norm: Norm, gate: GateArgs, mean: Maybe, var: Maybe) -> tuple[Tensor, Maybe, Maybe]:
    x, shape, _ = planes(x, 1, gate.per_sample)
    code, threads, given = CODES[x.dtype], torch.get_num_threads(), mean is not None
    if mean is None or var is None:
        mean, var = torch.empty_like(gate.log_alpha), torch.empty_like(gate.log_alpha)
        _C.norm_stats(code, ptr(x), *shape[:4], ptr(mean), ptr(var), threads)
    z, vectors = sample_gates_fwd(gate, gate.rows(shape.outer)), contiguous(norm.gain, norm.bias, mean, var)
    out = torch.empty_like(x)
    args = ptr(x), *shape[:4], ptr(z), gate.per_sample, *map(ptr, vectors), norm.eps, norm.relu, ptr(out)
    _C.norm_gate_fwd(code, *args, threads)
    return (out, None, None) if given else (out, mean, var)


def norm_gate_bwd(
    dy: Tensor, x: Tensor, norm: Norm, gate: GateArgs, mean: Tensor, var: Tensor, training: bool, needs: Sequence[bool]
) -> tuple[Maybe, ...]:
    x, shape, layout = planes(x, 1, gate.per_sample)
    dy, rows = dy.contiguous(memory_format=layout), gate.rows(shape.outer)
    z, vectors = sample_gates_fwd(gate, rows), contiguous(norm.gain, norm.bias, mean, var)
    dx = torch.empty_like(x) if needs[0] else None
    like = gate.log_alpha, gate.log_alpha, z
    dgain, dbias, dz = (torch.empty_like(t) if need else None for t, need in zip(like, needs[1:], strict=True))
    args = ptr(dy), ptr(x), *shape[:4], ptr(z), gate.per_sample, *map(ptr, vectors), norm.eps, norm.relu, training
    _C.norm_gate_bwd(CODES[x.dtype], *args, *map(ptr, (dx, dgain, dbias, dz)), torch.get_num_threads())
    return dx, dgain, dbias, None if dz is None else sample_gates_bwd(dz, gate, rows)
