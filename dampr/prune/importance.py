"""The importance of a unit without training its gate: the norm of its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dampr.nn.rnn import GatedRecurrent

from .layers.registry import kind_of
from .structure import Structure
from .unit_structure import UnitStructure


@torch.no_grad()
def magnitudes(structure: Structure | UnitStructure, model: nn.Module) -> Tensor:
    """For each gate the L2 norm of the weights whose outputs it switches off: (all gates,), float64 on the host.

    0 where a gate switches off none. Of several layers that share a gate the squares add up.
    """
    if isinstance(structure, UnitStructure):
        return structure.norms(model)
    gated: dict[str, Any] = {name: model.get_submodule(name) for name in structure.gated}
    squares = torch.zeros(structure.size, dtype=torch.float64)
    for (layer, writes), labels in structure.labels.items():
        weight: Any = getattr(layer, "weight", None)
        if not writes or not isinstance(weight, Tensor) or weight.dim() < 2:
            continue
        own: Any = _as_it_is(gated.get(structure.names.get(layer, "")), weight)
        rows = own.movedim(kind_of(layer).weight_dim(True), 0)
        each = rows.detach().double().flatten(1).square().sum(1).cpu()
        for channel, label in enumerate(labels):
            for gates in structure.writers[label] if label >= 0 and channel < len(each) else ():
                for gate in gates:
                    squares[gate] += each[channel]
    for name, layer in gated.items():
        if isinstance(layer, GatedRecurrent):
            for row, names in zip(structure.rows(name), layer._all_weights, strict=True):
                # a projection, which comes last, or the recurrent weights write the units
                weight = getattr(layer, names[-1 if layer.proj_size else 1]).detach().double().cpu()
                squares[row.start : row.stop] += weight.unflatten(0, (-1, len(row))).square().sum((0, 2))
    return squares.sqrt()


def _as_it_is(found: Any, weight: Tensor) -> Tensor:
    """The weight of the layer ``found`` of the model as it is now, if it still has this shape; else ``weight``.

    ``structure.plain`` was copied earlier and has the values of that time.
    """
    now = getattr(found, "weight", None)
    return now if isinstance(now, Tensor) and now.shape == weight.shape else weight


def evenly(values: Tensor, counts: Sequence[int]) -> Tensor:
    """The rank of each value among those of its layer, from almost 0 for the least to 1 for the largest.

    Layers with weights of any scale are then thinned by the same share.

    Args:
        values: (all gates,).
        counts: the number of gates of each layer.
    """
    parts = [own.argsort().argsort().double().add(1) / len(own) for own in values.split(list(counts))]
    return torch.cat(parts)
