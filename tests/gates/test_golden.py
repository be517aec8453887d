"""Every golden number that can be asked of a backend, of each one here in both precisions;
and those that no other test reads.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import dampr
from dampr import gates, reference, spec
from dampr.nn import GatedConv2d
from dampr.prune.measure import count_macs, count_params
from tests.golden_cases import CASES

ROWS = [0, *(pytest.param(row, marks=pytest.mark.long) for row in (1, 2))]  # of the penalties that were recorded
PRECISIONS = [(torch.float64, 1e-12), (torch.float32, 2e-6)]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("name", CASES)
def test_golden_case(golden, cpu_backend, name, dtype, tolerance):
    CASES[name](golden, dtype, tolerance)


def test_golden_probability_of_an_exact_one(golden):
    """P(z = 1) = P(u >= a / (a + c1)), from the constant that decides it on every backend."""
    c1 = spec.hard_concrete().c1
    for row in golden["l0_hc"]["penalty_and_eval"]:
        assert c1 / (math.exp(-row["log_alpha"]) + c1) == pytest.approx(row["p_one"], abs=1e-12)
        assert 1 - row["u_at_or_above_which_z_is_1"] == pytest.approx(row["p_one"], abs=1e-12)
        assert row["u_at_or_below_which_z_is_0"] == pytest.approx(row["p_zero"], abs=1e-12)


def test_golden_clamp_and_droprates(golden):
    constants = golden["l0_hc"]["constants"]
    gate = gates.HardConcrete(2)
    with torch.no_grad():
        gate.log_alpha.copy_(torch.tensor([-50.0, 50.0]))
    gate.clamp_()
    assert gate.log_alpha.tolist() == pytest.approx([constants["log_alpha_min"], constants["log_alpha_max"]], rel=1e-7)
    for droprate, mean in constants["init_log_alpha"].items():
        log_alpha = gates.HardConcrete(100_000, droprate=float(droprate)).log_alpha.detach().double()
        assert abs(log_alpha.mean() - mean) < 5 * 0.01 / 100_000**0.5


def test_golden_clip_of_the_noise_decides_no_gate_below_twelve(golden):
    """Published code clips u to [1e-6, 1 - 1e-6], dampr to 2^-24: all between is closed, or open, in both."""
    epsilon = golden["l0_hc"]["constants"]["epsilon"]
    assert epsilon > spec.EDGE
    log_alpha = torch.linspace(-12, 12, 2001, dtype=torch.float64)
    for far, near, value in ((spec.EDGE, epsilon, 0.0), (1 - spec.EDGE, 1 - epsilon, 1.0)):
        for u in (far, near):
            z = reference.gate(log_alpha, spec.hard_concrete(), torch.tensor([u], dtype=torch.float64))
            assert bool((z == value).all())


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_golden_lenet5_open_probability(golden, dtype, tolerance):
    case = golden["l0_hc"]["lenet5_accounting_all_log_alpha_0"]
    pi = dampr.functional.open_probability(torch.zeros(1, dtype=dtype)).item()
    assert pi == pytest.approx(case["p_nonzero"], rel=tolerance)
    assert case["per_layer_l0"][0] == pytest.approx(26 * 20 * pi, rel=tolerance)


@pytest.mark.parametrize("start", ["corrected_avg_starts_at_zero", "reference_avg_starts_at_init_param"])
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_golden_polyak_average_step_by_step(golden, start, dtype, tolerance):
    case, average = golden["l0_hc"]["ema_case"], gates.PolyakAverage(decay=golden["l0_hc"]["ema_case"]["beta"])
    parameter = nn.Parameter(torch.tensor([case["init_param"]], dtype=dtype))
    if start.startswith("reference"):
        average.averages = [parameter.detach().clone()]  # the published slip
    for row in case[start]:
        parameter.data.fill_(row["param"])
        average.update([parameter])
        assert average.steps == row["step"]
        assert average.averages[0].item() == pytest.approx(row["avg"], rel=tolerance)
        with average.applied([parameter]):
            assert parameter.item() == pytest.approx(row["eval_param"], rel=20 * tolerance)


NETWORKS = {
    "vgg16": [64, 64, 128, 128, 256, 256, 256, *[512] * 6],
    "resnet56": [*[16] * 10, *[32] * 9, *[64] * 9],
    "resnet50": [*[64] * 7, *[128] * 8, *[256] * 12, *[512] * 6],
}


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", NETWORKS)
def test_golden_shares_closed_in_the_first_and_the_last_layer(golden, name, direction):
    """Counted along the generator: what it evaluates first is all open,
    what it evaluates last is as closed as anything.
    """
    case, shares = golden["dep_l0"]["untrained_generator_statistics"][f"{name}_{direction}"], []
    width = 64 if (name, direction) == ("vgg16", "backward") else None
    seeds = 40 if name == "resnet56" else 8
    for seed in range(seeds):
        torch.manual_seed(seed)
        made = gates.DependencyGenerator(NETWORKS[name], direction, width).gates()
        first, last = (made[0], made[-1]) if direction == "forward" else (made[-1], made[0])
        assert (~first.is_open()).float().mean().item() == case["frac_off_first_layer"]
        shares.append((~last.is_open()).float().mean().item())
    n = last.num_gates
    p = case["frac_off_last_layer"]
    # Gates of one layer share their inputs: the spread between networks is several times the binomial one.
    assert abs(np.mean(shares) - p) < 5 * (3 * (p * (1 - p) / n) ** 0.5) * (1 / seeds + 1 / case["seeds"]) ** 0.5


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_golden_rest_of_beta_under_weight_decay(golden, dtype, tolerance):
    """To the fixed point -lam / (layers * decay); one of the layers stands for all, with its share of lam."""
    case = golden["dam"]["beta_under_penalty_only"]
    gate = gates.DiscriminativeMask(16, weight_decay_on_beta=True).to(dtype)
    groups = dampr.param_groups(dampr.nn.GatedLinear(2, 16, gate=gate, dtype=dtype), lr=0.05, weight_decay=1e-3)
    assert any(gate.beta is p and group["weight_decay"] == 1e-3 for group in groups for p in group["params"])
    optimizer = torch.optim.SGD([group for group in groups if gate.beta in set(group["params"])], momentum=0.9)
    share, trace = case["lam"] / case["n_dam_layers"], {}
    for step in range(1, 20_001):
        gate.beta.grad = torch.full_like(gate.beta, share)
        optimizer.step()
        trace[step] = gate.beta.item()
    gate.beta.grad = None
    gates.dam_penalty([gate], share).backward()
    assert gate.beta.grad.item() == pytest.approx(share, rel=1e-6)
    slack = 1 if dtype == torch.float64 else 100  # rounding of twenty thousand steps in float32
    np.testing.assert_allclose([trace[i] for i in range(1, 11)], case["first_10"], rtol=10 * tolerance)
    for step in (352, 3520, 20_000):
        assert trace[step] == pytest.approx(case[f"after_{step}"], rel=slack * 10 * tolerance), step
    assert case["fixed_point"] == pytest.approx(-case["lam"] / (case["n_dam_layers"] * 1e-3), rel=1e-12)
    assert trace[20_000] == pytest.approx(case["fixed_point"], rel=1e-3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 2e-3)])
def test_golden_norm_after_a_gate_hides_its_gradient(golden, dtype, tolerance):
    """The golden derivatives are difference quotients; in float32 the variance cancels them almost away."""
    case = golden["dam"]["bn_after_gate"]
    norm = nn.BatchNorm1d(1, eps=case["eps"], dtype=dtype)
    norm.load_state_dict(
        {"weight": torch.tensor([case["bn_weight"]]), "bias": torch.tensor([case["bn_bias"]])}, strict=False
    )
    x = torch.tensor(case["x"], dtype=dtype)
    for value in (0.5, 0.001):
        z = torch.tensor(value, dtype=dtype, requires_grad=True)
        y = norm((x * z)[:, None])[:, 0]
        made = [torch.autograd.grad(y[i], z, retain_graph=True)[0].item() for i in range(4)]
        expected = case[f"dout_dgate_at_{value:g}".replace(".", "_")]
        np.testing.assert_allclose(
            made, expected, rtol=max(tolerance, 1e-5), atol=max(tolerance, 1e-9) * (1 if value == 0.5 else 100)
        )
    for value, key in ((0.0, "out_gate_0"), (0.5, "out_gate_0_5"), (1.0, "out_gate_1")):
        np.testing.assert_allclose(norm((value * x)[:, None])[:, 0].detach(), case[key], atol=tolerance)


class PreBottleneck(nn.Module):
    """PreResNet-164: norm, ReLU and convolution three times."""

    def __init__(self, read, width, stride):
        super().__init__()
        sizes = [(read, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(a) for a, *_ in sizes)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, k, s, k // 2, bias=False) for a, b, k, s in sizes)
        self.shortcut = nn.Identity() if read == 4 * width else nn.Conv2d(read, 4 * width, 1, stride, bias=False)

    def forward(self, x):
        y = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = conv(torch.relu(norm(y)))
        return y + self.shortcut(x)


def preresnet164(classes):
    layers, read = [nn.Conv2d(3, 16, 3, padding=1, bias=False)], 16
    for width, stage in ((16, 1), (32, 2), (64, 2)):
        for index in range(18):
            layers.append(PreBottleneck(read, width, 1 if index else stage))
            read = 4 * width
    return nn.Sequential(
        *layers, nn.BatchNorm2d(read), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(read, classes)
    )


def test_golden_preresnet164_and_its_masks(golden):
    """DAM's network: a mask after the stem and after each of the three convolutions of a block."""
    case = golden["reference_networks"]["preresnet164"]
    with torch.device("meta"):
        model, x = preresnet164(10), torch.empty(1, 3, 32, 32)
        assert count_params(preresnet164(100)) == case["params_c100"]
    assert count_params(model) == case["params_c10"]
    assert count_macs(model, x) - 256 * 10 == case["conv_macs"]
    masked = [model[0], *(conv for block in model if isinstance(block, PreBottleneck) for conv in block.convs)]
    made = [GatedConv2d.from_dense(conv.to_empty(device="cpu"), gate="dam").gate for conv in masked]
    assert len(made) == case["dam_layers"]
    assert sum(gate.num_gates for gate in made) == case["gate_channels"]
    assert sum(p.numel() for gate in made for p in gate.parameters()) == case["betas"]
    assert gates.dam_penalty(made, 0.2).item() == pytest.approx(0.2)


def test_golden_trace_of_dam_on_linear_data(golden, toy):
    case, counts = golden["measured_linear_autoencoder"]["dam"], []

    def penalty(gate):
        counts.append(int(gate.is_open().sum()))
        return gates.dam_penalty([gate], case["lam"])

    gate = gates.DiscriminativeMask(50)
    assert gate.beta.item() == case["beta_init"]
    toy(gate, penalty, 10, seed=0, samples=case["N"])
    counts.append(int(gate.is_open().sum()))
    for step, active in case["trace_k10_seed0"]:
        assert abs(counts[step] - active) <= 2, (step, counts[step], active)
    assert counts[2000] == case["trace_k10_seed0"][-1][1]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("shape", "ABC")
def test_golden_counts_of_diffprune_on_linear_data(golden, toy, row, shape):
    """No further from the recorded runs than two gates, on either side: another data set of the same kind, and sums of
    another processor.

    (At the strongest penalty a run of 2000 steps is chaotic enough for that: 8 for a dimension of 10 on one with
    AVX-512, 10 without.)
    """
    case = golden["measured_linear_autoencoder"]["diffprune_candidates_k10_N2000"]
    lam, recorded = case["lam"][row], case["active_at_2000"][shape][row]
    assert gates.DiffPrune(50, shape=shape).phi[0].item() == case["phi_init"]
    made = [
        toy(gates.DiffPrune(50, shape=shape), lambda g: lam * g.open_probability().sum(), 10, s, samples=2000)
        for s in (0, 1)
    ]
    counts = [int(gate.is_open().sum()) for gate in made]
    assert min(counts) >= min(recorded) - 2, (counts, recorded)
    assert max(counts) <= max(recorded) + 2, (counts, recorded)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(
    ("variant", "key"), [("hard_constant", "mask_treated_as_constant"), ("hard", "signswish_surrogate_beta5")]
)
def test_golden_counts_of_masks_on_linear_data(golden, toy, variant, key, row):
    """Of a mask that is a constant gates never open again:
    at the weakest penalty one of these networks dies as those at the others do.
    """
    case = golden["measured_linear_autoencoder"]["dmp_candidates_k10_N2000"]
    lam, recorded = case["lam"][row], case["active_at_2000"][key][row]
    fresh = gates.DifferentiableMask(50, variant=variant)
    assert (fresh.alpha[0].item(), fresh.threshold) == (case["alpha_init"], case["t"])
    counts = []
    for seed in (0, 1):
        gate, trace = gates.DifferentiableMask(50, variant=variant), []

        def penalty(gate, trace=trace):
            trace.append(int(gate.is_open().sum()))
            return gates.scale_penalty([gate], lam)

        toy(gate, penalty, 10, seed, samples=2000)
        counts.append(int(gate.is_open().sum()))
        if variant == "hard_constant":
            assert all(after <= before for before, after in itertools.pairwise([*trace, counts[-1]]))
    slack = 0 if recorded == [0, 0] else 1 if row < 2 else 3  # with a weak penalty the count is still falling
    alive = [count for count in counts if count or variant == "hard" or recorded == [0, 0]]
    assert alive
    assert min(recorded) - slack <= min(alive) <= max(alive) <= max(recorded) + slack, (counts, recorded)
