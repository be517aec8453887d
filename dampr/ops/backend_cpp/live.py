"""A layer on its open gates: what is open picked out (:mod:`.axis`), gated and multiplied, and put back among zeros."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dampr.ops.gate_args import GateArgs, GatePair, Maybe
from dampr.ops.library import rows_of
from dampr.spec import SAMPLE, value

from . import products, whole_conv
from .axis import open_gates, pick, place
from .fold_weight import fold_weight_fwd
from .gated_linear import bwd_fold
from .gates import sample_gates_bwd, sample_gates_fwd

if TYPE_CHECKING:
    from dampr.ops.whole_conv import Window

__all__ = ["bwd", "fwd", "open_gates"]
VALUE = value()


def fwd(x: Tensor, weight: Tensor, bias: Maybe, gates: GatePair, ins: Maybe, outs: Maybe, window: Window | None) -> Tensor:
    """y; ``ins`` and ``outs`` list the open gates of inputs and outputs, None: all are taken."""
    part, own = _part(x, weight, bias, gates, ins, outs, window)
    if window is None:
        narrow, w, b = part
        y = products.linear(narrow, *fold_weight_fwd(w, b, own, x.dtype, passing=True), gates.spec.rule == SAMPLE)
    else:
        y, _ = whole_conv.fwd(*part, own, window, False, False)
    last = _writes_last(x, weight, window)
    if outs is not None:
        return place(y, outs, weight.shape[0], _channels(y, window), last)
    return y.contiguous(memory_format=torch.channels_last) if last else y  # a single open channel does not show how it lies


def bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Maybe,
    gates: GatePair,
    ins: Maybe,
    outs: Maybe,
    window: Window | None,
    needs: Sequence[bool],
) -> tuple[Maybe, ...]:
    """Gradients of x, weight, bias and both log-alphas, those that are needed."""
    part, own = _part(x, weight, bias, gates, ins, outs, window)
    if outs is not None:
        dy = pick(dy, outs, _channels(dy, window), _is_last(dy, window))
    if window is None:
        narrow, w, b = part
        dx, dw, db, dz_in, dz_out = bwd_fold(rows_of(dy), rows_of(narrow), w, b, own, needs)
        dx = None if dx is None else dx.view(narrow.shape)
    else:
        dx, dw, db, dz_in, dz_out = whole_conv.bwd(dy, *part, own, None, window, False, needs, False)
    last = _is_last(weight, window)
    if ins is not None:
        channels = _channels(x, window)
        dx = None if dx is None else place(dx, ins, x.shape[channels], channels, _writes_last(x, weight, window))
        dw = None if dw is None else place(dw, ins, weight.shape[1], 1, last)
    if outs is not None:
        dw = None if dw is None else place(dw, outs, weight.shape[0], 0, last)
        db = None if db is None else place(db, outs, weight.shape[0], 0)
    return dx, dw, db, _gate_gradient(dz_in, gates.input, ins), _gate_gradient(dz_out, gates.output, outs)


def _part(
    x: Tensor, weight: Tensor, bias: Maybe, gates: GatePair, ins: Maybe, outs: Maybe, window: Window | None
) -> tuple[tuple[Tensor, Tensor, Maybe], GatePair]:
    """x, weight and bias as far as gates are open, and the values of these gates."""
    z_in = None if gates.input is None else sample_gates_fwd(gates.input, None)
    z_out = None if gates.output is None else sample_gates_fwd(gates.output, None)
    if outs is not None and z_out is not None:
        weight, bias, z_out = (
            pick(weight, outs, 0, _is_last(weight, window)),
            None if bias is None else pick(bias, outs, 0),
            pick(z_out, outs, 0),
        )
    if ins is not None and z_in is not None:
        x, weight = pick(x, ins, _channels(x, window), _is_last(x, window)), pick(weight, ins, 1, _is_last(weight, window))
        z_in = pick(z_in, ins, 0)
    return (x, weight, bias), GatePair(z_in, z_out, None, None, VALUE)


def _is_last(t: Tensor, window: Window | None) -> bool:
    """Whether images, or the weight of a convolution, lie channels last; by their strides where one pixel is contiguous as well."""
    if window is None or t.dim() != 4 or not t.is_contiguous(memory_format=torch.channels_last):
        return False
    return not t.is_contiguous() or t.stride(3) == t.shape[1] > 1


def _writes_last(x: Tensor, weight: Tensor, window: Window | None) -> bool:
    """Whether torch's convolution writes y, and its backward dx, channels last."""
    return _is_last(x, window) or _is_last(weight, window)


def _channels(t: Tensor, window: Window | None) -> int:
    return t.dim() - 1 if window is None else 1


def _gate_gradient(dz: Maybe, gate: GateArgs | None, places: Maybe) -> Maybe:
    if dz is None or gate is None:
        return None
    return sample_gates_bwd(dz if places is None else place(dz, places, gate.log_alpha.numel(), 0), gate, None)
