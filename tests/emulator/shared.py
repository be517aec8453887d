"""Shared memory of the emulated GPU.

For each byte it records which warp wrote it and which warps read it since the last barrier, so that races show.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.emulator.arithmetic import RAW
from tests.emulator.memory import Trap, repeated, wide

PENDING, MANY = 254, 255  # stand for "a copy is under way" and "several warps", where else a warp's number + 1 stands


def splat(byte: np.ndarray, size: int) -> np.ndarray:
    """Each lane's byte repeated to fill ``size`` bytes, as a row of :func:`wide`."""
    return (byte.astype(RAW[min(size, 8)]) * repeated(1, size))[:, None]


def foreign(found: np.ndarray, mine: np.ndarray) -> np.ndarray:
    """For each lane, whether any byte of its row ``found`` is neither 0 nor the byte that ``mine`` repeats.

    A byte is a warp's number + 1, or 0 for no warp; ``found`` comes from :func:`wide`, ``mine`` from :func:`splat`.
    """
    odd = ((found != 0) & (found != mine)).any(1)
    if odd.any():
        rows = np.flatnonzero(odd)
        theirs = np.ascontiguousarray(found[rows]).view(np.uint8)
        own = np.ascontiguousarray(np.broadcast_to(mine[rows], found[rows].shape)).view(np.uint8)
        odd[rows] = ((theirs != 0) & (theirs != own)).any(1)
    return odd


@dataclass
class Copy:
    """One cp.async of some lanes: the bytes ``table`` (lanes, size) reach ``rows`` when the lane waits for the copy."""

    rows: np.ndarray
    lanes: np.ndarray
    table: np.ndarray
    size: int
    at: str

    def of(self, lanes: np.ndarray) -> Copy:
        """The part of the copy that belongs to ``lanes``."""
        return Copy(self.rows, self.lanes & lanes, self.table, self.size, self.at)


@dataclass
class Group:
    """Copies that some lanes committed together with one cp.async.commit_group."""

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
        """The row of :func:`wide` that each lane addresses. Raises Trap for a misaligned address or one beyond the
        CTA's memory.
        """
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
        """Record a read of ``rows``, and note reads of bytes that nobody wrote, or that another warp wrote since the
        barrier.
        """
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
        """``count`` values of ``size`` bytes for each lane."""
        total = size * count
        rows = self._rows(address, total, mask, at)
        self._mark_read(rows if mask is None else rows[mask], total, mask, at)
        found = self.data.view(RAW[size]).reshape(-1, count)[rows]
        return [np.ascontiguousarray(found[:, i]) for i in range(count)]

    def _claim(self, rows: np.ndarray, warp: np.ndarray, changes: np.ndarray, size: int, at: str) -> None:
        """Note a race if another warp read or wrote ``rows`` since the last barrier, for the lanes whose store
        ``changes`` bytes.
        """
        mine = splat(warp, size)
        if (foreign(wide(self.writer, size)[rows], mine) & changes).any():
            self.notes[f"RACE: shared memory written that another warp wrote since the last barrier, {at}"] += 1
        if (foreign(wide(self.readers, size)[rows], mine) & changes).any():
            self.notes[f"RACE: shared memory written that another warp read since the last barrier, {at}"] += 1

    def store(self, address: Any, values: list[Any], size: int, mask: np.ndarray | None, at: str) -> None:
        """Store each lane's ``values`` of ``size`` bytes at its address, and note races."""
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
        """Put ``table`` into ``rows`` and record the warps that wrote them."""
        data = self.data.view(table.dtype).reshape(-1, table.shape[1])
        data[rows] = table
        if (data[rows] != table).any():
            self.notes[f"RACE: two threads store different values to shared memory at once, {at}"] += 1
        wide(self.writer, total)[rows] = splat(warp, total)
        wide(self.filled, total)[rows] = 1

    # ---- cp.async: from issue to wait the bytes are neither old nor new ----

    def copy(self, address: Any, table: np.ndarray, size: int, mask: np.ndarray | None, at: str) -> None:
        """Begin a cp.async: the bytes ``table`` (lanes, size) arrive when their group is waited for; till then they
        read as NaN.
        """
        rows = self._rows(address, size, mask, at)
        lanes = np.ones(len(rows), bool) if mask is None else mask
        self._claim(rows[lanes], self.warp[lanes], np.ones(int(lanes.sum()), bool), size, at)
        self.data.reshape(-1, size)[rows[lanes]] = 0xFF
        self.open.append(Copy(rows, lanes, table, size, at))
        self._mark_pending([self.open[-1]])

    def _mark_pending(self, copies: list[Copy]) -> None:
        """Record a copy under way as the writer of its bytes, so that any access before the wait is noted as a race."""
        for copy in copies:
            wide(self.writer, copy.size)[copy.rows[copy.lanes]] = repeated(PENDING, copy.size)

    def commit(self, mask: np.ndarray | None) -> None:
        """cp.async.commit_group: make a group of the lanes' copies since the last commit."""
        everyone = np.ones(len(self.base), bool) if mask is None else mask.copy()
        self.groups.append(Group(everyone, [copy.of(everyone) for copy in self.open]))
        self.open = [rest for copy in self.open if (rest := copy.of(~everyone)).lanes.any()]

    def wait(self, newest: int, mask: np.ndarray | None) -> None:
        """cp.async.wait_group: complete each lane's groups except for its ``newest`` ones."""
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
        """Record that an asynchronous matrix product reads ``rows`` of 16 bytes from now until it is waited for."""
        if (wide(self.writer, 16)[rows] != 0).any():
            self.notes[f"RACE: wgmma reads shared memory that was written since the last barrier, {at}"] += 1
        if not wide(self.filled, 16)[rows].all():
            self.notes[f"read of shared memory that nobody wrote, {at}"] += 1
        self.reading[-1].append(rows)
        self._mark_async()

    def _mark_async(self) -> None:
        """Record the bytes of products under way as read by several warps, so that a store to them is noted as a
        race.
        """
        for group in self.reading:
            for rows in group:
                wide(self.readers, 16)[rows] = repeated(MANY, 16)

    def commit_reads(self) -> None:
        """Close the group of asynchronous products that began since the last call."""
        self.reading.append([])

    def wait_reads(self, newest: int) -> None:
        """Complete the groups of asynchronous products except for the ``newest`` ones."""
        done = len(self.reading) - 1 - newest
        if done > 0:
            self.reading = self.reading[done:]

    def barrier(self, mask: np.ndarray | None) -> None:
        """Let the CTAs that have a thread in ``mask`` pass a barrier: forget all accesses but those still under way."""
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
