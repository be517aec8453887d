"""The checkpointed regions of torch.utils.checkpoint that are running, read from torch's own state.

A region runs twice, in the forward and again in the backward, and has to draw the same gates both times. torch has no
public way to tell that code runs again, so this module reads the two places that show it: the hooks on saved tensors
that ``use_reentrant=False`` installs, and the autograd node that ``use_reentrant=True`` makes. If a later torch has
neither, every call counts as a first one, and a checkpointed layer with a gate generator draws anew in the backward;
tests/gates/test_draws.py would fail then.
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
    """Yield (region, second run) for each checkpointed region around this code, the innermost first.

    Both are objects that identify the region and its second run; the second run is None while the region runs the first
    time. Only regions of ``use_reentrant=False`` are seen.
    """
    for pack in _hooks():
        kept = inspect.unwrap(pack)
        frame = _closure_variable(kept, "_checkpoint_hook.", "frame")
        target = _closure_variable(kept, "_recomputation_hook.", "target_frame_ref")
        if frame is not None:
            yield frame, None
        elif target is not None and target() is not None:
            yield target(), pack


T = TypeVar("T")


class Repeats(Generic[T]):
    """The values that calls had in the first run of each region of ``use_reentrant=False``, in order, for its second
    run.
    """

    def __init__(self) -> None:
        self._had: WeakKeyDictionary[Any, list[T]] = WeakKeyDictionary()  # region -> values of the first run
        self._position: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # how far a second run has come

    def keep(self, value: T) -> None:
        """Record the value of this call for the second run of the regions around it."""
        for region, again in regions():
            if again is not None:
                break
            self._had.setdefault(region, []).append(value)

    def find(self) -> T | None:
        """The value of the call that this call repeats; None if it repeats none."""
        for region, again in regions():
            if again is not None and region in self._had:
                position = self._position[again] = self._position.get(again, -1) + 1
                return at(self._had[region], position)
        return None


def at(calls: list[T], position: int) -> T | None:
    """The entry of ``calls`` at ``position``; None if there is none."""
    return calls[position] if position < len(calls) else None


def any_region() -> bool:
    """Whether this code may be in a checkpointed region, in its first or second run."""
    return _top(False) is not None or torch._C._current_autograd_node() is not None


def region_by_node() -> tuple[int, int] | None:
    """(number of the reentrant region that is in its second run here, number of the backward that runs it).

    None if there is no such region.
    """
    node = torch._C._current_autograd_node()
    if node is None or not node.name().startswith("CheckpointFunction"):
        return None
    return node._sequence_nr(), torch._C._current_graph_task_id()


def region_by_order() -> int | None:
    """The current sequence number of autograd; None if gradients are enabled.

    In their first run, reentrant regions run without gradients. A call in a region has a higher number than the region,
    and a lower one than all nodes after it.
    """
    number: int = torch._C._autograd._get_sequence_nr()
    return None if torch.is_grad_enabled() else number


def _hooks() -> list[Callable[..., Any]]:
    """The hooks that pack saved tensors at this place, the innermost first.

    torch shows only the top of its stack of hooks, so all are popped and pushed again.
    """
    taken = []
    try:
        while (pair := _top(False)) is not None:
            taken.append(pair)
            _pop()
    finally:
        for pair in reversed(taken):
            _push(*pair)
    return [pack for pack, _ in taken]


def _closure_variable(function: Any, owner: str, name: str) -> Any:
    """The variable ``name`` in the closure of ``function``; None unless ``function`` is defined in ``owner`` and has
    it.
    """
    if not getattr(function, "__qualname__", "").startswith(owner) or name not in function.__code__.co_freevars:
        return None
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents
