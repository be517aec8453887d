"""Rows that a mask or an index picks and code writes: features of images among words, tokens that are masked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dampr
from dampr.prune.summary import distinct_gates
from tests.halves import assert_exact

MASK = torch.tensor([[True, False, True, False, False], [False, True, True, False, False]])


def whole_mask(h: Tensor, rows: Tensor, token: Tensor) -> Tensor:
    return h.masked_scatter(MASK[..., None].expand_as(h), rows)


def thin_mask(h: Tensor, rows: Tensor, token: Tensor) -> Tensor:
    return h.masked_scatter(MASK[..., None], rows)


def copied_mask(h: Tensor, rows: Tensor, token: Tensor) -> Tensor:
    return h.masked_scatter(MASK[..., None].expand_as(h).contiguous(), rows)


def into_zeros(h: Tensor, rows: Tensor, token: Tensor) -> Tensor:
    return torch.zeros_like(h).masked_scatter(MASK[..., None].expand_as(h), rows) + h


def by_mask(h: Tensor, rows: Tensor, token: Tensor) -> Tensor:
    h = h.clone()
    h[MASK] = rows
    return h


def token_by_mask(h: Tensor, rows: Tensor, token: Tensor) -> Tensor:
    h = h.clone()
    h[MASK] = token
    return h + rows.sum(0)


def by_places(h: Tensor, rows: Tensor, token: Tensor) -> Tensor:
    h, (row, column) = h.clone(), MASK.nonzero(as_tuple=True)
    h[row, column] = rows
    return h


def added_at_places(h: Tensor, rows: Tensor, token: Tensor) -> Tensor:
    return h.index_put(MASK.nonzero(as_tuple=True), rows, accumulate=True)


def columns(h: Tensor, rows: Tensor, token: Tensor) -> Tensor:
    h = h.clone()
    h[:, torch.tensor([0, 3])] = rows[:2]
    return h


def far_apart(h: Tensor, rows: Tensor, token: Tensor) -> Tensor:
    memory = torch.zeros(2, 3, 5, h.shape[-1])
    memory[torch.tensor([0, 1]), :, torch.tensor([0, 3])] = rows[:2, None]
    return memory.sum(1) + h


WRITES: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [
    *(whole_mask, thin_mask, copied_mask, into_zeros, by_mask, token_by_mask, by_places, added_at_places),
    *(columns, far_apart),
]


class Merged(nn.Module):
    """Words (2, 5, 8) and four rows of features (4, 6) in one width."""

    def __init__(self, write: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.words, self.features, self.head, self.write = nn.Linear(8, 12), nn.Linear(6, 12), nn.Linear(12, 3), write
        self.token = nn.Parameter(torch.randn(12)) if write is token_by_mask else torch.zeros(())

    def forward(self, x: Tensor, f: Tensor) -> Tensor:
        y: Tensor = self.head(F.relu(self.write(self.words(x), self.features(f), self.token)))
        return y


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_the_width_of_what_is_written_goes_with_that_of_the_memory(write: Callable[..., Tensor]) -> None:
    x = (torch.randn(2, 5, 8), torch.randn(4, 6))
    assert_exact(Merged(write), x, at_most=0.6)


def constant_rows(h: Tensor, rows: Tensor, token: Tensor) -> Tensor:
    return h.masked_scatter(MASK[..., None], torch.linspace(1, 2, 4 * h.shape[-1]).reshape(4, -1)) + rows.sum(0)


def constant_token(h: Tensor, rows: Tensor, token: Tensor) -> Tensor:
    h = h.clone()
    h[MASK] = torch.linspace(1, 2, h.shape[-1])
    return h + rows.sum(0)


def parts_of_rows(h: Tensor, rows: Tensor, token: Tensor) -> Tensor:
    return h.masked_scatter(torch.arange(h.shape[-1]) % 3 > 0, rows.repeat(10, 1)) + rows.sum(0)


@pytest.mark.parametrize("write", [constant_rows, constant_token, parts_of_rows], ids=lambda write: write.__name__)
def test_a_width_into_which_constants_are_written_stays(write: Callable[..., Tensor]) -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.merged, self.wide, self.out = Merged(write), nn.Linear(3, 7), nn.Linear(7, 2)

        def forward(self, x: Tensor, f: Tensor) -> Tensor:
            y: Tensor = self.out(F.relu(self.wide(self.merged(x, f))))
            return y

    model = dampr.convert(Deep(), example_inputs=(torch.randn(2, 5, 8), torch.randn(4, 6)))
    assert 12 not in [gate.num_gates for gate in distinct_gates(model).values()]
