"""Runs a translated function over a grid of CTAs.

Threads advance in lock step. Where they diverge, those that are furthest behind in the text go first, so that they meet
again at joins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.emulator.machine import Machine
from tests.emulator.memory import Global, Trap
from tests.emulator.meter import Meter
from tests.emulator.program import Program
from tests.emulator.ptx import Instruction

Grid = tuple[int, int, int]


def run(
    program: Program,
    grid: Grid,
    values: Sequence[Any],
    memory: Global,
    shared: int,
    approximate: int | None = None,
    order: np.random.Generator | None = None,
    ctas: np.ndarray | None = None,
    lanes: int = 4096,
    meter: Meter | None = None,
) -> Counter[str]:
    """Run all CTAs, or ``ctas`` of them, some ``lanes`` threads at a time; returns notes.

    ``values``: numpy scalars of the parameters, unsigned; ``shared``: bytes of each CTA; ``order`` shuffles CTAs;
    ``meter`` counts.
    """
    function = program.function
    parameters = {name: value for (name, _), value in zip(function.params, values, strict=True)}
    count = grid[0] * grid[1] * grid[2]
    if ctas is None:
        ctas = np.arange(count) if order is None else order.permutation(count)
    notes: Counter[str] = Counter()
    step = max(1, lanes // function.threads)
    with np.errstate(all="ignore"):
        for first in range(0, len(ctas), step):
            machine = Machine(memory, ctas[first : first + step], grid, function.threads, shared, approximate, meter)
            Batch(program, machine, parameters).run()
            notes += machine.notes + machine.shared.notes
    return notes


class Batch:
    """The scheduler of CTAs that run together: which threads go on at which block."""

    def __init__(self, program: Program, machine: Machine, parameters: dict[str, Any]) -> None:
        self.program, self.machine, self.parameters = program, machine, parameters
        self.registers = program.fresh_registers()
        self.waiting: dict[int, np.ndarray | None] = {0: None}  # block -> its threads, None: all
        self.parked: dict[int, np.ndarray] = {}  # at a barrier, by the block behind it

    def run(self) -> None:
        while self.waiting or self.parked:
            if not self.waiting:
                where = [self.program.function.instructions[place].where for place in self.parked]
                raise Trap(f"deadlock: a barrier is reached by a part of a CTA, before {where}")
            start = min(self.waiting)
            mask = self.waiting.pop(start)
            taken = self.program.block(start, mask is not None)(self.registers, self.machine, mask, self.parameters)
            end = self.program.ends[start]
            if self.machine.meter is not None:
                self.machine.meter.instructions(end - start, mask, self.machine.lanes)
            self._leave(self.program.function.instructions[end - 1], end, mask, taken)

    def _add(self, block: int, mask: np.ndarray | None) -> None:
        before = self.waiting.get(block)
        if mask is not None and before is not None:
            mask = before | mask
        self.waiting[block] = None if mask is None or mask.all() else mask

    def _leave(self, last: Instruction, end: int, mask: np.ndarray | None, taken: Any) -> None:
        """Where threads go from the end of a block, ``last`` its last instruction and ``taken`` its condition."""
        if last.operation in ("ret", "exit"):
            if last.guard is not None:
                raise Trap(f"not emulated: {last.text}, a conditional return, {last.where}")
            if mask is not None:
                self.machine.alive &= ~mask
        elif last.operation == "bra":
            self._branch(last, end, mask, taken)
        elif last.is_barrier:
            self._arrive(end, mask)
        else:
            self._add(end, mask)

    def _branch(self, last: Instruction, end: int, mask: np.ndarray | None, taken: Any) -> None:
        target = self.program.function.labels[last.operands[0]]
        if last.guard is None:
            self._add(target, mask)
        elif np.ndim(taken) == 0:
            self._add(target if taken else end, mask)
        else:
            if self.machine.meter is not None:
                self.machine.meter.branch(taken, mask)
            for block, going in ((target, taken), (end, ~taken)):
                going = going if mask is None else going & mask
                if going.any():
                    self._add(block, going)

    def _arrive(self, end: int, mask: np.ndarray | None) -> None:
        """Threads wait at a barrier until all of their CTA that are alive are there."""
        if mask is None:
            self.machine.barrier(None)
            self._add(end, None)
            return
        self.parked[end] = self.parked[end] | mask if end in self.parked else mask
        threads = self.program.function.threads
        arrived = np.logical_or.reduce(list(self.parked.values())).reshape(-1, threads)
        whole = np.repeat((arrived | ~self.machine.alive.reshape(arrived.shape)).all(1) & arrived.any(1), threads)
        if not whole.any():
            return
        self.machine.barrier(whole & self.machine.alive)
        for place, threads_there in list(self.parked.items()):
            if (threads_there & whole).any():
                self._add(place, threads_there & whole)
            self.parked[place] = threads_there & ~whole
            if not self.parked[place].any():
                del self.parked[place]
