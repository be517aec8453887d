"""Layers whose ``forward`` was set on the object, as accelerate and many scripts do, compute that and nothing else."""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dampr
from dampr.nn import GatedLayer, GatedParameter
from dampr.prune import copies
from dampr.prune.measure import count_macs
from tests.halves import cut_in_half


def net() -> nn.Sequential:
    torch.manual_seed(0)
    first, second = nn.Linear(8, 16), nn.Linear(16, 12)
    return nn.Sequential(first, nn.BatchNorm1d(16), nn.ReLU(), second, nn.ReLU(), nn.Linear(12, 4)).eval()


def as_a_method(model: nn.Sequential) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.linear(x, 2 * self.weight, self.bias) + 0.5

    model[0].forward = types.MethodType(forward, model[0])  # type: ignore[method-assign]


def around_the_old_one(model: nn.Sequential) -> None:
    old = model[0].forward
    model[0].forward = lambda x: 2 * old(x) + 1  # type: ignore[method-assign]


def around_both(model: nn.Sequential) -> None:
    """The second reads units of the first, so its own weight has gates."""
    first, second = model[0].forward, model[3].forward
    model[0].forward = lambda x: 2 * first(x)  # type: ignore[method-assign]
    model[3].forward = lambda x: second(x) - 0.5  # type: ignore[method-assign]


def as_accelerate_does(model: nn.Sequential) -> None:
    def new(module: Any, *args: Any) -> Tensor:
        y: Tensor = module.old(*args) * 3
        return y

    layer: Any = model[3]
    layer.old = layer.forward
    layer.forward = functools.update_wrapper(functools.partial(new, layer), layer.old)


def of_a_norm(model: nn.Sequential) -> None:
    old = model[1].forward
    model[1].forward = lambda x: old(x) - 0.2  # type: ignore[method-assign]


def of_a_relu(model: nn.Sequential) -> None:
    model[2].forward = lambda x: torch.sigmoid(x)  # type: ignore[method-assign]


def of_the_model(model: nn.Sequential) -> None:
    old = model.forward
    model.forward = lambda x: old(x) * 2 + 1  # type: ignore[method-assign]


def with_a_scale_beside(model: nn.Sequential) -> None:
    model[0].register_buffer("scale", torch.linspace(1, 2, 16))
    old = model[0].forward
    model[0].forward = lambda x: old(x) * model[0].scale  # type: ignore[method-assign]


WAYS = [
    as_a_method,
    around_the_old_one,
    around_both,
    as_accelerate_does,
    of_a_norm,
    of_a_relu,
    of_the_model,
    with_a_scale_beside,
]


@pytest.mark.parametrize("change", WAYS)
def test_a_forward_of_its_own_is_cut_as_it_is_masked(change: Callable[[nn.Sequential], None]) -> None:
    model, x = net(), torch.randn(6, 8)
    change(model)
    expected = model(x)
    dampr.convert(model, example_inputs=x)
    torch.testing.assert_close(model.eval()(x), expected)
    small = cut_in_half(model, x)
    y = small(x)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()  # nothing in the small model still belongs to the former one
    assert torch.equal(small(x), y)
    assert [small[i].out_features for i in (0, 3)] == [8, 6]


def test_without_inputs_such_a_layer_is_left_out_by_name() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    as_a_method(model)
    dampr.convert(model)
    assert not isinstance(model[0], GatedLayer)
    assert isinstance(model[2], GatedLayer)
    assert model.dampr_skipped["0"] == "its forward was set on the object, and no layer with gates computes that"


def test_gates_are_on_its_parameters() -> None:
    model = net()
    around_the_old_one(model)
    dampr.convert(model, example_inputs=torch.randn(6, 8))
    assert any(isinstance(module, GatedParameter) for module in model.modules())


def test_a_plan_ends_smaller() -> None:
    model, x = net().train(), torch.randn(32, 8)
    around_the_old_one(model)
    plan = dampr.Plan(model, x, macs=0.5, steps=60)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = plan.model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plan.step(optimizer)
    small = plan.finish().eval()
    assert count_macs(small, x) <= 0.5 * count_macs(net(), x)
    y = small(x)
    assert torch.equal(y, copy.deepcopy(small)(x))


class Behind:
    """An object that is no module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.held = {"f": function}


class Holder(nn.Module):
    """Functions that hold parts of it, directly and through others."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
        layer, stranger = self.layer, nn.Linear(3, 3)
        self.direct = lambda x: layer(x)
        inner = self.direct
        self.nested = lambda x: inner(x) + 1
        self.partial = functools.partial(lambda module, x: module(x), self.other)
        self.outside = lambda x: stranger(x)
        self.listed = [lambda x: layer(x), {"in a dict": (lambda x: layer(x),)}]
        self.behind, self.weak = Behind(lambda x: layer(x)), weakref.ref(layer)
        self.stranger = [stranger]  # in a list, so it is no part

        def again(x: Tensor, times: int = 1) -> Tensor:
            return again(layer(x), times=times - 1) if times else x

        again.note = "kept"  # type: ignore[attr-defined]
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        listed: Any = self.listed
        more: Any = [listed[0], listed[1]["in a dict"][0], self.behind.held["f"], self.weak()]
        return torch.stack([f(x) for f in (self.direct, self.nested, self.partial, self.again, *more)])


def test_functions_of_a_copy_hold_its_own_parts() -> None:
    model, x = Holder(), torch.randn(2, 3)
    expected, twin = model(x), copies.deep(model, {})
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(twin(x), expected)
    assert twin.outside is model.outside
    assert twin.again.note == "kept"
    assert twin.again.__defaults__ == (1,)
