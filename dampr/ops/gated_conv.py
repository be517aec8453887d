"""y = z_out * (conv(x * z_in, W) + b) around torch's own convolution, with the gates multiplied into the weight or into
the activations (``on_activations``).

It is composed of smaller operators. On the CPU, if nothing has to see operators, it is one autograd function
instead: views and autograd nodes are slow there after a convolution has filled the caches. As convolution and gates
then share one backward, the folded weight is not saved but folded again, and gradients may be written over tensors
that nobody else can see.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dampr import reference

from ._torch import hooks_on_saved, is_graph_kept
from .backends import select
from .fold_conv import channels_innermost, fold_channels, fold_filters
from .gate_activations import gate_activations
from .gate_args import GatePair
from .node import Node, differentiate_layer, needs_dispatcher

Sizes = tuple[int, ...]


class Window(NamedTuple):
    """The arguments of ``torch.nn.functional.conv2d`` that are not tensors, a number for each spatial dimension."""

    stride: Sizes
    padding: Sizes
    dilation: Sizes
    groups: int

    def size(self, x: Sizes, weight: Sizes) -> Sizes:
        """The spatial size of the output for shapes of x (..., C, *size) and weight (N, C / groups, *kernel)."""
        sizes = x[-len(self.stride) :], weight[2:]
        return tuple(
            (length + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for length, kernel, stride, padding, dilation in zip(*sizes, *self[:3], strict=True)
        )

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """torch's convolution with these arguments."""
        return torch.convolution(x, weight, bias, *self[:3], False, [0] * len(self.stride), self.groups)


class _GatedConv(Node):
    """The autograd function of a gated convolution on the CPU."""

    tensors = 7

    @staticmethod
    def plain(*inputs: Any) -> Tensor:
        *given, window, _ = inputs
        return reference.gated_conv(*given, **window._asdict())

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
    ) -> Tensor:
        *gates, window, on_activations, ctx.backend = rest
        ctx.constants = *gates[4:], window, on_activations
        y, pre = ctx.backend.fwd(
            x, weight, bias, GatePair(*gates), window, on_activations, keep_pre=ctx.needs_input_grad[4]
        )
        ctx.save_for_backward(x, weight, bias, *gates[:4], pre)
        # a saved-tensor hook may hold saved tensors, which must then not be overwritten
        ctx.hooked = hooks_on_saved() is not None
        return y  # type: ignore[no-any-return]

    @staticmethod
    def fused(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias, in_la, out_la, in_seed, out_seed, pre = ctx.saved_tensors
        spec, per_sample, window, on_activations = ctx.constants
        gates = GatePair(in_la, out_la, in_seed, out_seed, spec, per_sample)
        needs = ctx.needs_input_grad[:5]
        if needs_dispatcher((dy,)):
            whole = partial(
                composed_conv, convolve=window.convolve, groups=window.groups, on_activations=on_activations
            )
            grads = differentiate_layer(whole, dy, (x, weight, bias), gates, needs)
        else:
            last = not ctx.hooked and not is_graph_kept()
            grads = ctx.backend.bwd(dy, x, weight, bias, gates, pre, window, on_activations, needs, over_pre=last)
        return (*grads, None, None, None, None, None, None, None)


def composed_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gates: GatePair,
    convolve: Callable[..., Tensor],
    groups: int,
    on_activations: bool,
) -> Tensor:
    """The gated convolution by smaller operators, around any ``convolve(x, weight, bias)``.

    groups: those of the convolution. on_activations: multiply gates into x and y instead of the weight.
    """
    dtype = x.dtype
    if on_activations:
        if gates.input is not None:
            x = gate_activations(x, gates.input, 1)
        y = convolve(x, weight.to(dtype), None if bias is None else bias.to(dtype))
        return y if gates.output is None else gate_activations(y, gates.output, 1)
    if gates.input is not None:
        weight = fold_channels(weight, gates.input, groups, dtype)
    if gates.output is not None:
        weight, bias = fold_filters(weight, bias, gates.output, dtype)
    return convolve(x, weight, None if bias is None else bias.to(dtype))


def gated_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, gates: GatePair, window: Window, on_activations: bool
) -> Tensor:
    """The gated convolution of x (B, C, *size), differentiable.

    It does not check its arguments; :mod:`dampr.functional.conv` does.
    """
    tensors = x, weight, bias, gates.input_log_alpha, gates.output_log_alpha
    one_fold = gates.input is None or (gates.output is None and window.groups == 1 and channels_innermost(weight))
    backend = getattr(select(x.device, x.dtype), "gated_conv", None)
    if (
        backend is not None
        and torch.is_grad_enabled()
        and (on_activations or one_fold)
        and not needs_dispatcher(tensors)
        and any(t is not None and t.requires_grad for t in tensors)
    ):
        y: Tensor = _apply(*tensors[:3], *gates, window, on_activations, backend)
        return y
    return composed_conv(x, weight, bias, gates, window.convolve, window.groups, on_activations)


_apply = _GatedConv.apply_at_once
