"""Compact a model whose gates are on parameters: delete the classes with closed gates from every parameter and buffer.

A class is an integer that stands for units which can be cut only together (:mod:`.units`). The gates are folded into
the parameters first. Beside the smaller model this writes the manifest, plain data about what is left of which tensor,
and reads it again when a file is loaded.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from dampr._version import __version__

from .cutting import UnableError, follow_inputs
from .layers.registry import kind_of
from .unit_structure import UnitStructure, without_gates
from .units.numbers import number_of, set_number
from .units.proof import cut
from .units.sizes import Size, follow

_MOST_DIMS = 8  # the most dimensions that a manifest may list for a tensor; a weight of a 3-d convolution has 5
Kept = dict[tuple[nn.Module, bool], Tensor]  # (layer, whether it writes them or reads them) -> indices that are left


def compacted(model: nn.Module, example_inputs: Any, round_to: int) -> tuple[nn.Module, Kept, dict[str, Any]]:
    """Make a plain copy of ``model`` without the units whose gates are closed.

    Args:
        model: the model with gates; not changed.
        example_inputs: the inputs of the trace.
        round_to: widths become multiples of this where enough units are there.

    Returns: (the copy; the channels that are left of what its layers write and read; the manifest, in which the caller
    enters how far the outputs differ).

    Raises: UnableError if too few gates are open.
    """
    structure = UnitStructure(model, example_inputs)
    small = without_gates(model, folded=True)
    closed = torch.cat([~gate.is_open().cpu() for gate in structure.gates])
    notes = {
        name: f"{_count(structure, closed, name)} closed units stay: {note}" for name, note in structure.notes.items()
    }
    notes = {name: note for name, note in notes.items() if not note.startswith("0 ")}
    gone = _rounded(structure, closed, round_to, notes)
    classes = structure.classes_of(gone)
    sizes = [Size(*entry) for entry in getattr(model, "dampr_sizes", [])]
    before = {name: tuple(t.shape) for name, t in _tensors(small).items()}
    cut(small, structure.units, classes)
    changed = follow(small, sizes, structure.units.indices(classes))
    # what the manifest says of convolutions whose number of groups may have changed
    for name, module in small.named_modules():
        original: Any = model.get_submodule(name)
        if isinstance(module, nn.modules.conv._ConvNd) and (
            module.groups != original.groups or f"{name}.weight" in structure.units.within
        ):
            changed[name] = {
                attribute: getattr(module, attribute) for attribute in ("groups", "in_channels", "out_channels")
            }
    follow_inputs(small, example_inputs)
    for name, module in small.named_modules():
        features: Any = getattr(module, "num_features", None)
        if features != getattr(model.get_submodule(name), "num_features", None) and not module.state_dict():
            changed.setdefault(name, {})["num_features"] = features
    remaining = _left(structure, classes, before)
    kept = _sides(small, remaining)
    names = {module: name for name, module in small.named_modules()}
    layers: dict[str, dict[str, Any]] = {}
    for (layer, writes), indices in kept.items():
        entry = remaining[f"{names[layer]}.weight".lstrip(".")][kind_of(layer).weight_dim(writes)]
        layers.setdefault(names[layer], {})["out" if writes else "in"] = {
            "before": entry["before"],
            "kept": indices.tolist(),
        }
    manifest = {
        "dampr": __version__,
        "torch": torch.__version__,
        "layers": layers,
        "tensors": {name: {str(dim): entry for dim, entry in dims.items()} for name, dims in remaining.items()},
        "sizes": {
            name: {
                attribute: {"before": number_of(model.get_submodule(name), attribute), "kept": value}
                for attribute, value in attributes.items()
            }
            for name, attributes in changed.items()
        },
        "closed_but_kept": notes,
        "counting": [name for name, counted in structure.counted.items() if not set(counted).isdisjoint(classes)],
    }
    return small, kept, manifest


def _count(structure: UnitStructure, closed: Tensor, name: str) -> int:
    """Return the number of closed gates of the gated parameter ``name``; ``closed``: bool, (all gates,)."""
    (row,) = structure.rows(name)
    return int(closed[row.start : row.stop].sum())


def _rounded(structure: UnitStructure, closed: Tensor, round_to: int, notes: dict[str, str]) -> Tensor:
    """Return the gates whose units are deleted, bool (all gates,).

    Of every vector at least one unit stays, and if enough are there a multiple of ``round_to``.

    Args:
        structure: which gate cuts which classes.
        closed: bool (all gates,), which gates are closed.
        round_to: the number of which widths become multiples.
        notes: gated parameter -> why closed units of it stay; gets an entry where some do.

    Raises: UnableError if fewer are open than the layers that count them need.
    """
    gone = closed.clone()
    useful = set(structure.gate_of.values())
    for gate, (row,) in zip(structure.holders, structure.widths(), strict=True):
        closed_gates = [index for index in row if closed[index] and index in useful]
        open_count = len(row) - len(closed_gates)
        if open_count < structure.least(row.start) != 1:
            raise UnableError(
                f"{gate}: {open_count} of {len(row)} gates open, expected two at least: what reads them "
                "divides its weights by their deviation, and one element has none"
            )
        kept_count = -(-max(1, open_count) // round_to) * round_to
        stay = min(len(closed_gates), kept_count - open_count)
        for index in closed_gates[:stay]:
            gone[index] = False
        if stay:
            why = (
                "every layer keeps one at least"
                if len(closed_gates) == len(row)
                else f"the width is a multiple of {round_to}"
            )
            notes[gate] = f"{stay} closed unit{'s stay' if stay > 1 else ' stays'}: {why}"
    return gone


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return name -> tensor of all parameters and buffers, under every name."""
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def _left(
    structure: UnitStructure, classes: list[int], before: dict[str, tuple[int, ...]]
) -> dict[str, dict[int, dict[str, Any]]]:
    """Return what is left of every tensor that loses something, under every name that it has.

    Args:
        structure: which gate cuts which classes.
        classes: the classes that were cut.
        before: name -> the shape of the tensor before the cut.

    Returns: name -> dimension -> {"before": size, "kept": indices left}.
    """
    names: dict[str, list[str]] = defaultdict(list)
    for alias, name in structure.units.alias.items():
        names[name].append(alias)
    entries: dict[str, dict[int, dict[str, Any]]] = {}
    for name, dims in structure.units.indices(classes).items():
        entry = {}
        for dim, gone in dims.items():
            lost, size = set(gone), before[name][dim]
            entry[dim] = {"before": size, "kept": [i for i in range(size) if i not in lost]}
        entries |= dict.fromkeys(names[name], entry)
    return entries


def _sides(small: nn.Module, remaining: dict[str, dict[int, dict[str, Any]]]) -> Kept:
    """Return the channels that are left of layers with a weight: (layer, whether it writes them) -> indices, int64.

    Args:
        small: the model after the cut.
        remaining: what is left of its tensors, as :func:`_left` returns it.
    """
    kept: Kept = {}
    for name, module in small.named_modules():
        for dim, entry in remaining.get(f"{name}.weight".lstrip("."), {}).items():
            for writes in (True, False):
                if dim == kind_of(module).weight_dim(writes) and dim < 2:
                    kept[module, writes] = torch.tensor(entry["kept"])
    return kept


def places_of(manifest: dict[str, Any], name: str) -> list[Any]:
    """Return the manifest's entry for each dimension of tensor ``name``; None for a dimension that nothing was cut
    from.

    Raises: ValueError if the entries are not what compaction writes.
    """
    tensors = manifest.get("tensors", {})
    dims = tensors.get(name, {}) if isinstance(tensors, dict) else None
    known = [str(dim) for dim in range(_MOST_DIMS)]
    if not isinstance(dims, dict) or not dims.keys() <= set(known):
        raise ValueError(
            f"manifest: tensors: {name!r:.80}: {dims!r:.80}, expected entries by the numbers of dimensions"
        )
    return [dims.get(dim) for dim in known]


def sizes_of(manifest: Any) -> dict[str, dict[str, int]]:
    """Return module -> attribute -> its value before compaction, for numbers that code keeps beside its parameters.

    Raises: ValueError if the entries are not what compaction writes.
    """
    sizes = manifest.get("sizes", {}) if isinstance(manifest, dict) else {}
    entries = list(sizes.values()) if isinstance(sizes, dict) else [None]
    if not all(
        isinstance(attributes, dict) and all(isinstance(entry, dict) for entry in attributes.values())
        for attributes in entries
    ):
        raise ValueError(
            f"manifest: sizes={sizes!r:.80}, expected numbers by the names of modules and their attributes"
        )
    values_before = {
        name: {attribute: entry.get("before") for attribute, entry in attributes.items()}
        for name, attributes in sizes.items()
    }
    for attributes in values_before.values():
        for attribute, value in attributes.items():
            named = re.fullmatch(r"_?[^\W\d_]\w*(\.\d{1,4})?", attribute)
            if type(value) is not int or not 0 < value < 2**31 or not named:
                raise ValueError(f"manifest: sizes: {attribute!r}={value!r:.40}, expected a number of channels before")
    return values_before


def restore_sizes(model: nn.Module, manifest: dict[str, Any]) -> None:
    """Set the numbers that code keeps beside its parameters to their values before compaction.

    Args:
        model: the model whose attributes are set.
        manifest: the manifest of its compaction.

    Raises: ValueError if the manifest's entries are not what compaction writes, or name what ``model`` does not have.
    """
    for name, attributes in sizes_of(manifest).items():
        for attribute, value in attributes.items():
            try:
                module = model.get_submodule(name)
            except AttributeError:
                raise ValueError(
                    f"model={type(model).__name__}: its manifest names a module {name!r} that is not there"
                ) from None
            if number_of(module, attribute) is None:
                raise ValueError(f"manifest: sizes: {name!r} has no number {attribute!r}")
            set_number(module, attribute, value)
