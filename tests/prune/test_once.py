"""prune_once: exactly the size that was asked for, the units that matter, a proof, and the model as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dampr
from dampr.prune.measure import count_macs, count_params
from tests import models

X = torch.randn(64, 20, generator=torch.Generator().manual_seed(0))
Y = torch.randint(5, (64,), generator=torch.Generator().manual_seed(1))
BATCHES = list(zip(X.split(16), Y.split(16), strict=True))


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5))


@pytest.mark.parametrize("criterion", ["taylor", "magnitude", "random"])
@pytest.mark.parametrize(("metric", "share"), [("macs", 0.5), ("params", 0.2), ("macs", 0.05)])
def test_what_is_left_costs_the_target_and_the_model_stays_as_it_was(metric, share, criterion):
    model = mlp()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small = dampr.prune_once(model, BATCHES, F.cross_entropy, criterion=criterion, **{metric: share})
    count = {"macs": lambda m: count_macs(m, X[:16]), "params": lambda m: count_params(m)}[metric]
    total = count(model)
    assert count(small) <= share * total
    assert count(small) > share * total - 60 * (16 if metric == "macs" else 1)
    assert small.dampr_budget.reached == count(small)
    assert {type(m) for m in small.children()} == {nn.Linear, nn.ReLU}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]


def test_units_that_do_nothing_go_first_and_units_that_matter_stay():
    model = mlp()
    with torch.no_grad():
        model[2].weight[:, :20] = 0  # nothing reads the first 20
        model[0].bias[:20] = 5.0
    small = dampr.prune_once(model, BATCHES, F.cross_entropy, macs=0.6)
    kept = small.dampr_manifest["layers"]["0"]["out"]["kept"]
    assert set(range(20, 40)) <= set(kept)
    assert len(kept) < 25
    assert small[2].out_features > 25, "it pays to cut what does nothing"


def test_magnitude_keeps_the_largest_of_each_layer():
    model = mlp()
    norms = model[0].weight.detach().norm(dim=1)
    small = dampr.prune_once(model, example_inputs=X, macs=0.5, criterion="magnitude")
    kept = small.dampr_manifest["layers"]["0"]["out"]["kept"]
    assert norms[kept].min() >= norms[[i for i in range(40) if i not in kept]].max()


class Projected(nn.Module):
    def __init__(self, layers):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.head = nn.LSTM(20, 9, layers, proj_size=5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize("layers", [1, 2])
def test_magnitude_of_projected_units_is_that_of_their_projection(layers):
    model, x = Projected(layers), X.view(8, 8, 20)
    norms = model.rnn.weight_hr_l0.detach().norm(dim=1)
    small = dampr.prune_once(model, example_inputs=x, macs=0.8, criterion="magnitude")
    assert count_macs(small, x) <= 0.8 * count_macs(model, x)
    kept = small.dampr_manifest["layers"]["rnn"]["units"]["kept"][0]
    assert 0 < len(kept) < 5
    assert norms[kept].min() >= norms[[i for i in range(5) if i not in kept]].max()


def test_a_share_of_the_parameters_is_one_of_the_dense_model_also_where_gates_are_in_a_norm_without_a_gain():
    model = nn.Sequential(nn.Linear(20, 40), nn.BatchNorm1d(40, affine=False), nn.ReLU(), nn.Linear(40, 5))
    small = dampr.prune_once(model, BATCHES, F.cross_entropy, params=0.6)
    assert small.dampr_budget.total == count_params(model)
    assert count_params(small) <= 0.6 * count_params(model)


def test_importance_is_that_of_the_definition():
    model = mlp()
    hidden: list[torch.Tensor] = []
    model[0].register_forward_hook(lambda layer, args, out: hidden.append(out))
    expected = torch.zeros(40)
    for x, y in BATCHES:
        hidden.clear()
        loss = F.cross_entropy(model(x), y)
        (grad,) = torch.autograd.grad(loss, hidden[0])
        expected += (grad * hidden[0].detach()).sum(0).square() / len(BATCHES)
    found = dampr.convert(mlp(), example_inputs=X, include="0")
    budget = dampr.Budget(found, X, macs=0.5, steps=8)
    measured = dampr.prune.once.taylor(found, budget.controller.gates, BATCHES, F.cross_entropy)
    torch.testing.assert_close(measured.float(), expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", ["lenet5", "vgg", "resnet18", "unet", "vit", "mobilenet_v2"])
def test_networks_of_all_kinds(name):
    model, x = models.ALL[name]()
    share = 0.85 if name == "vit" else 0.5
    small = dampr.prune_once(model, [(x, None)] * 2, lambda out, _: out.square().mean(), macs=share, rounds=2)
    assert count_macs(small, x) <= share * count_macs(model, x)
    assert small.dampr_manifest["max_abs_difference"] < 1e-3


def test_rounds_measure_anew_and_end_at_the_same_size():
    once, thrice = (dampr.prune_once(mlp(), BATCHES, F.cross_entropy, macs=0.2, rounds=rounds) for rounds in (1, 3))
    assert abs(count_macs(once, X) - count_macs(thrice, X)) < 0.02 * count_macs(mlp(), X)
    kept = [small.dampr_manifest["layers"]["2"]["out"]["kept"] for small in (once, thrice)]
    assert kept[0] != kept[1]


def test_dicts_and_tuples_of_inputs_and_recurrent_models():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.LSTM(6, 16, batch_first=True), nn.Linear(16, 3)

        def forward(self, x, scale):
            return self.head(self.rnn(x * scale)[0][:, -1])

    x = torch.randn(8, 4, 6)
    for given in ((x, 2.0), {"x": x, "scale": 2.0}):
        small = dampr.prune_once(Net(), [(given, torch.zeros(8, dtype=torch.int64))], F.cross_entropy, params=0.5)
        assert type(small.rnn) is nn.LSTM
        assert small.rnn.hidden_size < 16


@pytest.mark.parametrize(
    ("arguments", "how", "error", "match"),
    [
        (("model",), {}, TypeError, "model='model': expected a torch.nn.Module"),
        ((mlp(),), {"criterion": "l7"}, ValueError, "criterion='l7': expected one of"),
        ((mlp(), BATCHES, F.cross_entropy), {"rounds": 0}, ValueError, "rounds=0: expected an integer of at least 1"),
        ((mlp(), BATCHES), {}, ValueError, "expected at least one batch and a function, with criterion='taylor'"),
        ((mlp(), [], F.cross_entropy), {}, ValueError, "batches of 0"),
        ((mlp(), [X], F.cross_entropy), {}, TypeError, "batches: expected pairs"),
        ((mlp(), BATCHES, F.cross_entropy), {"macs": None}, ValueError, "expected exactly one"),
        ((mlp(), BATCHES, F.cross_entropy), {"macs": 1e-9}, dampr.BudgetError, "expected at least"),
        ((mlp(), BATCHES, lambda out, y: out.sum() * float("nan")), {}, ValueError, "loss: its gradient is not finite"),
        ((mlp(), BATCHES, nn.Sequential()), {}, TypeError, r"^loss=Sequential\(\): expected a function of"),
        ((mlp(), BATCHES, lambda out, y: 0.5), {}, TypeError, "^loss=.*: expected one number with .* gives 0.5"),
        ((mlp(), BATCHES, lambda out, y: out), {}, TypeError, "^loss=.*: expected one number with a gradient"),
    ],
)
def test_bad_arguments(arguments, how, error, match):
    with pytest.raises(error, match=match):
        dampr.prune_once(*arguments, **({"macs": 0.5} | how))


def test_a_loss_that_says_nothing_of_any_unit_is_refused():
    with pytest.raises(ValueError, match="loss: its gradient is 0 at every gate"):
        dampr.prune_once(mlp(), BATCHES, lambda out, y: (0 * out).sum(), macs=0.5)
    with pytest.raises(TypeError, match="convert='head': expected a dict"):
        dampr.prune_once(mlp(), BATCHES, F.cross_entropy, macs=0.5, convert="head")
