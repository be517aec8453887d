"""Budgets: hit exactly, by every family, and never above."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dampr
from dampr.gates import DifferentiableMask, DiffPrune, Fixed, HardConcrete
from dampr.nn import GatedRNN
from dampr.prune.measure import count_macs, count_params
from tests import models
from tests.prune.test_models import close_at_random

X = torch.randn(64, 20, generator=torch.Generator().manual_seed(0))
FAMILIES = {
    "hard_concrete": "hard_concrete",
    "binary": functools.partial(HardConcrete, preset="binary"),
    "dep_l0": "dep_l0",
    "dam": "dam",
    "diffprune": functools.partial(DiffPrune, stochastic=True, init_sigma=0.3),
    "diffmask": DifferentiableMask,
}


def converted(gate="hard_concrete"):
    net = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5))
    return dampr.convert(net, gate=gate, example_inputs=X)


def open_gates(model):
    return [layer.gate.is_open() for layer in dampr.prune.gated_layers(model).values()]


@pytest.mark.parametrize("metric", ["macs", "params"])
@pytest.mark.parametrize("share", [0.3, 0.9])
@pytest.mark.parametrize("gate", FAMILIES)
def test_every_family_ends_within_one_unit_of_the_target(gate, share, metric):
    model = converted(FAMILIES[gate])
    for p in (p for layer in dampr.prune.gated_layers(model).values() for p in layer.gate.parameters()):
        p.data -= 1.2 * torch.rand_like(p) * p.abs()
    budget = dampr.Budget(model, X, **{metric: share})
    before = open_gates(model)
    report = budget.finalize()
    small = dampr.compact(model, example_inputs=X)
    count = count_macs(small, X) if metric == "macs" else count_params(small)
    assert count == report.reached <= report.target == int(share * budget.total)
    for layer in dampr.prune.gated_layers(model).values():  # nothing that is closed would fit
        gates = layer.gate.values
        for closed in (gates == 0).nonzero()[:1]:
            gates[closed] = 1
            assert budget.left() * budget.total > report.target
            gates[closed] = 0
    after = open_gates(model)
    assert all((a <= b).all() for a, b in zip(after, before, strict=True)) or all(
        (a >= b).all() for a, b in zip(after, before, strict=True)
    )


@pytest.mark.parametrize("name", ["lenet5", "vgg", "resnet18", "preresnet", "mobilenet_v2", "unet", "vit"])
def test_networks_end_within_the_target(name):
    model, x = models.ALL[name]()
    dampr.convert(model, example_inputs=x)
    close_at_random(model, 0.2)
    budget = dampr.Budget(model, x, macs=0.8 if name == "vit" else 0.5)
    report = budget.finalize(min_width=2)
    assert count_macs(dampr.compact(model, example_inputs=x), x) == report.reached <= report.target
    assert report.reached > 0.9 * report.target
    assert min(left for _, left in report.widths.values()) >= 2


def test_gates_that_fit_already_are_kept_and_so_is_the_function():
    model = converted().eval()
    with torch.no_grad():
        model[0].gate.log_alpha.copy_(torch.linspace(-4, 4, 40))
    y, kept = model(X), model[0].gate.is_open()
    cost = count_macs(dampr.compact(model, example_inputs=X), X)
    dampr.Budget(model, X, macs=cost).finalize()
    assert torch.equal(model[0].gate.is_open(), kept)
    assert torch.equal(model(X), y)
    assert torch.equal(model.train()(X), y), "decided gates are not drawn"


def test_the_largest_gates_stay():
    model = converted()
    with torch.no_grad():
        model[0].gate.log_alpha.copy_(torch.randn(40))
        model[2].gate.log_alpha.copy_(torch.randn(30))
    z = [model[i].gate.deterministic().detach() for i in (0, 2)]
    dampr.Budget(model, X, params=0.4).finalize()
    for values, i in zip(z, (0, 2), strict=True):
        assert values[model[i].gate.is_open()].min() >= values[~model[i].gate.is_open()].max()


@pytest.mark.parametrize("round_to", [4, 8])
def test_widths_are_multiples(round_to):
    model = converted()
    close_at_random(model, 0.3)
    report = dampr.Budget(model, X, macs=0.5).finalize(round_to=round_to, min_width=round_to + 1)
    assert report.reached <= report.target
    for count, left in report.widths.values():
        assert left == count or left % round_to == 0
        assert left >= 2 * round_to


def test_recurrent_layers_of_other_numbers_of_directions_cannot_be_the_same():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.head = GatedRNN(5, 6), GatedRNN(6, 3, bidirectional=True), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.two(self.one(x)[0])[0])

    model = Two()
    x = torch.randn(4, 2, 5)
    with pytest.raises(dampr.BudgetError, match=r"same: recurrent layers with \[1, 2\] widths each"):
        dampr.Budget(model, x, macs=0.5).finalize(same="*")


def test_training_comes_down_to_the_target_on_schedule():
    torch.manual_seed(0)
    model, y = converted(), (X @ torch.randn(20, 5)).argmax(1)
    budget = dampr.Budget(model, X, macs=[0.7, 0.3], schedule=60, warmup=10)
    optimizer = torch.optim.Adam(dampr.param_groups(model, lr=1e-2, gate_lr=1e-1))
    for step in range(160):
        penalty = budget.penalty()
        assert step >= 10 or penalty == 0
        (F.cross_entropy(model(X), y) + penalty).backward()
        optimizer.step()
        optimizer.zero_grad()
        budget.step()
    assert budget.goal == pytest.approx(0.3, abs=1e-3)
    assert budget.left() == pytest.approx(0.3, abs=0.05)
    report = budget.finalize()
    assert 0.28 * budget.total <= report.reached <= 0.3 * budget.total
    (earlier,) = budget.snapshots.values()
    assert list(budget.snapshots) == [0.7]
    assert 0.66 * budget.total <= count_macs(dampr.compact(earlier, example_inputs=X), X) <= 0.7 * budget.total
    assert type(earlier[0].gate) is Fixed
    assert float((model.eval()(X).argmax(1) == y).float().mean()) > 0.8


def test_penalty_pulls_on_every_gate_until_the_goal_is_met():
    model = converted()
    budget = dampr.Budget(model, X, macs=0.5, strength=2.0, rate=0.0)
    budget.penalty().backward()
    for layer in dampr.prune.gated_layers(model).values():
        assert (layer.gate.log_alpha.grad > 0).all()
    share = budget.expected().item()
    assert budget.penalty().item() == pytest.approx(2 * 0.5 * share, rel=1e-3)
    with torch.no_grad():
        model[0].gate.log_alpha[:35] = -9
    budget.step()
    assert budget.penalty().item() == 0


def test_multiplier_follows_the_gap_and_is_saved():
    model = converted()
    budget = dampr.Budget(model, X, macs=0.5, rate=0.1)
    budget.step()
    budget.step()
    assert float(budget.multiplier) == pytest.approx(2 * 0.1 * (1 - budget.target / budget.total))
    other = dampr.Budget(model, X, macs=0.5, rate=0.1)
    other.load_state_dict(budget.state_dict())
    assert (other.steps, float(other.multiplier)) == (2, float(budget.multiplier))
    assert torch.equal(other.penalty(), budget.penalty())


def test_optimizer_and_model_go_on_after_finalize():
    model = converted()
    optimizer = torch.optim.Adam(dampr.param_groups(model, lr=1e-2), lr=1e-2)
    budget = dampr.Budget(model, X, macs=0.5)
    budget.finalize()
    before = model[0].gate.values.clone()
    model(X).square().mean().backward()
    optimizer.step()
    assert torch.equal(model[0].gate.values, before)
    assert dampr.penalty(model).requires_grad is False


def test_what_is_out_of_reach_changes_nothing():
    model = converted()
    with pytest.raises(
        dampr.BudgetError, match=r"macs=1000: expected at least 1,664 of 137,600 .* with one gate open in every layer"
    ):
        dampr.Budget(model, X, macs=1000)
    with pytest.raises(
        dampr.BudgetError,
        match=r"target of 6,880 macs: expected at least .* 20 \(a multiple of 1\) open in every layer",
    ):
        dampr.Budget(model, X, macs=0.05).finalize(min_width=20)
    assert isinstance(model[0].gate, HardConcrete)
    with pytest.raises(dampr.BudgetError, match="30 "):
        dampr.Budget(model, X, params=0.5).finalize(min_width=30)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "macs=None, params=None, latency=None: expected exactly one"),
        ({"macs": 0.5, "params": 0.5}, ValueError, "macs=0.5, params=0.5, latency=None: expected exactly one"),
        ({"latency": 3}, ValueError, r"latency=3: expected a share in \(0, 1\)$"),
        ({"macs": 1.5}, ValueError, r"macs=1.5: expected a share in \(0, 1\), or a count"),
        ({"macs": 0}, ValueError, "macs=0: expected"),
        ({"macs": True}, ValueError, "macs=True: expected"),
        ({"params": [0.5, "half"]}, ValueError, "params='half': expected"),
        ({"macs": []}, ValueError, r"macs=\[\]: expected"),
        ({"macs": 0.5, "schedule": 0}, ValueError, "schedule=0"),
        ({"macs": 0.5, "warmup": -1}, ValueError, "warmup=-1"),
        ({"macs": 0.5, "strength": -1.0}, ValueError, "strength=-1.0"),
        ({"macs": 0.5, "rate": float("inf")}, ValueError, "rate=inf"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        dampr.Budget(converted(), X, **arguments)


def test_models_without_prunable_gates_are_refused():
    with pytest.raises(ValueError, match="expected gated layers"):
        dampr.Budget(nn.Linear(3, 2), torch.randn(2, 3), macs=0.5)
    weights = dampr.convert(nn.Sequential(nn.Linear(20, 5), nn.ReLU(), nn.Linear(5, 2)), granularity="weight")
    with pytest.raises(ValueError, match="no gate of it cuts anything"):
        dampr.Budget(weights, X, macs=0.5)


def test_dam_keeps_the_gates_it_would_open_next():
    model = converted("dam")
    for layer in dampr.prune.gated_layers(model).values():
        layer.gate.beta.data.fill_(-4.0)
    dampr.Budget(model, X, macs=0.5).finalize()
    for layer in dampr.prune.gated_layers(model).values():
        gates = layer.gate.is_open().long()
        assert (gates.diff() >= 0).all(), "open gates are a suffix"


def test_layers_that_have_to_keep_the_same_number_do():
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    layers = [m for _ in range(3) for m in (nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 6))]
    model = dampr.convert(nn.Sequential(*layers), exclude=["2", "5"], example_inputs=x)
    for layer in dampr.prune.gated_layers(model).values():
        layer.gate.log_alpha.data.uniform_(-1, 3)
    values = {name: layer.gate.log_alpha.detach().clone() for name, layer in dampr.prune.gated_layers(model).items()}
    report = dampr.Budget(model, x, macs=0.6).finalize(same="*")
    assert {left for left, _ in zip(report.widths.values(), range(3), strict=True)} == {(20, 12)}
    assert report.reached == report.target
    for name, layer in dampr.prune.gated_layers(model).items():
        kept = layer.gate.is_open()
        assert values[name][kept].min() >= values[name][~kept].max(), "each its own best"


def test_layers_that_cannot_keep_the_same_number_are_named():
    x = torch.randn(4, 6)
    model = dampr.convert(
        nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 9), nn.ReLU(), nn.Linear(9, 2)), example_inputs=x
    )
    budget = dampr.Budget(model, x, macs=0.6)
    with pytest.raises(ValueError, match=r"same='\*': it matches {'0': 20, '2': 9}, expected"):
        budget.finalize(same="*")
    with pytest.raises(ValueError, match="it matches {}"):
        budget.finalize(same=["none"])
    with pytest.raises(ValueError, match="no gates are matched twice"):
        budget.finalize(same=["0", "[0]"])


def test_states_of_something_else_are_refused_before_anything_is_taken_over():
    def owner(width):
        net = nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, 5))
        return dampr.Budget(dampr.convert(net, example_inputs=X), example_inputs=X, macs=0.5, steps=20, score="learned")

    budget = owner(40)
    good = budget.state_dict()
    owned = good["controller"]
    for bad, message in (
        ({}, "^state={}: expected the keys"),
        (None, "^state=None: expected the keys"),
        (good | {"steps": "x"}, r"^state\['steps'\]='x': expected an integer"),
        (good | {"steps": 7, "multiplier": float("nan")}, r"^state\['multiplier'\]=nan: expected a finite number"),
        (owner(30).state_dict() | {"steps": 7}, r"'keep'\]: got torch.bool of shape \(30,\), expected .*\(40,\)"),
        (good | {"controller": owned | {"held": []}}, r"'held'\]=\[\]: expected a list of 1"),
        (good | {"controller": owned | {"held": [3]}}, r"'held'\]\[0\]=3: expected one of"),
        (good | {"controller": owned | {"keep": None}}, r"'keep'\]: got None, expected torch.bool"),
        ({key: good[key] for key in ("steps", "multiplier")}, "expected the same `steps=` as then"),
    ):
        with pytest.raises(ValueError, match=message):
            budget.load_state_dict(bad)
        assert budget.steps == 0
    budget.load_state_dict(good | {"steps": 3})
    assert budget.steps == 3


def test_gates_have_one_budget_that_owns_them():
    model = converted()
    first = dampr.Budget(model, X, macs=0.5, steps=20)
    before = [type(m) for m in model.modules()]
    for how in ({"steps": 30}, {}):
        with pytest.raises(
            ValueError, match=r"its gates have a budget, Budget\(macs: target 50.00% .* finalize that one"
        ):
            dampr.Budget(model, X, params=0.4, **how)
    assert [type(m) for m in model.modules()] == before
    dampr.Budget(copy.deepcopy(model), X, macs=0.4, steps=20)
    first.finalize()
    dampr.Budget(model, X, macs=0.4, steps=20)

    model = converted()
    first = dampr.Budget(model, X, macs=0.5)
    second = dampr.Budget(model, X, params=0.5)  # two penalties
    with pytest.raises(ValueError, match="its gates have a budget"):
        dampr.Budget(model, X, macs=0.5, steps=20)
    del first, second
    dampr.Budget(model, X, macs=0.5, steps=20)


def test_example_inputs_that_cost_nothing_are_refused():
    with pytest.raises(ValueError, match="example_inputs: macs of the model on them are 0"):
        dampr.Budget(converted(), X[:0], macs=0.5, steps=20)


@pytest.mark.parametrize("same", [3, [3], None])
def test_same_is_of_names(same):
    with pytest.raises(TypeError, match="^same="):
        dampr.Budget(converted(), X, macs=0.5, steps=20).finalize(same=same)
