"""The networks of the benchmarks have the sizes that the literature gives, and the gates that convert puts in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import dampr
from benchmarks import conv, models
from dampr.prune.measure import count_macs, count_params

GOLDEN = json.loads((Path(__file__).parents[2] / "tests" / "data" / "gates.json").read_text())["reference_networks"]


def test_vgg16_has_the_macs_parameters_and_gates_of_the_published_network() -> None:
    model, x = models.vgg16(), torch.randn(1, 3, 32, 32)
    expected = GOLDEN["vgg16_cifar10"]
    assert count_params(model) == expected["params_with_conv_bias_bn_fc"]
    assert count_macs(model, x) == expected["macs"]
    dampr.convert(model, example_inputs=x)
    layers = dampr.prune.gated_layers(model)
    assert {type(layer) for layer in layers.values()} == {dampr.nn.GatedBatchNorm2d}
    assert sum(layer.gate.num_gates for layer in layers.values()) == expected["gates"]


def test_resnet50_has_the_macs_and_parameters_of_the_published_network() -> None:
    model, expected = models.resnet50().to("meta"), GOLDEN["resnet50_imagenet_stride_in_3x3"]
    assert count_params(model) == expected["params"]
    assert count_macs(model, torch.zeros(1, 3, 224, 224, device="meta")) == expected["macs"]


def test_every_distinct_layer_is_timed_once() -> None:
    layers = conv.convolutions("layers", "cpu")
    assert len({layer.shape for layer in layers}) == len(layers) == 31
    assert {layer.kernel for layer in layers} == {1, 3}


def test_the_competitors_of_a_block_have_its_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "networks", lambda stage, device: {"block": (lambda: models.BasicBlock(4), (2, 4, 6, 6))})
    monkeypatch.setattr(conv, "convolutions", lambda stage, device: [conv.Conv("tiny", 2, 4, 6, 4, 3)])
    points = conv.run("conv", "cpu", compiled=False, rounds=2)
    assert {p.provider for p in points} == {"dense", "dampr", "eager unfused"}
    assert all(p.median > 0 and p.kept_bytes is not None for p in points)
    assert len({p.case for p in points}) == 4


def test_a_network_trains_with_gates_in_every_norm() -> None:
    model = dampr.convert(models.BasicBlock(4), example_inputs=torch.randn(1, 4, 6, 6), tie=False)
    model(torch.randn(2, 4, 6, 6)).sum().backward()
    gates = [m for m in model.modules() if isinstance(m, dampr.gates.Gate)]
    assert gates
    assert all(p.grad is not None for gate in gates for p in gate.parameters())
    assert not any(
        isinstance(m, nn.BatchNorm2d) and not isinstance(m, dampr.nn.GatedLayer) for m in model.first.modules()
    )
