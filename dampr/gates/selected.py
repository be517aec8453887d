"""Some gates of a vector, for layers that have lost the units of the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .base import Gate


class SelectedGate(Gate):
    """The gates ``kept`` of another vector of gates: z = source(...)[..., kept].

    :class:`dampr.Shrinker` puts a SelectedGate in place of a gate vector once the closed units of the vector have
    left the layers. The whole vector stays in ``source``. Its family therefore computes and draws the same values as
    before, and a budget continues with the same numbering of gates. A ``state_dict`` holds the whole vector under its
    old names.

    Args:
        source: the whole vector of gates, of any family.
        kept: the indices of the gates that are left, int64, (num_gates,), increasing.

    Attributes:
        source: the whole vector of gates.
        kept: as the argument. It is not a buffer, because code that averages buffers would average indices.
    """

    def __init__(self, source: Gate, kept: Tensor) -> None:
        super().__init__(len(kept))
        self.source = source
        self.kept = kept.to(source.device, copy=True)
        self.training = source.training
        self.draws_once = source.draws_once

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SelectedGate:
        super()._apply(fn, recurse)
        self.kept = self.kept.to(self.source.device)
        return self

    def forward(self, rows: int | None = None) -> Tensor:
        """Gate values, (num_gates,), or (rows, num_gates) with one draw for each of ``rows`` rows."""
        return self.source.forward(rows)[..., self.kept]

    def deterministic(self) -> Tensor:
        """The gate values in evaluation, (num_gates,), in either mode."""
        return self.source.deterministic()[self.kept]

    def open_probability(self) -> Tensor:
        return self.source.open_probability()[self.kept]

    def is_open(self) -> Tensor:
        return self.source.is_open()[self.kept]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.source.reset_parameters()

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        return self.source.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        for name, module in list(self.source.named_modules()):
            own = f"{prefix}{name}." if name else prefix
            module._load_from_state_dict(state_dict, own, local_metadata, *args)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"{self.num_gates} of {self.source.num_gates}"


def whole(gate: Gate) -> Gate:
    """The whole vector of a :class:`SelectedGate`; any other gate unchanged."""
    return gate.source if isinstance(gate, SelectedGate) else gate
