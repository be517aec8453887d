"""Attention whose heads meet constants: positions that the forward computes or gets, fixed rotations of each head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dampr
from dampr.prune.summary import distinct_gates
from tests.halves import assert_exact


def angles(length: int, width: int) -> Tensor:
    return torch.arange(length)[:, None] / 100.0 ** (torch.arange(0, width, 2) / width)


def pairs(x: Tensor) -> Tensor:
    """Rotates neighbouring channels (Su et al. 2021)."""
    angle = angles(*x.shape[-2:])
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1).flatten(-2)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates halves of a head, as language models of transformers do."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def halves(x: Tensor) -> Tensor:
    angle = angles(*x.shape[-2:]).repeat(1, 2)
    return turned(x, angle.cos(), angle.sin())


def numbers(x: Tensor) -> Tensor:
    """Multiplies pairs of channels as complex numbers."""
    angle = angles(*x.shape[-2:])
    turn = torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


HADAMARD = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]
ROTATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "pairs": pairs,
    "halves": halves,
    "complex numbers": numbers,
    "a matrix": lambda x: x @ HADAMARD,
    "an einsum": lambda x: torch.einsum("bhtd,de->bhte", x, HADAMARD),
    "a sum": lambda x: (x[..., None, :] * HADAMARD).sum(-1),
}


class Attention(nn.Module):
    def __init__(self, rotate: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.heads, self.rotate = 4, rotate
        self.enter, self.qkv, self.out, self.head = (nn.Linear(32, n) for n in (32, 96, 32, 3))

    def forward(self, x: Tensor, *table: Tensor) -> Tensor:
        h = self.enter(x)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(h).chunk(3, -1))
        q, k = (self.rotate(t) if self.rotate is not None else turned(t, *table) for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.head(h + self.out(y.transpose(1, 2).flatten(2)))
        return out


def heads(model: nn.Module, x: Any) -> list[int]:
    return [gate.num_gates for gate in distinct_gates(dampr.convert(model, example_inputs=x)).values()]


@pytest.mark.parametrize("name", ROTATIONS)
def test_whole_heads_can_go_where_constants_differ_within_a_head(name: str) -> None:
    x = torch.randn(2, 5, 32)
    assert 4 in heads(Attention(ROTATIONS[name]), x)
    assert_exact(Attention(ROTATIONS[name]), x, at_most=0.6)


@pytest.mark.parametrize("shape", [(5, 8), (1, 1, 5, 8), (2, 1, 5, 8)])
def test_whole_heads_can_go_where_inputs_differ_within_a_head(shape: tuple[int, ...]) -> None:
    x = (torch.randn(2, 5, 32), torch.randn(shape), torch.randn(shape))
    assert 4 in heads(Attention(None), x)
    assert_exact(Attention(None), x, at_most=0.6)


class Slopes(nn.Module):
    """Scores that fall with the distance, by a slope of each head in a buffer (Press et al. 2022)."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = 4, nn.Linear(32, 96), nn.Linear(32, 3)
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, 5))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        places = torch.arange(x.shape[1])
        distance = (places[:, None] - places).abs() * cast(Tensor, self.slopes)[:, None, None]
        y: Tensor = self.out(((q @ k.mT - distance).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return y


def test_heads_with_values_of_their_own_in_a_buffer_can_go() -> None:
    x = torch.randn(2, 5, 32)
    assert heads(Slopes(), x) == [4]
    assert_exact(Slopes(), x, at_most=0.6)


def test_heads_stay_where_constants_differ_between_heads() -> None:
    slopes = torch.arange(1, 5)[:, None, None] / 4  # (heads, 1, 1), in no buffer
    assert 4 not in heads(Attention(lambda x: x * slopes), torch.randn(2, 5, 32))
