"""Scale: a constant factor for each channel, which replaces gates on an activation when a model is compacted."""

from __future__ import annotations

from torch import Tensor, nn

from dampr import reference


class Scale(nn.Module):
    """y = x * scale along dimension ``dim``; it replaces a :class:`GatedActivation` whose open gates are not all 1 when
    a model is compacted.

    Args:
        scale: the factors, a floating-point tensor (x.shape[dim],); kept as a buffer.
        dim: the dimension of x that they multiply.
    """

    scale: Tensor

    def __init__(self, scale: Tensor, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("scale", scale)

    @property
    def num_features(self) -> int:
        """The number of factors, x.shape[dim]."""
        return self.scale.numel()

    def forward(self, x: Tensor) -> Tensor:
        return (x * reference.along(self.scale, x, self.dim)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_features}, dim={self.dim}"
