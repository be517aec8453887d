"""convert(gate="dep_l0"): one generator for the model, in the order of its calls,
with the shapes of the published networks.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

import dampr
from dampr.gates import DependencyGenerator
from dampr.nn import GatedLayer
from dampr.prune.measure import count_macs, count_params
from tests import models
from tests.long import long_if

# the network, its golden numbers, which layers are gated, kernel areas of these, statistics of its generator
PUBLISHED: dict[str, Any] = {
    "vgg16-bn": ("vgg16_cifar10", [nn.Conv2d], [9] * 13, "vgg16"),
    "resnet56": ("resnet56_cifar10_conv_shortcut", ["0.0", "*.first.0"], [9] * 28, "resnet56"),
    "resnet50": ("resnet50_imagenet_stride_in_3x3", ["0.0", "*.reduce.0", "*.conv.0"], [49, *[1, 9] * 16], "resnet50"),
}


def generator_of(model: nn.Module) -> DependencyGenerator:
    (found,) = {m for m in model.modules() if isinstance(m, DependencyGenerator)}
    return found


@functools.cache
def published(name: str, **how: Any) -> tuple[nn.Module, DependencyGenerator]:
    """The network with gates, whose generator takes ``how``. Tests share it, so they leave it as it is."""
    model, x = models.FULL[name]()
    dampr.convert(
        model,
        gate=functools.partial(DependencyGenerator, **how) if how else "dep_l0",
        include=PUBLISHED[name][1],
        example_inputs=x,
    )
    return model, generator_of(model)


@pytest.mark.parametrize("name", [long_if(name, "resnet50") for name in PUBLISHED])
def test_golden_generators_of_the_published_networks_are_found_by_convert(golden: dict[str, Any], name: str) -> None:
    numbers, _, areas, statistics = PUBLISHED[name]
    case = golden["dep_l0"]["untrained_generator_statistics"][f"{statistics}_forward"]
    model, generator = published(name)
    assert (len(generator.sizes), sum(generator.sizes)) == (case["n_layers"], case["gates"])
    assert sum(p.numel() for p in generator.parameters()) == case["gen_params"]
    assert golden["reference_networks"][numbers]["gates"] == case["gates"]
    layers = [m for m in model.modules() if isinstance(m, GatedLayer)]
    assert len({layer.gate for layer in layers}) == len(areas)
    assert all(layer.per_sample for layer in layers)
    assert all(bool((layer.gate.deterministic() == 1).all()) for layer in layers)


@pytest.mark.parametrize(("name", "width"), [("vgg16-bn", 64), ("resnet56", None), ("resnet50", None)])
def test_golden_generators_run_backward_with_the_published_input(
    golden: dict[str, Any], name: str, width: int | None
) -> None:
    case = golden["dep_l0"]["untrained_generator_statistics"][f"{PUBLISHED[name][3]}_backward"]
    generator = DependencyGenerator(published(name)[1].sizes, direction="backward", input_width=width)
    assert sum(p.numel() for p in generator.parameters()) == case["gen_params"]


def test_convert_takes_a_generator_that_runs_backward(golden: dict[str, Any]) -> None:
    case = golden["dep_l0"]["untrained_generator_statistics"]["vgg16_backward"]
    model, generator = published("vgg16-bn", direction="backward", input_width=64)
    assert sum(p.numel() for p in generator.parameters()) == case["gen_params"]
    assert generator.direction == "backward"
    assert all(layer.per_sample for layer in model.modules() if isinstance(layer, GatedLayer))


@pytest.mark.parametrize("name", PUBLISHED)
def test_golden_penalties_with_every_gate_open(golden: dict[str, Any], name: str) -> None:
    """Where ln 100 leaves a gate, at pi = 0.998, the product of two counts is pi^2 of the golden sum."""
    numbers, _, areas, _ = PUBLISHED[name]
    case = golden["reference_networks"][numbers]
    generator = DependencyGenerator(published(name)[1].sizes, bias_init=100.0).double()
    pi = generator.gates()[0].open_probability()[0].item()
    if name == "resnet50":
        inputs = [
            3,
            64,
            64,
            *[256, 64] * 2,
            256,
            128,
            *[512, 128] * 3,
            512,
            256,
            *[1024, 256] * 5,
            1024,
            512,
            *[2048, 512] * 2,
        ]
        for as_published, total, key in (
            (True, "penalty_sum_as_coded_k4", "penalty_at_lam_5e_9_as_coded"),
            (False, "penalty_sum_intended_k2", "penalty_at_lam_5e_9_intended"),
        ):
            made = generator.filter_penalty(areas, inputs, 1.0, as_published).item()
            assert made / pi == pytest.approx(case[total], rel=1e-9)
            assert generator.filter_penalty(areas, inputs, 5e-9, as_published).item() / pi == pytest.approx(
                case[key], rel=1e-9
            )
        return
    lam, key = {"vgg16-bn": (1e-6, "penalty_at_lam_1e_6"), "resnet56": (5e-7, "penalty_at_lam_5e_7")}[name]
    stem = 9 * 3 * generator.sizes[0] * pi  # its input is not gated
    total = generator.penalty(areas, 1.0).item()
    assert (total - stem) / pi**2 + stem / pi == pytest.approx(case["cifar_penalty_sum_all_open"], rel=1e-9)
    assert lam * case["cifar_penalty_sum_all_open"] == pytest.approx(case[key], rel=1e-12)


@pytest.mark.parametrize("name", ["vgg16-bn", "resnet56"])
def test_golden_sizes_of_the_dense_networks(golden: dict[str, Any], name: str) -> None:
    model, x = models.FULL[name]()
    case = golden["reference_networks"][PUBLISHED[name][0]]
    assert count_macs(model, x[:1]) == case["macs"]
    biases = sum(m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)) if name == "vgg16-bn" else 0
    assert count_params(model) + biases == case.get("params", case.get("params_with_conv_bias_bn_fc"))


def test_golden_size_of_resnet50_on_imagenet(golden: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = models._resnet(models.Bottleneck, [3, 4, 6, 3], 4)
        model[-1] = nn.Linear(2048, 1000)
        x = torch.empty(1, 3, 224, 224)
    case = golden["reference_networks"]["resnet50_imagenet_stride_in_3x3"]
    assert count_params(model) == case["params"]
    assert count_macs(model, x) == case["macs"]


class Reordered(nn.Module):
    """Layers that are called in another order than they are defined in."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.second, self.first = nn.Linear(7, 3), nn.Linear(5, 7), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


def test_the_generator_follows_the_order_of_calls_and_not_of_definitions() -> None:
    model, x = Reordered(), torch.randn(6, 4)
    before = model.eval()(x)
    dampr.convert(model, gate="dep_l0", example_inputs=x)
    generator = generator_of(model)
    assert generator.sizes == (5, 7)
    assert (model.first.gate.index, model.second.gate.index) == (0, 1)
    assert torch.equal(model(x), before)
    assert model.first.gate.generator is model.second.gate.generator is generator
    with torch.no_grad():
        generator.bias_0.sub_(9.0)
        generator.weight_1.fill_(1.0)
    assert not bool(model.first.gate.is_open().any())
    assert not bool(model.second.gate.is_open().any()), "closed by way of the layer before it"


def test_draws_are_per_sample_unless_it_is_said_otherwise_or_cannot_be() -> None:
    x = torch.randn(6, 4)

    def converted(model: nn.Module, **how: Any) -> list[bool]:
        dampr.convert(model, gate="dep_l0", example_inputs=x, **how)
        return [m.per_sample for m in model.modules() if isinstance(m, GatedLayer)]

    assert converted(Reordered()) == [True, True]
    assert converted(Reordered(), per_sample=False) == [False, False]
    assert converted(Reordered(), granularity="input") == [True, True, True]
    assert converted(Reordered(), granularity="weight") == [False, False, False]
    assert converted(Reordered(), granularity=(2, 2)) == [False, False, False]
    with pytest.raises(ValueError, match="per_sample=True with granularity='weight'"):
        converted(Reordered(), granularity="weight", per_sample=True)
    model = dampr.convert(Reordered(), example_inputs=x)
    assert not any(m.per_sample for m in model.modules() if isinstance(m, GatedLayer))


def test_a_recurrent_layer_in_between_draws_once_per_call_and_is_not_left_out() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.gru, self.write = nn.Linear(4, 6), nn.GRU(6, 5, batch_first=True), nn.Linear(5, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.write(self.gru(torch.relu(self.read(x)))[0])

    x = torch.randn(3, 7, 4)
    model = dampr.convert(Network(), gate="dep_l0", example_inputs=x)
    assert isinstance(model.gru, dampr.nn.GatedGRU)
    assert generator_of(model).sizes == (6, 5)
    assert (model.read.per_sample, model.gru.per_sample) == (True, False)
    explicit = dampr.convert(Network(), gate="dep_l0", per_sample=True, example_inputs=x)
    assert "draws its gates once per call" in explicit.dampr_skipped["gru"]
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in generator_of(model).parameters())
