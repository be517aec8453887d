"""Recurrent layers of torch, those that compaction makes of them, and cells."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from dampr.gates import GateLike
from dampr.nn import GatedGRU, GatedLSTM, GatedRNN, ScaledRNN, StackedRNN
from dampr.nn.base import Granularity
from dampr.nn.called import first_argument
from dampr.nn.pruned.narrowed_rnn import arguments_of
from dampr.nn.pruned.stacked_rnn import width_of

from ..places import Places, places_in
from ..terms import LayerWidths, Term, Width, mean_of, sum_of
from .base import Call, Counted, Entry, Kind, torch_type


class _OfRecurrent(Kind):
    """What recurrent layers of torch and :class:`dampr.nn.StackedRNN` have in common."""

    def tensors(self, layer: Any, entry: Entry) -> dict[str, list[Places]]:
        """As for other layers; the entry "units" has the units that are left in each layer and direction."""
        _, read = (places_in(entry.get(side)) for side in ("out", "in"))
        return dict(self._tensors(layer, entry.get("units"), read))

    def _tensors(self, layer: Any, units: dict[str, Any] | None, read: Places) -> Iterator[tuple[str, list[Places]]]:
        """Yields the name of each tensor, and what is left of each of its dimensions.

        Args:
            units: the part of the manifest entry for its units; None if no unit was cut.
            read: what is left of the input features.
        """
        each = 1 + layer.bidirectional
        parts = self._parts(layer)
        if units is not None and len(units["kept"]) != len(parts):
            found = f"{len(units['kept'])} lists of those that are kept"
            raise ValueError(f"manifest: units: {found}, expected {len(parts)}, one for each layer")
        for row, (part, names) in enumerate(parts):
            own = below = gates = None
            if units is not None:
                size = units["before"]
                left = [places_in({"before": size, "kept": r}) for r in units["kept"]]
                rows = [place[1] for place in left if place is not None]
                own = size, rows[row]
                weight = part.get_parameter(names[0].rpartition(".")[2])
                count = weight.shape[0] // part.hidden_size
                if not part.proj_size:
                    gates = count * size, torch.cat([rows[row] + i * size for i in range(count)])
                if row >= each:
                    first = row // each * each - each
                    below = each * size, torch.cat([rows[first + i] + i * size for i in range(each)])
            for name in names:
                if "weight_ih" in name:
                    yield name, [gates, read if row < each else below]
                elif "weight_hh" in name:
                    yield name, [gates, own]
                elif "weight_hr" in name:
                    yield name, [own, None]
                else:
                    yield name, [gates]

    def _parts(self, layer: Any) -> list[tuple[Any, list[str]]]:
        """For each layer and direction, the ``nn`` module that holds it and the names of its weights in ``layer``."""
        raise NotImplementedError


class Recurrent(_OfRecurrent, Counted):
    """``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``; their gates are on units of the state."""

    types = (nn.RNNBase,)
    twins = ((nn.LSTM, GatedLSTM), (nn.GRU, GatedGRU), (nn.RNN, GatedRNN))
    gated_parts = "units"
    reads = recurrent = gates_units = one_node = resizes = follows = from_file = True
    size_written, size_read = "", "input_size"

    def gated(self, layer: Any, gate: GateLike, granularity: Granularity, per_sample: bool) -> Any:
        return self.twin(layer).from_dense(layer, gate=gate)

    def width(self, layer: Any, writes: bool) -> int:
        """The outputs of all directions of the last layer, or the input features."""
        return (1 + layer.bidirectional) * width_of(layer) if writes else int(layer.input_size)

    def rows(self, layer: Any) -> int:
        """One gate vector for each layer and direction."""
        return int(layer.num_layers) * (1 + layer.bidirectional)

    def places(self, layer: Any, writes: bool) -> list[tuple[str, int]]:
        """The place of the input features alone; :mod:`dampr.prune.recurrent` finds which layers read the units."""
        return [] if writes else [("weight_ih_l0", 1)]

    def side(self, layer: Any, own: str, dim: int) -> bool | None:
        """The columns of the input weights of the first layer are what it reads; nothing else can be cut by side."""
        return False if own.startswith("weight_ih_l0") and dim == 1 else super().side(layer, own, dim)

    def input_axis(self, layer: Any) -> int:
        return -1

    def input_columns(self, layer: Any) -> list[tuple[nn.Module, str]]:
        """The input weights of the first layer, one for each direction."""
        return [(layer, name) for name in ["weight_ih_l0", *["weight_ih_l0_reverse"] * layer.bidirectional]]

    def staying(self, layer: Any) -> dict[tuple[str, int], str]:
        """The hidden units that a projection reads: torch wants more of these than there are projected ones."""
        names = [name for name, _ in layer.named_parameters(recurse=False) if name.startswith("weight_hr")]
        return {(name, 1): "a projection reads it, which has to make it narrower" for name in names}

    def sizes(self, layer: Any, entry: Entry) -> dict[str, int]:
        """As for other layers, and the number of units in ``hidden_size`` or ``proj_size``."""
        units = {size_of_units(layer): entry["units"]["before"]} if "units" in entry else {}
        return {} if "heads" in entry else super().sizes(layer, entry) | units

    def restored(self, layer: Any, entry: Entry) -> nn.Module:
        """As for other layers; torch's list of weights is made anew, because these are other tensors now."""
        super().restored(layer, entry)
        layer._init_flat_weights()
        restored: nn.Module = layer
        return restored

    def follow(self, layer: Any, keeps_groups: bool = False) -> None:
        """Set the sizes, and the list of weights that torch's forward takes."""
        _follow(layer)
        layer._flat_weights = [getattr(layer, name, None) for name in layer._flat_weights_names]

    def _parts(self, layer: Any) -> list[tuple[Any, list[str]]]:
        return [(layer, names) for names in layer._all_weights]

    # ---- cost

    def uses(self, layer: Any, call: Call, output: Any) -> tuple[int, int]:
        """Elements of the input divided by its features: the steps of all sequences, each of which uses every weight
        once.
        """
        x = first_argument(*call)
        values = x.data if isinstance(x, PackedSequence) else x
        return values.numel() // layer.input_size, 0

    def macs(self, name: str, layer: Any, widths: LayerWidths, uses: int, projections: int) -> Iterator[Term]:
        yield from self._terms(name, layer, widths, uses, biases=False)

    def params(self, name: str, layer: Any, widths: LayerWidths, own: int, counted: set[Any]) -> Iterator[Term]:
        yield from self._terms(name, layer, widths, 1, biases=layer.bias)

    def _terms(self, name: str, layer: Any, widths: LayerWidths, times: float, biases: bool) -> Iterator[Term]:
        """A term for each weight of all layers and directions; each element of a weight counts ``times``, a bias once
        if ``biases``.
        """
        each, rows = 1 + layer.bidirectional, widths.rows(layer)
        for row, names in enumerate(layer._all_weights):
            gates = getattr(layer, names[1]).shape[0] / layer.hidden_size
            hidden = Width(layer.hidden_size) if layer.proj_size else rows[row]
            below = row // each * each - each
            read = widths.width(layer, False) if row < each else sum_of(rows[below : below + each])
            yield Term(name, read, hidden, times * gates, 2 * gates * biases)
            yield Term(name, rows[row], hidden, times * gates)
            if layer.proj_size:
                yield Term(name, hidden, rows[row], times)

    def timed_widths(self, layer: Any, widths: LayerWidths) -> tuple[Width, Width]:
        """The input features, and the mean of the units that layers and directions have left."""
        return widths.width(layer, False), mean_of(widths.rows(layer))

    def timed_size(self, layer: Any, writes: bool) -> int:
        """The units of one direction for what it writes, else the input features."""
        return width_of(layer) if writes else self.width(layer, writes)

    def timed_places(self, layer: Any, writes: bool) -> list[tuple[str, int]]:
        """The columns that read the units of each layer and direction, or the input features."""
        return [(name, 1) for name in (unit_columns(layer) if writes else ["weight_ih_l0"])]

    def narrow(self, layer: Any, read: int, written: int, within: bool) -> nn.Module:
        """A layer of the same type with ``read`` features and ``written`` units in each layer and direction."""
        names = ("num_layers", "bias", "batch_first", "bidirectional", "nonlinearity")
        same = {name: getattr(layer, name) for name in names if hasattr(layer, name)}
        sizes = {"hidden_size": layer.hidden_size} | {size_of_units(layer): written}
        narrow: nn.Module = torch_type(layer)(read, **sizes, **same)
        return narrow

    def narrow_call(self, layer: Any, call: Call, read: int) -> Call:
        """The same sequences with the first ``read`` features, and no state, whose width would not fit."""
        args, kwargs = call
        x, *_ = (*args, *kwargs.values())
        if isinstance(x, PackedSequence):
            return (x._replace(data=x.data[:, :read].contiguous()),), {}
        return (x.narrow(x.dim() - 1, 0, read).clone(memory_format=torch.preserve_format),), {}


class Stacked(_OfRecurrent):
    """``dampr.nn.StackedRNN``: one-layer modules of different widths in place of one recurrent layer."""

    types = (StackedRNN,)

    def width(self, layer: Any, writes: bool) -> int:
        """The outputs of all directions of the last layer, or the input features."""
        return sum(layer.widths[-len(layer.layers[0]) :]) if writes else int(layer.input_size)

    def input_columns(self, layer: Any) -> list[tuple[nn.Module, str]]:
        return [(part, "weight_ih_l0") for part in layer.layers[0]]

    def restored(self, layer: Any, entry: Entry) -> nn.Module:
        """One recurrent layer of torch with the parameters of this one, whose parts have equal widths again."""
        first = layer.rows()[0]
        sizes = {
            **_RECURRENT.sizes(first, entry),
            "num_layers": len(layer.layers),
            "bidirectional": layer.bidirectional,
        }
        whole: nn.RNNBase = type(first)(**arguments_of(first) | sizes, device="meta")
        whole.dropout = layer.dropout
        own = dict(layer.named_parameters())
        for name, former in layer.former_names().items():
            setattr(whole, former, own[name])
        whole._init_flat_weights()
        return whole.train(layer.training)

    def _parts(self, layer: Any) -> list[tuple[Any, list[str]]]:
        """The modules in the order of their weights in one recurrent layer of torch."""
        names = list(layer.former_names())
        count = len(names) // len(layer.rows())
        return [(part, names[row * count : (row + 1) * count]) for row, part in enumerate(layer.rows())]


class Cell(Kind):
    """A recurrent cell, which computes one step; it is traced as one node, and its units stay."""

    types = (nn.RNNCellBase,)
    one_node = follows = True

    def follow(self, layer: Any, keeps_groups: bool = False) -> None:
        _follow(layer)


def size_of_units(layer: nn.RNNBase) -> str:
    """The name of the attribute with the number of units of one layer and direction."""
    return "proj_size" if layer.proj_size else "hidden_size"


def unit_columns(layer: Any) -> list[str]:
    """The weights whose columns read the units (projected ones, if there is a projection), one for each layer and
    direction.
    """
    return [name for name in layer._flat_weights_names if name.startswith("weight_hh")]


def without_factors(layer: Any) -> Any:
    """The recurrent layer inside of a :class:`dampr.nn.ScaledRNN`; any other layer itself."""
    return layer.rnn if isinstance(layer, ScaledRNN) else layer


def _follow(layer: Any) -> None:
    """Set the size attributes of a recurrent layer or cell from its first two weights."""
    read, recurrent = [p for name, p in layer.named_parameters() if "weight" in name][:2]
    layer.input_size = read.shape[1]
    if getattr(layer, "proj_size", 0):
        layer.hidden_size, layer.proj_size = read.shape[0] // 4, recurrent.shape[1]
    else:
        layer.hidden_size = recurrent.shape[1]


_RECURRENT = Recurrent()
