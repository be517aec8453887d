"""Convolutions whose weights code computes for each sample: of StyleGAN, of kernels that attention mixes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dampr
from dampr.prune.summary import distinct_gates
from tests.halves import assert_exact, cut_in_half, finished, halved


class Modulated(nn.Module):
    """As in StyleGAN2: a style scales what the weight reads, and each filter gets length 1 again."""

    def __init__(self, read: int, written: int, kernel: int = 3, normed: bool = True, up: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, written, read, kernel, kernel))
        self.style, self.bias = nn.Linear(6, read), nn.Parameter(torch.randn(written))
        self.normed, self.up = normed, up

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        samples, channels, height, width = x.shape
        weight = self.weight * (self.style(w) + 1)[:, None, :, None, None]
        if self.normed:
            weight = weight * torch.rsqrt(weight.pow(2).sum([2, 3, 4]) + 1e-8)[:, :, None, None, None]
        images = x.reshape(1, samples * channels, height, width)
        kernel = self.weight.shape[-1]
        if self.up:
            weight = weight.transpose(1, 2).flatten(0, 1)
            y = F.conv_transpose2d(images, weight, stride=2, groups=samples)
        else:
            y = F.conv2d(images, weight.flatten(0, 1), padding=kernel // 2, groups=samples)
        y = y.view(samples, -1, *y.shape[2:])
        return F.leaky_relu(y + self.bias[:, None, None], 0.2)


class Generator(nn.Module):
    def __init__(self, normed: bool, up: bool) -> None:
        super().__init__()
        self.mapping = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 6))
        self.start = nn.Parameter(torch.randn(1, 8, 4, 4))
        self.first, self.second = Modulated(8, 12, normed=normed, up=up), Modulated(12, 10, normed=normed)
        self.image = Modulated(10, 3, 1, normed=False)

    def forward(self, z: Tensor) -> Tensor:
        w = self.mapping(z)
        x = self.start.expand(len(z), -1, -1, -1)
        image: Tensor = self.image(self.second(self.first(x, w), w), w)
        return image


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("samples", [1, 2, 3])
def test_channels_between_modulated_convolutions_are_cut(samples: int, normed: bool, up: bool) -> None:
    z = torch.randn(samples, 5)
    model = dampr.convert(Generator(normed, up), example_inputs=z).eval()
    assert sorted(gate.num_gates for gate in distinct_gates(model).values()) == [6, 8, 10, 12, 12]
    assert model.dampr_skipped == {"image": "its outputs are the model's own"}
    assert_exact(Generator(normed, up), z, at_most=0.3)
    small, other = cut_in_half(halved(model), z), torch.randn(5, 5)
    torch.testing.assert_close(small(other), model(other), rtol=1e-4, atol=1e-5)


class Mixed(nn.Module):
    """As in ODConv: attention mixes four kernels for each sample, and scales what they read."""

    def __init__(self, read: int, written: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, written, read, 3, 3))
        self.kernels, self.channels = nn.Linear(read, 4), nn.Linear(read, read)

    def forward(self, x: Tensor) -> Tensor:
        samples, channels, height, width = x.shape
        pooled = x.mean((2, 3))
        kernels = self.kernels(pooled).softmax(1)[:, :, None, None, None, None]
        weight = (kernels * self.weight).sum(1) * self.channels(pooled).sigmoid()[:, None, :, None, None]
        y = F.conv2d(
            x.reshape(1, samples * channels, height, width), weight.reshape(-1, channels, 3, 3), groups=samples
        )
        return y.view(samples, -1, *y.shape[2:])


@pytest.mark.parametrize("samples", [1, 3])
def test_kernels_that_attention_mixes(samples: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Mixed(8, 12), nn.ReLU(), Mixed(12, 6), nn.Conv2d(6, 2, 1))
    assert_exact(model, torch.randn(samples, 3, 9, 9), at_most=0.35)


def test_a_plan_on_a_generator() -> None:
    z, target = torch.randn(4, 5), torch.randn(4, 3, 4, 4)
    plan = dampr.Plan(Generator(True, False), z, macs=0.4, steps=60)
    small = finished(plan, lambda: F.mse_loss(plan.model(z), target), 60)
    assert small(torch.randn(7, 5)).shape == (7, 3, 4, 4)
