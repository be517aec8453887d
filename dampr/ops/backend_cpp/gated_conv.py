"""A gated convolution with its backward: C++ multiplies the gates, torch convolves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dampr.ops.fold_conv import channels_innermost
from dampr.ops.gate_args import GatePair

from . import host
from .fold_weight import fold_into, unfold
from .gate_activations import gate_activations_bwd, gate_activations_fwd

if TYPE_CHECKING:
    from dampr.ops.gated_conv import Window


def fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gates: GatePair,
    window: Window,
    on_activations: bool,
    keep_pre: bool,
) -> tuple[Tensor, Tensor | None]:
    """(y, what is kept for the backward): if gates multiply activations and ``keep_pre``, y before the output gates."""
    if not on_activations:
        return window.convolve(x, *_folded(weight, bias, gates, x.dtype)), None
    if gates.input is not None:
        x = gate_activations_fwd(x, gates.input, 1)
    pre = window.convolve(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    if gates.output is None:
        return pre, None
    return gate_activations_fwd(pre, gates.output, 1), pre if keep_pre else None


def gated_conv2d_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, gates: GatePair, window: Window) -> Tensor:
    """The operator ``dampr::gated_conv2d_fwd``, which no route uses on the CPU: gates multiply the activations."""
    return fwd(x, weight, bias, gates, window, True, False)[0].contiguous(memory_format=torch.channels_last)


def bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gates: GatePair,
    pre: Tensor | None,
    window: Window,
    on_activations: bool,
    needs: Sequence[bool],
    over_pre: bool,
) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight, bias and both log_alphas, those that ``needs`` asks for.

    ``pre``: what :func:`fwd` kept. ``over_pre``: it may be overwritten.
    """
    if on_activations:
        return _bwd_on_activations(dy, x, weight, bias, gates, pre, window, needs, over_pre)
    need_x, need_w, need_b, need_in, need_out = needs
    need_bias = bias is not None and (need_b or need_out)
    weight = _dense(weight)
    filters = _folded(weight, None, gates, x.dtype)[0] if need_x else weight.to(x.dtype)
    wanted = need_x, need_w or need_in or need_out, need_bias
    dx, raw, raw_bias = _convolution_backward(dy, x, filters, bias, window, wanted)
    raw = (
        torch.empty_like(filters)
        if raw is None
        else raw
        if raw.stride() == weight.stride()
        else torch.empty_like(filters).copy_(raw)
    )
    dw = (raw if raw.dtype == weight.dtype else torch.empty_like(weight)) if need_w else None
    return dx, dw, *unfold(raw, raw_bias, weight, bias, gates, *_matrix(weight, gates), needs[1:], dw)


def _bwd_on_activations(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gates: GatePair,
    pre: Tensor | None,
    window: Window,
    needs: Sequence[bool],
    over_pre: bool,
) -> tuple[Tensor | None, ...]:
    """:func:`bwd` with the gates on the activations."""
    need_x, need_w, need_b, need_in, need_out = needs
    din = dout = None
    if gates.output is not None:
        # without ``pre`` the gate has no gradient; ``dy`` then takes the place of an argument that is not read
        before, over = (dy, False) if pre is None else (pre, over_pre)
        gated, dout = gate_activations_bwd(dy, before, gates.output, 1, (True, need_out and pre is not None), over)
        assert gated is not None
        dy = gated
    read = x if gates.input is None or not need_w else gate_activations_fwd(x, gates.input, 1)
    wanted = need_x or need_in, need_w, need_b and bias is not None
    dx, dw, db = _convolution_backward(dy, read, weight.to(x.dtype), bias, window, wanted)
    if gates.input is not None and dx is not None:
        dx, din = gate_activations_bwd(dx, x, gates.input, 1, (need_x, need_in))
    return (
        dx,
        None if dw is None else dw.to(weight.dtype),
        None if db is None or bias is None else db.to(bias.dtype),
        din,
        dout,
    )


def _convolution_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, window: Window, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """torch's gradients of x, weight and bias of the convolution; None for those that are not ``wanted``."""
    sizes = None if bias is None else list(bias.shape)
    rest = sizes, *window[:3], False, [0] * len(window.stride), window.groups, list(wanted)
    grads: tuple[Tensor | None, Tensor | None, Tensor | None] = torch.ops.aten.convolution_backward(
        dy, x, weight, *rest
    )
    return grads


def _folded(weight: Tensor, bias: Tensor | None, gates: GatePair, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weight and bias times their gates; the weight is in :data:`.host.scratch`."""
    weight = _dense(weight)
    out = host.scratch.views[weight.shape, weight.stride(), dtype]
    return out, fold_into(out, weight, bias, gates, *_matrix(weight, gates))


def _dense(weight: Tensor) -> Tensor:
    """The weight, contiguous or in channels last; copied if it is neither."""
    return weight if weight.is_contiguous() or channels_innermost(weight) else weight.contiguous()


def _matrix(weight: Tensor, gates: GatePair) -> tuple[int, int]:
    """(n_out, n_in) of the weight's memory as a matrix.

    Rows are filters if there are gates on filters; else columns are channels.
    """
    size = weight.size(0) if gates.output_log_alpha is not None else weight.size(1)
    others = weight.numel() // max(1, size)
    return (size, others) if gates.output_log_alpha is not None else (others, size)
