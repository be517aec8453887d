"""y = z_out * (conv2d(x * z_in, W) + b) in one kernel that skips blocks of channels whose gates are all closed.

Other routes of convolutions are composed of smaller operators (:mod:`.gated_conv`). The operator has a forward only.
Its backward folds the gates into the weight, lets torch differentiate the convolution, and from the gradient of the
folded weight computes those of the weight and the gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dampr import reference

from .backends import select
from .fold_conv import fold_channels, fold_filters
from .gate_args import PAIR, GatePair
from .gated_conv import Window
from .library import define, wanted
from .node import Node, apply


def _fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_la: Tensor | None,
    out_la: Tensor | None,
    in_seed: Tensor | None,
    out_seed: Tensor | None,
    spec: Sequence[float],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Implementation of ``dampr::gated_conv2d_fwd``: y (B, N, OH, OW), channels last.

    Args:
        x: (B, C, H, W).
        weight: (N, C / groups, R, S).
        bias: (N,) or None.
        in_la, out_la: log_alpha of gates on channels (C,) and on filters (N,); None without these gates.
        in_seed, out_seed: int64 (1,); None if nothing is drawn.
        spec: the fields of a :class:`dampr.spec.GateSpec` as floats.
        stride, padding, dilation, groups: those of the convolution.
    """
    gates = GatePair.of(in_la, out_la, in_seed, out_seed, spec)
    window = Window(tuple(stride), tuple(padding), tuple(dilation), groups)  # type: ignore[arg-type]
    y: Tensor = select(x.device, x.dtype).gated_conv2d_fwd(x, weight, bias, gates, window)
    return y


def _fwd_fake(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    """The empty result of :func:`_fwd`."""
    size = Window(*rest[-4:]).size(x.shape, weight.shape)
    return x.new_empty((x.shape[0], weight.shape[0], *size)).contiguous(memory_format=torch.channels_last)


fwd = define(
    f"gated_conv2d_fwd(Tensor x, Tensor weight, Tensor? bias, {PAIR},"
    " float[] spec, int[2] stride, int[2] padding, int[2] dilation, int groups) -> Tensor",
    _fwd,
    _fwd_fake,
)


class _GatedConv2d(Node):
    """The autograd function of :func:`gated_conv2d`."""

    tensors = 7

    @staticmethod
    def plain(*inputs: Any) -> Tensor:
        given = *inputs[:8], False  # one draw for all images
        return reference.gated_conv(*given, **Window(*inputs[8:])._asdict())

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return fwd(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.constants = inputs[7:]
        ctx.save_for_backward(*inputs[:7])

    @staticmethod
    def fused(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias, in_la, out_la, in_seed, out_seed = ctx.saved_tensors
        (spec, stride, padding, dilation, groups), needs = ctx.constants, list(ctx.needs_input_grad[:5])
        leaves = [
            None if t is None else t.detach().requires_grad_(need)
            for t, need in zip((weight, bias, in_la, out_la), needs[1:], strict=True)
        ]
        with torch.enable_grad():
            folded, shift = leaves[0], leaves[1]
            assert folded is not None
            gates = GatePair.of(leaves[2], leaves[3], in_seed, out_seed, spec)
            if gates.input is not None:
                folded = fold_channels(folded, gates.input, groups, x.dtype)
            if gates.output is not None:
                folded, shift = fold_filters(folded, shift, gates.output, x.dtype)
        learns = [t for t in leaves if t is not None and t.requires_grad]
        mask = [needs[0], bool(learns), shift is not None and bool(learns)]
        sizes = None if shift is None else list(shift.shape)
        args = stride, padding, dilation, False, [0, 0], groups, mask
        dx, *raw = torch.ops.aten.convolution_backward(dy, x, folded.detach().to(x.dtype), sizes, *args)
        ends = [
            (t, g)
            for t, g in zip((folded, shift), raw, strict=True)
            if t is not None and g is not None and t.requires_grad
        ]
        found: dict[int, Tensor | None] = {}
        if ends and learns:
            outputs, upstream = zip(*((t, g.to(t.dtype)) for t, g in ends), strict=True)
            found = dict(
                zip(map(id, learns), torch.autograd.grad(outputs, learns, upstream, allow_unused=True), strict=True)
            )
        grads = [dx, *(None if t is None else found.get(id(t)) for t in leaves)]
        return (*wanted(grads, needs), *[None] * 7)


def gated_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, gates: GatePair, window: Window) -> Tensor:
    """The gated convolution of x (B, C, H, W), differentiable, with one draw for all images.

    It does not check its arguments; :func:`dampr.functional.gated_conv2d` does.
    """
    y: Tensor = apply(_GatedConv2d, x, weight, bias, *gates[:5], *window)
    return y
