"""y = z_out * (f(x * z_in, W) + b), with f a linear map or a convolution, computed on the open gates alone if these are
few.

The open rows and columns of the weight and the open activations are gathered, their smaller product is computed, and
the rest of y, and of the gradients, is 0. The result is that of the whole layer to rounding. It is used with one draw
per batch on the CPU, where the draw can be read without waiting, and only if closed gates have no gradient (or none is
asked for). The forward keeps only its inputs and the lists of open gates for the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dampr import reference
from dampr.spec import HARD_CONCRETE, RAMP

from . import routes, thresholds
from .backends import select
from .fold_conv import channels_innermost
from .gate_args import GateArgs, GatePair
from .node import Node, differentiate_layer, needs_dispatcher

# WORK: the draw is read only in layers of at least this many multiply-adds. MULTIPLE: lists of open gates are filled up
# to a multiple of it, the block size of vendors' kernels. MOVE: gathering pays off if it saves this many multiply-adds
# for each weight, and twice as many for each activation, whose memory is new. The share of closed gates that is needed
# besides depends on the processor (:mod:`.thresholds`).
WORK, MULTIPLE, MOVE = 2**24, 16, 20


class _SkipClosed(Node):
    """The autograd function of a layer on its open gates."""

    tensors = 7

    @staticmethod
    def plain(*inputs: Any) -> Tensor:
        *given, window = *inputs[:8], False, inputs[8]  # one draw for all samples
        return reference.gated_linear(*given) if window is None else reference.gated_conv(*given, **window._asdict())

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:  # type: ignore[override]
        x, weight, bias, *gates, ins, outs, window, ctx.whole, ctx.backend = inputs
        ctx.save_for_backward(x, weight, bias, *gates[:4], ins, outs)
        ctx.constants = gates[4], window
        y: Tensor = ctx.backend.fwd(x, weight, bias, GatePair(*gates), ins, outs, window)
        return y

    @staticmethod
    def fused(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias, in_la, out_la, in_seed, out_seed, ins, outs = ctx.saved_tensors
        spec, window = ctx.constants
        pair, needs = GatePair(in_la, out_la, in_seed, out_seed, spec), ctx.needs_input_grad[:5]
        if needs_dispatcher((dy,), by_profiler=False):
            grads = differentiate_layer(ctx.whole, dy, (x, weight, bias), pair, needs)
        else:
            grads = ctx.backend.bwd(dy, x, weight, bias, pair, ins, outs, window, needs)
        return (*grads, *[None] * 9)


_apply = _SkipClosed.apply_at_once


def on_open_gates(
    x: Tensor, weight: Tensor, bias: Tensor | None, gates: GatePair, work: int, whole: Any, window: Any = None
) -> Tensor | None:
    """The layer computed on its open gates; None if that would not be faster, or while code is traced or compiled.

    Args:
        x: (..., K) for a linear map, (B, C, *size) with a ``window``.
        weight: (N, K), or (N, C / groups, *kernel).
        bias: (N,) or None.
        gates: one draw for all samples.
        work: the multiply-adds of the whole layer.
        whole: the layer itself, whole(x, weight, bias, gates), differentiable.
        window: stride, padding, dilation and groups of a convolution.
    """
    if torch.compiler.is_compiling() or gates.per_sample:
        return None
    forced = routes.forced_name()
    if work < WORK if forced is None else forced != "live":
        return None
    backend = getattr(select(x.device, x.dtype), "skip_closed", None)
    if backend is None or needs_dispatcher((x, weight, bias, *gates[:2]), by_profiler=False):
        return None
    return among_open(x, weight, bias, gates, work, whole, window, forced is not None, backend)


def among_open(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gates: GatePair,
    work: int,
    whole: Any,
    window: Any,
    forced: bool,
    backend: Any,
) -> Tensor | None:
    """As :func:`on_open_gates`, without the checks that the layer is large enough and that no code is traced.

    forced: whether the route was forced; backend: the module with ``open_gates``, ``fwd`` and ``bwd``.

    Raises: ValueError if the route was forced and cannot serve the layer.
    """
    in_la, out_la, in_seed, out_seed, spec, _ = gates
    if window is not None or spec.family not in (HARD_CONCRETE, RAMP):
        obstacle = _obstacle(weight, gates, window)
        if obstacle is not None and forced:
            raise ValueError(f"route 'live' cannot serve {obstacle}")
        if obstacle is not None:
            return None
    least, size = thresholds.skip(), weight.numel()
    sides = (
        (in_la, in_seed, least.inputs, x.numel()),
        (out_la, out_seed, least.outputs, work * weight.shape[0] // max(1, size)),
    )
    lists: list[Tensor | None] = [None, None]  # open input and output gates; None if too many
    for side, (log_alpha, seed, share, activations) in enumerate(sides):
        closed = 0.0 if forced else max(share, MOVE * (2 * activations + size) / work)
        if log_alpha is not None and closed < 1:
            lists[side] = backend.open_gates(GateArgs(log_alpha, seed, spec), 1 if forced else MULTIPLE, 1 - closed)
    if lists[0] is None and lists[1] is None:
        return None
    y: Tensor = _apply(x, weight, bias, *gates, *lists, window, whole, backend)
    return y


def _obstacle(weight: Tensor, gates: GatePair, window: Any) -> str | None:
    """Why the layer cannot be computed on its open gates; None if it can."""
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in gates[:2])
    if learns and gates.spec.family not in (HARD_CONCRETE, RAMP):
        return "gates of a family whose closed gates have a gradient"
    if window is not None and window.groups != 1:
        return "a convolution of several groups"
    if window is not None and gates.input is not None and (gates.output is not None or not channels_innermost(weight)):
        return "gates on channels of a convolution whose weight is not channels last, or together with gates on filters"
    return None
