"""The threads of a batch of CTAs: special registers, memory accesses, and instructions of one warp.

State is kept in numpy arrays with an element for each thread ("lane") of the batch. A value is such an array, or one
number where all threads agree. ``mask`` says which threads take part, None that all do; ``at`` is the place in the
source, for messages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.emulator import arithmetic
from tests.emulator.arithmetic import bf16_to_f32, f2, f4, f8, i8, tf32, u1, u2, u4, u8
from tests.emulator.memory import Global, Trap
from tests.emulator.meter import Meter
from tests.emulator.shared import Shared

_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "max": np.max,
    "min": np.min,
    "add": np.sum,
    "and": np.bitwise_and.reduce,
    "or": np.bitwise_or.reduce,
}


class Warps:
    """Special registers, memory and the instructions of one warp."""

    def __init__(
        self,
        memory: Global,
        ctas: np.ndarray,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        approximate: int | None = None,
        meter: Meter | None = None,
    ) -> None:
        """``ctas``: numbers of those that run; ``shared``: bytes for each;
        ``approximate``: see :func:`arithmetic.inexact`.
        """
        self.memory, self.approximate, self.meter, self.notes = memory, approximate, meter, Counter[str]()
        self.threads, self.lanes = threads, len(ctas) * threads
        flat = np.repeat(ctas.astype(u8), threads)
        axes = flat % u8(grid[0]), flat // u8(grid[0]) % u8(grid[1]), flat // u8(grid[0] * grid[1])
        self.ctaid = tuple(axis.astype(u4) for axis in axes)
        self.nctaid = tuple(u4(g) for g in grid)
        self.tid = np.tile(np.arange(threads, dtype=u4), len(ctas))
        self.thread = np.repeat(ctas.astype(i8), threads) * threads + self.tid.astype(i8)
        self.lane = np.arange(self.lanes, dtype=i8) % 32
        self.first = np.arange(self.lanes, dtype=i8) - self.lane  # the first lane of each lane's warp
        self.shared = Shared(len(ctas), shared, threads)
        self.alive = np.ones(self.lanes, bool)

    def full(self, x: Any) -> np.ndarray:
        """A value as an array over all lanes."""
        return np.broadcast_to(x, (self.lanes,)) if np.ndim(x) == 0 else x

    def taking(self, mask: np.ndarray | None) -> np.ndarray:
        """A mask as an array over all lanes."""
        return np.ones(self.lanes, bool) if mask is None else mask

    def require_whole(self, size: int, what: str, mask: np.ndarray | None, at: str) -> None:
        """Trap unless groups of ``size`` threads, a warp or more, take part as a whole."""
        if mask is not None:
            groups = mask.reshape(-1, size)
            if (groups.any(1) != groups.all(1)).any():
                raise Trap(f"{what}, {at}")

    def whole_warps(self, mask: np.ndarray | None, at: str) -> None:
        """Trap unless every warp takes part as a whole or not at all."""
        self.require_whole(32, "a warp-wide instruction is reached by a part of a warp", mask, at)

    def inexact(self, x: Any, operation: str) -> Any:
        """See :func:`arithmetic.inexact`, with this machine's seed."""
        return arithmetic.inexact(x, operation, self.approximate)

    # ---- memory ----

    def load_global(self, address: Any, size: int, count: int, mask: Any, at: str) -> list[Any]:
        if self.meter is not None:
            self.meter.memory("read", address, size * count, mask, self.lanes)
        return self.memory.load(address, size, count, mask, self.thread, at)

    def store_global(self, address: Any, values: list[Any], size: int, mask: Any, at: str) -> None:
        if self.meter is not None:
            self.meter.memory("written", address, size * len(values), mask, self.lanes)
        self.memory.store(address, values, size, mask, self.thread, at)

    def load_shared(self, address: Any, size: int, count: int, mask: Any, at: str) -> list[np.ndarray]:
        if self.meter is not None:
            self.meter.shared(address, size * count, mask, self.lanes)
        return self.shared.load(address, size, count, mask, at)

    def store_shared(self, address: Any, values: list[Any], size: int, mask: Any, at: str) -> None:
        if self.meter is not None:
            self.meter.shared(address, size * len(values), mask, self.lanes)
        self.shared.store(address, values, size, mask, at)

    def copy_async(self, target: Any, source: Any, size: int, filled: Any, mask: Any, at: str) -> None:
        """cp.async: copy ``size`` bytes from global memory to shared memory in each lane, or fill with zeros where
        ``filled`` is 0. Raises Trap for a ``filled`` in between.
        """
        filled, source, taking = self.full(filled), self.full(source), self.taking(mask)
        if ((filled != size) & (filled != 0) & taking).any():
            raise Trap(f"not emulated: cp.async of a part of its size, {at}")
        table, whole = np.zeros((self.lanes, size), u1), taking & (filled == size)
        if whole.any():
            unit = min(size, 8)
            words = self.load_global(source, unit, size // unit, whole, at)
            table[whole] = np.stack(words, 1)[whole].view(u1).reshape(-1, size)
        self.shared.copy(self.full(target), table, size, mask, at)

    def barrier(self, mask: Any) -> None:
        """Let the CTAs of ``mask`` pass a barrier, of shared and of global memory."""
        self.shared.barrier(mask)
        self.memory.epoch[np.unique((self.thread if mask is None else self.thread[mask]) // self.threads)] += 1

    # ---- what the threads of a warp exchange ----

    def shuffle(self, how: str, x: Any, b: Any, c: Any, mask: Any, at: str) -> tuple[np.ndarray, np.ndarray]:
        """shfl.sync: (the values of each lane's source lane, whether the source is in range)."""
        x, b, c = (self.full(v).astype(i8) for v in (x, b, c))
        clamp, segment = c & 31, (c >> 8) & 31
        lowest, highest = self.lane & segment, (self.lane & segment) | (clamp & ~segment)
        sources = {
            "bfly": self.lane ^ b,
            "idx": lowest | (b & ~segment & 31),
            "down": self.lane + b,
            "up": self.lane - b,
        }
        source = sources[how]
        valid = source >= highest if how == "up" else source <= highest
        source = np.where(valid, source, self.lane)
        if mask is not None and (mask & ~mask[self.first + source]).any():
            raise Trap(f"shuffle from a thread that does not take part, {at}")
        return x[self.first + source].astype(u4), valid

    def reduce_warp(self, how: str, x: Any, mask: Any, at: str) -> np.ndarray:
        """redux.sync: one result over the 32 values of each warp, given to each of its lanes."""
        self.whole_warps(mask, at)
        rows = self.full(x).reshape(-1, 32)
        return np.repeat(_REDUCTIONS[how](rows, axis=1).astype(rows.dtype), 32)

    def vote(self, how: str, p: Any, mask: Any) -> np.ndarray:
        """vote.sync over the predicates ``p`` of each warp: ``how`` is "any", "all" or "ballot" (a bit for each
        lane).
        """
        rows, taking = self.full(p).reshape(-1, 32), self.taking(mask).reshape(-1, 32)
        if how == "ballot":
            return np.repeat(((rows & taking) * (u8(1) << np.arange(32, dtype=u8))).sum(1).astype(u4), 32)
        return np.repeat((rows & taking).any(1) if how == "any" else (rows | ~taking).all(1), 32)

    # ---- mma.sync and the loads and stores that feed it ----

    def _meter_matrix(self, address: Any, count: int, mask: Any, at: str) -> None:
        """Count the accesses of an ldmatrix or stmatrix, for which eight lanes give the row addresses of each
        matrix.
        """
        self.whole_warps(mask, at)
        if self.meter is not None:
            self.meter.shared(address, 16, self.taking(mask) & (self.lane < 8 * count), self.lanes)

    def load_matrix(self, address: Any, count: int, transposed: bool, mask: Any, at: str) -> list[np.ndarray]:
        """ldmatrix of ``count`` 8 x 8 matrices of 16 bits."""
        self._meter_matrix(address, count, mask, at)
        address, group, pair = self.full(address), self.lane // 4, self.lane % 4
        found = []
        for i in range(count):
            if not transposed:
                row = address[self.first + 8 * i + group]
                found += self.shared.load(row + (4 * pair).astype(u4), 4, 1, mask, at)
                continue
            halves = []
            for half in range(2):
                row = address[self.first + 8 * i + 2 * pair + half]
                halves.append(self.shared.load(row + (2 * group).astype(u4), 2, 1, mask, at)[0].astype(u4))
            found.append(halves[0] | (halves[1] << u4(16)))
        return found

    def store_matrix(self, address: Any, words: list[Any], transposed: bool, mask: Any, at: str) -> None:
        """stmatrix: store 8 x 8 matrices of 16 bits, one for each of ``words``."""
        self._meter_matrix(address, len(words), mask, at)
        address, group, pair = self.full(address), self.lane // 4, self.lane % 4
        for i, word in enumerate(words):
            if not transposed:
                self.shared.store(address[self.first + 8 * i + group] + (4 * pair).astype(u4), [word], 4, mask, at)
                continue
            for half in range(2):
                row = address[self.first + 8 * i + 2 * pair + half] + (2 * group).astype(u4)
                self.shared.store(row, [(word >> u4(16 * half)).astype(u2)], 2, mask, at)

    def tiles(self, words: Sequence[Any], kind: str) -> list[np.ndarray]:
        """Operand registers of a matrix product as float32 tiles (warps, 8, values in 16 bytes), one for each register.
        Lane l holds values of row l / 4.
        """
        found = []
        for word in words:
            word = np.ascontiguousarray(self.full(word))
            if kind == "tf32":
                found.append(tf32(word).reshape(-1, 8, 4))
            elif kind == "f16":
                found.append(word.view(f2).astype(f4).reshape(-1, 8, 8))
            else:
                found.append(bf16_to_f32(word.view(u2)).reshape(-1, 8, 8))
        return found

    def mma(
        self, kind: str, a: Sequence[Any], b: Sequence[Any], c: Sequence[Any], mask: Any, at: str
    ) -> list[np.ndarray]:
        """mma.sync of 16 x 8 outputs with float32 accumulators; products are summed in float64 and rounded once."""
        self.whole_warps(mask, at)
        tiles = self.tiles(a, kind)
        left = np.concatenate(tiles, 1) if len(tiles) == 2 else quarters(tiles)
        right = np.concatenate(self.tiles(b, kind), 2)
        sums = [np.ascontiguousarray(self.full(x)).view(f4).reshape(-1, 8, 4) for x in c]
        before = np.concatenate([np.stack(sums[i : i + 2], -1).reshape(-1, 8, 8) for i in (0, 2)], 1)
        d = np.matmul(left.astype(f8), right.astype(f8).transpose(0, 2, 1))
        d = (d + before).astype(f4).reshape(-1, 2, 8, 4, 2)
        return [
            np.ascontiguousarray(d[:, half, :, :, one]).reshape(-1).view(u4) for half in range(2) for one in range(2)
        ]


def quarters(tiles: Sequence[np.ndarray]) -> np.ndarray:
    """Four tiles (warps, 8, columns), given column by column, put together to one (warps, 16, 2 columns)."""
    return np.concatenate([np.concatenate((tiles[0], tiles[2]), 2), np.concatenate((tiles[1], tiles[3]), 2)], 1)
