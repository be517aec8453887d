"""Compute a layer on its open gates: gather the open rows and columns (:mod:`.axis`), multiply, scatter among zeros."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dampr.ops.gate_args import GateArgs, GatePair
from dampr.ops.plan import Plan
from dampr.spec import SAMPLE, GateSpec, value

from . import gated_conv, products
from .axis import gather, open_gates, scatter
from .gated_linear import bwd_fold, fwd_fold
from .gates import sample_gates_bwd, sample_gates_fwd

if TYPE_CHECKING:
    from dampr.ops.gated_conv import Window

__all__ = ["bwd", "fwd", "open_gates"]
VALUE = value()


def fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gates: GatePair,
    ins: Tensor | None,
    outs: Tensor | None,
    window: Window | None,
) -> Tensor:
    """y of the layer.

    ins, outs: the indices of the open input and output gates, int32; None takes all. window: None for a linear map.
    """
    part, own = _open_part(x, weight, bias, gates, ins, outs, window)
    if window is None:
        y, _ = fwd_fold(_plan_of(*part[:2], gates.spec), *part, *own[:4])
        return y if outs is None else scatter(y, outs, weight.shape[0], y.dim() - 1)
    y, _ = gated_conv.fwd(*part, own, window, False, False)
    last = _is_last(x) or _is_last(weight)  # the layout in which torch's convolution writes y, and its backward dx
    if outs is not None:
        return scatter(y, outs, weight.shape[0], 1, last)
    # with a single open channel both memory formats are the same, so set the one that the whole layer would have
    return y.contiguous(memory_format=torch.channels_last) if last else y


def bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gates: GatePair,
    ins: Tensor | None,
    outs: Tensor | None,
    window: Window | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight, bias and of both log_alphas; None for those that ``needs`` does not ask for.

    The other arguments are those of :func:`fwd`.
    """
    part, own = _open_part(x, weight, bias, gates, ins, outs, window)
    flat, channels = window is None, x.dim() - 1 if window is None else 1
    if outs is not None:
        dy = gather(dy, outs, channels, not flat and _is_last(dy))
    if window is None:
        dx, dw, db, dz_in, dz_out = bwd_fold(_plan_of(*part[:2], gates.spec), dy, (*part, *own[:4]), needs)
    else:
        dx, dw, db, dz_in, dz_out = gated_conv.bwd(dy, *part, own, None, window, False, needs, False)
    last = not flat and _is_last(weight)
    if ins is not None:
        dx = None if dx is None else scatter(dx, ins, x.shape[channels], channels, last or (not flat and _is_last(x)))
        dw = None if dw is None else scatter(dw, ins, weight.shape[1], 1, last)
    if outs is not None:
        dw = None if dw is None else scatter(dw, outs, weight.shape[0], 0, last)
        db = None if db is None else scatter(db, outs, weight.shape[0], 0)
    din = None if dz_in is None else _gate_gradient(dz_in, gates.input, ins)
    return dx, dw, db, din, None if dz_out is None else _gate_gradient(dz_out, gates.output, outs)


def _open_part(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gates: GatePair,
    ins: Tensor | None,
    outs: Tensor | None,
    window: Window | None,
) -> tuple[tuple[Tensor, Tensor, Tensor | None], GatePair]:
    """((x, weight, bias) gathered at the open gates, the values of these gates).

    The arguments are those of :func:`fwd`.
    """
    in_la, out_la, in_seed, out_seed, spec, _ = gates
    z_in = None if in_la is None else sample_gates_fwd(GateArgs(in_la, in_seed, spec), None)
    z_out = None if out_la is None else sample_gates_fwd(GateArgs(out_la, out_seed, spec), None)
    last = window is not None and _is_last(weight)
    if outs is not None and z_out is not None:
        weight, z_out = gather(weight, outs, 0, last), gather(z_out, outs, 0)
        bias = None if bias is None else gather(bias, outs, 0)
    if ins is not None and z_in is not None:
        channels = x.dim() - 1 if window is None else 1
        x, weight = gather(x, ins, channels, window is not None and _is_last(x)), gather(weight, ins, 1, last)
        z_in = gather(z_in, ins, 0)
    return (x, weight, bias), GatePair(z_in, z_out, None, None, VALUE)


def _plan_of(x: Tensor, weight: Tensor, spec: GateSpec) -> Plan:
    """The plan for the product of the open part of a linear map; ``spec``: that of the gates before they were drawn."""
    (n, k), rows = weight.shape, x.shape[:-1].numel()
    onednn = products.by_onednn(rows, n, k, x.dtype)
    return Plan("live", fwd_fold, bwd_fold, VALUE, rows, onednn=onednn, drawn=spec.rule == SAMPLE)


def _is_last(t: Tensor) -> bool:
    """Whether images, or the weight of a convolution, are in channels_last.

    If a single pixel makes both layouts contiguous, the strides decide.
    """
    if t.dim() != 4 or not t.is_contiguous(memory_format=torch.channels_last):
        return False
    return not t.is_contiguous() or t.stride(3) == t.shape[1] > 1


def _gate_gradient(dz: Tensor | None, gate: GateArgs | None, places: Tensor | None) -> Tensor | None:
    """The gradient of all log_alphas from ``dz``, the gradients of the open gates at ``places``."""
    if dz is None or gate is None:
        return None
    return sample_gates_bwd(dz if places is None else scatter(dz, places, gate.log_alpha.numel(), 0), gate, None)
