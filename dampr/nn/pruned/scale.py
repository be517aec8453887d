"""Scale: what compaction leaves of gates on an activation that are not all 1."""

from __future__ import annotations

from torch import Tensor, nn

from dampr import reference


class Scale(nn.Module):
    """y = x * scale along dimension ``dim``: what is left of a :class:`GatedActivation` when it is compacted and its
    values are not all 1.

    ``scale`` is a buffer, (x.shape[dim],).
    """

    scale: Tensor

    def __init__(self, scale: Tensor, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("scale", scale)

    @property
    def num_features(self) -> int:
        """The size of that dimension."""
        return self.scale.numel()

    def forward(self, x: Tensor) -> Tensor:
        return (x * reference.along(self.scale, x, self.dim)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_features}, dim={self.dim}"
