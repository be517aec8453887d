"""Hard concrete gates against the published equations and numbers (methods section 1)."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate
from torch.nn import functional as F

import dampr
from dampr import functional, gates, reference
from dampr.spec import hard_concrete

SPREAD = [-5.0, -2.5, -1.0, 0.0, 0.7, 2.0, 4.0]


@pytest.fixture
def l0(golden):
    return golden["l0_hc"]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-7)])
def test_golden_samples_and_derivatives(l0, dtype, tolerance):
    rows = l0["samples"]
    log_alpha = torch.tensor([r["log_alpha"] for r in rows], dtype=dtype, requires_grad=True)
    z = reference.gate(log_alpha, hard_concrete(), torch.tensor([r["u"] for r in rows], dtype=dtype))
    z.sum().backward()
    expected = torch.tensor([r["z"] for r in rows], dtype=torch.float64)
    assert torch.equal(z == 0, expected == 0)
    assert torch.equal(z == 1, expected == 1)
    assert (z - expected).abs().max() <= tolerance
    assert (
        log_alpha.grad - torch.tensor([r["dz_dlog_alpha"] for r in rows], dtype=torch.float64)
    ).abs().max() <= tolerance
    # s and s_bar, which the gate passes through, from their own equations
    s = torch.sigmoid(
        (torch.tensor([math.log(r["u"] / (1 - r["u"])) + r["log_alpha"] for r in rows], dtype=torch.float64)) * 1.5
    )
    assert torch.allclose(s, torch.tensor([r["s"] for r in rows], dtype=torch.float64), rtol=1e-9, atol=0)
    assert torch.allclose(s * 1.2 - 0.1, torch.tensor([r["s_bar"] for r in rows], dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-7)])
def test_golden_open_probability_and_evaluation_rules(l0, dtype, tolerance):
    rows = l0["penalty_and_eval"]

    def column(name):
        return torch.tensor([r[name] for r in rows], dtype=torch.float64)

    log_alpha = column("log_alpha").to(dtype).requires_grad_()
    pi = functional.open_probability(log_alpha)
    pi.sum().backward()
    assert (pi - column("p_nonzero")).abs().max() <= tolerance
    assert (1 - pi - column("p_zero")).abs().max() <= tolerance
    assert (log_alpha.grad - column("dp_nonzero_dlog_alpha")).abs().max() <= tolerance
    for preset, name in (("paper", "z_det"), ("median", "z_det_median_variant")):
        z = functional.sample_gates(log_alpha, spec=hard_concrete(preset))
        assert torch.equal(z == 0, column(name) == 0)
        assert (z - column(name)).abs().max() <= tolerance


@pytest.mark.parametrize("offset", [-1e-4, 1e-4])
def test_golden_noise_thresholds_separate_closed_from_open(l0, offset):
    for row in l0["penalty_and_eval"]:
        log_alpha = torch.tensor([row["log_alpha"]], dtype=torch.float64)
        for name, value in (("u_at_or_below_which_z_is_0", 0.0), ("u_at_or_above_which_z_is_1", 1.0)):
            u = row[name] * (1 + offset * (1 if value == 0 else (1 - row[name]) / row[name]))
            beyond = (offset < 0) == (value == 0)
            z = reference.gate(log_alpha, hard_concrete(), torch.tensor([u], dtype=torch.float64))
            assert (z.item() == value) == beyond, (row, name, u)


def test_golden_constants(l0):
    constants, paper, median = l0["constants"], hard_concrete("paper"), hard_concrete("median")
    assert (paper.gamma, paper.zeta, paper.beta) == (constants["gamma"], constants["zeta"], constants["beta"])
    assert paper.lo == pytest.approx(constants["det_gate_zero_iff_log_alpha_le"], abs=1e-12)
    assert paper.hi == pytest.approx(constants["det_gate_one_iff_log_alpha_ge"], abs=1e-12)
    assert median.lo == pytest.approx(constants["median_variant_zero_iff_log_alpha_le"], abs=1e-12)
    assert -math.log(paper.c0) == pytest.approx(constants["beta_log_minus_gamma_over_zeta"], abs=1e-12)


def _dense_case(l0, backend_dtype=torch.float64):
    case = l0["dense_case"]
    layer = dampr.nn.GatedLinear(3, 2, granularity="input", dtype=backend_dtype)
    layer.gate.to(backend_dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(case["W"], dtype=torch.float64).t())
        layer.bias.copy_(torch.tensor(case["bias"], dtype=torch.float64))
        layer.gate.log_alpha.copy_(torch.tensor(case["log_alpha"], dtype=torch.float64))
    return case, layer, torch.tensor(case["x"], dtype=backend_dtype)


def test_golden_dense_case_penalty_and_all_its_gradients(l0):
    case, layer, _ = _dense_case(l0)
    total = layer.penalty(lam=case["lam"], prior_precision=case["weight_decay"]) / case["N"]
    total.backward()
    assert total.item() == pytest.approx(case["reg_added_to_loss"], abs=1e-12)
    np.testing.assert_allclose(layer.weight.grad.t(), case["dreg_dW"], atol=1e-12)
    np.testing.assert_allclose(layer.bias.grad, case["dreg_dbias"], atol=1e-12)
    np.testing.assert_allclose(layer.gate.log_alpha.grad, case["dreg_dlog_alpha"], atol=1e-12)


def test_golden_dense_case_outputs(l0, cpu_backend):
    case, layer, x = _dense_case(l0)
    np.testing.assert_allclose(layer.eval()(x).detach(), case["eval_out"], atol=1e-12)
    np.testing.assert_allclose(layer.gate.deterministic().detach(), case["eval_z"], atol=1e-12)
    for noise, gate, out in (
        ("shared_u", "shared_z", "train_out_shared"),
        ("local_u", "local_z", "train_out_local_rep"),
    ):
        z = reference.gate(layer.gate.log_alpha, hard_concrete(), torch.tensor(case[noise], dtype=torch.float64))
        np.testing.assert_allclose(z.detach(), case[gate], atol=1e-12)
        np.testing.assert_allclose(F.linear(x * z, layer.weight, layer.bias).detach(), case[out], atol=1e-12)


def test_golden_dense_case_accounting(l0):
    """Expected L0 and FLOPs as the published code counts them: dense fan-out, bias ungated (methods 1.7)."""
    case, layer, _ = _dense_case(l0)
    opened = layer.gate.open_probability().sum().item()
    assert layer.penalty().item() + layer.out_features == pytest.approx(case["expected_l0"], abs=1e-10)
    assert (2 * opened - 1) * layer.out_features + layer.out_features == pytest.approx(
        case["expected_flops"], abs=1e-10
    )


def test_golden_conv_case_multiplies_the_bias_too(l0):
    """The corrected training output: z (conv + b); the published code drops the bias there."""
    case = l0["conv_case"]
    w, b, x = (torch.tensor(case[n], dtype=torch.float64) for n in ("W", "bias", "x_1x1x3x3"))
    x = x.view(1, 1, 3, 3)
    log_alpha = torch.tensor(case["log_alpha"], dtype=torch.float64)
    z = reference.gate(log_alpha, hard_concrete(), torch.tensor(case["u"], dtype=torch.float64))
    np.testing.assert_allclose(z, case["z"], atol=1e-12)
    np.testing.assert_allclose(F.conv2d(x, w)[0], case["conv_no_bias"], atol=1e-12)
    np.testing.assert_allclose((z[:, None, None] * F.conv2d(x, w, b)[0]), case["corrected_train_shared"], atol=1e-12)
    np.testing.assert_allclose(
        (z[:, None, None] * F.conv2d(x, w)[0]), case["reference_train_shared_bias_dropped"], atol=1e-12
    )
    z_hat = functional.sample_gates(log_alpha, spec=hard_concrete("paper"))
    np.testing.assert_allclose(z_hat, case["eval_z"], atol=1e-12)
    np.testing.assert_allclose((z_hat[:, None, None] * F.conv2d(x, w, b)[0]), case["eval_out"], atol=1e-12)
    squares = w.flatten(1).square().sum(1) + b.square()
    n, lam, rho = case["N"], case["lam"], case["weight_decay"]
    corrected = (
        functional.expected_l0(log_alpha, w[0].numel() + 1, lam=lam, group_sq_norm=squares, prior_precision=rho) / n
    )
    assert corrected.item() == pytest.approx(case["reg_corrected_bias_sign"], abs=1e-12)
    slipped = (
        functional.expected_l0(log_alpha, w[0].numel() - 1, lam=lam, group_sq_norm=squares, prior_precision=rho) / n
    )
    assert slipped.item() == pytest.approx(case["reg_reference_bias_sign"], abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_each_group_may_have_a_lambda_and_a_prior_precision_of_its_own(dtype):
    log_alpha, size, lam, norm, rho = (torch.rand(6, dtype=dtype) for _ in range(5))
    log_alpha.requires_grad_()
    made = functional.expected_l0(log_alpha, size, lam=lam, group_sq_norm=norm, prior_precision=rho)
    one_by_one = [
        functional.expected_l0(
            log_alpha[g : g + 1], s.item(), lam=a.item(), group_sq_norm=w.view(1), prior_precision=r.item()
        )
        for g, (s, a, w, r) in enumerate(zip(size, lam, norm, rho, strict=True))
    ]
    torch.testing.assert_close(made, torch.stack(one_by_one).sum())
    (slope,) = torch.autograd.grad(made, log_alpha)
    pi = functional.open_probability(log_alpha).detach()
    torch.testing.assert_close(slope, pi * (1 - pi) * (lam * size + rho / 2 * norm))


def test_golden_lenet5_accounting(l0):
    """Expected L0 and FLOPs of LeNet-5-Caffe with every log_alpha at 0,
    spatial sizes on the right axes (methods 1.7).
    """
    case = l0["lenet5_accounting_all_log_alpha_0"]
    layers = [(20, 25, 24 * 24, None), (50, 25 * 20, 8 * 8, None), (800, None, None, 500), (500, None, None, 10)]
    l0_counts, flops = [], []
    for gates_, fan_in, positions, fan_out in layers:
        pi = functional.open_probability(torch.zeros(gates_, dtype=torch.float64)).sum().item()
        if fan_out is None:
            l0_counts.append(functional.expected_l0(torch.zeros(gates_, dtype=torch.float64), fan_in + 1).item())
            flops.append(positions * (2 * fan_in - 1) * pi + positions * pi)
        else:
            l0_counts.append(functional.expected_l0(torch.zeros(gates_, dtype=torch.float64), fan_out).item() + fan_out)
            flops.append((2 * pi - 1) * fan_out + fan_out)
    np.testing.assert_allclose(l0_counts, case["per_layer_l0"], rtol=1e-12)
    np.testing.assert_allclose(flops, case["per_layer_flops"], rtol=1e-12)
    assert sum(l0_counts) == pytest.approx(case["l0"])
    assert sum(flops) == pytest.approx(case["flops"])


def test_golden_parameter_counts(l0):
    def mlp(*widths):
        return torch.nn.Sequential(*(torch.nn.Linear(a, b, device="meta") for a, b in itertools.pairwise(widths)))

    def lenet5(c1, c2, flat, hidden):
        conv = [torch.nn.Conv2d(1, c1, 5, device="meta"), torch.nn.Conv2d(c1, c2, 5, device="meta")]
        return torch.nn.Sequential(*conv, *mlp(flat, hidden, 10))

    counts = l0["param_counts"]
    count = dampr.prune.measure.count_params
    assert count(mlp(784, 300, 100, 10)) == counts["lenet300_dense"]
    assert count(lenet5(20, 50, 800, 500)) == counts["lenet5_dense"]
    assert count(mlp(266, 88, 33, 10)) == counts["mlp_266_88_33_weights_plus_bias"]
    assert count(mlp(219, 214, 100, 10)) == counts["mlp_219_214_100"]
    assert count(lenet5(9, 18, 65, 25)) == counts["lenet5_9_18_65_25"]
    assert count(lenet5(20, 25, 45, 462)) == counts["lenet5_20_25_45_462"]


@pytest.mark.parametrize("start", ["corrected_avg_starts_at_zero", "reference_avg_starts_at_init_param"])
def test_golden_polyak_average(l0, start):
    case = l0["ema_case"]
    average = gates.PolyakAverage(decay=case["beta"])
    parameter = torch.nn.Parameter(torch.tensor([case["init_param"]], dtype=torch.float64))
    # the published slip, reproduced by hand: the average starts at the initial parameter
    if start.startswith("reference"):
        average.update([parameter])
        average.averages[0].copy_(parameter.detach())
        average.steps = 0
    for row in case[start]:
        with torch.no_grad():
            parameter.fill_(row["param"])
        average.update([parameter])
        assert average.averages[0].item() == pytest.approx(row["avg"], abs=1e-12)
        with average.applied([parameter]):
            assert parameter.item() == pytest.approx(row["eval_param"], abs=1e-12)
        assert parameter.item() == row["param"]


def test_gradcheck_away_from_the_clip_corners(cpu_backend):
    log_alpha = torch.linspace(-1.5, 1.5, 24, dtype=torch.float64, requires_grad=True)
    seed = torch.tensor([4])
    z = functional.sample_gates(log_alpha, seed=seed)
    assert ((z > 0.02) & (z < 0.98)).sum() > 5, "the test needs gates inside"
    assert torch.autograd.gradcheck(lambda la: functional.sample_gates(la, seed=seed, rows=3), log_alpha, eps=1e-7)
    for rule in ("paper", "median", "binary"):
        assert torch.autograd.gradcheck(
            lambda la, rule=rule: functional.sample_gates(la, spec=hard_concrete(rule)), log_alpha, eps=1e-7
        )


@pytest.mark.parametrize("log_alpha", SPREAD)
@pytest.mark.parametrize("constants", [{}, {"beta": 0.5, "gamma": -0.3, "zeta": 1.2}])
def test_frequencies_and_mean_match_the_distribution_at_five_sigma(cpu_backend, log_alpha, constants):
    spec, n = hard_concrete(**constants), 400_000
    beta, gamma, zeta = spec.beta, spec.gamma, spec.zeta

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    def above(t):  # P(z > t)
        s = (t - gamma) / (zeta - gamma)
        return sigmoid(log_alpha - beta * math.log(s / (1 - s)))

    z = functional.sample_gates(torch.full((n,), log_alpha), seed=11, spec=spec).double()
    for observed, p in (((z == 0).double().mean(), 1 - above(0)), ((z == 1).double().mean(), above(1))):
        assert abs(observed - p) <= 5 * math.sqrt(p * (1 - p) / n) + 1e-7
    mean = integrate.quad(above, 0, 1)[0]
    second = integrate.quad(lambda t: 2 * t * above(t), 0, 1)[0]
    assert abs(z.mean() - mean) <= 5 * math.sqrt((second - mean**2) / n) + 1e-6
    pi = functional.open_probability(torch.tensor([log_alpha], dtype=torch.float64), spec=spec).item()
    assert pi == pytest.approx(above(0), abs=1e-12)


def test_symmetry_of_the_draw():
    log_alpha, u = torch.randn(1000, dtype=torch.float64), torch.rand(1000, dtype=torch.float64) * 0.98 + 0.01
    spec = hard_concrete()
    assert torch.allclose(
        reference.gate(log_alpha, spec, u) + reference.gate(-log_alpha, spec, 1 - u),
        torch.ones(1000, dtype=torch.float64),
        atol=3e-7,
    )


@pytest.mark.parametrize("value", [-100.0, 100.0, -80.0, 80.0, -1e30, 1e30, float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_log_alpha_gives_no_nan_and_saturates(cpu_backend, value, dtype):
    log_alpha = torch.full((257,), value, dtype=dtype, requires_grad=True)
    for spec in (
        hard_concrete(),
        hard_concrete("paper"),
        hard_concrete("median"),
        hard_concrete("binary"),
        hard_concrete(beta=0.3),
    ):
        log_alpha.grad = None
        z = functional.sample_gates(log_alpha, seed=3, rows=5 if spec.rule == 0 else None, spec=spec)
        z.sum().backward()
        assert torch.equal(z, torch.full_like(z, float(value > 0)))
        assert torch.equal(log_alpha.grad, torch.zeros_like(log_alpha))
    pi = functional.open_probability(log_alpha)
    pi.sum().backward()
    assert torch.allclose(pi, torch.full_like(pi, float(value > 0)), atol=1e-30)
    assert (log_alpha.grad.abs() < 1e-30).all()


def test_the_penalty_moves_a_gate_that_the_draw_clipped():
    gate = gates.HardConcrete(8, init_log_alpha=-3.0)
    assert (gate.deterministic() == 0).all()
    gate.open_probability().sum().backward()
    assert (gate.log_alpha.grad > 0).all()


@pytest.mark.parametrize("preset", gates.PRESETS)
@pytest.mark.parametrize("constants", [{}, {"zeta": 1.01}, {"beta": 1.5, "gamma": -0.5, "zeta": 1.5}])
def test_a_fresh_evaluation_gate_is_exactly_one_and_is_open_says_what_evaluation_does(preset, constants):
    gate = gates.HardConcrete(64, preset=preset, **constants).eval()
    assert torch.equal(gate(), torch.ones(64))
    with torch.no_grad():
        gate.log_alpha.copy_(torch.linspace(-6, 6, 64))
    assert torch.equal(gate.is_open(), gate() > 0)
    assert torch.equal(gate(), gate.deterministic())
    assert torch.equal(gate.train().deterministic(), gate.eval()())


def test_binary_preset_is_one_where_the_papers_gate_exceeds_one_half():
    log_alpha = torch.linspace(-4, 4, 801)
    paper, binary = (functional.sample_gates(log_alpha, spec=hard_concrete(rule)) for rule in ("paper", "binary"))
    clear = (paper - 0.5).abs() > 1e-6
    assert torch.equal(binary[clear], (paper > 0.5).float()[clear])


def test_a_binary_gate_at_one_half_is_closed(cpu_backend):
    """The paper's gate does not exceed one half at log_alpha = 0, and anything above is open."""
    log_alpha = torch.tensor([-1e-7, -0.0, 0.0, 1e-7])
    for wide in (log_alpha, log_alpha.double()):
        z = functional.sample_gates(wide, spec=hard_concrete("binary"))
        assert z.tolist() == [0, 0, 0, 1]
    gate = gates.HardConcrete(4, preset="binary").eval()
    gate.log_alpha.data.copy_(log_alpha)
    assert gate().tolist() == [0, 0, 0, 1]
    assert gate.is_open().tolist() == [False, False, False, True]


@pytest.mark.parametrize(("gamma", "zeta"), [(-0.1, 1.1), (-0.05, 1.05), (-0.3, 1.3), (-0.2, 1.5), (-0.4, 1.1)])
def test_the_threshold_of_the_binary_rule(gamma, zeta):
    right = math.log((0.5 - gamma) / (zeta - 0.5))
    assert hard_concrete("binary", gamma=gamma, zeta=zeta).lo == pytest.approx(
        right if abs(right) > 1e-9 else 0.0, rel=1e-12, abs=0
    )


def test_shared_draw_is_one_row_and_per_row_draws_differ():
    gate = gates.HardConcrete(50, init_log_alpha=0.0)
    assert gate().shape == (50,)
    z = gate(6)
    assert z.shape == (6, 50)
    assert len({tuple(row.tolist()) for row in z}) == 6


def test_casting_a_model_to_half_leaves_gate_parameters_in_float32():
    gate = gates.HardConcrete(4)
    for cast in (gate.half, gate.bfloat16, lambda: gate.to(torch.float16)):
        assert cast().log_alpha.dtype == torch.float32
    assert gate.double().log_alpha.dtype == torch.float64
