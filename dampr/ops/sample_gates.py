"""z = gate(log_alpha, U(seed, index)): (n,) or (rows, n); the backward draws the same noise again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import select
from .gate_args import GateArgs, Maybe, unpack
from .library import apply, define, once_differentiable


def _fwd(log_alpha: Tensor, seed: Maybe, rows: int | None, spec: Sequence[float]) -> Tensor:
    z: Tensor = select(log_alpha.device, log_alpha.dtype).sample_gates_fwd(GateArgs(log_alpha, seed, unpack(spec)), rows)
    return z


def _fwd_fake(log_alpha: Tensor, seed: Maybe, rows: int | None, spec: Sequence[float]) -> Tensor:
    n = log_alpha.shape[0]
    return log_alpha.new_empty((n,) if rows is None else (rows, n))


def _bwd(dz: Tensor, log_alpha: Tensor, seed: Maybe, rows: int | None, spec: Sequence[float]) -> Tensor:
    grad: Tensor = select(log_alpha.device, log_alpha.dtype).sample_gates_bwd(dz, GateArgs(log_alpha, seed, unpack(spec)), rows)
    return grad


def _bwd_fake(dz: Tensor, log_alpha: Tensor, *_: Any) -> Tensor:
    return log_alpha.new_empty(log_alpha.shape)


fwd = define("sample_gates_fwd(Tensor log_alpha, Tensor? seed, SymInt? rows, float[] spec) -> Tensor", _fwd, _fwd_fake)
bwd = define("sample_gates_bwd(Tensor dz, Tensor log_alpha, Tensor? seed, SymInt? rows, float[] spec) -> Tensor", _bwd, _bwd_fake)


class _SampleGates(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> Any:
        return fwd(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        log_alpha, seed, ctx.rows, ctx.spec = inputs
        ctx.save_for_backward(log_alpha, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> Any:  # type: ignore[override]
        log_alpha, seed = ctx.saved_tensors
        return bwd(dz, log_alpha, seed, ctx.rows, ctx.spec), None, None, None


def sample_gates(gate: GateArgs, rows: int | None) -> Tensor:
    """Differentiable gate values; arguments are taken as checked (:func:`dampr.functional.sample_gates` checks)."""
    z: Tensor = apply(_SampleGates, gate.log_alpha, gate.seed, rows, gate.spec)
    return z
