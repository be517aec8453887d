"""DAM against its golden numbers, and the published claim that it finds the dimension of linear data."""

import copy
import functools

import numpy as np
import pytest
import torch

import dampr
from dampr import gates
from tests.long import long_if

PRECISIONS = [(torch.float64, 1e-12), (torch.float32, 2e-6)]


@pytest.fixture
def dam(golden):
    return golden["dam"]


def made(case, dtype, **options):
    gate = gates.DiscriminativeMask(case["n"], k=case.get("k", 5.0), alpha=case.get("alpha", 1.0), **options).to(dtype)
    with torch.no_grad():
        gate.beta.fill_(case["beta"])
    return gate


def close(actual, expected, tolerance):
    np.testing.assert_allclose(actual.detach().double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_golden_gates_counts_and_gradients(dam, cpu_backend, dtype, tolerance):
    for case in dam["gates"]:
        gate = made(case, dtype, order=("zero", "one")[case["first_index"]])
        z = gate()
        close(z, case["gate"], tolerance)
        if "dgate_dbeta" in case:
            slopes = [torch.autograd.grad(z[j], gate.beta, retain_graph=True)[0].item() for j in range(case["n"])]
            np.testing.assert_allclose(slopes, case["dgate_dbeta"], rtol=tolerance, atol=tolerance)
        if "active" in case:
            assert int(gate.is_open().sum()) == case["active"]
            assert gate.open_slice() == (case["n"] - case["active"], case["n"])
        assert torch.equal(gate.is_open(), z != 0)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_golden_gates_counted_from_one(dam, cpu_backend, dtype, tolerance):
    for case in dam["paper_index_from_1"]:
        gate = made(case, dtype, order=("zero", "one")[case["first_index"]])
        close(gate(), case["gate"], tolerance)
        assert int(gate.is_open().sum()) == case["active"]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("shape", ["linear", "piecewise_linear"])
def test_golden_linear_shapes(dam, cpu_backend, shape, dtype, tolerance):
    case = dam[f"{shape}_gate"]
    close(made(case, dtype, shape=shape)(), case["gate"], tolerance)
    assert gates.DiscriminativeMask(4, shape=shape).beta.item() == pytest.approx(0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_golden_counts_of_wide_layers(dam, dtype):
    for case in dam["active_count_table"]:
        assert int(made(case, dtype).is_open().sum()) == case["active"], case


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_golden_penalty(dam, dtype, tolerance):
    case = dam["penalty"]
    layers = [made({"n": 4, "beta": beta}, dtype) for beta in case["betas"]]
    total = gates.dam_penalty(layers, case["lam"])
    close(total, case["value"], tolerance)
    total.backward()
    for layer, beta, expected in zip(layers, case["betas"], case["grad_wrt_beta"], strict=True):
        if beta != -5.0:  # frameworks differ at the bound
            close(layer.beta.grad, [expected], tolerance)
    close(total / case["lam"], case["clamped_mean"], tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_golden_layer_backward(dam, cpu_backend, dtype, tolerance):
    case = dam["layer_case"]
    gate = made(case, dtype)
    h = torch.tensor(case["h"], dtype=dtype, requires_grad=True)
    parameter, seed, spec = gate.call()
    out = dampr.functional.gate_activations(h, parameter, dim=1, seed=seed, spec=spec)
    close(gate(), case["gate"], tolerance)
    close(out, case["out"], tolerance)
    dz = torch.autograd.grad((gate() * h).sum(), h)[0]
    close(dz[0], case["gate"], tolerance)
    out.backward(torch.tensor(case["dL_dout"], dtype=dtype))
    close(h.grad, case["dL_dh"], tolerance)
    close((torch.tensor(case["dL_dout"], dtype=dtype) * h).sum(0), case["dL_dgate"], tolerance)
    close(gate.beta.grad, [case["dL_dbeta_data"]], tolerance)
    gates.dam_penalty([gate] * case["n_dam_layers"], case["lam"]).backward()
    close(gate.beta.grad, [case["dL_dbeta_total"]], tolerance)


def test_golden_beta_under_the_penalty_and_weight_decay(dam):
    case = dam["beta_under_penalty_only"]
    gate = gates.DiscriminativeMask(16).double()
    assert not gate.weight_decay_on_beta
    optimizer = torch.optim.SGD(gate.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    others = [copy.deepcopy(gate) for _ in range(case["n_dam_layers"] - 1)]
    trace = []
    for _ in range(352):
        optimizer.zero_grad()
        gates.dam_penalty([gate, *others], case["lam"]).backward()
        optimizer.step()
        trace.append(gate.beta.item())
    np.testing.assert_allclose(trace[:10], case["first_10"], rtol=1e-12)
    assert trace[-1] == pytest.approx(case["after_352"], rel=1e-12)
    for n, fraction in case["active_fraction_at_fixed_point"].items():
        at_rest = made({"n": int(n), "beta": case["fixed_point"]}, torch.float64)
        assert int(at_rest.is_open().sum()) / int(n) == fraction


def test_golden_steps_to_the_first_closed_gate(dam):
    for lr, key in ((1e-2, "lr_0_01_n50"), (1e-3, "lr_0_001_n50")):
        gate, case, closings = gates.DiscriminativeMask(50).double(), dam["steps_to_first_prune_adam"][key], []
        optimizer = torch.optim.Adam(gate.parameters(), lr=lr)
        for step in range(int(case["first"] + 2.5 * case["every"])):
            optimizer.zero_grad()
            gates.dam_penalty([gate], 0.1).backward()
            optimizer.step()
            if 50 - int(gate.is_open().sum()) > len(closings):
                closings.append(step + 1)
        assert closings == pytest.approx(
            [case["first"], case["first"] + case["every"], case["first"] + 2 * case["every"]], abs=1.5
        )


@pytest.mark.parametrize("where", ["out_gate_0", "out_gate_0_5", "out_gate_1"])
def test_golden_norm_after_a_gate_hides_it(dam, where):
    """Why gates belong after the norm: an open one is divided out again, a closed channel is a constant."""
    case = dam["bn_after_gate"]
    norm = torch.nn.BatchNorm1d(1, eps=case["eps"]).double()
    with torch.no_grad():
        norm.weight.fill_(case["bn_weight"])
        norm.bias.fill_(case["bn_bias"])
    z = torch.tensor(float(where.removeprefix("out_gate_").replace("_", ".")), dtype=torch.float64)
    np.testing.assert_allclose(
        norm(z * torch.tensor(case["x"], dtype=torch.float64)[:, None])[:, 0].detach(), case[where], atol=1e-12
    )


def test_surrogate_count_is_the_line_that_the_penalty_follows():
    gate = gates.DiscriminativeMask(20).double()
    for beta, count, slope in ((1.0, 20, 4), (0.0, 20, 4), (-1.0, 16, 4), (-4.9, 0.4, 4), (-5.5, 0, 0)):
        with torch.no_grad():
            gate.beta.fill_(beta)
        total = gate.open_probability().sum()
        assert total.item() == pytest.approx(count, abs=1e-12)
        assert torch.autograd.grad(total, gate.beta)[0].item() == pytest.approx(slope)
        assert abs(total - int(gate.is_open().sum())) <= 1


@pytest.mark.parametrize("order", ["zero", "one"])
@pytest.mark.parametrize("min_open", [1, 3, 8])
def test_min_open_keeps_the_last_gates_and_the_gradient(order, min_open):
    gate = gates.DiscriminativeMask(8, order=order, min_open=min_open)
    for beta in (-3.0, -5.0, -50.0):
        with torch.no_grad():
            gate.beta.fill_(beta)
        start, stop = gate.open_slice()
        assert stop == 8
        assert stop - start >= min_open
        assert torch.autograd.grad(gate().sum(), gate.beta)[0] > 0
    assert gate.open_slice() == (8 - min_open, 8)


def test_a_frozen_beta_does_not_learn():
    gate = gates.DiscriminativeMask(8, frozen=True)
    layer = dampr.nn.GatedLinear(4, 8, gate=gate)
    layer(torch.randn(3, 4)).sum().backward()
    assert gate.frozen
    assert gate.beta.grad is None
    gate.frozen = False
    layer(torch.randn(3, 4)).sum().backward()
    assert gate.beta.grad is not None


@pytest.mark.parametrize("decayed", [False, True])
def test_a_cold_start_holds_beta_and_its_optimizer_takes_it_up_afterwards(decayed):
    """Published: beta does not learn in the first 20 of 200 epochs, and is decayed after them.

    The optimizer is made before the start.
    """
    cold = functools.partial(gates.DiscriminativeMask, frozen=True, weight_decay_on_beta=decayed)
    model, x = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)), torch.randn(16, 6)
    dampr.convert(model, gate=cold, example_inputs=x)
    optimizer = torch.optim.SGD(dampr.param_groups(model, lr=0.1, gate_lr=0.5, weight_decay=0.1), momentum=0.9)
    gate, first = model[0].gate, model[0].weight.detach().clone()
    for epoch in range(6):
        if epoch == 3:
            assert gate.beta.item() == 1.0
            gate.frozen = False
        loss = 0 * model(x).sum() + gates.dam_penalty([gate], 0.0)
        optimizer.zero_grad()
        (loss if epoch < 3 else loss + gates.dam_penalty([gate], 0.2)).backward()
        optimizer.step()
    assert not torch.equal(model[0].weight, first)
    assert gate.beta.item() < 1.0
    plain = torch.optim.SGD(
        [beta := torch.nn.Parameter(torch.ones(1))], lr=0.5, momentum=0.9, weight_decay=0.1 if decayed else 0.0
    )
    for _ in range(3):
        beta.grad = torch.full((1,), 0.2)
        plain.step()
    assert gate.beta.item() == pytest.approx(beta.item(), rel=1e-6)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))])
@pytest.mark.parametrize("latent", [long_if(latent, 5, 10) for latent in (5, 10, 20)])
def test_linear_dimensionality_reduction_finds_the_dimension(golden, toy, latent, seed):
    gate = toy(gates.DiscriminativeMask(50), lambda gate: gates.dam_penalty([gate], 0.01), latent, seed)
    assert int(gate.is_open().sum()) == latent
    assert -5 * (50 - latent) / 50 < gate.beta.item() <= -5 * (49 - latent) / 50
    (measured,) = (run for run in golden["measured_linear_autoencoder"]["dam"]["runs"] if run["k"] == latent)
    assert int(gate.is_open().sum()) == measured["active_at_2000"][seed]
    assert gate.beta.item() == pytest.approx(sum(measured["beta"]) / 3, abs=0.01)


@pytest.mark.parametrize(("floor", "expected"), [(-5.0, -3.5), (-float("inf"), -4.5), (-2, -2.0), (0, 0.0)])
def test_the_floor_of_the_penalty_may_be_none(floor, expected):
    gate, other = gates.DiscriminativeMask(8), gates.DiscriminativeMask(8)
    with torch.no_grad():
        gate.beta.fill_(-7)
        other.beta.fill_(-2)
    assert float(gates.dam_penalty([gate, other], 1.0, floor=floor).detach()) == expected


@pytest.mark.parametrize("floor", [float("nan"), float("inf"), "none", None])
def test_a_floor_that_is_no_number_is_refused(floor):
    with pytest.raises(ValueError, match="floor="):
        gates.dam_penalty([gates.DiscriminativeMask(8)], 1.0, floor=floor)
