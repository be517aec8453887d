"""Which gate on parameters cuts which classes of units of a model.

A class is an integer that stands for units which can be cut only together (:mod:`.units`). A gate is counted in the
vector of all gates of the model, in which the gate vectors lie one after the other.

:class:`UnitStructure` answers this for models whose gates multiply parameters; :class:`.structure.Structure` does it
for models with gated layers. :mod:`.unit_gates` puts gates on parameters.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dampr.nn import GatedLayer, open_statistics
from dampr.nn.open_statistics import norms_with_open_statistics
from dampr.nn.parameter import GatedParameter, gated_parameters, take_off

from . import inputs
from .gate_vector import GateVector
from .layers.registry import kind_of
from .modules import by_name, of_kind
from .terms import Width, mean_of
from .units import Units, trace_units
from .units.groups import readable


def has_unit_gates(model: nn.Module) -> bool:
    """Return whether the gates of ``model`` are on parameters. False also for a model without gates.

    Raises: ValueError if the model has gates on parameters and gated layers.
    """
    on_parameters = {isinstance(module, GatedParameter) for module in of_kind(model, GatedLayer)}
    if len(on_parameters) == 2:
        raise ValueError(
            f"model={type(model).__name__}: gates on parameters and gated layers, expected one kind (convert it once)"
        )
    return on_parameters == {True}


def without_gates(model: nn.Module, example_inputs: Any = None, *, folded: bool = False) -> nn.Module:
    """Return a copy of ``model`` with plain parameters.

    Args:
        model: the model with gates on parameters; not changed.
        example_inputs: the inputs with which the model is copied; None if they are not at hand.
        folded: whether parameters are multiplied by their gates, as in evaluation.
    """
    plain = inputs.copied(model, example_inputs)
    for _, norm, _ in norms_with_open_statistics(plain):
        open_statistics.take_off(norm)
    replacements: dict[
        nn.Parameter, nn.Parameter
    ] = {}  # keeps tied parameters tied; their gates are the same in all modules
    for owner, name in dict.fromkeys((owner, name) for owner, name, _ in gated_parameters(plain)):
        before: Any = owner._parameters[name]
        take_off(owner, name, folded=folded)
        after: Any = owner._parameters[name]
        owner._parameters[name] = replacements.setdefault(before, after)
    return plain


class UnitStructure(GateVector[GatedParameter]):
    """Which gate cuts which class of units.

    Args:
        model: the gated model; not changed.
        example_inputs: the inputs of the trace; what the model raises on them is raised.

    Attributes:
        plain: a copy without gates.
        names: module of ``plain`` -> its name.
        units: the partition of ``plain`` into classes.
        gate_of: class -> its gate in the vector of all gates.
        counting: name -> the statistics of each norm that counts only open units.
        counted: name of such a norm -> the class of each element that it normalises.
        notes: gated parameter -> why its gates cut nothing.
    """

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        super().__init__(by_name(model, GatedParameter))
        self.plain = without_gates(model, example_inputs)
        self.names = {module: name for name, module in self.plain.named_modules()}
        self.units: Units = trace_units(self.plain, example_inputs, within=getattr(model, "dampr_within", []))
        self.counting = {name: statistics for name, _, statistics in norms_with_open_statistics(model)}
        self.units = self.units.with_open_statistics(self.counting)
        self.counted = {
            name: self.units.label[line].tolist() for name, line in self.units.counted if name in self.counting
        }
        # a layer that standardises its weight counts the columns of this weight, and so does a parametrization
        self._weights = {
            name: f"{name}.{statistics.owned}" if statistics.owned else f"{name.rpartition('.')[0]}.original"
            for name, statistics in self.counting.items()
            if statistics.owned or ".parametrizations." in name
        }
        for name, weight in self._weights.items():
            self.counted[name] = self.units.classes(weight, self.counting[name].dim)
        self.notes: dict[str, str] = {}
        self.gate_of = self._gates_of_classes()

    def branches(self, name: str) -> list[int]:
        """Return [], because gates on parameters do not close residual branches."""
        return []

    def least(self, start: int) -> int:
        """Two of what a layer reads whose weight has kernels of one element and is standardised, or whose norm divides
        by the unbiased deviation: one element alone has none. Else one.
        """
        for name, statistics in self.counting.items():
            holders = (holder for holder in self.holders if self.gated[holder].gate is statistics.gate)
            if start not in map(self.start, holders):
                continue
            if name in self._weights:
                shape = self.plain.get_parameter(self._weights[name]).shape
                alone = math.prod(shape[d] for d in statistics.dims(len(shape))) == shape[statistics.dim]
            else:
                alone = statistics.correction == 1 and not statistics.whole
            if alone:
                return 2
        return 1

    def _gates_of_classes(self) -> dict[int, int]:
        """Find for each class the gate that masks every column of it; also fills ``notes``.

        Returns: class -> gate. Classes that something reads without that gate are left out.
        """
        units = self.units
        gate_of_unit = np.full(len(units.label), -1)  # unit -> the gate that multiplies it; -1 if none does
        for name, layer in self.gated.items():
            parameter = parameter_name(name)
            index = layer.index.cpu().numpy()
            try:
                first = units.first_unit(parameter, layer.dim)
            except KeyError:  # a dimension of size 1
                continue
            dim_gates = gate_of_unit[first : first + len(index)]
            dim_gates[index >= 0] = index[index >= 0] + self.start(name)
        free = set(readable(units, dict(self.plain.named_parameters(remove_duplicate=False))))
        gate_by_class: dict[int, int] = {}
        columns = np.flatnonzero(units.columns)
        gates_of_columns: dict[int, set[int]] = defaultdict(set)
        for unit, class_id in zip(columns.tolist(), units.label[columns].tolist(), strict=True):
            gates_of_columns[class_id].add(int(gate_of_unit[unit]))
        for class_id, gates in gates_of_columns.items():
            if len(gates) == 1 and (gate := next(iter(gates))) >= 0 and class_id in free:
                gate_by_class[class_id] = gate
        # a norm must count each class by the gate that closes it
        for name, classes in self.counted.items():
            norm = self.counting[name]
            start = next((self.start(holder) for holder in self.holders if self.gated[holder].gate is norm.gate), None)
            for class_id, gate in zip(classes, norm.index.tolist(), strict=True):
                if class_id in gate_by_class and (start is None or gate < 0 or gate_by_class[class_id] != start + gate):
                    del gate_by_class[class_id]
        useful = set(gate_by_class.values())
        for name in self.holders:
            if useful.isdisjoint(self.rows(name)[0]):
                self.notes[name] = "on these example inputs its units cannot be cut"
        return gate_by_class

    def classes_of(self, closed: Tensor) -> list[int]:
        """Return the classes whose gates are closed; ``closed``: bool, (all gates,)."""
        shut = closed.tolist()
        return sorted(class_id for class_id, gate in self.gate_of.items() if shut[gate])

    def norms(self, model: nn.Module) -> Tensor:
        """Return for each gate the L2 norm of the weights that write its classes: (all gates,), float64 on the host.

        ``model`` is the gated model as it is now; its parameters count without gates.
        """
        squares = torch.zeros(self.size, dtype=torch.float64)
        parameters = dict(without_gates(model).named_parameters(remove_duplicate=False))
        sums: dict[tuple[str, int], Tensor] = {}
        for class_id, gate in self.gate_of.items():
            for name, dim, indices in self.units.members[class_id]:
                written = indices[self.units.written[self.units.first_unit(name, dim) + indices]]
                if len(written) and name in parameters and parameters[name].dim() > 1:
                    if (name, dim) not in sums:
                        weight = parameters[name].detach().double().cpu()
                        sums[name, dim] = weight.square().sum([d for d in range(weight.dim()) if d != dim])
                    squares[gate] += float(sums[name, dim][torch.from_numpy(written)].sum())
        return squares.sqrt()


def parameter_name(name: str) -> str:
    """Return the name of the parameter that a gate multiplies: "conv.weight" for "conv.weight_gates.0"."""
    return name.rpartition(".")[0].removesuffix("_gates")


class Counts:
    """The number of units that are left, as a linear function of variables: for each gate vector its number of open
    gates.

    Args:
        structure: which gate cuts which classes.
        device: the device of the gates that are counted.

    Attributes:
        gates: the gates that cut something.
        count: the number of variables.
    """

    def __init__(self, structure: UnitStructure, device: torch.device) -> None:
        self._structure = structure
        self.gates = set(structure.gate_of.values())
        self._vector = torch.empty(structure.size, dtype=torch.int64, device=device)
        owner: list[int] = []
        for number, (row,) in enumerate(structure.widths()):
            self._vector[row.start : row.stop] = number
            owner += [number] * len(row)
        self.count = len(structure.gates)
        self._size = Counter(owner[gate] for gate in self.gates)
        self._useful = torch.tensor([gate in self.gates for gate in range(structure.size)], device=device)
        # vectors that can close altogether; one gate counts as open then, because compaction keeps one
        self._emptiable = torch.zeros(self.count, dtype=torch.bool, device=device)
        for number, (row,) in enumerate(structure.widths()):
            self._emptiable[number] = self.gates.issuperset(row)
        self._number = np.full(len(structure.units.label), -1)
        for class_id, gate in structure.gate_of.items():
            self._number[class_id] = owner[gate]

    def __call__(self, gates: Tensor) -> Tensor:
        """Return the variables, (count,), for ``gates``, (all gates,): 1 for an open gate, 0 for a closed one, or
        values between.
        """
        counts = gates.new_zeros(self.count).index_add(
            0, self._vector, torch.where(self._useful, gates, gates.new_zeros(()))
        )
        return counts + ((counts == 0) & self._emptiable).to(counts.dtype)

    def of(self, units: Any) -> Width:
        """Return what is left of ``units``, int64 (n,), as a function of the variables."""
        numbers = self._number[self._structure.units.label[units]]
        counts = Counter(numbers[numbers >= 0].tolist())
        return Width(float((numbers < 0).sum()), {n: times / self._size[n] for n, times in counts.items()})

    def width(self, layer: nn.Module, writes: bool) -> Width:
        """Return what the time of a layer depends on: how many of its channels are left.

        For a recurrent layer, what it writes is the mean of the units of all layers and directions.

        Args:
            layer: a layer of the plain copy.
            writes: True: the channels that it writes. False: those that it reads.

        Returns: the width as a function of the variables; 1 if the layer's weight is not a parameter.
        """
        widths = []
        for tensor_name, wanted in kind_of(layer).timed_places(layer, writes):
            name = f"{self._structure.names[layer]}.{tensor_name}".lstrip(".")
            for dim, first, size in self._structure.units.origin.get(self._structure.units.alias.get(name, ""), []):
                if dim == wanted:
                    widths.append(self.of(np.arange(first, first + size)))
        return mean_of(widths) if widths else Width(1)
