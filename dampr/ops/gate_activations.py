"""x * z along one dimension of x, with one draw of the gates per call or one per sample (per index of dimension 0).

The forward and the backward are one operator each.
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
    """A tensor as (outer, middle, n, inner), in the order of its memory; the gates are on dimension n.

    ``per_outer``: whether each index of ``outer`` has a draw of its own.
    """

    outer: int
    middle: int
    n: int
    inner: int
    per_outer: bool


def dense_format(x: Tensor, dim: int) -> torch.memory_format:
    """The memory format of the result: channels last if ``x`` has it and ``dim`` is its channels, else contiguous."""
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    if dim == 1 and x.dim() in layouts and not x.is_contiguous() and x.is_contiguous(memory_format=layouts[x.dim()]):
        return layouts[x.dim()]
    return torch.contiguous_format


def planes(x: Tensor, dim: int, per_sample: bool) -> tuple[Tensor, Planes, torch.memory_format]:
    """(``x`` in a dense layout, its sizes as :class:`Planes`, the memory format of that layout)."""
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
    """Implementation of ``dampr::gate_activations_fwd``: x * z, like x, with log_alpha (x.shape[dim],).

    seed: int64 (1,); None if nothing is drawn. spec: the fields of a :class:`dampr.spec.GateSpec` as floats.
    """
    gate = GateArgs.of(log_alpha, seed, spec, per_sample)
    y: Tensor = select(x.device, x.dtype).gate_activations_fwd(x, gate, dim)
    return y


def _fwd_fake(
    x: Tensor, log_alpha: Tensor, seed: Tensor | None, spec: Sequence[float], dim: int, per_sample: bool
) -> Tensor:
    """The empty result of :func:`_fwd`."""
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
    """Implementation of ``dampr::gate_activations_bwd``: the gradients of x and log_alpha; None where ``needs`` is
    False.
    """
    gate = GateArgs.of(log_alpha, seed, spec, per_sample)
    grads: tuple[Tensor | None, ...] = select(x.device, x.dtype).gate_activations_bwd(dy, x, gate, dim, needs)
    return grads


def _bwd_fake(dy: Tensor, x: Tensor, log_alpha: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The empty results of :func:`_bwd`; a gradient that nobody needs has shape (0,).

    ``rest``: seed, spec, dim, per_sample, needs.
    """
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
    """The autograd function of :func:`gate_activations`."""

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
    """x * z along dimension ``dim``, differentiable; like x.

    It does not check its arguments; :func:`dampr.functional.gate_activations` does.
    """
    y: Tensor = apply(_GateActivations, x, gate.log_alpha, gate.seed, gate.spec, dim, gate.per_sample)
    return y
