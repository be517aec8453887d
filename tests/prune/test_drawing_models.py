"""Models that draw random numbers in evaluation mode: masked autoencoders, latents, dropout that stays on."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dampr


class Perturbed(nn.Module):
    """Noise on the inputs, and dropout that is on in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(12, 16), nn.Linear(16, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.first(x + 0.1 * torch.randn_like(x)))
        return self.last(functional.dropout(functional.relu(self.second(x)), 0.5, training=True))


class Variational(nn.Module):
    """A latent that is drawn from its mean and deviation."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
        )
        self.mean, self.deviation, self.decoder = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.features(x).mean((2, 3))
        return self.decoder(self.mean(h) + torch.randn(len(x), 6) * self.deviation(h).exp())


class Masked(nn.Module):
    """Random tokens are left out, as a masked autoencoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept = torch.rand(x.shape[:2]).argsort(1)[:, :3]
        x = x.gather(1, kept[:, :, None].expand(-1, -1, 12))
        return self.last(functional.relu(self.first(x))), kept


class Elsewhere(nn.Module):
    """Noise from generators that torch's global seed does not reach."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source, self.generator = source, torch.Generator().manual_seed(7)
        self.first, self.last = nn.Linear(12, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.source == "python":
            scale: Any = 1 + random.random()
        elif self.source == "numpy":
            scale = torch.from_numpy(np.random.rand(len(x), 1)).to(x.dtype)  # noqa: NPY002
        else:
            scale = torch.rand(len(x), 1, generator=self.generator)
        return self.last(functional.relu(self.first(x * scale)))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "noise and dropout": (Perturbed, (4, 12)),
    "latent": (Variational, (2, 3, 8, 8)),
    "masked tokens": (Masked, (4, 5, 12)),
    "noise of Python": (lambda: Elsewhere("python"), (4, 12)),
    "noise of numpy": (lambda: Elsewhere("numpy"), (4, 12)),
    "a generator of its own": (lambda: Elsewhere("own"), (4, 12)),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    kind, shape = NETWORKS[name]
    torch.manual_seed(0)
    return kind(), torch.randn(shape)


def generators(model: nn.Module) -> list[torch.Generator]:
    return [m.generator for m in model.modules() if isinstance(m, Elsewhere)]


def seed(model: nn.Module, number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002
    for generator in generators(model):
        generator.manual_seed(number)


def states(model: nn.Module) -> list[Any]:
    """Where every generator stands."""
    own = [tuple(generator.get_state().tolist()) for generator in (torch.default_generator, *generators(model))]
    return [*own, random.getstate(), tuple(np.random.get_state()[1])]  # noqa: NPY002


def run(model: nn.Module, x: Tensor) -> Any:
    seed(model, 3)
    with torch.no_grad():
        return model.eval()(x)


@pytest.mark.parametrize("gate", ["hard_concrete", "dep_l0", "dam"])
@pytest.mark.parametrize("name", NETWORKS)
def test_they_are_converted_and_cut_to_the_unit(name: str, gate: str) -> None:
    model, x = made(name)
    before = run(model, x)
    seed(model, 5)  # whatever was drawn before
    dampr.convert(model, x, gate=gate)
    torch.testing.assert_close(run(model, x), before, rtol=0, atol=1e-6)
    seed(model, 5)
    state = states(model)
    budget = dampr.Budget(model, x, macs=0.6, steps=10)
    with pytest.warns(dampr.prune.BudgetWarning):
        report = budget.finalize()
    assert dampr.verify_model(model, x).ok
    small = dampr.compact(model, example_inputs=x)
    assert states(model) == state
    masked = run(model, x)
    torch.testing.assert_close(run(small, x), masked, rtol=1e-5, atol=1e-5)
    assert report.reached <= 0.6 * report.total


@pytest.mark.parametrize("name", NETWORKS)
def test_they_are_pruned_at_once_and_leave_the_random_state(name: str) -> None:
    model, x = made(name)
    state = states(model)

    def loss(out: Any, y: Tensor) -> Tensor:
        return (out[0] if isinstance(out, tuple) else out).pow(2).mean()

    small = dampr.prune_once(model, [(x, torch.zeros(len(x)))] * 2, loss, macs=0.6)
    assert states(model) == state
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
