"""The table of times: right at its knots, linear between them, never falling; budgets of it.

No test depends on how long anything takes.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dampr
from dampr.prune import Cost, Latency, latency
from dampr.prune.measure import count_call
from dampr.prune.unit_structure import UnitStructure
from tests import models
from tests.prune.test_cost import CASES
from tests.prune.test_models import close_at_random


@pytest.fixture
def counted(monkeypatch):
    """A clock for which every multiply-accumulate takes a second."""
    monkeypatch.setattr(latency, "seconds_of", lambda call, device: float(count_call(call)))


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("case", [*models.ALL, *CASES])
def test_at_the_knots_the_table_is_what_was_measured(counted, case):
    model, x = models.ALL[case]() if case in models.ALL else CASES[case]()
    if case in models.ALL:
        dampr.convert(model, example_inputs=x)
    macs, times = Cost(model, x, "macs"), Latency(model, x)
    every = torch.ones(times.structure.size)
    assert times.total == macs.total == pytest.approx(float(times(every)))
    least = torch.zeros(times.structure.size)
    for name in times.structure.gated:
        least[times.structure.start(name)] = 1
    if isinstance(times.structure, UnitStructure):  # products of activations are in no layer, and count as fixed
        assert float(times(least)) >= float(macs(least))
    else:
        assert float(times(least)) == pytest.approx(float(macs(least)))
    assert bool(times.prunable.any())


def test_between_the_knots_it_is_linear_and_has_a_gradient(counted):
    model = dampr.convert(
        nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 4)), example_inputs=torch.randn(2, 8)
    )
    times = Latency(model, torch.randn(1, 8))
    p = torch.full((40,), 13 / 40, dtype=torch.float64, requires_grad=True)
    assert float(times(p.detach())) == pytest.approx(13 * 12)  # both layers are linear in this width
    times(p).backward()
    assert torch.allclose(p.grad, torch.full((40,), 12.0, dtype=torch.float64))


def test_more_channels_never_count_as_less_time(monkeypatch):
    clock = iter(range(10_000, 0, -1))
    monkeypatch.setattr(latency, "seconds_of", lambda call, device: float(next(clock)))
    model, x = models.vgg()
    times = Latency(dampr.convert(model, example_inputs=x), x)
    gates = torch.zeros(times.structure.size)
    found = []
    for i in torch.randperm(len(gates)):
        gates[i] = 1
        found.append(float(times(gates)))
    assert found == sorted(found)


@pytest.mark.parametrize("name", ["mlp", "vgg", "mobilenet_v2"])
def test_a_budget_of_time(counted, name):
    model, x = models.ALL[name]()
    dampr.convert(model, example_inputs=x)
    close_at_random(model, 0.2)
    budget = dampr.Budget(model, x, latency=0.5)
    budget.penalty()
    budget.step()
    report = budget.finalize()
    assert 0.8 * report.target < report.reached <= report.target == 0.5 * report.total
    assert report.reached == pytest.approx(budget.left() * budget.total)
    assert "ms of" in str(report)
    dampr.compact(model, example_inputs=x)


def conv(read, written, groups=1):
    return nn.Sequential(nn.Conv2d(read, written, 3, padding=1, groups=groups), nn.BatchNorm2d(written), nn.ReLU())


@pytest.mark.parametrize("between", [nn.Identity(), nn.ChannelShuffle(4)], ids=["whole groups", "within groups"])
def test_convolutions_in_groups_are_timed(counted, between):
    """Of the first whole groups go; around a shuffle every group loses channels."""
    x = torch.randn(1, 3, 6, 6)
    model = nn.Sequential(conv(3, 16), conv(16, 32, 4), between, conv(32, 16, 4), conv(16, 8), nn.Conv2d(8, 2, 1))
    times = Latency(dampr.convert(model, x), x)
    macs = Cost(model, x, "macs")
    every, half = torch.ones(times.structure.size), torch.ones(times.structure.size)
    for name in times.structure.gated:
        start, count = times.structure.start(name), times.structure.count(name)
        half[start : start + count // 2] = 0
    assert times.total == macs.total == pytest.approx(float(times(every)))
    assert float(times(half)) == pytest.approx(float(macs(half)))


def test_the_clock_of_this_machine():
    """Timed for real: only what holds whatever anything takes."""
    model, x = models.vgg()
    times = Latency(dampr.convert(model, example_inputs=x), x)
    every = torch.ones(times.structure.size)
    assert 0 <= float(times(0 * every)) <= float(times(every)) == pytest.approx(times.total)


def test_a_model_whose_gates_narrow_no_layer_takes_one_time():
    model = nn.Sequential(dampr.nn.GatedActivation(8, dim=1), nn.Flatten())
    latency = Latency(model, torch.randn(4, 8))
    assert float(latency(torch.ones(8))) == pytest.approx(float(latency.total))
    assert float(latency(torch.zeros(8))) == pytest.approx(float(latency.total))
