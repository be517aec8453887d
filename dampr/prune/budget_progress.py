"""Schedules of a budget: functions from the step to the share of the way, from the whole cost to the target, that
should be done by then.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from dampr import _checks

Schedule = int | Callable[[int], float] | None


def progress_of(schedule: Schedule) -> Callable[[int], float]:
    """The function for a schedule: None means everything at once, an int a cubic course over that many steps."""
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
