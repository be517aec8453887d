"""StackedRNN: a recurrent layer whose layers or directions have different widths after compaction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

KINDS = (nn.LSTM, nn.GRU, nn.RNN)


class StackedRNN(nn.Module):
    """One-layer recurrent modules of any widths that run like the layers and directions of one ``nn.LSTM``, ``nn.GRU``
    or ``nn.RNN``.

    :meth:`dampr.nn.GatedLSTM.compacted` returns it with ``widths="own"`` when pruning has left layers or directions of
    different widths, which no single ``nn`` module can have. Every part is a plain ``torch.nn`` module and runs the
    vendor's kernel; but the kernel cannot run several layers or directions at once any more.

    Args:
        layers: for each layer a list of its directions, one (forward) or two (forward, backward). Each direction is an
            ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN``, all of the same class, with ``num_layers=1``, ``bidirectional=False``
            and the same ``batch_first``. Both directions of a layer read the outputs of all directions of the layer
            below.
        dropout: as in ``nn.LSTM``, between the layers, in training.

    The input is that of the ``nn`` modules: x (T, B, F), (B, T, F) with ``batch_first``, (T, F), or a packed sequence,
    and optionally the initial state. The result is (output, state). The output concatenates the features of all
    directions of the last layer. The state is h_n, or (h_n, c_n) for LSTMs. Because widths differ, h_n and c_n are
    *lists* with one tensor for each layer and direction, (B, width) or (width,), in the order of ``nn``'s h_n. An
    initial state may be such lists, or stacked tensors if all widths are equal. ``h_n[-1]`` is the same in both forms.

    Raises: TypeError or ValueError that names the argument, and what the ``nn`` modules raise.
    """

    layers: Any

    def __init__(self, layers: Sequence[Sequence[nn.RNNBase]], dropout: float = 0.0) -> None:
        super().__init__()
        if not (isinstance(dropout, (int, float)) and not isinstance(dropout, bool) and 0 <= dropout <= 1):
            raise ValueError(f"dropout={dropout!r}: expected a number in [0, 1]")
        self.layers = nn.ModuleList(nn.ModuleList(layer) for layer in _checked(layers))
        self.dropout = dropout
        self.batch_first = bool(self.rows()[0].batch_first)
        self.bidirectional = len(self.layers[0]) == 2

    def rows(self) -> list[Any]:
        """The one-layer modules, in the order of h_n: layer by layer, forward before backward."""
        return [part for layer in self.layers for part in layer]

    @property
    def input_size(self) -> int:
        """The number of input features."""
        return int(self.layers[0][0].input_size)

    @property
    def widths(self) -> list[int]:
        """The output width of each layer and direction, in the order of h_n: its ``proj_size`` if it has a projection,
        else its ``hidden_size``.
        """
        return [width_of(part) for part in self.rows()]

    def former_names(self) -> dict[str, str]:
        """A dict from each parameter's name here to its name in one ``nn`` module with all these layers and
        directions.
        """
        found = {}
        for i, layer in enumerate(self.layers):
            for direction, part in enumerate(layer):
                for name in part._flat_weights_names:
                    found[f"layers.{i}.{direction}.{name}"] = f"{name[: -len('0')]}{i}{'_reverse' * direction}"
        return found

    def forward(self, input: Any, hx: Any = None) -> Any:
        packed = isinstance(input, PackedSequence)
        order = _backwards(input) if packed and self.bidirectional else None
        given, states = iter(self._split(hx)), []
        x = input
        for layer in self.layers:
            if x is not input and self.dropout and self.training:
                x = _with_data(x, nn.functional.dropout(_data(x), self.dropout))
            outputs = []
            for direction, part in enumerate(layer):
                y, state = part(self._turned(x, order) if direction else x, next(given))
                outputs.append(_data(self._turned(y, order) if direction else y))
                states.append(state)
            x = _with_data(x, outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1))
        if isinstance(states[0], tuple):
            return x, tuple([each[i].squeeze(0) for each in states] for i in range(2))
        return x, [state.squeeze(0) for state in states]

    def _turned(self, x: Any, order: Tensor | None) -> Any:
        """Reverse every sequence of x in time; ``order``: the indices that do it for a packed sequence."""
        if order is not None:
            return x._replace(data=x.data[order])
        return x.flip(1 if self.batch_first and x.dim() == 3 else 0)

    def _split(self, hx: Any) -> list[Any]:
        """Split the initial state into the state of each one-layer module; None for each if there is none.

        Raises: ValueError unless the state has one entry for each layer and direction.
        """
        count = len(self.rows())
        if hx is None:
            return [None] * count
        of_lstm = isinstance(self.rows()[0], nn.LSTM)
        both = hx if of_lstm else (hx,)
        if of_lstm and not (isinstance(hx, (tuple, list)) and len(hx) == 2):
            raise ValueError(f"hx={type(hx).__name__}: expected (h_0, c_0)")
        for name, each in zip(("h_0", "c_0"), both, strict=False):
            if not isinstance(each, (Tensor, list, tuple)) or len(each) != count:
                size = f" of {len(each)}" if hasattr(each, "__len__") else ""
                raise ValueError(
                    f"{name}={type(each).__name__}{size}: expected one state for each of {count} layers and directions"
                )
        states = zip(*([state.unsqueeze(0) for state in each] for each in both), strict=True)
        return list(states) if of_lstm else [state for (state,) in states]

    def extra_repr(self) -> str:
        return f"widths={self.widths}" + (f", dropout={self.dropout}" if self.dropout else "")


def _checked(layers: Any) -> list[list[Any]]:
    """The modules as a list of directions for each layer.

    Raises: TypeError or ValueError if they cannot be stacked.
    """
    if not _is_sequence(layers) or not all(map(_is_sequence, layers)):
        raise TypeError(f"layers={layers!r:.80}: expected a sequence of layers, each a sequence of its directions")
    found: list[list[Any]] = [list(layer) for layer in layers]
    if not found or {len(layer) for layer in found} not in ({1}, {2}):
        raise ValueError(
            f"layers: of {[len(layer) for layer in found]} directions; expected one everywhere, or two everywhere"
        )
    first = found[0][0]
    read = getattr(first, "input_size", 0)
    for i, layer in enumerate(found):
        for direction, part in enumerate(layer):
            where = f"layers[{i}][{direction}]"
            if type(part) not in KINDS or type(part) is not type(first):
                raise TypeError(
                    f"{where}={type(part).__name__}: expected an nn.LSTM, nn.GRU or nn.RNN, the same everywhere"
                )
            if part.num_layers != 1 or part.bidirectional or part.batch_first != first.batch_first:
                how = (
                    f"num_layers={part.num_layers}, bidirectional={part.bidirectional}, batch_first={part.batch_first}"
                )
                raise ValueError(f"{where} with {how}: expected 1, False, and the same batch_first everywhere")
            if part.input_size != read:
                raise ValueError(f"{where} with input_size={part.input_size}: expected {read}, which it is given")
        read = sum(map(width_of, layer))
    return found


def _is_sequence(value: Any) -> bool:
    return isinstance(value, (Sequence, nn.ModuleList))


def _data(x: Any) -> Tensor:
    """The tensor of a packed sequence; a tensor as it is."""
    values: Tensor = x.data if isinstance(x, PackedSequence) else x
    return values


def _with_data(like: Any, values: Tensor) -> Any:
    """``values`` packed like ``like``, if that is a packed sequence."""
    return like._replace(data=values) if isinstance(like, PackedSequence) else values


def _backwards(x: PackedSequence) -> Tensor:
    """The int64 indices that reverse every sequence of a packed sequence in time, (data.shape[0],)."""
    sizes = x.batch_sizes
    starts = sizes.cumsum(0) - sizes
    step = torch.arange(len(sizes)).repeat_interleave(sizes)
    sequence = torch.arange(len(step)) - starts[step]
    lengths = torch.bincount(sequence)
    return (starts[lengths[sequence] - 1 - step] + sequence).to(x.data.device)


def width_of(rnn: nn.RNNBase) -> int:
    """The output width of one layer and direction: ``proj_size`` if there is a projection, else ``hidden_size``."""
    return rnn.proj_size or rnn.hidden_size
