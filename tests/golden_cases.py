"""Golden numbers that are asked of every backend: ``CASES`` has checks (golden, dtype, tolerance) that run on the
backend in force.

A hard concrete gate depends on noise and parameter through logit u + log_alpha alone. So the published u is had on any
backend, whatever it draws: :func:`moved` puts the difference of the logits into log_alpha.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dampr import functional, gates, philox
from dampr.nn import GatedConv2d, GatedLinear
from dampr.spec import hard_concrete, mask, ramp

SEED = 20211031


def double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(made: Tensor, expected: Any, tolerance: float, scale: float = 1.0) -> None:
    torch.testing.assert_close(made.detach().double(), double(expected) * scale, rtol=tolerance, atol=tolerance)


def moved(log_alpha: Tensor, u: Tensor, drawn: Tensor) -> Tensor:
    """The log_alpha that gives with the noise ``drawn`` the gate of ``log_alpha`` with the noise ``u``; float64."""
    return log_alpha.double() + torch.logit(u.double()) - torch.logit(drawn.double())


def drawn_next(seed: int, count: int) -> Tensor:
    """The noise of the first gates that a layer draws after ``torch.manual_seed(seed)``."""
    torch.manual_seed(seed)
    u = philox.uniform(philox.draw_seed(torch.device("cpu")), count)
    torch.manual_seed(seed)
    return u


def hard_concrete_samples(golden: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    rows = golden["l0_hc"]["samples"]
    noise = philox.uniform(torch.tensor([SEED]), len(rows))
    leaf = (
        moved(double([r["log_alpha"] for r in rows]), double([r["u"] for r in rows]), noise).to(dtype).requires_grad_()
    )
    z = functional.sample_gates(leaf, seed=SEED)
    expected = double([r["z"] for r in rows])
    assert torch.equal(z == 0, expected == 0)
    assert torch.equal(z == 1, expected == 1)
    close(z, expected.tolist(), tolerance)
    (slope,) = torch.autograd.grad(z.sum(), leaf)
    close(slope, [r["dz_dlog_alpha"] for r in rows], tolerance)


def hard_concrete_thresholds(golden: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    """Just inside of its thresholds in u a gate is 0, or 1; just beyond it is neither."""
    rows = golden["l0_hc"]["penalty_and_eval"]
    log_alpha = double([r["log_alpha"] for r in rows])
    noise = philox.uniform(torch.tensor([SEED]), len(rows))
    for name, value in (("u_at_or_below_which_z_is_0", 0.0), ("u_at_or_above_which_z_is_1", 1.0)):
        logit = torch.logit(double([r[name] for r in rows]))
        for inward, offset in ((True, 1e-4), (False, -1e-4)):
            u = torch.sigmoid(logit + (-offset if value == 0 else offset))
            z = functional.sample_gates(moved(log_alpha, u, noise).to(dtype), seed=SEED)
            assert torch.equal(z == value, torch.full((len(rows),), inward)), (name, inward)


def hard_concrete_evaluation(golden: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    rows = golden["l0_hc"]["penalty_and_eval"]
    column = {name: [r[name] for r in rows] for name in rows[0]}
    leaf = double(column["log_alpha"]).to(dtype).requires_grad_()
    pi = functional.open_probability(leaf)
    close(pi, column["p_nonzero"], tolerance)
    close(1 - pi, column["p_zero"], tolerance)
    (slope,) = torch.autograd.grad(pi.sum(), leaf)
    close(slope, column["dp_nonzero_dlog_alpha"], tolerance)
    for preset, name in (("paper", "z_det"), ("median", "z_det_median_variant")):
        z = functional.sample_gates(leaf, spec=hard_concrete(preset))
        assert torch.equal(z == 0, double(column[name]) == 0)
        assert torch.equal(z == 1, double(column[name]) == 1)
        close(z, column[name], tolerance)


def hard_concrete_dense(golden: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    """The layer itself: evaluation, one draw for the batch, a draw per example, the penalty and its gradients."""
    case = golden["l0_hc"]["dense_case"]
    log_alpha, x = double(case["log_alpha"]), double(case["x"]).to(dtype)
    layers = [GatedLinear(3, 2, granularity="input", per_sample=each, dtype=dtype) for each in (False, True)]

    def put(layer: GatedLinear, values: Tensor) -> None:
        layer.gate.to(dtype).log_alpha.data.copy_(values)

    for layer in layers:
        layer.load_state_dict({"weight": double(case["W"]).t(), "bias": double(case["bias"])}, strict=False)
        put(layer, log_alpha)
        layer.eval()
        close(layer(x), case["eval_out"], tolerance)
        close(layer.gate(), case["eval_z"], tolerance)
        total = layer.train().penalty(lam=case["lam"], prior_precision=case["weight_decay"]) / case["N"]
        close(total, case["reg_added_to_loss"], tolerance)
        grads = torch.autograd.grad(total, [layer.weight, layer.bias, layer.gate.log_alpha])
        for grad, name in zip(grads, ("dreg_dW", "dreg_dbias", "dreg_dlog_alpha"), strict=True):
            close(grad.t() if grad.dim() == 2 else grad, case[name], tolerance)
        opened = layer.gate.open_probability().sum()
        close(layer.penalty() + 2, case["expected_l0"], tolerance)
        close((2 * opened - 1) * 2 + 2, case["expected_flops"], tolerance)
    shared, each = layers
    noise = drawn_next(3, 3)
    put(shared, moved(log_alpha, double(case["shared_u"]), noise))
    close(shared(x), case["train_out_shared"], tolerance)
    torch.manual_seed(3)
    close(shared.gate(), case["shared_z"], tolerance)
    noise = drawn_next(4, 6).view(2, 3)
    for row in range(2):
        put(each, moved(log_alpha, double(case["local_u"][row]), noise[row]))
        torch.manual_seed(4)
        close(each(x)[row], case["train_out_local_rep"][row], tolerance)
        torch.manual_seed(4)
        close(each.gate(2)[row], case["local_z"][row], tolerance)


def hard_concrete_conv(golden: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    """The layer itself; without a bias it gives what the published code does in training, which drops it."""
    case = golden["l0_hc"]["conv_case"]
    weight, bias, x = (double(case[name]).to(dtype) for name in ("W", "bias", "x_1x1x3x3"))
    log_alpha, n = double(case["log_alpha"]), case["N"]
    for biased, trained in ((True, "corrected_train_shared"), (False, "reference_train_shared_bias_dropped")):
        layer = GatedConv2d(weight.shape[1], weight.shape[0], weight.shape[2:], bias=biased, dtype=dtype)
        layer.load_state_dict({"weight": weight, **({"bias": bias} if biased else {})}, strict=False)
        gate = layer.gate.to(dtype)
        gate.log_alpha.data.copy_(log_alpha)
        close(gate.deterministic(), case["eval_z"], tolerance)
        if biased:
            close(layer.eval()(x.view(1, 1, 3, 3))[0], case["eval_out"], tolerance)
            close(layer.penalty(case["lam"], case["weight_decay"]) / n, case["reg_corrected_bias_sign"], tolerance)
            squares = weight.flatten(1).square().sum(1) + bias.square()
            how = {"lam": case["lam"], "group_sq_norm": squares, "prior_precision": case["weight_decay"]}
            slipped = functional.expected_l0(log_alpha.to(dtype), weight[0].numel() - 1, **how) / n
            close(slipped, case["reg_reference_bias_sign"], tolerance)
        gate.log_alpha.data.copy_(moved(log_alpha, double(case["u"]), drawn_next(5, 2)))
        close(layer.train()(x.view(1, 1, 3, 3))[0], case[trained], tolerance)
        torch.manual_seed(5)
        close(gate(), case["z"], tolerance)
        if not biased:
            gate.log_alpha.data.fill_(9.0)
            close(layer.eval()(x.view(1, 1, 3, 3))[0], case["conv_no_bias"], tolerance)


def dep_l0(golden: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    case = golden["dep_l0"]
    generator = gates.DependencyGenerator([2, 2], input_width=3).to(dtype)
    with torch.no_grad():
        for layer in (1, 2):
            getattr(generator, f"weight_{layer - 1}").copy_(double(case[f"W{layer}"]))
            getattr(generator, f"bias_{layer - 1}").copy_(double(case[f"b{layer}"]))
    noise = philox.uniform(torch.tensor([SEED]), 2)
    for layer, (gate, log_alpha) in enumerate(zip(generator.gates(), generator(), strict=True), 1):
        close(log_alpha, case[f"log_alpha_{layer}"], 5 * tolerance)
        close(gate.open_probability(), case[f"p_nonzero_{layer}"], tolerance)
        close(gate.eval()(), case[f"z_det_{layer}"], 2 * tolerance)
        z = functional.sample_gates(moved(log_alpha.detach(), double(case[f"u{layer}"]), noise).to(dtype), seed=SEED)
        close(z, case[f"z_train_{layer}"], 2 * tolerance)
    small = case["cifar_penalty"]
    total = generator.penalty([small["kernel"] ** 2] * 2, small["lam"], small["in_channels_first"])
    close(total / small["lam"], small["value"], 2 * tolerance, 1 / small["lam"])
    total.backward()
    for name, expected in small["grads"].items():
        made = getattr(generator, f"{'weight' if name[0] == 'W' else 'bias'}_{int(name[1]) - 1}").grad
        close(made / small["lam"], expected, 60 * tolerance, 1 / small["lam"])
    large = case["imagenet_penalty"]
    for as_published, key in ((True, "as_coded_k4"), (False, "intended_k2")):
        made = generator.filter_penalty([k * k for k in large["kernel"]], large["c_in"], large["lam"], as_published)
        close(made / large["lam"], large[key], 2 * tolerance, 1 / large["lam"])


def dam_layer(golden: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    case = golden["dam"]["layer_case"]
    gate = gates.DiscriminativeMask(case["n"], init_beta=case["beta"]).to(dtype)
    h = double(case["h"]).to(dtype).requires_grad_()
    parameter, seed, spec = gate.call()
    out = functional.gate_activations(h, parameter, dim=1, seed=seed, spec=spec)
    close(out, case["out"], tolerance)
    out.backward(double(case["dL_dout"]).to(dtype))
    assert h.grad is not None
    close(h.grad, case["dL_dh"], tolerance)
    close(gate.beta.grad, [case["dL_dbeta_data"]], tolerance)
    gates.dam_penalty([gate] * case["n_dam_layers"], case["lam"]).backward()
    close(gate.beta.grad, [case["dL_dbeta_total"]], tolerance)
    for key, shape in (("linear_gate", "linear"), ("piecewise_linear_gate", "piecewise_linear")):
        wide = golden["dam"][key]
        close(
            gates.DiscriminativeMask(wide["n"], shape=shape, init_beta=wide["beta"]).to(dtype)(),
            wide["gate"],
            tolerance,
        )


def diffprune_groups(golden: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    case = golden["diffprune_reconstruction"]["group_penalty_case"]
    gate = gates.DiffPrune(3).to(dtype)
    gate.phi.data.copy_(double(case["phi"]))
    size = double(case["group_size"]).to(dtype)
    total = case["lam"] * (gate.open_probability() * size).sum()
    total.backward()
    close(total, case["penalty_sum"], tolerance)
    close(total / case["total_params"], case["penalty_mean"], tolerance)
    close(gate.phi.grad, case["grad_phi_sum"], tolerance)
    assert (gate.is_open() * size).sum().item() == case["hard_l0"]
    noise = golden["diffprune_reconstruction"]["noise_case"]
    x = double(noise["mu"]) + noise["sigma"] * double(noise["xi"])
    close(x, noise["x"], tolerance)
    close(functional.sample_gates(x.to(dtype), spec=ramp("tanh", 5.0)), noise["z"], 5 * tolerance)


class PassThrough(gates.Gate):
    """A family of a user's own: the hard mask with the derivative 1 everywhere (Bengio et al. 2013),
    which dampr does not have.
    """

    def __init__(self, values: Tensor) -> None:
        super().__init__(values.numel())
        self.alpha = torch.nn.Parameter(values)

    def forward(self, rows: int | None = None) -> Tensor:
        hard = functional.sample_gates(self.alpha, spec=mask("hard", 5.0, 0.1))
        z = self.alpha + (hard - self.alpha).detach()
        return z if rows is None else z.expand(rows, -1)

    def open_probability(self) -> Tensor:
        return self.alpha.abs()


def mask_with_identity_slope(golden: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    case = golden["dmp_reconstruction"]["M0_hard_t0.1"]
    gate = PassThrough(double(case["alpha"]).to(dtype))
    layer = GatedLinear(1, 9, bias=False, gate=gate, dtype=dtype)
    layer.weight.data.fill_(1.0)
    y = layer(torch.ones(1, 1, dtype=dtype))[0]
    close(y, case["gate_alpha_times_mask"], tolerance)
    (slope,) = torch.autograd.grad(y.sum(), gate.alpha)
    close(slope, case["dgate_dalpha_straight_through_identity"], tolerance)


CASES: dict[str, Callable[[dict[str, Any], torch.dtype, float], None]] = {
    case.__name__: case
    for case in (
        hard_concrete_samples,
        hard_concrete_thresholds,
        hard_concrete_evaluation,
        hard_concrete_dense,
        hard_concrete_conv,
        dep_l0,
        dam_layer,
        diffprune_groups,
        mask_with_identity_slope,
    )
}
