"""The partition of units into classes, solved from a ledger: what is one unit, which classes may be cut, and why others
must stay.

A ledger holds pairs of units that are one, and constraints. :class:`_Labels` gives every unit a label, at first its
own number, and lowers the labels of joined units to the least among them until nothing changes. Units with the same
label are a class.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from .axes import narrow, varying
from .ledger import Bools, Ints, Ledger, Piece, Product, Reason, Split, line

_HALF = 31  # a pair of units is packed into one int64, 31 bits each; there are far fewer than 2^31 units
_LOW = (1 << _HALF) - 1
_PASSES = 20  # most passes over the constraints; networks so far needed at most four

NOTHING_TO_CHOOSE = ("only", "unread")
"""Kinds of reasons why a class stays although a model without it would be correct."""


Origin = dict[str, list[tuple[int, int, int]]]  # tensor -> (dimension, first unit, size) of each dimension with units


class Member(NamedTuple):
    """The part of a class in one parameter or buffer: ``indices``, int64, of dimension ``dim``."""

    name: str
    dim: int
    indices: Ints


@dataclass
class Units:
    """The partition of a model's units into classes; a class is cut by deleting its indices from its members.

    Attributes:
        label: int64 (units,), the class of each unit.
        origin: name of a parameter or buffer -> (dimension, first unit, size) of each dimension longer than 1.
        alias: every name of a parameter or buffer -> its name in ``origin``, which lists a tied tensor once.
        free: the classes that may be cut, in increasing order.
        fixed: class -> why it must not be cut.
        statistics: class -> the statistic (a mean, say) that is computed over it; it may be cut if that statistic
            counts only open units.
        normalised: free class -> the norm of a weight that counts it because the weight reads it; it may be cut if the
            gates are on that weight.
        clusters: the free classes, grouped: classes with units in the same dimension, directly or through other
            classes, are in one cluster.
        read, written: bool (units,), whether a weight reads, or writes, each unit.
        reached: name -> the modes (``training``) in which an operator read the parameter.
        modes: the modes that were traced.
        failed: mode -> why it could not be traced.
        numbers: the arguments of elementwise operators that are not tensors, in the order of calls.
        columns: bool (units,), whether each unit belongs to a contracted dimension of a weight.
        summed: bool (units,), whether activations of each unit are added up without a weight.
        added: bool (units,), whether activations of each unit are added to others, as along a residual stream.
        products: the products on the first example inputs in evaluation, if that was traced.
        counted, normed, within, in_groups, pieces, elsewhere: as in the ledger; norms of weights have an empty name.
    """

    label: Ints
    origin: Origin
    alias: dict[str, str]
    free: list[int]
    fixed: dict[int, Reason]
    statistics: dict[int, Reason]
    clusters: list[list[int]]
    read: Bools
    written: Bools
    reached: dict[str, set[bool]]
    normalised: dict[int, Reason] = field(default_factory=dict)
    modes: tuple[bool, ...] = (False,)
    failed: dict[bool, str] = field(default_factory=dict)
    numbers: list[tuple[Any, ...]] = field(default_factory=list)
    columns: Bools = field(default_factory=lambda: np.zeros(0, bool))
    summed: Bools = field(default_factory=lambda: np.zeros(0, bool))
    added: Bools = field(default_factory=lambda: np.zeros(0, bool))
    products: list[Product] = field(default_factory=list)
    counted: list[tuple[str, Ints]] = field(default_factory=list)
    normed: list[tuple[str, Ints, int]] = field(default_factory=list)
    within: frozenset[str] = frozenset()
    in_groups: set[str] = field(default_factory=set)
    pieces: list[Piece] = field(default_factory=list)
    elsewhere: set[tuple[str, str]] = field(default_factory=set)

    @functools.cached_property
    def members(self) -> dict[int, list[Member]]:
        """class -> its members, one for each dimension of a parameter or buffer that has some of its units."""
        by_class: dict[int, list[Member]] = defaultdict(list)
        for name, dims in self.origin.items():
            for dim, first, size in dims:
                labels = self.label[first : first + size]
                order = np.argsort(labels, kind="stable")
                ordered = labels[order]
                starts = np.flatnonzero(np.r_[True, ordered[1:] > ordered[:-1]]).tolist()
                for class_id, start, end in zip(ordered[starts].tolist(), starts, [*starts[1:], size], strict=True):
                    by_class[class_id].append(Member(name, dim, order[start:end]))
        return dict(by_class)

    def places(self, classes: Iterable[int]) -> list[tuple[str, int]]:
        """Return (name, dimension) of the parameters and buffers that have units of ``classes``, in order, each
        once.
        """
        members, places = self.members, self._places
        rows = dict.fromkeys(
            places.get(class_id) or places.setdefault(class_id, _where(members[class_id])) for class_id in classes
        )
        return list(dict.fromkeys(place for row in rows for place in row))

    @functools.cached_property
    def _places(self) -> dict[int, tuple[tuple[str, int], ...]]:
        """A cache: class -> (name, dimension) of its members."""
        return {}

    def classes(self, name: str, dim: int) -> list[int]:
        """Return the class of each index of dimension ``dim`` of the parameter or buffer ``name``; [] for a dimension
        of size 1.

        Raises: KeyError if the model has no floating-point tensor of that name.
        """
        for at, first, size in self.origin[self.alias[name]]:
            if at == dim:
                labels: list[int] = self.label[first : first + size].tolist()
                return labels
        return []

    def first_unit(self, name: str, dim: int) -> int:
        """Return the first unit of dimension ``dim`` of the parameter or buffer ``name``; the units of a dimension are
        consecutive.

        Raises: KeyError for a dimension of size 1, which has no units.
        """
        for at, first, _ in self.origin[self.alias[name]]:
            if at == dim:
                return first
        raise KeyError(f"dimension {dim} of {name!r} has one index, which is no unit")

    def is_column(self, name: str, dim: int) -> bool:
        """Return whether a product sums over dimension ``dim`` of the parameter ``name``, as over the columns of a
        weight.
        """
        return self._any(self.columns, name, dim)

    def is_row(self, name: str, dim: int) -> bool:
        """Return whether the result of a product has a dimension for ``dim`` of the parameter ``name``, as for the rows
        of a weight.
        """
        return self._any(self.written, name, dim)

    def _any(self, marked: Bools, name: str, dim: int) -> bool:
        """Return whether a unit of dimension ``dim`` of ``name`` is marked in ``marked``, bool (units,)."""
        return any(marked[first : first + size].any() for at, first, size in self.origin[self.alias[name]] if at == dim)

    def why_not(self, name: str, dim: int) -> Reason | None:
        """Return why some index of dimension ``dim`` of the parameter ``name`` must not be cut, or may be cut only
        under a condition (:attr:`statistics`, :attr:`normalised`); None if all may be cut.

        If several indices have reasons, the reason of the lowest index is returned. Reasons of a kind in
        :data:`NOTHING_TO_CHOOSE` are returned only if there is no other.
        """
        reasons = [reason for class_id in self.classes(name, dim) if (reason := self.reason(class_id)) is not None]
        return next(
            (reason for reason in reasons if reason.kind not in NOTHING_TO_CHOOSE), reasons[0] if reasons else None
        )

    def reason(self, class_id: int) -> Reason | None:
        """Return why class ``class_id`` must not be cut, or only under conditions; None if it may be cut."""
        return self.fixed.get(class_id) or self.statistics.get(class_id) or self.normalised.get(class_id)

    def with_open_statistics(self, norms: Collection[str]) -> Units:
        """Return a copy in which classes are free whose statistics are all computed by ``norms``, the names of modules
        that count only open units.
        """
        counted_open, counted_otherwise = set[int](), set[int]()
        for name, units in self.counted:
            (counted_open if name and name in norms else counted_otherwise).update(self.label[units].tolist())
        opened = {
            class_id for class_id in self.statistics if class_id in counted_open and class_id not in counted_otherwise
        }
        free = sorted({*self.free, *opened})
        still_counted = {class_id: why for class_id, why in self.statistics.items() if class_id not in opened}
        return replace(self, free=free, statistics=still_counted, clusters=_clusters(self.origin, self.label, free))

    def in_training_alone(self) -> dict[int, str]:
        """Return class -> why it stays, for classes with units in a parameter that only training reads.

        Results are compared in evaluation, which would not show an error there.
        """
        return {
            class_id: f"{name!r}, which only training reaches, shares its width"
            for name, modes in self.reached.items()
            if modes == {True}
            for dim, _, _ in self.origin[name]
            for class_id in self.classes(name, dim)
        }

    @functools.cached_property
    def piece_numbers(self) -> set[tuple[str, str]]:
        """(module, attribute) of the numbers by which code takes parts of a dimension."""
        return {(module, attribute) for module, attribute, _ in self.pieces}

    @functools.cached_property
    def pieces_of(self) -> dict[int, tuple[int, ...]]:
        """class -> the numbers of the entries of :attr:`pieces` that it is in; classes in none are left out."""
        numbers: dict[int, tuple[int, ...]] = {}
        for number, (_, _, part) in enumerate(self.pieces):
            for class_id in set(self.label[part].tolist()):
                numbers[class_id] = (*numbers.get(class_id, ()), number)
        return numbers

    def among(self, classes: Iterable[int]) -> Bools:
        """Return whether the class of each unit is in ``classes``: bool, (units,)."""
        return _marked(len(self.label), [np.array(list(classes), np.int64)])[self.label]

    def indices(self, classes: Iterable[int]) -> dict[str, dict[int, list[int]]]:
        """Return what is cut with ``classes``: name of a tensor -> dimension -> indices in increasing order. Tensors
        and dimensions that lose nothing are left out.
        """
        cut = self.among(classes)
        gone: dict[str, dict[int, list[int]]] = defaultdict(dict)
        for name, dims in self.origin.items():
            for dim, first, size in dims:
                indices = np.flatnonzero(cut[first : first + size])
                if len(indices):
                    gone[name][dim] = indices.tolist()
        return dict(gone)


def solve(ledger: Ledger, modes: tuple[bool, ...] = (False,), failed: dict[bool, str] | None = None) -> Units:
    """Compute the partition that a ledger describes.

    Args:
        ledger: what the operators said.
        modes: the modes (``training``) in which the model was traced.
        failed: mode -> why a trace in it failed.
    """
    labels = _Labels(ledger)
    labels.settle()
    label = labels.label
    fixed = _of_classes(label, [*ledger.fixed, *labels.conflicts(), *_unlabelled(ledger), *_left_alone(ledger, label)])
    columns = _with_beside(_marked(ledger.count, ledger.columns), _concatenated(ledger.beside))
    # norms of weights: (units of the first factor, whether some factor reads each of these places, why)
    sums = [(lines[0], np.any([columns[units] for units in lines], 0), why) for lines, why in ledger.normalised]
    statistics = _of_classes(label, [*ledger.statistics, *((units[~read], why) for units, read, why in sums)])
    normalised = _of_classes(label, [(units[read], why) for units, read, why in sums])
    lines = [label[first : first + size] for *_, first, size in _dimensions(ledger.origin)]
    classes = np.unique(np.concatenate([np.zeros(0, np.int64), *lines]))
    read, written = _marked(ledger.count, ledger.read), _marked(ledger.count, ledger.written)
    unread = Reason("unread", "no weight reads it")
    for class_id in np.setdiff1d(classes, label[read]).tolist():
        fixed.setdefault(class_id, unread)
    all_classes = classes.tolist()
    free = [class_id for class_id in all_classes if class_id not in fixed and class_id not in statistics]
    return Units(
        label=label,
        origin=ledger.origin,
        alias=ledger.alias,
        free=free,
        fixed={class_id: fixed[class_id] for class_id in all_classes if class_id in fixed},
        statistics={
            class_id: statistics[class_id]
            for class_id in all_classes
            if class_id in statistics and class_id not in fixed
        },
        clusters=_clusters(ledger.origin, label, free),
        read=read,
        written=written,
        normalised={class_id: normalised[class_id] for class_id in free if class_id in normalised},
        reached=ledger.reached,
        modes=modes,
        failed=failed or {},
        numbers=ledger.numbers,
        columns=columns,
        summed=_marked(ledger.count, ledger.summed),
        added=_marked(ledger.count, ledger.added),
        products=[_factored(product, label) for product in ledger.products],
        counted=[*ledger.counted, *(("", units[~read]) for units, read, _ in sums)],
        normed=ledger.normed,
        within=ledger.within,
        in_groups=ledger.in_groups,
        pieces=ledger.pieces,
        elsewhere=set(ledger.elsewhere),
    )


def _factored(product: Product, label: Ints) -> Product:
    """Return a product with factors in place of axes that overlap.

    Dimensions along which an axis has the same classes do not count, and of axes that then are the same (keys and
    values, of which whole heads may go) one does.

    Args:
        product: the product, as a rule recorded it.
        label: int64 (units,), the class of each unit.
    """
    factors: dict[tuple[torch.Size, bytes], Ints] = {}
    for axis in product.overlapping:
        for dim in varying(axis):
            first = axis.narrow(dim, 0, 1)
            if (label[axis.numpy()] == label[first.numpy()]).all():
                axis = first
        factors.setdefault((axis.shape, label[axis.numpy()].tobytes()), line(axis))
    return replace(product, factors=[*product.factors, *factors.values()], overlapping=[])


def joined(label: Ints, pairs: Ints) -> Ints:
    """Return the labels after the two units of each pair have become one class, labelled by its least unit.

    Args:
        label: int64 (units,), the class of each unit.
        pairs: int64 (2, n), pairs of units. Unit 0 stands for "no unit" and joins nothing.

    Returns: int64 (units,), the class of each unit; ``label`` is not changed.
    """
    a, b = pairs[:, (pairs > 0).all(0)]
    while True:
        x, y = label[a], label[b]
        differ = x != y
        if not differ.any():
            return label
        a, b, x, y = a[differ], b[differ], x[differ], y[differ]
        label = label.copy()
        least = np.minimum(x, y)
        np.minimum.at(label, x, least)
        np.minimum.at(label, y, least)
        while ((shorter := label[label]) != label).any():
            label = shorter


class _Labels:
    """Label propagation over the constraints of a ledger.

    Attributes:
        label: int64 (units,), the class of each unit as far as it is known. The label of a class is its least unit.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.label: Ints = np.arange(ledger.count)
        self._splits = ledger.splits
        self._why = [why for _, why in ledger.blocks]
        self._join(_concatenated([pairs for pairs, _ in ledger.unions]))
        # the pairs (outer, inner) of all blocks, one block after the other, sorted by the outer unit in each
        keys = [_keys(*pairs[:, (pairs > 0).all(0)]) for pairs, _ in ledger.blocks]
        packed = np.concatenate(keys) if keys else np.zeros(0, np.int64)
        self._block = np.repeat(np.arange(len(keys)), [len(block_keys) for block_keys in keys])
        self._outer, self._inner = packed >> _HALF, packed & _LOW
        new = (self._outer[1:] != self._outer[:-1]) | (self._block[1:] != self._block[:-1])
        # where the pairs of each outer unit of each block begin
        self._starts = np.flatnonzero(np.r_[True, new]) if len(self._outer) else np.zeros(0, np.int64)

    def settle(self) -> None:
        """Join the classes that views (splits) and blocks force together, until nothing changes."""
        for _ in range(_PASSES):
            before = self.label.copy()
            runs_along = self._runs_along()
            for split in self._splits:
                self._settle_split(split, runs_along)
            outer, low, high = self._block_ends()
            self._join(np.stack((outer[low == high], low[low == high])))
            if (self.label == before).all():
                return

    def conflicts(self) -> list[tuple[Ints, Reason]]:
        """Return the outer units that run along units of several classes, and why they stay: no class fits all of
        these.
        """
        outer, low, high = self._block_ends()
        blocks = self._block[self._starts]
        return [(outer[at : at + 1], self._why[blocks[at]]) for at in np.flatnonzero(low != high)]

    def _join(self, pairs: Ints) -> None:
        """Join the units of each pair, int64 (2, n)."""
        self.label = joined(self.label, pairs)

    def _block_ends(self) -> tuple[Ints, Ints, Ints]:
        """Return, for each outer unit of each block, the least and the greatest class of the inner units that it runs
        along.

        Both are the same if the outer unit runs along one class alone.

        Returns: (outer units, least classes, greatest classes), int64 arrays of one length.
        """
        if not len(self._outer):
            return self._outer, self._outer, self._outer
        inner = self.label[self._inner]
        return (
            self._outer[self._starts],
            np.minimum.reduceat(inner, self._starts),
            np.maximum.reduceat(inner, self._starts),
        )

    def _runs_along(self) -> _Blocks:
        """Return a lookup from the class of an inner unit to the classes of the outer units that run along it."""
        return _Blocks(_keys(self.label[self._inner], self.label[self._outer]) if self._splits else self._inner[:0])

    def _settle_split(self, split: Split, runs_along: _Blocks) -> None:
        """Decide along which dimension a view that splits an axis may be cut, and join the units along the others.

        The dimension is the one along which blocks differ (the heads of attention scores), or else the last.

        Args:
            split: the view.
            runs_along: which classes of outer units run along which classes of inner ones.
        """
        axis = narrow(torch.from_numpy(self.label)[split.axis])
        dims = [d for d in split.dims if axis.shape[d] > 1]
        if len(dims) < 2:
            return
        marked = [d for d in dims if _has_blocks(axis, d, dims, runs_along)]
        chosen = marked[0] if marked else dims[-1]
        for dim in dims:
            if dim != chosen:
                a, b = torch.broadcast_tensors(axis, axis.narrow(dim, 0, 1))
                self._join(np.stack((a.reshape(-1).numpy(), b.reshape(-1).numpy())))


class _Blocks:
    """Lookup from an inner class to the outer classes that run along it, in sorted packed pairs (inner, outer)."""

    def __init__(self, keys: Ints) -> None:
        self._keys = keys

    def of(self, inner_class: int) -> set[int]:
        """Return the outer classes that run along the class ``inner_class``."""
        start, end = np.searchsorted(self._keys, [inner_class << _HALF, (inner_class + 1) << _HALF])
        return set((self._keys[start:end] & _LOW).tolist())


def _keys(first: Ints, second: Ints) -> Ints:
    """Return the distinct pairs (first, second) of two arrays, each packed into one int64 (first in the high bits),
    sorted.
    """
    return np.unique(first << _HALF | second)


def _has_blocks(axis: torch.Tensor, dim: int, dims: Sequence[int], runs_along: _Blocks) -> bool:
    """Return whether some unit runs along all of index 0 of ``dim`` but not along its last index.

    Args:
        axis: int64, the classes along the dimensions of a tensor.
        dim: the dimension in question, one of ``dims``.
        dims: the dimensions into which a view split one dimension.
        runs_along: which outer classes run along which inner ones.
    """
    # the first and the last place at index 0 of ``dim``, and the first place at its last index
    start, end, beyond = ([0] * axis.dim() for _ in range(3))
    for other in dims:
        end[other] = 0 if other == dim else axis.shape[other] - 1
    beyond[dim] = axis.shape[dim] - 1
    first, last, past = (runs_along.of(int(axis[tuple(at)])) for at in (start, end, beyond))
    return bool((first & last) - past)


def _where(members: list[Member]) -> tuple[tuple[str, int], ...]:
    """Return (name, dimension) of each member."""
    return tuple((m.name, m.dim) for m in members)


def _concatenated(parts: list[Ints]) -> Ints:
    """Return arrays of pairs, (2, n) each, as one array."""
    return np.concatenate(parts, 1) if parts else np.zeros((2, 0), np.int64)


def _marked(count: int, parts: Iterable[Ints]) -> Bools:
    """Return whether each of ``count`` units, or classes, is in some part: bool, (count,). Unit 0 ("no unit")
    never is.
    """
    marked = np.zeros(count, bool)
    for units in parts:
        marked[units] = True
    marked[:1] = False
    return marked


def _with_beside(columns: Bools, pairs: Ints) -> Bools:
    """Extend ``columns`` to the units of weights that are added to weights with columns.

    Args:
        columns: bool (units,), whether each unit belongs to a contracted dimension of a weight.
        pairs: int64 (2, n), units at the same place of two weights that are added.

    Returns: bool (units,).
    """
    while True:
        more = _marked(len(columns), [pairs[:, columns[pairs].any(0)].reshape(-1)]) | columns
        if (more == columns).all():
            return columns
        columns = more


def _unlabelled(ledger: Ledger) -> list[tuple[Ints, Reason]]:
    """Return the units that meet an element without a unit, and why they stay."""
    reasons = []
    for pairs, why in ledger.unions:
        lone = pairs[:, (pairs == 0).any(0)].max(0) if pairs.shape[1] else pairs[0]
        if len(lone):
            reasons.append((lone, why))
    return reasons


def _of_classes(label: Ints, unit_reasons: Iterable[tuple[Ints, Reason]]) -> dict[int, Reason]:
    """Return the first reason for each class, from reasons for units.

    Args:
        label: int64 (units,), the class of each unit.
        unit_reasons: (units, why they must stay).
    """
    reasons: dict[int, Reason] = {}
    for units, why in unit_reasons:
        for class_id in np.unique(label[units]).tolist():
            reasons.setdefault(class_id, why)
    reasons.pop(0, None)
    return reasons


def _dimensions(origin: Origin) -> list[tuple[str, int, int, int]]:
    """Return (name, dimension, first unit, size) of every dimension with units."""
    return [(name, *entry) for name, entries in origin.items() for entry in entries]


def _left_alone(ledger: Ledger, label: Ints) -> Iterator[tuple[Ints, Reason]]:
    """Yield the units that stay, and why: those of tensors that no run read, and those of dimensions that are one unit.

    Args:
        ledger: the ledger.
        label: int64 (units,), the class of each unit.
    """
    for name, dim, first, size in _dimensions(ledger.origin):
        units = np.arange(first, first + size)
        if name not in ledger.reached:
            yield units, Reason("unreached", f"the example inputs do not reach {name!r}, in evaluation or in training")
        if (label[first : first + size] == label[first]).all():
            yield units, Reason("only", f"dimension {dim} of {name!r} is one unit")


def _clusters(origin: Origin, label: Ints, free: list[int]) -> list[list[int]]:
    """Group the free classes. Two classes are in one cluster if they have units in the same dimension of a tensor, or
    if a chain of such pairs connects them.

    Args:
        origin: as in :class:`Units`.
        label: int64 (units,), the class of each unit.
        free: the classes to group.

    Returns: the clusters, each a list of classes.
    """
    parent: Ints = np.arange(len(label))
    chains = [np.unique(label[first : first + size]) for *_, first, size in _dimensions(origin)]
    pairs = [np.stack((chain[1:], chain[:-1])) for chain in chains]
    parent = joined(parent, np.concatenate(pairs, 1)) if pairs else parent
    together: dict[int, list[int]] = defaultdict(list)
    for class_id in free:
        together[int(parent[class_id])].append(class_id)
    return list(together.values())
