"""A budget that owns its gates, held to what a control system promises: it follows, it arrives,
and nothing is left to decide.
"""

from __future__ import annotations

import itertools
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dampr
from dampr.gates import Fixed, Gate, OwnedGate, SteppedGate
from dampr.prune.controller import Ramp, even_share
from tests.long import long_if

FAMILIES = ("hard_concrete", "dep_l0", "dam", "diffprune", "diffmask")
OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=2e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
}
TARGETS = (0.5, 0.25, 0.1, 0.05)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(6, 24, batch_first=True), nn.Linear(24, 4)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def mlp():
    return nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 4)), (12,)


def cnn():
    layers = [nn.Conv2d(2, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [
        nn.Conv2d(16, 24, 3, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 4),
    ]
    return nn.Sequential(*layers), (2, 6, 6)


def gru():
    return Recurrent(), (4, 6)


NETS = {"mlp": mlp, "cnn": cnn, "gru": gru}


def follow(net, family, optimizer, macs, steps, score="learned", seed=0):
    """Train for ``steps`` steps under a budget: of each step the goal, what was left, and a unit; the report,
    and the model.
    """
    torch.manual_seed(seed)
    model, shape = NETS[net]()
    x = torch.randn(256, *shape)
    y = (x.flatten(1) @ torch.randn(math.prod(shape), 4)).argmax(1)
    dampr.convert(model, gate=family, example_inputs=x[:8])
    budget = dampr.Budget(model, x[:1], macs=macs, steps=steps, score=score)
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    trace = []
    for step in range(steps):
        rows = torch.arange(16) + step * 16 % 240
        loss = F.cross_entropy(model(x[rows]), y[rows]) + budget.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        budget.step()
        goal, left = budget.goal, budget.left()
        trace.append((goal, left, unit(budget) if abs(left - goal) > 0.02 * goal else 0.0))
    return trace, budget.finalize(), model


def unit(budget):
    """The largest share of the cost by which one gate more or less changes what is kept."""
    cost, keep = budget.cost, budget.controller.keep
    now, changed = float(cost(keep)), []
    for gate in cost.prunable.nonzero().flatten().tolist()[:: 1 + len(keep) // 40]:
        other = keep.clone()
        other[gate] = not keep[gate]
        changed.append(abs(float(cost(other)) - now))
    return max(changed) / budget.total


def check(trace, report, macs):
    ramp = Ramp(macs, len(trace))
    middle = ramp.measured + ramp.lag + ramp.length // 2
    for step, (goal, left, dearest) in enumerate(trace[middle:], middle):
        assert abs(left - goal) <= max(0.1 * goal, dearest), (
            f"step {step}: goal {goal:.4f}, left {left:.4f}, a unit {dearest:.4f}"
        )
    _, last, dearest = trace[-1]
    assert abs(last - macs) <= max(0.02 * macs, dearest), f"ends at {last:.4f} for {macs}"
    assert report.changed <= 0.02, (
        f"finalize changed {report.changed:.3f} of the gates: {report.closed}, {report.opened}"
    )
    assert report.reached <= report.target
    assert all(left >= 1 for _, left in report.widths.values())


def pairs(shift, every):
    """Optimizers and targets: every pair, or four pairs that have each optimizer and each target once,
    others with another ``shift``.
    """
    if every:
        return list(itertools.product(OPTIMIZERS, TARGETS))
    return [(optimizer, TARGETS[(i + shift) % len(TARGETS)]) for i, optimizer in enumerate(OPTIMIZERS)]


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("net", NETS)
def test_learned_gates_of_every_family_follow_the_goal_whatever_the_optimizer(net, family, every):
    for optimizer, macs in pairs(FAMILIES.index(family) + list(NETS).index(net), every):
        check(*follow(net, family, optimizer, macs, 150)[:2], macs)


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("net", NETS)
def test_importance_follows_the_goal_whatever_the_optimizer(net, every):
    for optimizer, macs in pairs(list(NETS).index(net), every):
        check(*follow(net, "hard_concrete", optimizer, macs, 150, "importance")[:2], macs)


@pytest.mark.parametrize(
    ("net", "family"),
    [
        ("mlp", "hard_concrete"),
        ("gru", "diffmask"),
        *(
            pytest.param(*pair, marks=pytest.mark.long)
            for pair in (("cnn", "dep_l0"), ("mlp", "diffprune"), ("cnn", "dam"))
        ),
    ],
)
def test_a_long_schedule_is_followed_too(net, family):
    check(*follow(net, family, "adam", 0.25, 600)[:2], 0.25)


@pytest.mark.parametrize("net", [long_if(net, "cnn", "gru") for net in NETS])
def test_importance_follows_a_long_schedule_too(net):
    check(*follow(net, "hard_concrete", "adam", 0.05, 600, "importance")[:2], 0.05)


def small_budget(score="importance", **how):
    torch.manual_seed(0)
    model = dampr.convert(mlp()[0], example_inputs=torch.randn(8, 12))
    return model, dampr.Budget(model, torch.randn(1, 12), **({"macs": 0.25, "steps": 40} | how), score=score)


@pytest.mark.parametrize("score", ["importance", "learned"])
def test_owned_gates_are_no_parameters_of_the_model_and_weights_keep_their_names(score):
    model, budget = small_budget(score)
    assert not any("gate" in name for name, _ in model.named_parameters())
    assert all(isinstance(layer.gate, (SteppedGate, OwnedGate)) for layer in dampr.prune.gated_layers(model).values())
    assert budget.penalty() == 0
    assert [name for name, _ in model.named_parameters()] == [
        f"{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")
    ]


def test_a_probe_measures_taylor_importance_exactly():
    model, budget = small_budget()
    x, w = torch.randn(16, 12), torch.randn(16, 4)
    (model(x) * w).sum().backward()
    gate = model[0].gate
    dense = nn.functional.linear(x, model[0].weight, model[0].bias).detach().requires_grad_()
    ((model[4](model[3](nn.functional.linear(model[1](dense), model[2].weight, model[2].bias)))) * w).sum().backward()
    torch.testing.assert_close(gate.probe.grad, (dense.grad * dense.detach()).sum(0), rtol=1e-4, atol=1e-5)
    budget.step()
    assert gate.probe.grad is None, "a step takes what was measured"


def test_learned_gates_hide_the_parameters_of_their_family_but_save_them_under_their_names():
    model, _ = small_budget("learned")
    state = model.state_dict()
    assert "0.gate.log_alpha" in state
    state["0.gate.log_alpha"] = torch.linspace(-4, 4, 40)
    model.load_state_dict(state)
    torch.testing.assert_close(model[0].gate.family.log_alpha.detach(), torch.linspace(-4, 4, 40))
    moved = model.to(torch.float64)
    assert moved[0].gate.family.log_alpha.dtype == torch.float64


def test_gates_of_an_optimizer_and_gates_of_a_budget_exclude_each_other():
    x = torch.randn(8, 12)
    model = dampr.convert(mlp()[0], example_inputs=x)
    dampr.param_groups(model, lr=1e-3, gate_lr=1e-2)
    with pytest.raises(ValueError, match=r"steps=40: param_groups\(gate_lr=\) has given the gates to an optimizer"):
        dampr.Budget(model, x, macs=0.5, steps=40)
    model, _ = small_budget()
    with pytest.raises(ValueError, match=r"gate_lr=0.01: a budget owns the gates"):
        dampr.param_groups(model, lr=1e-3, gate_lr=1e-2)
    assert len(dampr.param_groups(model, lr=1e-3)) == 2


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ({"steps": 3}, "steps=3: expected an integer of at least 8"),
        ({"schedule": 10}, "steps=40 with schedule=10"),
        ({"score": "l1"}, r"score='l1': expected one of \['importance', 'learned'\]"),
        ({"min_share": 2.0}, r"min_share=2.0: expected a number in \[0, 1\]"),
        ({"macs": [0.5, 0.25]}, "with 2 targets: expected one"),
    ],
)
def test_bad_arguments_are_refused_before_anything_changes(how, match):
    model = dampr.convert(mlp()[0], example_inputs=torch.randn(8, 12))
    gates = [layer.gate for layer in dampr.prune.gated_layers(model).values()]
    with pytest.raises(ValueError, match=match):
        dampr.Budget(model, torch.randn(1, 12), **({"macs": 0.25, "steps": 40} | how))
    assert all(a is layer.gate for a, layer in zip(gates, dampr.prune.gated_layers(model).values(), strict=True))


def test_targets_out_of_reach_are_refused_at_once_and_name_the_minimum():
    model = dampr.convert(mlp()[0], example_inputs=torch.randn(8, 12))
    with pytest.raises(dampr.BudgetError, match=r"macs=10: expected at least 17 of 1,800 .*; 10 % is macs=0.1"):
        dampr.Budget(model, torch.randn(1, 12), macs=10)
    with pytest.raises(dampr.BudgetError, match=r"min_share=0.9: .* of macs remain with that share of every width"):
        dampr.Budget(model, torch.randn(1, 12), macs=0.25, steps=40, min_share=0.9)


def test_a_family_that_cannot_be_moved_is_refused_by_name():
    class Sigmoid(Gate):
        def __init__(self, num_gates, *, device=None):
            super().__init__(num_gates)
            self.logit = nn.Parameter(torch.full((num_gates,), 30.0))

        def forward(self, rows=None):
            return torch.sigmoid(self.logit)

        def open_probability(self):
            return self()

    x = torch.randn(8, 12)
    model = dampr.convert(mlp()[0], gate=Sigmoid, example_inputs=x)
    with pytest.raises(NotImplementedError, match="Sigmoid has no levels"):
        dampr.Budget(model, x, macs=0.5, steps=40, score="learned")
    dampr.Budget(model, x, macs=0.5, steps=40)  # importance needs nothing of a family


@pytest.mark.parametrize("score", ["importance", "learned"])
def test_no_width_falls_below_its_floor(score):
    _, report, model = follow("mlp", "hard_concrete", "adam", 0.1, 150, score)
    fresh = dampr.Budget(dampr.convert(mlp()[0], example_inputs=torch.randn(8, 12)), torch.randn(1, 12), macs=0.1)
    share = even_share(fresh.cost, fresh.target)
    assert 0.1 < share < math.sqrt(0.1)
    assert all(left >= math.ceil(0.5 * share * count) for count, left in report.widths.values())
    assert all(isinstance(layer.gate, Fixed) for layer in dampr.prune.gated_layers(model).values())


def test_a_step_that_a_gradient_scaler_leaves_out_changes_nothing_that_was_measured():
    model, budget = small_budget()
    model(torch.randn(4, 12)).square().mean().backward()
    budget.step()
    before = budget.controller.squares.clone()
    (model(torch.randn(4, 12)).square().mean() * math.inf).backward()
    budget.step()
    assert torch.equal(budget.controller.squares, before)


def test_the_scale_of_the_loss_changes_no_decision():
    kept = []
    for scale in (1.0, 65536.0):
        torch.manual_seed(1)
        model, budget = small_budget()
        x = torch.randn(40, 16, 12)
        for rows in x:
            (model(rows).square().mean() * scale).backward()
            budget.step()
        kept.append(budget.controller.keep)
    assert torch.equal(*kept)


@pytest.mark.parametrize("score", ["importance", "learned"])
def test_a_budget_goes_on_where_its_state_says(score):
    def steps(model, budget, rows):
        for x in rows:
            torch.manual_seed(5)
            model(x).square().mean().backward()
            for p in model.parameters():
                p.grad = None
            budget.step()

    x = torch.randn(40, 16, 12, generator=torch.Generator().manual_seed(0))
    model, budget = small_budget(score)
    steps(model, budget, x[:25])
    state, weights = budget.state_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    other, again = small_budget(score)
    other.load_state_dict(weights)
    again.load_state_dict(state)
    steps(model, budget, x[25:])
    steps(other, again, x[25:])
    assert torch.equal(budget.controller.keep, again.controller.keep)
    assert budget.left() == again.left()
    with pytest.raises(ValueError, match="of a budget that owns the gates and of one that does not"):
        dampr.Budget(dampr.convert(mlp()[0], example_inputs=x[0]), x[0], macs=0.5).load_state_dict(state)


def test_equal_layers_stay_equal_without_data():
    net = nn.Sequential(*(layer for i in range(4) for layer in (nn.Linear(64, 64), nn.ReLU())), nn.Linear(64, 10))
    x = torch.randn(8, 64)
    model = dampr.convert(net, example_inputs=x)
    widths = [left for _, left in dampr.Budget(model, x, macs=0.5).finalize().widths.values()]
    assert len(widths) == 4
    assert max(widths) - min(widths) <= 1


@pytest.mark.parametrize("how", [{"steps": 40}, {"steps": 40, "score": "learned"}, {"schedule": 10}, {}], ids=str)
def test_a_budget_pickles_with_its_model(how):
    x = torch.randn(8, 12)
    model = dampr.convert(mlp()[0], example_inputs=x)
    budget = dampr.Budget(model, x, macs=0.25, **how)
    budget.step()
    again = pickle.loads(pickle.dumps(budget))
    assert repr(again) == repr(budget)
    assert again.model is not model
    for _ in range(20):
        for each in (budget, again):
            each.model(x).square().mean().backward()
            each.step()
    assert again.left() == budget.left()
