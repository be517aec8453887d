"""The indices that are left of a dimension, and how they are read from a manifest of compaction."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

MOST = 2**31  # a dimension has fewer channels than this
Places = tuple[int, Tensor] | None
"""(the size of a dimension before the cut, the indices that are left, int64); None if nothing was cut."""


def places_in(side: Any) -> Places:
    """(size before, kept indices) from an entry of a manifest; None for an entry that is None.

    Raises: ValueError for an entry that compaction cannot have written.
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
