"""Axes: small int64 tensors that say to which unit each element of a tensor belongs.

An axis has the rank of its tensor, and size 1 along every dimension along which the unit does not change. The channels
of an image (B, C, H, W) are one axis of shape (1, C, 1, 1), for example ``[[[[7]], [[8]], [[9]]]]`` for the units 7 to
9. A weight (O, I) has two axes, (O, 1) and (1, I). Unit 0 means "no unit": a batch entry, a token, a pixel, an input
feature.

An axis "changes along" a dimension, or varies there, if it has a size above 1 in it. Two axes of one tensor "meet" if
an operator combines their elements at the same place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Axes = list[Tensor]


def varying(axis: Tensor) -> set[int]:
    """Return the dimensions along which the unit changes."""
    return {dim for dim, size in enumerate(axis.shape) if size > 1}


def moving(axes: Iterable[Tensor]) -> Axes:
    """Return the axes that change along some dimension."""
    return [axis for axis in axes if axis.numel() > 1]


def narrow(axis: Tensor) -> Tensor:
    """Return the axis with size 1 along every dimension along which its values do not change."""
    axis = first_along(axis, [dim for dim, step in enumerate(axis.stride()) if step == 0])
    for dim in varying(axis):
        if torch.equal(axis.narrow(dim, 1, axis.shape[dim] - 1), axis.narrow(dim, 0, axis.shape[dim] - 1)):
            axis = axis.narrow(dim, 0, 1)
    return axis


def at_rank(axis: Tensor, rank: int) -> Tensor:
    """Return the axis with ``rank`` dimensions; the new ones lead and have size 1, as broadcasting adds them."""
    return axis.reshape((1,) * (rank - axis.dim()) + tuple(axis.shape))


def first_along(axis: Tensor, dims: Iterable[int]) -> Tensor:
    """Return the part of the axis at index 0 of each dimension in ``dims``; these dimensions stay, with size 1."""
    for dim in dims:
        axis = axis.narrow(dim, 0, 1)
    return axis


def along(line: Tensor, dim: int, rank: int) -> Tensor:
    """Make an axis from units in order, int64 (n,): it has ``rank`` dimensions, size n along ``dim`` and size 1 along
    the others.
    """
    return line.reshape([-1 if at == dim else 1 for at in range(rank)])


def runs(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Match the dimensions of two shapes of the same number of elements, as a view regroups them.

    Args:
        old: the shape before the view.
        new: the shape after it.

    Returns: pairs (dimensions of ``old``, dimensions of ``new``) with equal products of sizes, each as short as
    possible. From (4, 6, 5) to (4, 2, 3, 5): ``[([0], [0]), ([1], [1, 2]), ([2], [3])]``.
    """
    matched: list[tuple[list[int], list[int]]] = []
    old_left, new_left = list(range(len(old))), list(range(len(new)))
    while old_left or new_left:
        olds, news = old_left[:1], new_left[:1]
        del old_left[:1], new_left[:1]
        while (a := math.prod(old[d] for d in olds)) != (b := math.prod(new[d] for d in news)):
            olds, news = ([*olds, old_left.pop(0)], news) if a < b else (olds, [*news, new_left.pop(0)])
        matched.append((olds, news))
    return matched
