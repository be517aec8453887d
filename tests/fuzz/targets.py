"""Every target by name."""

from __future__ import annotations

import os
from collections.abc import Callable

from . import functional, layers, models, networks
from .values import Draw

TARGETS: dict[str, Callable[[Draw], str | None]] = {
    **functional.TARGETS,
    **layers.TARGETS,
    **models.TARGETS,
    **networks.TARGETS,
}
PLANTED: dict[str, Callable[[Draw], str | None]] = {"planted_crash": lambda draw: os.abort()}
"""Faults for the fuzzer's own tests, run where they are asked for by name."""
