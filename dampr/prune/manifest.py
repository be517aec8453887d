"""What a manifest of compaction may say. A file is not believed, and a manifest may have been changed by hand."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from .unit_compact import places_of, sizes_of

MOST = 2**31  # channels of one dimension
# of one dimension: its size before, and which of it are left; None where nothing was cut
Places = tuple[int, Tensor] | None


def places_in(side: Any) -> Places:
    """(size before, kept indices) of an entry of a manifest.

    Raises ValueError for one that compaction cannot have written.
    """
    if side is None:
        return None
    before: Any = side.get("before") if isinstance(side, dict) else None
    kept = side.get("kept") if isinstance(side, dict) else None
    if not isinstance(kept, list) or not all(type(i) is int for i in (before, *kept)):
        raise ValueError(
            f"manifest: {side!r:.80}, expected a number of channels before and a list of those that are kept"
        )
    if any(a >= b for a, b in itertools.pairwise(kept)) or (kept and not 0 <= kept[0] <= kept[-1] < before):
        raise ValueError(f"manifest: kept={kept!r:.80} of {before}, expected rising indices below that")
    if not 0 < before < MOST:
        raise ValueError(f"manifest: {before} channels before, expected 1 to {MOST - 1}")
    return before, torch.tensor(kept, dtype=torch.int64)


def check(manifest: Any) -> None:
    """Raise ValueError that names the entry unless everything in a manifest has the form that compaction gives it."""
    layers: Any
    tensors: Any
    layers, tensors = (manifest.get(key, {}) if isinstance(manifest, dict) else None for key in ("layers", "tensors"))
    for what, entries in (("layers", layers), ("tensors", tensors)):
        if not isinstance(entries, dict) or not all(isinstance(name, str) for name in entries):
            raise ValueError(f"manifest: {what}={entries!r:.80}, expected entries by name")
    for name, entry in layers.items():
        if not isinstance(entry, dict):
            raise ValueError(
                f"manifest: layers: {name!r:.80}: {entry!r:.80}, expected an entry for each side that was cut"
            )
        for side in entry.keys() & {"out", "in", "heads"}:
            if places_in(entry[side]) is None:
                raise ValueError(f"manifest: layers: {name!r:.80}: {side}=None, expected what was cut of it")
        if "units" in entry:
            _check_units(name, entry["units"])
    for name in tensors:
        for side in places_of(manifest, name):
            places_in(side)
    sizes_of(manifest)


def _check_units(name: str, units: Any) -> None:
    rows = units.get("kept") if isinstance(units, dict) else None
    if not isinstance(rows, list) or not rows:
        raise ValueError(
            f"manifest: layers: {name!r:.80}: units={units!r:.80}, expected a list of those that are kept for each "
            "layer"
        )
    for row in rows:
        places_in({"before": units.get("before"), "kept": row})
