"""Residual: the plain module that compaction makes of a residual branch with a gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """y = x + scale * branch(x), the plain form of :class:`GatedResidual`.

    ``scale`` is a buffer of one element, or None for 1.
    """

    scale: Tensor | None

    def __init__(self, branch: nn.Module, scale: Tensor | None = None) -> None:
        super().__init__()
        self.branch = branch
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.branch(x, *args, **kwargs)
        return x + y if self.scale is None else add_scaled(x, y, self.scale)


def add_scaled(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """x + z y, computed in the dtype of the gate z and returned in that of x + y."""
    return torch.addcmul(x, y, z).to(torch.promote_types(x.dtype, y.dtype))
