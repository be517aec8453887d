"""The cost of a gated model after compaction, as a function of the gates that are open.

A linear or convolution layer costs a * In * Out + b * Out, where In and Out are the numbers of channels that are left:
bilinear, because cutting a channel makes both the layer that writes it and the layers that read it cheaper. In and Out
are linear in the classes of :class:`Structure`, so the cost of a decision (open or closed for each gate) is exact. The
same function of open probabilities is the expected cost, if gates are independent, and has a gradient.
"""

from __future__ import annotations

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from dampr.nn import GatedMultiheadAttention
from dampr.nn.pruned.stacked_rnn import width_of
from dampr.nn.rnn import GatedRecurrent

from . import graph, inputs, new_biases
from .measure import count_call, count_macs, count_params, macs_beside_layers
from .modules import by_name, of_kind
from .structure import Structure
from .unit_structure import Counts, UnitStructure, has_unit_gates
from .wrapped import check_bare, check_values, unwrapped

_PER_CHANNEL = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.PReLU)


class Width(NamedTuple):
    """The number of channels that are left on one side of a layer: ``constant`` + the sum of ``weights[i]`` times
    variable i (:class:`_Variables`).
    """

    constant: float
    weights: Mapping[int, float] = {}


_Line = graph.Side | int  # a sequence of channels: a side of a layer, or the number of a factor of a product


class Term(NamedTuple):
    """A part of the cost: ``bilinear`` * In * Out + ``linear`` * Out, for a layer or for one weight of a recurrent
    layer.

    Attributes:
        name: the name of the layer.
        read: In, the channels that are left of those it reads.
        written: Out, the channels that are left of those it writes.
        bilinear, linear: the coefficients.
        more: further widths by which the whole term is multiplied.
    """

    name: str
    read: Width
    written: Width
    bilinear: float
    linear: float = 0.0
    more: tuple[Width, ...] = ()


class Cost:
    """MACs or parameters of the compacted model, as a function of the vector of all gates.

    The vector holds 1 for open and 0 for closed gates, or open probabilities. A width whose gates are all closed counts
    one channel, because compaction keeps one. The layers in front of a closed residual branch count as if the branch
    still read them, although compaction may cut them too.

    Args:
        model: a model with gates.
        example_inputs: as for :func:`dampr.compact`; MACs are those of one pass over them.
        metric: "macs" or "params".

    Attributes:
        structure: which gates cut which classes of units.
        total: the cost of the model with all gates open.
        metric: as the argument.
        device: the device of the gates.
        terms: the terms of the cost.

    >>> import dampr
    >>> model = nn.Sequential(dampr.nn.GatedLinear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> cost = Cost(model, torch.randn(1, 4), "macs")
    >>> cost.total, int(cost(torch.arange(8) < 4))
    (48, 24)
    """

    total: float

    def __init__(self, model: nn.Module, example_inputs: Any, metric: str) -> None:
        check_bare(unwrapped(model), "its operators are followed")
        check_values(model)
        self.structure: Structure | UnitStructure = structure_of(unwrapped(model), example_inputs)
        self.metric = metric
        self.device = self.structure.gates[0].deterministic().device
        self._variables: _Variables | Counts
        if isinstance(self.structure, UnitStructure):
            self._variables = Counts(self.structure, self.device)
        else:
            folds = new_biases.find(unwrapped(model), self.structure, example_inputs) if metric == "params" else {}
            self._variables = _Variables(self.structure, self.device, folds)
        self.terms = self._find_terms(self.structure.plain, example_inputs)
        self._read, self._written = (
            _Affine([getattr(term, side) for term in self.terms], self._variables.count, self.device)
            for side in ("read", "written")
        )
        depth = max((len(term.more) for term in self.terms), default=0)
        self._more = [
            _Affine(
                [term.more[i] if i < len(term.more) else Width(1) for term in self.terms],
                self._variables.count,
                self.device,
            )
            for i in range(depth)
        ]
        branches = [self.structure.branches(term.name) for term in self.terms]
        self._branches = _Products(branches, self.device) if any(branches) else None
        self.total = self._measure(self.structure.plain, example_inputs)
        self._fixed = 0.0
        self._fixed = self.total - float(self(torch.ones(self.structure.size)))

    def __call__(self, gates: Tensor) -> Tensor:
        """The cost, a float64 scalar.

        gates: (structure.size,), of any dtype; the cost has a gradient to it if it requires one.
        """
        gates = gates.to(self.device, torch.float64)
        variables = self._variables(gates)
        each = self._each(self._read(variables), self._written(variables))
        for factor in self._more:
            each = each * factor(variables)
        return (each if self._branches is None else each * self._branches(gates)).sum() + self._fixed

    def _find_terms(self, plain: nn.Module, example_inputs: Any) -> list[Term]:
        """The terms of the cost for this kind of gates and this metric."""
        if isinstance(self.structure, UnitStructure):
            assert isinstance(self._variables, Counts)
            return list(_unit_terms(self.structure, self._variables, self.metric))
        assert isinstance(self._variables, _Variables)
        if self.metric != "macs":
            return list(_params(self.structure, self._variables))
        return [
            *_macs(plain, self._variables, example_inputs),
            *_attention_terms(self.structure, self._variables, example_inputs),
        ]

    def _measure(self, plain: nn.Module, example_inputs: Any) -> float:
        """The cost of the model with all gates open; also stores the coefficients that :meth:`_each` needs."""
        constants = torch.tensor([term[3:5] for term in self.terms], dtype=torch.float64, device=self.device)
        self._bilinear, self._linear = constants.view(-1, 2).unbind(1)
        return count_macs(plain, example_inputs) if self.metric == "macs" else count_params(plain)

    def _each(self, read: Tensor, written: Tensor) -> Tensor:
        """The cost of each term; all tensors are (terms,): the channels left that it reads, and those that it
        writes.
        """
        return (self._bilinear * read + self._linear) * written

    def probabilities(self) -> Tensor:
        """The open probability (or the family's surrogate) of every gate, (structure.size,), with a graph."""
        return torch.cat([gate.open_probability() for gate in self.structure.gates])

    @functools.cached_property
    def prunable(self) -> Tensor:
        """The gates on which the cost depends: bool, (structure.size,), on the host."""
        found = torch.zeros(self.structure.size, dtype=torch.bool)
        found[[*self._variables.gates, *self.whole]] = True
        return found

    @functools.cached_property
    def whole(self) -> set[int]:
        """The gates of whole residual branches. All of them may close; other widths keep one open gate."""
        return {gate for term in self.terms for gate in self.structure.branches(term.name)}

    def decision(self) -> Tensor:
        """The gates that are open in evaluation: bool, (structure.size,)."""
        return torch.cat([gate.is_open() for gate in self.structure.gates])


def structure_of(model: nn.Module, example_inputs: Any) -> Structure | UnitStructure:
    """Find which gates of ``model`` cut which classes of units.

    Returns: a :class:`UnitStructure` if the gates are on parameters, else a :class:`Structure`.

    Raises: what the model raises on the example inputs.
    """
    # The model itself says best what is wrong with inputs; its copies are without gates, and have no values.
    inputs.without_arithmetic(model, example_inputs, inputs.evaluate)
    return UnitStructure(model, example_inputs) if has_unit_gates(model) else Structure(model, example_inputs)


def _unit_terms(structure: UnitStructure, counts: Counts, metric: str) -> Iterator[Term]:
    """The terms of a model with gates on parameters: one for each product ("macs") or each parameter.

    Each is proportional to what is left of its dimensions.
    """
    if metric == "macs":
        products = [(p.module, p.macs, p.factors) for p in structure.units.products]
    else:
        own = dict(structure.plain.named_parameters())
        products = [
            (name, own[name].numel(), [np.arange(first, first + size) for _, first, size in dims])
            for name, dims in structure.units.origin.items()
            if name in own
        ]
    alike: dict[Any, tuple[str, int, Any]] = {}  # each step of a recurrent layer makes the same products
    for name, amount, factors in products:
        key = name, tuple(line.tobytes() for line in factors)
        alike[key] = name, amount + alike.get(key, ("", 0))[1], factors
    for name, amount, factors in alike.values():
        yield from _in_proportion(name, amount, [(Width(*counts.of(line)), len(line)) for line in factors])


def _in_proportion(name: str, amount: int, widths: list[tuple[Width, int]]) -> Iterator[Term]:
    """A term that costs ``amount`` at full widths and is proportional to what is left of each width.

    widths: (width, full size) pairs. Nothing is returned if no width can change.
    """
    narrow = [(width, size) for width, size in widths if width.weights]
    scale = amount / math.prod(size for _, size in narrow)
    first, second, *more = [width for width, _ in narrow] + [Width(1)] * (2 - len(narrow))
    if narrow:
        yield Term(name, first, second, scale, 0.0, tuple(more))


class _Variables:
    """The variables of the cost, computed from the gates; every :class:`Width` is a linear function of them.

    The variables are, in this order:

    - for each kind of classes, the number of open ones (classes that count alike in all widths are of one kind);
    - for each recurrent layer, the number of open units in its widest layer and direction, at least 1; or, if layers
      and directions get widths of their own, that number for each of them;
    - for each attention with gates on heads, the number of open heads, at least 1;
    - for each layer in ``folds``, 1 if one of its classes is closed, because the layer then gets a bias, else 0.
    """

    def __init__(self, structure: Structure, device: torch.device, folds: Mapping[nn.Module, set[int]]) -> None:
        self._structure = structure
        counts: list[Counter[_Line]] = [Counter() for _ in structure.writers]
        self.products = structure.products()
        self._lines = {
            line: n for n, line in enumerate(dict.fromkeys(line for *_, factors in self.products for line in factors))
        }
        keyed: list[tuple[_Line, Sequence[int]]] = [
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
        kind_of = {
            label: kinds.setdefault(frozenset(counts[label].items()), len(kinds))
            for label in sorted({*closable[0], *closable[1]})
        }
        place = {label: i for i, label in enumerate(kind_of)}
        self._kind_of = torch.tensor(list(kind_of.values()), dtype=torch.int64, device=device)
        self._kinds = [dict(kind) for kind in kinds]
        self._sides = []
        for found in filter(None, closable):
            layers = [gates for sets in found.values() for gates in sets]
            first = iter(range(len(layers)))
            groups = [[next(first) for _ in sets] for sets in found.values()]
            where = torch.tensor([place[label] for label in found], device=device)
            self._sides.append((where, _Products(layers, device), _Products(groups, device)))
        self._rows: list[tuple[int, int, int]] = []  # (first gate, number of rows, gates of each row)
        self._units: dict[graph.Side, Width] = {}
        self._in_rows: dict[nn.Module, list[int]] = {}  # recurrent layer -> a variable for each of its rows
        for name, layer in structure.gated.items():
            if not isinstance(layer, (GatedMultiheadAttention, GatedRecurrent)):
                continue
            plain = structure.plain.get_submodule(name)
            if isinstance(layer, GatedRecurrent) and plain not in structure.units:
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
        self._emptiable = _Emptiable(
            [(place[last], [place[label] for label in side]) for last, side in structure.emptiable], device
        )
        self.gates = {gate for found in closable for sets in found.values() for gates in sets for gate in gates}
        self.gates |= {first + i for first, rows, size in self._rows for i in range(rows * size)}
        self.attentions = [attention.name for attention in structure.attentions]
        self.count = len(kinds) + len(self._rows) + len(folds)
        first_fold = self.count - len(folds)
        self.biases = {layer: Width(0, {first_fold + number: 1}) for number, layer in enumerate(folds)}
        folded = ([place[label] for label in labels if label in place] for labels in folds.values())
        self._folds = _Products(list(folded), device)

    def __call__(self, gates: Tensor) -> Tensor:
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
        total = graph.channel_count(layer, writes)
        if labels is None:
            return Width(total)
        return self.of((layer, writes), total)

    def of(self, key: _Line, total: int) -> Width:
        """The channels that are left of the ``total`` channels of ``key``, a side of a layer or a factor of a
        product.
        """
        weights = {number: kind[key] for number, kind in enumerate(self._kinds) if key in kind}
        sizes = torch.bincount(self._kind_of, minlength=len(self._kinds)).tolist()
        return Width(total - sum(count * sizes[number] for number, count in weights.items()), weights)

    def of_product(self, name: str, macs: int, factors: list[tuple[int, ...]]) -> Iterator[Term]:
        """The term of a product of ``macs`` multiply-accumulates, proportional to what is left of its factors."""
        yield from _in_proportion(name, macs, [(self.of(self._lines[line], len(line)), len(line)) for line in factors])

    def has_more(self, layer: nn.Module, factors: list[tuple[int, ...]]) -> bool:
        """Whether a product of ``layer`` depends on other channels than those that the layer reads and writes.

        A layer that mixes tokens is an example.
        """
        own = [tuple(self._structure.labels.get((layer, writes), [])) for writes in (True, False)]
        return any(line not in own for line in factors)

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


class _Products:
    """The product of each group of elements of a vector; 1 for an empty group.

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


class _Emptiable:
    """Keep one class open in each side of a layer whose classes are all closed, as compaction does.

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

        It adds a constant, so the gradient does not change; with probabilities it adds nothing, because none is 0.
        """
        own = openness.detach()[self._index]
        left = torch.zeros_like(self._last, dtype=openness.dtype).index_add(0, self._side, own)
        stay = torch.zeros_like(openness).index_add(0, self._last, (left == 0).to(openness.dtype))
        return openness + stay.clamp(max=1)


class _Affine:
    """Widths as an affine function of the variables: a constant and a matrix."""

    def __init__(self, widths: Sequence[Width], variables: int, device: torch.device) -> None:
        self._constant = torch.tensor([width.constant for width in widths], dtype=torch.float64, device=device)
        self._matrix = torch.zeros(len(widths), variables, dtype=torch.float64)
        for row, width in enumerate(widths):
            for number, weight in width.weights.items():
                self._matrix[row, number] = weight
        self._matrix = self._matrix.to(device)

    def __call__(self, variables: Tensor) -> Tensor:
        return torch.addmv(self._constant, self._matrix, variables)


def _macs(plain: nn.Module, variables: _Variables, example_inputs: Any) -> Iterator[Term]:
    """The terms for multiply-accumulates: of linear, convolution and recurrent layers, attentions, and products outside
    of layers.
    """
    uses, projections = _uses(plain, example_inputs)
    more = _products_apart(plain, variables)
    for product in more.values():
        for name, macs, factors in product:
            yield from variables.of_product(name, macs, factors)
    for name, layer in plain.named_modules():
        times = 0 if name in more else uses.get(layer, 0)
        if isinstance(layer, nn.MultiheadAttention):
            heads, projected = variables.heads(layer), projections.get(layer, 0)
            yield Term(name, variables.width(layer, False), heads, projected / (layer.num_heads * layer.embed_dim))
            yield Term(name, Width(1), heads, (times - projected) / layer.num_heads)
        elif isinstance(layer, nn.RNNBase):
            yield from _recurrent_terms(name, layer, variables, times, biases=False)
        elif graph.is_depthwise(layer) and times:
            yield Term(name, Width(1), variables.width(layer, True), times * layer.weight[0].numel())
        elif times:
            yield _weight_term(name, layer, variables, times)


def _products_apart(plain: nn.Module, variables: _Variables) -> dict[str, list[tuple[str, int, list[tuple[int, ...]]]]]:
    """The products that get terms of their own, by module.

    These are products of code outside of layers, and products of layers that depend on other channels than those that
    the layer reads and writes.
    """
    found: dict[str, list[tuple[str, int, list[tuple[int, ...]]]]] = defaultdict(list)
    for product in variables.products:
        found[product[0]].append(product)
    whole = [f"{name}." for name in variables.attentions]
    whole += [f"{name}." for name, layer in by_name(plain, (nn.RNNBase, nn.MultiheadAttention)).items()]

    def apart(name: str, own: list[tuple[str, int, list[tuple[int, ...]]]]) -> bool:
        layer = plain.get_submodule(name)
        if isinstance(layer, graph.GEMMS):
            return any(variables.has_more(layer, factors) for *_, factors in own)
        return not f"{name}.".startswith(tuple(whole))

    return {name: own for name, own in found.items() if apart(name, own)}


def _params(structure: Structure, variables: _Variables) -> Iterator[Term]:
    """The terms for parameters: of every layer, proportional to its channels or heads or constant, and of parameters
    outside of layers.
    """
    plain = structure.plain
    inside = {layer.out_proj for layer in of_kind(plain, nn.MultiheadAttention)}
    bare = {plain.get_parameter(name): (name, stream) for stream, _ in structure.streams for name in stream.parameters}
    for p, (name, stream) in bare.items():
        yield Term(name, Width(1), variables.width(stream.norms[0], True), p.numel() / stream.width)
    counted: set[Any] = set()  # weights that have a term; an embedding may share its weight with the last layer
    for name, layer in plain.named_modules():
        own = sum(p.numel() for p in layer.parameters(recurse=False) if p not in bare)
        if layer in inside:
            continue
        if isinstance(layer, nn.MultiheadAttention):
            yield from _attention_params(name, layer, variables)
        elif isinstance(layer, nn.RNNBase):
            yield from _recurrent_terms(name, layer, variables, 1, biases=layer.bias)
        elif isinstance(layer, _PER_CHANNEL) or graph.is_depthwise(layer):
            yield Term(name, Width(1), variables.width(layer, True), own / graph.channel_count(layer, True))
        elif isinstance(layer, nn.Embedding):
            yield Term(name, Width(layer.num_embeddings), variables.width(layer, True), layer.weight not in counted)
            counted.add(layer.weight)
        elif isinstance(layer, graph.GEMMS) or (graph.is_transposed(layer) and layer.groups == 1):
            yield _weight_term(name, layer, variables, layer.weight not in counted, bias=layer.bias is not None)
            if layer in variables.biases:
                yield Term(name, variables.biases[layer], variables.width(layer, True), 1)
            counted.add(layer.weight)
        elif own:
            yield Term(name, Width(1), Width(1), own)


def _attention_params(name: str, layer: nn.MultiheadAttention, variables: _Variables) -> Iterator[Term]:
    """The terms for the parameters of an attention.

    Its projections have one dimension proportional to the heads and one proportional to the width around the attention.
    """
    heads, width = variables.heads(layer), variables.width(layer, False)
    in_weights = layer.in_proj_weight, layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight
    weights, biases = (
        sum(p.numel() for p in found if p is not None)
        for found in ((*in_weights, layer.out_proj.weight), (layer.in_proj_bias, layer.bias_k, layer.bias_v))
    )
    yield Term(name, width, heads, weights / (layer.num_heads * layer.embed_dim), biases / layer.num_heads)
    if layer.out_proj.bias is not None:
        yield Term(name, Width(1), width, 1)


def _weight_term(name: str, layer: Any, variables: _Variables, times: float, bias: bool = False) -> Term:
    """The term of a layer with one weight.

    times: how often each element of the weight counts (1 for parameters). bias: whether to count a bias.
    """
    written, read = layer.weight.shape[:2]
    return Term(
        name,
        variables.width(layer, False),
        variables.width(layer, True),
        times * layer.weight.numel() / (written * read),
        float(bias),
    )


def _recurrent_terms(name: str, layer: nn.RNNBase, variables: _Variables, times: float, biases: bool) -> Iterator[Term]:
    """A term for each weight of a recurrent layer, in all its layers and directions."""
    each, rows = 1 + layer.bidirectional, variables.rows(layer)
    for row, names in enumerate(layer._all_weights):
        gates = getattr(layer, names[1]).shape[0] / layer.hidden_size
        hidden = Width(layer.hidden_size) if layer.proj_size else rows[row]
        below = row // each * each - each
        read = variables.width(layer, False) if row < each else sum_of(rows[below : below + each])
        yield Term(name, read, hidden, times * gates, 2 * gates * biases)
        yield Term(name, rows[row], hidden, times * gates)
        if layer.proj_size:
            yield Term(name, hidden, rows[row], times)


def sum_of(widths: Sequence[Width]) -> Width:
    """The sum of several widths."""
    total: Counter[int] = Counter()
    for width in widths:
        total.update(width.weights)
    return Width(sum(width.constant for width in widths), total)


def _attention_terms(structure: Structure, variables: _Variables, example_inputs: Any) -> Iterator[Term]:
    """The terms for the attention scores and the weighted sums, proportional to the heads that are left."""
    if structure.attentions:
        beside = macs_beside_layers(
            structure.plain, example_inputs, [attention.name for attention in structure.attentions]
        )
        for attention in structure.attentions:
            columns = variables.width(attention.written, False)
            yield Term(attention.name, Width(1), columns, beside[attention.name] / attention.written.in_features)


def _uses(plain: nn.Module, example_inputs: Any) -> tuple[dict[nn.Module, int], dict[nn.Module, int]]:
    """(uses, projections) of each layer on the example inputs.

    uses: how often each element of a layer's weight is used: positions of the output, or steps of a sequence. For an
    attention it is the multiply-accumulates of all heads, with projections. projections: for an attention, the
    multiply-accumulates of its projections alone.
    """
    layers = dict(plain.named_modules())
    uses, projections = inputs.without_arithmetic(plain, example_inputs, _uses_by_name)
    return {layers[name]: n for name, n in uses.items()}, {layers[name]: n for name, n in projections.items()}


def _uses_by_name(plain: nn.Module, example_inputs: Any) -> tuple[dict[str, int], dict[str, int]]:
    """As :func:`_uses`, by the names of the layers."""
    found: dict[str, int] = defaultdict(int)
    projections: dict[str, int] = defaultdict(int)
    names = {layer: name for name, layer in plain.named_modules()}

    def count(layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        name = names[layer]
        if isinstance(layer, nn.RNNBase):
            values = args[0].data if isinstance(args[0], PackedSequence) else args[0]
            found[name] += values.numel() // layer.input_size
        elif isinstance(layer, nn.MultiheadAttention):
            found[name] += count_call(layer.forward, *args, **kwargs)  # not through the hooks
            given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            projections[name] += sum(given[x].numel() for x in ("query", "query", "key", "value")) * layer.embed_dim
        else:
            found[name] += output.numel() // graph.channel_count(layer, True)

    layers = of_kind(plain, (*graph.GEMMS, nn.RNNBase, nn.MultiheadAttention))
    hooks = [layer.register_forward_hook(count, with_kwargs=True) for layer in layers]
    with inputs.removing(hooks):
        inputs.evaluate(plain, example_inputs)
    return found, projections
