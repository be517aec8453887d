"""Gate families: small modules that own the gate parameters and say when a gate is open. Equations: :mod:`dampr.spec`."""

from .base import Gate, make_gate
from .hard_concrete import PRESETS, HardConcrete
from .polyak import PolyakAverage

__all__ = ["PRESETS", "Gate", "HardConcrete", "PolyakAverage", "make_gate"]
