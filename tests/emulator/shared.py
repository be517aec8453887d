"""Shared memory of the emulated GPU.

Per byte, and since the last barrier, it knows which warp wrote and which warps read.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.emulator.arithmetic import RAW
from tests.emulator.memory import Trap, repeated, wide

PENDING, MANY = 254, 255  # in place of a warp's number + 1: a copy is under way; several warps


def splat(byte: np.ndarray, size: int) -> np.ndarray:
    """(lanes,) bytes repeated to fill a row of :func:`wide`."""
    return (byte.astype(RAW[min(size, 8)]) * repeated(1, size))[:, None]


def foreign(found: np.ndarray, mine: np.ndarray) -> np.ndarray:
    """(lanes,) whether any byte of ``found`` is neither 0 nor that of ``mine``; both as from wide() and splat()."""
    odd = ((found != 0) & (found != mine)).any(1)
    if odd.any():
        rows = np.flatnonzero(odd)
        theirs = np.ascontiguousarray(found[rows]).view(np.uint8)
        own = np.ascontiguousarray(np.broadcast_to(mine[rows], found[rows].shape)).view(np.uint8)
        odd[rows] = ((theirs != 0) & (theirs != own)).any(1)
    return odd


@dataclass
class Copy:
    """One cp.async of some lanes: ``table`` (lanes, size) bytes that go to ``rows`` when they are waited for."""

    rows: np.ndarray
    lanes: np.ndarray
    table: np.ndarray
    size: int
    at: str

    def of(self, lanes: np.ndarray) -> Copy:
        return Copy(self.rows, self.lanes & lanes, self.table, self.size, self.at)


@dataclass
class Group:
    """What some lanes committed together."""

    lanes: np.ndarray
    copies: list[Copy]


class Shared:
    """Shared memory of the CTAs of one batch, ``size`` bytes each, full of NaN."""

    def __init__(self, ctas: int, size: int, threads: int) -> None:
        self.size, self.stride = size, -(-max(size, 16) // 16) * 16
        self.data = np.full(ctas * self.stride, 0xFF, np.uint8)
        self.writer, self.readers, self.filled = (np.zeros(ctas * self.stride, np.uint8) for _ in range(3))
        self.base = np.repeat(np.arange(ctas, dtype=np.int64) * self.stride, threads)
        self.warp = np.tile(np.arange(threads, dtype=np.int64) // 32 + 1, ctas).astype(np.uint8)
        self.ctas = ctas
        self.groups: list[Group] = []
        self.open: list[Copy] = []  # issued since the last commit
        # rows of 16 bytes that wgmma reads: groups, the last one still open
        self.reading: list[list[np.ndarray]] = [[]]
        self.notes: Counter[str] = Counter()

    def _rows(self, address: Any, size: int, mask: np.ndarray | None, at: str) -> np.ndarray:
        offset = address.astype(np.int64)
        offset = np.broadcast_to(offset, self.base.shape) if offset.ndim == 0 else offset
        if mask is not None:
            offset = np.where(mask, offset, 0)
        if (offset & (size - 1)).any():
            raise Trap(f"misaligned access of {size} bytes of shared memory, {at}")
        if (offset < 0).any() or (offset + size > self.size).any():
            raise Trap(f"shared memory address {int(offset.max())} + {size} beyond its {self.size} bytes, {at}")
        return (self.base + offset) // size

    def _mark_read(self, rows: np.ndarray, size: int, mask: np.ndarray | None, at: str) -> None:
        mine = splat(self.warp if mask is None else self.warp[mask], size)
        if not wide(self.filled, size)[rows].all():
            self.notes[f"read of shared memory that nobody wrote, {at}"] += 1
        if foreign(wide(self.writer, size)[rows], mine).any():
            self.notes[f"RACE: shared memory read that another warp wrote since the last barrier, {at}"] += 1
        readers, everyone = wide(self.readers, size), repeated(MANY, size)
        found = readers[rows]
        readers[rows] = np.where((found == 0) | (found == mine), mine, everyone)
        lost = (readers[rows] != mine).any(1)
        if lost.any():
            readers[rows[lost]] = everyone

    def load(self, address: Any, size: int, count: int, mask: np.ndarray | None, at: str) -> list[np.ndarray]:
        total = size * count
        rows = self._rows(address, total, mask, at)
        self._mark_read(rows if mask is None else rows[mask], total, mask, at)
        found = self.data.view(RAW[size]).reshape(-1, count)[rows]
        return [np.ascontiguousarray(found[:, i]) for i in range(count)]

    def _claim(self, rows: np.ndarray, warp: np.ndarray, changes: np.ndarray, size: int, at: str) -> None:
        """A store is about to happen: by others since the last barrier? ``changes``: lanes whose value is a new one."""
        mine = splat(warp, size)
        if (foreign(wide(self.writer, size)[rows], mine) & changes).any():
            self.notes[f"RACE: shared memory written that another warp wrote since the last barrier, {at}"] += 1
        if (foreign(wide(self.readers, size)[rows], mine) & changes).any():
            self.notes[f"RACE: shared memory written that another warp read since the last barrier, {at}"] += 1

    def store(self, address: Any, values: list[Any], size: int, mask: np.ndarray | None, at: str) -> None:
        lanes, total = len(self.base), size * len(values)
        rows = self._rows(address, total, mask, at)
        table = np.stack([np.broadcast_to(v, (lanes,)) for v in values], 1).astype(RAW[size], copy=False)
        warp = self.warp
        if mask is not None:
            rows, table, warp = rows[mask], table[mask], warp[mask]
        if len(rows):
            changes = (self.data.view(table.dtype).reshape(-1, table.shape[1])[rows] != table).any(1)
            self._claim(rows, warp, changes, total, at)
            self._write(rows, table, warp, total, at)

    def _write(self, rows: np.ndarray, table: np.ndarray, warp: np.ndarray, total: int, at: str) -> None:
        data = self.data.view(table.dtype).reshape(-1, table.shape[1])
        data[rows] = table
        if (data[rows] != table).any():
            self.notes[f"RACE: two threads store different values to shared memory at once, {at}"] += 1
        wide(self.writer, total)[rows] = splat(warp, total)
        wide(self.filled, total)[rows] = 1

    # ---- cp.async: from issue to wait the bytes are neither old nor new ----

    def copy(self, address: Any, table: np.ndarray, size: int, mask: np.ndarray | None, at: str) -> None:
        """``table``: (lanes, size) bytes that land when their group is waited for."""
        rows = self._rows(address, size, mask, at)
        lanes = np.ones(len(rows), bool) if mask is None else mask
        self._claim(rows[lanes], self.warp[lanes], np.ones(int(lanes.sum()), bool), size, at)
        self.data.reshape(-1, size)[rows[lanes]] = 0xFF
        self.open.append(Copy(rows, lanes, table, size, at))
        self._mark_pending([self.open[-1]])

    def _mark_pending(self, copies: list[Copy]) -> None:
        for copy in copies:
            wide(self.writer, copy.size)[copy.rows[copy.lanes]] = repeated(PENDING, copy.size)

    def commit(self, mask: np.ndarray | None) -> None:
        everyone = np.ones(len(self.base), bool) if mask is None else mask.copy()
        self.groups.append(Group(everyone, [copy.of(everyone) for copy in self.open]))
        self.open = [rest for copy in self.open if (rest := copy.of(~everyone)).lanes.any()]

    def wait(self, newest: int, mask: np.ndarray | None) -> None:
        """Land every group of a lane but the ``newest``."""
        seen, landing = np.zeros(len(self.base), np.int64), []
        for group in reversed(self.groups):
            seen += group.lanes
            done = group.lanes & (seen > newest)
            if mask is not None:
                done &= mask
            if done.any():
                landing.append((group, done))
        for group, done in reversed(landing):
            for copy in group.copies:
                now = copy.lanes & done
                if now.any():
                    self._write(copy.rows[now], copy.table[now], self.warp[now], copy.size, copy.at)
            group.lanes = group.lanes & ~done
        self.groups = [group for group in self.groups if group.lanes.any()]

    # ---- wgmma and tcgen05.mma read shared memory from issue to wait, on behalf of several warps ----

    def read_async(self, rows: np.ndarray, at: str) -> None:
        if (wide(self.writer, 16)[rows] != 0).any():
            self.notes[f"RACE: wgmma reads shared memory that was written since the last barrier, {at}"] += 1
        if not wide(self.filled, 16)[rows].all():
            self.notes[f"read of shared memory that nobody wrote, {at}"] += 1
        self.reading[-1].append(rows)
        self._mark_async()

    def _mark_async(self) -> None:
        for group in self.reading:
            for rows in group:
                wide(self.readers, 16)[rows] = repeated(MANY, 16)

    def commit_reads(self) -> None:
        self.reading.append([])

    def wait_reads(self, newest: int) -> None:
        done = len(self.reading) - 1 - newest
        if done > 0:
            self.reading = self.reading[done:]

    def barrier(self, mask: np.ndarray | None) -> None:
        """Whole CTAs, those with a thread in ``mask``, pass a barrier: only what is still under way is remembered."""
        if mask is None:
            self.writer[:] = 0
            self.readers[:] = 0
        else:
            for cta in np.flatnonzero(mask.reshape(self.ctas, -1).any(1)):
                span = slice(cta * self.stride, (cta + 1) * self.stride)
                self.writer[span] = 0
                self.readers[span] = 0
        self._mark_pending([copy.of(group.lanes) for group in self.groups for copy in group.copies])
        self._mark_pending(self.open)
        self._mark_async()
