"""Numbers that code keeps beside its parameters (``num_heads``, ``all_head_size``): which of them follow a width, and
their new values.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn

from ..layers.registry import kind_of
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
_PARTS = (2, 3)  # a parameter may hold query, key and value one after the other, or two halves of a gated layer


class Size(NamedTuple):
    """An attribute of a module whose value is proportional to the size of a dimension of a parameter or buffer.

    Attributes:
        module: the name of the module.
        attribute: the name of the attribute; "shape.0" is the first number of the tuple ``shape``.
        parameter, dim: the name of the parameter or buffer, and the dimension.
        before: the value of the attribute in the whole model.
        width: the size of the dimension in the whole model.
    """

    module: str
    attribute: str
    parameter: str
    dim: int
    before: int
    width: int


def followers(model: nn.Module, units: Units, classes: Iterable[int]) -> list[Size]:
    """Guess the attributes that have to change when ``classes`` are cut.

    An attribute is found if it is a whole number of a module that is no ``torch.nn`` layer, and equals the size of a
    dimension that loses some of ``classes``, half or a third of that size, or the number of classes in the dimension.
    The caller has to check that the model still runs and computes the same.
    """
    cut = set(classes)
    widths = {(member.name, member.dim) for one in cut for member in units.members[one]}
    sizes = {(name, dim): size for name, dims in units.origin.items() for dim, _, size in dims if (name, dim) in widths}
    counts = {place: len(set(units.classes(*place))) for place in sizes}
    found = []
    for name, module in model.named_modules():
        if kind_of(module).follows:
            continue
        prefix = f"{name}." if name else ""
        near = sorted((place for place in sizes if place[0].startswith(prefix)), key=lambda place: place[0].count("."))
        for attribute, value in _numbers(module):
            if value < 2 or any(word in attribute for word in _NO_WIDTHS):
                continue
            place = next(_matches(value, near, sizes, counts), None)
            if place is not None:
                found.append(Size(name, attribute, *place, value, sizes[place]))
    return found + list(_of_norms(model, units, sizes))


def _of_norms(model: nn.Module, units: Units, sizes: dict[tuple[str, int], int]) -> Iterator[Size]:
    """The attributes of norms without parameters that hold the number of their channels or groups.

    A norm that is applied to several widths is left out, because these may lose different numbers of channels.
    """
    seen: dict[str, list[tuple[list[int], int]]] = {}
    for name, line, groups in (*units.normed, *((name, line, 0) for name, line in units.counted if name)):
        said = units.label[line].tolist(), groups
        if said not in seen.setdefault(name, []):
            seen[name].append(said)
    places = {tuple(units.classes(*place)): place for place in reversed(sizes)}
    for name, every in seen.items():
        module, (labels, groups) = model.get_submodule(name), every[0]
        if len(every) > 1 or any(
            True for _ in itertools.chain(module.parameters(recurse=False), module.buffers(recurse=False))
        ):
            continue
        for attribute, value in _numbers(module):
            if value < 2:
                continue
            of_all = labels[:value] * (
                len(labels) // value
            )  # instances are normed side by side, the channels of one after those of another
            own = labels[:value] if of_all == labels else labels if value == groups else []
            if (place := places.get(tuple(own))) is not None:
                yield Size(name, attribute, *place, value, len(own))


def _matches(
    value: int, places: list[tuple[str, int]], sizes: dict[tuple[str, int], int], counts: dict[tuple[str, int], int]
) -> Iterator[tuple[str, int]]:
    """The dimensions (name, dim) whose size may explain an attribute of this ``value``, the most likely first."""
    yield from (place for place in places if sizes[place] == value)
    # the width of a head does not change with their number
    if not any(sizes[place] == value * counts[place] for place in places):
        for parts in _PARTS:
            yield from (place for place in places if sizes[place] == value * parts)
    yield from (place for place in places if counts[place] == value and sizes[place] % value == 0)
    for parts in _PARTS:  # a width that is read in halves, by weights of half the width
        yield from (place for place in places if sizes[place] * parts == value)


def follow(model: nn.Module, sizes: Iterable[Size]) -> dict[str, dict[str, int]]:
    """Set the attributes in ``sizes`` to fit the present shapes of the parameters and buffers of ``model``.

    Returns: module -> attribute -> its new value, for those that changed.
    """
    tensors = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    made: dict[str, dict[str, int]] = {}
    for size in sizes:
        now = size.before * tensors[size.parameter].shape[size.dim] // size.width
        if now != size.before:
            set_number(model.get_submodule(size.module), size.attribute, now)
            made.setdefault(size.module, {})[size.attribute] = now
    return made


def _numbers(module: nn.Module) -> Iterator[tuple[str, int]]:
    """(attribute, value) of the whole numbers that a module keeps, alone or in a tuple whose other numbers are 1."""
    for attribute, value in vars(module).items():
        if type(value) is int:
            yield attribute, value
        elif (
            isinstance(value, tuple)
            and all(type(number) is int for number in value)
            and sum(number != 1 for number in value) == 1
        ):
            yield from ((f"{attribute}.{at}", number) for at, number in enumerate(value) if number != 1)


def number_of(module: nn.Module, attribute: str) -> int | None:
    """The value of an attribute that :class:`Size` names; None if it is no whole number."""
    name, _, at = attribute.partition(".")
    value = vars(module).get(name)
    if at:
        value = value[int(at)] if type(value) is tuple and int(at) < len(value) else None
    return value if type(value) is int else None


def set_number(module: nn.Module, attribute: str, number: Any) -> None:
    """Set an attribute that :class:`Size` names."""
    name, _, at = attribute.partition(".")
    whole: Any = vars(module).get(name)
    setattr(module, name, number if not at else (*whole[: int(at)], number, *whole[int(at) + 1 :]))
