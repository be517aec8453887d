"""How many channels are left of each width, as a function of the gates, for a model with gates in layers.

A width is a linear function of how open the classes of :class:`.structure.Structure` are. It is exact if each gate is 0
or 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dampr.nn.pruned.stacked_rnn import width_of

from . import graph
from .layers.registry import channel_count, kind_of
from .structure import Factor, Structure, UnitRows
from .terms import Width

Line = graph.Side | int  # a sequence of channels: a side of a layer, or the number of a factor of a product


class Variables:
    """The variables of the cost, computed from the gates; every :class:`Width` is a linear function of them.

    Called with the gates, (all gates,), it returns the variables, (``count``,), in this order:

    - for each group of classes that have the same number of channels in every width, the number of open ones;
    - for each recurrent layer, the number of open units in its widest layer and direction, at least 1; or, if layers
      and directions get widths of their own, that number for each of them;
    - for each attention with gates on heads, the number of open heads, at least 1;
    - for each layer in ``folds``, 1 if one of its classes is closed, because the layer then gets a bias, else 0.

    Args:
        structure: the structure of the model.
        device: where the variables are computed.
        folds: layer -> the classes whose closing gives it a bias.
    """

    def __init__(self, structure: Structure, device: torch.device, folds: Mapping[nn.Module, set[int]]) -> None:
        self._structure = structure
        counts: list[Counter[Line]] = [Counter() for _ in structure.writers]
        self.products = structure.products()
        self._lines = {
            line: n
            for n, line in enumerate(
                dict.fromkeys(f for *_, factors in self.products for f in factors if not isinstance(f, UnitRows))
            )
        }
        keyed: list[tuple[Line, Sequence[int]]] = [
            *structure.labels.items(),
            *((n, line) for line, n in self._lines.items()),
        ]
        for key, line in keyed:
            for label in line:
                if label >= 0:
                    counts[label][key] += 1
        closable = [
            {label: list(sets) for label, sets in enumerate(owners) if sets and all(sets)}
            for owners in (structure.writers, structure.readers)
        ]
        kinds: dict[frozenset[Any], int] = {}
        number_of = {
            label: kinds.setdefault(frozenset(counts[label].items()), len(kinds))
            for label in sorted({*closable[0], *closable[1]})
        }
        place = {label: i for i, label in enumerate(number_of)}
        self._kind_of = torch.tensor(list(number_of.values()), dtype=torch.int64, device=device)
        self._kinds = [dict(kind) for kind in kinds]
        self._sides = []
        for found in filter(None, closable):
            layers = [gates for sets in found.values() for gates in sets]
            first = iter(range(len(layers)))
            groups = [[next(first) for _ in sets] for sets in found.values()]
            where = torch.tensor([place[label] for label in found], device=device)
            self._sides.append((where, Products(layers, device), Products(groups, device)))
        self._rows: list[tuple[int, int, int]] = []  # (first gate, number of rows, gates of each row)
        self._units: dict[graph.Side, Width] = {}
        self._in_rows: dict[nn.Module, list[int]] = {}  # recurrent layer -> a variable for each of its rows
        for name, layer in structure.gated.items():
            if not kind_of(layer).gates_units:
                continue
            plain = structure.plain.get_submodule(name)
            if kind_of(layer).recurrent and plain not in structure.units:
                continue
            rows, number = structure.rows(name), len(kinds) + len(self._rows)
            if plain in structure.split:
                self._rows += [(row.start, 1, len(row)) for row in rows]
                numbers = list(range(number, number + len(rows)))
            else:
                self._rows.append((rows[0].start, len(rows), len(rows[0])))
                numbers = [number] * len(rows)
            self._in_rows[plain] = numbers
            output = Width(0, dict(Counter(numbers[-1 - getattr(plain, "bidirectional", False) :])))
            sides = [(plain, True), *((reader, False) for reader in structure.units.get(plain, []))]
            self._units |= dict.fromkeys(sides, output)
        self._emptiable = Emptiable(
            [(place[last], [place[label] for label in side]) for last, side in structure.emptiable], device
        )
        self.gates = {gate for found in closable for sets in found.values() for gates in sets for gate in gates}
        self.gates |= {first + i for first, rows, size in self._rows for i in range(rows * size)}
        self.attentions = [attention.name for attention in structure.attentions]
        self.count = len(kinds) + len(self._rows) + len(folds)
        first_fold = self.count - len(folds)
        self.biases = {layer: Width(0, {first_fold + number: 1}) for number, layer in enumerate(folds)}
        folded = ([place[label] for label in labels if label in place] for labels in folds.values())
        self._folds = Products(list(folded), device)

    def __call__(self, gates: Tensor) -> Tensor:
        """The variables, (count,), from ``gates``, (all gates,), values or probabilities from 0 to 1;
        differentiable.
        """
        openness = gates.new_ones(len(self._kind_of))
        for where, of_layer, of_label in self._sides:
            openness = openness.index_copy(0, where, openness[where] * (1 - of_label(1 - of_layer(gates))))
        openness = self._emptiable(openness)
        sums = openness.new_zeros(len(self._kinds)).index_add(0, self._kind_of, openness)
        units = [
            gates[first : first + rows * size].view(rows, size).sum(1).max().clamp(min=1)
            for first, rows, size in self._rows
        ]
        return torch.cat(
            [sums, *([torch.stack(units)] if units else []), *([1 - self._folds(openness)] if self.biases else [])]
        )

    def width(self, layer: nn.Module, writes: bool) -> Width:
        """The channels that are left of those that ``layer`` writes (``writes``), or reads."""
        units = self.units(layer, writes)
        if units is not None:
            return units
        labels = self._structure.labels.get((layer, writes))
        total = channel_count(layer, writes)
        if labels is None:
            return Width(total)
        return self.of((layer, writes), total)

    def of(self, key: Line, total: int) -> Width:
        """The channels that are left of the ``total`` channels of ``key``, a side of a layer or a factor of a
        product.
        """
        weights = {number: kind[key] for number, kind in enumerate(self._kinds) if key in kind}
        sizes = torch.bincount(self._kind_of, minlength=len(self._kinds)).tolist()
        return Width(total - sum(count * sizes[number] for number, count in weights.items()), weights)

    def of_factors(self, factors: list[Factor]) -> list[tuple[Width, int]]:
        """What is left of each factor of a product, and how long the factor is."""
        return [
            (Width(0, dict(Counter(self._in_rows[f.layer][row] for row in f.rows))), f.size)
            if isinstance(f, UnitRows)
            else (self.of(self._lines[f], len(f)), len(f))
            for f in factors
        ]

    def has_more(self, layer: nn.Module, factors: list[Factor]) -> bool:
        """Whether a product of ``layer`` depends on other channels than those that the layer reads and writes.

        A layer that mixes tokens is an example.
        """
        own = [tuple(self._structure.labels.get((layer, writes), [])) for writes in (True, False)]
        reads_units = self.units(layer, False) is not None
        return any(f not in own and not (reads_units and isinstance(f, UnitRows)) for f in factors)

    def units(self, layer: nn.Module, writes: bool) -> Width | None:
        """The width of a side of ``layer`` if its channels are units of a recurrent layer or heads of an attention that
        can be cut; else None.
        """
        return self._units.get((layer, writes))

    def rows(self, layer: nn.RNNBase) -> list[Width]:
        """For each layer and direction of a recurrent layer, the outputs that are left (projected units, if it has a
        projection).
        """
        numbers = self._in_rows.get(layer)
        if numbers is None:
            return [Width(width_of(layer))] * (layer.num_layers * (1 + layer.bidirectional))
        return [Width(0, {number: 1}) for number in numbers]

    def heads(self, layer: nn.MultiheadAttention) -> Width:
        """The heads of an attention that are left."""
        return self.units(layer, True) or Width(layer.num_heads)


class Products:
    """Computes the product of each group of elements of a vector; 1 for an empty group.

    ``groups``: the indices of each group. Called with values (n,), it returns (groups,).
    """

    def __init__(self, groups: Sequence[Collection[int]], device: torch.device) -> None:
        self._groups = len(groups)
        self._index = torch.tensor([i for group in groups for i in group], dtype=torch.int64, device=device)
        self._group = torch.tensor(
            [n for n, group in enumerate(groups) for _ in group], dtype=torch.int64, device=device
        )
        self._single = all(len(group) == 1 for group in groups)

    def __call__(self, values: Tensor) -> Tensor:
        chosen = values[self._index]
        return chosen if self._single else values.new_ones(self._groups).scatter_reduce(0, self._group, chosen, "prod")


class Emptiable:
    """Keeps one class open in each side of a layer whose classes are all closed, as compaction does.

    ``sides``: for each side the class that stays, and all its classes.
    """

    def __init__(self, sides: Sequence[tuple[int, Sequence[int]]], device: torch.device) -> None:
        self._last = torch.tensor([last for last, _ in sides], dtype=torch.int64, device=device)
        self._index = torch.tensor([i for _, side in sides for i in side], dtype=torch.int64, device=device)
        self._side = torch.tensor(
            [n for n, (_, side) in enumerate(sides) for _ in side], dtype=torch.int64, device=device
        )

    def __call__(self, openness: Tensor) -> Tensor:
        """``openness``, (classes,), with 1 added at each class that has to stay.

        What is added is a constant, so the gradient does not change. If gates are open probabilities, nothing is added,
        because none is 0.
        """
        own = openness.detach()[self._index]
        left = torch.zeros_like(self._last, dtype=openness.dtype).index_add(0, self._side, own)
        stay = torch.zeros_like(openness).index_add(0, self._last, (left == 0).to(openness.dtype))
        return openness + stay.clamp(max=1)


class Affine:
    """Computes widths from the variables: a constant plus a matrix times the variables.

    Called with (variables,) in float64, it returns (widths,).
    """

    def __init__(self, widths: Sequence[Width], variables: int, device: torch.device) -> None:
        self._constant = torch.tensor([width.constant for width in widths], dtype=torch.float64, device=device)
        self._matrix = torch.zeros(len(widths), variables, dtype=torch.float64)
        for row, width in enumerate(widths):
            for number, weight in width.weights.items():
                self._matrix[row, number] = weight
        self._matrix = self._matrix.to(device)

    def __call__(self, variables: Tensor) -> Tensor:
        """The widths, (widths,), from ``variables``, (variables,), float64."""
        return torch.addmv(self._constant, self._matrix, variables)
