"""Recurrent code by hand whose first state is zeros."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dampr
from dampr.prune.summary import distinct_gates
from tests.halves import assert_exact


class ConvLSTM(nn.Module):
    """A convolution over the image and the state together (Shi et al. 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.cell, self.leave = (
            nn.Conv2d(3, 6, 3),
            nn.Conv2d(6 + 8, 4 * 8, 3, padding=1),
            nn.Conv2d(8, 3, 1),
        )
        self.hidden = 8

    def forward(self, x: Tensor) -> Tensor:
        images = [self.enter(x[:, step]).relu() for step in range(x.shape[1])]
        zeros = torch.zeros(len(x), self.hidden, *images[0].shape[-2:])
        state, memory = zeros, zeros
        for image in images:
            i, f, o, g = self.cell(torch.cat([image, state], 1)).chunk(4, 1)
            memory = f.sigmoid() * memory + i.sigmoid() * g.tanh()
            state = o.sigmoid() * memory.tanh()
        y: Tensor = self.leave(state)
        return y


class Cell(nn.Module):
    """A linear layer over input and state together."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.enter, self.cell, self.leave = nn.Linear(5, 6), nn.Linear(6 + 8, 8), nn.Linear(8, 3)
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), self.cell.out_features)
        for step in range(x.shape[1]):
            seen = self.enter(x[:, step]).relu()
            state = self.cell(torch.cat([state, seen] if self.first else [seen, state], -1)).tanh()
        y: Tensor = self.leave(state)
        return y


@pytest.mark.parametrize("first", [False, True])
def test_the_state_beside_inputs_of_a_linear_layer_is_cut(first: bool) -> None:
    x = torch.randn(2, 3, 5)
    model = dampr.convert(Cell(first), example_inputs=x)
    assert sorted(gate.num_gates for gate in distinct_gates(model).values()) == [6, 8]
    assert_exact(Cell(first), x, at_most=0.6)


def test_the_state_beside_images_is_cut() -> None:
    x = torch.randn(2, 3, 3, 7, 7)
    model = dampr.convert(ConvLSTM(), example_inputs=x)
    assert sorted(gate.num_gates for gate in distinct_gates(model).values()) == [6, 8]
    assert_exact(ConvLSTM(), x, at_most=0.5)
