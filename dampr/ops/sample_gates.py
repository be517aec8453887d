"""z = gate(log_alpha, U(seed, index)): (n,) or (rows, n); the backward draws the same noise again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dampr import reference

from .backends import select
from .gate_args import GateArgs, Maybe, unpack
from .library import define
from .node import Node, apply


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


class _SampleGates(Node):
    tensors = 2

    @staticmethod
    def plain(log_alpha: Tensor, seed: Maybe, rows: int | None, spec: Any) -> Tensor:
        return reference.gate_values(log_alpha, spec, seed, rows)

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return fwd(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.constants = inputs[2:]
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def fused(ctx: Any, dz: Tensor) -> Any:
        return bwd(dz, *ctx.saved_tensors, *ctx.constants), None, None, None


def sample_gates(gate: GateArgs, rows: int | None) -> Tensor:
    """Differentiable gate values; arguments are taken as checked (:func:`dampr.functional.sample_gates` checks)."""
    z: Tensor = apply(_SampleGates, gate.log_alpha, gate.seed, rows, gate.spec)
    return z
