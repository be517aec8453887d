"""Transposed convolutions with gates: values and gradients against float64, closed channels, draws,
and what is cut of them.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dampr
from dampr.nn import (
    GatedBatchNorm3d,
    GatedConv2d,
    GatedConv3d,
    GatedConvTranspose1d,
    GatedConvTranspose2d,
    GatedConvTranspose3d,
    GatedLinear,
)
from dampr.prune import inputs
from dampr.prune.cost import Cost
from dampr.prune.measure import count_macs
from tests.backends import ON_CPU

KINDS = {
    GatedConvTranspose1d: (nn.ConvTranspose1d, (7,)),
    GatedConvTranspose2d: (nn.ConvTranspose2d, (7, 5)),
    GatedConvTranspose3d: (nn.ConvTranspose3d, (5, 4, 3)),
}
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
every_granularity = pytest.mark.parametrize("granularity", ["output", "input"])
HOW: dict[str, Any] = {"stride": 2, "padding": 1, "output_padding": 1}


@every_kind
@every_granularity
@pytest.mark.parametrize("groups", [1, 2])
def test_a_fresh_layer_equals_the_dense_one_to_the_bit(kind: Any, granularity: str, groups: int) -> None:
    plain, size = KINDS[kind]
    dense = plain(4, 6, 3, groups=groups, **HOW).eval()
    gated = kind.from_dense(dense, granularity=granularity).eval()
    x = torch.randn(2, 4, *size)
    assert torch.equal(gated(x), dense(x))
    assert torch.equal(gated(x[0]), dense(x[0]))
    assert torch.equal(gated(x, [2 * n - 1 for n in size]), dense(x, [2 * n - 1 for n in size]))
    assert gated.weight is dense.weight
    fresh = kind(4, 6, 3, groups=groups, granularity=granularity, **HOW).eval()
    fresh.load_state_dict(dense.state_dict(), strict=True)
    assert torch.equal(fresh(x), dense(x))
    assert [name for name, _ in fresh.named_parameters()][:2] == ["weight", "bias"]


@every_kind
@every_granularity
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("family", ["hard_concrete", "dep_l0", "dam", "diffprune", "diffmask"])
def test_closed_gates_are_zero_rows_of_the_dense_layer(kind: Any, granularity: str, groups: int, family: str) -> None:
    torch.manual_seed(0)
    plain, size = KINDS[kind]
    dense, x = plain(4, 6, 3, groups=groups, **HOW).eval(), torch.randn(2, 4, *size)
    layer = kind.from_dense(copy.deepcopy(dense), granularity=granularity, gate=family).eval()
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-5, atol=1e-6)
    levels = layer.gate.levels()
    layer.gate.set_levels_(torch.where(torch.arange(len(levels)) >= 2, -3.0, levels))
    closed = set((~layer.gate.is_open()).nonzero().flatten().tolist())
    assert len(closed) == layer.gate.num_gates - 2
    assert layer.closed_channels() == ((closed, set()) if granularity == "output" else (set(), closed))
    z = layer.double().gate.deterministic().detach()
    gates = z.view(1, -1, *[1] * len(size))
    expected = layer._dense.forward(layer, x.double() * gates if granularity == "input" else x.double())
    expected = expected * gates if granularity == "output" else expected
    torch.testing.assert_close(layer(x.double()), expected)
    torch.testing.assert_close(layer.to_dense()(x.double()), expected)
    rows = (
        layer.to_dense().weight.detach().transpose(0, 1)
        if granularity == "output" and groups == 1
        else layer.to_dense().weight
    )
    if granularity == "input" or groups == 1:
        assert not rows[sorted(closed)].any()


@every_kind
@every_granularity
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("backend", ON_CPU)
def test_gradients_of_a_draw(kind: Any, granularity: str, per_sample: bool, backend: str) -> None:
    torch.manual_seed(0)
    _, size = KINDS[kind]
    layer = kind(4, 6, 3, granularity=granularity, per_sample=per_sample, groups=2, **HOW)
    x = torch.randn(3, 4, *size, requires_grad=True)

    def run(layer: Any, x: Tensor) -> list[Tensor]:
        torch.manual_seed(7)  # of the draw
        with dampr.backend(backend):
            y = layer(x)
            found = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
        return [y.detach(), *found]

    def composed(layer: Any, x: Tensor) -> list[Tensor]:
        torch.manual_seed(7)
        z = layer.gate(3) if per_sample else layer.gate()[None]
        z = z.view(*z.shape, *[1] * len(size))
        y = layer._dense.forward(layer, x * z) if granularity == "input" else layer._dense.forward(layer, x) * z
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]

    found = run(layer, x)
    exact = composed(copy.deepcopy(layer).double(), x.detach().double().requires_grad_())
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3)


def test_penalty_and_group_size_count_what_a_gate_switches_off() -> None:
    layer = GatedConvTranspose2d(4, 6, 3, groups=2)
    assert layer.group_size() == 2 * 9 + 1
    assert GatedConvTranspose2d(4, 6, 3, groups=2, granularity="input").group_size() == 3 * 9
    expected = (layer.gate.open_probability() * (2 * 9 + 1)).sum()
    torch.testing.assert_close(layer.penalty(), expected)
    squares = (
        torch.stack([(layer.weight[g * 2 : g * 2 + 2, c] ** 2).sum() for g in range(2) for c in range(3)])
        + layer.bias**2
    )
    torch.testing.assert_close(
        layer.penalty(prior_precision=2.0), (layer.gate.open_probability() * (19 + squares)).sum()
    )


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"granularity": "weight"}, "granularity='weight'"),
        ({"granularity": (2, 2)}, r"granularity=\(2, 2\)"),
        ({"per_sample": 2}, "per_sample=2"),
    ],
)
def test_what_it_does_not_take_is_refused_by_name(how: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        GatedConvTranspose2d(4, 6, 3, **how)
    with pytest.raises((TypeError, ValueError), match=message):
        GatedConvTranspose2d.from_dense(nn.ConvTranspose2d(4, 6, 3), **how)
    with pytest.raises(ValueError, match=r"input.shape=\(4, 4\)"):
        GatedConvTranspose2d(4, 6, 3)(torch.randn(4, 4))


def half(cost: Cost) -> None:
    for gate in cost.structure.gates:
        gate.set_levels_(torch.where(torch.arange(gate.num_gates) % 2 == 1, -3.0, gate.levels()))


def test_a_decoder_made_by_hand_is_cut() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 8 * 9),
        nn.Unflatten(1, (8, 3, 3)),
        GatedConvTranspose2d(8, 12, 4, stride=2, padding=1),
        nn.ReLU(),
        GatedConvTranspose2d(12, 6, 3, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 3, 3, padding=1),
    ).eval()
    x = torch.randn(2, 5)
    cost = Cost(model, x, "macs")
    half(cost)
    small = dampr.compact(model, example_inputs=x)
    assert (small[2].out_channels, small[4].in_channels, small[4].out_channels, small[6].in_channels) == (6, 6, 3, 3)
    assert count_macs(small, x) == int(cost(cost.decision()))
    torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-6)
    large = dampr.expand(small)
    assert large[4].weight.shape == (12, 6, 3, 3)
    torch.testing.assert_close(large(x), small(x), rtol=1e-5, atol=1e-6)


def test_a_network_of_volumes_has_its_gates_in_its_norms() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv3d(2, 8, 3, padding=1),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.Conv3d(8, 6, 3, padding=1, stride=2),
        nn.BatchNorm3d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )
    x = torch.randn(4, 2, 6, 6, 6)
    for _ in range(3):
        model(torch.randn(8, 2, 6, 6, 6))
    before = model.eval()(x)
    dampr.convert(model, example_inputs=x)
    assert torch.equal(model(x), before)
    kinds = {type(m) for m in dampr.prune.gated_layers(model).values()}
    assert kinds == {GatedBatchNorm3d}
    cost = Cost(model, x, "macs")
    half(cost)
    small = dampr.compact(model, example_inputs=x)
    assert small[0].out_channels == small[3].in_channels == 4
    assert count_macs(small, x) == int(cost(cost.decision()))
    torch.testing.assert_close(inputs.evaluate(small, x), inputs.evaluate(model, x), rtol=1e-5, atol=1e-6)


def test_volumes_without_norms_have_their_gates_in_the_convolution() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv3d(2, 8, 3), nn.ReLU(), nn.Conv3d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)
    ).eval()
    x = torch.randn(2, 2, 6, 6, 6)
    dampr.convert(model, example_inputs=x)
    assert type(model[0]) is GatedConv3d
    half(Cost(model, x, "macs"))
    small = dampr.compact(model, example_inputs=x)
    assert small[0].out_channels == 4
    torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-6)
    assert not any(isinstance(m, (GatedConv2d, GatedConv3d, GatedLinear)) for m in small.modules())
