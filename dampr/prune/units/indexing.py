"""Rules of operators that read or write where an index tensor or a mask says (``x[i]``, ``gather``, ``scatter``,
``masked_scatter``). The trace does not know what these hold.

A rule takes a call of an operator and returns the axes of its result. An axis is an int64 tensor that holds the unit of
each index along some dimensions of a tensor. A dimension is "picked" if an index tensor or a mask says which of its
indices are taken.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import rules
from .axes import Axes, at_rank, first_along, moving, varying
from .ledger import Marks

if TYPE_CHECKING:
    from .call import Call


@rules.rule("index index_select gather take_along_dim")
def _index(call: Call) -> Axes:
    """The rule of operators that read a tensor at indices from another tensor, whose values the trace does not know.

    If the units of an axis change along the indexed dimensions alone, they must not be cut ("picked"). If they change
    along other dimensions too, the units at all indices of the indexed dimensions become one, and units along the other
    dimensions stay apart. The channels of an index tensor itself must not be cut.
    """
    tensor, out = call.args[0], []
    for index in call.given[1:]:
        call.ledger.fix(call.axes(index), call.why("picked", "its channels are used as an index"))
    picked_dims = _indexed(call)
    for axis in call.axes(tensor):
        axis_picked, unpicked = varying(axis) & picked_dims, first_along(axis, picked_dims)
        if axis_picked and not varying(axis) - picked_dims:
            call.ledger.fix(axis, call.why("picked", "its channels are picked by an index"))
        elif axis_picked:
            call.ledger.unite(axis, unpicked, call)
        if varying(unpicked):
            out.append(_placed(call, unpicked, picked_dims) if call.name == "index" else unpicked)
    return out


def _indexed(call: Call) -> set[int]:
    """Return the dimensions of the first argument that an index picks from."""
    tensor = call.args[0]
    if call.name not in ("index", "index_put"):
        return {call.args[1] % max(tensor.dim(), 1)}
    picked_dims: set[int] = set()
    dim = 0
    for index in call.args[1]:
        taken = index.dim() if index is not None and index.dtype in (torch.bool, torch.uint8) else 1
        if index is not None:
            picked_dims |= set(range(dim, dim + taken))
        dim += taken
    return picked_dims


def _placed(call: Call, axis: Tensor, picked_dims: set[int]) -> Tensor:
    """Return an axis in the shape of the result of ``tensor[indices]``.

    Dimensions that come from the indices stand where the first picked dimension was if the picked ones are neighbours,
    else in front.

    Args:
        call: the call.
        axis: an axis of ``tensor``, at index 0 of every picked dimension.
        picked_dims: the picked dimensions.
    """
    other_dims = [d for d in range(axis.dim()) if d not in picked_dims]
    index_rank = call.out.dim() - len(other_dims)
    neighbours = sorted(picked_dims) == list(range(min(picked_dims), max(picked_dims) + 1))
    index_start = sum(d < min(picked_dims) for d in other_dims) if neighbours else 0
    sizes = [axis.shape[d] for d in other_dims]
    return axis.permute(*other_dims, *sorted(picked_dims)).reshape(
        sizes[:index_start] + [1] * index_rank + sizes[index_start:]
    )


@rules.rule("index_add index_copy index_reduce scatter scatter_add scatter_reduce")
def _rows(call: Call) -> Axes | tuple[Axes, ...]:
    """The rule of writing rows that data picks (``x.index_add(0, index, value)``), or elements of each column
    (``x.scatter_add(0, index, value)``).

    If the index of a column is not that of all, the call counts as an unknown operator.
    """
    tensor, index, value = call.args[0], call.args[2], call.args[3]
    dim = call.args[1] % tensor.dim()
    call.ledger.fix(call.axes(index), call.why("picked", "its channels are used as an index"))
    if not isinstance(value, Tensor) or value.dim() not in (0, tensor.dim()):
        return rules.opaque(call)
    shapes = {tuple(n for d, n in enumerate(t.shape) if d != dim) for t in (tensor, index, value)}
    if call.name.startswith("scatter") and len(shapes) > 1:
        return rules.opaque(call)
    return _meet_rows(call, value, {dim}, dim, 1)


@rules.rule("index_put")
def _put(call: Call) -> Axes | tuple[Axes, ...]:
    """The rule of ``x[i, :, j] = value``, for whole numbers and masks."""
    picked_dims = _indexed(call)
    indices = [index for index in call.args[1] if index is not None]
    for index in indices:
        call.ledger.fix(call.axes(index), call.why("picked", "its channels are used as an index"))
    index_rank = max(1 if index.dtype in (torch.bool, torch.uint8) else index.dim() for index in indices)
    neighbours = max(picked_dims) - min(picked_dims) + 1 == len(picked_dims)
    return _meet_rows(call, call.args[2], picked_dims, min(picked_dims) if neighbours else 0, index_rank)


def _meet_rows(
    call: Call, value: Tensor, picked_dims: set[int], index_start: int, index_rank: int
) -> Axes | tuple[Axes, ...]:
    """Return the axes after ``value`` was written at the indices of the first argument that data picks.

    The units along the other dimensions meet. If units change along a picked dimension, the call counts as an unknown
    operator.

    Args:
        call: the call.
        value: what is written; it broadcasts to the shape of what is picked.
        picked_dims: the dimensions of the first argument from which data picks.
        index_start: where the dimensions of the indices begin in ``value``.
        index_rank: how many dimensions of ``value`` these are.
    """
    tensor = call.args[0]
    rank = tensor.dim() - len(picked_dims) + index_rank

    def unpicked(sizes: Iterable[int]) -> list[int]:
        """Return the sizes of a tensor like ``value`` in the dimensions of the first argument; 1 where data picks."""
        every = list(sizes)
        rest = iter(every[:index_start] + every[index_start + index_rank :])
        return [1 if d in picked_dims else next(rest) for d in range(tensor.dim())]

    axes = [at_rank(axis, rank) for axis in call.axes(value)]
    if any(varying(axis) & picked_dims for axis in call.axes(tensor)) or any(
        varying(axis) & set(range(index_start, index_start + index_rank)) for axis in axes
    ):
        return rules.opaque(call)
    shape, operands = [1 if d in picked_dims else n for d, n in enumerate(tensor.shape)], []
    if (tensor_operand := rules.operand(call, tensor)) is not None:
        operands.append((tensor_operand[0], [1 if d in picked_dims else n for d, n in enumerate(tensor_operand[1])]))
    if value.dim() and (value_operand := rules.operand(call, value)) is not None:
        sizes = unpicked([1] * (rank - value.dim()) + value_operand[1])
        operands.append((Marks([axis.reshape(unpicked(axis.shape)) for axis in axes]), sizes))
    axes_met = call.ledger.meet(shape, operands, call)
    missing = rank - value.dim()
    rules.meet_constants(call, tensor, axes_met, range(tensor.dim()))
    rules.meet_constants(call, value, axes_met, [n - missing - 1 for n in unpicked(range(1, rank + 1))])
    return axes_met


@rules.rule("masked_scatter")
def _masked_rows(call: Call) -> Axes | tuple[Axes, ...]:
    """The rule of ``x.masked_scatter(mask, source)`` where the mask picks whole rows: the elements of ``source``, in
    order, take their places.

    Units along the dimensions of a row meet. If units of ``source`` change along others, or the mask picks parts of
    rows, the call counts as an unknown operator.
    """
    tensor, mask, source = call.args[:3]
    shape = list(call.out.shape)
    row_rank = 0  # the number of dimensions of a row
    while row_rank < min(len(shape), source.dim()) and source.shape[-1 - row_rank] == shape[-1 - row_rank]:
        if row_rank < mask.dim() and not call.even(mask, {mask.dim() - 1 - row_rank}):
            break
        row_rank += 1
    ahead = source.dim() - row_rank
    if not row_rank or any(dim < ahead for axis in call.axes(source) for dim in varying(axis)):
        return _unknown_if_units(call)
    call.ledger.fix(call.axes(mask), call.why("picked", "its channels are used as an index"))
    operands = [tensor_operand] if (tensor_operand := rules.operand(call, tensor)) is not None else []
    if (source_operand := rules.operand(call, source)) is not None:
        operands.append(
            (Marks([axis.reshape(axis.shape[ahead:]) for axis in source_operand[0].axes]), source_operand[1][ahead:])
        )
    met = call.ledger.meet(shape, operands, call)
    rules.meet_constants(call, tensor, met, [d - len(shape) + tensor.dim() for d in range(len(shape))])
    rules.meet_constants(call, source, met, [d - len(shape) + source.dim() for d in range(len(shape))])
    return met


@rules.rule("slice_scatter select_scatter")
def _unknown_if_units(call: Call) -> Axes | tuple[Axes, ...]:
    """The rule of scatters: an unknown operator for tensors with units, and nothing for others."""
    return rules.opaque(call) if any(moving(marks.axes) for marks in call.marks if marks is not None) else []


@rules.rule("nonzero argwhere unique_dim _unique2 bincount histc one_hot bucketize searchsorted")
def _read_as_data(call: Call) -> Axes | tuple[Axes, ...]:
    """The rule of operators that read values as indices or classes: the units that they read are fixed."""
    call.ledger.fix(call.axes(call.args[0]), call.why("picked", "its channels are used as an index"))
    return [] if isinstance(call.out, Tensor) else tuple([] for _ in call.out)
