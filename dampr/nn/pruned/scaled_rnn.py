"""ScaledRNN: a plain recurrent layer whose output and state are multiplied by constant factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence


class ScaledRNN(nn.Module):
    """A plain recurrent layer whose output and state are multiplied by constant factors, one for each unit.

    :meth:`GatedLSTM.to_dense` returns it when some gates are not 1. It runs in torch alone, with no operator of dampr,
    so it can be exported. It takes and returns what ``rnn`` does.

    Args:
        rnn: an ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN``; its weights already hold the factors for the units that they
            read.
        scale: the factors for its output and its states, (num_layers * directions, H), with H the width of the output
            of one direction; kept as a buffer.
    """

    scale: Tensor

    def __init__(self, rnn: Any, scale: Tensor) -> None:
        super().__init__()
        self.rnn = rnn
        self.register_buffer("scale", scale)

    def forward(self, input: Any, hx: Any = None) -> Any:
        return scaled_call(self.rnn, self.scale.unbind(0), 2 if self.rnn.bidirectional else 1, input, hx, _scale_units)


def _scale_units(x: Tensor, z: Tensor) -> Tensor:
    """x * z in the dtype of x; z (H,) is broadcast over the last dimension."""
    return (x * z).to(x.dtype)


def scaled_call(
    run: Callable[[Any, Any], Any],
    z: tuple[Tensor, ...],
    directions: int,
    input: Any,
    hx: Any,
    multiply: Callable[[Tensor, Tensor], Tensor],
) -> Any:
    """Call a recurrent layer whose state is multiplied by gates, and multiply its output and state.

    The recurrent weights hold the gates already, so the layer must get the state without them: the given state is
    divided by the gates first.

    Args:
        run: calls the layer with (input, state) and returns (output, state).
        z: the gates of each layer and direction, (P,) each, with P the width of one direction's output.
        directions: 1 or 2.
        input, hx: as for the layer.
        multiply: multiplies a tensor (..., directions * P) by gates (directions * P,).

    Returns: the output and the state of the layer, times the gates.
    """
    output, state = run(input, scaled_state(hx, z, _inverse))
    last = z[-1] if directions == 1 else torch.cat(z[-directions:])
    if isinstance(output, PackedSequence):
        output = output._replace(data=multiply(output.data, last))
    else:
        output = multiply(output, last)
    return output, scaled_state(state, z)


def _inverse(z: Tensor) -> Tensor:
    """1 / z where z is not 0, else 0."""
    opened = z != 0
    return opened.to(z.dtype) / torch.where(opened, z, torch.ones_like(z))


def scaled_state(state: Any, z: tuple[Tensor, ...], factor: Callable[[Tensor], Tensor] = lambda row: row) -> Any:
    """Multiply the hidden state h of a recurrent layer by ``factor`` of the gates z.

    Args:
        state: h, (h, c) or None. A state of a wrong shape is returned as it is, so that torch raises its own error.
        z: the gates of each layer and direction, (P,) each.
        factor: applied to the gates, (P,) or (layers * directions, P), before they multiply h.
    """
    if state is None:
        return None
    h, *rest = state if isinstance(state, tuple) else (state,)
    if h.dim() > 1 and (h.shape[0], h.shape[-1]) == (len(z), len(z[0])):
        # (P,), which goes with every shape, or (layers * directions, P)
        rows = factor(z[0] if len(z) == 1 else torch.stack(z))
        h = (h * (rows.unsqueeze(1) if h.dim() == 3 and len(z) > 1 else rows)).to(h.dtype)
    return (h, *rest) if isinstance(state, tuple) else h
