"""Runs a translated PTX function over a grid of CTAs.

All threads of a batch of CTAs advance in lock step, block by block of the program. Where threads diverge at a branch,
the scheduler first runs those whose next block stands earliest in the text, so that they meet the others again where
the branches join.
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
    """Run all CTAs, or those whose numbers are in ``ctas``, some ``lanes`` threads at a time. Returns the notes with
    their counts.

    ``values`` are numpy scalars (unsigned) of the parameters; ``shared`` is the shared memory of each CTA in bytes;
    ``order`` draws the order of CTAs; ``meter`` counts what they do.
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
    """The scheduler of CTAs that run together: it decides which threads run which block next."""

    def __init__(self, program: Program, machine: Machine, parameters: dict[str, Any]) -> None:
        self.program, self.machine, self.parameters = program, machine, parameters
        self.registers = program.fresh_registers()
        self.waiting: dict[int, np.ndarray | None] = {0: None}  # block -> its threads, None: all
        self.parked: dict[int, np.ndarray] = {}  # at a barrier, by the block behind it

    def run(self) -> None:
        """Run blocks until every thread has returned. Raises Trap when threads wait at a barrier that the others never
        reach.
        """
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
        """Let the threads of ``mask`` (None: all) wait for their turn at ``block``, together with those that wait there
        already.
        """
        before = self.waiting.get(block)
        if mask is not None and before is not None:
            mask = before | mask
        self.waiting[block] = None if mask is None or mask.all() else mask

    def _leave(self, last: Instruction, end: int, mask: np.ndarray | None, taken: Any) -> None:
        """Send the threads of a finished block to where they go next. ``last`` is its last instruction, ``taken`` its
        condition.
        """
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
        """Send threads to the target of a branch or to the block behind it, each as its condition says."""
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
        """Let the threads of ``mask`` wait at a barrier; those of a CTA go on once all of its threads that
        have not returned have arrived.
        """
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
