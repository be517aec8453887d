"""Gates with constant values, after all decisions."""

from __future__ import annotations

import torch
from torch import Tensor

from dampr import _checks

from .base import Gate


class Fixed(Gate):
    """Gates with constant values, the same in training and in evaluation: what :meth:`dampr.Budget.finalize` leaves of
    any family.

    Args:
        values: (num_gates,), floating point; 0 is closed. Kept as a buffer in float32 (float64 stays).

    Raises: ValueError or TypeError that names the argument.

    >>> Fixed(torch.tensor([1.0, 0.0, 0.5])).is_open()
    tensor([ True, False,  True])
    """

    values: Tensor

    def __init__(self, values: Tensor) -> None:
        if _checks.tensor("values", values).dim() != 1 or not values.is_floating_point():
            raise ValueError(
                f"values: got {values.dtype} of shape {tuple(values.shape)}, expected floating point of shape "
                "(num_gates,)"
            )
        super().__init__(values.numel())
        self.register_buffer("values", values.detach().to(torch.promote_types(values.dtype, torch.float32), copy=True))

    def forward(self, rows: int | None = None) -> Tensor:
        rows = _checks.rows(rows)
        return self.values if rows is None else self.values.expand(rows, -1)

    def open_probability(self) -> Tensor:
        """1 where a gate is open, else 0; no gradient."""
        return (self.values != 0).to(self.values.dtype)
