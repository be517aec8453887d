"""Which layers get a bias when a model is compacted: what a closed unit still contributes as a constant moves into
that of its reader.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dampr.gates import Fixed
from dampr.nn import GatedHeads

from . import graph, inputs
from .compact import open_branches
from .modules import gates_of
from .structure import Structure


def find(model: nn.Module, structure: Structure, example_inputs: Any) -> dict[nn.Module, set[int]]:
    """Of each layer in ``structure.plain`` without a bias that would get one, the classes of which any one that goes is
    enough.

    By the values that ``model``, which ``structure`` is of, has now: a copy runs with the gates of all units closed,
    and what is not 0 there where a layer reads it is a constant.
    """
    readers = dict(_readers(structure))
    if not readers:
        return {}
    trial: Any = inputs.copied(model, example_inputs)
    branches = {trial.get_submodule(name).gate for name in structure.branch_gates()}
    gates = gates_of(trial)
    inputs.replace(
        trial, {g: Fixed((torch.ones_like if g in branches else torch.zeros_like)(g.deterministic())) for g in gates}
    )
    open_branches(trial)
    found: dict[nn.Module, set[int]] = {}

    def look(layer: nn.Module, labels: list[int]) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            weight: Any = layer.weight
            along = -1 if isinstance(layer, nn.Linear) else -(weight.dim() - 1)
            counts = weight.detach().transpose(0, 1).flatten(1).any(1)
            reads = (args[0].detach().movedim(along, -1).flatten(0, -2) != 0).any(0).to(counts.device) & counts
            own = {label for label, read in zip(labels, reads.tolist(), strict=True) if read and label >= 0}
            if own:
                found[layer] = own

        return hook

    hooks = [trial.get_submodule(name).register_forward_pre_hook(look(*reader)) for name, reader in readers.items()]
    # of a model that needs some of its values, which no budget closes all at once
    without_values = contextlib.suppress(RuntimeError)
    with inputs.removing(hooks), without_values:
        inputs.evaluate(trial, example_inputs)
    return found


def _readers(structure: Structure) -> Iterator[tuple[str, tuple[nn.Module, list[int]]]]:
    """Layers without a bias that can have one, and whose columns no gates close, by name,
    with the classes of what they read.
    """
    for name, layer in structure.plain.named_modules():
        gated = structure.gated.get(name)
        closes_columns = gated is not None and (isinstance(gated, GatedHeads) or gated.granularity == "input")
        labels = structure.labels.get((layer, False))
        if labels is None or not isinstance(layer, graph.GEMMS) or closes_columns:
            continue
        if layer.bias is None and not graph.pads_with_zeros(layer):
            yield name, (layer, labels)
