"""x * z along one dimension, a draw per call or one per sample (index of the first dimension),
as one op forward and one op backward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dampr import reference

from .backends import select
from .gate_args import GateArgs
from .library import define, or_empty, wanted
from .node import Node, apply


class Planes(NamedTuple):
    """A tensor seen as (outer, middle, n, inner), in the order of its memory; gates are on n,
    with a draw for each outer index, or one.
    """

    outer: int
    middle: int
    n: int
    inner: int
    per_outer: bool


def dense_format(x: Tensor, dim: int) -> torch.memory_format:
    """Channels last where ``x`` is and the gates are on its channels, else contiguous."""
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    if dim == 1 and x.dim() in layouts and not x.is_contiguous() and x.is_contiguous(memory_format=layouts[x.dim()]):
        return layouts[x.dim()]
    return torch.contiguous_format


def planes(x: Tensor, dim: int, per_sample: bool) -> tuple[Tensor, Planes, torch.memory_format]:
    """``x`` in a dense layout, that layout as :class:`Planes`, and as a memory format."""
    layout = dense_format(x, dim)
    x = x.contiguous(memory_format=layout)
    outer, middle, n, inner = 1, math.prod(x.shape[:dim]), x.shape[dim], math.prod(x.shape[dim + 1 :])
    if layout != torch.contiguous_format:
        middle, inner = middle * inner, 1
    if per_sample:
        outer, middle = x.shape[0], middle // max(1, x.shape[0])
    return x, Planes(outer, middle, n, inner, per_sample), layout


def _fwd(
    x: Tensor, log_alpha: Tensor, seed: Tensor | None, spec: Sequence[float], dim: int, per_sample: bool
) -> Tensor:
    gate = GateArgs.of(log_alpha, seed, spec, per_sample)
    y: Tensor = select(x.device, x.dtype).gate_activations_fwd(x, gate, dim)
    return y


def _fwd_fake(
    x: Tensor, log_alpha: Tensor, seed: Tensor | None, spec: Sequence[float], dim: int, per_sample: bool
) -> Tensor:
    return torch.empty_like(x, memory_format=dense_format(x, dim))


def _bwd(
    dy: Tensor,
    x: Tensor,
    log_alpha: Tensor,
    seed: Tensor | None,
    spec: Sequence[float],
    dim: int,
    per_sample: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    gate = GateArgs.of(log_alpha, seed, spec, per_sample)
    grads: tuple[Tensor | None, ...] = select(x.device, x.dtype).gate_activations_bwd(dy, x, gate, dim, needs)
    return grads


def _bwd_fake(dy: Tensor, x: Tensor, log_alpha: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, dim, _, needs = rest
    dx = torch.empty_like(x, memory_format=dense_format(x, dim)) if needs[0] else x.new_empty(0)
    return dx, torch.empty_like(log_alpha) if needs[1] else x.new_empty(0)


_INPUTS = "Tensor x, Tensor log_alpha, Tensor? seed, float[] spec, int dim, bool per_sample"
fwd = define(f"gate_activations_fwd({_INPUTS}) -> Tensor", _fwd, _fwd_fake)
bwd = define(
    f"gate_activations_bwd(Tensor dy, {_INPUTS}, bool[] needs) -> (Tensor, Tensor)",
    _bwd,
    _bwd_fake,
    lambda grads, dy, x, *_: or_empty(grads, x),
)


class _GateActivations(Node):
    tensors = 3
    plain = staticmethod(reference.gate_activations)

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return fwd(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.constants = inputs[3:]
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def fused(ctx: Any, dy: Tensor) -> Any:
        needs = list(ctx.needs_input_grad[:2])
        grads = bwd(dy, *ctx.saved_tensors, *ctx.constants, needs)
        return (*wanted(grads, needs), None, None, None, None)


def gate_activations(x: Tensor, gate: GateArgs, dim: int) -> Tensor:
    """Differentiable; arguments are taken as checked (:func:`dampr.functional.gate_activations` checks)."""
    y: Tensor = apply(_GateActivations, x, gate.log_alpha, gate.seed, gate.spec, dim, gate.per_sample)
    return y
