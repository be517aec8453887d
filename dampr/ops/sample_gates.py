"""z = gate(log_alpha, U(seed, start + index)), (n,) or (rows, n), for log_alpha (n,); the backward repeats the draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dampr import reference

from .backends import select
from .gate_args import GateArgs, unpack
from .library import define
from .node import Node, apply


def _fwd(log_alpha: Tensor, seed: Tensor | None, rows: int | None, spec: Sequence[float], start: int = 0) -> Tensor:
    """Implementation of ``dampr::sample_gates_fwd``: z (n,), or (rows, n) with a draw for each row.

    seed: int64 (1,); None if nothing is drawn. spec: the fields of a :class:`dampr.spec.GateSpec` as floats. start: the
    index of the first gate in the stream of noise.
    """
    z: Tensor = select(log_alpha.device, log_alpha.dtype).sample_gates_fwd(
        GateArgs(log_alpha, seed, unpack(spec)), rows, start
    )
    return z


def _fwd_fake(
    log_alpha: Tensor, seed: Tensor | None, rows: int | None, spec: Sequence[float], start: int = 0
) -> Tensor:
    """The empty result of :func:`_fwd`."""
    n = log_alpha.shape[0]
    return log_alpha.new_empty((n,) if rows is None else (rows, n))


def _bwd(
    dz: Tensor, log_alpha: Tensor, seed: Tensor | None, rows: int | None, spec: Sequence[float], start: int = 0
) -> Tensor:
    """Implementation of ``dampr::sample_gates_bwd``: the gradient of log_alpha, (n,), for dz like z."""
    grad: Tensor = select(log_alpha.device, log_alpha.dtype).sample_gates_bwd(
        dz, GateArgs(log_alpha, seed, unpack(spec)), rows, start
    )
    return grad


def _bwd_fake(dz: Tensor, log_alpha: Tensor, *_: Any) -> Tensor:
    """The empty result of :func:`_bwd`."""
    return log_alpha.new_empty(log_alpha.shape)


fwd = define(
    "sample_gates_fwd(Tensor log_alpha, Tensor? seed, SymInt? rows, float[] spec, SymInt start=0) -> Tensor",
    _fwd,
    _fwd_fake,
)
bwd = define(
    "sample_gates_bwd(Tensor dz, Tensor log_alpha, Tensor? seed, SymInt? rows, float[] spec, SymInt start=0) -> Tensor",
    _bwd,
    _bwd_fake,
)


class _SampleGates(Node):
    """The autograd function of :func:`sample_gates`."""

    tensors = 2

    @staticmethod
    def plain(log_alpha: Tensor, seed: Tensor | None, rows: int | None, spec: Any, start: int) -> Tensor:
        return reference.gate_values(log_alpha, spec, seed, rows, start)

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return fwd(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.constants = inputs[2:]
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def fused(ctx: Any, dz: Tensor) -> Any:
        return bwd(dz, *ctx.saved_tensors, *ctx.constants), None, None, None, None


def sample_gates(gate: GateArgs, rows: int | None, start: int = 0) -> Tensor:
    """Gate values, (n,) or (rows, n), differentiable; the noise of the first gate has the index ``start``.

    It does not check its arguments; :func:`dampr.functional.sample_gates` does.
    """
    z: Tensor = apply(_SampleGates, gate.log_alpha, gate.seed, rows, gate.spec, start)
    return z
