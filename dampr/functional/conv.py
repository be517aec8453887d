"""Gated convolutions: checks of the arguments, and the choice of how gates and torch's convolution are combined."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dampr import _checks, ops
from dampr.ops import Window
from dampr.ops.fold_conv import channels_innermost
from dampr.ops.node import needs_dispatcher
from dampr.ops.routes import ConvProblem
from dampr.spec import SAMPLE, GateSpec

from .gates import DRAWN, drawn_rows, offset_of, times_rows
from .inputs import cast, gate_of, gates_of

Size = int | Sequence[int]


def gated_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    input_gate: Tensor | None = None,
    output_gate: Tensor | None = None,
    weight_gate: Tensor | None = None,
    block: tuple[int, int] | None = None,
    seed: int | Tensor | None = None,
    per_sample: bool = False,
    spec: GateSpec = DRAWN,
    index_offset: int = 0,
) -> Tensor:
    """:func:`gated_conv2d` in one dimension: x (B, C, L) or (C, L), weight (N, C / groups, R)."""
    how = F.conv1d, stride, padding, dilation, groups
    return _gated_conv(
        1, x, weight, bias, how, input_gate, output_gate, weight_gate, block, seed, per_sample, spec, index_offset
    )


def gated_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    input_gate: Tensor | None = None,
    output_gate: Tensor | None = None,
    weight_gate: Tensor | None = None,
    block: tuple[int, int] | None = None,
    seed: int | Tensor | None = None,
    per_sample: bool = False,
    spec: GateSpec = DRAWN,
    index_offset: int = 0,
) -> Tensor:
    """y = z_out * (conv(x * z_in, weight) + bias): gates on channels, on filters, on both; or gates on the weights.

    Args:
        x: (B, C, H, W) or (C, H, W), any floating dtype; under autocast it is cast as ``nn.Conv2d`` would cast it.
            Channels last in, channels last out.
        weight: (N, C / groups, R, S), the dtype of ``x`` or, under autocast, float32.
        bias: (N,) or None. The output gate multiplies it too, in training as in evaluation (the published L0 code drops
            it in training).
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d``.
        input_gate, output_gate: gate parameters of the channels (C,) and of the filters (N,), float32 (float64 next to
            float64 ``x``).
        weight_gate: parameters of a gate for each weight, flat, in the order of a contiguous weight; or, with a
            ``block`` (Q, P), for each Q filters times P input channels of a group with all their kernel positions,
            (ceil(N / Q) * ceil(C / groups / P),) row by row; (1, 1) is a gate for each kernel. The bias is not gated.
            Not together with other gates.
        seed: the noise, an int in [0, 2^63) or an int64 tensor of shape (1,); not needed by a deterministic ``spec``.
            With both gates, the output gates use a second stream of the same seed.
        per_sample: one draw per image instead of one per call; channel and filter gates only.
        spec: the gate function, from :func:`dampr.spec.hard_concrete`; drawn by default.
        index_offset: with ``per_sample``, the number of the first image, as of :func:`sample_gates`; not fused unless
            it is 0.

    Returns: (B, N, H', W') or (N, H', W') in the dtype of ``x``. Differentiable in ``x``, ``weight``, ``bias`` and the
    gate parameters.

    Raises: TypeError or ValueError that names the argument, before any work is done.
    """
    how = F.conv2d, stride, padding, dilation, groups
    return _gated_conv(
        2, x, weight, bias, how, input_gate, output_gate, weight_gate, block, seed, per_sample, spec, index_offset
    )


def gated_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    input_gate: Tensor | None = None,
    output_gate: Tensor | None = None,
    weight_gate: Tensor | None = None,
    block: tuple[int, int] | None = None,
    seed: int | Tensor | None = None,
    per_sample: bool = False,
    spec: GateSpec = DRAWN,
    index_offset: int = 0,
) -> Tensor:
    """:func:`gated_conv2d` in three dimensions: x (B, C, D, H, W) or (C, D, H, W), weight (N, C / groups, T, R, S)."""
    how = F.conv3d, stride, padding, dilation, groups
    return _gated_conv(
        3, x, weight, bias, how, input_gate, output_gate, weight_gate, block, seed, per_sample, spec, index_offset
    )


def _gated_conv(
    dims: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    how: tuple[Callable[..., Tensor], Any, Any, Any, int],
    input_gate: Tensor | None,
    output_gate: Tensor | None,
    weight_gate: Tensor | None,
    block: tuple[int, int] | None,
    seed: int | Tensor | None,
    per_sample: bool,
    spec: GateSpec,
    index_offset: int,
) -> Tensor:
    """The convolution of ``dims`` dimensions; ``how``: (torch's function, stride, padding, dilation, groups). The other
    arguments are those of :func:`gated_conv2d`.
    """
    convolve, groups = how[0], how[-1] if type(how[-1]) is int else _checks.positive_int("groups", how[-1])
    arguments = *how[1:-1], groups
    where = (
        "weight"
        if weight_gate is not None
        else "input"
        if output_gate is None
        else "output"
        if input_gate is None
        else "both"
    )
    layout = layout_of(dims, x, weight, *arguments, where)
    n_out, n_in = weight.shape[0], weight.shape[1] * groups
    x = cast(x, weight, bias)
    if weight_gate is not None:
        if _checks.flag("per_sample", per_sample) or input_gate is not None or output_gate is not None:
            raise ValueError("weight_gate: expected no input_gate, no output_gate and per_sample=False beside it")
        if ops.routes.forced_name() is not None:  # for its check: conv_route raises if a forced route cannot serve
            ops.select(x.device, x.dtype).conv_route(problem_of(layout, x, weight, groups, "weight", False, False))
        shift = None if bias is None else bias.to(x.dtype)
        return convolve(x, _gate_blocks(x, weight, weight_gate, block, seed, spec), shift, *arguments)
    gates = gates_of(input_gate, n_in, "input channel", output_gate, n_out, "filter", x, seed, spec, per_sample)
    if input_gate is None and output_gate is None:
        return convolve(x, weight, bias, *arguments)
    if offset_of(index_offset, per_sample) and gates.per_sample:
        batch = x if x.dim() == dims + 2 else x[None]
        if gates.input is not None:
            batch = times_rows(batch, drawn_rows(gates.input, batch.shape[0], index_offset), 1)
        y = convolve(batch, weight, bias, *arguments)
        if gates.output is not None:
            y = times_rows(y, drawn_rows(gates.output, batch.shape[0], index_offset), 1)
        return y if x.dim() == dims + 2 else y[0]
    problem = problem_of(layout, x, weight, groups, where, gates.per_sample, spec.rule == SAMPLE)
    backend = ops.select(x.device, x.dtype)
    route, _ = backend.conv_route(problem)
    window = layout.window
    if route == "linear":
        y = ops.gated_linear(x.permute(0, 2, 3, 1), weight.reshape(n_out, n_in), bias, gates)
        return y.permute(0, 3, 1, 2)
    batch = x if x.dim() == dims + 2 else x[None]
    on_activations = route in ("activations", "passes")
    if window is None:
        y = ops.composed_conv(
            batch, weight, bias, gates, lambda *given: convolve(*given, *arguments), groups, on_activations
        )
    elif route == "live" and not hasattr(backend, "skip_closed"):
        y = ops.gated_conv2d(batch, weight, bias, gates, window)
    else:
        whole = functools.partial(ops.gated_conv, window=window, on_activations=on_activations)
        part = ops.on_open_gates(batch, weight, bias, gates, layout.work, whole, window)
        y = whole(batch, weight, bias, gates) if part is None else part
    return y if x.dim() == dims + 2 else y[0]


class Layout(NamedTuple):
    """Properties of a convolution that follow from its shapes and arguments; its route depends on them.

    Attributes:
        window: stride, padding, dilation and groups with a number for each dimension; None if torch's arguments have
            another form.
        pointwise: whether it is a linear layer on the channels of each pixel, which lie side by side in memory.
        activations: how many elements gates would multiply if they did not multiply the weight.
        work: multiply-adds.
    """

    window: Window | None
    pointwise: bool
    activations: int
    work: int


def layout_of(
    dims: int, x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int, where: str | Any
) -> Layout:
    """The layout for gates on ``where``: "input", "output", "both", or "weight" or a block for gates in the weight.

    Layouts are cached: after a convolution has filled the caches, finding one takes longer than drawing the gates.

    Raises: TypeError or ValueError for arguments that do not fit.
    """
    _checks.floating("x", _checks.tensor("x", x))
    _checks.floating("weight", _checks.tensor("weight", weight))
    side_by_side = weight.shape[2:] == (1, 1) and channels_innermost(x)
    problem = dims, x.shape, side_by_side, weight.shape, stride, padding, dilation, groups, where
    if not needs_dispatcher((x, weight)):
        try:
            return _remembered_layout(*problem)
        except TypeError:  # an argument that cannot be hashed; the next line finds the layout, or raises
            pass
    return _layout(*problem)


def _layout(
    dims: int,
    x: torch.Size,
    side_by_side: bool,
    weight: torch.Size,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    where: str | Any,
) -> Layout:
    """:func:`layout_of` from shapes, without the cache. ``side_by_side``: the channels of a pixel are neighbours in
    memory.
    """
    groups = _checks.positive_int("groups", groups)
    if len(weight) != dims + 2:
        raise ValueError(
            f"weight.shape={tuple(weight)}: expected {dims + 2} dimensions, (filters, channels / groups, kernel size)"
        )
    if min(weight[2:]) < 1:
        raise ValueError(f"weight.shape={tuple(weight)}: expected a kernel of at least one position in each dimension")
    if weight[0] % groups:
        raise ValueError(f"groups={groups}: expected a divisor of the {weight[0]} filters of weight")
    channels = weight[1] * groups
    if len(x) not in (dims + 1, dims + 2) or x[-dims - 1] != channels:
        image = f"{channels}, {('L', 'H, W', 'D, H, W')[dims - 1]}"
        why = f"because weight has shape {tuple(weight)} and groups={groups}"
        raise ValueError(f"x.shape={tuple(x)}: expected (B, {image}) or ({image}), {why}")
    _check_sizes(dims, stride, padding, dilation)
    window = _window(weight, stride, padding, dilation, groups)
    known = window is not None and all(isinstance(n, int) for n in x[-dims:])
    if known and window is not None and (min(window.size(x, weight)) < 1 or min(x[-dims:]) < 1):
        raise ValueError(
            f"x.shape={tuple(x)}: expected images that the kernel of weight, {tuple(weight[2:])}, fits into with its "
            "dilation"
        )
    pointwise = side_by_side and window is not None and window[:2] == ((1, 1), (0, 0)) and groups == 1
    size = x[-dims:] if window is None else window.size(x, weight)
    written = (1 if len(x) == dims + 1 else x[0]) * weight[0] * math.prod(size)
    activations = max(math.prod(x) if where != "output" else 0, written if where != "input" else 0)
    return Layout(window, pointwise, activations, written * math.prod(weight[1:]))


# typed, because True == 1 but groups=True has to raise
_remembered_layout = functools.lru_cache(maxsize=1024, typed=True)(_layout)


def problem_of(
    layout: Layout, x: Tensor, weight: Tensor, groups: int, where: Any, per_sample: bool, drawn: bool
) -> ConvProblem:
    """The problem by which a backend chooses a route.

    ``drawn``: whether gates are drawn. Without that a convolution never runs as a linear layer, so that a fresh layer
    equals the dense one to the bit.
    """
    pointwise = layout.pointwise and drawn
    return ConvProblem(
        tuple(weight.shape), groups, where, per_sample, pointwise, layout.activations, layout.work, x.device
    )


def _window(weight: torch.Size, stride: Any, padding: Any, dilation: Any, groups: int) -> Window | None:
    """The arguments with a number for each dimension.

    None if there is no such form: "same" padding that pads one side more than the other, or arguments that torch
    refuses.
    """
    dims = len(weight) - 2
    steps, spread = _each(stride, dims), _each(dilation, dims)
    if steps is None or spread is None or min(*steps, *spread) < 1:
        return None
    if padding == "valid":
        padding = 0
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(spread, weight[2:], strict=True)]
        if any(t % 2 for t in total) or any(step != 1 for step in steps):
            return None
        padding = [t // 2 for t in total]
    around = _each(padding, dims)
    return None if around is None else Window(steps, around, spread, groups)


def _check_sizes(dims: int, stride: Any, padding: Any, dilation: Any) -> None:
    """Raise ValueError for arguments that torch's convolution would not accept."""
    for name, value, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if name == "padding" and isinstance(value, str):
            if value not in ("same", "valid"):
                raise ValueError(
                    f"padding={value!r:.80}: expected 'same', 'valid', an integer or one for each dimension"
                )
            if value == "same" and max(_each(stride, dims) or (1,)) > 1:
                raise ValueError(f"padding='same' with stride={stride!r:.80}: expected a stride of 1 with it")
            continue
        sizes = _each(value, dims)
        if sizes is None or min(sizes) < least or max(sizes) >= 2**31:
            raise ValueError(f"{name}={value!r:.80}: expected an integer of at least {least}, or {dims} of them")


def _each(size: Any, dims: int) -> tuple[int, ...] | None:
    """A size for each of ``dims`` dimensions, from an integer or a sequence; None if it is neither."""
    sizes = (size,) if isinstance(size, int) else size
    if (
        not isinstance(sizes, (tuple, list))
        or not all(isinstance(n, int) and not isinstance(n, bool) for n in sizes)
        or len(sizes) not in (1, dims)
    ):
        return None
    return tuple(sizes) * dims if len(sizes) == 1 else tuple(sizes)


def _gate_blocks(
    x: Tensor, weight: Tensor, gate: Tensor, block: tuple[int, int] | None, seed: int | Tensor | None, spec: GateSpec
) -> Tensor:
    """The weight times its gates, one for each weight (``block`` None) or for each block of filters and channels."""
    if block is None:
        size, what, count = (1, 1), "weight", weight.numel()
    else:
        count = _checks.block_count("block", block, weight.shape[0], weight.shape[1])
        size = (block[0], block[1] * max(1, weight.shape[2:].numel()))
        what = f"{block[0]} x {block[1]} block of filters and channels"
    return ops.fold_blocks(weight, gate_of("weight_gate", gate, count, what, x, seed, spec), size, x.dtype)
