"""Which checkpointed regions of torch.utils.checkpoint are at work, by what torch itself keeps of them.

A region runs twice, in the forward and again in the backward, and has to draw the same gates both times. torch has no
public name for "this code runs again", so the two places that know it are read here: the hooks on saved tensors that
``use_reentrant=False`` installs, and the node of autograd that ``use_reentrant=True`` makes. Where a later torch has
neither, every call counts as a first one, and a checkpointed layer whose seeds come from a gate generator draws anew;
tests/gates/test_draws.py would fail.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch

_top, _push, _pop = (
    getattr(torch._C._autograd, f"_{name}_saved_tensors_default_hooks") for name in ("top", "push", "pop")
)


def regions() -> Iterator[tuple[Any, Any]]:
    """Of each checkpointed region around this code, the innermost first: what names it,
    and what names this second run of it (or None).
    """
    for pack in _hooks():
        kept = inspect.unwrap(pack)
        frame = _enclosed(kept, "_checkpoint_hook.", "frame")
        target = _enclosed(kept, "_recomputation_hook.", "target_frame_ref")
        if frame is not None:
            yield frame, None
        elif target is not None and target() is not None:
            yield target(), pack


T = TypeVar("T")


class Repeats(Generic[T]):
    """What calls had in each checkpointed region of ``use_reentrant=False``, in their order, for its second run."""

    def __init__(self) -> None:
        self._had: WeakKeyDictionary[Any, list[T]] = WeakKeyDictionary()  # by region
        self._position: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # how far a second run has come

    def keep(self, value: T) -> None:
        """What this call has."""
        for region, again in regions():
            if again is not None:
                break
            self._had.setdefault(region, []).append(value)

    def find(self) -> T | None:
        """What the call had that this one repeats; None for a first one."""
        for region, again in regions():
            if again is not None and region in self._had:
                position = self._position[again] = self._position.get(again, -1) + 1
                return at(self._had[region], position)
        return None


def at(calls: list[T], position: int) -> T | None:
    """What the call in this position had; None where there were fewer."""
    return calls[position] if position < len(calls) else None


def any_region() -> bool:
    """Whether this code may be in a checkpointed region, or in one that runs again."""
    return _top(False) is not None or torch._C._current_autograd_node() is not None


def region_by_node() -> tuple[int, int] | None:
    """The number of the reentrant region that runs again here, and the backward in which it does;
    None where there is none.
    """
    node = torch._C._current_autograd_node()
    if node is None or not node.name().startswith("CheckpointFunction"):
        return None
    return node._sequence_nr(), torch._C._current_graph_task_id()


def region_by_order() -> int | None:
    """Where this code is in the order of autograd's nodes, None where gradients are enabled: reentrant regions run
    first without.

    What runs in a region comes after its number, and before the numbers of all that follows.
    """
    number: int = torch._C._autograd._get_sequence_nr()
    return None if torch.is_grad_enabled() else number


def _hooks() -> list[Callable[..., Any]]:
    """The hooks that pack saved tensors here, the innermost first. torch shows the top of its stack alone."""
    taken = []
    try:
        while (pair := _top(False)) is not None:
            taken.append(pair)
            _pop()
    finally:
        for pair in reversed(taken):
            _push(*pair)
    return [pack for pack, _ in taken]


def _enclosed(function: Any, owner: str, name: str) -> Any:
    """A variable that a function of torch's class ``owner`` has from where it was defined;
    None where it is another function.
    """
    if not getattr(function, "__qualname__", "").startswith(owner) or name not in function.__code__.co_freevars:
        return None
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents
