"""What a training step launches is counted right, and converting adds nothing that waits or allocates by value."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

import dampr
from benchmarks import steps


def net() -> nn.Sequential:
    layers = (
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
    )
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))


def test_operators_of_a_dense_step_are_counted_once() -> None:
    x = torch.randn(2, 3, 8, 8)
    found = steps.count(net().train(), lambda model: model(x).sum())
    operators = found["operators"]
    assert found["kernels"] == {}
    assert {
        name: operators[f"aten::{name}"]
        for name in ("convolution", "native_batch_norm", "convolution_backward", "addmm")
    } == {
        "convolution": 2,
        "native_batch_norm": 2,
        "convolution_backward": 2,
        "addmm": 1,
    }
    assert not steps.FREE & set(operators)


def test_a_wait_and_an_allocation_by_value_are_seen() -> None:
    x = torch.randn(2, 3, 8, 8)
    found = steps.count(net().train(), lambda model: model(x).sum() * float(x.nonzero().sum().item()))
    assert found["waits"]["aten::_local_scalar_dense"] == 1
    assert found["by_value"] == {"aten::nonzero": 1}


@pytest.mark.parametrize(("per_sample", "kernels"), [(False, 3), (True, 9)])
def test_a_converted_step_waits_for_nothing_and_launches_no_more_than_recorded(per_sample: bool, kernels: int) -> None:
    x = torch.randn(2, 3, 8, 8)
    model = dampr.convert(net(), example_inputs=x, per_sample=per_sample).train()
    found = steps.count(model, lambda model: model(x).sum())
    assert found["waits"] == {}
    assert found["by_value"] == {}
    assert 0 < sum(found["kernels"].values()) <= kernels * 2
