"""All families through one interface: the gate functions against their golden numbers on every CPU backend,
and layers that carry them.
"""

import copy

import pytest
import torch
from torch import nn

import dampr
from dampr import functional, gates, reference, spec

FAMILIES = {
    "hard_concrete": lambda n: gates.HardConcrete(n),
    "hard_concrete-droprate": lambda n: gates.HardConcrete(n, droprate=0.3, **gates.PUBLISHED["gallego2022"]),
    "dep_l0": lambda n: gates.make_gate("dep_l0", n),
    "dam": lambda n: gates.DiscriminativeMask(n),
    "dam-linear": lambda n: gates.DiscriminativeMask(n, shape="linear", order="one"),
    "dam-clip": lambda n: gates.DiscriminativeMask(n, shape="piecewise_linear", alpha=1.5, min_open=2),
    **{
        f"diffprune-{shape}": lambda n, shape=shape: gates.DiffPrune(n, shape=shape, init_phi=0.15) for shape in "ABCDE"
    },
    "diffprune-stochastic": lambda n: gates.DiffPrune(n, stochastic=True),
    "diffprune-noise": lambda n: gates.DiffPrune(n, revive="noise"),
    "diffprune-straight_through": lambda n: gates.DiffPrune(n, revive="straight_through"),
    **{
        f"diffmask-{variant}": lambda n, variant=variant: gates.DifferentiableMask(n, variant=variant)
        for variant in spec.VARIANTS
    },
    "diffmask-scheduled": lambda n: gates.DifferentiableMask(n, variant="exact_zero", slope_mode="scheduled"),
    "diffmask-trainable": lambda n: gates.DifferentiableMask(n, slope_mode="trainable"),
    "diffmask-threshold": lambda n: gates.DifferentiableMask(n, threshold_mode="trainable"),
}
DRAWS = ("hard_concrete", "hard_concrete-droprate", "dep_l0", "diffprune-stochastic", "diffprune-noise")

RAMPS = {
    "A_relu_tanh_kappa5": spec.ramp("tanh", 5.0),
    "B_ratio_eps0.1": spec.ramp("ratio", 10.0),
    "C_square_ratio_eps0.1": spec.ramp("square_ratio", 10.0),
    "D_one_minus_exp_kappa5": spec.ramp("exponential", 5.0),
    "E_hard_sigmoid_kappa2": spec.ramp("clip", 2.0),
}
PRECISIONS = [(torch.float64, 1e-12), (torch.float32, 2e-6)]
SPECS = {
    "value": spec.value(),
    **{f"{shape}-{k}": spec.ramp(shape, k) for shape in spec.SHAPES for k in (1.0, 7.0)},
    **{f"{variant}-{b}": spec.mask(variant, b, 0.3) for variant in spec.VARIANTS for b in (2.0, 50.0)},
}


def value_and_slope(parameter, gate):
    """Through the op and its backward, on the backend in force; and through autograd of the reference."""
    leaf = parameter.clone().requires_grad_()
    z = functional.sample_gates(leaf, spec=gate)
    (slope,) = torch.autograd.grad(z, leaf, torch.ones_like(z))
    (derived,) = torch.autograd.grad(reference.gate(leaf, gate).sum(), leaf)
    return z.detach(), slope, derived


def assert_golden(actual, expected, tolerance):
    torch.testing.assert_close(
        actual.double(), torch.tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("name", RAMPS)
def test_golden_ramps(golden, cpu_backend, name, dtype, tolerance):
    case = golden["diffprune_reconstruction"][name]
    z, slope, derived = value_and_slope(torch.tensor(case["x"], dtype=dtype), RAMPS[name])
    assert torch.equal(z == 0, torch.tensor(case["z"]) == 0)
    assert_golden(z, case["z"], tolerance)
    for made in (slope, derived):
        assert_golden(made, case["dz_dx"], tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("b", [2, 5, 10, 50])
@pytest.mark.parametrize(
    ("name", "variant"), [("M1_signswish", "smooth"), ("M2_relu_tanh", "exact_zero"), ("M3_logistic", "logistic")]
)
def test_golden_smooth_masks(golden, cpu_backend, name, variant, b, dtype, tolerance):
    case = golden["dmp_reconstruction"][f"{name}_beta{b}_t0.1"]
    alpha = torch.tensor(case["alpha"], dtype=dtype)
    z, slope, derived = value_and_slope(alpha, spec.mask(variant, b, 0.1))
    tolerance *= b  # the distance to the threshold is rounded once, and multiplied by b
    assert_golden(z, case["gate_alpha_times_mask"], tolerance)
    expected = torch.tensor(case["mask"]) + torch.tensor(case["alpha"]) * torch.tensor(case["dmask_dalpha"])
    if name == "M1_signswish":
        torch.testing.assert_close(expected, torch.tensor(case["dgate_dalpha"]))
    for made in (slope, derived):
        torch.testing.assert_close(
            made.double(), expected.double(), rtol=max(tolerance, 1e-6), atol=max(tolerance, 1e-6)
        )


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_golden_mask_itself_and_its_derivatives_by_slope_and_threshold(golden, dtype, tolerance):
    for b in (2.0, 5.0, 10.0, 50.0):
        case = golden["dmp_reconstruction"][f"M1_signswish_beta{b:g}_t0.1"]
        alpha = torch.tensor(case["alpha"], dtype=dtype, requires_grad=True)
        for i, column in enumerate(
            zip(case["mask"], case["dmask_dalpha"], case["dmask_dbeta"], case["dmask_dt"], strict=True)
        ):
            slope, threshold = (torch.tensor(v, dtype=dtype, requires_grad=True) for v in (b, 0.1))
            m = reference.mask(alpha, spec.SMOOTH, slope, threshold)[i]
            by_alpha, by_slope, by_threshold = torch.autograd.grad(m, (alpha, slope, threshold))
            made = torch.stack([m, by_alpha[i], by_slope, by_threshold])
            # dmask_dbeta is recorded as a difference quotient
            assert_golden(made.detach(), list(column), max(tolerance * b, 1e-8))
    for variant, name in ((spec.EXACT_ZERO, "M2_relu_tanh"), (spec.LOGISTIC, "M3_logistic")):
        for b in (2.0, 5.0, 10.0, 50.0):
            case = golden["dmp_reconstruction"][f"{name}_beta{b:g}_t0.1"]
            alpha = torch.tensor(case["alpha"], dtype=dtype, requires_grad=True)
            m = reference.mask(alpha, variant, b, 0.1)
            assert_golden(m.detach(), case["mask"], tolerance * b)
            assert_golden(torch.autograd.grad(m.sum(), alpha)[0], case["dmask_dalpha"], tolerance * b)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize(
    ("variant", "key"),
    [("hard", "dgate_dalpha_signswish_surrogate_beta5"), ("hard_constant", "dgate_dalpha_mask_constant")],
)
def test_golden_hard_mask_and_the_derivatives_that_stand_for_its_own(
    golden, cpu_backend, variant, key, dtype, tolerance
):
    case = golden["dmp_reconstruction"]["M0_hard_t0.1"]
    alpha = torch.tensor(case["alpha"], dtype=dtype)
    z, slope, derived = value_and_slope(alpha, spec.mask(variant, 5.0, 0.1))
    assert torch.equal(z, alpha * torch.tensor(case["mask"], dtype=dtype))
    assert_golden(z, case["gate_alpha_times_mask"], tolerance)
    for made in (slope, derived):
        assert_golden(made, case[key], tolerance)


def random_parameters(n, dtype):
    """Around 0 and the threshold, at both, some far away and some closer to 0 than float32 can square."""
    parameter = torch.randn(n)
    parameter[::7] = 0.3 * parameter[::7].sign()
    parameter[::11] *= 1e-3
    parameter[1::97] *= 1e30
    parameter[2::97] *= 1e-38
    parameter[3::97] = 0.0
    return parameter.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_zero_patterns_are_equal_on_every_backend_and_values_agree(cpu_backend, name, dtype):
    gate, parameter = SPECS[name], random_parameters(5000, dtype)
    z, slope, derived = value_and_slope(parameter, gate)
    truth = reference.gate(parameter.double(), gate)
    assert torch.equal(z == 0, reference.gate(parameter, gate) == 0)
    if gate.family == spec.RAMP:
        assert torch.equal(z == 0, parameter.float() <= 0)
    if gate.rule in (spec.HARD, spec.HARD_CONSTANT, spec.EXACT_ZERO):
        assert torch.equal(z == 0, parameter.float().abs() <= torch.tensor(0.3))
    scale = truth.abs().clamp(min=1.0)
    tolerance = (1e-13 if dtype == torch.float64 else 2e-7) * (1 if gate.family == spec.VALUE else max(gate.beta, 2.0))
    assert ((z - truth) / scale).abs().max() <= tolerance
    closed_form = reference.gate_derivative(parameter.double(), gate)
    for made in (slope, derived):
        assert ((made - closed_form) / closed_form.abs().clamp(min=1.0)).abs().max() <= 30 * tolerance


@pytest.mark.parametrize("name", SPECS)
def test_extremes_do_no_harm_and_not_a_number_stays_visible(cpu_backend, name):
    for value in (float("inf"), 3e38, -3e38):
        z, slope, _ = value_and_slope(torch.full((5,), value), SPECS[name])
        assert not z.isnan().any()
        assert not slope.isnan().any()
    z, *_ = value_and_slope(torch.tensor([float("nan"), 1.0]), SPECS[name])
    assert z.isnan().tolist() == [True, False]


@pytest.mark.parametrize("name", SPECS)
def test_rows_of_a_gate_without_noise_are_all_the_same(cpu_backend, name):
    parameter = torch.randn(37, requires_grad=True)
    z = functional.sample_gates(parameter, rows=4, spec=SPECS[name])
    assert torch.equal(z, functional.sample_gates(parameter, spec=SPECS[name]).expand(4, 37))
    (four,) = torch.autograd.grad(z.sum(), parameter)
    torch.testing.assert_close(
        four, 4 * reference.gate_derivative(parameter.detach(), SPECS[name]), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("x", [torch.randn(6, 12), torch.randn(130, 12)], ids=["tiny", "tall"])
@pytest.mark.parametrize("where", ["output_gate", "input_gate", "weight_gate"])
@pytest.mark.parametrize("name", [n for n in SPECS if not n.endswith("50.0")])
def test_fused_layers_multiply_by_these_gates(cpu_backend, name, where, x):
    parameter = torch.randn({"output_gate": 9, "input_gate": 12, "weight_gate": 108}[where], requires_grad=True)
    weight, bias, g = torch.randn(9, 12, requires_grad=True), torch.randn(9), torch.randn(len(x), 9)
    y = functional.gated_linear(x, weight, bias, spec=SPECS[name], **{where: parameter})
    z = reference.gate(parameter, SPECS[name])
    if where == "output_gate":
        truth = z * (x @ weight.t() + bias)
    else:
        truth = x @ (weight * (z.view(9, 12) if where == "weight_gate" else z)).t() + bias
    torch.testing.assert_close(y, truth, rtol=1e-4, atol=1e-4)
    for made, expected in zip(*(torch.autograd.grad(t, (weight, parameter), g) for t in (y, truth)), strict=True):
        torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-3)


BUILDERS = [
    (lambda: spec.ramp("sigmoid"), r"shape='sigmoid': expected one of"),
    (lambda: spec.ramp(sharpness=0.0), r"sharpness=0\.0: expected a finite number above 0"),
    (lambda: spec.mask("M0"), r"variant='M0': expected one of"),
    (lambda: spec.mask(slope=float("inf")), r"slope=inf: expected"),
    (lambda: spec.mask(threshold=-0.1), r"threshold=-0\.1: expected a finite number of at least 0"),
    (lambda: reference.open_probability(torch.zeros(2), spec.ramp()), r"spec\.family=2: expected 0"),
    (lambda: gates.HardConcrete(2, droprate=1.0), r"droprate=1\.0: expected a number in \[0, 1\)"),
    (lambda: gates.HardConcrete(2, droprate=0.5, init_log_alpha=1.0), r"droprate=0\.5 with init_log_alpha=1\.0"),
    (lambda: gates.DiscriminativeMask(4, k=0.0), r"k=0\.0: expected"),
    (lambda: gates.DiscriminativeMask(4, order="two"), r"order='two': expected one of"),
    (lambda: gates.DiscriminativeMask(4, min_open=5), r"min_open=5: expected at most num_gates=4"),
    (lambda: gates.dam_penalty([], 1.0), r"expected at least one"),
    (lambda: gates.DiffPrune(4, shape="F"), r"shape='F': expected one of"),
    (lambda: gates.DiffPrune(4, revive="noise", stochastic=True), r"revive='noise' with stochastic=True"),
    (lambda: gates.DiffPrune(4, init_sigma=0.0), r"init_sigma=0\.0: expected"),
    (lambda: gates.DifferentiableMask(4, slope_mode="free"), r"slope_mode='free': expected one of"),
    (lambda: gates.DifferentiableMask(4, threshold_mode="scheduled"), r"threshold_mode='scheduled': expected one of"),
    (
        lambda: gates.DifferentiableMask(4, variant="hard_constant", threshold_mode="trainable"),
        r"threshold_mode='trainable' with variant='hard_constant'",
    ),
    (
        lambda: gates.DifferentiableMask(4, threshold=0.0, threshold_mode="trainable"),
        r"threshold=0\.0: expected a mask that has a slope",
    ),
    (lambda: gates.DifferentiableMask(4).set_slope(2.0), r"slope_mode='fixed': expected 'scheduled'"),
    (lambda: gates.scale_penalty([], 1.0), r"expected at least one"),
    (lambda: gates.square_penalty([], 1.0), r"tensors: expected at least one"),
    (lambda: gates.geometric_slope(1, 10, start=0.0), r"start=0\.0: expected"),
    (lambda: gates.DependencyGenerator([]), r"sizes=\[\]: expected"),
    (lambda: gates.DependencyGenerator([4], "sideways"), r"direction='sideways': expected one of"),
    (lambda: gates.DependentHardConcrete(gates.DependencyGenerator([4]), 1), r"index=1: expected one below 1"),
    (lambda: gates.DependencyGenerator([4]).penalty([9, 9], 1.0), r"kernel_areas=\[9, 9\]: expected 1 numbers"),
    (
        lambda: gates.DependencyGenerator([4]).filter_penalty([9], [3, 3], 1.0),
        r"in_channels=\[3, 3\]: expected 1 numbers",
    ),
    (lambda: gates.make_gate("l0", 3), r"gate='l0': expected one of"),
]


@pytest.mark.parametrize(("build", "message"), BUILDERS, ids=[message for _, message in BUILDERS])
def test_what_cannot_be_is_refused_by_name(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_interface(cpu_backend, name):
    gate = FAMILIES[name](10)
    assert gate.num_gates == 10
    for module in (gate.train(), gate.eval()):
        z, rows = module(), module(3)
        assert (z.shape, rows.shape) == ((10,), (3, 10))
        different = len({tuple(row) for row in rows.tolist()}) == 3
        assert different == (module.training and name in DRAWS)
        parameter, seed, used = module.call()
        assert parameter.shape == (10,)
        assert (seed is None) == (used.rule != spec.SAMPLE)
    assert torch.equal(gate(), gate.deterministic())
    assert torch.equal(gate.train().deterministic(), gate.eval()())
    assert torch.equal(gate.is_open(), gate() != 0)
    pi = gate.open_probability()
    assert pi.shape == (10,)
    parameters = [p for n, p in gate.named_parameters() if n not in ("log_slope", "log_threshold")]
    grads = torch.autograd.grad(pi.sum(), parameters, allow_unused=True)
    assert all(g is not None and bool((g != 0).any()) for g in grads)
    assert repr(gate)


@pytest.mark.parametrize("name", FAMILIES)
def test_is_open_says_what_evaluation_does(cpu_backend, name):
    gate = FAMILIES[name](64).eval()
    with torch.no_grad():
        for key, p in gate.named_parameters():
            if key == "beta":
                p.fill_(-2.0)
            elif not any(word in key for word in ("sigma", "slope", "threshold")):
                p.copy_(torch.linspace(-4, 4, p.numel()).view(p.shape))
    open_ = gate.is_open()
    assert torch.equal(open_, gate() != 0)
    assert 0 < int(open_.sum()) < 64


LAYERS = {
    "linear": lambda gate: (dampr.nn.GatedLinear(12, 7, gate=gate), torch.randn(5, 12)),
    "linear-input": lambda gate: (dampr.nn.GatedLinear(12, 7, gate=gate, granularity="input"), torch.randn(5, 12)),
    "linear-weight": lambda gate: (dampr.nn.GatedLinear(12, 7, gate=gate, granularity="weight"), torch.randn(5, 12)),
    "conv": lambda gate: (dampr.nn.GatedConv2d(6, 7, 3, gate=gate), torch.randn(2, 6, 9, 9)),
    "norm": lambda gate: (dampr.nn.GatedBatchNorm2d(7, gate=gate), torch.randn(4, 7, 3, 3)),
}
GATES = {"linear": 7, "linear-input": 12, "linear-weight": 84, "conv": 7, "norm": 7}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", FAMILIES)
def test_layers_train_with_a_gradient_on_every_gate_parameter(cpu_backend, name, layer):
    module, x = LAYERS[layer](FAMILIES[name](GATES[layer]))
    optimizer = torch.optim.SGD(dampr.param_groups(module, lr=1e-2))
    for _ in range(2):
        loss = (module(x) - 1).square().mean() + 1e-3 * dampr.penalty(module)
        optimizer.zero_grad()
        loss.backward()
        for key, p in module.named_parameters():
            assert p.grad is not None, key
            assert p.grad.isfinite().all(), key
            assert bool((p.grad != 0).any()), key
        optimizer.step()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_gradient_of_a_layer_is_that_of_its_gates(cpu_backend, name):
    """What a layer does with gate.call() is what multiplying by gate() does."""
    module, x = dampr.nn.GatedLinear(12, 7, gate=FAMILIES[name](7)), torch.randn(5, 12)
    parameters = list(module.parameters())
    torch.manual_seed(3)
    through_layer = torch.autograd.grad(module(x).square().sum(), parameters)
    torch.manual_seed(3)
    z = module.gate()
    by_hand = torch.autograd.grad((z * nn.functional.linear(x, module.weight, module.bias)).square().sum(), parameters)
    for made, expected in zip(through_layer, by_hand, strict=True):
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["dam", "diffprune", "diffmask", "hard_concrete"])
@pytest.mark.parametrize(
    "dense", [nn.Linear(12, 7), nn.Conv2d(6, 7, 3), nn.BatchNorm2d(7)], ids=lambda m: type(m).__name__
)
def test_fresh_gates_keep_what_a_dense_layer_computes(name, dense):
    x = {nn.Linear: torch.randn(5, 12), nn.Conv2d: torch.randn(2, 6, 9, 9), nn.BatchNorm2d: torch.randn(4, 7, 3, 3)}[
        type(dense)
    ]
    dense = copy.deepcopy(dense).eval()
    y = dense(x)
    gated = getattr(dampr.nn, f"Gated{type(dense).__name__}").from_dense(dense, gate=name).eval()
    torch.testing.assert_close(gated(x), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gated.to_dense()(x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_state_dict_round_trip_copies_and_a_dense_checkpoint_leaves_gates_alone(name):
    one, other = (dampr.nn.GatedLinear(12, 7, gate=FAMILIES[name](7)).eval() for _ in range(2))
    with torch.no_grad():
        for p in one.parameters():
            p.add_(0.05 * torch.randn_like(p))
    other.load_state_dict(one.state_dict())
    x = torch.randn(5, 12)
    assert torch.equal(other(x), one(x))
    one.train()(x)
    assert torch.equal(copy.deepcopy(one).eval()(x), other(x))
    before = other.gate.deterministic()
    other.load_state_dict(nn.Linear(12, 7).state_dict())
    assert torch.equal(other.gate.deterministic(), before)


@pytest.mark.parametrize("name", FAMILIES)
def test_half_leaves_gates_in_float32_and_double_is_clean(cpu_backend, name):
    gate = FAMILIES[name](7)
    before = {key: t.clone() for key, t in gate.state_dict().items()}
    gate.half().bfloat16()
    assert all(t.dtype == torch.float32 and torch.equal(t, before[key]) for key, t in gate.state_dict().items())
    gate.double()
    assert gate().dtype == gate.open_probability().dtype == torch.float64
    assert (
        dampr.nn.GatedLinear(12, 7, gate=gate, dtype=torch.float64)(torch.randn(3, 12).double()).dtype == torch.float64
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_autocast_does_not_reach_the_gates(name):
    layer, x = dampr.nn.GatedLinear(12, 7, gate=FAMILIES[name](7)).eval(), torch.randn(3, 12)
    plain, pi = layer.gate().detach(), layer.gate.open_probability().detach()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.gate(), plain)
        assert torch.equal(layer.gate.open_probability(), pi)
        assert layer.train()(x).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", FAMILIES)
def test_layers_compile_in_one_graph(name):
    layer, x = dampr.nn.GatedLinear(12, 7, gate=FAMILIES[name](7)), torch.randn(3, 12)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x).shape, layer(x).shape)
    compiled(x).sum().backward()
    assert all(p.grad is not None for key, p in layer.named_parameters())
    layer.eval()
    torch.testing.assert_close(compiled(x), layer(x))


class SigmoidGate(gates.Gate):
    """The example of Gate's docstring, with as little as a user has to write."""

    def __init__(self, num_gates, *, device=None):
        super().__init__(num_gates)
        self.logit = nn.Parameter(torch.linspace(-2, 2, num_gates, device=device))

    def forward(self, rows=None):
        z = torch.relu(torch.sigmoid(self.logit) - 0.3)
        return z if rows is None else z.expand(rows, -1)

    def open_probability(self):
        return torch.sigmoid(self.logit)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_family_of_ones_own_runs_in_the_same_layers(cpu_backend, layer):
    module, x = LAYERS[layer](SigmoidGate)
    assert isinstance(module.gate, SigmoidGate)
    assert module.gate.spec == spec.value()
    (module(x).square().mean() + 1e-3 * dampr.penalty(module)).backward()
    assert bool((module.gate.logit.grad != 0).any())
    assert torch.equal(module.gate.is_open(), torch.sigmoid(module.gate.logit) > 0.3)
    assert module.training
    torch.testing.assert_close(module.eval().to_dense()(x), module(x), rtol=1e-5, atol=1e-5)


def test_publications_that_disagree_have_names():
    for name, options in gates.PUBLISHED.items():
        gate = gates.HardConcrete(8, **options)
        assert (gate.preset, gate.spec.beta) == (options["preset"], options["beta"]), name


def test_droprate_starts_gates_as_published():
    for droprate, mean in ((0.5, 0.0), (0.3, 0.847298), (0.2, 1.386294), (0.0, 0.0)):
        log_alpha = gates.HardConcrete(100_000, droprate=droprate).log_alpha.detach()
        assert abs(log_alpha.mean() - mean) < 5 * 0.01 / 100_000**0.5
        assert abs(log_alpha.std() - 0.01) < 2e-4


def test_clamp_keeps_the_probability_to_be_open_off_its_ends(golden):
    gate = gates.HardConcrete(2)
    with torch.no_grad():
        gate.log_alpha.copy_(torch.tensor([-50.0, 50.0]))
    gate.clamp_()
    assert gate.log_alpha.tolist() == pytest.approx([-golden["dep_l0"]["bound"], golden["dep_l0"]["bound"]])
    assert gate.open_probability().tolist() == pytest.approx([0.04713, 0.99798], abs=1e-5)
