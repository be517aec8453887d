"""Kernels run in Triton's interpreter, on the CPU: ``TRITON_INTERPRET=1 python -m pytest tests/interpreter``, in a
process of its own.

``@triton.jit`` decides when triton is imported whether a kernel is compiled or interpreted. Where that has happened
already, everything here is skipped.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

TOO_LATE = "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1"
if not TOO_LATE:
    os.environ["TRITON_INTERPRET"] = "1"


def _version(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in metadata.version(name).split("+")[0].split(".")[:2])


def why_not() -> str | None:
    """The reason why nothing here can run, or None."""
    if TOO_LATE:
        return (
            "triton was imported without TRITON_INTERPRET=1; run: TRITON_INTERPRET=1 python -m pytest tests/interpreter"
        )
    if _version("triton") < (3, 7) and _version("numpy") >= (2, 4):
        return "the interpreter of triton 3.6 needs numpy < 2.4"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here, reason = Path(__file__).parent, why_not()
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.interpreter)
            # infinities that a select discards
            item.add_marker(pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning"))
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """New memory full of NaN, so that an element nobody wrote shows."""
    from dampr import testing  # not before the environment variable is set

    with testing.poisoned_empty():
        yield
