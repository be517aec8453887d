"""DAM's open gates are neighbours: a layer hands the op a view of its weight, and computes what all gates would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dampr
from dampr import functional
from dampr.gates import DiscriminativeMask
from dampr.nn import GatedConv1d, GatedConv2d, GatedLinear

N = 10
LAYERS: dict[str, Any] = {
    "linear": (lambda side, gate: GatedLinear(*side(7), granularity=side.granularity, gate=gate), (6,)),
    "conv1d": (lambda side, gate: GatedConv1d(*side(7), 3, padding=1, granularity=side.granularity, gate=gate), (2, 5)),
    "conv2d": (
        lambda side, gate: GatedConv2d(*side(7), 3, stride=2, padding=1, granularity=side.granularity, gate=gate),
        (2, 6, 5),
    ),
}


class Side:
    """Which of the two widths of a layer has the N gates."""

    def __init__(self, granularity: str) -> None:
        self.granularity = granularity

    def __call__(self, other: int) -> tuple[int, int]:
        return (other, N) if self.granularity == "output" else (N, other)


def build(name: str, granularity: str, beta: float, **gate: Any) -> tuple[Any, Tensor]:
    make, rest = LAYERS[name]
    layer = make(Side(granularity), DiscriminativeMask(N, init_beta=beta, **gate))
    shape = (*rest, layer.in_features) if name == "linear" else (rest[0], layer.in_channels, *rest[1:])
    return layer, torch.randn(shape, requires_grad=True)


def handed(monkeypatch: pytest.MonkeyPatch, layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the weight that the layer gave to its function."""
    seen: list[Tensor] = []
    name = "gated_linear" if isinstance(layer, GatedLinear) else type(layer)._function.__name__
    true = getattr(functional, name)

    def spy(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(weight)
        y: Tensor = true(x, weight, *args, **kwargs)
        return y

    with monkeypatch.context() as patch:
        if isinstance(layer, GatedLinear):
            patch.setattr(functional, name, spy)
        else:
            patch.setattr(type(layer), "_function", staticmethod(spy))
        y = layer(x)
    (weight,) = seen
    return y, weight


@pytest.mark.parametrize("beta", [-0.3, -2.6, -4.4])
@pytest.mark.parametrize("granularity", ["output", "input"])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("training", [True, False])
def test_the_open_part_of_the_weight_is_a_view(
    monkeypatch: pytest.MonkeyPatch, cpu_backend: str, name: str, granularity: str, beta: float, training: bool
) -> None:
    layer, x = build(name, granularity, beta)
    layer.train(training)
    start, stop = layer.gate.open_slice()
    assert 0 < start < stop == N
    y, weight = handed(monkeypatch, layer, x)
    along = 0 if granularity == "output" else 1
    assert weight.shape[along] == stop - start
    assert weight._base is layer.weight, "a copy"
    expected = layer.weight.select(along, start).data_ptr()
    assert weight.data_ptr() == expected

    monkeypatch.setattr(layer, "_open_range", lambda: None)
    whole, all_of_it = handed(monkeypatch, layer, x)
    assert all_of_it is layer.weight
    torch.testing.assert_close(y, whole, rtol=1e-5, atol=1e-6)
    leaves, dy = [x, layer.weight, layer.bias, layer.gate.beta], torch.randn_like(y)
    for made, wanted in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(whole, leaves, dy), strict=True):
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("granularity", ["output", "input"])
@pytest.mark.parametrize("name", LAYERS)
def test_all_open_and_none_open_are_the_whole_weight(
    monkeypatch: pytest.MonkeyPatch, name: str, granularity: str
) -> None:
    for beta, count in ((1.0, N), (-9.0, 0)):
        layer, x = build(name, granularity, beta)
        assert int(layer.gate.is_open().sum()) == count
        y, weight = handed(monkeypatch, layer, x)
        assert weight is layer.weight
        if not count and granularity == "output":
            assert not bool(y.any())


@pytest.mark.parametrize("shape", ["tanh", "linear", "piecewise_linear"])
@pytest.mark.parametrize("order", ["zero", "one"])
def test_every_shape_and_order_is_sliced_alike(
    monkeypatch: pytest.MonkeyPatch, cpu_backend: str, shape: str, order: str
) -> None:
    layer, x = build("linear", "output", -2.6, shape=shape, order=order, alpha=1.3, min_open=2)
    y, weight = handed(monkeypatch, layer, x)
    assert len(weight) == int(layer.gate.is_open().sum()) < N
    torch.testing.assert_close(
        y, layer.gate() * torch.nn.functional.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-6
    )


def test_a_layer_of_one_kept_unit_learns_and_is_compacted() -> None:
    layer = GatedLinear(6, N, gate=DiscriminativeMask(N, init_beta=-60.0, min_open=1))
    model, x = torch.nn.Sequential(layer, torch.nn.Linear(N, 2)), torch.randn(4, 6)
    model(x).sum().backward()
    assert layer.gate.open_slice() == (N - 1, N)
    assert bool(layer.gate.beta.grad != 0)
    small = dampr.compact(model.eval(), example_inputs=x)
    assert small[0].out_features == 1
    torch.testing.assert_close(small(x), model(x))


def test_an_image_without_a_batch_is_sliced_along_its_channels() -> None:
    layer, x = build("conv2d", "input", -2.6)
    torch.testing.assert_close(layer(x[0]), layer(x)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_neither_groups_nor_tracing_are_sliced() -> None:
    grouped = GatedConv2d(N, N, 3, groups=2, granularity="input", gate=DiscriminativeMask(N, init_beta=-2.6))
    x = torch.randn(2, N, 5, 5)
    truth = torch.nn.functional.conv2d(x * grouped.gate().view(-1, 1, 1), grouped.weight, grouped.bias, groups=2)
    torch.testing.assert_close(grouped(x), truth, rtol=1e-4, atol=1e-5)
    layer, x = build("linear", "output", -2.6)
    torch._dynamo.reset()
    torch.testing.assert_close(
        torch.compile(layer.eval(), fullgraph=True, backend="aot_eager")(x.detach()), layer(x.detach())
    )
