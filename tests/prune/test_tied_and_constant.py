"""Parameters that several modules have, and constants that closed channels would leave: cut once, counted once,
as foretold.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dampr
from dampr.prune.measure import count_macs, count_params
from tests.prune.unit_networks import shaken

IMAGE = torch.randn(2, 3, 8, 8)
ROWS = torch.randn(5, 8)
WORDS = torch.randint(0, 30, (3, 5))


class TwoLinears(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(self.b(self.a(self.stem(x).relu()).relu()).relu())


class WordsAndHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.mix, self.head = nn.Embedding(30, 16), nn.Linear(16, 16), nn.Linear(16, 30, bias=False)
        self.head.weight = self.words.weight

    def forward(self, words):
        x = self.words(words)
        return self.head(x + self.mix(x).relu())


class TwoConvolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 1)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(self.b(self.a(self.stem(x).relu()).relu()).relu())


class OneBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.b.bias = self.a.bias

    def forward(self, x):
        return self.head(self.b(self.a(x).relu()).relu())


class SideBySide(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(32, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(torch.cat([self.a(x).relu(), self.b(x.flip(-1)).relu()], -1))


class Transposed(nn.Module):
    """The decoder of an autoencoder reads the weights of the encoder."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 10)

    def forward(self, x):
        return F.linear(F.linear(self.b(self.a(x).relu()).relu(), self.b.weight.t()).relu(), self.a.weight.t())


def norm_conv(read, written, size):
    return nn.Sequential(nn.Conv2d(read, written, size, padding=size // 2, bias=False), nn.BatchNorm2d(written))


class RepVGG(nn.Module):
    """A norm on an identity branch."""

    def __init__(self):
        super().__init__()
        self.stem, self.same = nn.Sequential(norm_conv(3, 16, 3), nn.ReLU()), nn.BatchNorm2d(16)
        self.wide, self.point, self.last = norm_conv(16, 16, 3), norm_conv(16, 16, 1), nn.Conv2d(16, 5, 3, padding=1)

    def forward(self, x):
        x = self.stem(x)
        return self.last((self.same(x) + self.wide(x) + self.point(x)).relu())


def depthwise(width):
    return nn.Conv2d(width, width, 3, padding=1, groups=width)


def padded(*between):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), *between, nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 2, 1)
    )


NETS = {
    "two linear layers": (TwoLinears, ROWS),
    "embedding and head": (WordsAndHead, WORDS),
    "two convolutions": (TwoConvolutions, IMAGE),
    "a bias": (OneBias, ROWS),
    "side by side": (SideBySide, ROWS),
    "transposed": (Transposed, ROWS),
    "sigmoid": (lambda: padded(nn.Sigmoid()), IMAGE),
    "softplus": (lambda: padded(nn.Softplus()), IMAGE),
    "SyncBatchNorm": (lambda: padded(nn.SyncBatchNorm(8), nn.ReLU()), IMAGE),
    "depthwise with a bias": (lambda: padded(depthwise(8)), IMAGE),
    "norm behind depthwise": (lambda: padded(depthwise(8), nn.BatchNorm2d(8), nn.ReLU()), IMAGE),
    "two depthwise": (lambda: padded(depthwise(8), nn.ReLU(), depthwise(8)), IMAGE),
    "exponential": (lambda: padded(nn.ELU(), nn.Conv2d(8, 8, 1), nn.LogSigmoid()), IMAGE),
    "identity branch": (RepVGG, IMAGE),
}


def made(name):
    torch.manual_seed(0)
    build, x = NETS[name]
    return shaken(build().eval()), x


@pytest.mark.parametrize("name", NETS)
def test_a_budget_is_what_compaction_gives(name):
    model, x = made(name)
    params, tied = count_params(model), len({id(p) for p in model.parameters()})
    y = model(x).detach()
    dampr.convert(model, example_inputs=x)
    assert torch.equal(model(x), y)
    small = dampr.compact(model, example_inputs=x)
    assert count_params(small) == params
    for metric in ("params", "macs"):
        closing = copy.deepcopy(model)
        budget = dampr.Budget(closing, x, **{metric: 0.7}, steps=8)
        assert budget.cost.total == (params if metric == "params" else count_macs(model, x))
        report = budget.finalize()
        small = dampr.compact(closing, example_inputs=x)
        counted = count_params(small) if metric == "params" else count_macs(small, x)
        assert counted == report.reached <= 0.7 * budget.cost.total
        assert counted == int(budget.cost(budget.cost.decision()))
        assert len({id(p) for p in small.parameters()}) == tied
        torch.testing.assert_close(small(x), closing(x), rtol=1e-5, atol=1e-5)
