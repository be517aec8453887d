"""Layers of classes that users derive from torch's are pruned as far as torch's are."""

import pytest
import torch
from torch import nn

import dampr
from dampr.prune import gated_layers
from dampr.prune.cost import Cost
from dampr.prune.measure import count_macs


class Scaled(nn.Linear):
    def forward(self, x):
        return 1.5 * super().forward(x)


class Table(nn.Embedding):
    pass


class Net(nn.Module):
    def __init__(self, linear, embedding):
        super().__init__()
        self.table, self.first, self.second = embedding(20, 12), nn.Linear(12, 8), linear(8, 16)
        self.third, self.last = nn.Linear(16, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.first(self.table(x)).relu()
        return self.last(self.third(self.second(x).relu()).relu())


@pytest.mark.parametrize("linear", [nn.Linear, Scaled])
@pytest.mark.parametrize("embedding", [nn.Embedding, Table])
def test_every_width_between_layers_has_gates(linear, embedding):
    torch.manual_seed(0)
    x = torch.randint(0, 20, (4, 5))
    model = dampr.convert(Net(linear, embedding), example_inputs=x)
    vectors = gated_layers(model).values()
    assert sorted(len(layer.gate.parameter) for layer in vectors) == [6, 8, 12, 16]
    assert list(model.dampr_skipped) == ["last"]
    with torch.no_grad():
        for layer in vectors:
            layer.gate.parameter[::2] = -9.0
    cost = Cost(model, x, "macs")
    masked = model.eval()(x)
    small = dampr.compact(model, example_inputs=x)
    torch.testing.assert_close(small(x), masked, rtol=1e-4, atol=1e-5)
    assert count_macs(small, x) == 20 * (6 * 4 + 4 * 8 + 8 * 3 + 3 * 3) == cost(cost.decision())
