"""Norms behind activations, in front of residual sums: gates in them alone would cut nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dampr
from dampr.prune.summary import distinct_gates
from tests.halves import assert_exact


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.inner(x)
        return y


def mixer(activation: type[nn.Module], convolution: bool) -> nn.Sequential:
    """As in ConvMixer: layers, activations and norms in this order, residual sums around some of them."""

    def block(*layers: nn.Module) -> nn.Sequential:
        return nn.Sequential(*layers, activation(), nn.BatchNorm2d(8))

    def mixing() -> nn.Module:
        return nn.Conv2d(8, 8, 3, groups=8, padding=1) if convolution else nn.Conv2d(8, 8, 1)

    blocks = (layer for _ in range(2) for layer in (Residual(block(mixing())), block(nn.Conv2d(8, 8, 1))))
    return nn.Sequential(block(nn.Conv2d(3, 8, 3)), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.Sigmoid])
def test_widths_through_residual_sums_of_norms_are_cut(activation: type[nn.Module], convolution: bool) -> None:
    assert_exact(mixer(activation, convolution), torch.randn(3, 3, 7, 7), at_most=0.7)


def test_no_gate_is_left_that_cuts_nothing() -> None:
    model = dampr.convert(mixer(nn.GELU, True), example_inputs=torch.randn(3, 3, 7, 7), per_sample=True)
    assert [gate.num_gates for gate in distinct_gates(model).values()] == [8]  # in front of the head
    assert model.dampr_skipped["0.2"] == "no layer alone writes or reads what this norm gates"
