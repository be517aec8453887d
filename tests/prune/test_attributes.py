"""What users put on layers stays when these are replaced, and what a model writes into itself is not seen by trials."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dampr
from dampr.prune import attributes
from dampr.prune.convert_checks import ConversionError
from tests.halves import cut_in_half, halved


class Linear(nn.Module):
    """Code that reads a number, a parameter and a module that it has put on its layers."""

    def __init__(self) -> None:
        super().__init__()
        first: Any = nn.Linear(8, 16)
        first.gain, first.scale, first.act = 2.0, nn.Parameter(torch.tensor(1.5)), nn.ReLU()
        self.first, self.second, self.head = first, nn.Linear(16, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        first: Any = self.first
        y: Tensor = self.head(F.relu(self.second(first.act(first(x) * first.gain * first.scale))))
        return y


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        norm: Any = nn.BatchNorm2d(8)
        norm.shift = 0.5
        self.conv, self.norm, self.relu, self.last = nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 5, 1)
        self.relu.note = "seen"  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.relu(self.norm(self.conv(x))))
        return y * self.norm.shift * len(str(self.relu.note))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        rnn: Any = nn.GRU(6, 8, batch_first=True)
        rnn.times = 3
        self.rnn, self.wide, self.head = rnn, nn.Linear(8, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.wide(self.rnn(x)[0] * self.rnn.times)))
        return y


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer: Any = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
        layer.rate, layer.self_attn.label, layer.linear1.k = 0.5, "four", 2.0
        self.first, self.layer, self.head = nn.Linear(6, 16), layer, nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self.layer
        y: Tensor = self.head(layer(self.first(x)) * layer.rate * layer.linear1.k)
        return y + len(layer.self_attn.label)


NETWORKS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "linear": (Linear, (4, 8)),
    "convolutional": (Convolutional, (2, 3, 7, 7)),
    "recurrent": (Recurrent, (2, 5, 6)),
    "encoder": (Encoder, (2, 5, 6)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_on_a_layer_stays_with_it(name: str) -> None:
    torch.manual_seed(0)
    (kind, shape), before = NETWORKS[name], NETWORKS[name][0]().state_dict().keys()
    model, x = kind().eval(), torch.randn(NETWORKS[name][1])
    expected = model(x)
    model = dampr.convert(model, example_inputs=x)
    torch.testing.assert_close(model.eval()(x), expected)
    small = cut_in_half(model, x)
    assert len(shape) > 1
    assert small.state_dict().keys() == before
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in kind().parameters())


def test_a_parameter_on_a_layer_is_the_same_one_and_is_trained() -> None:
    model, x = Linear(), torch.randn(4, 8)
    scale = model.first.scale
    model = dampr.convert(model, example_inputs=x)
    assert isinstance(model.first, dampr.nn.GatedLayer)
    assert model.first.scale is scale
    model(x).sum().backward()
    assert scale.grad is not None


def test_a_plan_keeps_what_is_on_layers() -> None:
    model, x = Linear(), torch.randn(16, 8)
    plan = dampr.Plan(model, x, macs=0.5, steps=60)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        plan.model(x).square().mean().backward()
        optimizer.step()
        plan.step(optimizer)
    small: Any = plan.finish()
    assert small.first.gain == 2.0
    assert isinstance(small.first.scale, nn.Parameter)
    assert type(small.first) is nn.Linear


@pytest.mark.parametrize("layer", [nn.Linear(2, 3), nn.Conv2d(2, 3, 1), nn.LSTM(2, 3, 2), nn.LayerNorm(3), nn.ReLU()])
def test_a_layer_that_nobody_has_touched_has_nothing_to_carry(layer: nn.Module) -> None:
    assert attributes._added(layer) == []


class Stateful(nn.Module):
    """A model that counts its calls and keeps averages, also in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head, self.calls, self.shapes = nn.Linear(8, 16), nn.Linear(16, 4), 0, list[torch.Size]()
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("seen", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.shapes.append(x.shape)
        h = F.relu(self.first(x))
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        self.seen.add_(h.detach().sum(0))
        y: Tensor = self.head(h)
        return y


def test_a_model_that_writes_into_itself_is_as_it_was() -> None:
    model, x = Stateful().eval(), torch.randn(4, 8)
    model(x)
    mean, seen = model.mean.clone(), model.seen.clone()

    def unchanged() -> bool:
        kept = torch.equal(model.mean, mean) and torch.equal(model.seen, seen)
        return kept and model.calls == 1 and len(model.shapes) == 1

    dampr.convert(model, example_inputs=x)
    assert unchanged()
    budget = dampr.Budget(model, x, macs=0.5)
    assert unchanged()
    halved(model)
    small = dampr.compact(model, example_inputs=x)
    assert unchanged()
    assert small.mean.shape == small.seen.shape == (8,)
    assert budget.total > 0


class Built(nn.Module):
    """A model that makes a layer in its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.ready = nn.Linear(8, 16), False

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        if not self.ready:
            self.head, self.ready = nn.Linear(h.shape[1], 4), True
        y: Tensor = self.head(h)
        return y


def test_layers_that_a_model_makes_in_its_first_call_stay_and_are_pruned() -> None:
    model, x = Built(), torch.randn(4, 8)
    dampr.convert(model, example_inputs=x)
    head = model.head
    model(x)
    assert model.head is head
    small = dampr.compact(halved(model), example_inputs=x)
    assert (small.first.out_features, small.head.in_features) == (8, 8)


LAYERS = {"first": nn.Linear(8, 16), "head": nn.Linear(16, 4)}


class Global(nn.Module):
    """Registers layers and calls them by another way, which no copy follows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = LAYERS["first"], LAYERS["head"]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = LAYERS["head"](F.relu(LAYERS["first"](x)))
        return y


class OfParameters(nn.Module):
    """Calls a function of its parameters, which no copy follows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        weight, bias = self.first.weight, self.first.bias
        self.run = lambda x: F.relu(F.linear(x, weight, bias))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.run(x))
        return y


@pytest.mark.parametrize("kind", [Global, OfParameters])
def test_a_model_whose_copies_compute_with_its_own_parameters_is_refused(kind: type[nn.Module]) -> None:
    model, x = kind(), torch.randn(4, 8)
    with pytest.raises(ConversionError, match="a copy of .* computes with 'first.weight' of the model itself"):
        dampr.convert(model, example_inputs=x)
    assert not any(isinstance(module, dampr.nn.GatedLayer) for module in model.modules())
