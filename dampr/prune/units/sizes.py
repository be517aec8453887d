"""Numbers that code keeps beside its parameters (``num_heads``, ``all_head_size``): which of them follow a width, and
their new values.

A place is a dimension of a parameter or buffer, (name, dimension). Each of its indices is a unit, and a class is an
integer that stands for units which can be cut only together; ``label[unit]`` is the class of a unit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import nn

from ..layers.registry import kind_of
from .ledger import Ints
from .numbers import numbers, set_number
from .partition import Units

_NO_WIDTHS = (
    "stride",
    "kernel",
    "depth",
    "layers",
    "blocks",
    "padding",
    "dilation",
    "window",
    "patch",
    "steps",
    "in_chans",
)
Numbers = dict[str, dict[str, int]]  # module -> attribute -> value
_PARTS = (2, 3)  # a parameter may hold query, key and value one after the other, or two halves of a gated layer


class Size(NamedTuple):
    """An attribute of a module whose value is proportional to the size of a dimension of a parameter or buffer.

    Attributes:
        module: the name of the module.
        attribute: the name of the attribute; "shape.0" is the first number of the tuple ``shape``.
        parameter, dim: the name of the parameter or buffer, and the dimension.
        before: the value of the attribute in the whole model.
        width: the size of the dimension in the whole model, or of the part of it that counts.
        start: where this part begins.
    """

    module: str
    attribute: str
    parameter: str
    dim: int
    before: int
    width: int
    start: int = 0

    def after(self, gone: Iterable[int]) -> int:
        """Return the value of the attribute when the indices ``gone`` of the dimension are cut."""
        lost = sum(self.start <= index < self.start + self.width for index in gone)
        return self.before * (self.width - lost) // self.width


def followers(model: nn.Module, units: Units, classes: Iterable[int]) -> list[Size]:
    """Guess the attributes that have to change when ``classes`` are cut.

    An attribute is found if code takes a part of a dimension by it, or if it is a whole number of a module that is no
    ``torch.nn`` layer, and equals the size of a dimension that loses some of ``classes``, half or a third of that size,
    or the number of classes in the dimension. The caller has to check that the model still runs and computes the same.

    Args:
        model: the whole model; not changed.
        units: its partition into classes.
        classes: the classes that are to be cut.

    Returns: the guesses; those from parts that code takes come first, those of norms without parameters last.
    """
    cut = set(classes)
    pieces = {(size.module, size.attribute): size for size in reversed(list(_of_pieces(units, cut)))}
    widths = {(member.name, member.dim) for class_id in cut for member in units.members[class_id]}
    sizes = {(name, dim): size for name, dims in units.origin.items() for dim, _, size in dims if (name, dim) in widths}
    counts = {place: len(set(units.classes(*place))) for place in sizes}
    guesses = []
    for name, module in model.named_modules():
        if kind_of(module).follows:
            continue
        prefix = f"{name}." if name else ""
        candidates = sorted(
            (place for place in sizes if place[0].startswith(prefix)), key=lambda place: place[0].count(".")
        )
        for attribute, value in numbers(module):
            if value < 2 or any(word in attribute for word in _NO_WIDTHS):
                continue
            place = next(_matches(value, candidates, sizes, counts), None)
            if place is not None and (name, attribute) not in {*pieces, *units.elsewhere}:
                guesses.append(Size(name, attribute, *place, value, sizes[place]))
    return [*pieces.values(), *guesses, *_of_norms(model, units, sizes)]


def _of_pieces(units: Units, cut: set[int]) -> Iterator[Size]:
    """Yield the attributes by which code takes a part of a dimension that loses some of the classes ``cut``.

    An attribute that stands for other numbers too cannot follow, and is left out.
    """
    labels: dict[tuple[str, str], set[tuple[int, ...]]] = {}
    for module, attribute, piece in units.pieces:
        labels.setdefault((module, attribute), set()).add(tuple(units.label[piece].tolist()))
    for module, attribute, piece in units.pieces:
        several = len(labels[module, attribute]) > 1 or (module, attribute) in units.elsewhere
        if several or cut.isdisjoint(units.label[piece].tolist()):
            continue
        place = _place(units, piece)
        if place is not None:
            yield Size(module, attribute, *place[:2], len(piece), len(piece), place[2])


def _place(units: Units, piece: Ints) -> tuple[str, int, int] | None:
    """Find where the units of ``piece``, in this order, stand side by side in a parameter or buffer. Units of the same
    class count as equal.

    Args:
        units: the partition of the model's units into classes.
        piece: int64 (n,), units in order.

    Returns: (parameter or buffer, dimension, index of the first unit); None if they stand side by side nowhere.
    """
    labels = units.label[piece]
    for name, dims in units.origin.items():
        for dim, first, size in dims:
            dim_labels = units.label[first : first + size]
            for start in (dim_labels == labels[0]).nonzero()[0].tolist() if size >= len(piece) else ():
                end = start + len(piece)
                if end <= size and (dim_labels[start:end] == labels).all():
                    return name, dim, start
    return None


def _of_norms(model: nn.Module, units: Units, sizes: dict[tuple[str, int], int]) -> Iterator[Size]:
    """Yield the attributes of norms without parameters that hold the number of their channels or groups.

    A norm that is applied to several widths is left out, because these may lose different numbers of channels.

    Args:
        model: the whole model.
        units: its partition into classes.
        sizes: (name, dimension) -> size, of the dimensions that lose some classes.
    """
    seen: dict[str, list[tuple[list[int], int]]] = {}  # norm -> (classes, number of groups) of each of its widths
    for name, normed, groups in (*units.normed, *((name, normed, 0) for name, normed in units.counted if name)):
        entry = units.label[normed].tolist(), groups
        if entry not in seen.setdefault(name, []):
            seen[name].append(entry)
    places = {tuple(units.classes(*place)): place for place in reversed(sizes)}
    for name, entries in seen.items():
        module, (labels, groups) = model.get_submodule(name), entries[0]
        if len(entries) > 1 or any(
            True for _ in itertools.chain(module.parameters(recurse=False), module.buffers(recurse=False))
        ):
            continue
        for attribute, value in numbers(module):
            if value < 2:
                continue
            # instances are normed side by side, the channels of one after those of another
            of_all = labels[:value] * (len(labels) // value)
            width_labels = labels[:value] if of_all == labels else labels if value == groups else []
            if (place := places.get(tuple(width_labels))) is not None:
                yield Size(name, attribute, *place, value, len(width_labels))


def _matches(
    value: int, places: list[tuple[str, int]], sizes: dict[tuple[str, int], int], counts: dict[tuple[str, int], int]
) -> Iterator[tuple[str, int]]:
    """Yield the dimensions whose size may explain an attribute with this ``value``, the most likely first.

    Args:
        value: the value of the attribute.
        places: (name, dimension) of the dimensions to choose from, in the order in which equally likely ones are
            yielded.
        sizes: (name, dimension) -> its size.
        counts: (name, dimension) -> its number of classes, which is smaller than the size where whole heads are cut.
    """
    yield from (place for place in places if sizes[place] == value)
    # the width of a head does not change with their number
    if not any(sizes[place] == value * counts[place] for place in places):
        for parts in _PARTS:
            yield from (place for place in places if sizes[place] == value * parts)
    yield from (place for place in places if counts[place] == value and sizes[place] % value == 0)
    for parts in _PARTS:  # a width that is read in halves, by weights of half the width
        yield from (place for place in places if sizes[place] * parts == value)


def follow(model: nn.Module, sizes: Iterable[Size], gone: Mapping[str, Mapping[int, Iterable[int]]]) -> Numbers:
    """Set the attributes in ``sizes`` to what is left of their widths.

    Args:
        model: the smaller model; changed in place.
        sizes: the attributes.
        gone: name of a tensor -> dimension -> the indices that were cut.

    Returns: module -> attribute -> its new value, for those that changed.
    """
    changed: Numbers = {}
    for size in sizes:
        new_value = size.after(gone.get(size.parameter, {}).get(size.dim, ()))
        if new_value != size.before:
            set_number(model.get_submodule(size.module), size.attribute, new_value)
            changed.setdefault(size.module, {})[size.attribute] = new_value
    return changed
