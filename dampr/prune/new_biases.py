"""Find the layers that get a bias when a model is compacted.

A closed unit can still contribute a constant to the layer that reads it (half a sigmoid, the shift of a norm).
Compaction moves this constant into the bias of that layer, so a layer without a bias gets one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dampr.gates import Fixed
from dampr.nn import GatedHeads
from dampr.nn.called import first_argument

from . import hooks, inputs
from .compact import open_branches
from .layers.registry import kind_of
from .modules import gates_of
from .structure import Structure


def find(model: nn.Module, structure: Structure, example_inputs: Any) -> dict[nn.Module, set[int]]:
    """layer of ``structure.plain`` without a bias that would get one -> the classes that cause it, each by itself.

    A copy of ``model`` runs with the gates of all units closed. What is then not 0 where a layer reads it is a
    constant. This holds for the values that ``model`` has now.

    Args:
        model: the gated model; not changed.
        structure: its structure.
        example_inputs: the inputs of the run.
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
        """A forward pre-hook that enters a layer in ``found`` if it reads a channel that is not 0."""

        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            """Note the classes of the channels in which the layer reads anything but zeros."""
            weight: Any = layer.weight
            along = kind_of(layer).input_axis(layer)
            counts = weight.detach().transpose(0, 1).flatten(1).any(1)
            x = first_argument(args, kwargs).detach()
            reads = (x.movedim(along, -1).flatten(0, -2) != 0).any(0).to(counts.device) & counts
            own = {label for label, read in zip(labels, reads.tolist(), strict=True) if read and label >= 0}
            if own:
                found[layer] = own

        return hook

    handles = [
        trial.get_submodule(name).register_forward_pre_hook(look(*reader), with_kwargs=True)
        for name, reader in readers.items()
    ]
    # some models raise if all values are 0; no budget closes all units at once, so this tells nothing
    without_values = contextlib.suppress(RuntimeError)
    with hooks.removing(handles), without_values:
        inputs.evaluate(trial, example_inputs)
    return found


def _readers(structure: Structure) -> Iterator[tuple[str, tuple[nn.Module, list[int]]]]:
    """(name, (layer, the class of each channel that it reads)) for layers without a bias that can have one.

    Layers whose columns gates close are left out, and convolutions that pad with zeros, where no bias could make up for
    it.
    """
    for name, layer in structure.plain.named_modules():
        gated = structure.gated.get(name)
        closes_columns = gated is not None and (isinstance(gated, GatedHeads) or gated.granularity == "input")
        labels = structure.labels.get((layer, False))
        if labels is None or not kind_of(layer).gemm or closes_columns:
            continue
        if layer.bias is None and not kind_of(layer).pads(layer):
            yield name, (layer, labels)
