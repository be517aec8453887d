"""Checks the manifest of compaction. Manifests are not trusted, as they come from files and may have been changed by
hand.
"""

from __future__ import annotations

from typing import Any

from .places import places_in
from .unit_compact import places_of, sizes_of


def check(manifest: Any) -> None:
    """Raise ValueError, with the name of the entry, unless every entry of a manifest has the form that compaction
    gives it.
    """
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
    counting = manifest.get("counting", [])
    if not isinstance(counting, list) or not all(isinstance(name, str) for name in counting):
        raise ValueError(f"manifest: counting={counting!r:.80}, expected a list of the names of modules")


def _check_units(name: str, units: Any) -> None:
    """Raise ValueError unless the entry of a recurrent layer lists the units kept for each of its layers and
    directions.
    """
    rows = units.get("kept") if isinstance(units, dict) else None
    if not isinstance(rows, list) or not rows:
        raise ValueError(
            f"manifest: layers: {name!r:.80}: units={units!r:.80}, expected a list of those that are kept for each "
            "layer"
        )
    for row in rows:
        places_in({"before": units.get("before"), "kept": row})
