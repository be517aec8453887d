"""Gate families without noise in the Triton kernels: golden numbers, the zero patterns of the reference,
and layers that carry them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dampr import functional, gates, ops, reference, spec
from dampr.ops import GateArgs, GatePair
from dampr.ops import backend_triton as backend

GOLDEN = json.loads((Path(__file__).parent.parent / "data" / "gates.json").read_text())
RAMPS = {
    "A_relu_tanh_kappa5": spec.ramp("tanh", 5.0),
    "B_ratio_eps0.1": spec.ramp("ratio", 10.0),
    "C_square_ratio_eps0.1": spec.ramp("square_ratio", 10.0),
    "D_one_minus_exp_kappa5": spec.ramp("exponential", 5.0),
    "E_hard_sigmoid_kappa2": spec.ramp("clip", 2.0),
}
MASKS = {"M1_signswish": "smooth", "M2_relu_tanh": "exact_zero", "M3_logistic": "logistic"}
SPECS = {
    "value": spec.value(),
    **{f"{shape}-{k}": spec.ramp(shape, k) for shape in spec.SHAPES for k in (1.0, 7.0)},
    **{f"{variant}-{b}": spec.mask(variant, b, 0.3) for variant in spec.VARIANTS for b in (2.0, 50.0)},
}


def value_and_slope(parameter: torch.Tensor, function: spec.GateSpec) -> tuple[torch.Tensor, torch.Tensor]:
    gate = GateArgs(parameter, None, function)
    z = backend.sample_gates_fwd(gate, None)
    return z, backend.sample_gates_bwd(torch.ones_like(z), gate, None)


def assert_golden(actual: torch.Tensor, expected: Any, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(
        actual.double(), torch.as_tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("name", RAMPS)
def test_golden_ramps(name: str) -> None:
    case = GOLDEN["diffprune_reconstruction"][name]
    z, slope = value_and_slope(torch.tensor(case["x"]), RAMPS[name])
    assert torch.equal(z == 0, torch.tensor(case["z"]) == 0)
    assert_golden(z, case["z"])
    assert_golden(slope, case["dz_dx"])


@pytest.mark.parametrize("b", [2, 5, 10, 50])
@pytest.mark.parametrize("name", MASKS)
def test_golden_smooth_masks(name: str, b: int) -> None:
    case = GOLDEN["dmp_reconstruction"][f"{name}_beta{b}_t0.1"]
    z, slope = value_and_slope(torch.tensor(case["alpha"]), spec.mask(MASKS[name], b, 0.1))
    assert_golden(z, case["gate_alpha_times_mask"], 2e-6 * b)
    derivative = torch.tensor(case["mask"], dtype=torch.float64) + torch.tensor(case["alpha"]) * torch.tensor(
        case["dmask_dalpha"]
    )
    assert_golden(slope, derivative, 2e-6 * b)


@pytest.mark.parametrize(
    ("variant", "key"),
    [("hard", "dgate_dalpha_signswish_surrogate_beta5"), ("hard_constant", "dgate_dalpha_mask_constant")],
)
def test_golden_hard_mask(variant: str, key: str) -> None:
    case = GOLDEN["dmp_reconstruction"]["M0_hard_t0.1"]
    z, slope = value_and_slope(torch.tensor(case["alpha"]), spec.mask(variant, 5.0, 0.1))
    assert torch.equal(z, torch.tensor(case["alpha"]) * torch.tensor(case["mask"]))
    assert_golden(slope, case[key])


@pytest.mark.parametrize("index", [0, 1])
def test_golden_dam_gates(index: int) -> None:
    for case in GOLDEN["dam"]["gates" if index == 0 else "paper_index_from_1"]:
        gate = gates.DiscriminativeMask(
            case["n"], k=case["k"], alpha=case["alpha"], order=("zero", "one")[case["first_index"]]
        )
        with torch.no_grad():
            gate.beta.fill_(case["beta"])
        parameter = gate.parameter.detach()
        z, slope = value_and_slope(parameter, gate.spec)
        assert_golden(z, case["gate"])
        assert torch.equal(z != 0, gate.is_open())
        if "dgate_dbeta" in case:
            assert_golden(slope * gate.alpha**2, case["dgate_dbeta"])
    for shape, key in (("linear", "linear_gate"), ("piecewise_linear", "piecewise_linear_gate")):
        case = GOLDEN["dam"][key]
        gate = gates.DiscriminativeMask(case["n"], shape=shape, init_beta=case["beta"])
        assert_golden(value_and_slope(gate.parameter.detach(), gate.spec)[0], case["gate"])


def test_golden_dependent_gates() -> None:
    case = GOLDEN["dep_l0"]
    for layer in (1, 2):
        log_alpha = torch.tensor(case[f"log_alpha_{layer}"])
        assert_golden(
            backend.sample_gates_fwd(GateArgs(log_alpha, None, spec.hard_concrete("paper")), None),
            case[f"z_det_{layer}"],
            2e-6,
        )


def test_golden_noise_case_of_diffprune() -> None:
    case = GOLDEN["diffprune_reconstruction"]["noise_case"]
    x = torch.tensor(case["mu"]) + case["sigma"] * torch.tensor(case["xi"])
    assert_golden(value_and_slope(x, spec.ramp("tanh", 5.0))[0], case["z"])


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("n", [1, 37, 1024])
def test_zeros_are_those_of_the_reference_and_values_agree(n: int, name: str) -> None:
    gate, parameter = SPECS[name], torch.randn(n)
    parameter[::7] = 0.3 * parameter[::7].sign()
    parameter[1::97] *= 1e30
    parameter[2::97] *= 1e-38
    parameter[3::97] = 0.0
    z, slope = value_and_slope(parameter, gate)
    truth, derivative = reference.gate(parameter.double(), gate), reference.gate_derivative(parameter.double(), gate)
    assert torch.equal(z == 0, reference.gate(parameter, gate) == 0)
    tolerance = 2e-7 * (1 if gate.family == spec.VALUE else max(gate.beta, 2.0))
    assert ((z - truth) / truth.abs().clamp(min=1.0)).abs().max() <= tolerance
    assert ((slope - derivative) / derivative.abs().clamp(min=1.0)).abs().max() <= 30 * tolerance


@pytest.mark.parametrize("name", SPECS)
def test_extremes_do_no_harm_and_not_a_number_stays_visible(name: str) -> None:
    parameter = torch.tensor([float("inf"), 3e38, -3e38, float("nan")])
    z, slope = value_and_slope(parameter, SPECS[name])
    assert z.isnan().tolist() == [False, False, False, True]
    assert not slope[:3].isnan().any()


@pytest.mark.parametrize("route", ["fold", "live"])
@pytest.mark.parametrize("name", ["value", "tanh-7.0", "hard-2.0", "exact_zero-2.0"])
def test_linear_routes_multiply_by_these_gates(name: str, route: str) -> None:
    x, weight, bias = torch.randn(20, 24), torch.randn(16, 24), torch.randn(16)
    in_gate, out_gate = torch.randn(24), torch.randn(16)
    in_gate[8:16] = -abs(in_gate[8:16]) * 0.1
    with backend.forced_route(route):
        y, _ = backend.gated_linear_fwd(x, weight, bias, GatePair.of(in_gate, out_gate, None, None, SPECS[name]), True)
    truth = reference.gated_linear(x, weight, bias, in_gate, out_gate, None, None, SPECS[name], False)
    torch.testing.assert_close(y, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("where", ["output_gate", "input_gate", "weight_gate"])
@pytest.mark.parametrize("name", ["value", "square_ratio-7.0", "clip-7.0", "smooth-2.0"])
def test_gradients_of_layers(name: str, where: str) -> None:
    parameter = torch.randn({"output_gate": 9, "input_gate": 12, "weight_gate": 108}[where], requires_grad=True)
    x, weight, bias, g = torch.randn(6, 12), torch.randn(9, 12, requires_grad=True), torch.randn(9), torch.randn(6, 9)
    made = []
    for name_of_backend in ("triton", "reference"):
        with ops.backend(name_of_backend):
            y = functional.gated_linear(x, weight, bias, spec=SPECS[name], **{where: parameter})
            made.append((y.detach(), *torch.autograd.grad(y, (weight, parameter), g)))
    for actual, expected in zip(*made, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["hard_concrete", "dep_l0", "dam", "diffprune", "diffmask"])
def test_modules_of_every_family_run(name: str) -> None:
    gate = gates.make_gate(name, 12)
    with ops.backend("triton"):
        gate().sum().backward()
        assert all(p.grad is not None for p in gate.parameters())
        assert torch.equal(gate.eval()() != 0, gate.is_open())
        made = gate()
    with ops.backend("reference"):
        torch.testing.assert_close(made, gate())
