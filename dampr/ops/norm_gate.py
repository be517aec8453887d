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
    """The arguments of act(z (gain (x - mean) / sqrt(var + eps) + bias)) that are not statistics.

    gain, bias: (C,), or None for a gain of 1 and no bias. relu: whether a ReLU follows the gates.
    """

    gain: Tensor | None
    bias: Tensor | None
    eps: float
    relu: bool


class Running(NamedTuple):
    """The running statistics of a batch norm, and how far a batch moves them.

    mean, var: (C,) or None. updates: int64, how many batches there were, or None. momentum: the weight of a new batch.
    """

    mean: Tensor | None
    var: Tensor | None
    updates: Tensor | None
    momentum: float

    def move(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Update the statistics, in place, with the mean and the biased variance of ``count`` values per channel."""
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
    """Implementation of ``dampr::norm_gate_fwd``: (y, mean, var); the last two are None if they were given.

    Args:
        x: (B, C, ...).
        gain, bias: (C,) or None.
        log_alpha, seed, spec, per_sample: the gates.
        mean, var: the statistics to normalise with, (C,); None: those of x.
        eps, relu: as in :class:`Norm`.
    """
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
    """The empty results of :func:`_fwd`."""
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
    """Implementation of ``dampr::norm_gate_bwd``: the gradients of x, gain, bias and log_alpha; None where ``needs`` is
    False.

    ``training``: mean and var are those of x, so a gradient flows through them.
    """
    gate, norm = GateArgs.of(log_alpha, seed, spec, per_sample), Norm(gain, bias, eps, relu)
    grads: tuple[Tensor | None, ...] = select(x.device, x.dtype).norm_gate_bwd(
        dy, x, norm, gate, mean, var, training, needs
    )
    return grads


def _bwd_fake(
    dy: Tensor, x: Tensor, gain: Tensor | None, bias: Tensor | None, log_alpha: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """The empty results of :func:`_bwd`."""
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
    """The autograd function with the operators ``fwd`` and ``bwd``."""

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
    """(mean, biased variance) of each channel of x in the dtype of ``like``, without a gradient, for the running
    statistics.
    """
    var, mean = torch.var_mean(x.detach().to(like.dtype), [i for i in range(x.dim()) if i != 1], correction=0)
    return mean, var


class _FusedNorm(Node):
    """The autograd function that calls a backend directly, with the statistics of the batch.

    The backend updates the running statistics in the same call.
    """

    tensors = 5  # x, gain, bias, log_alpha and the seed of the gate

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
    """Whether the backend for such tensors computes norm, gates and running statistics in one call.

    C++ always does; Triton does for gates per sample.
    """
    return per_sample in getattr(select(device, dtype), "fused_norms", ())


def fused_norm(x: Tensor, norm: Norm, gate: GateArgs, running: Running) -> Tensor | None:
    """:func:`norm_gate` with the statistics of x, by one call of the backend; None if that is not possible.

    In C++ this is faster than torch's norm (and a ReLU) even with one draw for all samples. On a GPU gates per batch
    are folded into gain and bias, because nobody has measured the fused kernel for these. None also while code is
    traced or transformed, because compilers fuse the smaller operators.
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
    if not (_can_write(mean, log_alpha) and _can_write(var, log_alpha)):
        return None
    if updates is not None and not (updates.dtype == torch.int64 and updates.device == device and _can_write(updates)):
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
        # the backend has changed them through their addresses, which autograd does not see
        count_as_written([t for t in (mean, var, updates) if t is not None])
    return y


def _can_write(statistic: Tensor | None, like: Tensor | None = None) -> bool:
    """Whether a backend may update a running statistic through its memory address; True if there is no statistic.

    Args:
        statistic: the tensor to update. It must be contiguous, and no inference tensor.
        like: a tensor whose dtype, shape and device it must have; None: it must be a scalar.
    """
    if statistic is None:
        return True
    fits = (
        statistic.dim() == 0
        if like is None
        else statistic.dtype == like.dtype and statistic.shape == like.shape and statistic.device == like.device
    )
    return fits and statistic.is_contiguous() and not statistic.is_inference()


def norm_gate(x: Tensor, norm: Norm, gate: GateArgs, statistics: Statistics | None, running: Running) -> Tensor:
    """act(z batch_norm(x)), differentiable in x, gain, bias and log_alpha.

    Args:
        x: (B, C, ...).
        norm: gain, bias, eps and whether a ReLU follows; vectors are (C,).
        gate: the gates, (C,).
        statistics: (mean, variance) to normalise with; None: those of x, and ``running`` is updated with them.
        running: the running statistics; they may have another dtype.

    All vectors have the dtype of ``log_alpha``, float64 for a float64 x and else float32. It does not check its
    arguments; :func:`dampr.functional.gated_batch_norm` does.
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
