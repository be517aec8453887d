"""Operators that a trace met late: half of all units go, the rest computes the same and costs what was foretold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dampr
from dampr.prune import inputs
from dampr.prune.cost import Cost
from dampr.prune.measure import count_macs
from dampr.prune.modules import gates_of
from dampr.prune.units import rules, trace_units

Change = Callable[[Tensor], Tensor]


class Between(nn.Module):
    """A hidden layer of 16, something behind it, and one of 12."""

    def __init__(self, change: Change, kernel: int = 0) -> None:
        super().__init__()
        make: Any = (lambda i, o: nn.Conv2d(i, o, kernel, padding=kernel // 2)) if kernel else nn.Linear
        self.first, self.second, self.last = make(6, 16), make(16, 12), nn.Linear(12, 3)
        self.change, self.kernel = change, kernel

    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.second(self.change(F.gelu(self.first(x)))))
        return self.last(y.mean((2, 3)) if self.kernel else y)


def blurred(y: Tensor) -> Tensor:
    """By a filter that is as often there as there are channels."""
    return F.conv2d(y, torch.ones(1, 1, 3, 3, dtype=y.dtype).expand(y.shape[1], 1, 3, 3) / 9, None, 1, 1, 1, y.shape[1])


def edges(y: Tensor) -> Tensor:
    """Every channel as an image of its own."""
    return F.conv2d(y.flatten(0, 1).unsqueeze(1), torch.ones(1, 1, 3, 3, dtype=y.dtype), padding=1).view_as(y)


def turned(y: Tensor) -> Tensor:
    kept = y.clone()
    y.transpose_(1, 2).unsqueeze_(0)
    return y.squeeze_(0).transpose(1, 2) + kept


def spread(y: Tensor) -> Tensor:
    y.swapaxes_(0, 1).mul_(2)
    return y.swapaxes_(0, 1)


SEQUENCES: dict[str, Change] = {
    "log sigmoid": F.logsigmoid,
    "polar": lambda y: torch.polar(y.abs(), y).real,
    "complex": lambda y: (torch.complex(y, y) * torch.complex(y, -y)).real,
    "turned in place": turned,
    "swapped in place": spread,
}
IMAGES: dict[str, Change] = {
    "blurred": blurred,
    "edges": edges,
    "spread": lambda y: F.conv_transpose2d(
        y, y.new_ones(1, 1, 3, 3).expand(y.shape[1], -1, -1, -1), None, 1, 1, 0, y.shape[1]
    ),
    "rows": lambda y: F.conv1d(y.flatten(0, 2).unsqueeze(1), y.new_ones(1, 1, 3), padding=1).view_as(y),
    "doubled": lambda y: F.conv2d(
        y, y.new_ones(1, 1, 1, 1).expand(2 * y.shape[1], -1, -1, -1), None, 1, 0, 1, y.shape[1]
    )[:, ::2],
}


def check(model: nn.Module, x: Tensor) -> None:
    """Half of each vector of gates goes."""
    before = model(x)
    dampr.convert(model, x)
    torch.testing.assert_close(model.eval()(x), before)
    model.double()
    x = x.double()
    cost = Cost(model, x, "macs")
    for gate in cost.structure.gates:
        gate.set_levels_(torch.where(torch.arange(gate.num_gates) % 2 == 0, gate.levels(), -3.0))
    foretold, masked = int(cost(cost.decision())), inputs.evaluate(model, 2 * x)
    small = dampr.compact(model, x)
    assert count_macs(small, x) == foretold < cost.total
    assert not inputs.differ(masked, inputs.evaluate(small, 2 * x), 1e-12, 1e-12)


@pytest.mark.parametrize("name", SEQUENCES)
def test_what_lies_between_two_layers_of_a_sequence_is_followed(name: str) -> None:
    torch.manual_seed(0)
    model = Between(SEQUENCES[name])
    check(model, torch.randn(2, 4, 6))
    assert set(model.dampr_skipped) == {"last"}  # type: ignore[arg-type]


def test_what_changes_shapes_in_place_on_its_way_leaves_the_rest_of_a_model() -> None:
    torch.manual_seed(0)
    check(Between(lambda y: y.quantile(0.3, 1, keepdim=True)), torch.randn(2, 4, 6))


@pytest.mark.parametrize("name", IMAGES)
def test_products_with_filters_that_code_makes_cost_less_with_fewer_channels(name: str) -> None:
    torch.manual_seed(0)
    check(Between(IMAGES[name], kernel=3), torch.randn(2, 6, 8, 8))


class SegNet(nn.Module):
    """The places of the pooled values are the encoder's, the values the decoder's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.back, self.last = nn.Conv2d(12, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Any:
        x, places = F.max_pool2d(F.relu(self.first(x)), 2, return_indices=True)
        return self.last(F.max_unpool2d(F.relu(self.back(F.relu(self.inner(x)))), places, 2))


def test_pooled_values_and_their_places_are_one_width() -> None:
    torch.manual_seed(0)
    model = SegNet()
    units = trace_units(model, torch.randn(2, 3, 8, 8))
    assert units.classes("first.weight", 0) == units.classes("back.weight", 0)
    check(model, torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize(
    "change",
    [
        lambda y: y - y.sum(-1, keepdim=True) / 16,
        lambda y: y + y.square().sum(-1, keepdim=True).sqrt(),
        lambda y: y - torch.einsum("btc->bt", y).unsqueeze(-1),
        lambda y: y + y.sum((1, 2), keepdim=True).tanh(),
    ],
)
def test_what_an_open_unit_leaves_in_a_closed_one_is_seen_by_convert(change: Change) -> None:
    """With all units closed nothing is left there."""
    torch.manual_seed(0)
    model = dampr.convert(Between(change), torch.randn(2, 4, 6))
    assert model.dampr_skipped["first"] == "a sum reads it that no weight is in"  # type: ignore[index]
    check(Between(change), torch.randn(2, 4, 6))


def test_a_rule_that_fails_leaves_out_what_it_was_about(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(call: Any) -> Any:
        raise IndexError("no such dimension")

    monkeypatch.setitem(rules._TABLE, "flip", fails)
    model = dampr.convert(Between(lambda y: y.flip(1)), torch.randn(2, 4, 6))
    assert set(model.dampr_skipped) == {"first", "last"}  # type: ignore[arg-type]
    assert "called in an unknown way (no such dimension) (flip" in model.dampr_skipped["first"]  # type: ignore[index]


class Behind(nn.Module):
    """A layer that needs its input in full behind one with gates."""

    def __init__(self, first: nn.Module, attends: bool) -> None:
        super().__init__()
        self.first, self.attends = first, attends
        self.last: Any = nn.MultiheadAttention(15, 3, batch_first=True) if attends else nn.LayerNorm(15)
        self.head = nn.Sequential(nn.Linear(15, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        y = y[0] if isinstance(y, tuple) else y
        return self.head(self.last(y, y, y)[0] if self.attends else y + self.last(y))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("attends", [False, True])
def test_units_of_a_recurrent_layer_that_something_reads_in_full_have_no_gates(layers: int, attends: bool) -> None:
    torch.manual_seed(0)
    recurrent = nn.LSTM(6, 15, layers, batch_first=True)
    model = dampr.convert(Behind(recurrent, attends), torch.randn(2, 4, 6))
    assert model.first is recurrent
    check(Behind(recurrent, attends), torch.randn(2, 4, 6))


class Joined(nn.Module):
    """Two layers side by side, in front of an attention with two heads that needs all of their features."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        width = first + second
        self.first, self.second = nn.Linear(6, first), nn.Linear(6, second)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.head = nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Any:
        y = torch.cat([F.relu(self.first(x)), torch.tanh(self.second(x))], -1)
        return self.head(y + self.attention(y, y, y, need_weights=False)[0])


@pytest.mark.parametrize("widths", [(8, 8), (4, 6), (12, 4)])
def test_widths_that_a_layer_needs_equal_do_not_pass_because_they_once_were(widths: tuple[int, int]) -> None:
    """Half of the features and one of two heads leave an attention that runs; other shares do not."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6)
    model = dampr.convert(Joined(*widths), x)
    for closed in range(1, sum(widths), 3):
        trial = copy.deepcopy(model)
        for gate in gates_of(trial):
            at = torch.arange(gate.num_gates)
            gate.set_levels_(torch.where(at >= min(closed, gate.num_gates - 1), gate.levels(), -3.0))
        dampr.compact(trial, x)
