"""A value that a gate uses for all calls in a block, and again when a checkpointed region of the block runs a second
time after its end.
"""

from __future__ import annotations

import math
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from . import recomputed

KEPT = 64  # the number of ended blocks that are remembered: a reentrant checkpoint in them may still run its backward


class _Block:
    """One block: its value, and the checkpointed regions that ran in it.

    Attributes:
        first, last: autograd's sequence numbers at the beginning and at the end; nodes made in the block lie between.
        around: the regions around the block.
        within: the regions that began in the block.
        may_reenter: whether a call ran without gradients, as in a reentrant checkpoint.
    """

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self.first: float = torch._C._autograd._get_sequence_nr()
        self.last = math.inf
        self.around = WeakSet(region for region, _ in recomputed.regions())
        self.within: WeakSet[Any] = WeakSet()
        self.may_reenter = False

    def note(self) -> None:
        """Note the regions around a call in this block."""
        for region, again in recomputed.regions():
            if again is not None:
                break
            if region not in self.around:
                self.within.add(region)
        self.may_reenter |= not torch.is_grad_enabled()

    def is_over(self) -> bool:
        """Whether no region of this block can run a second time."""
        return not self.within and not self.may_reenter


class Held:
    """The value of one gate in the open block, and in ended blocks whose regions may run a second time.

    The region of a repeated call says which block it belongs to, so the backward may run after the block, or in another
    block. For reentrant regions inside of reentrant regions this is not known; their backward has to run in the block.
    """

    value: Tensor | None = None

    def __init__(self) -> None:
        self._open: _Block | None = None
        self._ended: list[_Block] = []

    def begin(self, value: Tensor) -> None:
        """Open a block in which calls get ``value``."""
        self.value, self._open = value, _Block(value)

    def end(self) -> bool:
        """Close the block; returns whether no call can ask for a value of this block, or of an earlier one, any
        more.
        """
        assert self._open is not None
        self._open.last = torch._C._autograd._get_sequence_nr()
        blocks = [block for block in (*self._ended, self._open) if not block.is_over()]
        self._ended = blocks[-KEPT:]
        self.value = self._open = None
        return not self._ended

    def get(self) -> Tensor | None:
        """The value for this call; None if the call belongs to no block."""
        if torch.compiler.is_compiling():
            return self.value
        block = self._block_of_repeated() if recomputed.any_region() else self._open
        if block is None:
            return None
        block.note()
        return block.value

    def _block_of_repeated(self) -> _Block | None:
        """The block to which a call in a checkpointed region belongs: the block of the region's first run."""
        blocks = [*self._ended, *([] if self._open is None else [self._open])]
        for region, again in recomputed.regions():
            if again is not None:
                return next((block for block in blocks if region in block.within), None)
        key = recomputed.region_by_node()
        if key is None:
            return self._open
        found = next((block for block in blocks if block.first <= key[0] < block.last), None)
        # the region's backward would go through the graph of the value a second time
        if found is not None and found.value.requires_grad:
            raise RuntimeError("a reentrant checkpoint repeats a draw of a GateBank: expected use_reentrant=False")
        return found
