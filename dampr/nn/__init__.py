"""Drop-in gated layers. Each takes the arguments of the ``torch.nn`` layer it replaces, in its order, then gate keywords."""

from .base import GatedLayer
from .linear import GatedLinear

__all__ = ["GatedLayer", "GatedLinear"]
