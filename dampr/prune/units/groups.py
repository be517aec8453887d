"""Which classes can have gates on the parameters that read them, and which of these share one vector of gates.

A class is an integer that stands for units (indices of dimensions of parameters and buffers) which can be cut only
together; ``label[unit]`` is the class of a unit. A closed gate zeroes the columns that read its class. That has an
effect only if all readers of the class are parameters with gates (:func:`readable`). Classes that sit in the same
dimensions of the same parameters get one vector with a gate for each (:func:`groups`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np

from .ledger import Ints
from .partition import Units

Place = tuple[str, int]  # the name of a parameter, and one of its dimensions


@dataclass
class Group:
    """Classes that have equally many indices in the same dimensions of the same parameters: one vector, a gate for each
    class.

    Attributes:
        classes: the classes, in the order of their first units.
        columns: (parameter, dimension) that reads some of them -> int64, one entry for each index of that dimension:
            the place in ``classes`` of the class that the index belongs to, or -1 for none of these.
    """

    classes: list[int]
    columns: dict[Place, Ints]


def readable(units: Units, parameters: Iterable[str]) -> list[int]:
    """Return the classes that may be cut and that are read by dimensions of ``parameters`` alone.

    If these dimensions are zeroed for such a class, it has no effect on the output.

    Args:
        units: the partition of the model's units into classes.
        parameters: the names of the parameters that may have gates.

    Returns: the classes, in increasing order.
    """
    known = set(parameters)
    elsewhere = np.zeros(len(units.label), bool)  # classes that something else reads too
    elsewhere[units.label[units.summed]] = True
    read = np.zeros(len(units.label), bool)
    for name, dims in units.origin.items():
        for _, first, size in dims:
            span = slice(first, first + size)
            (read if name in known else elsewhere)[units.label[span][units.columns[span]]] = True
    return [class_id for class_id in units.free if read[class_id] and not elsewhere[class_id]]


def groups(units: Units, classes: Iterable[int]) -> list[Group]:
    """Group ``classes``: those that have equally many indices in the same dimensions of the same parameters share a
    vector of gates.

    Args:
        units: the partition of the model's units into classes.
        classes: the classes that are to have gates.

    Returns: a :class:`Group` for each vector, in the order of their first classes. A class that would be alone in its
    vector is left out.
    """
    kinds = _kinds(units)
    alike: dict[int, list[int]] = defaultdict(list)
    for class_id in classes:
        alike[int(kinds[class_id])].append(class_id)
    sizes = {(name, dim): size for name, dims in units.origin.items() for dim, _, size in dims}
    result = []
    for group_classes in alike.values():
        if len(group_classes) < 2:
            continue
        group_classes = sorted(group_classes)
        # all classes of a group lie in the same dimensions, so those of its first class are those of all
        places = [(member.name, member.dim) for member in units.members[group_classes[0]]]
        number = np.full(len(units.label), -1)  # class -> its place in the group; -1 for classes of other groups
        number[group_classes] = np.arange(len(group_classes))
        columns: dict[Place, Ints] = {}
        for name, dim in places:
            first = units.first_unit(name, dim)
            span = slice(first, first + sizes[name, dim])
            gates = np.where(units.columns[span], number[units.label[span]], -1)
            if (gates >= 0).any():
                columns[name, dim] = gates
        result.append(Group(group_classes, columns))
    return result


def _kinds(units: Units) -> Ints:
    """Number the classes so that two have the same number if they have equally many indices in the same dimensions.

    Returns: int64 (largest class + 1,), the number of each class.
    """
    kinds: Ints = np.zeros(int(units.label.max(initial=0)) + 1, np.int64)
    used = 1
    for dims in units.origin.values():
        for _, first, size in dims:
            classes, counts = np.unique(units.label[first : first + size], return_counts=True)
            # classes that were of one kind stay so if they have equally many indices here
            pairs, told_apart = np.unique(np.stack((kinds[classes], counts)), axis=1, return_inverse=True)
            kinds[classes] = used + told_apart.reshape(-1)
            used += pairs.shape[1]
    return kinds


def share_of_macs(units: Units, classes: Iterable[int], modules: Collection[str] = ()) -> float:
    """Return how much of the model's work gates on ``classes`` can reach, as a share (0 to 1) of its
    multiply-accumulates.

    A product (a matrix product or convolution) counts in full if a dimension of it has an index of ``classes``, or if
    it runs in one of ``modules`` or inside one.

    Args:
        units: the partition of the model's units into classes.
        classes: the classes with gates.
        modules: names of modules whose products count in any case.

    Returns: the share; 0 for a model without products.
    """
    cut = units.among(classes)
    total = sum(product.macs for product in units.products)
    reached = sum(
        product.macs
        for product in units.products
        if is_inside(product.module, modules) or any(cut[factor].any() for factor in product.factors)
    )
    return reached / total if total else 0.0


def is_inside(name: str, names: Iterable[str]) -> bool:
    """Return whether the module called ``name`` is one of the modules called ``names``, or inside one of them."""
    return any(name == outer or name.startswith(f"{outer}.") for outer in names)


def left_at_half(units: Units, classes: Iterable[int]) -> float:
    """Return the share (0 to 1) of the model's multiply-accumulates that is left if half of ``classes`` are cut.

    It is assumed that each dimension of a product loses half of its indices that belong to ``classes``.

    Args:
        units: the partition of the model's units into classes.
        classes: the classes of which half are cut.

    Returns: the share; 1 for a model without products.
    """
    cut = units.among(classes)
    total = sum(product.macs for product in units.products)
    remaining = sum(
        product.macs * math.prod(1 - float(cut[factor].mean()) / 2 for factor in product.factors)
        for product in units.products
    )
    return remaining / total if total else 1.0
