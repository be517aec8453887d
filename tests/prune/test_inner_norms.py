"""Norms inside of branches count open units by default; those of residual streams only with ``residual=True``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dampr
from dampr.prune.summary import distinct_gates
from tests.halves import assert_exact


class OwnRMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Derived(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "LayerNorm": nn.LayerNorm,
    "RMSNorm": nn.RMSNorm,
    "own": OwnRMSNorm,
    "derived": Derived,
    "without gain": lambda width: nn.LayerNorm(width, elementwise_affine=False),
}


class Branch(nn.Module):
    """A residual branch with a norm in front, and one inside (as in NormFormer and BEiT-3)."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm, self.up, self.inner, self.down = norm(8), nn.Linear(8, 12), norm(12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(F.gelu(self.inner(self.up(self.norm(x)))))
        return y


class Attention(nn.Module):
    """As in OLMo 2: queries and keys are normed over all heads."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.num_heads, self.norm = 4, norm(8)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8))
        self.q_norm, self.k_norm = norm(16), norm(16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = self.q_norm(self.q(h)), self.k_norm(self.k(h)), self.v(h)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        y: Tensor = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y


def network(block: Callable[[Callable[[int], nn.Module]], nn.Module], norm: str) -> nn.Sequential:
    kind = NORMS[norm]
    return nn.Sequential(nn.Linear(6, 8), block(kind), block(kind), kind(8), nn.Linear(8, 3))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("block", [Branch, Attention])
def test_the_stream_stays_and_what_is_inside_goes(block: type[nn.Module], norm: str) -> None:
    x = torch.randn(2, 5, 6)
    model = dampr.convert(network(block, norm), example_inputs=x)
    assert [gate.num_gates for gate in distinct_gates(model).values()] == [12 if block is Branch else 4] * 2
    assert_exact(network(block, norm), x, at_most=0.7)


SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "in place": lambda x, y: y.add_(x),
    "scaled": lambda x, y: torch.add(x, y, alpha=0.5),
    "addcmul": lambda x, y: torch.addcmul(x, y, torch.ones(())),
    "lerp": lambda x, y: torch.lerp(x, y, 0.5),
    "minus": lambda x, y: x - y,
    "where": lambda x, y: torch.where(x > y, x, y),
}


class Summed(Branch):
    """A residual branch that is added in another way."""

    def __init__(self, how: str) -> None:
        super().__init__(nn.LayerNorm)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return SUMS[self.how](x, self.down(F.gelu(self.inner(self.up(self.norm(x))))))


@pytest.mark.parametrize("how", SUMS)
def test_a_stream_is_one_however_it_is_summed(how: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), Summed(how), Summed(how), nn.LayerNorm(8), nn.Linear(8, 3))
    gates = distinct_gates(dampr.convert(model, example_inputs=torch.randn(2, 5, 6)))
    assert [gate.num_gates for gate in gates.values()] == [12, 12]


@pytest.mark.parametrize("norm", NORMS)
def test_the_stream_goes_on_request(norm: str) -> None:
    x = torch.randn(2, 5, 6)
    model = dampr.convert(network(Branch, norm), example_inputs=x, residual=True)
    assert sorted(gate.num_gates for gate in distinct_gates(model).values()) == [8, 12, 12]
    assert_exact(network(Branch, norm), x, residual=True, at_most=0.45)


def test_a_norm_between_layers_that_other_layers_share_a_model_with() -> None:
    """Gates of layers would do for the convolutions; with the norm, more can go."""
    model = nn.Sequential(
        nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Flatten(), nn.Linear(24, 16), nn.LayerNorm(16),
        nn.ReLU(), nn.Linear(16, 4),
    )  # fmt: skip
    x = torch.randn(4, 3, 5)
    assert sorted(g.num_gates for g in distinct_gates(dampr.convert(model, example_inputs=x)).values()) == [8, 16]


def test_residual_true_takes_norms_inside_too() -> None:
    model = nn.Sequential(nn.Linear(6, 12), OwnRMSNorm(12), nn.GELU(), nn.Linear(12, 5))
    assert len(distinct_gates(dampr.convert(model, example_inputs=torch.randn(2, 6), residual=True))) == 1
