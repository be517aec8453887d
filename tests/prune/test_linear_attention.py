"""Products in which two widths lie beside each other in each head or group, as keys and values of linear attention."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dampr
from dampr.prune.summary import distinct_gates
from tests.halves import assert_exact


def outer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys and values of all positions first (Katharopoulos et al. 2020)."""
    return (q @ (k.mT @ v)) / (q @ k.sum(2)[..., None])


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    memory = torch.einsum("bhtd,bhte->bhde", k, v)
    return torch.einsum("bhtd,bhde->bhte", q, memory)


def step_by_step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A memory that forgets, one outer product a step (RetNet)."""
    memory, out = torch.zeros(*k.shape[:2], k.shape[-1], v.shape[-1]), []
    for step in range(q.shape[2]):
        memory = 0.9 * memory + k[:, :, step, :, None] * v[:, :, step, None, :]
        out.append((q[:, :, step, None] @ memory)[:, :, 0])
    return torch.stack(out, 2)


class Attention(nn.Module):
    """Four heads; keys have 4 channels in each, values 6."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.heads, self.attend = 4, attend
        self.q, self.k, self.v, self.out = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(8, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y: Tensor = self.out(self.attend(F.elu(q) + 1, F.elu(k) + 1, v).transpose(1, 2).flatten(2))
        return y


@pytest.mark.parametrize("attend", [outer, by_einsum, step_by_step], ids=lambda attend: attend.__name__)
def test_heads_of_linear_attention_are_cut_as_foretold(attend: Callable[..., Tensor]) -> None:
    x = torch.randn(2, 5, 8)
    model = dampr.convert(Attention(attend), example_inputs=x)
    assert [gate.num_gates for gate in distinct_gates(model).values()] == [4]
    assert_exact(Attention(attend), x, at_most=0.6)


class Involution(nn.Module):
    """A kernel for each pixel and group of channels, made from the pixel (Li et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.reduce, self.kernels, self.leave = (
            nn.Conv2d(*sizes, 1) for sizes in ((3, 12), (12, 6), (6, 3 * 3 * 2), (12, 3))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).relu()
        kernels = self.kernels(self.reduce(x).relu()).unflatten(1, (-1, 1, 9)).flatten(4)
        patches = F.unfold(x, 3, padding=1).unflatten(1, (kernels.shape[1], -1, 9))
        y: Tensor = self.leave((kernels * patches).sum(3).flatten(1, 2).unflatten(2, x.shape[2:]))
        return y


def test_groups_of_an_involution_are_cut_as_foretold() -> None:
    assert_exact(Involution(), torch.randn(2, 3, 5, 5), at_most=0.6)
