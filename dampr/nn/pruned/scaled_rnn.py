"""ScaledRNN: a plain recurrent layer whose output and state have constant factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence


class ScaledRNN(nn.Module):
    """A plain recurrent layer whose state is read through constant factors: what :meth:`GatedLSTM.to_dense` gives where
    gates are not 1.

    ``rnn`` has the factors in its weights already; the buffer ``scale``, (layers * directions, H), is that of its
    output and states. Arguments and results are those of ``rnn``. It runs in torch alone, with no operator of dampr, so
    that it can be exported.
    """

    scale: Tensor

    def __init__(self, rnn: Any, scale: Tensor) -> None:
        super().__init__()
        self.rnn = rnn
        self.register_buffer("scale", scale)

    def forward(self, input: Any, hx: Any = None) -> Any:
        return scaled_call(self.rnn, self.scale.unbind(0), 2 if self.rnn.bidirectional else 1, input, hx, _scale_units)


def _scale_units(x: Tensor, z: Tensor) -> Tensor:
    return (x * z).to(x.dtype)


def scaled_call(
    run: Callable[[Any, Any], Any],
    z: tuple[Tensor, ...],
    directions: int,
    input: Any,
    hx: Any,
    multiply: Callable[[Tensor, Tensor], Tensor],
) -> Any:
    """Run a recurrent layer whose weights have gates z in their columns on a state that is gated,
    and gate what it gives.
    """
    output, state = run(input, scaled_state(hx, z, _inverse))
    last = z[-1] if directions == 1 else torch.cat(z[-directions:])
    if isinstance(output, PackedSequence):
        output = output._replace(data=multiply(output.data, last))
    else:
        output = multiply(output, last)
    return output, scaled_state(state, z)


def _inverse(z: Tensor) -> Tensor:
    opened = z != 0
    return opened.to(z.dtype) / torch.where(opened, z, torch.ones_like(z))


def scaled_state(state: Any, z: tuple[Tensor, ...], factor: Callable[[Tensor], Tensor] = lambda row: row) -> Any:
    """The state of a layer, h or (h, c), with h times factors of the gates z (P,) of each layer and direction.

    One of another shape is left to the vendor's own check.
    """
    if state is None:
        return None
    h, *rest = state if isinstance(state, tuple) else (state,)
    if h.dim() > 1 and (h.shape[0], h.shape[-1]) == (len(z), len(z[0])):
        # (P,), which goes with every shape, or (layers * directions, P)
        rows = factor(z[0] if len(z) == 1 else torch.stack(z))
        h = (h * (rows.unsqueeze(1) if h.dim() == 3 and len(z) > 1 else rows)).to(h.dtype)
    return (h, *rest) if isinstance(state, tuple) else h
