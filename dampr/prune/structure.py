"""The structure of a model with gated layers: which gates close which channels, and which channels go together."""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from dampr.gates import Fixed
from dampr.nn import GatedActivation, GatedHeads, GatedLayer, GatedResidual, Scale
from dampr.nn.computed import at_rest
from dampr.nn.rnn import GatedRecurrent
from dampr.nn.transformer import GatedTransformer

from . import graph, heads, inputs, recurrent, streams
from .compact import open_branches
from .gate_vector import GateVector
from .graph import Side
from .layers.base import CannotCutError
from .layers.norm import counts_open, without_activation
from .layers.recurrent import unit_columns
from .layers.registry import channel_count, kind_of
from .modules import by_name, gates_of, of_kind


class UnitRows(NamedTuple):
    """A factor of a product that has the units of a recurrent layer.

    Attributes:
        layer: the layer.
        rows: the layers and directions within it whose units the factor has, one after the other.
        size: the length of the factor.
    """

    layer: nn.Module
    rows: tuple[int, ...]
    size: int


Factor = tuple[int, ...] | UnitRows


class Structure(GateVector[GatedLayer]):
    """Which gates of a model with gated layers cut which classes of channels.

    Channels that must be cut together are one class. A class can be cut when every layer that writes it has closed its
    gates, or every layer that reads it. A side is a layer with "writes" (True) or "reads" (False).

    Args:
        model: the gated model; not changed.
        example_inputs: the inputs of the trace; what the model raises on them is raised.

    Attributes:
        plain: a dense copy of the model with the same names.
        names: module of ``plain`` -> its name.
        labels: side -> the class of each of its channels, -1 for channels that always stay.
        writers, readers: class -> for each layer that writes it, or reads it, the set of its gates.
        units: recurrent layer of ``plain`` whose units can be cut -> the layers that read them.
        split: those of them whose layers and directions get widths of their own.
        attentions: the attentions of ``plain`` whose heads have gates.
        streams: (residual stream of ``plain`` that gates in its LayerNorms cut, its first gate).
        notes: gated layer -> why its gates cut nothing.
    """

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        super().__init__(by_name(model, GatedLayer))
        self._branch_parts = _branch_parts(model)
        self.notes: dict[str, str] = {}
        self.units: dict[nn.Module, list[nn.Module]] = {}
        self.labels: dict[Side, list[int]] = {}
        self._label_of: dict[int, int] = {}
        with at_rest(model):
            self.plain = self._plain_copy(model, example_inputs)
        self.names = {module: name for name, module in self.plain.named_modules()}
        widths = graph.Widths(self.plain, example_inputs)
        self._units = widths.units
        self._find_classes(widths)
        self._add_heads()
        self._add_streams(widths)

    def rows(self, name: str) -> list[range]:
        """The indices of the gates of layer ``name`` in the vector of all gates.

        One range; a recurrent layer has one for each layer and direction.
        """
        start, count = self.start(name), kind_of(self.gated[name]).rows(self.gated[name])
        size = self.count(name) // count
        return [range(start + i * size, start + (i + 1) * size) for i in range(count)]

    @functools.cached_property
    def emptiable(self) -> list[tuple[int, frozenset[int]]]:
        """The sides whose gates can close all their classes: (the class that stays, all classes) for each.

        Compaction keeps one channel of such a side, that of its lowest class.
        """
        closable = {a for owners in (self.writers, self.readers) for a, sets in enumerate(owners) if sets and all(sets)}
        sides = dict.fromkeys(frozenset(labels) for labels in self.labels.values())
        classes = {label: one for one, label in self._label_of.items()}
        last = max(classes.values(), default=0)
        return [
            (min(side, key=lambda label: classes.get(label, last + label + 1)), side)
            for side in sides
            if side and closable.issuperset(side)
        ]

    def products(self) -> list[tuple[str, int, list[Factor]]]:
        """(module, multiply-accumulates, factors) of every product.

        A factor is the class of each index of a dimension, -1 for indices that always stay, or the units of a recurrent
        layer; factors that cannot change are left out.
        """
        unit = self._units.label
        own = np.full(len(unit), -1)
        own[list(self._label_of)] = list(self._label_of.values())
        of_units = dict(self._unit_classes())
        found = []
        for product in self._units.products:
            lines = [unit[line].tolist() for line in product.factors]
            factors = [of_units.get(tuple(line)) or tuple(own[line].tolist()) for line in lines]
            varying = [f for f in factors if isinstance(f, UnitRows) or max(f, default=-1) >= 0]
            found.append((product.module, product.macs, varying))
        return found

    def _unit_classes(self) -> Iterator[tuple[tuple[int, ...], UnitRows]]:
        """The classes of the outputs of each recurrent layer whose units can be cut, for one and for all directions of
        its last layer.
        """
        layer: Any
        for layer in self.units:
            names, path = unit_columns(layer), self.names[layer]
            last = tuple(range(len(names)))[-1 - layer.bidirectional :]
            for rows in dict.fromkeys([*((row,) for row in last), last]):
                of_rows = (self._units.classes(f"{path}.{names[row]}".lstrip("."), 1) for row in rows)
                whole = tuple(itertools.chain.from_iterable(of_rows))
                yield whole, UnitRows(layer, rows, len(whole))

    def branch_gates(self) -> list[str]:
        """The names of the layers whose gate opens or closes a whole residual branch."""
        return list(self._branch_parts)

    def branches(self, name: str) -> list[int]:
        """The gates of the residual branches that contain the layer ``name``."""
        return [
            self.start(gate)
            for gate, parts in self._branch_parts.items()
            if any(name == part or name.startswith(f"{part}.") for part in parts)
        ]

    def _plain_copy(self, model: nn.Module, example_inputs: Any) -> nn.Module:
        """The dense copy of the model.

        Also sets ``units`` and ``split``: the recurrent layers whose units can be cut, and those that get unequal
        widths.
        """
        plain = _opened(model, example_inputs)
        _make_dense(plain, but=GatedRecurrent)
        readers: dict[str, list[str]] = {}
        for name, layer in by_name(plain, GatedRecurrent).items():
            try:
                found = recurrent.readers(plain, layer, example_inputs)
                readers[name] = [reader for reader, module in plain.named_modules() if module in found]
            except CannotCutError as error:
                self.notes[name] = str(error)
        _make_dense(plain)
        self.units = {
            plain.get_submodule(name): [plain.get_submodule(r) for r in found] for name, found in readers.items()
        }
        own = {name for name in readers if getattr(self.gated.get(name), "widths", "") == "own"}
        asked = [layer for name, layer in by_name(plain, nn.RNNBase).items() if name in own]
        self.split: set[nn.Module] = {layer for layer in asked if recurrent.takes_parts(plain, layer, example_inputs)}
        return plain

    def _find_classes(self, widths: graph.Widths) -> None:
        """Find the classes of the channels that gates reach, and the layers that write and read each class."""
        anchors = self._anchors(widths)
        members: set[Side] = set()
        labels = self._label_of
        for layer, writes in anchors:
            # If several layers write parts of a side, only some of its channels may have a class by now.
            if -1 not in self.labels.get((layer, writes), [-1]):
                continue
            try:
                if layer not in widths:
                    raise CannotCutError(widths.why_absent(layer))
                sides = widths.members(layer, writes)
            except CannotCutError as error:
                self.notes[self.names[layer]] = str(error)
                continue
            for member in sides:
                own = self.labels.setdefault(member.side, [-1] * channel_count(*member.side))
                for channel, one in zip(member.channels, member.classes, strict=True):
                    own[channel] = labels.setdefault(one, len(labels))
            members |= {member.side for member in sides if not member.passes}
        count = len(labels)
        self.writers, self.readers = ([set[frozenset[int]]() for _ in range(count)] for _ in range(2))
        for side in members:
            owners = self.writers if side[1] else self.readers
            for channel, label in enumerate(self.labels[side]):
                if label >= 0:
                    owners[label].add(frozenset(gates[channel] for gates in anchors.get(side, [])))

    def _anchors(self, widths: graph.Widths) -> dict[Side, list[list[int]]]:
        """side -> for each gated layer that reaches it, the gate of each of its channels."""
        anchors: dict[Side, list[list[int]]] = defaultdict(list)
        for name, layer in self.gated.items():
            owners = layer.channel_gates()
            if owners is None or name in self._branch_parts or counts_open(layer):
                continue
            place = without_activation(self.plain.get_submodule(name))
            on_values = kind_of(place).gates_values
            sides = widths.around(place) if on_values else [(place, layer.granularity == "output")]
            if not sides:
                self.notes[name] = "no layer alone writes or reads what these gates multiply"
            for side in sides:
                anchors[side].append((owners + self.start(name)).tolist())
        own = {layer: list(found) for (layer, writes), found in anchors.items() if writes}
        for writer, factor in widths.multiplied.items():
            if writer in own:
                anchors[factor, True] += own[writer]
        return anchors

    def _add_heads(self) -> None:
        """Add a class for each head with a gate: the rows that compute the head and the columns that read it."""
        self.attentions = [a for a in heads.find(self.plain) if isinstance(self.gated.get(a.written_name), GatedHeads)]
        for attention in self.attentions:
            first = self._new_classes(self.start(attention.written_name), attention.heads)
            for side, head in attention.sides():
                self.labels[side] = (head + first).tolist()

    def _add_streams(self, widths: graph.Widths) -> None:
        """Add a class for each channel of a residual stream whose norms share one gate vector.

        Norms whose stream cannot be cut get a note.
        """
        starts = {
            self.plain.get_submodule(name): self.start(name) for name, layer in self.gated.items() if counts_open(layer)
        }
        found, why = streams.find(self.plain, widths) if starts else ([], {})
        self.streams: list[tuple[streams.Stream, int]] = []
        for stream in found:
            own = {starts.get(norm) for norm in stream.norms}
            start = own.pop()
            if own or start is None:
                why |= dict.fromkeys(
                    stream.norms, "the norms of its stream have gates of their own, expected one for all"
                )
                continue
            self.streams.append((stream, start))
            first = self._new_classes(start, stream.width)
            self.labels |= {side: list(range(first, first + stream.width)) for side in stream.sides()}
            self._label_of |= {one: first + i for i, one in enumerate(widths.classes(stream.norms[0], True))}
        self.notes |= {self.names[norm]: why[norm] for norm in starts if norm in why}

    def _new_classes(self, start: int, count: int) -> int:
        """Add ``count`` classes that one layer writes and none reads; the i-th is closed by gate ``start + i``.

        Returns: the number of the first class.
        """
        first = len(self.writers)
        self.writers += [{frozenset([start + i])} for i in range(count)]
        self.readers += [set[frozenset[int]]() for _ in range(count)]
        return first


def _branch_parts(model: nn.Module) -> dict[str, list[str]]:
    """layer whose gate opens or closes a whole residual branch -> the layers in that branch, all by name."""
    found: dict[str, list[str]] = {}
    for name, layer in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(layer, GatedResidual):
            found[name] = [f"{prefix}branch"]
        elif isinstance(layer, GatedTransformer) and "sublayer_gates" in layer._modules:
            for index, first in enumerate(layer._sublayers):
                parts = ["linear1", "linear2"] if first == "linear1" else [first]
                parts += [f"norm{index + 1}"] if layer.norm_first else []
                found[f"{prefix}sublayer_gates.{index}"] = [prefix + part for part in parts]
    return found


def plain_copy(model: nn.Module, example_inputs: Any) -> nn.Module:
    """A copy of ``model`` without gates, as if all were open, whose layers have their old names."""
    plain = _opened(model, example_inputs)
    _make_dense(plain)
    return plain


def _opened(model: nn.Module, example_inputs: Any) -> nn.Module:
    """A copy with every gate at 1, in which residual branches and transformer layers are plain."""
    plain = inputs.copied(model, example_inputs)
    inputs.replace(plain, {gate: Fixed(torch.ones_like(gate.deterministic())) for gate in gates_of(plain)})
    open_branches(plain)
    inputs.replace(plain, {layer: layer.to_dense() for layer in of_kind(plain, GatedTransformer)})
    return plain


def _make_dense(model: nn.Module, but: type | tuple[type, ...] = ()) -> None:
    """Replace the gated layers of ``model`` by dense ones in place, except layers of the types ``but``."""
    gated: list[Any] = [layer for layer in of_kind(model, GatedLayer) if not isinstance(layer, but)]
    inputs.replace(model, {layer: _dense(layer) for layer in gated})


def _dense(layer: GatedLayer) -> nn.Module:
    """The dense layer for a gated one. Gates on an activation become a :class:`Scale`, even if all factors are 1."""
    owners = layer.channel_gates()
    if isinstance(layer, GatedActivation) and owners is not None:
        return Scale(torch.ones_like(owners, dtype=torch.float32, device=layer.gate.deterministic().device), layer.dim)
    return layer.to_dense()
