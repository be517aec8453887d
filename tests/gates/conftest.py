from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import dampr
from dampr.gates import Gate


@pytest.fixture
def toy() -> Iterator[Callable[..., Gate]]:
    """The toy of the acceptance tests: a linear auto-encoder 100-50-100 without biases,
    gates on its codes (methods 3.6, 4.3, 5.4).
    """

    def train(gate, penalty, latent, seed, samples=5000, steps=2000):
        """Full-batch Adam on samples of a ``latent``-dimensional Gaussian in 100 dimensions; returns the trained gate.

        The loss of a linear map depends on the samples through their second moments alone, so their QR factor R stands
        for them.
        """
        # tiny products: threads that wait for each other cost a hundredfold where other work runs beside
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        x = torch.linalg.qr(
            torch.randn(samples, latent) @ torch.empty(latent, 100).uniform_(-1, 1) / (latent * samples) ** 0.5
        ).R
        model = nn.Sequential(dampr.nn.GatedLinear(100, 50, bias=False, gate=gate), nn.Linear(50, 100, bias=False))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-6)
        for _ in range(steps):
            loss = (model(x) - x).square().sum() / 100 + penalty(gate)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return gate

    threads = torch.get_num_threads()
    yield train
    torch.set_num_threads(threads)
