"""The tensors in what models are given and return: in containers, dataclasses and objects of any type."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from . import copies


def with_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value`` with ``change(t)`` in place of each tensor t. Objects that hold tensors are copied."""

    def leaf(one: Any) -> Any:
        if isinstance(one, Tensor):
            return change(one)
        held = tensors(one)
        return copies.value(one, {id(t): change(t) for t in held}) if held else one

    return pytree.tree_map(leaf, value)


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in a value, in order, from containers, dataclasses, distributions and attributes of objects."""
    found: list[Tensor] = []
    seen: set[int] = set()

    def look(value: Any, depth: int) -> None:
        """Collect the tensors in ``value``, which lies ``depth`` objects deep."""
        if isinstance(value, Tensor):
            found.append(value)
        elif value is not None and not isinstance(value, _PLAIN) and id(value) not in seen and depth < DEPTH:
            seen.add(id(value))
            for inner in _inside(value):
                look(inner, depth + 1)

    look(value, 0)
    return found


DEPTH = 8  # how deep objects may lie in objects for :func:`tensors` to find their tensors
_PLAIN = (str, bytes, int, float, complex, bool, type, nn.Module, torch.dtype, torch.device)


def _inside(value: Any) -> Iterable[Any]:
    """The items of an object, and the values of its attributes that are not items.

    Caches of keys and values in transformers models are left out: their shape follows the number of heads.
    """
    if any(kind.__name__ == "Cache" and kind.__module__.startswith("transformers.") for kind in type(value).__mro__):
        return []
    if hasattr(value, "to_tuple"):
        return list(value.to_tuple())
    if isinstance(value, Mapping):
        items = list(value.values())
        return items + [v for v in getattr(value, "__dict__", {}).values() if all(v is not item for item in items)]
    if isinstance(value, PackedSequence):
        return [value.data, value.batch_sizes]
    if isinstance(value, (tuple, list, set, frozenset)):
        return list(value)
    slots = [name for kind in type(value).__mro__ for name in _slots(kind)]
    return list(getattr(value, "__dict__", {}).values()) + [
        getattr(value, name) for name in slots if hasattr(value, name)
    ]


def _slots(kind: type) -> tuple[str, ...]:
    """The names in ``__slots__`` of a class."""
    found = vars(kind).get("__slots__", ())
    return (found,) if isinstance(found, str) else tuple(found)
