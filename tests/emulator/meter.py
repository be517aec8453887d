"""Counts what a launch does: instructions of warps, sectors of global memory, bank conflicts in shared memory, and
branches at which threads of a warp part.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.emulator.memory import Global

SECTOR, BANKS, BANK = 32, 32, 4  # bytes, number, bytes
_PARTS = {1: 1, 2: 1, 4: 1, 8: 2, 16: 4}  # into how many requests a warp's access of so many bytes a lane is cut


@dataclass
class Meter:
    """Counts by kernel, summed over launches.

    ``instructions``: PTX instructions, one for each warp; ``read`` and ``written``: bytes of the sectors that warps ask
    for; ``useful``: bytes that lanes use; ``fetched`` and ``kept``: bytes of the different sectors that are read and
    written, the least that memory has to move; ``shared``: passes over shared memory, ``conflicts``: those of them that
    bank conflicts cost; ``parted``: branches that some threads of a warp take and others do not.
    """

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    kernel: str = ""

    def begin(self, kernel: str) -> None:
        """Count a launch of ``kernel``, to which everything counted from now on belongs."""
        self.kernel = kernel
        self.counts.setdefault(kernel, Counter())["launches"] += 1

    def add(self, what: str, number: int) -> None:
        self.counts[self.kernel][what] += number

    def instructions(self, count: int, mask: np.ndarray | None, lanes: int) -> None:
        """Count ``count`` instructions for each warp that has a thread in ``mask``."""
        warps = lanes // 32 if mask is None else int(mask.reshape(-1, 32).any(1).sum())
        self.add("instructions", count * warps)

    def branch(self, taken: np.ndarray, mask: np.ndarray | None) -> None:
        """Count the warps of which some threads take a branch and others do not."""
        here = np.ones(len(taken), bool) if mask is None else mask
        go, stay = ((where & here).reshape(-1, 32).any(1) for where in (taken, ~taken))
        self.add("parted", int((go & stay).sum()))

    def memory(self, what: str, address: Any, size: int, mask: np.ndarray | None, lanes: int) -> None:
        """Count an access to global memory; ``what`` is "read" or "written", ``size`` the bytes of each lane."""
        each = np.broadcast_to(address, (lanes,)).astype(np.int64).reshape(-1, 32)
        here = np.ones((lanes // 32, 32), bool) if mask is None else mask.reshape(-1, 32)
        sectors = np.concatenate(
            [(each + offset) // SECTOR for offset in range(0, size, SECTOR)] or [each // SECTOR], 1
        )
        self.add(what, SECTOR * _distinct(sectors, np.tile(here, sectors.shape[1] // 32)))
        self.add("useful", size * int(here.sum()))

    def traffic(self, memory: Global) -> None:
        """Count the least that a launch moves: each sector once in each direction, as if the cache held everything."""
        self.add("fetched", SECTOR * int(memory.read.reshape(-1, SECTOR).any(1).sum()))
        self.add("kept", SECTOR * int((memory.writer.reshape(-1, SECTOR // 2) != 0).any(1).sum()))

    def shared(self, address: Any, size: int, mask: np.ndarray | None, lanes: int) -> None:
        """Count an access to shared memory of ``size`` bytes in each lane. One pass serves each bank once; lanes that
        want the same word share it.
        """
        parts = _PARTS[size]
        each = np.broadcast_to(address, (lanes,)).astype(np.int64).reshape(-1, 32 // parts)
        here = (np.ones(lanes, bool) if mask is None else mask).reshape(-1, 32 // parts)
        words = np.concatenate([each // BANK + i for i in range(max(1, size // BANK))], 1)
        here = np.tile(here, max(1, size // BANK))
        passes = _most_in_a_bank(words, here)
        self.add("shared", int(passes.sum()))
        self.add("conflicts", int(np.maximum(passes - 1, 0).sum()))


def _distinct(values: np.ndarray, here: np.ndarray) -> int:
    """How many different values the rows have, counted row by row and summed."""
    ordered = np.sort(np.where(here, values, -1), 1)
    return int(((np.diff(ordered, axis=1) != 0) & (ordered[:, 1:] >= 0)).sum() + (ordered[:, 0] >= 0).sum())


def _most_in_a_bank(words: np.ndarray, here: np.ndarray) -> np.ndarray:
    """For each row, the largest number of different words that one bank has to deliver."""
    ordered = np.sort(np.where(here, words, -1), 1)
    first = np.concatenate([np.ones((len(ordered), 1), bool), np.diff(ordered, axis=1) != 0], 1) & (ordered >= 0)
    row, column = np.nonzero(first)
    counts = np.zeros((len(ordered), BANKS), np.int64)
    np.add.at(counts, (row, ordered[row, column] % BANKS), 1)
    return np.asarray(counts.max(1))
