"""An index over a weight: any grouping of parameters under gates, in linear layers and convolutions,
with every family.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dampr
from dampr import gates
from dampr.nn import GatedConv1d, GatedConv2d, GatedLinear

FAMILIES: dict[str, Any] = {
    "hard_concrete": "hard_concrete",
    "dep_l0": "dep_l0",
    "dam": functools.partial(gates.DiscriminativeMask, init_beta=-1.0),
    "diffprune": "diffprune",
    "diffprune-stochastic": functools.partial(gates.DiffPrune, stochastic=True),
    "diffprune-straight_through": functools.partial(gates.DiffPrune, revive="straight_through"),
    "diffmask": "diffmask",
    "diffmask-scheduled": functools.partial(gates.DifferentiableMask, variant="smooth", slope_mode="scheduled"),
}


def groups(*shape: int, count: int = 5) -> torch.Tensor:
    """A random gate for each weight; every gate has some."""
    index = torch.arange(torch.Size(shape).numel()) % count
    return index[torch.randperm(len(index), generator=torch.Generator().manual_seed(1))].view(shape)


LAYERS: dict[str, Any] = {
    "linear": (lambda **how: GatedLinear(6, 4, granularity=groups(4, 6), **how), lambda: torch.randn(7, 6), F.linear),
    "conv2d": (
        lambda **how: GatedConv2d(3, 4, 2, granularity=groups(4, 3, 2, 2), **how),
        lambda: torch.randn(2, 3, 5, 5),
        F.conv2d,
    ),
    "grouped": (
        lambda **how: GatedConv2d(4, 6, 3, groups=2, granularity=groups(6, 2, 3, 3), **how),
        lambda: torch.randn(2, 4, 5, 5),
        functools.partial(F.conv2d, groups=2),
    ),
    "conv1d": (
        lambda **how: GatedConv1d(3, 4, 2, granularity=groups(4, 3, 2), **how),
        lambda: torch.randn(2, 3, 5),
        F.conv1d,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", LAYERS)
def test_every_weight_is_multiplied_by_the_gate_that_the_index_gives_it(
    cpu_backend: str, name: str, family: str
) -> None:
    build, data, function = LAYERS[name]
    layer, x = build(gate=FAMILIES[family]), data()
    assert (layer.gate.num_gates, layer.granularity) == (5, "index")
    if family == "hard_concrete":
        layer.gate.log_alpha.data.uniform_(-1, 1)
    leaves = [layer.weight, layer.bias, *layer.gate.parameters()]
    for training in (True, False):
        layer.train(training)
        torch.manual_seed(4)
        y = layer(x)
        torch.manual_seed(4)
        truth = function(x, layer.weight * layer.gate()[layer.index], layer.bias)
        torch.testing.assert_close(y, truth, rtol=1e-4, atol=1e-5)
        dy = torch.randn(y.shape)
        made, wanted = (torch.autograd.grad(t, leaves, dy, allow_unused=True, retain_graph=True) for t in (y, truth))
        for one, other in zip(made, wanted, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_open_what_it_costs_and_what_is_left_when_plain(name: str) -> None:
    build, data, _ = LAYERS[name]
    layer, x = build(), data()
    layer.gate.log_alpha.data.copy_(torch.tensor([-9.0, 9.0, 0.5, -9.0, 9.0]))
    pi, sizes = layer.gate.open_probability(), torch.bincount(layer.index.flatten())
    torch.testing.assert_close(layer.penalty(), (pi * sizes).sum())
    squares = torch.stack([layer.weight[layer.index == g].square().sum() for g in range(5)])
    expected = (pi * (0.3 * sizes + 0.05 * squares)).sum() + 0.05 * layer.bias.square().sum()
    torch.testing.assert_close(layer.penalty(0.3, 0.1), expected)
    plain = layer.eval().to_dense()
    torch.testing.assert_close(plain(x), layer(x), rtol=1e-5, atol=1e-6)
    shut = (layer.index == 0) | (layer.index == 3)
    assert torch.equal(plain.weight == 0, shut)


def test_a_row_whose_weights_are_all_closed_is_a_closed_channel() -> None:
    index = torch.tensor([[0, 0, 0], [1, 2, 1], [0, 2, 0], [1, 1, 1]])
    layer = GatedLinear(3, 4, granularity=index)
    layer.gate.log_alpha.data[1] = -9.0
    assert layer.closed_channels() == ({3}, set())
    layer.gate.log_alpha.data[0] = -9.0
    assert layer.closed_channels() == ({0, 3}, {0, 2})
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(4, 2)).eval()
    x = torch.randn(5, 3)
    small = dampr.compact(model, example_inputs=x)
    torch.testing.assert_close(small(x), model(x))
    assert type(small[0]) is nn.Linear


def test_from_dense_keeps_the_function_and_one_gate_may_reach_into_two_layers() -> None:
    x, model = torch.randn(5, 6), nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).eval()
    before = model(x)
    gate = gates.DiffPrune(7)
    model[0] = GatedLinear.from_dense(model[0], gate=gate, granularity=groups(4, 6, count=5))
    model[2] = GatedLinear.from_dense(model[2], gate=gate, granularity=groups(3, 4, count=7))
    torch.testing.assert_close(model(x), before)
    assert model[0].group_size().tolist() == [5, 5, 5, 5, 4, 0, 0]
    gate.phi.data[6] = -1.0
    assert bool((model[2].to_dense().weight[groups(3, 4, count=7) == 6] == 0).all())
    model.train()(x).sum().backward()
    assert gate.phi.grad is not None
    assert list(model[0].state_dict()) == ["weight", "bias", "gate.phi"]
    twin = copy.deepcopy(model).eval()
    assert torch.equal(twin(x), model.eval()(x))


def test_a_shared_draw_is_one_draw_and_differs_from_call_to_call() -> None:
    layer = GatedLinear(40, 30, bias=False, granularity=groups(30, 40, count=50))
    layer.gate.log_alpha.data.zero_()
    layer.weight.data.fill_(1.0)
    z = layer(torch.eye(40)).t()
    for g in range(50):
        assert len(set(z[layer.index == g].tolist())) == 1
    assert not torch.equal(z, layer(torch.eye(40)).t())


def test_surrogates_of_the_l0_count_over_groups_of_parameters() -> None:
    """S1, lambda sum |g| h(phi), and S2, lambda sum |g| Phi(mu / sigma), are what the penalty of a layer sums."""
    for options in ({}, {"stochastic": True}):
        layer = GatedLinear(6, 4, gate=gates.DiffPrune(5, **options), granularity=groups(4, 6))
        layer.gate.phi.data.uniform_(-0.2, 0.5)
        phi = layer.gate.phi.detach()
        opened = torch.special.ndtr(phi / 0.1) if options else torch.tanh(5 * phi.clamp(min=0))
        torch.testing.assert_close(
            dampr.penalty(layer, lam=0.01), 0.01 * (opened * torch.bincount(layer.index.flatten())).sum()
        )


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_explain_summary_and_compile_know_it() -> None:
    layer, x = GatedLinear(6, 4, granularity=groups(4, 6)), torch.randn(3, 6)
    assert dampr.explain(layer, x).route == dampr.explain(GatedLinear(6, 4, granularity="weight"), x).route
    assert "granularity='index'" in repr(layer)
    assert dampr.summary(layer).layers[0].granularity == "index"
    torch._dynamo.reset()
    compiled = torch.compile(layer.eval(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: GatedLinear(6, 4, granularity=groups(6, 4)),
            r"of shape \(6, 4\), expected int64 of shape \(4, 6\)",
        ),
        (lambda: GatedLinear(6, 4, granularity=torch.zeros(4, 6)), "granularity: got torch.float32"),
        (lambda: GatedConv2d(3, 4, 2, granularity=groups(4, 3)), r"expected int64 of shape \(4, 3, 2, 2\)"),
        (lambda: GatedLinear(6, 4, granularity=groups(4, 6) - 1), "its smallest value is -1, expected 0 or more"),
        (
            lambda: GatedLinear(6, 4, granularity=groups(4, 6), per_sample=True),
            "per_sample=True with an index of gates",
        ),
        (
            lambda: GatedLinear(6, 4, gate=gates.HardConcrete(3), granularity=groups(4, 6)),
            "gate.num_gates=3: expected 5",
        ),
        (lambda: GatedLinear(6, 4, granularity="index"), "granularity='index': expected"),
        (
            lambda: dampr.convert(nn.Sequential(nn.Linear(6, 4)), granularity=groups(4, 6)),
            "a tensor, which is of one weight",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(build: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        build()
