"""The reconstructed DiffPrune against its golden numbers, and how closed gates open again."""

import numpy as np
import pytest
import torch

from dampr import gates, reference
from dampr.spec import ramp

PRECISIONS = [(torch.float64, 1e-12), (torch.float32, 2e-6)]


@pytest.fixture
def diffprune(golden):
    return golden["diffprune_reconstruction"]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_golden_group_penalty(diffprune, cpu_backend, dtype, tolerance):
    case = diffprune["group_penalty_case"]
    gate = gates.DiffPrune(3).to(dtype)
    with torch.no_grad():
        gate.phi.copy_(torch.tensor(case["phi"], dtype=torch.float64))
    size = torch.tensor(case["group_size"], dtype=dtype)
    total = case["lam"] * (gate.open_probability() * size).sum()
    total.backward()
    np.testing.assert_allclose(total.item(), case["penalty_sum"], rtol=tolerance)
    np.testing.assert_allclose(total.item() / case["total_params"], case["penalty_mean"], rtol=tolerance)
    np.testing.assert_allclose(gate.phi.grad, case["grad_phi_sum"], rtol=tolerance)
    assert (gate.is_open() * size).sum().item() == case["hard_l0"]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_golden_noise(diffprune, cpu_backend, monkeypatch, dtype, tolerance):
    """Stochastic gates are h(mu + sigma xi); xi is fixed here in the place where dampr draws it."""
    case = diffprune["noise_case"]
    gate = gates.DiffPrune(3, stochastic=True, init_sigma=case["sigma"]).to(dtype)
    with torch.no_grad():
        gate.phi.copy_(torch.tensor(case["mu"], dtype=torch.float64))
        gate.log_sigma.fill_(np.log(case["sigma"]))
    monkeypatch.setattr(torch.special, "ndtri", lambda u: torch.tensor(case["xi"], dtype=u.dtype))
    x, seed, spec = gate.call()
    assert seed is None
    assert spec == ramp("tanh", 5.0)
    np.testing.assert_allclose(x.detach(), case["x"], rtol=tolerance, atol=1e-8 if dtype == torch.float32 else 1e-15)
    np.testing.assert_allclose(gate().detach(), case["z"], rtol=5 * tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_golden_gaussian_open_probability(diffprune, dtype, tolerance):
    rows = diffprune["gaussian_open_probability"]
    gate = gates.DiffPrune(len(rows), stochastic=True).to(dtype)
    sigma = torch.tensor([row["sigma"] for row in rows], dtype=torch.float64)
    with torch.no_grad():
        gate.phi.copy_(torch.tensor([row["mu"] for row in rows], dtype=torch.float64))
        gate.log_sigma.copy_(sigma.log())
    pi = gate.open_probability()
    pi.sum().backward()
    np.testing.assert_allclose(pi.detach(), [row["p_open"] for row in rows], rtol=tolerance)
    np.testing.assert_allclose(gate.phi.grad, [row["dp_dmu"] for row in rows], rtol=5 * tolerance)
    by_sigma = [row["dp_dsigma"] for row in rows]
    np.testing.assert_allclose(gate.log_sigma.grad / sigma, by_sigma, rtol=5 * tolerance, atol=1e-12)


def test_noise_is_standard_normal_opens_as_often_as_promised_and_obeys_the_seed():
    gate = gates.DiffPrune(2, stochastic=True, init_phi=0.05, init_sigma=0.1)
    n = 200_000
    torch.manual_seed(5)
    open_ = (gate(n) != 0).double().mean(0)
    p = gate.open_probability().detach().double()
    assert ((open_ - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()
    xi = ((gate._drawn(n) - gate.phi) / gate.log_sigma.exp()).detach().double()
    assert abs(xi.mean()) < 5 / (2 * n) ** 0.5
    assert abs(xi.std() - 1) < 5 / (4 * n) ** 0.5
    torch.manual_seed(6)
    first = gate()
    assert not torch.equal(first, gate())
    torch.manual_seed(6)
    assert torch.equal(first, gate())


def closed(**options):
    gate = gates.DiffPrune(64, init_phi=-0.05, **options)
    z = gate()
    z.sum().backward()
    return gate, z.detach()


def test_a_closed_deterministic_gate_has_no_gradient():
    gate, z = closed()
    assert not z.any()
    assert not gate.phi.grad.any()
    gate.phi.grad = None
    gate.open_probability().sum().backward()
    assert not gate.phi.grad.any()


@pytest.mark.parametrize("options", [{"revive": "noise"}, {"stochastic": True}], ids=str)
def test_noise_revives(options):
    gate, z = closed(**options)
    opened = z != 0
    assert opened.any()
    assert not opened.all()
    assert torch.equal(gate.phi.grad != 0, opened)
    assert not gate.eval()().any(), "evaluation is without noise"


def test_a_straight_through_slope_revives_and_changes_no_value():
    gate, z = closed(revive="straight_through")
    assert not z.any()
    torch.testing.assert_close(gate.phi.grad, torch.full((64,), 0.1 * 5.0))
    with torch.no_grad():
        gate.phi.copy_(torch.linspace(-1, 1, 64))
    gate.phi.grad = None
    z = gate()
    z.sum().backward()
    assert torch.equal(z, gate.deterministic())
    slope = reference.gate_derivative(gate.phi.detach(), ramp("tanh", 5.0))
    torch.testing.assert_close(gate.phi.grad, torch.where(gate.phi > 0, slope, 0.5))


def test_the_toy_keeps_at_least_the_dimension(toy):
    gate = toy(
        gates.DiffPrune(50, shape="B"), lambda gate: 1e-3 * gate.open_probability().sum(), 10, seed=0, samples=2000
    )
    assert 10 <= int(gate.is_open().sum()) <= 14


@pytest.mark.parametrize("options", [{"stochastic": True}, {"revive": "noise"}], ids=str)
def test_a_draw_per_sample_is_refused_where_noise_is_one_draw_per_call(options) -> None:
    import dampr.nn

    gate = gates.DiffPrune(4, **options)
    for layer, arguments in (
        (dampr.nn.GatedLinear, (3, 4)),
        (dampr.nn.GatedConv2d, (3, 4, 1)),
        (dampr.nn.GatedBatchNorm2d, (4,)),
    ):
        with pytest.raises(ValueError, match="per_sample=True with DiffPrune.*expected False"):
            layer(*arguments, gate=gate, per_sample=True)
        layer(*arguments, gate=gates.DiffPrune(4), per_sample=True)
