"""Layers that a model calls by keyword are seen as those that it calls by position."""

import pytest
import torch
from torch import nn

import dampr
from dampr.nn.called import first_argument, with_first
from dampr.prune import gated_layers
from dampr.prune.measure import count_macs


def test_the_first_argument_by_position_and_by_keyword():
    assert first_argument((1, 2), {"input": 3}) == 1
    assert first_argument((), {"hx": 2, "input": 3}) == 3
    assert first_argument((), {"x": 4, "y": 5}) == 4
    assert first_argument((), {}) is None
    assert with_first((1, 2), {"y": 5}, 9) == ((9, 2), {"y": 5})
    assert with_first((), {"hx": 2, "input": 3}, 9) == ((), {"hx": 2, "input": 9})
    assert with_first((), {"x": 4}, 9) == ((), {"x": 9})


class Recurrent(nn.Module):
    def __init__(self, by_keyword):
        super().__init__()
        self.first, self.rnn, self.last = nn.Linear(6, 10), nn.LSTM(10, 12, batch_first=True), nn.Linear(12, 3)
        self.by_keyword = by_keyword

    def forward(self, x):
        x = self.first(x).relu()
        x, _ = self.rnn(input=x, hx=None) if self.by_keyword else self.rnn(x)
        return self.last(input=x[:, -1]) if self.by_keyword else self.last(x[:, -1])


class Constants(nn.Module):
    """A sigmoid makes constants of closed channels, which compaction moves into a bias."""

    def __init__(self, by_keyword):
        super().__init__()
        self.first, self.last = nn.Linear(6, 10), nn.Linear(10, 3, bias=False)
        self.by_keyword = by_keyword

    def forward(self, x):
        x = self.first(x).sigmoid()
        return self.last(input=x) if self.by_keyword else self.last(x)


class Norms(nn.Module):
    """Convolutions with norms that have no tensors of their own."""

    def __init__(self, by_keyword):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 10, 3, bias=False), nn.Conv2d(10, 5, 1)
        self.norm = nn.BatchNorm2d(10, affine=False, track_running_stats=False)
        self.by_keyword = by_keyword

    def forward(self, x):
        x = self.norm(input=self.first(input=x)) if self.by_keyword else self.norm(self.first(x))
        return self.last(x.relu()).mean((2, 3))


class Stream(nn.Module):
    """A residual stream with a norm, which counts open units."""

    def __init__(self, by_keyword):
        super().__init__()
        self.first, self.norm, self.inner = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 16)
        self.last = nn.Linear(16, 3)
        self.by_keyword = by_keyword

    def forward(self, x):
        x = self.first(x)
        x = x + self.inner(self.norm(input=x) if self.by_keyword else self.norm(x)).relu()
        return self.last(self.norm(input=x) if self.by_keyword else self.norm(x))


CASES = {
    "recurrent": (Recurrent, (4, 7, 6), {}),
    "constants": (Constants, (4, 6), {}),
    "norms without tensors": (Norms, (4, 3, 8, 8), {}),
    "stream": (Stream, (4, 6), {"residual": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_model_is_pruned_alike_whether_it_calls_by_keyword_or_by_position(name):
    made, shape, how = CASES[name]
    found = []
    for by_keyword in (False, True):
        torch.manual_seed(0)
        net, x = made(by_keyword), torch.randn(shape)
        model = dampr.convert(net, example_inputs=x, **how)
        budget = dampr.Budget(model, x, macs=0.6)
        with torch.no_grad():
            for layer in gated_layers(model).values():
                layer.gate.parameter[::2] = -9.0
        masked = model.eval()(x)
        small = dampr.compact(model, example_inputs=x)
        torch.testing.assert_close(small(x), masked, rtol=1e-4, atol=1e-5)
        found.append((list(gated_layers(model)), float(budget.total), count_macs(small, x), masked))
    (layers, total, left, masked), other = found
    assert (layers, total, left) == other[:3]
    assert left < total
    torch.testing.assert_close(masked, other[3])
