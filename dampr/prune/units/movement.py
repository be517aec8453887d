"""Rules of operators that move elements (views, ``permute``, ``cat``, slices) and compute nothing.

A rule takes a call of an operator and returns the axes of its result. An axis holds the unit of every element of its
tensor, so these rules mostly apply the same operator to the axes. For example ``x.permute(0, 2, 1)`` of a tensor (B, C,
T) whose channels have the axis (1, C, 1) gives the axis (1, 1, C).

Operators that take a part of a dimension also say something about the units themselves: code that calls ``chunk(2)``
goes on to use both halves in the same way, so both must lose the same channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from . import rules
from .axes import Axes, along, at_rank, narrow, varying
from .ledger import Marks, Piece, line

if TYPE_CHECKING:
    from .call import Call

_PARTS = 3  # a slice that is one of so few equal parts is taken for one of these, whatever the module keeps


def equal_parts(call: Call, axis: Tensor, dim: int, parts: int) -> None:
    """Record that ``parts`` equal parts of dimension ``dim`` of an axis lose the same channels.

    The code knows how many parts there are, but not how long they are. Channel i of every part becomes the same unit.
    Nothing is recorded if the axis does not change along ``dim``.

    Args:
        call: the call that takes the parts.
        axis: an axis of the tensor.
        dim: the dimension, a number from 0 on.
        parts: the number of parts; it divides the size of the dimension.
    """
    if axis.shape[dim] > 1:
        split = axis.unflatten(dim, (parts, -1))
        call.ledger.unite(split, split.narrow(dim, 0, 1), call)


def _literal(call: Call, axis: Tensor, dim: int) -> None:
    """Record that code takes a part of dimension ``dim`` by literal numbers, such as ``x[:, 3:7]``.

    If the axis changes along ``dim`` alone, its units are fixed, because the numbers would pick other channels of a
    smaller tensor. If it changes along other dimensions too (channels beside heads, say), all indices of ``dim`` become
    one unit and the others can still be cut.

    Args:
        call: the call that takes the part.
        axis: an axis of the tensor, which changes along ``dim``.
        dim: the dimension, a number from 0 on.
    """
    if varying(axis) == {dim}:
        call.ledger.fix(axis, call.why("picked", "its channels are picked by literal numbers"))
    else:
        call.ledger.unite(axis, axis.narrow(dim, 0, 1), call)


def _pieces_kept(call: Call, axis: Tensor, dim: int, sizes: list[int]) -> bool:
    """Return whether the running module keeps the sizes of these parts of a dimension, so that they can follow a cut.

    The module may keep all of them in one tuple, or each in an attribute. The last may be what is left of the
    dimension, and others may be two parts together that were taken before. If so, the parts are recorded in
    ``ledger.pieces``, and parts whose sizes are in one attribute lose the same units.

    Args:
        call: the call that takes the parts.
        axis: an axis of the tensor.
        dim: the dimension of which the parts are.
        sizes: the sizes of all parts, in order; their sum is the size of the dimension.

    Returns: False also if the axis changes along other dimensions than ``dim``, and for parts that training alone
    takes: nothing would show that their numbers are right.
    """
    kept, module, ledger = call.ledger.kept.get(call.module_name(), {}), call.module_name(), call.ledger
    if varying(axis) != {dim}:
        return False
    # for each part the attributes that hold its size, and the tuples that hold the sizes of all parts
    named = {name: value for name, value in kept.items() if "." not in name}
    names = [
        [name for name, value in named.items() if value == size and (size > 1 or (module, name) in ledger.sure)]
        for size in sizes
    ]
    tuples = [key.removesuffix(".0") for key in kept if key.endswith(".0")]
    tuples_alike = [name for name in tuples if _whole(kept, name) == sizes]
    if tuples_alike and len(set(sizes)) < len(sizes):
        names = [[] for _ in sizes]  # each part has a number of its own, which attributes of that size are not
    # the sizes of parts that the module took before, and of two of them together
    seen = {len(units) for owner, _, units in ledger.pieces if owner == module}
    sums = {a + b for a in seen for b in seen if a != b}
    if not tuples_alike and any(
        not attributes_of_size and size not in sums for attributes_of_size, size in zip(names[:-1], sizes, strict=False)
    ):
        return False
    parts = axis.split(sizes, dim)
    pieces = [
        (module, name, line(part))
        for at, part in enumerate(parts)
        for name in (*(f"{name}.{at}" for name in tuples_alike), *names[at])
    ]
    if call.tracer.training and not all(any(_same_piece(piece, other) for other in ledger.pieces) for piece in pieces):
        return False
    ledger.pieces += pieces
    for at, part in enumerate(parts):
        if names[at] and names[at] in names[:at]:
            ledger.unite(part, parts[names.index(names[at])], call)
    return True


def _same_piece(a: Piece, b: Piece) -> bool:
    """Whether two records are of one part that is taken by one number."""
    return a[:2] == b[:2] and np.array_equal(a[2], b[2])


def _taken_elsewhere(call: Call, dim: int, numbers: Iterable[int]) -> None:
    """Record the numbers of the running module by which it takes a part of a dimension without units, such as time.

    Such a number cannot follow a width too.
    """
    if not any(dim in varying(axis) for axis in call.axes(call.args[0])):
        wanted, module = {number for number in numbers if number > 1}, call.module_name()
        kept = call.ledger.kept.get(module, {})
        call.ledger.elsewhere += [(module, name) for name, value in kept.items() if value in wanted]


def _whole(kept: dict[str, int], name: str) -> list[int]:
    """Return the numbers of the tuple or list ``name``.

    Args:
        kept: the numbers that a module keeps, as :func:`.numbers.kept_numbers` returns them.
        name: the attribute.
    """
    numbered = [(int(key.rpartition(".")[2]), value) for key, value in kept.items() if key.rpartition(".")[0] == name]
    return [value for _, value in sorted(numbered)]


@rules.rule("view _unsafe_view reshape _reshape_alias _reshape_copy unflatten flatten")
def _view(call: Call) -> Axes:
    """The rule of views that regroup dimensions: (B, C, H, W) as (B, C H W), or (B, T, C) as (B, T, heads, C /
    heads).
    """
    tensor = call.args[0]
    return call.ledger.reshape(call.axes(tensor), list(tensor.shape), list(call.out.shape), call)


@rules.rule("permute transpose t unsqueeze movedim swapaxes numpy_T adjoint")
def _turn(call: Call) -> Axes:
    """The rule of operators that reorder dimensions or add one of size 1."""
    return [call.func(axis, *call.args[1:], **call.kwargs) for axis in call.axes(call.args[0])]


@rules.rule("expand expand_as")
def _expand(call: Call) -> Axes:
    """The rule of ``expand``: axes have size 1 along what is expanded, so they only gain leading dimensions."""
    return [at_rank(axis, call.out.dim()) for axis in call.axes(call.args[0])]


@rules.rule("squeeze roll flip repeat diagonal rot90 unfold")
def _move(call: Call) -> Axes:
    """The rule of operators that move single elements: the operator is applied to the units of all elements."""
    tensor, out = call.args[0], []
    for axis in call.axes(tensor):
        full = axis.expand(tensor.shape)
        try:
            moved = call.func(full, *call.args[1:], **call.kwargs)
        except (RuntimeError, NotImplementedError):  # the operator does not take integers
            moved = call.func(full.double(), *call.args[1:], **call.kwargs).round().long()
        out.append(narrow(moved))
    return out


@rules.rule("_pack_padded_sequence _pad_packed_sequence")
def _pack(call: Call) -> tuple[Axes, ...]:
    """The rule of packed sequences: (steps, batch, features) becomes (rows, features), or the reverse.

    Features keep their units. Units along steps or sequences are fixed, because lengths in the data order the rows.
    """
    tensor, rank = call.args[0], call.first.dim()
    rows = tensor.dim() - (rank - (1 if call.name == "_pack_padded_sequence" else 2))
    out = []
    for axis in call.axes(tensor):
        if any(dim < rows for dim in varying(axis)):
            call.ledger.fix(axis, call.why("picked", "its channels are steps or sequences"))
        else:
            out.append(axis.reshape([1] * (rank - tensor.dim() + rows) + list(axis.shape[rows:])))
    return out, []


@rules.rule("view_as_complex")
def _pairs_as_complex(call: Call) -> Axes:
    """The rule of ``view_as_complex``: the last dimension, of size 2 (real, imaginary), goes away, and the units of the
    two become one.
    """
    axes = call.axes(call.args[0])
    for axis in axes:
        call.ledger.unite(axis[..., :1], axis, call)
    return [axis[..., 0] for axis in axes]


@rules.rule("view_as_real")
def _complex_as_pairs(call: Call) -> Axes:
    """The rule of ``view_as_real``: the result has one more dimension, of size 2, for the real and the imaginary
    part.
    """
    return [axis.unsqueeze(-1) for axis in call.axes(call.args[0])]


@rules.rule("as_strided")
def _strided(call: Call) -> Axes:
    """The rule of ``as_strided``: a tensor of units with the strides of the input is read with the strides of the
    call.
    """
    tensor, out = call.args[0], []
    offset = call.arg("storage_offset")
    start = 0 if offset is None else offset - tensor.storage_offset()
    for axis in call.axes(tensor):
        full = torch.empty_strided(tensor.shape, tensor.stride(), dtype=torch.int64).copy_(axis.expand(tensor.shape))
        out.append(narrow(full.as_strided(call.args[1], call.args[2], start)))
    return out


@rules.rule("select unbind")
def _select(call: Call) -> Axes | tuple[Axes, ...]:
    """The rule of ``x.select(dim, i)`` and ``x.unbind(dim)``, which take single indices of a dimension.

    If units change along ``dim`` alone, they are fixed. Otherwise all indices of ``dim`` become alike: with heads along
    ``dim``, channel c of every head is one unit.
    """
    tensor = call.args[0]
    dim = call.arg("dim", 0) % tensor.dim()
    for axis in call.axes(tensor):
        equal_parts(call, axis, dim, axis.shape[dim])
        if varying(axis) == {dim}:
            call.ledger.fix(axis, call.why("picked", "its channels are picked by literal numbers"))

    def at(index: int) -> Axes:
        """Return the axes at one index of ``dim``."""
        return [narrow(axis.select(dim, index if axis.shape[dim] > 1 else 0)) for axis in call.axes(tensor)]

    return at(call.args[2]) if call.name == "select" else tuple(at(index) for index in range(tensor.shape[dim]))


@rules.rule("split unsafe_split split_with_sizes unsafe_split_with_sizes chunk unsafe_chunk tensor_split")
def _split(call: Call) -> tuple[Axes, ...]:
    """The rule of ``split`` and ``chunk``: parts of one size lose the same units; other parts are picked by literal
    numbers, or by numbers that the running module keeps.
    """
    tensor = call.args[0]
    dim = call.arg("dim", 0) % tensor.dim()
    sizes = [part.shape[dim] for part in call.out]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    listed = call.name.endswith("with_sizes")  # else all parts but the last have the size that the code names
    _taken_elsewhere(call, dim, sizes)
    for axis in call.axes(tensor):
        if axis.shape[dim] > 1 and len(sizes) > 1:
            if listed and _pieces_kept(call, axis, dim, sizes):
                continue
            equal_parts(call, axis, dim, len(sizes)) if len(set(sizes)) == 1 else _literal(call, axis, dim)

    def part(end: int, size: int) -> Axes:
        """Return the axes of the part with ``size`` indices that stops before index ``end``."""
        return [narrow(a.narrow(dim, end - size, size)) if a.shape[dim] > 1 else a for a in call.axes(tensor)]

    return tuple(part(end, size) for end, size in zip(ends, sizes, strict=True))


@rules.rule("slice narrow")
def _slice(call: Call) -> Axes:
    """The rule of ``x[start:stop:step]`` along one dimension.

    A part that is one of several equal parts (the first half, the last third) keeps its units aligned with the other
    parts, and so does every ``step``-th element where ``step`` divides the size. Every other slice is a literal pick,
    unless the running module keeps its bounds.
    """
    tensor = call.args[0]
    dim = call.arg("dim", 0) % tensor.dim()
    full_size, part_size = tensor.shape[dim], call.out.shape[dim]
    start, step = call.arg("start") or 0, call.arg("step", 1) or 1
    start = min(start + full_size if start < 0 else start, full_size)
    if part_size != full_size:
        stop = start + part_size
        _taken_elsewhere(call, dim, (start, part_size, stop if stop < full_size else 0))
    out = []
    for axis in call.axes(tensor):
        if axis.shape[dim] > 1 and part_size != full_size:
            equal = step == 1 and part_size and full_size % part_size == 0 and start % part_size == 0
            parts = full_size // part_size if equal else 0  # 0: the slice is no part of equal ones
            kept = step == 1 and _pieces_kept(call, axis, dim, _cuts(start, part_size, full_size))
            if parts and (parts <= _PARTS or not kept):
                equal_parts(call, axis, dim, parts)
            elif step > 1 and full_size % step == 0:
                split = axis.unflatten(dim, (-1, step))
                call.ledger.unite(split, split.narrow(dim + 1, 0, 1), call)
            elif not parts and not kept:
                _literal(call, axis, dim)
        if axis.shape[dim] > 1:
            axis = narrow(axis[(slice(None),) * dim + (slice(start, start + max(part_size - 1, 0) * step + 1, step),)])
        out.append(axis)
    return out


def _cuts(start: int, part_size: int, full_size: int) -> list[int]:
    """Return the sizes of the parts before a slice, in it and after it, without empty ones."""
    return [size for size in (start, part_size, full_size - start - part_size) if size]


@rules.rule("cat concat concatenate")
def _cat(call: Call) -> Axes:
    """The rule of ``cat``. Empty one-dimensional tensors, which torch accepts beside any others, are left out."""
    parts = [part for part in call.args[0] if part.dim() != 1 or part.shape[0]]
    return _joined(call, parts, [call.axes(part) for part in parts], call.arg("dim", 0) % call.out.dim())


@rules.rule("stack")
def _stack(call: Call) -> Axes:
    """The rule of ``stack``: each part gets a dimension of size 1, and the parts are joined along it."""
    dim = call.arg("dim", 0) % call.out.dim()
    return _joined(
        call, call.args[0], [[axis.unsqueeze(dim) for axis in call.axes(part)] for part in call.args[0]], dim
    )


def _joined(call: Call, parts: list[Tensor], axes: list[Axes], dim: int) -> Axes:
    """Return the axes of ``parts`` side by side along ``dim``.

    Axes that change along ``dim`` are concatenated; a part without units there contributes zeros ("no unit"). All other
    axes meet as in an elementwise operator, because the parts share these dimensions.

    Args:
        call: the call.
        parts: the tensors.
        axes: the axes of each tensor, with the rank of the result.
        dim: the dimension of the result along which the parts lie.
    """
    shape = list(call.out.shape)
    others = [1 if d == dim else size for d, size in enumerate(shape)]
    operands = [
        (Marks([a for a in part_axes if a.shape[dim] == 1]), others)
        for part, part_axes in zip(parts, axes, strict=True)
        if call.of(part) is not None
    ]
    other_axes = call.ledger.meet(others, operands, call)
    along_dim = [next((axis for axis in part_axes if axis.shape[dim] > 1), None) for part_axes in axes]
    if all(axis is None for axis in along_dim):
        return other_axes
    sizes = [max(axis.shape[d] for axis in along_dim if axis is not None) for d in range(len(shape))]
    expanded = []
    for part, axis in zip(parts, along_dim, strict=True):
        size = part.shape[dim] if part.dim() == len(shape) else 1
        if axis is None and call.of(part) is None and call.tracer.is_zero(part):  # as a first state of recurrent code
            axis = along(call.ledger.fresh(size), dim, len(shape))
        axis = torch.zeros([1] * len(shape), dtype=torch.int64) if axis is None else axis
        expanded.append(axis.expand([size if d == dim else n for d, n in enumerate(sizes)]))
    return [*other_axes, narrow(torch.cat(expanded, dim))]


@rules.rule(
    "constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d "
    "replication_pad3d pad"
)
def _pad(call: Call) -> Axes:
    """The rule of padding. Zeros or other constants belong to no unit; copies of the border along channels fix
    these.
    """
    tensor, widths, out = call.args[0], call.args[1], []
    last = tensor.dim() - 1
    padded = {last - i // 2 for i, width in enumerate(widths) if width}
    for axis in call.axes(tensor):
        hit = varying(axis) & padded
        if not hit:
            out.append(axis)
        elif call.name == "constant_pad_nd":
            axis_widths = [width if last - i // 2 in hit else 0 for i, width in enumerate(widths)]
            out.append(narrow(torch.constant_pad_nd(axis, axis_widths, 0)))
        else:
            call.ledger.fix(axis, call.why("mixed", "its channels are mixed"))
    return out


@rules.rule("pixel_shuffle")
def _pixel_shuffle(call: Call) -> Axes:
    """The rule of (B, C r^2, H, W) as (B, C, H r, W r): the r^2 channels that make one channel of the result become one
    unit.
    """
    factor, out = call.args[1], []
    for axis in call.axes(call.args[0]):
        if axis.shape[-3] > 1:
            split = axis.unflatten(-3, (-1, factor**2))
            call.ledger.unite(split, split.narrow(-3, 0, 1), call)
            out.append(narrow(split.narrow(-3, 0, 1).squeeze(-3)))
    return out


@rules.rule("pixel_unshuffle")
def _pixel_unshuffle(call: Call) -> Axes:
    """The rule of (B, C, H r, W r) as (B, C r^2, H, W): every channel of the input becomes r^2 channels of one unit."""
    tensor, factor = call.args[:2]
    return [
        narrow(torch.pixel_unshuffle(axis.expand(tensor.shape).double(), factor).long()) for axis in call.axes(tensor)
    ]


@rules.rule("im2col")
def _unfold(call: Call) -> Axes:
    """The rule of ``im2col``: (B, C, H, W) as (B, C kh kw, L), the patches of an image side by side.

    A channel is the kh kw rows of its patches. The zeros around the image belong to it too, as padding does not mix
    channels.
    """
    height, width = call.args[1]
    out = []
    for axis in call.axes(call.args[0]):
        if varying(axis) & {axis.dim() - 2, axis.dim() - 1}:
            call.ledger.fix(axis, call.why("mixed", "its channels are mixed"))
        elif axis.shape[-3] > 1:
            out.append(axis.squeeze(-1).repeat_interleave(height * width, -2))
        else:
            out.append(axis.squeeze(-1))
    return out


@rules.rule("col2im")
def _fold(call: Call) -> Axes:
    """The rule of ``col2im``: (B, C kh kw, L) as (B, C, H, W), where patches that overlap are added up.

    The kh kw rows of a channel become one unit.
    """
    columns, (height, width) = call.args[0], call.args[2]
    out = []
    for axis in call.axes(columns):
        if axis.shape[-2] > 1:
            patches = axis.unflatten(-2, (-1, height * width))
            channels = patches[..., :1, :1]
            call.ledger.unite(patches, channels, call)
            out.append(narrow(channels))
        else:
            out.append(axis.unsqueeze(-1))
    return out


@rules.rule("channel_shuffle native_channel_shuffle")
def _channel_shuffle(call: Call) -> Axes:
    """The rule of a shuffle over ``groups``: the channels in the same place of every group become one unit, then they
    move.
    """
    tensor, groups = call.args[:2]
    for axis in call.axes(tensor):
        equal_parts(call, axis, 1, groups)
    return [
        narrow(torch.channel_shuffle(axis.expand(tensor.shape).double(), groups).long()) for axis in call.axes(tensor)
    ]


@rules.rule("glu")
def _glu(call: Call) -> Axes:
    """The rule of ``glu``, one half times the sigmoid of the other: both halves lose the same units."""
    tensor = call.args[0]
    dim = call.arg("dim", -1) % tensor.dim()
    for axis in call.axes(tensor):
        equal_parts(call, axis, dim, 2)
    return [narrow(a.narrow(dim, 0, tensor.shape[dim] // 2)) if a.shape[dim] > 1 else a for a in call.axes(tensor)]
