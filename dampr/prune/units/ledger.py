"""The ledger: a record of what the operators of a model say about its units.

Rules write into it (:mod:`.rules`), and :mod:`.partition` solves it. In this module, an axis is an int64 tensor that
holds the unit of each index of some dimensions; its other dimensions have size 1. ``varying(axis)`` are the dimensions
with a size above 1, along which its units change.

Most records end in a :class:`Reason`, why the units cannot be cut if it comes to that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .axes import Axes, at_rank, moving, narrow, runs, varying
from .numbers import kept_numbers

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Piece = tuple[str, str, Ints]  # module, attribute, units
_MANY = 4096  # duplicates among more pairs than this are removed
_HALF = 31  # a pair of units is packed into one int64, 31 bits each

CONSTANTS = "its channels meet constants that are no parameter and no buffer"
OF_WEIGHT = "a statistic is computed over what a weight reads"
DATA = "its channels meet data that has no channels of its own"


@dataclass(frozen=True)
class Reason:
    """Why units must not be cut, or which statistic is computed over them.

    Attributes:
        kind: "output", "mixed", "statistic", "constants", "picked", "opaque", "split", "unread", "unreached" or "only"
            (nothing is left to choose along a dimension).
        text: the reason in words.
        operator, module, line: the operator that gives the reason, the module that ran it, and the line of code outside
            of torch that called it; empty if no operator does.
    """

    kind: str
    text: str
    operator: str = ""
    module: str = ""
    line: str = ""

    def __str__(self) -> str:
        place = f"{self.operator} in {self.module}" if self.operator else self.module
        place = ", ".join(part for part in (place, self.line) if part)
        return f"{self.text} ({place})" if place else self.text


@dataclass
class Marks:
    """What a trace knows about one tensor.

    Attributes:
        axes: its axes, which say to which unit each of its elements belongs (:mod:`.axes`).
        weight: whether it is a parameter or a buffer, or computed from these alone.
        scaled: whether it is a weight times activations, element by element, so that it is 0 where the weight is: the
            weight of a modulated convolution, say. Its axes are those of the weight.
    """

    axes: Axes
    weight: bool = False
    scaled: bool = False


class Where(Protocol):
    """The operator call that writes into the ledger."""

    def why(self, kind: str, text: str) -> Reason:
        """Make a reason that names this operator, its module and the line that ran it.

        Args:
            kind: one of the kinds that :class:`Reason` lists.
            text: the reason in words.
        """

    def module_name(self) -> str:
        """Return the name of the module that runs this operator."""

    def reads_weight(self) -> bool:
        """Whether the first argument is a weight."""


@dataclass(frozen=True)
class Split:
    """A view that broke a dimension into the dimensions ``dims`` of ``axis``.

    Which one of these dimensions may lose indices is decided when the whole ledger is known.
    """

    axis: Tensor
    dims: list[int]


@dataclass(frozen=True)
class Product:
    """The multiply-accumulates of one product.

    Attributes:
        module: the name of the module that ran it.
        macs: the number with all units; it is proportional to what is left of each factor.
        factors: the units of each of its dimensions.
        overlapping: axes that change along a dimension together, as those of keys and values do along the heads;
            :func:`.partition.solve` makes factors of them.
    """

    module: str
    macs: int
    factors: list[Ints]
    overlapping: list[Tensor] = field(default_factory=list)


@dataclass
class Ledger:
    """What operators say about the units of a model.

    A unit is an integer from 1 on for each index of each dimension longer than 1 of each floating-point parameter and
    buffer. 0 means "no unit". Below, "units" is an int64 array of them.

    Attributes:
        origin: name of a parameter or buffer -> (dimension, first unit, size) of each dimension with units; a tied
            tensor is listed once.
        alias: every name -> the name in ``origin``.
        known: id of a tensor -> (tensor, name, marks).
        unions: (pairs of units that are one, (2, n); why they met).
        blocks: ((outer, inner) pairs from one operator in which an outer unit runs along several inner ones; why).
        fixed: (units, why they must not be cut).
        statistics: (units, the statistic over them).
        splits: the views that broke a dimension into several.
        normalised: sums over weights alone: (the units of each factor at the same places, why). They are harmless if
            gates are on a factor that also reads these units, because zeros there count as if they were cut.
        read: units of contracted dimensions of weights.
        written: units of the other dimensions of weights, of biases and of norms.
        reached: name -> the modes (training or not) in which an operator read it.
        numbers: (operator, its arguments that are not tensors) of every elementwise call, in order.
        columns: units of the contracted dimensions of weights themselves; they are in ``read`` too.
        summed: units of activations that are added up without a weight (a sum over channels, a product of two
            activations).
        products: every product that torch's FLOP counter counts.
        normed: (name of the module, units, number of groups) of every norm over groups of channels, or over each
            channel.
        counted: (name of the module, units in order) of every statistic over units.
        beside: pairs of units of weights that are added, or the like, before a product reads them: if one is a column,
            both are.
        within: names of the weights of grouped convolutions whose groups all lose the same number of channels, while
            no group goes as a whole.
        in_groups: names of the weights of convolutions with groups of several channels.
        kept: name of a module -> the whole numbers that it keeps, as :func:`.numbers.kept_numbers` returns them.
        elsewhere: (name of the module, attribute) of the numbers by which code takes parts of dimensions without units.
        added: units of activations that meet other activations, but not as factors: those of a residual stream, say.
        sure: (name of the module, attribute) of numbers that are known to be those of parts, even of one index.
        pieces: (name of the module, attribute, units in order) of every part of a dimension that code takes by a number
            which the module keeps in this attribute.
        count: the number of the next unit.
    """

    origin: dict[str, list[tuple[int, int, int]]] = field(default_factory=dict)
    alias: dict[str, str] = field(default_factory=dict)
    known: dict[int, tuple[Tensor, str, Marks]] = field(default_factory=dict)
    unions: list[tuple[Ints, Reason]] = field(default_factory=list)
    blocks: list[tuple[Ints, Reason]] = field(default_factory=list)
    fixed: list[tuple[Ints, Reason]] = field(default_factory=list)
    statistics: list[tuple[Ints, Reason]] = field(default_factory=list)
    splits: list[Split] = field(default_factory=list)
    normalised: list[tuple[list[Ints], Reason]] = field(default_factory=list)
    read: list[Ints] = field(default_factory=list)
    written: list[Ints] = field(default_factory=list)
    reached: dict[str, set[bool]] = field(default_factory=dict)
    numbers: list[tuple[Any, ...]] = field(default_factory=list)
    columns: list[Ints] = field(default_factory=list)
    summed: list[Ints] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    normed: list[tuple[str, Ints, int]] = field(default_factory=list)
    counted: list[tuple[str, Ints]] = field(default_factory=list)
    beside: list[Ints] = field(default_factory=list)
    within: frozenset[str] = frozenset()
    in_groups: set[str] = field(default_factory=set)
    kept: dict[str, dict[str, int]] = field(default_factory=dict)
    sure: frozenset[tuple[str, str]] = frozenset()
    pieces: list[Piece] = field(default_factory=list)
    elsewhere: list[tuple[str, str]] = field(default_factory=list)
    added: list[Ints] = field(default_factory=list)
    count: int = 1

    @classmethod
    def of(cls, model: nn.Module, within: Iterable[str] = (), sure: Iterable[tuple[str, str]] = ()) -> Ledger:
        """Make a ledger with fresh units for every parameter and buffer of ``model``.

        Args:
            model: the model; not changed.
            within: names of the weights of grouped convolutions whose groups all lose the same number of channels.
            sure: (name of a module, attribute) of numbers that are known to be those of parts.
        """
        kept = {name: kept_numbers(module) for name, module in model.named_modules()}
        ledger = cls(within=frozenset(within), kept=kept, sure=frozenset(sure))
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        for name, tensor in named:
            if id(tensor) in ledger.known:
                ledger.alias[name] = ledger.known[id(tensor)][1]
            elif tensor.is_floating_point() or tensor.is_complex():
                ledger.alias[name] = name
                ledger.known[id(tensor)] = tensor, name, Marks(ledger._label(name, tensor), weight=True)
        return ledger

    def _label(self, name: str, tensor: Tensor) -> Axes:
        """Give fresh units to a parameter or buffer and enter them into ``origin``; returns its axes, one for each
        dimension longer than 1.
        """
        axes, self.origin[name] = [], []
        for dim, size in enumerate(tensor.shape):
            if size > 1:
                self.origin[name].append((dim, self.count, size))
                axes.append(self.fresh(*(size if at == dim else 1 for at in range(tensor.dim()))))
        return axes

    def fresh(self, *shape: int) -> Tensor:
        """Make an axis of this shape with new units, and count these."""
        first, self.count = self.count, self.count + math.prod(shape)
        return torch.arange(first, self.count).reshape(shape)

    def checkpoint(self) -> tuple[list[int], dict[str, set[bool]]]:
        """Return the state of the ledger, for :meth:`back_to`: the lengths of its lists, and ``reached``."""
        return [len(part) for part in self._parts()], {name: set(modes) for name, modes in self.reached.items()}

    def back_to(self, mark: tuple[list[int], dict[str, set[bool]]]) -> None:
        """Remove what was written since the checkpoint ``mark``, because a run that failed says nothing."""
        for part, length in zip(self._parts(), mark[0], strict=True):
            del part[length:]
        self.reached = mark[1]

    def _parts(self) -> list[list[Any]]:
        """Return all lists of the ledger to which rules append."""
        return [
            self.unions,
            self.blocks,
            self.fixed,
            self.statistics,
            self.splits,
            self.read,
            self.written,
            self.normalised,
            self.numbers,
            self.columns,
            self.summed,
            self.products,
            self.normed,
            self.counted,
            self.beside,
            self.pieces,
            self.elsewhere,
            self.added,
        ]

    # records that rules make
    # ----------------------------------------------------------------------------------------------------------------
    def unite(self, a: Tensor, b: Tensor, call: Where) -> None:
        """Record that the units at the same place of the axes ``a`` and ``b``, broadcast, are one unit. ``call`` is the
        operator.
        """
        self.unions.append((_pairs(a, b), call.why("constants", "its channels meet elements that belong to no layer")))

    def contain(self, outer: Tensor, inner: Tensor, call: Where) -> None:
        """Record that each unit of ``outer`` runs along several units of ``inner`` and can be cut only with all of
        these.

        For example one head (outer) runs along all its channels (inner). The two axes are broadcast. ``call`` is the
        operator.
        """
        self.blocks.append(
            (_pairs(outer, inner), call.why("mixed", "several sets of channels have one unit between them"))
        )

    def fix(self, axes: Tensor | Iterable[Tensor], why: Reason) -> None:
        """Record that no unit of ``axes``, one axis or several, may be cut; ``why`` is the reason."""
        for axis in [axes] if isinstance(axes, Tensor) else axes:
            self.fixed.append((line(axis), why))

    def keep_along(self, axis: Tensor, dims: set[int], text: str, call: Where) -> None:
        """Record that values without units that differ along ``dims`` meet an axis, so that no index of these
        dimensions may go.

        The units themselves are fixed if they change along no other dimension. Else some may go at each index: whole
        heads, where constants differ within a head.

        Args:
            axis: the axis.
            dims: the dimensions along which the values differ.
            text: what meets the units, in words.
            call: the operator.
        """
        why = call.why("constants", text)
        if varying(axis) <= dims:
            self.fix(axis, why)
        else:
            index = self.fresh(*(n if d in dims else 1 for d, n in enumerate(axis.shape)))
            self.fix(index, why)
            self.contain(index, axis, call)

    def statistic(self, axis: Tensor, call: Where) -> None:
        """Record that the units of ``axis`` may be cut only if the statistic that ``call`` computes counts open units
        alone.
        """
        text = OF_WEIGHT if call.reads_weight() else "a statistic is computed over its channels"
        self.statistics.append((line(axis), call.why("statistic", text)))
        self.counted.append((call.module_name(), line(axis)))

    # parts that several rules share
    # ----------------------------------------------------------------------------------------------------------
    def meet(self, shape: Sequence[int], operands: Sequence[tuple[Marks, Sequence[int]]], call: Where) -> Axes:
        """Combine operands of an elementwise operator, and return the axes of its result.

        Units of different operands at the same place become one. Axes of one operand do not meet each other, and an
        operand that is broadcast along a dimension is not united with what varies there.

        Args:
            shape: the shape of the result.
            operands: (marks, shape) of each operand with units; all are broadcast to ``shape``.
            call: the operator.
        """
        rank = len(shape)
        padded = [
            ([at_rank(a, rank) for a in marks.axes], (1,) * (rank - len(size)) + tuple(size))
            for marks, size in operands
        ]
        out: Axes = []
        for axes, _ in padded:  # the axes of each operand meet those of all operands before it
            others, joined = out, []
            for axis in moving(axes):
                axis, others = self._among(axis, others, call)
                joined.append(axis)
            out = others + joined
        for number, (axes, _) in enumerate(padded):  # data without units may differ along the units of an operand
            for axis in moving(axes):
                for other_number, (other_axes, size) in enumerate(padded):
                    dims = {d for d in varying(axis) if size[d] > 1}
                    if other_number != number and dims and not any(varying(b) & varying(axis) for b in other_axes):
                        self.keep_along(axis, dims, DATA, call)
        return out

    def _among(self, axis: Tensor, others: Axes, call: Where) -> tuple[Tensor, Axes]:
        """Let an axis of one operand meet the axes of the other operands, and record what becomes one.

        Args:
            axis: an axis of one operand.
            others: the axes of the other operands, with the same rank.
            call: the operator.

        Returns: (the axis of the result, the axes in ``others`` that did not meet it).
        """
        unmet, has_met, original = [], False, axis
        for other in others:
            axis_dims, other_dims = varying(axis), varying(other)
            if not axis_dims & other_dims or (has_met and axis_dims == other_dims):
                unmet.append(other)
            elif axis_dims == other_dims:
                self.unite(axis, other, call)
                axis, has_met = torch.where(axis == 0, other, axis), True
            elif axis_dims < other_dims:
                self.contain(axis, other, call)
                axis = other
            elif other_dims < axis_dims:
                self.contain(other, axis, call)
            else:  # channels of keys beside those of values, in each head
                self._share(original, other, call)
                unmet.append(other)
        return axis, unmet

    def _share(self, a: Tensor, b: Tensor, call: Where) -> None:
        """Record that the axes ``a`` and ``b`` change along some of their dimensions together, and along others each
        alone.

        One index of the common dimensions, a head say, goes with all units of both there.
        """
        common = sorted(varying(a) & varying(b))
        outer = [self._rows(axis, common) for axis in (a, b)]
        for outer_axis, axis in zip(outer, (a, b), strict=True):
            self.contain(outer_axis, axis, call)
        self.unite(outer[0], outer[1], call)

    def lie_beside(self, operands: Sequence[Axes]) -> None:
        """Record that weights are added (or combined in another way but a product) into one weight, element by element.

        An element of the result is sure to be 0 only if the elements of all operands are, so if one operand has gates
        on its columns, the others must have them too. ``operands``: the axes of each weight, all of one rank.
        """
        for i, axes in enumerate(operands):
            self.beside += [
                _pairs(a, b) for other in operands[:i] for a in axes for b in other if varying(a) == varying(b)
            ]

    def norm_of(self, factors: Iterable[Axes], dims: set[int], call: Where) -> None:
        """Record a norm of weights: a sum over ``dims`` of products of the elements of ``factors`` at one place.

        Args:
            factors: the axes of each factor, all of one rank.
            dims: the dimensions of the sum. Axes that change along other dimensions are left out.
            call: the operator.
        """
        lines: dict[frozenset[int], list[Ints]] = {}
        for axis in (axis for axes in factors for axis in axes if varying(axis) and varying(axis) <= dims):
            lines.setdefault(frozenset(varying(axis)), []).append(line(axis))
        self.normalised += [
            (factor_units, call.why("statistic", "a norm of the weight counts its channels"))
            for factor_units in lines.values()
        ]

    def reduce(self, axes: Axes, dims: set[int], keepdim: bool, kind: str, call: Where) -> Axes:
        """Record a reduction over ``dims``, and return the axes of its result.

        Args:
            axes: the axes of the tensor that is reduced.
            dims: the dimensions that are reduced, as numbers from 0 on.
            keepdim: whether these stay, with size 1.
            kind: what the reduction does: "weighed", a sum of products with a weight; "sum", a sum, to which units of
                zeros add nothing; "noted", a sum that :meth:`norm_of` has recorded; "statistic", such as a mean;
                "mixed", anything else.
            call: the operator.
        """
        out = []
        for axis in axes:
            reduced, kept = varying(axis) & dims, varying(axis) - dims
            if reduced and not kept:
                if kind == "statistic":
                    self.statistic(axis, call)
                elif kind == "mixed":
                    self.fix(axis, call.why("mixed", "its channels are mixed"))
                elif kind == "weighed":
                    self.read.append(line(axis))
                elif kind == "sum":
                    self.read.append(line(axis))
                    self.summed.append(line(axis))
                continue
            if reduced:
                outer = self._rows(axis, sorted(kept))
                self.contain(outer, axis, call)
                if kind not in ("sum", "weighed"):
                    self.unite(outer, axis, call)
                axis = outer
            out.append(axis)
        if keepdim or not out:
            return out
        kept_dims = [d for d in range(out[0].dim()) if d not in dims]
        return [axis.reshape([axis.shape[d] for d in kept_dims]) for axis in out]

    def _rows(self, axis: Tensor, stay: list[int]) -> Tensor:
        """Make an axis over the dimensions ``stay``, with one fresh unit for each distinct set of units that ``axis``
        has at one place of them.

        The dimensions of ``axis`` that are not in ``stay`` get size 1.
        """
        rows = axis.permute(*stay, *(d for d in range(axis.dim()) if d not in stay)).reshape(
            math.prod(axis.shape[d] for d in stay), -1
        )
        # rows with the same first and last unit and the same sum are taken for equal
        key = torch.stack((rows[:, 0], rows[:, -1], rows.sum(1)), 1)
        _, same = torch.unique(key, dim=0, return_inverse=True)
        units = self.fresh(int(same.max()) + 1)[same]
        return units.reshape([size if d in stay else 1 for d, size in enumerate(axis.shape)])

    def reshape(self, axes: Axes, old: Sequence[int], new: Sequence[int], call: Where) -> Axes:
        """Return the axes after a view of a tensor of shape ``old`` as one of shape ``new``.

        A view that breaks a dimension into several is recorded as a :class:`Split`.

        Args:
            axes: the axes of the tensor of shape ``old``.
            old, new: the shapes before and after the view.
            call: the operator.

        Returns: the axes of the view; [] for an empty tensor, whose units are fixed.
        """
        if 0 in old:
            self.fix(axes, call.why("mixed", "its tensor is empty"))
            return []
        out, regroupings = [], runs(old, new)
        for axis in axes:
            dims = varying(axis)
            # the view is done on the axis, at full size along the dimensions that it regroups with those of the axis
            regrouped = [(old_dims, new_dims) for old_dims, new_dims in regroupings if dims & set(old_dims)]
            sizes_before = [old[d] if any(d in old_dims for old_dims, _ in regrouped) else 1 for d in range(len(old))]
            sizes_after = [new[d] if any(d in new_dims for _, new_dims in regrouped) else 1 for d in range(len(new))]
            viewed = narrow(axis.expand(sizes_before).reshape(sizes_after))
            for old_dims, new_dims in regrouped:
                split_dims = [d for d in new_dims if viewed.shape[d] > 1]
                if len(split_dims) > 1 and [old[d] for d in old_dims if d in dims] != [new[d] for d in split_dims]:
                    self.splits.append(Split(viewed, split_dims))
            out.append(viewed)
        return moving(out)


def line(axis: Tensor) -> Ints:
    """Return the units of an axis in order, int64 (n,)."""
    return axis.reshape(-1).numpy()


def _pairs(a: Tensor, b: Tensor) -> Ints:
    """Return the pairs of different units at the same place of the axes ``a`` and ``b``, broadcast: int64 (2, n), unit
    of ``a`` first.

    Duplicates are removed where there are many pairs.
    """
    first, second = (side.reshape(-1) for side in np.broadcast_arrays(a.numpy(), b.numpy()))
    differ = first != second
    first, second = first[differ], second[differ]
    if len(first) <= _MANY:
        return np.stack((first, second))
    key = np.unique(first << _HALF | second)  # units are far fewer than 2^31
    return np.stack((key >> _HALF, key & ((1 << _HALF) - 1)))
