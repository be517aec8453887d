"""Whatever a model returns, and in whatever precision, the proof compares it: tensors in any object, place by place."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict
from typing import Any

import pytest
import torch
from torch import nn

import dampr
from dampr.prune import inputs

X = torch.randn(16, 12, generator=torch.Generator().manual_seed(0))


@dataclasses.dataclass
class Output:
    logits: Any
    note: str = "of a dataclass"


class Slots:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class Named(dict):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.hidden = value


class Net(nn.Module):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.wrap = nn.Linear(12, 20), nn.Linear(20, 5), wrap

    def forward(self, x: torch.Tensor) -> Any:
        return self.wrap(self.last(torch.relu(self.first(x))))


WRAPS = {
    "dataclass": Output,
    "distribution": lambda t: torch.distributions.Categorical(logits=t),
    "slots": Slots,
    "a dict with an attribute": Named,
    "nested": lambda t: OrderedDict(a=[Slots(Output((t, None)))]),
    "a mapping": lambda t: UserDict(a=t),
    "sparse": lambda t: t.to_sparse(),
    "complex": torch.view_as_complex,
}


@pytest.mark.parametrize("kind", WRAPS)
def test_tensors_are_found_in_any_output(kind: str) -> None:
    wrap = (
        WRAPS[kind] if kind != "complex" else lambda t: torch.view_as_complex(t[:, :4].reshape(-1, 2, 2).contiguous())
    )
    model = dampr.convert(Net(wrap), example_inputs=X)
    assert list(dampr.prune.gated_layers(model)) == ["first"]
    dampr.Budget(model, X, macs=0.5).finalize()
    small: Any = dampr.compact(model, example_inputs=X)
    assert small.first.out_features == 10
    small.last.weight.data *= 2  # a result that is off by a factor is seen
    assert inputs.differ(inputs.evaluate(model, X), inputs.evaluate(small, X), rtol=1e-5, atol=1e-5)


def test_an_output_without_a_tensor_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="output of Net: str without a tensor, expected one that can be compared"):
        dampr.convert(Net(lambda t: "text"), example_inputs=X)


@pytest.mark.parametrize("value", [float("-inf"), float("inf"), float("nan")])
def test_places_that_are_not_finite_have_to_match(value: float) -> None:
    model = dampr.convert(Net(lambda t: torch.where(torch.arange(5) > 2, value, t)), example_inputs=X)
    dampr.Budget(model, X, macs=0.5).finalize()
    small: Any = dampr.compact(model, example_inputs=X)
    assert small.dampr_manifest["max_abs_difference"] < 1e-5
    here, elsewhere = torch.tensor([1.0, value, 2.0]), torch.tensor([value, 1.0, 2.0])
    assert not inputs.differ([here], [here.clone()], rtol=0, atol=0)
    assert inputs.gap([here], [here.clone()]) == 0
    assert inputs.differ([here], [elsewhere], rtol=1e9, atol=1e9)
    assert inputs.gap([here], [elsewhere]) == float("inf")


def test_a_conversion_that_changes_finite_outputs_beside_infinite_ones_is_refused() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(12, 20), nn.Linear(20, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.last(torch.relu(self.first(x))) + (type(self.first) is nn.Linear)
            return y.masked_fill(torch.arange(5) > 2, -float("inf"))

    with pytest.raises(dampr.ConversionError, match="evaluation outputs changed"):
        dampr.convert(Looks(), example_inputs=X)


def conv_net() -> nn.Module:
    layers = [
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3),
        nn.BatchNorm2d(24),
        nn.ReLU(),
    ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(24 * 36, 5))


class Autocast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner, self.dtype = (
            nn.Sequential(nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 40), nn.Sigmoid(), nn.Linear(40, 5)),
            dtype,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=self.dtype):
            return self.inner(x).float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["model", "autocast"])
def test_half_precision_goes_all_the_way(kind: str, dtype: torch.dtype, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = conv_net().to(dtype) if kind == "model" else Autocast(dtype)
    x = torch.randn(4, 3, 8, 8, dtype=dtype) if kind == "model" else X
    dampr.convert(model, example_inputs=x)
    with torch.no_grad():
        for layer in dampr.prune.gated_layers(model).values():
            layer.gate.log_alpha.uniform_(-1, 2)  # gates between 0 and 1 are folded into weights of this precision
    report = dampr.Budget(model, x, macs=0.5).finalize()
    small = dampr.compact(model, example_inputs=x)
    assert report.reached <= report.target
    dampr.save(small, tmp_path / "small.safetensors")
    again = dampr.load(tmp_path / "small.safetensors", model=None if kind == "model" else Autocast(dtype))
    assert not inputs.differ(inputs.evaluate(small, x), inputs.evaluate(again, x), rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1e-4, 3e3, 1e6])
def test_the_size_of_the_outputs_sets_the_scale(scale: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 60), nn.Tanh(), nn.Linear(60, 60), nn.Sigmoid(), nn.Linear(60, 5))
    with torch.no_grad():
        model[4].weight.mul_(scale)
        model[4].bias.mul_(scale)
    dampr.convert(model, example_inputs=X)
    dampr.Budget(model, X, macs=0.3).finalize()
    dampr.compact(model, example_inputs=X)


class Graph(nn.Module):
    """A layer beside a sparse matrix of neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor, neighbours: torch.Tensor) -> torch.Tensor:
        return torch.sparse.mm(neighbours, self.last(torch.relu(self.first(x))))


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_sparse_example_inputs_stay_what_they_are(layout: Any) -> None:
    x = torch.randn(4, 5), torch.eye(4).flip(0).to_sparse(layout=layout)
    model: Any = dampr.convert(Graph(), example_inputs=x, include="first")
    model.first.gate.log_alpha.data[:5] = -9
    small = dampr.compact(model, example_inputs=x)
    assert small.first.out_features == 11
    torch.testing.assert_close(small.eval()(*x), model.eval()(*x))


def test_tolerances_follow_precision_and_can_be_given() -> None:
    model = nn.Linear(12, 5)
    x = torch.ones(2, 12)
    assert inputs.tolerances(model, [x], None, None)[1] == 1e-5
    assert inputs.tolerances(model.double(), [x.double()], None, None)[1] == 1e-9
    assert inputs.tolerances(model.bfloat16(), [x.bfloat16()], None, None)[1] == 3e-2
    assert inputs.tolerances(Autocast(torch.bfloat16), [x], None, None)[1] == 3e-2
    assert inputs.tolerances(model, [x.bfloat16()], 0.5, 0.25) == (0.5, 0.25)
    gated: Any = dampr.convert(nn.Sequential(nn.Linear(12, 60), nn.Sigmoid(), nn.Linear(60, 5)), example_inputs=X)
    gated[0].gate.log_alpha.data[::2] = -9
    with pytest.raises(dampr.CompactionError, match=r"atol=0, rtol=0"):
        dampr.compact(gated, example_inputs=X, atol=0.0, rtol=0.0)
