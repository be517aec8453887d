"""LSTM, GRU and Elman layers with gated hidden units, cell by cell and step by step.

z multiplies the state h wherever a weight or the caller reads it. What a unit remembers of itself (c of an LSTM, u h of
a GRU) has no gate::

    LSTM   i, f, g, o = x W_ih^T + b_ih + (z h) W_hh^T + b_hh
           c' = s(f) c + s(i) tanh(g)      h' = s(o) tanh(c')  [W_hr^T]
    GRU    r, u = s(x W_ih^T + b_ih + (z h) W_hh^T + b_hh)         n = tanh(x W_in^T + b_in + r ((z h) W_hn^T + b_hn))
           h' = (1 - u) n + u h
    RNN    h' = tanh or relu (x W_ih^T + b_ih + (z h) W_hh^T + b_hh)

The output is z h'. The initial and the final state are gated too: the layer starts from h_0 / z (0 where z is 0).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gated_rnn(
    mode: str,
    x: Tensor,
    weights: Sequence[Sequence[Tensor | None]],
    z: Tensor,
    h_0: Tensor | None = None,
    c_0: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A recurrent layer with gates, differentiable in every floating-point argument.

    Args:
        mode: ``"LSTM"``, ``"GRU"``, ``"RNN_TANH"`` or ``"RNN_RELU"``.
        x: (T, B, I).
        weights: for each layer and each direction of it: w_ih (G H, ...), w_hh (G H, P), b_ih and b_hh (G H,) or None,
            w_hr (P, H) or None (then P = H).
        z: gates, (layers, directions, P).
        h_0, c_0: (layers * directions, B, P) and (layers * directions, B, H); None: zeros.

    Returns: output (T, B, directions * P), h_n and c_n in the shapes of h_0 and c_0 (c_n is empty except for an LSTM).
    """
    layers, directions, width = z.shape
    states, cells = [], []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            row = layer * directions + direction
            own, gate = weights[row], z[layer, direction]
            h = x.new_zeros(x.shape[1], width) if h_0 is None else _ungated(h_0[row], gate)
            c = x.new_zeros(x.shape[1], _hidden(mode, own)) if c_0 is None else c_0[row]
            steps = []
            for t in range(x.shape[0]) if direction == 0 else reversed(range(x.shape[0])):
                h, c = _cell(mode, x[t], h, c, gate, own)
                steps.append(gate * h)
            outputs.append(torch.stack(steps if direction == 0 else steps[::-1]))
            states.append(gate * h)
            cells.append(c)
        x = torch.cat(outputs, dim=-1)
    return x, torch.stack(states), torch.stack(cells) if mode == "LSTM" else x.new_empty(0)


def _ungated(h: Tensor, z: Tensor) -> Tensor:
    """h / z, and 0 where z is 0."""
    return torch.where(z != 0, h / torch.where(z != 0, z, 1), 0)


def _hidden(mode: str, weights: Sequence[Tensor | None]) -> int:
    """The number of hidden units, from the rows of w_ih."""
    w_ih = weights[0]
    assert w_ih is not None
    return w_ih.shape[0] // {"LSTM": 4, "GRU": 3}.get(mode, 1)


def _cell(
    mode: str, x: Tensor, h: Tensor, c: Tensor, z: Tensor, weights: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """(h', c') of one step."""
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    assert w_ih is not None
    assert w_hh is not None
    read = torch.nn.functional.linear(x, w_ih, b_ih)
    recurrent = torch.nn.functional.linear(z * h, w_hh, b_hh)
    if mode == "LSTM":
        i, f, g, o = (read + recurrent).chunk(4, dim=-1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return h if w_hr is None else h @ w_hr.t(), c
    if mode == "GRU":
        (r, u, n), (r_h, u_h, n_h) = read.chunk(3, dim=-1), recurrent.chunk(3, dim=-1)
        u = (u + u_h).sigmoid()
        n = (n + (r + r_h).sigmoid() * n_h).tanh()
        return (1 - u) * n + u * h, c
    return (read + recurrent).tanh() if mode == "RNN_TANH" else (read + recurrent).relu(), c
