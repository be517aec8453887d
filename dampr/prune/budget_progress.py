"""How far a budget has come at a step: the share of what there is to save."""

from __future__ import annotations

import functools
from collections.abc import Callable

from dampr import _checks

Schedule = int | Callable[[int], float] | None


def progress_of(schedule: Schedule) -> Callable[[int], float]:
    if schedule is None:
        return _at_once
    if callable(schedule):
        return schedule
    schedule = _checks.positive_int("schedule", schedule)
    return functools.partial(_cubic, schedule)


def _at_once(step: int) -> float:
    return 1.0


def _cubic(steps: int, step: int) -> float:
    return 1 - (1 - min(step / steps, 1.0)) ** 3
