"""What a gate has for all calls of a block, and again where a checkpointed region of it runs after its end."""

from __future__ import annotations

import math
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from . import recomputed

KEPT = 64  # blocks with a reentrant checkpoint whose backward may be outstanding


class _Block:
    """One block, and the checkpointed regions that ran in it."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self.first: float = torch._C._autograd._get_sequence_nr()  # its place in the order of autograd's nodes
        self.last = math.inf
        self.around = WeakSet(region for region, _ in recomputed.regions())
        self.within: WeakSet[Any] = WeakSet()
        self.may_reenter = False

    def note(self) -> None:
        for region, again in recomputed.regions():
            if again is not None:
                break
            if region not in self.around:
                self.within.add(region)
        self.may_reenter |= not torch.is_grad_enabled()

    def is_over(self) -> bool:
        return not self.within and not self.may_reenter


class Held:
    """The value of one gate in the open block, if there is one, and in those before it whose regions may run again.

    Which block a repeated call belongs to follows from its region, so a backward may come when the block is over, or in
    another block. Not known are reentrant regions inside of reentrant regions: their backward has to be in the block.
    """

    value: Tensor | None = None

    def __init__(self) -> None:
        self._open: _Block | None = None
        self._ended: list[_Block] = []

    def begin(self, value: Tensor) -> None:
        self.value, self._open = value, _Block(value)

    def end(self) -> bool:
        """Close the block. Returns whether nothing of it, or of those before, can be asked for again."""
        assert self._open is not None
        self._open.last = torch._C._autograd._get_sequence_nr()
        blocks = [block for block in (*self._ended, self._open) if not block.is_over()]
        self._ended = blocks[-KEPT:]
        self.value = self._open = None
        return not self._ended

    def get(self) -> Tensor | None:
        """The value for this call; None where it is in no block."""
        if torch.compiler.is_compiling():
            return self.value
        block = self._block_of_repeated() if recomputed.any_region() else self._open
        if block is None:
            return None
        block.note()
        return block.value

    def _block_of_repeated(self) -> _Block | None:
        """The block that a call in a region had when the region ran first: the open one where it runs first now."""
        blocks = [*self._ended, *([] if self._open is None else [self._open])]
        for region, again in recomputed.regions():
            if again is not None:
                return next((block for block in blocks if region in block.within), None)
        key = recomputed.region_by_node()
        if key is None:
            return self._open
        found = next((block for block in blocks if block.first <= key[0] < block.last), None)
        if found is not None and found.value.requires_grad:  # the region's backward would go through its graph, again
            raise RuntimeError("a reentrant checkpoint repeats a draw of a GateBank: expected use_reentrant=False")
        return found
