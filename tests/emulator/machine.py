"""Instructions of several warps: wgmma of sm_90; tensor memory, tcgen05 and mbarriers of sm_100.

Operands in shared memory are given by descriptors of 64 bits. Products are summed in float64 and rounded once per
instruction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.emulator.arithmetic import RAW, bf16_to_f32, f2, f4, f8, i8, tf32, u4
from tests.emulator.memory import Trap
from tests.emulator.warps import Warps, quarters

_WGMMA_SWIZZLE = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes over which 16 byte units change places
_TCGEN05_SWIZZLE = {0: 16, 2: 128, 4: 64, 6: 32}


def numbers(raw: np.ndarray, kind: str) -> np.ndarray:
    """Operand bits as float64; ``kind`` is "tf32", "f16" or "bf16"."""
    if kind == "tf32":
        return tf32(raw).astype(f8)
    return (raw.view(f2) if kind == "f16" else bf16_to_f32(raw)).astype(f8)


def places(
    start: Any, leading: Any, stride: Any, width: int, rows: int, depth: int, size: int, transposed: bool
) -> np.ndarray:
    """The addresses (..., rows, depth) of an operand's elements in shared memory.

    ``width`` is the swizzle's period in bytes, 16 for none; ``transposed`` means that rows, not depth, is the
    contiguous axis. The strides ``leading`` and ``stride`` are those of the descriptor, in bytes.
    """
    r, k = np.arange(rows)[:, None], np.arange(depth)[None, :]
    per = width // size
    if transposed:
        by_row, by_depth = (stride, leading) if width == 16 else (leading, stride)
        address = start + r % per * size + r // per * by_row + k % 8 * width + k // 8 * by_depth
    elif width == 16:
        address = start + r % 8 * 16 + r // 8 * stride + k % per * size + k // per * leading
    else:
        address = start + r % 8 * width + r // 8 * stride + k * size
    return address ^ (((address >> 7) & (width // 16 - 1)) << 4)


class Machine(Warps):
    """A batch of CTAs with the instructions of every architecture."""

    # ---- wgmma: four warps ----

    def _described(
        self, descriptor: Any, rows: int, depth: int, size: int, transposed: bool, mask: Any, at: str
    ) -> np.ndarray:
        """The elements (warp groups, rows, depth), as raw bits, of the operand that a wgmma descriptor describes."""
        each = self.full(descriptor).reshape(-1, 128)
        taking = np.asarray(self.taking(mask).reshape(-1, 128).all(1))
        if (each != each[:, :1])[taking].any():
            raise Trap(f"a descriptor differs between threads, {at}")
        each = each[:, 0].astype(i8)
        mode = int(each[taking][0] >> 62 & 3)
        if ((each[taking] >> 62 & 3) != mode).any() or (each[taking] >> 49 & 7).any():
            raise Trap(f"not emulated: wgmma with several swizzles, or a base offset in its descriptor, {at}")
        start, leading, stride = (np.asarray(((each >> shift) & 0x3FFF) << 4)[:, None, None] for shift in (0, 16, 32))
        address = places(start, leading, stride, _WGMMA_SWIZZLE[mode], rows, depth, size, transposed)
        if np.asarray(address + size > self.shared.size)[taking].any():
            raise Trap(f"a descriptor points beyond shared memory, {at}")
        address = np.where(taking[:, None, None], address, 0)
        flat = self.shared.base.reshape(-1, 128)[:, 0][:, None, None] + address
        self.shared.read_async(np.unique(flat[taking] // 16), at)
        return self.shared.data.view(RAW[size])[flat // size]

    def wgmma(
        self, n: int, kind: str, a: Any, b: Any, scale: Any, transposed: tuple[bool, bool], c: Any, mask: Any, at: str
    ) -> list[Any]:
        """wgmma.mma_async with float32 accumulators ``c``; ``a`` is a tuple of registers or a descriptor. Returns the
        new accumulators.
        """
        self.require_whole(128, "wgmma is reached by a part of a warp group", mask, at)
        size = 4 if kind == "tf32" else 2
        depth = 32 // size
        if isinstance(a, tuple):
            left = quarters(self.tiles(a, kind)).reshape(-1, 64, depth).astype(f8)
        else:
            left = numbers(self._described(a, 64, depth, size, transposed[0], mask, at), kind)
        right = numbers(self._described(b, n, depth, size, transposed[1], mask, at), kind)
        d = np.matmul(left, right.transpose(0, 2, 1))
        shape = len(d), 4, 8, 4, n // 8, 2, 2
        before = (
            np.stack([self.full(x).view(f4) for x in c], 1)
            .reshape(shape)
            .transpose(0, 1, 5, 2, 4, 3, 6)
            .reshape(-1, 64, n)
        )
        use = self.full(scale).reshape(-1, 128)[:, 0][:, None, None]
        d = (d + np.where(use, before, f4(0))).astype(f4)
        d = d.reshape(len(d), 4, 2, 8, n // 8, 4, 2).transpose(0, 1, 3, 5, 4, 2, 6).reshape(self.lanes, n // 2)
        return [np.ascontiguousarray(d[:, i]).view(u4) for i in range(n // 2)]

    # ---- tcgen05: tensor memory, (lanes 128, columns 512) of 32 bits in each CTA; its MMA is issued by one thread ----

    def tensor_alloc(self, address: Any, mask: Any, at: str) -> None:
        """tcgen05.alloc: give each CTA all of its tensor memory, full of NaN, and store its address, 0."""
        self.tensor = np.full((self.lanes // self.threads, 128, 512), 0xFFFFFFFF, u4)
        self.busy = np.zeros(self.lanes // self.threads, bool)
        self.phases: dict[tuple[int, int], list[int]] = {}  # (CTA, address of an mbarrier) -> [count, pending, phase]
        self.shared.store(address, [u4(0)], 4, mask, at)

    def _tensor_places(
        self, address: Any, count: int, shape: str, split: int, mask: Any, verb: str, at: str
    ) -> tuple[Any, ...]:
        """(CTA, row, column, lanes that take part) of the words that a tcgen05.ld or .st reaches. Notes accesses before
        an MMA was waited for.
        """
        self.whole_warps(mask, at)
        address = self.full(address).astype(i8)
        row, column = address >> 16, address & 0xFFFF
        warp = np.arange(self.lanes) % self.threads // 32
        if shape == "32x32b":
            row = row + self.lane
        else:
            row, column = row + self.lane % 16, column + np.where(self.lane < 16, 0, split)
        taking = self.taking(mask)
        if (row // 32 != warp % 4)[taking].any() or (column + count > 512)[taking].any():
            raise Trap(f"a warp reaches for tensor memory that is not its own, {at}")
        cta = np.arange(self.lanes) // self.threads
        if self.busy[cta[taking]].any():
            self.notes[f"RACE: tensor memory {verb} before an MMA was waited for, {at}"] += 1
        return cta[taking, None], row[taking, None], column[taking, None] + np.arange(count), taking

    def tensor_load(self, address: Any, count: int, shape: str, split: int, mask: Any, at: str) -> list[np.ndarray]:
        """tcgen05.ld: ``count`` registers for each lane."""
        cta, row, column, taking = self._tensor_places(address, count, shape, split, mask, "read", at)
        out = np.zeros((self.lanes, count), u4)
        out[taking] = self.tensor[cta, row, column]
        return [np.ascontiguousarray(out[:, i]) for i in range(count)]

    def tensor_store(self, address: Any, values: Sequence[Any], shape: str, split: int, mask: Any, at: str) -> None:
        """tcgen05.st."""
        cta, row, column, taking = self._tensor_places(address, len(values), shape, split, mask, "written", at)
        self.tensor[cta, row, column] = np.stack([self.full(v) for v in values], 1)[taking]

    def _issuers(self, mask: Any, at: str) -> list[int]:
        """The lanes that issue an instruction. Raises Trap if a CTA has more than one."""
        lanes = np.flatnonzero(self.taking(mask))
        if len(np.unique(lanes // self.threads)) != len(lanes):
            raise Trap(f"more than one thread of a CTA issues, {at}")
        return [int(lane) for lane in lanes]

    def _described_in(
        self, lane: int, descriptor: int, rows: int, depth: int, size: int, transposed: bool, at: str
    ) -> np.ndarray:
        """The elements (rows, depth), as raw bits, of the operand of one CTA that a tcgen05 descriptor describes."""
        if descriptor >> 46 & 7 != 1 or descriptor >> 49 & 15 != 0:
            raise Trap(f"not emulated: tcgen05.mma with a descriptor of another version, or with a base offset, {at}")
        start, leading, stride = (((descriptor >> shift) & 0x3FFF) << 4 for shift in (0, 16, 32))
        address = places(start, leading, stride, _TCGEN05_SWIZZLE[descriptor >> 61 & 7], rows, depth, size, transposed)
        if (address + size > self.shared.size).any():
            raise Trap(f"a descriptor points beyond shared memory, {at}")
        flat = self.shared.base[lane] + address
        self.shared.read_async(np.unique(flat // 16), at)
        return self.shared.data.view(RAW[size])[flat // size]

    def tensor_mma(
        self, d: Any, a: Any, b: Any, form: Any, use: Any, kind: str, a_in_tensor: bool, mask: Any, at: str
    ) -> None:
        """tcgen05.mma with float32 accumulators in tensor memory, for each CTA; ``form`` is the instruction
        descriptor.
        """
        d, a, b, form, use = (self.full(v) for v in (d, a, b, form, use))
        for lane in self._issuers(mask, at):
            self._tensor_mma_of(
                lane, int(d[lane]), int(a[lane]), int(b[lane]), int(form[lane]), int(use[lane]), kind, a_in_tensor, at
            )

    def _tensor_mma_of(
        self, lane: int, d: int, a: int, b: int, form: int, use: int, kind: str, a_in_tensor: bool, at: str
    ) -> None:
        """:meth:`tensor_mma` of the one CTA that ``lane`` belongs to."""
        cta, size = lane // self.threads, {"f16": 2, "tf32": 4}[kind]
        n, m, depth = (form >> 17 & 63) * 8, (form >> 24 & 31) * 16, 32 // size
        if form & 15 or form >> 4 & 3 != 1 or form >> 13 & 3 or m not in (64, 128) or n % 8:
            raise Trap(f"not emulated: tcgen05.mma with the instruction descriptor {form:#x}, {at}")
        left_kind, right_kind = (
            "tf32" if kind == "tf32" else "bf16" if form >> shift & 7 == 1 else "f16" for shift in (7, 10)
        )
        lanes = np.arange(m) if m == 128 else np.arange(64) // 16 * 32 + np.arange(64) % 16
        if a_in_tensor:
            column = a & 0xFFFF
            words = np.ascontiguousarray(self.tensor[cta][lanes + (a >> 16), column : column + 8])
            left = numbers(words.view(RAW[size]), left_kind)
        else:
            left = numbers(self._described_in(lane, a, m, depth, size, bool(form >> 15 & 1), at), left_kind)
        right = numbers(self._described_in(lane, b, n, depth, size, bool(form >> 16 & 1), at), right_kind)
        place = (lanes + (d >> 16))[:, None], (d & 0xFFFF) + np.arange(n)[None, :]
        total = left @ right.T + (self.tensor[cta][place].view(f4) if use else 0.0)
        self.tensor[cta][place] = total.astype(f4).view(u4)
        self.busy[cta] = True

    # ---- mbarriers ----

    def barrier_init(self, address: Any, count: Any, mask: Any, at: str) -> None:
        """mbarrier.init: the barrier's phase completes after ``count`` arrivals."""
        for lane in self._issuers(mask, at):
            self.phases[lane // self.threads, int(self.full(address)[lane])] = [int(self.full(count)[lane])] * 2 + [0]

    def barrier_arrive(self, address: Any, mask: Any, at: str) -> None:
        """tcgen05.commit: arrive at an mbarrier. Everything issued before is done by then, as the emulator computes at
        once.
        """
        self.shared.commit_reads()
        for lane in self._issuers(mask, at):
            state = self.phases[lane // self.threads, int(self.full(address)[lane])]
            state[1] -= 1
            if state[1] == 0:
                state[1:] = [state[0], state[2] ^ 1]

    def barrier_test(self, address: Any, parity: Any, mask: Any, at: str) -> np.ndarray:
        """mbarrier.try_wait: whether the phase of ``parity`` is complete. Raises Trap where it never would be."""
        address, parity = self.full(address), self.full(parity)
        done = np.zeros(self.lanes, bool)
        for lane in map(int, np.flatnonzero(self.taking(mask))):
            done[lane] = self.phases[lane // self.threads, int(address[lane])][2] != int(parity[lane]) & 1
            if done[lane]:
                self.busy[lane // self.threads] = False
        if not (done if mask is None else done[mask]).all():
            raise Trap(f"waits for an mbarrier that nothing will complete, {at}")
        self.shared.wait_reads(0)
        return done
