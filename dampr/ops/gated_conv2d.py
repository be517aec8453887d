"""y = z_out * (conv2d(x * z_in, W) + b) in one pass over live blocks of channels, as an op; the other routes are made of smaller ops.

The op has a forward only: its backward folds the gates into the weight, lets torch differentiate the convolution, and turns the gradient of
the folded weight into those of the weight and the gates, as the fold route does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dampr.spec import GateSpec

from .backends import select
from .fold_conv import fold_channels, fold_filters
from .library import apply, define, once_differentiable, unpack, wanted

Maybe = Tensor | None
Pair = tuple[int, int]


def _fwd(
    x: Tensor,
    weight: Tensor,
    bias: Maybe,
    in_la: Maybe,
    out_la: Maybe,
    in_seed: Maybe,
    out_seed: Maybe,
    spec: Sequence[float],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    gates, window = (in_la, out_la, in_seed, out_seed), (tuple(stride), tuple(padding), tuple(dilation), groups)
    y: Tensor = select(x.device, x.dtype).gated_conv2d_fwd(x, weight, bias, *gates, unpack(spec), *window)
    return y


def _fwd_fake(x: Tensor, weight: Tensor, bias: Maybe, *rest: Any) -> Tensor:
    stride, padding, dilation, _ = rest[-4:]
    size = [(x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in range(2)]
    return x.new_empty((x.shape[0], weight.shape[0], *size)).contiguous(memory_format=torch.channels_last)


fwd = define(
    "gated_conv2d_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? input_log_alpha, Tensor? output_log_alpha, Tensor? input_seed,"
    " Tensor? output_seed, float[] spec, int[2] stride, int[2] padding, int[2] dilation, int groups) -> Tensor",
    _fwd,
    _fwd_fake,
)


class _GatedConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Maybe,
        in_la: Maybe,
        out_la: Maybe,
        in_seed: Maybe,
        out_seed: Maybe,
        spec: GateSpec,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        groups: int,
    ) -> Any:
        return fwd(x, weight, bias, in_la, out_la, in_seed, out_seed, spec, stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.spec, stride, padding, dilation, groups = inputs
        ctx.window = stride, padding, dilation, groups
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        x, weight, bias, in_la, out_la, in_seed, out_seed = ctx.saved_tensors
        (stride, padding, dilation, groups), needs = ctx.window, list(ctx.needs_input_grad[:5])
        leaves = [
            None if t is None else t.detach().requires_grad_(need) for t, need in zip((weight, bias, in_la, out_la), needs[1:], strict=True)
        ]
        with torch.enable_grad():
            folded, shift = leaves[0], leaves[1]
            assert folded is not None
            if leaves[2] is not None:
                folded = fold_channels(folded, leaves[2], in_seed, ctx.spec, groups, x.dtype)
            if leaves[3] is not None:
                folded, shift = fold_filters(folded, shift, leaves[3], out_seed, ctx.spec, x.dtype)
        learns = [t for t in leaves if t is not None and t.requires_grad]
        mask = [needs[0], bool(learns), shift is not None and bool(learns)]
        sizes = None if shift is None else list(shift.shape)
        args = stride, padding, dilation, False, [0, 0], groups, mask
        dx, *raw = torch.ops.aten.convolution_backward(dy, x, folded.detach().to(x.dtype), sizes, *args)
        ends = [(t, g) for t, g in zip((folded, shift), raw, strict=True) if t is not None and g is not None and t.requires_grad]
        found: dict[int, Maybe] = {}
        if ends and learns:
            outputs, upstream = zip(*((t, g.to(t.dtype)) for t, g in ends), strict=True)
            found = dict(zip(map(id, learns), torch.autograd.grad(outputs, learns, upstream, allow_unused=True), strict=True))
        grads = [dx, *(None if t is None else found.get(id(t)) for t in leaves)]
        return (*wanted(grads, needs), *[None] * 7)


def gated_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Maybe,
    input_log_alpha: Maybe,
    output_log_alpha: Maybe,
    input_seed: Maybe,
    output_seed: Maybe,
    spec: GateSpec,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    """Differentiable, gates per batch; x: (B, C, H, W); arguments are taken as checked (:func:`dampr.functional.gated_conv2d` checks)."""
    gates = input_log_alpha, output_log_alpha, input_seed, output_seed
    y: Tensor = apply(_GatedConv2d, x, weight, bias, *gates, spec, stride, padding, dilation, groups)
    return y
