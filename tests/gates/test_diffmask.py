"""The reconstructed differentiable mask: SignSwish and foothill against golden numbers, slopes,
and why the surrogate is needed.
"""

import itertools
import math

import pytest
import torch

import dampr
from dampr import gates, reference, spec
from tests.long import long_if

PRECISIONS = [(torch.float64, 1e-12), (torch.float32, 2e-6)]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("name", ["signswish", "foothill"])
def test_golden_functions(golden, name, dtype, tolerance):
    for row in golden["dmp_reconstruction"][name]:
        x = torch.tensor(row["x"], dtype=dtype, requires_grad=True)
        y = reference.sign_swish(x, row["beta"]) if name == "signswish" else gates.foothill(x, row["a"], row["beta"])
        (slope,) = torch.autograd.grad(y, x)
        scale = max(row["beta"], 1.0)
        assert y.item() == pytest.approx(row["value"], rel=tolerance * scale, abs=tolerance)
        assert slope.item() == pytest.approx(row["derivative"], rel=10 * tolerance * scale, abs=tolerance * scale)


@pytest.mark.parametrize("variant", spec.VARIANTS)
@pytest.mark.parametrize("mode", ["scheduled", "trainable"])
def test_masks_computed_beside_the_kernels_are_the_same(cpu_backend, variant, mode):
    fixed, beside = (gates.DifferentiableMask(40, variant=variant, slope=7.0, slope_mode=m) for m in ("fixed", mode))
    for training in (True, False):
        made = []
        for gate in (fixed, beside):
            with torch.no_grad():
                gate.alpha.copy_(torch.linspace(-0.5, 0.5, 40))
            gate.train(training)
            z = gate()
            made.append((z, torch.autograd.grad(z.sum(), gate.alpha)[0]))
        torch.testing.assert_close(made[1][0], made[0][0])
        assert torch.equal(made[1][0] == 0, made[0][0] == 0)
        if training:
            torch.testing.assert_close(made[1][1], made[0][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["hard", "smooth", "exact_zero", "logistic"])
def test_a_trainable_slope_stays_positive_and_has_a_gradient(variant):
    gate = gates.DifferentiableMask(8, variant=variant, slope_mode="trainable", init_alpha=0.2)
    (gate() * torch.randn(8)).sum().backward()
    assert gate.log_slope.grad.item() != 0
    with torch.no_grad():
        gate.log_slope.fill_(-20.0)
    assert gate().isfinite().all()


@pytest.mark.parametrize("slope_mode", gates.differentiable_mask.SLOPES)
@pytest.mark.parametrize("variant", ["hard", "smooth", "exact_zero", "logistic"])
def test_a_trainable_threshold_gives_the_same_masks_and_learns(cpu_backend, variant, slope_mode):
    fixed, learned = (
        gates.DifferentiableMask(41, variant=variant, threshold=0.25, slope_mode=mode, threshold_mode=kind)
        for mode, kind in (("fixed", "fixed"), (slope_mode, "trainable"))
    )
    for training, shift in itertools.product((True, False), (1.0, 2.0)):
        with torch.no_grad():
            fixed = gates.DifferentiableMask(41, variant=variant, threshold=0.25 * shift)
            learned.log_threshold.fill_(math.log(0.25 * shift))
            for gate in (fixed, learned):
                gate.alpha.copy_(torch.linspace(-0.98, 1.0, 41))
        made = [gate.train(training)() for gate in (fixed, learned)]
        torch.testing.assert_close(*made)
        assert torch.equal(made[0] == 0, made[1] == 0)
        assert torch.equal(fixed.is_open(), learned.is_open())
        assert torch.equal(fixed.is_open(), learned.deterministic() != 0)
    made[1].sum().backward()
    assert learned.alpha.grad.isfinite().all()


@pytest.mark.parametrize("b", [2, 5, 10, 50])
def test_golden_derivatives_by_threshold_and_slope(golden, b):
    case = golden["dmp_reconstruction"][f"M1_signswish_beta{b}_t0.1"]
    gate = gates.DifferentiableMask(
        len(case["alpha"]), variant="smooth", slope=b, slope_mode="trainable", threshold_mode="trainable"
    )
    gate.double()
    with torch.no_grad():
        gate.alpha.copy_(torch.tensor(case["alpha"], dtype=torch.float64))
        gate.log_slope.fill_(math.log(b))
        gate.log_threshold.fill_(math.log(0.1))
    for i, (alpha, by_t, by_b) in enumerate(zip(case["alpha"], case["dmask_dt"], case["dmask_dbeta"], strict=True)):
        (by_log_t,) = torch.autograd.grad(gate()[i], gate.log_threshold)
        assert by_log_t.item() == pytest.approx(0.1 * alpha * by_t, rel=1e-9, abs=1e-15)
        (by_log_b,) = torch.autograd.grad(gate()[i], gate.log_slope)
        # the golden one is a central difference
        assert by_log_b.item() == pytest.approx(b * alpha * by_b, abs=1e-9 * b * abs(alpha))


def test_a_threshold_that_is_paid_for_rises_and_closes_gates():
    torch.manual_seed(0)
    gate = gates.DifferentiableMask(20, threshold_mode="trainable")
    with torch.no_grad():
        gate.alpha.copy_(torch.linspace(0.05, 1.0, 20))
    gate.alpha.requires_grad_(False)
    optimizer, before = torch.optim.Adam([gate.log_threshold], lr=0.05), int(gate.is_open().sum())
    for _ in range(60):
        optimizer.zero_grad()
        (gate().sum() * 0.01 - gate.log_threshold.exp().sum()).backward()
        optimizer.step()
    assert gate.threshold.item() > 0.3
    assert int(gate.is_open().sum()) < before


def test_a_scheduled_slope_is_kept_in_the_checkpoint():
    one, other = (
        gates.DifferentiableMask(4, variant="smooth", slope_mode="scheduled", init_alpha=0.3) for _ in range(2)
    )
    before = one().detach().clone()
    one.set_slope(20.0)
    assert not torch.equal(one(), before)
    other.load_state_dict(one.state_dict())
    assert torch.equal(other(), one())
    with pytest.raises(ValueError, match=r"slope=-1\.0: expected"):
        one.set_slope(-1.0)


def test_a_slope_may_be_set_between_forward_and_backward():
    gates_ = [gates.DifferentiableMask(4, variant="smooth", slope_mode="scheduled", init_alpha=0.3) for _ in range(2)]
    values = [gate() for gate in gates_]
    gates_[0].set_slope(40.0)
    made = [torch.autograd.grad(z.sum(), gate.alpha)[0] for z, gate in zip(values, gates_, strict=True)]
    assert torch.equal(*made), "the gradient is that of the values"


def test_geometric_slope_goes_from_start_to_end():
    assert gates.geometric_slope(0, 100) == 1.0
    assert gates.geometric_slope(50, 100) == pytest.approx(math.sqrt(50))
    assert gates.geometric_slope(100, 100) == gates.geometric_slope(300, 100) == pytest.approx(50)


@pytest.mark.parametrize("variant", ["hard", "hard_constant", "smooth", "logistic"])
def test_fresh_evaluation_gates_are_exactly_one_and_masks_are_hard_in_evaluation(cpu_backend, variant):
    gate = gates.DifferentiableMask(5, variant=variant).eval()
    assert torch.equal(gate(), torch.ones(5))
    with torch.no_grad():
        gate.alpha.copy_(torch.tensor([-0.3, -0.05, 0.05, 0.1, 0.3]))
    assert torch.equal(gate(), torch.tensor([-0.3, 0, 0, 0, 0.3]))
    assert gate.is_open().tolist() == [True, False, False, False, True]


def test_penalties():
    one, other = gates.DifferentiableMask(2), gates.DifferentiableMask(1)
    with torch.no_grad():
        one.alpha.copy_(torch.tensor([-2.0, 0.5]))
    assert gates.scale_penalty([one, other], 0.1).item() == pytest.approx(0.35)
    expected = 0.1 * sum(2 * abs(a) * math.tanh(3 * abs(a) / 2) for a in (2.0, 0.5, 1.0))
    assert gates.scale_penalty([one, other], 0.1, "foothill", a=2.0, b=3.0).item() == pytest.approx(expected)
    assert gates.square_penalty([torch.tensor([3.0, 4.0]), torch.ones(2, 2).half()], 0.5).item() == pytest.approx(14.5)
    layer = dampr.nn.GatedLinear(3, 4, gate=gates.DifferentiableMask(4, slope_mode="trainable"))
    total = layer(torch.randn(2, 3)).sum() + gates.scale_penalty([layer.gate], 1e-2)
    (total + gates.square_penalty([layer.weight], 1e-4) + gates.square_penalty([layer.bias], 1e-5)).backward()
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("lam", [long_if(1e-2, 1e-2), 1e-3])
def test_the_surrogate_settles_at_the_dimension_and_without_it_the_network_dies(toy, lam, seed):
    for variant, expected in (("hard", (9, 11)), ("hard_constant", (0, 0))):
        gate = toy(
            gates.DifferentiableMask(50, variant=variant),
            lambda gate: gates.scale_penalty([gate], lam),
            10,
            seed,
            samples=2000,
        )
        assert expected[0] <= int(gate.is_open().sum()) <= expected[1], variant


@pytest.mark.parametrize(("lam", "opened"), [(1e-2, (0, 0)), (1e-3, (9, 13))])
def test_an_annealed_mask_settles_where_scales_outlast_the_flat_slope_and_dies_where_they_do_not(toy, lam, opened):
    """With b = 1 a smooth mask costs little wherever the scale is;
    a strong penalty has it under the threshold before b is large.
    """
    gate, steps = gates.DifferentiableMask(50, variant="smooth", slope=1.0, slope_mode="scheduled"), itertools.count(1)

    def penalty(gate):
        gate.set_slope(gates.geometric_slope(next(steps), 1500))
        return gates.scale_penalty([gate], lam)

    toy(gate, penalty, 10, 0, samples=2000)
    assert gate.slope.item() == pytest.approx(50.0)
    assert opened[0] <= int(gate.is_open().sum()) <= opened[1]


@pytest.mark.parametrize(("lam", "least"), [(1e-2, 8), (1e-3, 9)])
@pytest.mark.parametrize("how", ["foothill", long_if("trainable slope", "trainable slope")])
def test_foothill_and_a_trainable_slope_settle_at_the_dimension_too(toy, how, lam, least):
    """The strong penalty takes up to two directions that carry little: 8 to 10 are open over four seeds (AMD EPYC)."""
    gate = gates.DifferentiableMask(50, slope_mode="fixed" if how == "foothill" else "trainable")
    options = {"regulariser": "foothill", "b": 5.0} if how == "foothill" else {}
    toy(gate, lambda gate: gates.scale_penalty([gate], lam, **options), 10, 0, samples=2000)
    assert least <= int(gate.is_open().sum()) <= 11
