"""The thresholds between routes: a JSON table for each device, in the folder dispatch/. This module imports no torch.

Nothing is tuned at run time. ``python -m benchmarks.run crossover`` measures a device and writes its table, which is
then copied into that folder.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent / "dispatch"
DEFAULT = "default"


class Thresholds(NamedTuple):
    """One table; the fields are the keys of the JSON object.

    Attributes:
        source: the results file that the numbers come from, or what they were estimated from.
        one_pass_gates: up to this many draws, repeated ones included, the GEMMs of a layer draw the gates of
            activations.
        small_m: up to this many rows of x, a GEMM draws the gates of its own weights.
        skip_dead: whether layers with one draw per batch use the GEMM that skips closed blocks. The host does not know
            how many blocks are closed, so this is one answer for all layers.
    """

    source: str
    one_pass_gates: int
    small_m: int
    skip_dead: bool


_COUNT = "an integer >= 0", lambda value: type(value) is int and value >= 0
_EXPECTED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "source": ("a string that is not empty", lambda value: isinstance(value, str) and value != ""),
    "one_pass_gates": _COUNT,
    "small_m": _COUNT,
    "skip_dead": ("true or false", lambda value: isinstance(value, bool)),
}


def table_name(device_name: str) -> str:
    """The name of a device's table and of the folder of its results: "h100-80gb-hbm3" for "NVIDIA H100 80GB HBM3"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower().removeprefix("nvidia ")).strip("-")


@functools.cache
def thresholds(device_name: str = DEFAULT) -> Thresholds:
    """The table of a device, by the name that its driver gives.

    The table with the longest matching name is taken ("h100-80gb-hbm3", "h100-80gb", "h100"), or the default one.

    Raises: ValueError for a malformed table.
    """
    words = table_name(device_name).split("-")
    paths = [FOLDER / f"{'-'.join(words[:count])}.json" for count in range(len(words), 0, -1)]
    return read(next((path for path in paths if path.exists()), FOLDER / f"{DEFAULT}.json"))


def read(path: Path) -> Thresholds:
    """The table in a file. Raises ValueError that names the file, the key, its value and what was expected."""
    try:
        table = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: {error}: expected a JSON object with the keys {Thresholds._fields}") from None
    if not isinstance(table, dict):
        raise ValueError(f"{path}: {table!r:.80}: expected a JSON object with the keys {Thresholds._fields}")
    for key in sorted(set(table) ^ set(_EXPECTED)):
        state = (
            f"missing: expected {_EXPECTED[key][0]}"
            if key in _EXPECTED
            else f"unknown: expected one of {Thresholds._fields}"
        )
        raise ValueError(f"{path}: {key} is {state}")
    for key, value in table.items():
        expected, fits = _EXPECTED[key]
        if not fits(value):
            raise ValueError(f"{path}: {key}={value!r:.80}: expected {expected}")
    return Thresholds(**table)
