"""y = act(z batch_norm(x)): statistics, normalisation, gates and ReLU as one op forward and one op backward.
docs/kernels.md derives it.

Nothing of the size of x is kept but x: the norm before the gates, and where the ReLU let it through, are computed
again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dampr import reference

from ._torch import count_as_written
from .backends import select
from .gate_activations import dense_format
from .gate_args import GateArgs
from .library import define, or_empty, wanted
from .node import Node, apply, needs_dispatcher

Statistics = tuple[Tensor, Tensor]


class Norm(NamedTuple):
    """gain (x - mean) / sqrt(var + eps) + bias, and a ReLU behind the gates or none; vectors (C,), None: a gain of 1,
    no bias.
    """

    gain: Tensor | None
    bias: Tensor | None
    eps: float
    relu: bool


class Running(NamedTuple):
    """What a norm keeps of the batches it has seen: mean and variance, (C,), how many these were, int64,
    and what a new one weighs.
    """

    mean: Tensor | None
    var: Tensor | None
    updates: Tensor | None
    momentum: float

    def move(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Towards the mean and the biased variance of ``count`` values per channel, in place."""
        for running, new, scale in ((self.mean, mean, 1.0), (self.var, var, count / (count - 1))):
            if running is None:
                continue
            if running.dtype == new.dtype:
                running.mul_(1 - self.momentum).add_(new, alpha=self.momentum * scale)
            else:
                running.copy_(running.to(new.dtype) * (1 - self.momentum) + new * (self.momentum * scale))
        if self.updates is not None:
            self.updates.add_(1)


def _fwd(
    x: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    log_alpha: Tensor,
    seed: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    spec: Sequence[float],
    per_sample: bool,
    relu: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y, and the statistics of x where none were given."""
    gate, norm = GateArgs.of(log_alpha, seed, spec, per_sample), Norm(gain, bias, eps, relu)
    made: tuple[Tensor, Tensor | None, Tensor | None] = select(x.device, x.dtype).norm_gate_fwd(
        x, norm, gate, mean, var
    )
    return made


def _fwd_fake(
    x: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    log_alpha: Tensor,
    seed: Tensor | None,
    mean: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    y = torch.empty_like(x, memory_format=dense_format(x, 1))
    return y, *(torch.empty_like(log_alpha) if mean is None else x.new_empty(0) for _ in range(2))


def _bwd(
    dy: Tensor,
    x: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    log_alpha: Tensor,
    seed: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    spec: Sequence[float],
    per_sample: bool,
    relu: bool,
    training: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, gain, bias and log_alpha; ``training``: mean and var are those of x."""
    gate, norm = GateArgs.of(log_alpha, seed, spec, per_sample), Norm(gain, bias, eps, relu)
    grads: tuple[Tensor | None, ...] = select(x.device, x.dtype).norm_gate_bwd(
        dy, x, norm, gate, mean, var, training, needs
    )
    return grads


def _bwd_fake(
    dy: Tensor, x: Tensor, gain: Tensor | None, bias: Tensor | None, log_alpha: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
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


class _NormGate(Node):
    tensors = 7

    @staticmethod
    def plain(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, gain, bias, log_alpha, seed, mean, var, *how = inputs
        y = reference.norm_gate(x, gain, bias, log_alpha, seed, None if mean is None else (mean, var), *how)
        return y, *(_statistics(x, log_alpha) if mean is None else (x.new_empty(0), x.new_empty(0)))

    @staticmethod
    def forward(*inputs: Any) -> Any:
        x, mean, (y, *own) = inputs[0], inputs[5], fwd(*inputs)
        return (y, *own) if mean is None else (y, x.new_empty(0), x.new_empty(0))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        given = inputs[5:7]
        ctx.mark_non_differentiable(*output[1:])
        ctx.constants = inputs[7:]
        ctx.save_for_backward(*inputs[:7], *(output[1:] if given[0] is None else given))

    @staticmethod
    def fused(ctx: Any, dy: Tensor, *_: Any) -> Any:
        *tensors, given, _, mean, var = ctx.saved_tensors
        needs = [*ctx.needs_input_grad[:4]]
        grads = bwd(dy, *tensors, mean, var, *ctx.constants, given is None, needs)
        return (*wanted(grads, needs), *[None] * 7)


def _statistics(x: Tensor, like: Tensor) -> Statistics:
    """Mean and biased variance of x in the dtype of ``like``, for the running ones: no derivative goes through them."""
    var, mean = torch.var_mean(x.detach().to(like.dtype), [i for i in range(x.dim()) if i != 1], correction=0)
    return mean, var


class _FusedNorm(Node):
    """The same by batch statistics where nobody needs operators; the backend moves the running statistics too."""

    tensors = 5  # with the seed, which takes the place of the norm among the inputs

    @staticmethod
    def plain(
        x: Tensor, gain: Tensor | None, bias: Tensor | None, log_alpha: Tensor, seed: Tensor | None, *how: Any
    ) -> Tensor:
        return reference.norm_gate(x, gain, bias, log_alpha, seed, None, *how)

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        gain: Tensor | None,
        bias: Tensor | None,
        log_alpha: Tensor,
        norm: Norm,
        gate: GateArgs,
        running: Running,
    ) -> Tensor:
        backend = select(x.device, x.dtype)
        y, mean, var = backend.norm_gate_fwd(x, norm, gate, None, None, running)
        ctx.save_for_backward(x, gain, bias, log_alpha, gate.seed, mean, var)
        ctx.constants, ctx.backend = (norm.eps, gate.spec, gate.per_sample, norm.relu), backend
        return y  # type: ignore[no-any-return]

    @staticmethod
    def fused(ctx: Any, dy: Tensor) -> Any:
        x, gain, bias, log_alpha, seed, mean, var = ctx.saved_tensors
        (eps, spec, per_sample, relu), needs = ctx.constants, ctx.needs_input_grad[:4]
        if needs_dispatcher((dy,)):
            tensors = dy, x, gain, bias, log_alpha, seed, mean, var
            grads = wanted(bwd(*tensors, *ctx.constants, True, [*needs]), needs)
        else:
            norm, gate = Norm(gain, bias, eps, relu), GateArgs(log_alpha, seed, spec, per_sample)
            grads = ctx.backend.norm_gate_bwd(dy, x, norm, gate, mean, var, True, needs)
        return *grads, None, None, None


_whole = _FusedNorm.apply_at_once


def has_fused_norm(device: torch.device, dtype: torch.dtype, per_sample: bool) -> bool:
    """Whether the backend for such tensors has norm, gates and running statistics in one call.

    C++ has them always, Triton per sample.
    """
    return per_sample in getattr(select(device, dtype), "fused_norms", ())


def fused_norm(x: Tensor, norm: Norm, gate: GateArgs, running: Running) -> Tensor | None:
    """:func:`norm_gate` by the statistics of x, without operators in between. None where that is not to be had.

    In C++ it is faster than torch's norm, and a ReLU, even with one draw for all samples. On a GPU nobody has measured
    it: gates per batch are folded into gain and bias there. Not where somebody traces, who fuses or transforms the
    smaller ops.
    """
    (gain, bias, _, _), log_alpha, (mean, var, updates, _) = norm, gate.log_alpha, running
    if needs_dispatcher((x, gain, bias, log_alpha), by_profiler=False):
        return None
    device = x.device
    if (
        log_alpha.device != device
        or (gain is not None and gain.device != device)
        or (bias is not None and bias.device != device)
    ):
        return None
    if not (_moves(mean, log_alpha) and _moves(var, log_alpha)):
        return None
    if updates is not None and not (updates.dtype == torch.int64 and updates.device == device and _moves(updates)):
        return None
    if not has_fused_norm(device, x.dtype, gate.per_sample):
        return None
    learns = (
        x.requires_grad
        or log_alpha.requires_grad
        or (gain is not None and gain.requires_grad)
        or (bias is not None and bias.requires_grad)
    )
    if learns and torch.is_grad_enabled():
        y: Tensor = _whole(x, gain, bias, log_alpha, norm, gate, running)
    else:
        y = select(x.device, x.dtype).norm_gate_fwd(x, norm, gate, None, None, running)[0]
    if x.numel():
        # were written to by their addresses
        count_as_written([t for t in (mean, var, updates) if t is not None])
    return y


def _moves(kept: Tensor | None, like: Tensor | None = None) -> bool:
    """Whether a call may write to what a norm keeps, if it does, by its address: a vector ``like`` another,
    or a number.
    """
    if kept is None:
        return True
    fits = (
        kept.dim() == 0
        if like is None
        else kept.dtype == like.dtype and kept.shape == like.shape and kept.device == like.device
    )
    return fits and kept.is_contiguous() and not kept.is_inference()


def norm_gate(x: Tensor, norm: Norm, gate: GateArgs, statistics: Statistics | None, running: Running) -> Tensor:
    """Differentiable in x, gain, bias and log_alpha; with the mean and variance in ``statistics`` or, where these are
    None, of x, towards which the ``running`` ones are moved.

    x: (B, C, ...); everything else (C,), in the dtype of ``log_alpha``: float64 beside a float64 x, else float32;
    running statistics may have another. Arguments are taken as checked (:func:`dampr.functional.gated_batch_norm`
    checks).
    """
    whole = fused_norm(x, norm, gate, running) if statistics is None else None
    if whole is not None:
        return whole
    given = (None, None) if statistics is None else statistics
    tensors = (x, norm.gain, norm.bias, gate.log_alpha, gate.seed)
    how = (norm.eps, gate.spec, gate.per_sample, norm.relu)
    y: Tensor
    y, mean, var = apply(_NormGate, *tensors, *given, *how)
    if statistics is None and x.numel():
        with torch.no_grad():
            running.move(mean, var, x.numel() // x.shape[1])
    return y
