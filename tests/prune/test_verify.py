"""verify_model: gates that work pass, and each way of not working is found and named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dampr
from dampr.nn import GatedGRU, GatedLinear, GatedResidual
from tests import models

X = torch.randn(16, 10, generator=torch.Generator().manual_seed(0))


def mlp(gate="hard_concrete"):
    return dampr.convert(
        nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)),
        gate=gate,
        example_inputs=X,
    )


def problems(model, x=X, **kwargs):
    return {row.name: row.problems for row in dampr.verify_model(model, x, **kwargs).layers if row.problems}


@pytest.mark.parametrize("gate", ["hard_concrete", "dep_l0", "dam", "diffprune", "diffmask"])
def test_every_family_passes(gate):
    model = mlp(gate)
    optimizer = torch.optim.AdamW(dampr.param_groups(model, lr=1e-3, weight_decay=0.1))
    found = dampr.verify_model(model, X, optimizer=optimizer)
    assert found.ok, str(found)
    assert [(row.gates, row.tried, row.unreachable, row.without_gradient) for row in found.layers] == [
        (12, 12, [], []),
        (8, 8, [], []),
    ]
    assert str(found).endswith("ok")
    assert found.as_dict()["layers"][0]["name"] == "0"


@pytest.mark.parametrize("name", models.ALL)
def test_converted_networks_pass(name):
    model, x = models.ALL[name]()
    found = dampr.verify_model(dampr.convert(model, example_inputs=x), x, gates_per_layer=4)
    assert found.ok, str(found)
    assert all(row.tried <= 4 for row in found.layers)


def test_recurrent_layers_and_branches_pass():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.branch, self.head = GatedGRU(10, 6), GatedResidual(nn.Linear(6, 6)), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.branch(self.gru(x)[0]))

    assert dampr.verify_model(Net(), X).ok


def test_the_model_is_left_as_it_was():
    model = mlp().train()
    model[2].eval()
    model[0].gate.log_alpha.data[:3] = -9
    state, modes = {k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()]
    rng = torch.get_rng_state()
    dampr.verify_model(model, X)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


def test_gates_that_are_closed_already_are_tried_open():
    model = mlp()
    model[0].gate.log_alpha.data[:3] = -9
    assert dampr.verify_model(model, X).layers[0].unreachable == []


def test_a_dead_unit_is_named_and_is_no_problem():
    model = nn.Sequential(GatedLinear(10, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        model[0].weight[4], model[0].bias[4] = 0, -1
    found = dampr.verify_model(model, X)
    assert found.ok
    assert (found.layers[0].unreachable, found.layers[0].without_gradient) == ([4], [4])


def test_a_layer_that_is_bypassed_is_found():
    class Bypass(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.read, self.unused = GatedLinear(10, 4), GatedLinear(4, 4), GatedLinear(4, 4)

        def forward(self, x):
            return nn.functional.linear(self.used(x), self.read.weight)

    assert problems(Bypass()) == {
        name: [
            "log_alpha gets no gradient in training",
            "closing all its gates changes nothing: the model does not use this layer, or not its gates",
        ]
        for name in ("read", "unused")
    }


def test_the_optimizer_is_looked_at():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    expected = ["log_alpha is under weight decay 0.01, expected 0 (dampr.param_groups)"]
    assert problems(model, optimizer=optimizer) == {"0": expected, "2": expected}
    only = torch.optim.Adam([p for n, p in model.named_parameters() if "gate" not in n])
    assert problems(model, optimizer=only)["0"] == ["log_alpha is not in the optimizer"]
    model[2].gate.log_alpha.requires_grad_(False)
    assert problems(model)["2"] == ["log_alpha is frozen"]
    decayed = mlp(lambda n, device: dampr.gates.DiscriminativeMask(n, weight_decay_on_beta=True, device=device))
    optimizer = torch.optim.SGD(dampr.param_groups(decayed, lr=0.1, weight_decay=1e-3))
    assert problems(decayed, optimizer=optimizer) == {}


def test_half_precision_gates_are_found():
    model = mlp()
    model[0].gate.log_alpha.data = model[0].gate.log_alpha.data.bfloat16()
    assert problems(model)["0"] == [
        "log_alpha is torch.bfloat16, expected torch.float32: steps of half precision are too coarse for it"
    ]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"example_inputs": 3}, TypeError, "example_inputs=3"),
        ({"example_inputs": X, "gates_per_layer": 0}, ValueError, "gates_per_layer=0"),
        ({"example_inputs": X, "optimizer": 0.1}, TypeError, "optimizer=0.1"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        dampr.verify_model(mlp(), **arguments)
    with pytest.raises(ValueError, match="expected gated layers"):
        dampr.verify_model(nn.Linear(10, 2), X)
