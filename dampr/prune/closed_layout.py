"""The layout of a model without its closed units, from the closed gates of the model.

A :class:`.layout.Layout` says which indices of which tensors are left. There is one class for gates in layers and one
for gates on parameters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dampr.nn import GatedActivation, GatedHeads, Scale
from dampr.nn.base import GatedWeight
from dampr.nn.open_statistics import CHILD
from dampr.nn.rnn import GatedRecurrent

from . import heads
from .graph import Side
from .layers.base import Entry
from .layers.convolution import is_depthwise
from .layers.norm import without_activation
from .layers.recurrent import size_of_units
from .layers.registry import kind_of
from .layout import Layout, Sized, left_of, shapes_of
from .structure import Structure
from .unit_structure import UnitStructure, parameter_name
from .units.sizes import Size


class UnitLayouts:
    """Layouts of a model whose gates are on parameters.

    Args:
        model: the gated model, with all its units.
        structure: the :class:`.unit_structure.UnitStructure` of it.

    Attributes:
        can_go: bool (all gates,), the gates whose units can leave the model.
        notes: gated layer -> why its gates cut nothing.
    """

    def __init__(self, model: nn.Module, structure: UnitStructure) -> None:
        self._structure = structure
        self._shapes = shapes_of(model)
        self._sizes = [Size(*entry) for entry in getattr(model, "dampr_sizes", [])]
        self._indices = {name: layer.index.cpu() for name, layer in structure.gated.items()}
        self._counting = {name: own.index.cpu() for name, own in structure.counting.items()}
        self.can_go = torch.zeros(structure.size, dtype=torch.bool)
        self.can_go[sorted(set(structure.gate_of.values()))] = True
        self.notes = dict(structure.notes)

    def of(self, closed: Tensor) -> tuple[Layout, Tensor]:
        """The layout without the units whose gates are closed.

        Args:
            closed: bool, (all gates,).

        Returns: the layout, and the closed gates whose units the layout leaves out, bool (all gates,).
        """
        closed = closed & self.can_go
        units = self._structure.units
        gone = units.indices(self._structure.classes_of(closed))
        layout = Layout(
            left_of({alias: gone[name] for alias, name in units.alias.items() if name in gone}, self._shapes)
        )
        for name, index in self._indices.items():
            layer = self._structure.gated[name]
            places = layout.tensors.get(parameter_name(name), [])
            if layer.dim < len(places) and (place := places[layer.dim]) is not None:
                layout.sizes[name] = {"index": Sized(index, index[place[1]])}
        classes = set(self._structure.classes_of(closed))
        for name, labels in self._structure.counted.items():
            left = torch.tensor([at for at, one in enumerate(labels) if one not in classes])
            if len(left) < len(labels):
                index = self._counting[name]
                layout.sizes[f"{name}.{CHILD}".lstrip(".")] = {"index": Sized(index, index[left])}
        for size in self._sizes:
            places = layout.tensors.get(size.parameter, [])
            if size.dim < len(places) and (place := places[size.dim]) is not None:
                now = size.after(set(range(place[0])).difference(place[1].tolist()))
                layout.sizes.setdefault(size.module, {})[size.attribute] = Sized(size.before, now)
        for name, module in self._structure.plain.named_modules():
            kept = layout.tensors.get(f"{name}.weight_hh_l0".lstrip("."), [])
            if kind_of(module).recurrent and kept:
                layout.sizes[name] = dict(_recurrent_sizes(module, name, layout))
            groups = getattr(module, "groups", 1)
            if f"{name}.weight".lstrip(".") in units.within:
                layout.sizes[name] = dict(_within_sizes(module, layout.tensors.get(f"{name}.weight".lstrip("."), [])))
                continue
            weights = (layout.tensors.get(f"{name}.{own}".lstrip(".")) for own in _WEIGHTS)
            first = next((places[0] for places in weights if places), None)
            if isinstance(groups, int) and groups > 1 and first is not None:
                layout.sizes.setdefault(name, {})["groups"] = Sized(groups, groups * len(first[1]) // first[0])
        return layout, closed


def _recurrent_sizes(module: Any, name: str, layout: Layout) -> Iterator[tuple[str, Sized]]:
    """The size attributes of a plain recurrent layer that change in ``layout``.

    Yields: (attribute, its values in the whole model and in the layout).
    """
    for attribute, weight in (("input_size", "weight_ih_l0"), (size_of_units(module), "weight_hh_l0")):
        places = layout.tensors.get(f"{name}.{weight}".lstrip("."), [])
        if len(places) > 1 and (place := places[1]) is not None:
            yield attribute, Sized(place[0], len(place[1]))


def _within_sizes(module: Any, places: list[Any]) -> Iterator[tuple[str, Sized]]:
    """The size attributes of a grouped convolution whose groups have all lost the same number of channels.

    ``places``: what is left of each dimension of its weight.

    Yields: (attribute, its values in the whole model and in the layout).
    """
    if places:
        whole = module.weight.shape
        now = [len(p[1]) if p is not None else module.weight.shape[dim] for dim, p in enumerate(places)]
        now += whole[len(now) :]
        across, inside = ("in_channels", "out_channels") if module.transposed else ("out_channels", "in_channels")
        yield "groups", Sized(module.groups, module.groups)
        yield across, Sized(whole[0], now[0])
        yield inside, Sized(whole[1] * module.groups, now[1] * module.groups)


# The names of a weight that torch.nn.utils may compute from other tensors.
_WEIGHTS = (
    "weight",
    "weight_v",
    "parametrizations.weight.original1",
    "parametrizations.weight.original",
    "weight_orig",
)


class LayerLayouts:
    """Layouts of a model with gated layers.

    A channel goes if every layer that writes it has closed its gates, or every layer that reads it; its gates in all
    layers go with it. Only convolutions, linear and recurrent layers, batch norms and embeddings change their widths.
    Layers of other kinds keep theirs, and so does every layer that must have the same width as one of them.

    Args:
        model: the gated model, with all its units.
        structure: the :class:`.structure.Structure` of it.

    Attributes:
        can_go: bool (all gates,), the gates whose units can leave the model.
        notes: gated layer -> why its gates cut nothing.
    """

    def __init__(self, model: nn.Module, structure: Structure) -> None:
        self._structure = structure
        self._shapes = shapes_of(model)
        self.notes = dict(structure.notes)
        self._names = self._gated_names()
        there = dict(model.named_modules(remove_duplicate=False))
        self._model_layers: dict[nn.Module, Any] = {layer: there.get(name) for layer, name in self._names.items()}
        self._attentions = {a.written_name: (a.name, a.heads, a.kind.scaled) for a in heads.find(model)}
        self._recurrent = {
            n: g for n, g in structure.gated.items() if isinstance(g, GatedRecurrent) and self._can_lose_units(n)
        }
        rigid = [side for side in structure.labels if not self._resizes(side)]
        self._stuck = {label for side in rigid for label in structure.labels[side]}
        # gated layer -> (the gate of each of its channels, the side of the plain layer that has these channels)
        self._held: dict[str, tuple[Tensor, Side]] = {}
        for name, layer in structure.gated.items():
            owners = layer.channel_gates()
            place = self._place(name)
            side = place, layer.granularity == "output" or is_depthwise(place)
            if owners is not None and side in structure.labels:
                self._held[name] = owners, side
        self.can_go = self._can_go()

    def _place(self, name: str) -> nn.Module:
        """The layer of the plain model that corresponds to the gated layer ``name``, without its activation."""
        return without_activation(self._structure.plain.get_submodule(name))

    def _gated_names(self) -> dict[nn.Module, str]:
        """For each layer of the plain model its name in the gated model."""
        places = {self._place(name): name for name in self._structure.gated}
        return {module: places.get(module, name) for module, name in self._structure.names.items()}

    def _can_lose_units(self, name: str) -> bool:
        """Whether the units of the recurrent layer ``name`` can be cut, in it and in all layers that read it."""
        plain = self._structure.plain.get_submodule(name)
        readers = self._structure.units.get(plain)
        fits = readers is not None and all(
            kind_of(reader).resizes and self._has_tensors(reader, {}) for reader in readers
        )
        return fits and kind_of(plain).recurrent and self._has_tensors(plain, {})

    def _resizes(self, side: Side) -> bool:
        """Whether a side of a layer can lose channels while the layer keeps its gates."""
        plain, _ = side
        if plain not in self._names or not kind_of(plain).resizes:
            return False
        if getattr(plain, "groups", 1) != 1 and not is_depthwise(plain):
            return False
        layer = self._model_layers[plain]
        if layer is None:
            return False
        of_weights = isinstance(layer, GatedWeight) and layer.granularity not in ("output", "input", "index")
        if of_weights and not isinstance(layer, GatedHeads):
            return False
        return self._has_tensors(plain, {})

    def _has_tensors(self, plain: nn.Module, entry: Entry) -> bool:
        """Whether the gated model has the tensors that would be cut, with the shapes of the plain model."""
        if isinstance(plain, Scale):
            return True
        name = self._names[plain]
        found = [
            (f"{name}.{own}".lstrip("."), t)
            for own in kind_of(plain).tensors(plain, entry)
            if isinstance(t := _tensor(plain, own), Tensor)
        ]
        return bool(found) and all(self._shapes.get(full) == tuple(t.shape) for full, t in found)

    def _can_go(self) -> Tensor:
        """The gates whose units can leave the model, bool (all gates,); adds a note for each layer that has none."""
        found = torch.zeros(self._structure.size, dtype=torch.bool)
        for name, (owners, side) in self._held.items():
            free = torch.tensor([label >= 0 and label not in self._stuck for label in self._structure.labels[side]])
            found[(owners + self._structure.start(name))[free]] = True
        for attention in self._structure.attentions:
            name = attention.written_name
            first = self._structure.start(name)
            found[first : first + attention.heads] = not self._stuck_heads(attention)
        for name in self._recurrent:
            for row in self._structure.rows(name):
                found[row.start : row.stop] = True
        for name in self._structure.gated:
            rows = self._structure.rows(name)
            if name not in self.notes and not bool(found[rows[0].start : rows[-1].stop].any()):
                self.notes[name] = "its kind of layer keeps its width until the model is compacted"
        return found

    def _stuck_heads(self, attention: Any) -> bool:
        """Whether the heads of an attention share a class with a side that cannot change its width."""
        return any(label in self._stuck for side, _ in attention.sides() for label in self._structure.labels[side])

    def of(self, closed: Tensor) -> tuple[Layout, Tensor]:
        """The layout without the units whose gates are closed.

        Args:
            closed: bool, (all gates,).

        Returns: the layout, and bool (all gates,), the closed gates whose units the layout leaves out.
        """
        closed = closed & self.can_go
        for _ in range(8):
            entries, kept = self._entries(closed)
            back = self._disagreeing(kept, closed)
            if not bool(back.any()):
                break
            closed = closed & ~back
        else:
            return Layout(), torch.zeros_like(closed)
        layout = self._layout(entries)
        gone = torch.zeros_like(closed)
        for name, left in kept.items():
            rows = self._structure.rows(name)
            own = torch.ones(rows[-1].stop - rows[0].start, dtype=torch.bool)
            own[left] = False
            gone[rows[0].start : rows[-1].stop] |= own
            if len(left) < len(own) and self._selects(name):
                layout.gates[name] = left
        return layout, gone & closed

    def _selects(self, name: str) -> bool:
        """Whether the layer ``name`` has one gate for each channel, without an index of gates."""
        return getattr(self._structure.gated[name], "index", None) is None

    def _entries(self, closed: Tensor) -> tuple[dict[nn.Module, Entry], dict[str, Tensor]]:
        """What the ``closed`` gates cut.

        Returns: for each plain layer its entry, as a manifest has it; and for each gated layer that loses gates the
        indices of the gates that are left.
        """
        structure = self._structure
        dead = self._dead_classes(closed)
        entries: dict[nn.Module, Entry] = defaultdict(dict)
        for (plain, writes), labels in structure.labels.items():
            left = [i for i, label in enumerate(labels) if label not in dead]
            if len(left) < len(labels):
                entries[plain]["out" if writes else "in"] = {"before": len(labels), "kept": left}
        kept: dict[str, Tensor] = {}
        for name, (owners, side) in self._held.items():
            there = torch.tensor([label not in dead for label in structure.labels[side]])
            if not bool(there.all()):
                kept[name] = owners[there].unique()
        for attention in structure.attentions:
            first = structure.start(attention.written_name)
            lost = closed[first : first + attention.heads]
            if bool(lost.any()):
                kept[attention.written_name] = (~lost).nonzero().flatten()
        for name in self._recurrent:
            kept |= self._recurrent_entries(name, closed, entries)
        return entries, kept

    def _dead_classes(self, closed: Tensor) -> set[int]:
        """The classes whose every writer, or every reader, has a closed gate, except those that must stay."""
        shut = closed.tolist()
        dead = set()
        for owners in (self._structure.writers, self._structure.readers):
            for label, layers in enumerate(owners):
                if (
                    layers
                    and label not in self._stuck
                    and all(gates and any(shut[g] for g in gates) for gates in layers)
                ):
                    dead.add(label)
        return dead - {last for last, side in self._structure.emptiable if side <= dead}

    def _recurrent_entries(self, name: str, closed: Tensor, entries: dict[nn.Module, Entry]) -> dict[str, Tensor]:
        """Enter the units that the recurrent layer ``name`` and its readers lose into ``entries``.

        All layers and directions of a recurrent layer have one width, so each loses the same number of units.

        Returns: the indices of the gates that are left, by the name of the layer; empty if no unit goes.
        """
        rows = self._structure.rows(name)
        lost = [[i - row.start for i in row if closed[i]] for row in rows]
        count = min(map(len, lost))
        if not count:
            return {}
        width = len(rows[0])
        left = [[i for i in range(width) if i not in set(own[:count])] for own in lost]
        plain: Any = self._structure.plain.get_submodule(name)
        entries[plain]["units"] = {"before": width, "kept": left}
        each = 1 + plain.bidirectional
        features = [i + d * width for d, own in enumerate(left[-each:]) for i in own]
        for reader in self._structure.units[plain]:
            entries[reader]["in"] = {"before": each * width, "kept": features}
        return {
            name: torch.tensor(
                [i + row.start - rows[0].start for row, own in zip(rows, left, strict=True) for i in own]
            )
        }

    def _disagreeing(self, kept: dict[str, Tensor], closed: Tensor) -> Tensor:
        """The closed gates whose units have to stay, bool (all gates,).

        Several layers can share a gate vector. A gate stays if one layer loses it and another does not. All gates of a
        vector stay if no gate would be left. Args are as :meth:`_entries` returns and takes them.
        """
        structure = self._structure
        by_vector: dict[int, list[str]] = defaultdict(list)
        for name in structure.gated:
            if name in self._held or name in kept:
                by_vector[structure.start(name)].append(name)
        back = torch.zeros_like(closed)
        for start, names in by_vector.items():
            count = structure.rows(names[0])[-1].stop - start
            left = torch.zeros(len(names), count, dtype=torch.bool)
            for row, name in enumerate(names):
                left[row, kept.get(name, torch.arange(count))] = True
            wrong = (left.any(0) & ~left.all(0)) | (~left.any() & torch.ones(count, dtype=torch.bool))
            back[start : start + count] = wrong & closed[start : start + count]
        return back

    def _layout(self, entries: dict[nn.Module, Entry]) -> Layout:
        """The layout of the gated model that corresponds to ``entries``."""
        layout = Layout()
        for plain, entry in entries.items():
            name = self._names[plain]
            layer, kind = self._model_layers[plain], kind_of(plain)
            for own, places in kind.tensors(plain, entry).items():
                full = f"{name}.{own}".lstrip(".")
                if full in self._shapes and any(place is not None for place in places):
                    layout.tensors[full] = places
            own_sizes = layout.sizes.setdefault(name, {})
            now = {side: {"before": _kept_count(found)} for side, found in entry.items()}
            own_sizes |= {
                attribute: Sized(getattr(plain, attribute), n) for attribute, n in kind.sizes(plain, now).items()
            }
            index = getattr(layer, "index", None)
            if isinstance(index, Tensor):
                own_sizes["index"] = Sized(index.cpu(), _cut_index(layer, index.cpu(), entry))
            if isinstance(layer, GatedHeads):
                own_sizes |= self._heads(name, layer, entry, layout)
        return layout

    def _heads(self, name: str, layer: GatedHeads, entry: Entry, layout: Layout) -> dict[str, Sized]:
        """The sizes of the output projection of an attention that loses heads.

        Also enters the number of heads of the module around the projection into ``layout``.
        """
        written = _kept_count(entry["out"]) if "out" in entry else layer.out_features
        columns = layer.in_features // layer.gate.num_gates
        around, before, scaled = self._attentions[name]
        if "in" in entry:
            left = _kept_count(entry["in"]) // columns
            for path in scaled:
                owner, _, attribute = path.rpartition(".")
                where = f"{around}.{owner}".strip(".")
                value = getattr(self._model_layers[self._structure.plain.get_submodule(where)], attribute)
                layout.sizes.setdefault(where, {})[attribute] = Sized(value, value // before * left)
        return {"granularity": Sized(layer.granularity, (written, columns))}


def _cut_index(layer: Any, index: Tensor, entry: Entry) -> Tensor:
    """The index of gates of a layer, (out,) or of the shape of its weight, without the channels that ``entry`` cuts."""
    for side, dim in (("out", 0), ("in", 1)):
        if side in entry and dim < index.dim() and (index.dim() > 1 or isinstance(layer, GatedActivation)):
            index = index.index_select(dim, torch.tensor(entry[side]["kept"]))
    return index


def _kept_count(found: Entry) -> int:
    """The number of channels that are left on one side of a layer.

    ``found``: one part of a manifest entry, {"before": int, "kept": indices}. A recurrent layer has a list of indices
    for each layer and direction, all of the same length.
    """
    kept = found["kept"]
    return len(kept[0]) if kept and isinstance(kept[0], list) else len(kept)


def _tensor(layer: nn.Module, path: str) -> Any:
    """The attribute at a dotted ``path`` below ``layer``; None if there is none."""
    owner, _, own = path.rpartition(".")
    return getattr(layer.get_submodule(owner), own, None)


def layouts_of(model: nn.Module, structure: Structure | UnitStructure) -> LayerLayouts | UnitLayouts:
    """The layouts of ``model``, which still has all its units, for the kind of gates that it has."""
    return UnitLayouts(model, structure) if isinstance(structure, UnitStructure) else LayerLayouts(model, structure)


def vectors(structure: Structure | UnitStructure, gates: Tensor) -> Iterable[Tensor]:
    """Split a set of ``gates``, bool (all gates,), by gate vector; vectors without a gate in the set are left out."""
    for rows in structure.widths():
        own = torch.zeros_like(gates)
        own[rows[0].start : rows[-1].stop] = gates[rows[0].start : rows[-1].stop]
        if bool(own.any()):
            yield own
