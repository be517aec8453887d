"""y = act(z batch_norm(x)): statistics, normalisation, gates and ReLU as one op forward and one op backward. docs/kernels.md derives it.

Nothing of the size of x is kept but x: the norm before the gates, and where the ReLU let it through, are computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import select
from .gate_activations import dense_format
from .gate_args import GateArgs, Maybe
from .library import apply, define, once_differentiable, or_empty, wanted

Statistics = tuple[Tensor, Tensor]


class Norm(NamedTuple):
    """gain (x - mean) / sqrt(var + eps) + bias, and a ReLU behind the gates or none; vectors (C,), None: a gain of 1, no bias."""

    gain: Maybe
    bias: Maybe
    eps: float
    relu: bool


def _fwd(
    x: Tensor,
    gain: Maybe,
    bias: Maybe,
    log_alpha: Tensor,
    seed: Maybe,
    mean: Maybe,
    var: Maybe,
    eps: float,
    spec: Sequence[float],
    per_sample: bool,
    relu: bool,
) -> tuple[Tensor, Maybe, Maybe]:
    """y, and the statistics of x where none were given."""
    gate, norm = GateArgs.of(log_alpha, seed, spec, per_sample), Norm(gain, bias, eps, relu)
    made: tuple[Tensor, Maybe, Maybe] = select(x.device, x.dtype).norm_gate_fwd(x, norm, gate, mean, var)
    return made


def _fwd_fake(x: Tensor, gain: Maybe, bias: Maybe, log_alpha: Tensor, seed: Maybe, mean: Maybe, *_: Any) -> tuple[Tensor, ...]:
    y = torch.empty_like(x, memory_format=dense_format(x, 1))
    return y, *(torch.empty_like(log_alpha) if mean is None else x.new_empty(0) for _ in range(2))


def _bwd(
    dy: Tensor,
    x: Tensor,
    gain: Maybe,
    bias: Maybe,
    log_alpha: Tensor,
    seed: Maybe,
    mean: Tensor,
    var: Tensor,
    eps: float,
    spec: Sequence[float],
    per_sample: bool,
    relu: bool,
    training: bool,
    needs: Sequence[bool],
) -> tuple[Maybe, ...]:
    """Gradients of x, gain, bias and log_alpha; ``training``: mean and var are those of x."""
    gate, norm = GateArgs.of(log_alpha, seed, spec, per_sample), Norm(gain, bias, eps, relu)
    grads: tuple[Maybe, ...] = select(x.device, x.dtype).norm_gate_bwd(dy, x, norm, gate, mean, var, training, needs)
    return grads


def _bwd_fake(dy: Tensor, x: Tensor, gain: Maybe, bias: Maybe, log_alpha: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    needs = rest[-1]
    dx = torch.empty_like(x, memory_format=dense_format(x, 1)) if needs[0] else x.new_empty(0)
    others = (torch.empty_like(log_alpha) if need else x.new_empty(0) for need in needs[1:])
    return dx, *others


_TENSORS = "Tensor x, Tensor? gain, Tensor? bias, Tensor log_alpha, Tensor? seed"
_HOW = "float eps, float[] spec, bool per_sample, bool relu"
fwd = define(
    f"norm_gate_fwd({_TENSORS}, Tensor? mean, Tensor? var, {_HOW}) -> (Tensor, Tensor, Tensor)",
    _fwd,
    _fwd_fake,
    lambda made, x, *_: or_empty(made, x),
)
bwd = define(
    f"norm_gate_bwd(Tensor dy, {_TENSORS}, Tensor mean, Tensor var, {_HOW}, bool training, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
    lambda grads, dy, x, *_: or_empty(grads, x),
)


class _NormGate(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> Any:
        x, mean, (y, *own) = inputs[0], inputs[5], fwd(*inputs)
        return (y, *own) if mean is None else (y, x.new_empty(0), x.new_empty(0))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, mean, var, ctx.eps, ctx.spec, ctx.per_sample, ctx.relu = inputs
        ctx.training = mean is None
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*tensors, *(output[1:] if ctx.training else (mean, var)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Any) -> Any:  # type: ignore[override]
        needs = [*ctx.needs_input_grad[:4]]
        grads = bwd(dy, *ctx.saved_tensors, ctx.eps, ctx.spec, ctx.per_sample, ctx.relu, ctx.training, needs)
        return (*wanted(grads, needs), *[None] * 7)


def beats_torch(x: Tensor) -> bool:
    """Whether one pass with gates per batch and a ReLU is faster than torch's norm and a ReLU: in C++. On a GPU nobody has measured it.

    Not where somebody compiles, who fuses the smaller ops.
    """
    return not torch.compiler.is_compiling() and hasattr(select(x.device, x.dtype), "whole_norm")


def norm_gate(x: Tensor, norm: Norm, gate: GateArgs, statistics: Statistics | None) -> tuple[Tensor, Statistics]:
    """(y, the statistics that were used: ``statistics`` or the mean and biased variance of x); differentiable in x, gain, bias, log_alpha.

    x: (B, C, ...); everything else (C,), in the dtype of ``log_alpha``: float64 beside a float64 x, else float32. Arguments are taken as
    checked (:func:`dampr.functional.gated_batch_norm` checks).
    """
    given = (None, None) if statistics is None else statistics
    how = norm.eps, gate.spec, gate.per_sample, norm.relu
    y, *own = apply(_NormGate, x, norm.gain, norm.bias, gate.log_alpha, gate.seed, *given, *how)
    return y, statistics or (own[0], own[1])
