"""What the operators of a model say about its units: the record that rules write and :mod:`.partition` solves."""

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

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
_MANY = 4096  # pairs of which doubles are left out
_HALF = 31  # bits for each unit of a pair in one number


@dataclass(frozen=True)
class Reason:
    """Why units stay, or what a width is a statistic of.

    Attributes:
        kind: "output", "mixed", "statistic", "constants", "picked", "opaque", "split", "unread", "unreached" or "only"
            (nothing is left to choose along a dimension).
        text: in words.
        operator, module, line: of the operator that says so, where one does; the line is of the code outside of torch
            that ran it.
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
    """The axes of one tensor. ``weight``: it is a parameter or a buffer, or made of these alone."""

    axes: Axes
    weight: bool = False


class Where(Protocol):
    """The operator call that writes into the ledger."""

    def why(self, kind: str, text: str) -> Reason:
        """A reason that names the operator, its module and the line that ran it."""

    def module_name(self) -> str:
        """The name of the module that runs it."""


@dataclass(frozen=True)
class Split:
    """A view broke a dimension into the dimensions ``dims`` of ``axis``;
    along which of these units may go is seen when all is known.
    """

    axis: Tensor
    dims: list[int]


@dataclass(frozen=True)
class Product:
    """Multiply-accumulates of one call: ``macs`` with every unit there, in proportion to the units that are left of
    each of ``factors``.

    ``module``: the name of the module that ran it.
    """

    module: str
    macs: int
    factors: list[Ints]


@dataclass
class Ledger:
    """Units of a model's floating-point parameters and buffers, an integer from 1 on for each index of each dimension
    longer than 1.

    Attributes:
        origin: name of a parameter or buffer -> (dimension, first unit, size) of each dimension with units; tied ones
            once.
        alias: every name -> the name in ``origin``.
        known: id of a tensor -> (tensor, name, marks).
        unions: pairs of units that are one, (2, n), and why they met.
        blocks: (outer, inner) pairs of one meeting in which an outer unit runs along several inner ones, and why.
        fixed, statistics: units, and the reason.
        read, written: units that a weight's contracted dimension has, and that the other dimensions of weights, biases
            and norms have.
        reached: name -> the modes (training or not) in which an operator read it.
        numbers: (operator, what it was given beside tensors) of every elementwise call, in order.
        columns: units of the contracted dimensions of weights themselves, also in ``read``.
        beside: pairs of units of weights that are added up, or the like, before a product reads them: where one is a
            column both are.
        normalised: sums over weights alone, each the units of its factors in the same places, and the reason: harmless
            where gates are on a factor that also reads these units, for zeros there count as if they were not there.
        summed: units of activations that are added up by no weight (a sum over channels, a product of two activations).
        products: every product that a FLOP counter counts.
        within: weights of convolutions in groups, by name, of which every group loses as many channels and none goes as
            a whole.
        in_groups: the weights of convolutions in groups of several channels.
        counted: of every statistic over units the name of the module that computes it, and the units in order.
        normed: of every norm over groups of channels, or with each for itself, the name of its module, the units of
            all, how many groups.
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
    count: int = 1

    @classmethod
    def of(cls, model: nn.Module, within: Iterable[str] = ()) -> Ledger:
        """Fresh units for every parameter and buffer of ``model``."""
        ledger = cls(within=frozenset(within))
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        for name, tensor in named:
            if id(tensor) in ledger.known:
                ledger.alias[name] = ledger.known[id(tensor)][1]
            elif tensor.is_floating_point() or tensor.is_complex():
                ledger.alias[name] = name
                ledger.known[id(tensor)] = tensor, name, Marks(ledger._label(name, tensor), weight=True)
        return ledger

    def _label(self, name: str, tensor: Tensor) -> Axes:
        axes, self.origin[name] = [], []
        for dim, size in enumerate(tensor.shape):
            if size > 1:
                self.origin[name].append((dim, self.count, size))
                axes.append(self.fresh(*(size if at == dim else 1 for at in range(tensor.dim()))))
        return axes

    def fresh(self, *shape: int) -> Tensor:
        """New units in an axis of this shape."""
        first, self.count = self.count, self.count + math.prod(shape)
        return torch.arange(first, self.count).reshape(shape)

    def checkpoint(self) -> tuple[list[int], dict[str, set[bool]]]:
        """How much has been written, for :meth:`back_to`."""
        return [len(part) for part in self._parts()], {name: set(modes) for name, modes in self.reached.items()}

    def back_to(self, mark: tuple[list[int], dict[str, set[bool]]]) -> None:
        """Forget what was written since a checkpoint: a run that failed says nothing."""
        for part, length in zip(self._parts(), mark[0], strict=True):
            del part[length:]
        self.reached = mark[1]

    def _parts(self) -> list[list[Any]]:
        own = self.unions, self.blocks, self.fixed, self.statistics, self.splits, self.read, self.written
        return [
            *own,
            self.normalised,
            self.numbers,
            self.columns,
            self.summed,
            self.products,
            self.normed,
            self.counted,
            self.beside,
        ]

    # what rules say
    # ----------------------------------------------------------------------------------------------------------------
    def unite(self, a: Tensor, b: Tensor, call: Where) -> None:
        """Units at the same place of two axes, broadcast, are one unit."""
        self.unions.append((_pairs(a, b), call.why("constants", "its channels meet elements that belong to no layer")))

    def contain(self, outer: Tensor, inner: Tensor, call: Where) -> None:
        """Each unit of ``outer`` runs along several of ``inner``, and goes when all of those of this meeting go."""
        self.blocks.append(
            (_pairs(outer, inner), call.why("mixed", "several families of channels have one unit between them"))
        )

    def fix(self, axes: Tensor | Iterable[Tensor], why: Reason) -> None:
        """Nothing of these may go."""
        for axis in [axes] if isinstance(axes, Tensor) else axes:
            self.fixed.append((line(axis), why))

    def statistic(self, axis: Tensor, call: Where) -> None:
        """These may go only where what computes the statistic counts open units."""
        self.statistics.append((line(axis), call.why("statistic", "a statistic is computed over its channels")))
        self.counted.append((call.module_name(), line(axis)))

    # what rules have in common
    # ----------------------------------------------------------------------------------------------------------
    def meet(self, shape: Sequence[int], operands: Sequence[tuple[Marks, Sequence[int]]], call: Where) -> Axes:
        """The axes of an elementwise result of this shape, from the marks and shapes of what meets there, each
        broadcast to it.

        Axes of one operand never meet each other. An operand that is broadcast is not united with what varies there.
        """
        rank = len(shape)
        padded = [
            ([at_rank(a, rank) for a in marks.axes], (1,) * (rank - len(size)) + tuple(size))
            for marks, size in operands
        ]
        out: Axes = []
        for axes, _ in padded:
            others, own = out, []
            for axis in moving(axes):
                axis, others = self._among(axis, others, call)
                own.append(axis)
            out = others + own
        for at, (axes, _) in enumerate(padded):
            for axis in moving(axes):
                dims = varying(axis)
                for other, (theirs, size) in enumerate(padded):
                    if other != at and all(size[d] > 1 for d in dims) and not any(varying(b) & dims for b in theirs):
                        self.fix(axis, call.why("constants", "its channels meet data that has no channels of its own"))
        return out

    def _among(self, axis: Tensor, others: Axes, call: Where) -> tuple[Tensor, Axes]:
        """What an axis becomes beside those of other operands, and which of these are left."""
        rest, met, own = [], False, axis
        for other in others:
            dims, theirs = varying(axis), varying(other)
            if not dims & theirs or (met and dims == theirs):
                rest.append(other)
            elif dims == theirs:
                self.unite(axis, other, call)
                axis, met = torch.where(axis == 0, other, axis), True
            elif dims < theirs:
                self.contain(axis, other, call)
                axis = other
            elif theirs < dims:
                self.contain(other, axis, call)
            else:
                self.fix([own, other], call.why("mixed", "two families of channels share part of a dimension"))
        return axis, rest

    def lie_beside(self, operands: Sequence[Axes]) -> None:
        """Elements of weights at one place make one element of a weight, which is 0 where all of them are."""
        for i, axes in enumerate(operands):
            self.beside += [
                _pairs(a, b) for other in operands[:i] for a in axes for b in other if varying(a) == varying(b)
            ]

    def norm_of(self, factors: Iterable[Axes], dims: set[int], call: Where) -> None:
        """Weights alone are added up over ``dims``, each product of the elements of ``factors`` at one place."""
        lines: dict[frozenset[int], list[Ints]] = {}
        for axis in (axis for axes in factors for axis in axes if varying(axis) and varying(axis) <= dims):
            lines.setdefault(frozenset(varying(axis)), []).append(line(axis))
        self.normalised += [
            (own, call.why("statistic", "a norm of the weight counts its channels")) for own in lines.values()
        ]

    def reduce(self, axes: Axes, dims: set[int], keepdim: bool, kind: str, call: Where) -> Axes:
        """The axes after a reduction over ``dims``.

        ``kind``: "weighed", a sum to which each unit adds what a weight makes of it; "sum", to which units of zeros add
        nothing; "noted", a sum that :meth:`norm_of` has noted; "statistic", such as a mean; "mixed", everything else.
        """
        out = []
        for axis in axes:
            gone, stay = varying(axis) & dims, varying(axis) - dims
            if gone and not stay:
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
            if gone:
                outer = self._rows(axis, sorted(stay))
                self.contain(outer, axis, call)
                if kind not in ("sum", "weighed"):
                    self.unite(outer, axis, call)
                axis = outer
            out.append(axis)
        if keepdim or not out:
            return out
        left = [d for d in range(out[0].dim()) if d not in dims]
        return [axis.reshape([axis.shape[d] for d in left]) for axis in out]

    def _rows(self, axis: Tensor, stay: list[int]) -> Tensor:
        """A fresh unit for each set of units that an axis has at one place of the dimensions ``stay``."""
        rows = axis.permute(*stay, *(d for d in range(axis.dim()) if d not in stay)).reshape(
            math.prod(axis.shape[d] for d in stay), -1
        )
        key = torch.stack((rows[:, 0], rows[:, -1], rows.sum(1)), 1)
        _, same = torch.unique(key, dim=0, return_inverse=True)
        units = self.fresh(int(same.max()) + 1)[same]
        return units.reshape([size if d in stay else 1 for d, size in enumerate(axis.shape)])

    def reshape(self, axes: Axes, old: Sequence[int], new: Sequence[int], call: Where) -> Axes:
        """The axes after a view of shape ``old`` as ``new``; what breaks a dimension into several is kept for later."""
        if 0 in old:
            self.fix(axes, call.why("mixed", "its tensor is empty"))
            return []
        out, groups = [], runs(old, new)
        for axis in axes:
            dims = varying(axis)
            hit = [(olds, news) for olds, news in groups if dims & set(olds)]
            full = [old[d] if any(d in olds for olds, _ in hit) else 1 for d in range(len(old))]
            sizes = [new[d] if any(d in news for _, news in hit) else 1 for d in range(len(new))]
            viewed = narrow(axis.expand(full).reshape(sizes))
            for olds, news in hit:
                vary = [d for d in news if viewed.shape[d] > 1]
                if len(vary) > 1 and [old[d] for d in olds if d in dims] != [new[d] for d in vary]:
                    self.splits.append(Split(viewed, vary))
            out.append(viewed)
        return moving(out)


def line(axis: Tensor) -> Ints:
    """The units of an axis in order, as the ledger keeps them."""
    return axis.reshape(-1).numpy()


def _pairs(a: Tensor, b: Tensor) -> Ints:
    """The different pairs of units at the same place, (2, n)."""
    left, right = (side.reshape(-1) for side in np.broadcast_arrays(a.numpy(), b.numpy()))
    differ = left != right
    left, right = left[differ], right[differ]
    if len(left) <= _MANY:
        return np.stack((left, right))
    key = np.unique(left << _HALF | right)  # units are far fewer than 2^31
    return np.stack((key >> _HALF, key & ((1 << _HALF) - 1)))
