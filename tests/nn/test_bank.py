"""All gates of a model at once: the numbers of one vector, one launch each way, and layers that do not notice."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dampr
from tests.models import ALL


class Given(dampr.gates.Gate):
    """Gates with values from outside."""

    def __init__(self, z):
        super().__init__(len(z))
        self.z = z

    def forward(self, rows=None):
        return self.z

    def open_probability(self):
        return self.z


def gated(name="resnet18", **how):
    torch.manual_seed(0)
    model, x = ALL[name]()
    dampr.convert(model, example_inputs=x, **how)
    for gate in dampr.prune.distinct_gates(model).values():
        gate.log_alpha.data.normal_(0, 2)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train(), x


def layer_by_layer(model, x, seed, lam):
    """Loss, and gradients of gates and weights, of layers that are handed parts of one vector."""
    gates = dampr.prune.distinct_gates(model)
    log_alpha = torch.cat([gate.log_alpha.detach() for gate in gates.values()]).requires_grad_()
    penalty = lam * dampr.penalty(model)
    penalty.backward()
    of_penalty = torch.cat([gate.log_alpha.grad for gate in gates.values()])
    z = dampr.functional.sample_gates(log_alpha, seed=seed)
    parts = z.split([gate.num_gates for gate in gates.values()])
    dampr.prune.inputs.replace(model, {gate: Given(part) for gate, part in zip(gates.values(), parts, strict=True)})
    loss = model(x).square().mean()
    loss.backward()
    return (
        z,
        (loss + penalty).detach(),
        log_alpha.grad + of_penalty,
        [p.grad for p in model.parameters() if p.grad is not None],
    )


@pytest.mark.parametrize("name", ["mlp", "resnet18", "mobilenet_v3", "vit", "shufflenet"])
def test_a_bank_is_one_vector_of_gates_with_one_seed(name):
    model, x = gated(name)
    twin = copy.deepcopy(model)
    bank = dampr.GateBank(model)
    torch.manual_seed(7)
    with bank.draw():
        drawn = torch.cat([gate() for gate in bank.gates]).detach()
        loss = model(x).square().mean() + bank.penalty(1e-3)
    loss.backward()
    torch.manual_seed(7)
    z, expected, of_gates, of_weights = layer_by_layer(twin, x, dampr.philox.draw_seed(None), 1e-3)
    assert torch.equal(drawn, z)
    torch.testing.assert_close(loss.detach(), expected)
    torch.testing.assert_close(torch.cat([gate.log_alpha.grad for gate in bank.gates]), of_gates, rtol=1e-4, atol=1e-6)
    found = [p.grad for name, p in model.named_parameters() if "log_alpha" not in name and p.grad is not None]
    for a, b in zip(found, of_weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_every_block_draws_anew_and_outside_of_it_layers_draw_as_always():
    model, x = gated("mlp")
    bank = dampr.GateBank(model)
    outputs = []
    for _ in range(2):
        with bank.draw():
            outputs += [model(x), model(x)]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    evaluated = model.eval()(x)
    with bank.draw():
        assert torch.equal(model(x), evaluated)


def test_optimizers_state_dicts_and_moves_do_not_notice():
    model, x = gated("mlp")
    state = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    bank = dampr.GateBank(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for _ in range(3):
        optimizer.zero_grad()
        with bank.draw():
            (model(x).square().mean() + bank.penalty(1e-2)).backward()
        optimizer.step()
    moved = model[0].gate.log_alpha.detach().clone()
    assert not torch.equal(moved, state["0.gate.log_alpha"])
    with torch.no_grad():
        model[0].gate.log_alpha.fill_(-30)
    with bank.draw():
        assert not model[0].gate().any()
    model.load_state_dict(state, assign=True)
    model.double().float()
    with bank.draw():
        assert torch.equal(torch.cat([gate.log_alpha for gate in bank.gates]), bank._groups[0]._flat)
        assert model[0].gate().any()
    model[0].gate.log_alpha.grad = None
    with bank.draw():
        model(x).sum().backward()
    assert model[0].gate.log_alpha.grad is not None


def test_second_derivatives_are_those_of_the_layers():
    model, x = gated("mlp")
    bank, twin = dampr.GateBank(model.double()), copy.deepcopy(model)
    x = x.double()
    torch.manual_seed(1)
    with bank.draw():
        loss = model(x).pow(3).sum() + bank.penalty(0.1)
        parameters = [gate.log_alpha for gate in bank.gates]
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        second = torch.autograd.grad(sum(g.sum() for g in first), parameters)
    torch.manual_seed(1)
    seed = dampr.philox.draw_seed(None)
    gates = dampr.prune.distinct_gates(twin)
    log_alpha = torch.cat([gate.log_alpha.detach() for gate in gates.values()]).requires_grad_()
    z = dampr.functional.sample_gates(log_alpha, seed=seed)
    probability = dampr.functional.open_probability(log_alpha)
    cost = bank._groups[0]._cost
    parts = z.split([gate.num_gates for gate in gates.values()])
    dampr.prune.inputs.replace(twin, {gate: Given(part) for gate, part in zip(gates.values(), parts, strict=True)})
    loss = twin(x).pow(3).sum() + 0.1 * (probability * cost).sum()
    (expected,) = torch.autograd.grad(loss, log_alpha, create_graph=True)
    torch.testing.assert_close(torch.cat(first), expected)
    (expected,) = torch.autograd.grad(expected.sum(), log_alpha)
    torch.testing.assert_close(torch.cat(second), expected)


def test_other_families_and_draws_for_each_sample_stay_with_their_layers():
    torch.manual_seed(0)
    model = nn.Sequential(
        dampr.nn.GatedLinear(6, 8),
        dampr.nn.GatedLinear(8, 8, gate="dam"),
        dampr.nn.GatedLinear(8, 8, per_sample=True),
        nn.Linear(8, 2),
    )
    bank = dampr.GateBank(model)
    assert bank.gates == [model[0].gate]
    with bank.draw():
        torch.testing.assert_close(bank.penalty(2.0), 2 * dampr.penalty(model))
        model(torch.randn(4, 6)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_what_cannot_work_is_refused():
    with pytest.raises(TypeError, match="model=3: expected"):
        dampr.GateBank(3)
    with pytest.raises(ValueError, match="model=Linear: it has no hard concrete gates that are drawn once per call"):
        dampr.GateBank(nn.Linear(2, 2))
    bank = dampr.GateBank(gated("mlp")[0])
    with pytest.raises(RuntimeError, match=r"penalty\(\) outside of draw\(\)"):
        bank.penalty()
    with bank.draw(), pytest.raises(RuntimeError, match=r"draw\(\) inside of draw\(\)"), bank.draw():
        pass
    assert all(gate._banked is None for gate in bank.gates)


@pytest.mark.parametrize("change", ["added", "gone", "owned"])
def test_a_bank_of_other_gates_than_the_model_has_is_refused(change):
    x = torch.randn(4, 6)
    model = dampr.convert(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)), example_inputs=x)
    bank = dampr.GateBank(model)
    if change == "added":
        model.append(dampr.nn.GatedLinear(6, 2))
    elif change == "gone":
        model[0] = nn.Linear(6, 8)
    else:
        dampr.Budget(model, x, macs=0.5, steps=20)
    with pytest.raises(RuntimeError, match="the model's gates are others than when this bank was made"), bank.draw():
        pass
