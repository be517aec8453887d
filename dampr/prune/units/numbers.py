"""Whole numbers that modules keep in attributes, alone or in tuples and lists: read them and set them.

A number has the name of its attribute, or of the attribute and a place: "shape.0" is the first number of the tuple
``shape``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def numbers(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield (attribute, value) of the whole numbers that a module keeps, alone or in a tuple whose other numbers are 1.

    "shape.0" is the first number of the tuple ``shape``.
    """
    for attribute, value in kept_numbers(module).items():
        name, _, at = attribute.partition(".")
        stored: Any = vars(module)[name]
        if not at or (type(stored) is tuple and value != 1 and sum(number != 1 for number in stored) == 1):
            yield attribute, value


def kept_numbers(module: nn.Module) -> dict[str, int]:
    """Return attribute -> value for all whole numbers that a module keeps, alone or in tuples and lists of such
    numbers.
    """
    kept: dict[str, int] = {}
    for attribute, value in vars(module).items():
        if "." in attribute:  # it would look like a place in a tuple
            continue
        if type(value) is int:
            kept[attribute] = value
        elif type(value) in (tuple, list) and value and all(type(number) is int for number in value):
            kept |= {f"{attribute}.{at}": number for at, number in enumerate(value)}
    return kept


def number_of(module: nn.Module, attribute: str) -> int | None:
    """Return the value of an attribute, whose name is as in :func:`kept_numbers`; None if it is not a whole number, or
    is not there.
    """
    name, _, at = attribute.partition(".")
    value: Any = vars(module).get(name)
    if at:
        value = value[int(at)] if type(value) in (tuple, list) and int(at) < len(value) else None
    return value if type(value) is int else None


def set_number(module: nn.Module, attribute: str, number: Any) -> None:
    """Set an attribute of ``module``, whose name is as in :func:`kept_numbers`, to ``number``.

    Of a tuple or list ("shape.0") the one entry is replaced, in a new tuple or list. Trials also set values that are no
    numbers.
    """
    name, _, at = attribute.partition(".")
    old: Any = vars(module).get(name)
    new = [*old[: int(at)], number, *old[int(at) + 1 :]] if at else number
    setattr(module, name, tuple(new) if at and type(old) is tuple else new)
