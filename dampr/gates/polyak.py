"""Averages of parameters for evaluation (Polyak averaging; Louizos et al. 2018, section 4).

The average starts at zero, so that its bias correction is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dampr import _checks


class PolyakAverage:
    """avg <- decay avg + (1 - decay) p after each step; evaluation uses avg / (1 - decay^t).

    The published code starts the average at the initial parameters and still divides by 1 - decay^t, which gives these
    too much weight at first.

    Args:
        decay: in [0, 1); the paper's runs use 0.999 (LeNet, MLP) and 0.99 (wide residual networks).

    Call :meth:`update` after every optimizer step, with the same parameters in the same order, and evaluate within
    :meth:`applied`.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if _checks.number("decay", decay, 0, 1) == 1:
            raise ValueError(f"decay={decay!r}: expected a number in [0, 1)")
        self.decay = decay
        self.steps = 0
        self.averages: list[Tensor] = []

    @torch.no_grad()
    def update(self, parameters: Iterable[Tensor]) -> None:
        """Add one step to the average."""
        values = [p.detach() for p in parameters]
        if not self.averages:
            self.averages = [torch.zeros_like(p) for p in values]
        self._match(values)
        for average, value in zip(self.averages, values, strict=True):
            average.mul_(self.decay).add_(value, alpha=1 - self.decay)
        self.steps += 1

    @contextmanager
    def applied(self, parameters: Iterable[Tensor]) -> Iterator[None]:
        """A block in which ``parameters`` hold their averages; afterwards they have their own values again, whatever is
        raised.

        Raises: ValueError before the first update, or if the parameters are not those of the update.
        """
        held = list(parameters)
        self._match(held)
        if not self.steps:
            raise ValueError("applied() before the first update(): there is no average yet")
        own = [p.detach().clone() for p in held]
        with torch.no_grad():
            for p, average in zip(held, self.averages, strict=True):
                p.copy_(average / (1 - self.decay**self.steps))
        try:
            yield
        finally:
            with torch.no_grad():
                for p, value in zip(held, own, strict=True):
                    p.copy_(value)

    def _match(self, parameters: list[Tensor]) -> None:
        """Raise ValueError unless ``parameters`` have the shapes of the first update."""
        expected = [tuple(a.shape) for a in self.averages]
        if [tuple(p.shape) for p in parameters] != expected:
            raise ValueError(
                f"parameters: got {len(parameters)} tensors, expected the {len(expected)} of the first update, in its "
                "order and shapes"
            )
