"""Make plain recurrent layers that have only some units of a larger one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .stacked_rnn import KINDS, StackedRNN, width_of


def arguments_of(rnn: nn.RNNBase) -> dict[str, Any]:
    """The arguments of the ``nn`` constructor, without dropout, because torch warns about dropout in a single layer."""
    names = ["input_size", "hidden_size", "num_layers", "bias", "batch_first", "bidirectional"]
    names += ["proj_size"] if isinstance(rnn, nn.LSTM) else ["nonlinearity"] if isinstance(rnn, nn.RNN) else []
    return {name: getattr(rnn, name) for name in names}


def plain_rnn(like: nn.RNNBase, weights: Mapping[str, Tensor], **others: Any) -> Any:
    """An ``nn`` layer of the kind of ``like`` with these weights.

    Args:
        like: the layer whose arguments and training mode it gets.
        weights: name -> weight. A weight that is not a parameter requires a gradient if that of ``like`` does.
        others: arguments that differ from those of ``like``.
    """
    kind: Any = next(kind for kind in KINDS if isinstance(like, kind))
    plain = kind(**arguments_of(like) | others, device="meta", dtype=like.weight_ih_l0.dtype)
    plain.dropout = like.dropout
    for name, weight in weights.items():
        learns = (weight if isinstance(weight, nn.Parameter) else getattr(like, name)).requires_grad
        setattr(plain, name, nn.Parameter(weight, requires_grad=learns))
    plain._init_flat_weights()
    return plain.train(like.training)


def narrowed(rnn: nn.RNNBase, units: Sequence[Tensor]) -> Any:
    """A plain recurrent layer that has only these units; its parameters are copies.

    Units are deleted from the rows of all gate matrices (or, with a projection, from its rows), and from the columns of
    W_hh and of the next layer.

    Args:
        rnn: the layer with all units.
        units: for each layer and direction the units to keep, int64 (width,).

    Returns: a layer of the class of ``rnn`` if all widths are equal, else a :class:`StackedRNN`.
    """
    if len({len(own) for own in units}) > 1:
        return in_parts(rnn, units)
    names = (name for names in rnn._all_weights for name in names)
    weights = (weight for row in _sliced(rnn, units) for weight in row)
    return plain_rnn(rnn, dict(zip(names, weights, strict=True)), **{_size(rnn): len(units[0])})


def in_parts(rnn: nn.RNNBase, units: Sequence[Tensor] | None = None) -> StackedRNN:
    """As :func:`narrowed`, but always a :class:`StackedRNN`; ``units`` None: with all units."""
    each = 1 + rnn.bidirectional
    units = [torch.arange(width_of(rnn))] * (rnn.num_layers * each) if units is None else units
    parts = []
    for own, weights in zip(units, _sliced(rnn, units), strict=True):
        named = dict(zip(rnn._all_weights[0], weights, strict=True))
        arguments = {"input_size": weights[0].shape[1], _size(rnn): len(own), "num_layers": 1, "bidirectional": False}
        parts.append(plain_rnn(rnn, named, **arguments))
        parts[-1].dropout = 0.0
    return StackedRNN([parts[i : i + each] for i in range(0, len(parts), each)], rnn.dropout).train(rnn.training)


def _size(rnn: nn.RNNBase) -> str:
    """The name of the argument that sets the width of the output."""
    return "proj_size" if rnn.proj_size else "hidden_size"


def _sliced(rnn: nn.RNNBase, units: Sequence[Tensor]) -> Iterator[list[nn.Parameter]]:
    """For each layer and direction its weights with only these units, in the order of ``rnn._all_weights``."""
    each = 1 + rnn.bidirectional
    for row, names in enumerate(rnn._all_weights):
        first = row // each * each - each
        below = torch.cat([units[first + i] + i * width_of(rnn) for i in range(each)]) if first >= 0 else None
        sliced = []
        for name in names:
            weight = getattr(rnn, name).detach().clone()
            if name.startswith("weight_hr"):
                weight = weight[units[row]]
            elif not rnn.proj_size:
                weight = weight.unflatten(0, (-1, rnn.hidden_size))[:, units[row]].flatten(0, 1)
            if name.startswith("weight_hh"):
                weight = weight[:, units[row]]
            elif name.startswith("weight_ih") and below is not None:
                weight = weight[:, below]
            sliced.append(nn.Parameter(weight, requires_grad=getattr(rnn, name).requires_grad))
        yield sliced
