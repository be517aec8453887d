"""Dep-L0: the generator against its golden numbers, what an untrained one closes,
and one evaluation shared by all gates of a step.
"""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dampr
from dampr import gates, reference
from dampr.spec import hard_concrete

PRECISIONS = [(torch.float64, 1e-12), (torch.float32, 3e-6)]
VGG16 = [64, 64, 128, 128, 256, 256, 256, *[512] * 6]
RESNET56 = [*[16] * 10, *[32] * 9, *[64] * 9]
RESNET50 = [*[64] * 7, *[128] * 8, *[256] * 12, *[512] * 6]
NETWORKS = {
    "vgg16_forward": (VGG16, "forward", None),
    "vgg16_backward": (VGG16, "backward", 64),
    "resnet56_forward": (RESNET56, "forward", None),
    "resnet56_backward": (RESNET56, "backward", None),
    "resnet50_forward": (RESNET50, "forward", None),
    "resnet50_backward": (RESNET50, "backward", None),
}


def close(actual, expected, tolerance):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.detach().double(), expected, rtol=tolerance, atol=tolerance * 1e-3)


def published(case, dtype):
    generator = gates.DependencyGenerator([2, 2], input_width=3).to(dtype)
    with torch.no_grad():
        for layer in (1, 2):
            getattr(generator, f"weight_{layer - 1}").copy_(torch.tensor(case[f"W{layer}"], dtype=torch.float64))
            getattr(generator, f"bias_{layer - 1}").copy_(torch.tensor(case[f"b{layer}"], dtype=torch.float64))
    return generator


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_golden_generator_and_gates(golden, cpu_backend, dtype, tolerance):
    case = golden["dep_l0"]
    generator = published(case, dtype)
    for layer, (gate, log_alpha) in enumerate(zip(generator.gates(), generator(), strict=True), 1):
        close(log_alpha, case[f"log_alpha_{layer}"], tolerance)
        close(gate.open_probability(), case[f"p_nonzero_{layer}"], tolerance)
        close(gate.eval()(), case[f"z_det_{layer}"], tolerance)
        u = torch.tensor(case[f"u{layer}"], dtype=dtype)
        close(reference.gate(log_alpha, hard_concrete(), u), case[f"z_train_{layer}"], tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_golden_penalty_and_all_its_gradients(golden, dtype, tolerance):
    case = golden["dep_l0"]["cifar_penalty"]
    generator = published(golden["dep_l0"], dtype)
    total = generator.penalty([case["kernel"] ** 2] * 2, case["lam"], case["in_channels_first"])
    total.backward()
    close(total, case["value"], tolerance)
    for name, expected in case["grads"].items():
        made = getattr(generator, f"{'weight' if name[0] == 'W' else 'bias'}_{int(name[1]) - 1}").grad
        torch.testing.assert_close(
            made.double(), torch.tensor(expected, dtype=torch.float64), rtol=30 * tolerance, atol=1e-13
        )


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_golden_imagenet_penalty_as_coded_and_as_intended(golden, dtype, tolerance):
    case = golden["dep_l0"]["imagenet_penalty"]
    generator, areas = published(golden["dep_l0"], dtype), [k * k for k in case["kernel"]]
    close(generator.filter_penalty(areas, case["c_in"], case["lam"], as_published=True), case["as_coded_k4"], tolerance)
    close(generator.filter_penalty(areas, case["c_in"], case["lam"]), case["intended_k2"], tolerance)


def test_golden_penalties_of_whole_networks_with_all_gates_open(golden):
    networks = golden["reference_networks"]
    for sizes, name, lam, key in (
        (VGG16, "vgg16_cifar10", 1e-6, "penalty_at_lam_1e_6"),
        (RESNET56, "resnet56_cifar10_conv_shortcut", 5e-7, "penalty_at_lam_5e_7"),
    ):
        generator = gates.DependencyGenerator(sizes, init_scale=0.0, bias_init=100.0).double()
        open_ = generator.gates()[0].open_probability()[0].item()  # ln 100 leaves it at 0.998
        pairs = [3 * sizes[0] * open_, *(a * b * open_**2 for a, b in itertools.pairwise(sizes))]
        assert generator.penalty([9] * len(sizes), lam).item() == pytest.approx(lam * 9 * sum(pairs), rel=1e-9)
        whole = lam * 9 * (3 * sizes[0] + sum(a * b for a, b in itertools.pairwise(sizes)))
        assert whole == pytest.approx(networks[name][key], rel=1e-9)
        assert sum(sizes) == networks[name]["gates"]


def test_golden_constants(golden):
    case = golden["dep_l0"]
    assert math.atanh(hard_concrete("paper").lo / case["bound"]) == pytest.approx(
        case["preactivation_at_or_below_which_gate_is_off_at_eval"]
    )
    gate = gates.DependencyGenerator([1], init_scale=0.0, bias_init=3.0).double().gates()[0].eval()
    with torch.no_grad():
        gate.generator.bias_0.fill_(3.0)
    assert gate.log_alpha.item() == pytest.approx(case["bias_init_mean_log_alpha"], abs=1e-12)
    assert gate().item() == case["z_det_at_bias_init"]
    assert gate.open_probability().item() == pytest.approx(case["p_nonzero_at_bias_init"], abs=1e-12)
    baseline, hc = gates.HardConcrete(1).double().eval(), case["hc_baseline_init"]
    assert baseline.log_alpha.item() == hc["log_alpha"]
    assert baseline().item() == hc["z_det"]
    assert baseline.open_probability().item() == pytest.approx(hc["p_nonzero"], abs=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_an_untrained_generator_closes_what_the_published_one_does(golden, name):
    sizes, direction, width = NETWORKS[name]
    case = golden["dep_l0"]["untrained_generator_statistics"][name]
    off, pi, seeds = [], [], 12 if sizes is RESNET56 else 4
    for seed in range(seeds):
        torch.manual_seed(seed)
        generator = gates.DependencyGenerator(sizes, direction, width)
        with torch.no_grad():
            made = generator.gates()
            closed = [~gate.is_open() for gate in made]
            off.append(torch.cat(closed).float().mean().item())
            pi.append(torch.cat([gate.open_probability() for gate in made]).mean().item())
        assert not closed[0 if direction == "forward" else -1].any()  # the one computed first starts open
    assert (len(sizes), sum(sizes)) == (case["n_layers"], case["gates"])
    assert sum(p.numel() for p in generator.parameters()) == case["gen_params"]
    error = case["frac_off_at_eval_sd"] * (1 / seeds + 1 / case["seeds"]) ** 0.5
    assert abs(sum(off) / seeds - case["frac_off_at_eval_mean"]) < 5 * error
    assert abs(sum(off) / seeds - 0.07) < 0.01
    assert abs(sum(pi) / seeds - case["mean_p_nonzero"]) < 0.01


def test_backward_runs_from_the_last_layer_to_the_first():
    generator = gates.DependencyGenerator([5, 4, 3], "backward")
    assert generator.input_width == 3
    assert [p.shape for p in (generator.weight_2, generator.weight_1, generator.weight_0)] == [(3, 3), (4, 3), (5, 4)]
    a = math.log(100) * torch.tanh(generator.weight_2 @ torch.ones(3) + generator.bias_2)
    torch.testing.assert_close(generator()[2], a)
    a = math.log(100) * torch.tanh(generator.weight_1 @ a + generator.bias_1)
    torch.testing.assert_close(generator()[1], a)
    assert [log_alpha.shape for log_alpha in generator()] == [(5,), (4,), (3,)]


def network(**layer):
    generator = gates.DependencyGenerator([12, 10, 8])
    widths = zip([6, 12, 10], generator.sizes, generator.gates(), strict=True)
    return generator, nn.Sequential(*(dampr.nn.GatedLinear(a, b, gate=gate, **layer) for a, b, gate in widths))


class Counted(gates.DependencyGenerator):
    """Counts its evaluations."""

    runs = 0

    def _run(self, *args, **kwargs):
        self.runs += 1
        return super()._run(*args, **kwargs)


def counted():
    generator, model = network()
    generator.__class__ = Counted
    return generator, model


def test_model_parameters_has_the_generator_once_and_optimizer_groups_know_it():
    generator, model = network()
    own = list(generator.parameters())
    listed = [p for p in model.parameters() if any(p is q for q in own)]
    assert len(listed) == len(own) == 6
    weights, gate_parameters = dampr.param_groups(model, lr=0.1)
    assert {id(p) for p in gate_parameters["params"]} == {id(p) for p in own}
    assert not {id(p) for p in weights["params"]} & {id(p) for p in own}


def test_one_evaluation_serves_a_step_and_no_longer():
    generator, model = counted()
    optimizer, x = torch.optim.Adam(model.parameters(), lr=1e-2), torch.randn(4, 6)
    for step in range(1, 4):
        loss = model(x).square().mean() + generator.penalty([1, 1, 1], 1e-3) + 1e-3 * dampr.penalty(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert generator.runs == step
    with torch.no_grad():
        model.eval()(x)
        assert generator.runs == 4, "evaluation without gradients is a graph of its own"
        model(x)
    assert generator.runs == 5, "which serves each layer once"


@pytest.mark.parametrize("frozen", [False, True])
def test_an_evaluation_sees_what_was_written_through_data(frozen):
    """As averages of weights are swapped in and out; version counters do not tell of it."""
    generator, model = network()
    model.eval()
    x = torch.randn(4, 6)
    for p in generator.parameters():
        p.requires_grad_(not frozen)
    with torch.enable_grad() if frozen else torch.no_grad():
        before = model(x)
        for p in generator.parameters():
            p.data.mul_(-0.5)
        after = model(x)
    generator._may_keep = lambda: False
    assert not torch.allclose(after, before, atol=1e-3)
    torch.testing.assert_close(after, model(x))


def test_gradients_are_those_of_separate_evaluations():
    generator, model = network()
    x = torch.randn(4, 6)

    def gradients():
        torch.manual_seed(1)
        loss = model(x).square().mean() + generator.penalty([1, 2, 3], 1e-3)
        return torch.autograd.grad(loss, list(model.parameters()))

    shared = gradients()
    again = gradients()  # nothing changed, but the graph of the first evaluation is gone
    generator._may_keep = lambda: False
    for made, repeated, expected in zip(shared, again, gradients(), strict=True):
        assert torch.equal(made, repeated)
        torch.testing.assert_close(made, expected)


def test_whatever_changes_a_parameter_shows():
    generator, model = network()
    gate, other = model[1].gate, gates.DependencyGenerator([12, 10, 8])
    state = {key: value.clone() for key, value in other.state_dict().items()}
    seen = [gate.log_alpha.detach().clone()]

    def replace():
        generator.bias_1 = nn.Parameter(torch.randn(10))

    for change in (
        lambda: generator.bias_1.detach().add_(0.5),
        lambda: generator.load_state_dict(state),
        lambda: setattr(generator.bias_1, "data", generator.bias_1.data - 1),
        replace,
        lambda: generator.double(),
    ):
        change()
        seen.append(gate.log_alpha.detach().clone())
        generator._may_keep, keep = (lambda: False), generator._may_keep
        torch.testing.assert_close(gate.log_alpha.detach(), seen[-1])
        del generator._may_keep
        assert generator._may_keep() == keep()
    assert all(not torch.equal(a.double(), b.double()) for a, b in itertools.pairwise(seen[:-1]))


def test_gradient_modes_do_not_leak_into_each_other():
    generator, model = network()
    gate = model[2].gate
    with torch.no_grad():
        assert not gate.log_alpha.requires_grad
    assert gate.log_alpha.requires_grad
    with torch.inference_mode():
        assert gate.log_alpha.is_inference()
    assert not gate.log_alpha.is_inference()
    generator.requires_grad_(False)
    assert not gate.log_alpha.requires_grad


def test_accumulation_two_losses_and_retained_graphs_work():
    generator, model = counted()
    x = torch.randn(4, 6)
    for _ in range(2):  # accumulation: two backwards, no step
        model(x).sum().backward()
    first, second = model(x).sum(), model(x).square().sum()  # two forwards, one graph
    (first + second).backward()
    loss = generator.penalty([1, 1, 1], 1.0)
    loss.backward(retain_graph=True)
    loss.backward()
    generator.penalty([1, 1, 1], 1.0).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_copies_and_pickles_after_a_forward():
    generator, model = network()
    model(torch.randn(4, 6))
    twin = copy.deepcopy(model)
    assert twin[0].gate.generator is twin[2].gate.generator is not generator
    with torch.no_grad():
        generator.bias_0.add_(1.0)
    assert not torch.equal(twin[0].gate.log_alpha, model[0].gate.log_alpha)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("first_use_inside", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(first_use_inside, reentrant):
    generator, model = network()
    x = torch.randn(4, 6, requires_grad=True)

    def gradients(run):
        torch.manual_seed(2)
        model.zero_grad()
        start = 0.0 if first_use_inside else generator.penalty([1, 1, 1], 1e-2)
        (start + run(model[2], run(model[1], run(model[0], x))).square().mean()).backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients(lambda layer, t: layer(t))
    for made, expected in zip(
        gradients(lambda layer, t: checkpoint(layer, t, use_reentrant=reentrant)), plain, strict=True
    ):
        torch.testing.assert_close(made, expected)


def test_torch_func_sees_its_own_parameters():
    _, model = network()
    model.eval()
    x, twin = torch.randn(4, 6), copy.deepcopy(model)
    parameters = {key: p.detach() for key, p in model.named_parameters()}

    def loss(values):
        return torch.func.functional_call(twin, values, (x,)).square().mean()

    model(x).square().mean().backward()
    twin(x)
    made = torch.func.grad(loss)(parameters)
    for key, p in model.named_parameters():
        torch.testing.assert_close(made[key], p.grad)


def test_per_sample_draws_the_published_default():
    _, model = network(per_sample=True)
    x = torch.ones(64, 6)
    with torch.no_grad():
        model[1].gate.generator.bias_0.fill_(0.0)
        assert len({tuple(row) for row in (model[0](x) != 0).tolist()}) > 1
    model(torch.randn(4, 6)).sum().backward()


def test_a_layer_that_is_given_the_class_has_a_generator_of_its_own():
    for gate in ("dep_l0", gates.DependentHardConcrete):
        layer = dampr.nn.GatedLinear(8, 6, gate=gate).eval()
        assert torch.equal(layer.gate(), torch.ones(6))
    with pytest.raises(TypeError, match=r"generator=6: expected a DependencyGenerator"):
        gates.DependentHardConcrete(6, 0)
