"""Maps dense layers to the gated layers that replace them, and to the gates that these get."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dampr.gates import DependencyGenerator, make_gate
from dampr.nn import GatedHeads
from dampr.nn.base import VECTOR_GRANULARITIES, Granularity

from . import attributes, heads, hooks
from .layers.registry import KINDS, kind_of

REPLACEMENT = {dense for kind in KINDS if not kind.normalises for dense, _ in kind.twins}
NORMS = {dense for kind in KINDS if kind.batch_statistics for dense, _ in kind.twins}


def precise(gate: Any, model: nn.Module) -> Any:
    """``gate``, which makes its parameters in float64 if the model is float64.

    Gates in float32 would be less exact than the rest of the model and the check of compaction.
    """
    return (lambda count, device=None: make_gate(gate, count, device).double()) if is_double(model) else gate


def is_double(model: nn.Module) -> bool:
    """Whether a model has parameters in float64."""
    return any(p.dtype == torch.float64 for p in model.parameters())


def gate_count(layer: nn.Module, granularity: Granularity) -> int:
    """How many gates a layer has at this granularity."""
    count: int = kind_of(layer).twin(layer).gates_for(layer, granularity)
    return count


def gated_layer(
    layer: Any, gate: Any, granularity: Granularity, per_sample: bool, of_heads: heads.Attention | None
) -> nn.Module:
    """The gated layer made of ``layer``, with its hooks and attributes.

    ``of_heads``: given if the layer is the output projection of this attention, whose heads then have the gates.
    """
    gated: nn.Module
    if of_heads is not None:
        weights = of_heads.weights_per_head()
        gated = GatedHeads.from_dense(layer, gate=gate, heads=of_heads.heads, weights_per_gate=weights)
    else:
        gated = kind_of(layer).gated(layer, gate, granularity, per_sample)
    hooks.share(layer, gated)
    attributes.carry(layer, gated)
    return gated


def device_of(model: nn.Module) -> torch.device | None:
    """The device of the first parameter; None without parameters."""
    return next((p.device for p in model.parameters()), None)


def starts_at_one(gate: Any) -> bool:
    """Whether fresh gates are 1 in evaluation."""
    return is_generator(gate) or bool((make_gate(gate, 1).deterministic() == 1).all())


def is_generator(gate: Any) -> bool:
    """Whether ``gate`` means the Dep-L0 generator, which makes the gates of all layers together."""
    return gate == "dep_l0" or getattr(gate, "func", gate) is DependencyGenerator


def draws_each(gate: Any, granularity: Granularity, residual: bool) -> bool:
    """Whether gates are drawn for each sample by default: the family is published so, and gates in this place
    can be.
    """
    return is_generator(gate) and granularity in VECTOR_GRANULARITIES and not residual
