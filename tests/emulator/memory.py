"""Global memory of the emulated GPU, with every access checked for bounds, alignment and races.

A :class:`Global` holds a copy of each storage that a launch was given, with poisoned guards between the copies. For
each byte it records whether the byte lies in a tensor that was passed (the gaps of a strided view do not), which thread
wrote it, and whether it was read.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from typing import Any

import numpy as np

from tests.emulator.arithmetic import RAW

BASE = 0x7F00_0000_0000
GUARD = 4096
PAGE = 1 << 12
OUTSIDE, GAP, INSIDE = 0, 1, 3  # of a byte: in no storage, in a storage but in no tensor, in a tensor


class Trap(RuntimeError):
    """Raised for what a GPU would fault on or leaves undefined, and for what is not emulated."""


def wide(data: np.ndarray, size: int) -> np.ndarray:
    """A byte array seen as rows of ``size`` bytes: (n, 1) of an unsigned type, or (n, 2) of uint64 for 16 bytes."""
    return data.view(np.uint64).reshape(-1, 2) if size == 16 else data.view(RAW[size]).reshape(-1, 1)


def repeated(byte: int, size: int) -> Any:
    """A byte repeated to fill an unsigned number of ``size`` bytes: the value of one element of :func:`wide`."""
    return RAW[min(size, 8)](int(f"{byte:02X}" * min(size, 8), 16))


def host_bytes(address: int, size: int) -> np.ndarray:
    """``size`` bytes at an address of this process, as an array that shares them."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


class Global:
    """Device memory of one launch, a copy of the storages that its tensors lie in."""

    def __init__(self, storages: list[tuple[int, np.ndarray, np.ndarray]], ctas: int = 1, threads: int = 32) -> None:
        """``storages``: (host address, its bytes, its validity per byte: GAP or INSIDE)."""
        self.where: dict[int, int] = {}
        position = GUARD
        for address, data, _ in storages:
            self.where[address] = position
            position += -(-(len(data) + GUARD) // 512) * 512
        self._reserve(position + GUARD, ctas, threads)
        for address, data, valid in storages:
            start = self.where[address]
            self.data[start : start + len(data)] = data
            self.valid[start : start + len(data)] = valid

    def _reserve(self, size: int, ctas: int, threads: int) -> None:
        """Make ``size`` bytes of empty device memory with all their records."""
        self.threads, self.epoch = threads, np.zeros(ctas, np.int32)  # barriers passed by each CTA
        self.size = size
        self.data = np.full(size, 0xFF, np.uint8)
        self.valid = np.full(size, OUTSIDE, np.uint8)
        self.valid[:16] = INSIDE  # lanes that are switched off address row 0
        self.writer = np.zeros(size // 2, np.int64)  # thread + 1, of each two bytes
        self.stamp = np.zeros(size // 2, np.int32)  # epoch of the writer's CTA when it wrote
        self.read = np.zeros(size, np.uint8)
        self.notes: Counter[str] = Counter()

    def device_address(self, storage: int, offset: int) -> int:
        """The device address of the byte at ``offset`` in the storage at the host address ``storage``."""
        return BASE + self.where[storage] + offset

    def _rows(self, address: Any, size: int, mask: np.ndarray | None, lanes: int, at: str) -> np.ndarray:
        """The row of :func:`wide` that each lane addresses; 0 for one that is switched off."""
        index = (address - np.uint64(BASE)).view(np.int64)
        if index.ndim == 0:
            index = np.broadcast_to(index, (lanes,))
        if mask is not None:
            index = np.where(mask, index, 0)
        if (index & (size - 1)).any():
            raise Trap(f"misaligned access of {size} bytes, {at}")
        if (index < 0).any() or (index + size > self.size).any():
            raise Trap(f"address outside of memory, {at}")
        return index // size

    def _check(self, rows: np.ndarray, size: int, store: bool, at: str) -> None:
        """Raise Trap for a store, or a load, of bytes outside of every storage, and for a store to a gap of a view; a
        load from such a gap is only noted, as its value may be unused.
        """
        level = wide(self.valid, size)[rows]
        if (level == repeated(INSIDE, size)).all():
            return
        each = np.ascontiguousarray(level).view(np.uint8).reshape(len(rows), -1)
        worst = each.min()
        if worst == OUTSIDE or store:
            lane = int(np.flatnonzero((each != INSIDE).any(1))[0])
            kind = "outside of every storage" if worst == OUTSIDE else "in a storage but outside of the tensor"
            raise Trap(f"{'store' if store else 'load'} of {size} bytes {kind}, lane {lane}, {at}")
        self.notes[f"load from a storage but outside of the tensor, {at}"] += 1

    def load(
        self, address: Any, size: int, count: int, mask: np.ndarray | None, thread: np.ndarray, at: str
    ) -> list[Any]:
        """``count`` values of ``size`` bytes for each lane. Where all lanes are on and the address is one number, each
        value is one number for all lanes.
        """
        total, lanes = size * count, len(thread)
        uniform = mask is None and np.ndim(address) == 0
        rows = self._rows(address, total, mask, 1 if uniform else lanes, at)
        self._check(rows, total, False, at)
        wide(self.read, total)[rows] = repeated(1, total)
        self._note_fresh(rows, total, thread[:1] if uniform else thread, at)
        found = self.data.view(RAW[size]).reshape(-1, count)[rows]
        return [found[0, i] if uniform else np.ascontiguousarray(found[:, i]) for i in range(count)]

    def _note_fresh(self, rows: np.ndarray, total: int, thread: np.ndarray, at: str) -> None:
        """Note a race if a loaded byte was stored by a thread of another CTA in this launch, or by another warp of the
        same CTA since its last barrier.
        """
        granule = rows[:, None] * total // 2 + np.arange(max(1, total // 2))
        owners = self.writer[granule]
        if not owners.any():
            return
        me = np.broadcast_to(thread, rows.shape)[:, None]
        cta, warp = (owners - 1) // self.threads, (owners - 1) // 32
        fresh = (cta != me // self.threads) | (
            (warp != me // 32) & (self.stamp[granule] == self.epoch[me // self.threads])
        )
        if ((owners != 0) & fresh).any():
            self.notes[f"RACE: load of what another thread stored without a barrier in between, {at}"] += 1

    def store(
        self, address: Any, values: list[Any], size: int, mask: np.ndarray | None, thread: np.ndarray, at: str
    ) -> None:
        """Store each lane's ``values`` of ``size`` bytes at its address, and note races. Raises Trap as :meth:`_check`
        says.
        """
        lanes, total = len(thread), size * len(values)
        rows = self._rows(address, total, mask, lanes, at)
        table = np.stack([np.broadcast_to(v, (lanes,)) for v in values], 1).astype(RAW[size], copy=False)
        if mask is not None:
            rows, table, thread = rows[mask], table[mask], thread[mask]
        if not len(rows):
            return
        self._check(rows, total, True, at)
        granule = rows[:, None] * total // 2 + np.arange(max(1, total // 2))
        data = self.data.view(RAW[size]).reshape(-1, len(values))
        owners = self.writer[granule]
        other = ((owners != 0) & (owners != thread[:, None] + 1)).any(1)
        if other.any():
            self._note_overlap((data[rows] != table)[other].any(), at)
        data[rows] = table
        self.writer[granule] = thread[:, None] + 1
        self.stamp[granule] = self.epoch[thread // self.threads][:, None]
        if (data[rows] != table).any():
            self._note_overlap(True, at)

    def _note_overlap(self, differs: bool, at: str) -> None:
        """Note that two threads stored to the same bytes: a race if their values differ."""
        what = "RACE: two threads store different values" if differs else "two threads store the same value"
        self.notes[f"{what}, {at}"] += 1

    def note_both_ways(self) -> None:
        """Note bytes that were both read and written: the order of CTAs would matter."""
        both = np.repeat(self.writer != 0, 2) & (self.read != 0)
        both[:16] = False
        if both.any():
            self.notes[f"bytes both read and written in one launch: {int(both.sum())}"] += 1

    def written(self, storage: int, size: int) -> bool:
        """Whether the launch stored to the storage of ``size`` bytes at the host address ``storage``."""
        start = self.where[storage]
        return bool(self.writer[start // 2 : (start + size + 1) // 2].any())


class Paged(Global):
    """Global memory that copies a page only when the kernel first touches it, for tensors larger than this machine's
    memory.

    Such tensors come from ``torch.empty``, which takes no memory before it is written. Device addresses equal host
    addresses. Strides are ignored: every byte of a storage counts as inside of a tensor.
    """

    def __init__(self, ranges: list[tuple[int, int]], ctas: int, threads: int, frames: int = 1 << 14) -> None:
        """``ranges``: (address, size in bytes) of every storage; ``frames``: how many pages there is room for."""
        self.ranges, self.frames = ranges, {}
        self._reserve(frames * PAGE, ctas, threads)
        self.where = {}

    frames: dict[int, int]  # page -> its place in data

    def device_address(self, storage: int, offset: int) -> int:
        return storage + offset

    def _frame(self, page: int) -> int:
        """The number of the copy of ``page`` in ``data``, made now if there is none yet. Raises Trap when there is no
        room for it.
        """
        if page not in self.frames:
            frame = len(self.frames) + 1
            if (frame + 1) * PAGE > self.size:
                raise Trap("too many pages touched")
            self.frames[page] = frame
            for address, size in self.ranges:
                low, high = max(address, page * PAGE), min(address + size, (page + 1) * PAGE)
                if low < high:
                    span = slice(frame * PAGE + low - page * PAGE, frame * PAGE + high - page * PAGE)
                    self.data[span] = host_bytes(low, high - low)
                    self.valid[span] = INSIDE
        return self.frames[page]

    def _rows(self, address: Any, size: int, mask: np.ndarray | None, lanes: int, at: str) -> np.ndarray:
        """As in :class:`Global`, for host addresses; copies the pages that are touched."""
        address = np.broadcast_to(address, (lanes,)) if np.ndim(address) == 0 else address
        taking = address if mask is None else address[mask]
        if (taking & np.uint64(size - 1)).any():
            raise Trap(f"misaligned access of {size} bytes, {at}")
        inside = np.zeros(len(taking), bool)
        for start, length in self.ranges:
            inside |= (taking >= np.uint64(start)) & (taking + np.uint64(size) <= np.uint64(start + length))
        if not inside.all():
            raise Trap(f"address {int(taking[~inside][0]):#x} is outside of every storage, {at}")
        pages, back = np.unique(taking // np.uint64(PAGE), return_inverse=True)
        found = np.array([self._frame(int(page)) for page in pages], np.int64)[back] * PAGE + (
            taking % np.uint64(PAGE)
        ).astype(np.int64)
        index = np.zeros(lanes, np.int64)
        index[... if mask is None else mask] = found
        return index // size

    def write_back(self) -> None:
        """Copy the pages that were written back to this process's memory."""
        for page, frame in self.frames.items():
            span = slice(frame * PAGE, (frame + 1) * PAGE)
            inside = np.flatnonzero(self.valid[span] != OUTSIDE)
            if self.writer[frame * PAGE // 2 : (frame + 1) * PAGE // 2].any() and len(inside):
                low, high = int(inside[0]), int(inside[-1]) + 1
                host_bytes(page * PAGE + low, high - low)[:] = self.data[span][low:high]
