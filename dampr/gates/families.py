"""The gate families by name, and how a gate is made from what a user gives: a name, a class, an instance or a
function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dampr import _checks, names

from .base import Gate
from .dependent import DependentHardConcrete
from .differentiable_mask import DifferentiableMask
from .diffprune import DiffPrune
from .discriminative import DiscriminativeMask
from .hard_concrete import HardConcrete

GateLike = names.Family | type[Gate] | Gate
"""The type of a layer's argument ``gate``: a family's name, a class, or an instance to share."""
FAMILIES: dict[str, type[Gate]] = {
    "hard_concrete": HardConcrete,
    "dep_l0": DependentHardConcrete,
    "dam": DiscriminativeMask,
    "diffprune": DiffPrune,
    "diffmask": DifferentiableMask,
}


def place_gate(gate: GateLike | Callable[..., Any], num_gates: int, device: Any, per_sample: bool) -> Gate:
    """:func:`make_gate` for a layer. Raises ValueError if gates should be drawn per sample and the family draws once
    per call.
    """
    made = make_gate(gate, num_gates, device)
    if _checks.flag("per_sample", per_sample) and made.draws_once:
        raise ValueError(f"per_sample=True with {made}: expected False, because such gates draw once per call")
    return made


def make_gate(
    gate: GateLike | Callable[..., Any],
    num_gates: int,
    device: torch.device | str | None = None,
) -> Gate:
    """A gate with ``num_gates`` gates.

    ``gate``: a family's name; a class; an instance, which is returned; or a function of (num_gates, device=...) that
    makes a gate.

    Raises: ValueError for an unknown name, or an instance with another number of gates; TypeError for anything else.
    """
    num_gates = _checks.positive_int("num_gates", num_gates)
    if isinstance(gate, Gate):
        if gate.num_gates != num_gates:
            raise ValueError(
                f"gate.num_gates={gate.num_gates}: expected {num_gates}, one per prunable unit of the layer"
            )
        return gate
    if isinstance(gate, str):
        _checks.one_of("gate", gate, sorted(FAMILIES))
        return FAMILIES[gate].for_layer(num_gates, device)
    if isinstance(gate, type) and issubclass(gate, Gate):
        return gate.for_layer(num_gates, device)
    if callable(gate) and not isinstance(gate, nn.Module):
        build: Any = gate
        try:
            made = build(num_gates, device=device)
        except TypeError as error:
            raise TypeError(
                f"gate={gate!r:.80}: expected a function of (num_gates, device=...), and it raises {error}"
            ) from error
        if not isinstance(made, Gate) or made.num_gates != num_gates:
            raise TypeError(f"gate={gate!r}: made {made!r:.80}, expected a dampr.gates.Gate of {num_gates}")
        return made
    raise TypeError(
        f"gate={gate!r:.80}: expected a family's name {sorted(FAMILIES)}, a subclass of dampr.gates.Gate, an instance "
        "to share, or a "
        "function"
    )
