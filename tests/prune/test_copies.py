"""Copies of modules, runs without arithmetic, and trials of cuts that look at shapes first."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from dampr.prune import copies, flow, inputs, unit_search
from dampr.prune.measure import count_macs
from dampr.prune.meta import OnMeta, computed
from dampr.prune.unit_trials import Shapes
from dampr.prune.units import trace_units


class Keeps(nn.Module):
    """A dict that two modules have, a tied weight, a set, a hook, a tensor with a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.first.shared = self.second.shared = {"calls": [], "of": self.first}  # type: ignore[assignment]
        self.empty = self.first.nothing = {}  # type: ignore[assignment]
        self.names = {"a", "b"}
        self.register_buffer("count", torch.zeros(3), persistent=False)
        self.last: Any = None
        self.first.register_forward_hook(lambda module, args, out: module.shared["calls"].append(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = self.second(self.first(x).relu())
        return self.last


MODELS = {
    "keeps": Keeps,
    "recurrent": lambda: nn.LSTM(4, 5, 2),
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)),
    "attention": lambda: nn.MultiheadAttention(8, 2),
    "norms": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Upsample(2)),
}


def attributes(module: nn.Module) -> Any:
    return [(name, type(m), sorted(vars(m))) for name, m in module.named_modules(remove_duplicate=False)]


@pytest.mark.parametrize("kind", MODELS)
def test_a_copy_is_what_deepcopy_makes(kind: str) -> None:
    model = MODELS[kind]()
    made, expected = copies.deep(model, {}), copy.deepcopy(model)
    assert attributes(made) == attributes(expected)
    for (name, a), (other, b) in zip(made.state_dict().items(), expected.state_dict().items(), strict=True):
        assert name == other
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    for own, m in zip(model.modules(), made.modules(), strict=True):
        assert own is not m
        assert all(vars(own)[name] is not vars(m)[name] for name in ("_parameters", "_forward_hooks", "_modules"))


def test_what_modules_share_their_copies_share() -> None:
    model = Keeps()
    model(torch.ones(2, 4))
    made: Any = inputs.copied(model)
    assert made.first.weight is made.second.weight is not model.first.weight
    assert made.first.shared is made.second.shared is not model.first.shared
    assert made.first.shared["of"] is made.first
    assert made.empty is made.first.nothing is not model.empty
    assert made.names == model.names
    assert made.names is not model.names
    assert made.last.grad_fn is None
    made(torch.ones(2, 4))
    assert (len(made.first.shared["calls"]), len(model.first.shared["calls"])) == (2, 1)
    twin: Any = inputs.twin(model)
    assert twin.first.weight is model.first.weight
    assert twin.count is not model.count


def test_meta_twins_have_shapes_and_no_values() -> None:
    model = Keeps()
    twin: Any = inputs.Twins(model, meta=True).make()
    assert all(t.is_meta for t in (*twin.parameters(), *twin.buffers()))
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert twin.first.weight is twin.second.weight
    assert inputs.counterparts(twin, model)[twin.first.weight] is model.first.weight


OPERATORS = {
    "layer_norm": lambda x: torch.native_layer_norm(x, [6], None, None, 1e-5),
    "transposed": lambda x: x.transpose(0, 1) * 2,
    "by an int": lambda x: x / 2,
    "split": lambda x: x.split(2, 1),
    "cat": lambda x: torch.cat([x, x.t().t()]),
    "in place": lambda x: x.clone().add_(1),
}


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operators_without_arithmetic_give_the_form_of_those_with_it(kind: str, dtype: torch.dtype) -> None:
    x = torch.randn(4, 6, dtype=dtype)
    expected = inputs.tensors(OPERATORS[kind](x))
    for _ in range(2):  # the second from what is known
        with OnMeta():
            found = inputs.tensors(OPERATORS[kind](x))
        assert all(t.is_meta for t in found)
        assert [(t.shape, t.stride(), t.dtype) for t in found] == [(t.shape, t.stride(), t.dtype) for t in expected]


def test_known_results_are_fresh_tensors_and_numbers_count_by_their_types() -> None:
    x = torch.empty(3, device="meta", dtype=torch.int64)
    func = torch.ops.aten.mul.Scalar
    first, second = computed(func, (x, 2), {}), computed(func, (x, 2), {})
    assert first is not second
    assert computed(func, (x, 2.0), {}).dtype is torch.float32
    assert second.dtype is torch.int64


def test_what_is_changed_in_place_is_itself_and_a_change_of_shape_is_made_each_time() -> None:
    for _ in range(2):  # the second from what is known
        x = torch.empty(4, 6, device="meta")
        assert computed(torch.ops.aten.hardswish_.default, (x,), {}) is x
        assert computed(torch.ops.aten.transpose_.default, (x, 0, 1), {}) is x
        assert x.shape == (6, 4)
        with pytest.raises(RuntimeError):
            computed(torch.ops.aten.add_.Tensor, (x, torch.empty(5, device="meta")), {})


class Asks(nn.Module):
    """Looks at a value on its way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        return self.second(x * 2 if float(x.sum()) > 0 else x)


def test_models_that_ask_for_values_are_counted_and_followed() -> None:
    model, x = Asks(), torch.ones(3, 6)
    assert count_macs(model, x) == 3 * (6 * 8 + 8 * 2)
    found = flow.Flow(model, x, set())
    assert list(found.calls) == [model.first, model.second]
    assert found[model.first].outputs[0].operation == "ReluBackward0"


def test_a_flow_without_arithmetic_has_the_modules_and_parameters_of_the_model() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.gain = nn.Linear(6, 8), nn.Parameter(torch.ones(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) * self.gain

    model = Scaled()
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = flow.Flow(model, torch.ones(2, 6), set())
    assert {node.module for node in found[model.layer].outputs[0].inputs} == {model.layer, model.gain}
    assert all(torch.equal(p, before[name]) and not p.is_meta for name, p in model.named_parameters())


class Two(nn.Module):
    """Two families of hidden units, the heads of an attention beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 3
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)
        self.up, self.down, self.head = nn.Linear(12, 10), nn.Linear(10, 12), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        x = x + self.proj(y.transpose(1, 2).reshape(b, n, -1))
        return self.head(x + self.down(self.up(x).relu()))


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 4))


@pytest.mark.parametrize(("make", "said"), [(Two, True), (plain, True), (plain, False)])
def test_shapes_that_mislead_leave_the_placement_as_it_is(
    make: Any, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(2, 5, 12)
    units = trace_units(model, x)
    expected = unit_search.place(model, units, x)
    assert expected.groups
    monkeypatch.setattr(Shapes, "fits", lambda self, small: said)
    found = unit_search.place(model, units, x)
    assert sorted(found.classes()) == sorted(expected.classes())
    assert set(found.sizes) == set(expected.sizes)
    assert found.refused == expected.refused


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("affine", [True, False])
def test_a_batch_norm_on_shapes_returns_what_torch_returns(training, dtype, layout, affine) -> None:
    x = torch.randn(2, 3, 4, 5).to(dtype).contiguous(memory_format=layout)
    wide = torch.promote_types(dtype, torch.float32)
    weight = bias = torch.ones(3, dtype=wide) if affine else None
    rest = (weight, bias, torch.zeros(3, dtype=wide), torch.ones(3, dtype=wide), training, 0.1, 1e-5)
    func = torch.ops.aten.native_batch_norm.default
    expected, found = func(x, *rest), computed(func, OnMeta.of((x, *rest)), {})
    assert all(t.is_meta for t in found)
    assert [(t.shape, t.stride(), t.dtype) for t in found] == [(t.shape, t.stride(), t.dtype) for t in expected]


def test_a_batch_norm_of_another_width_raises_on_shapes_too() -> None:
    x, narrow = torch.empty(2, 3, 4, 5, device="meta"), torch.empty(2, device="meta")
    with pytest.raises(RuntimeError):
        computed(torch.ops.aten.native_batch_norm.default, (x, narrow, narrow, narrow, narrow, False, 0.1, 1e-5), {})
