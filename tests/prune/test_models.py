"""Every structure of tests/models.py: converted, with random gates closed,
compacted to the same function and to the size foretold.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dampr
from dampr.prune.cost import Cost
from dampr.prune.measure import count_macs, count_params
from tests import models
from tests.long import long_if


def close_at_random(model, share=0.5):
    for gate in {layer.gate for layer in dampr.prune.gated_layers(model).values()}:
        closed = torch.rand(gate.num_gates) < share
        closed[torch.randint(gate.num_gates, ())] = False
        gate.log_alpha.data = torch.where(closed, -9.0, 3.0 * torch.rand(gate.num_gates))


def trained(model):
    """Norms as after training: with statistics and shifts,
    so that what a closed channel leaves behind is not 0 by chance.
    """
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for values, (low, high) in (
                (norm.weight, (0.5, 2)),
                (norm.bias, (-1, 1)),
                (norm.running_mean, (-1, 1)),
                (norm.running_var, (0.5, 2)),
            ):
                nn.init.uniform_(values, low, high)
    return model


def assert_same(small, model, x):
    """Within 1e-5 of the largest output."""
    with torch.no_grad():
        got, expected = small.eval()(x), model.eval()(x)
    assert float((got - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("name", models.ALL)
def test_masked_equals_compacted_at_the_size_foretold(name, tie, seed):
    torch.manual_seed(seed)
    check_compaction(*models.ALL[name](), tie)


@pytest.mark.parametrize("name", [long_if(name, "resnet50") for name in models.FULL])
def test_published_networks_at_their_full_size(name):
    check_compaction(*models.FULL[name](), tie=True)


def check_compaction(model, x, tie):
    dampr.convert(trained(model), example_inputs=x, tie=tie)
    costs = {"macs": Cost(model, x, "macs"), "params": Cost(model, x, "params")}
    close_at_random(model)
    small = dampr.compact(model, example_inputs=x)
    assert_same(small, model, x)
    foretold = {metric: int(cost(cost.decision())) for metric, cost in costs.items()}
    counted = {"macs": count_macs(small, x), "params": count_params(small)}
    assert foretold == counted, small.dampr_manifest["closed_but_kept"]
    assert foretold["macs"] < costs["macs"].total


@pytest.mark.parametrize("round_to", [4, 8])
@pytest.mark.parametrize("name", ["mlp", "vgg", "resnet18", "mobilenet_v2", "unet"])
def test_widths_are_rounded_up(name, round_to):
    model, x = models.ALL[name]()
    dampr.convert(trained(model), example_inputs=x)
    close_at_random(model, 0.7)
    small = dampr.compact(model, example_inputs=x, round_to=round_to)
    torch.testing.assert_close(small.eval()(x), model.eval()(x), atol=1e-4, rtol=1e-4)
    smallest = dampr.compact(model, example_inputs=x)
    assert count_params(small) >= count_params(smallest)
    for layer in dampr.prune.gated_layers(model):
        before = len(model.get_submodule(layer).gate.is_open())
        after = small.get_submodule(layer)
        width = after.num_features if isinstance(after, nn.BatchNorm2d) else after.weight.shape[0]
        assert width % round_to == 0 or width == before


@pytest.mark.parametrize("name", models.ALL)
def test_compacted_models_export(name):
    model, x = models.ALL[name]()
    dampr.convert(trained(model), example_inputs=x)
    close_at_random(model)
    small = dampr.compact(model, example_inputs=x).eval()
    exported = torch.export.export(small, (x,)).module()
    torch.testing.assert_close(exported(x), small(x))
