"""Models whose forward takes gradients, as those of forces do: the gradients are traced and cut, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dampr
from dampr.prune.measure import count_macs
from tests.halves import assert_exact


class Force(nn.Module):
    """The gradient of the sum of a network's outputs with respect to its input."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (force,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        return force


class Atoms(nn.Module):
    """A small potential: atoms of five kinds that exchange messages weighed by filters of their distances."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds, self.given = nn.Embedding(5, 8), nn.Linear(8, 8)
        self.filters = nn.Sequential(nn.Linear(6, 8), nn.Softplus(), nn.Linear(8, 8))
        self.energy = nn.Sequential(nn.Linear(8, 12), nn.Softplus(), nn.Linear(12, 1))

    def forward(self, kinds: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            places = places.detach().requires_grad_()
            apart = (places[:, :, None] - places[:, None] + 1e-3).square().sum(-1).sqrt()
            weights = self.filters(torch.exp(-((apart[..., None] - torch.linspace(0, 3, 6)) ** 2)))
            atoms = self.kinds(kinds)
            atoms = atoms + (weights * self.given(atoms)[:, None]).sum(2)
            energy = self.energy(atoms).sum(1)
            (gradient,) = torch.autograd.grad(energy.sum(), places, create_graph=True)
        return energy, -gradient


def atoms() -> tuple[Tensor, Tensor]:
    return torch.randint(5, (2, 4)), torch.randn(2, 4, 3)


def mlp(middle: nn.Module, width: int = 16) -> tuple[nn.Module, Any]:
    layers = nn.Linear(8, 16), middle, nn.Linear(width, 12), nn.Tanh(), nn.Linear(12, 1)
    return Force(nn.Sequential(*layers)), torch.randn(4, 8)


def cnn(middle: nn.Module, width: int = 8) -> tuple[nn.Module, Any]:
    layers = nn.Conv2d(3, 8, 3), middle, nn.SiLU(), nn.Conv2d(width, 6, 1), nn.SiLU(), nn.AdaptiveAvgPool2d(1)
    return Force(nn.Sequential(*layers, nn.Flatten(), nn.Linear(6, 1))), torch.randn(2, 3, 8, 8)


ELEMENTWISE = [nn.Softplus(), nn.ELU(), nn.LeakyReLU(), nn.GELU(), nn.SiLU(), nn.Mish(), nn.Hardtanh(), nn.PReLU(16)]
OVER_PIXELS = [nn.AvgPool2d(2), nn.MaxPool2d(2), nn.AdaptiveMaxPool2d(3), nn.Upsample(scale_factor=2)]
LAYERS = [nn.Conv2d(8, 8, 3, groups=8), nn.ConvTranspose2d(8, 8, 2), nn.BatchNorm2d(8), nn.ZeroPad2d(1)]
NETWORKS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    **{type(layer).__name__: lambda layer=layer: mlp(layer) for layer in ELEMENTWISE},  # type: ignore[misc]
    **{type(layer).__name__: lambda layer=layer: cnn(layer) for layer in OVER_PIXELS + LAYERS},  # type: ignore[misc]
    "GLU": lambda: mlp(nn.GLU(), 8),
    "PixelShuffle": lambda: cnn(nn.PixelShuffle(2), 2),
    "LayerNorm": lambda: mlp(nn.LayerNorm(16)),
    "attention": lambda: (
        Force(nn.Sequential(nn.Linear(6, 16), nn.TransformerEncoderLayer(16, 4, 24, 0.0, batch_first=True))),
        torch.randn(2, 5, 6),
    ),
    "atoms": lambda: (Atoms(), atoms()),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_model_of_gradients_is_cut_as_it_is_masked_and_costs_what_was_foretold(name: str) -> None:
    torch.manual_seed(0)
    model, x = NETWORKS[name]()
    assert_exact(model, x)


def test_a_potential_is_pruned_while_it_learns_forces() -> None:
    torch.manual_seed(0)
    model, (kinds, places) = Atoms(), atoms()
    plan = dampr.Plan(model, (kinds, places), macs=0.5, steps=60)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        energy, force = plan.model(kinds, places)
        loss = (energy - 1).square().mean() + (force - 0.1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plan.step(optimizer)
        losses.append(float(loss.detach()))
    small = plan.finish()
    assert losses[-1] < 0.5 * losses[0]
    assert count_macs(small, (kinds, places)) <= 0.5 * plan.total
    assert not any(isinstance(module, dampr.nn.GatedLayer) for module in small.modules())
