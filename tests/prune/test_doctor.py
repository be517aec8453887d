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
    model = nn.Sequential(
        GatedConv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.LayerNorm(64)
    )
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


def trained_badly(optimizer, **how):
    torch.manual_seed(0)
    x = torch.randn(32, 12)
    model = dampr.convert(nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 3)), example_inputs=x)
    budget = dampr.Budget(model, x, macs=0.3, schedule=20, **how)
    optimizer = optimizer(dampr.param_groups(model, lr=0.1))
    for _ in range(60):
        optimizer.zero_grad()
        (model(x).square().mean() + budget.penalty()).backward()
        optimizer.step()
        budget.step()
    return model, x, budget, optimizer


def test_a_multiplier_that_winds_up_and_gates_that_do_not_move_are_named():
    model, x, budget, optimizer = trained_badly(torch.optim.SGD, strength=1.0, rate=0.1)
    found = [str(finding) for finding in doctor(model, x, optimizer=optimizer, budget=budget)]
    assert any("the multiplier has wound up to" in text and "let the budget own the gates" in text for text in found), (
        found
    )
    assert any(text.startswith("0: log_alpha moves by at most") for text in found), found


def test_gates_that_keep_up_are_not_named():
    model, x, budget, optimizer = trained_badly(
        lambda groups: torch.optim.Adam([groups[0], {**groups[1], "lr": 0.5}]), strength=100.0
    )
    assert not [
        f
        for f in doctor(model, x, optimizer=optimizer, budget=budget)
        if "moves by" in f.problem or "wound up" in f.problem
    ]


def test_a_plan_that_is_too_short_is_named():
    x = torch.randn(32, 12)
    net = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 3))
    found = doctor(net, x, plan=dampr.Plan(net, x, macs=0.3, steps=60, warmup=0.5, ramp=0.4))
    assert [f.problem.split(",")[0] for f in found] == [
        "a unit has 5 steps to close",
        "6 of 60 steps are left for the small model",
    ]
    net = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 3))
    assert doctor(net, x, plan=dampr.Plan(net, x, macs=0.3, steps=600)) == []
