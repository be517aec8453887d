"""Parameters of tests that run in ``make test-long`` alone."""

from __future__ import annotations

from typing import Any

import pytest


def long_if(value: Any, *long: Any) -> Any:
    """``value`` for ``pytest.mark.parametrize``; marked as long if it is one of ``long``."""
    return pytest.param(value, marks=pytest.mark.long) if value in long else value
