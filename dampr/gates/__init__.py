"""Gate families: small modules that own the gate parameters and say when a gate is open.

Equations: :mod:`dampr.spec`.
"""

from .base import Gate
from .dependent import DependencyGenerator, DependentHardConcrete
from .differentiable_mask import DifferentiableMask, foothill, geometric_slope, scale_penalty, square_penalty
from .diffprune import DiffPrune
from .discriminative import DiscriminativeMask, dam_penalty
from .draws import gate_generator, hold_draws
from .families import FAMILIES, GateLike, make_gate, place_gate
from .fixed import Fixed
from .hard_concrete import PRESETS, PUBLISHED, HardConcrete
from .owned import OwnedGate, SteppedGate
from .polyak import PolyakAverage
from .selected import SelectedGate

__all__ = [
    "FAMILIES",
    "PRESETS",
    "PUBLISHED",
    "DependencyGenerator",
    "DependentHardConcrete",
    "DiffPrune",
    "DifferentiableMask",
    "DiscriminativeMask",
    "Fixed",
    "Gate",
    "GateLike",
    "HardConcrete",
    "OwnedGate",
    "PolyakAverage",
    "SelectedGate",
    "SteppedGate",
    "dam_penalty",
    "foothill",
    "gate_generator",
    "geometric_slope",
    "hold_draws",
    "make_gate",
    "place_gate",
    "scale_penalty",
    "square_penalty",
]
