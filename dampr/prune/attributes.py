"""Attributes that users put on layers (``fc.gain = 2``, ``conv.act = nn.ReLU()``) stay when a layer is replaced."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

_TABLES = ("_parameters", "_buffers", "_modules")
_CARRIED = "dampr_carried"


def carry(old: nn.Module, new: nn.Module) -> None:
    """Give ``new``, which takes the place of ``old``, what users put on ``old``: attributes, parameters, buffers and
    modules.

    These are what a fresh layer of the type of ``old`` does not have, or, if ``old`` has got them in this way itself,
    what it has got. What ``new`` has already stays.
    """
    names = _carried(old) if _CARRIED in vars(old) else _added(old)
    found = set[str]()
    for name in names:
        if name in vars(new) or hasattr(type(new), name) or any(name in getattr(new, table) for table in _TABLES):
            continue
        for held, own in ((vars(old), vars(new)), *((getattr(old, t), getattr(new, t)) for t in _TABLES)):
            if name in held:
                own[name] = held[name]
                found.add(name)
    if found:
        vars(new)[_CARRIED] = tuple(sorted(found))


def carry_all(old: nn.Module, new: nn.Module) -> None:
    """:func:`carry`, also from each part of ``old`` to the part of ``new`` of the same name."""
    parts = dict(new.named_modules())
    for name, former in old.named_modules():
        part = parts.get(name)
        if part is not None and part is not former:
            carry(former, part)


def _carried(layer: Any) -> tuple[str, ...]:
    """The names of what a layer has got from the one that it replaced."""
    names: tuple[str, ...] = vars(layer)[_CARRIED]
    return names


def _added(layer: nn.Module) -> list[str]:
    """The names of what a fresh layer of this type does not have; empty for a type that is not one of torch's."""
    kind: Any = type(layer)
    fresh = _fresh(kind)
    if fresh is None:
        return []
    weights = getattr(layer, "_flat_weights_names", ())  # of recurrent layers: as many as there are layers
    names = [name for name in vars(layer) if name not in vars(fresh) and name != _CARRIED]
    for table in _TABLES:
        names += [name for name in getattr(layer, table) if name not in getattr(fresh, table) and name not in weights]
    return names


@functools.cache
def _fresh(kind: Any) -> nn.Module | None:
    """A layer of a type of torch with one channel, on the meta device; None for other types."""
    if not kind.__module__.startswith("torch.nn.modules."):
        return None
    for sizes in ((), (1,), (1, 1), (1, 1, 1)):
        for how in ({"device": "meta"}, {}):
            try:
                made: nn.Module = kind(*sizes, **how)
                return made
            except TypeError:
                continue
    return None
