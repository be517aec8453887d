"""doctor finds what is wrong, and nothing where all is well; calibrate balances the two gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dampr
from dampr.nn import GatedConv2d
from dampr.prune import calibrate, doctor
from tests import models

X = torch.randn(16, 10, generator=torch.Generator().manual_seed(0))


def mlp():
    net = nn.Sequential(nn.Linear(10, 30), nn.Tanh(), nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 3))
    return dampr.convert(net, example_inputs=X)


@pytest.mark.parametrize("name", models.ALL)
def test_a_converted_network_is_well(name):
    model, x = models.ALL[name]()
    dampr.convert(model, example_inputs=x)
    optimizer = torch.optim.AdamW(dampr.param_groups(model, lr=1e-3, weight_decay=0.1))
    assert doctor(model, x, optimizer=optimizer) == []


def test_a_weak_penalty_is_found_and_calibrated_away():
    model = mlp().train()
    loss = lambda: model(X).square().mean()  # noqa: E731
    weak = lambda: 1e-9 * dampr.penalty(model)  # noqa: E731
    (found,) = doctor(model, X, loss=loss, penalty=weak)
    assert found.where == ""
    assert "nothing will close" in found.problem
    lam = calibrate(model, loss())
    assert doctor(model, X, loss=loss, penalty=lambda: lam * dampr.penalty(model)) == []
    (found,) = doctor(model, X, loss=loss, penalty=lambda: 0 * dampr.penalty(model))
    assert found.problem == "the penalty has no gradient on any gate"


def test_calibration_balances_the_gradients():
    model = mlp().train()
    loss, cost = model(X).square().mean(), dampr.penalty(model)
    lam = calibrate(model, loss, cost, ratio=0.5)
    gates = [layer.gate.log_alpha for layer in dampr.prune.gated_layers(model).values()]
    pulls = [torch.cat(torch.autograd.grad(s, gates, retain_graph=True)).norm() for s in (loss, lam * cost)]
    assert float(pulls[1] / pulls[0]) == pytest.approx(0.5, rel=1e-5)
    with pytest.raises(ValueError, match="loss: it has no gradient on any gate"):
        calibrate(model, X.mean())
    with pytest.raises(ValueError, match="ratio=0"):
        calibrate(model, loss, ratio=0)


def test_dying_and_dead_layers_are_named():
    model = mlp()
    model[0].gate.log_alpha.data.fill_(-9)
    model[2].gate.log_alpha.data[1:] = -9
    found = {finding.where: finding.problem for finding in doctor(model, X)}
    assert found == {"0": "all 30 gates are closed", "2": "1.0 of 20 gates expected open"}


def test_gates_before_a_norm_and_gates_that_cut_nothing():
    model = nn.Sequential(GatedConv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.LayerNorm(64))
    (found,) = doctor(model, torch.randn(2, 3, 8, 8))
    assert found.where == "0"
    assert "BatchNorm makes constants" in found.problem
    blocked = dampr.convert(nn.Sequential(nn.Linear(10, 6), nn.LayerNorm(6), nn.Linear(6, 2)), include=["0"])
    (found,) = doctor(blocked, X)
    assert found.problem == "closing its gates cuts nothing: LayerNorm '1' computes statistics over its channels"
    assert found.as_dict()["remedy"] == "exclude it from convert"


def test_what_verification_finds_is_passed_on():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-4)
    assert [finding.where for finding in doctor(model, X, optimizer=optimizer)] == ["0", "2"]
