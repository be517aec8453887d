"""Layers of classes that users derive from torch's are pruned as far as torch's are."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import dampr
from dampr.prune import gated_layers
from dampr.prune.cost import Cost
from dampr.prune.latency import Latency
from dampr.prune.measure import count_macs
from tests.halves import finished


class Scaled(nn.Linear):
    def forward(self, x):
        return 1.5 * super().forward(x)


class Table(nn.Embedding):
    pass


class Net(nn.Module):
    def __init__(self, linear, embedding):
        super().__init__()
        self.table, self.first, self.second = embedding(20, 12), nn.Linear(12, 8), linear(8, 16)
        self.third, self.last = nn.Linear(16, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.first(self.table(x)).relu()
        return self.last(self.third(self.second(x).relu()).relu())


@pytest.mark.parametrize("linear", [nn.Linear, Scaled])
@pytest.mark.parametrize("embedding", [nn.Embedding, Table])
def test_every_width_between_layers_has_gates(linear, embedding):
    torch.manual_seed(0)
    x = torch.randint(0, 20, (4, 5))
    model = dampr.convert(Net(linear, embedding), example_inputs=x)
    vectors = gated_layers(model).values()
    assert sorted(len(layer.gate.parameter) for layer in vectors) == [6, 8, 12, 16]
    assert list(model.dampr_skipped) == ["last"]
    with torch.no_grad():
        for layer in vectors:
            layer.gate.parameter[::2] = -9.0
    cost = Cost(model, x, "macs")
    masked = model.eval()(x)
    small = dampr.compact(model, example_inputs=x)
    torch.testing.assert_close(small(x), masked, rtol=1e-4, atol=1e-5)
    assert count_macs(small, x) == 20 * (6 * 4 + 4 * 8 + 8 * 3 + 3 * 3) == cost(cost.decision())


class OwnGRU(nn.GRU):
    pass


class OwnLSTM(nn.LSTM):
    def forward(self, x, state=None):
        y, state = super().forward(x, state)
        return 1.5 * y, state


class Sequences(nn.Module):
    """A recurrent layer between linear ones."""

    def __init__(self, recurrent, features):
        super().__init__()
        self.first, self.recurrent = nn.Linear(6, 16), recurrent
        self.third, self.last = nn.Linear(features, 14), nn.Linear(14, 3)

    def forward(self, x):
        y = self.recurrent(self.first(x).relu())[0]
        return self.last(self.third(y[:, -1]).relu())


class Packed(Sequences):
    """The same with sequences of different lengths."""

    def forward(self, x):
        packed = pack_padded_sequence(self.first(x).relu(), torch.tensor([3, 5, 2, 5]), True, enforce_sorted=False)
        y = pad_packed_sequence(self.recurrent(packed)[0], batch_first=True)[0]
        return self.last(self.third(y).relu())


class InList(nn.Module):
    """Weights in a ParameterList or a ParameterDict."""

    def __init__(self, named):
        super().__init__()
        weights = [nn.Parameter(torch.randn(shape) / 3) for shape in ((8, 6), (7, 8), (3, 7))]
        self.weights = nn.ParameterDict({f"w{i}": w for i, w in enumerate(weights)}) if named else None
        if not named:
            self.weights = nn.ParameterList(weights)

    def forward(self, x):
        weights = self.weights
        for weight in weights.values() if isinstance(weights, nn.ParameterDict) else weights:
            x = F.linear(x.relu(), weight)
        return x


RECURRENT = {
    "GRU": lambda: Sequences(OwnGRU(16, 20, batch_first=True), 20),
    "two layers": lambda: Sequences(OwnLSTM(16, 20, num_layers=2, batch_first=True), 20),
    "both ways": lambda: Sequences(OwnLSTM(16, 20, bidirectional=True, batch_first=True), 40),
    "projected": lambda: Sequences(OwnLSTM(16, 20, proj_size=12, batch_first=True), 12),
    "packed": lambda: Packed(OwnGRU(16, 20, bidirectional=True, batch_first=True), 40),
    "dropout": lambda: Sequences(OwnGRU(16, 20, num_layers=2, dropout=0.2, bias=False, batch_first=True), 20),
}
HELD_BY_OTHERS = RECURRENT | {"list": lambda: InList(False), "dict": lambda: InList(True)}


def inputs_of(case):
    return torch.randn(4, 5, 6) if case in RECURRENT else torch.randn(4, 6)


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize("case", HELD_BY_OTHERS)
def test_parameters_that_a_list_holds_too_have_gates(case):
    torch.manual_seed(0)
    dense, x = HELD_BY_OTHERS[case](), inputs_of(case)
    expected = dense.eval()(x)
    model = dampr.convert(dense, example_inputs=x)
    torch.testing.assert_close(model(x), expected)
    assert model.dampr_skipped == ({"last": "its outputs are the model's own"} if case in RECURRENT else {})
    with torch.no_grad():
        for layer in gated_layers(model).values():
            layer.gate.parameter[::2] = -9.0
    cost, masked = Cost(model, x, "macs"), model(x)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.double().float()):
        torch.testing.assert_close(again(x), masked)
    small = dampr.compact(model, example_inputs=x)
    torch.testing.assert_close(small(x), masked, rtol=1e-4, atol=1e-5)
    assert count_macs(small, x) == cost(cost.decision()) < 0.5 * cost.total
    assert type(getattr(small, "recurrent", None)) in (OwnGRU, OwnLSTM, type(None))


def test_gates_of_a_derived_recurrent_layer_get_gradients_and_replaced_parameters_count():
    model, x = RECURRENT["two layers"](), torch.randn(4, 5, 6)
    model = dampr.convert(model, example_inputs=x)
    model(x).square().sum().backward()
    for layer in gated_layers(model).values():
        assert layer.gate.parameter.grad.abs().max() > 0
    assert all(parameter.grad is not None for parameter in model.parameters())
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters() if name.startswith("recurrent.weight")}
    model.eval()
    parameters = dict(model.named_parameters())
    replaced = torch.func.functional_call(model, zeros, (x,))
    with torch.no_grad():
        for name, zero in zeros.items():
            parameters[name].copy_(zero)
    torch.testing.assert_close(replaced, model(x))


class Paused(nn.GRU):
    """Calls a function between the beginning of its call and the product."""

    def pause(self):
        pass

    def forward(self, x):
        self.pause()
        return super().forward(x)


def test_threads_that_call_one_derived_recurrent_layer_have_its_gates(monkeypatch):
    """A thread that began first ends while the other is within its call."""
    torch.manual_seed(0)
    x = torch.randn(4, 5, 6)
    model = dampr.convert(Sequences(Paused(16, 20, batch_first=True), 20), example_inputs=x).eval()
    with torch.no_grad():
        for layer in gated_layers(model).values():
            layer.gate.parameter[::2] = -9.0
    expected, found = model(x), []
    began, inside, other = threading.Event(), threading.Event(), threading.Thread(target=lambda: found.append(model(x)))

    def pause(_):
        if threading.current_thread() is other:
            began.set()
            assert inside.wait(60)
        else:
            inside.set()
            other.join(60)

    monkeypatch.setattr(Paused, "pause", pause)
    other.start()
    assert began.wait(60)
    found.append(model(x))
    monkeypatch.undo()
    assert len(found) == 2
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize("case", ["GRU", "two layers", "projected"])
def test_a_plan_trains_saves_and_expands_a_derived_recurrent_layer(case, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(64, 5, 6)
    y = x.sum(1)[:, :3].argmax(1)
    plan = dampr.Plan(RECURRENT[case](), x[:4], macs=0.4, steps=40)
    small = finished(plan, lambda: F.cross_entropy(plan.model(x), y), 40, lr=1e-2).eval()
    assert count_macs(small, x) <= 0.4 * count_macs(RECURRENT[case](), x)
    dampr.save(small, tmp_path / "small.pt")
    loaded = dampr.load(tmp_path / "small.pt", RECURRENT[case]()).eval()
    torch.testing.assert_close(loaded(x), small(x))
    torch.testing.assert_close(dampr.expand(small).eval()(x), small(x), rtol=1e-4, atol=1e-5)


class Normed(Sequences):
    def forward(self, x):
        y = self.recurrent(self.first(x).relu())[0]
        return self.last(self.third(F.layer_norm(y, (20,))).relu())


class Returned(Sequences):
    def forward(self, x):
        y, state = self.recurrent(self.first(x).relu())
        return self.last(self.third(y).relu()), state


@pytest.mark.parametrize("net", [Normed, Returned])
def test_a_derived_layer_without_gates_is_named(net):
    model = dampr.convert(net(OwnGRU(16, 20, batch_first=True), 20), example_inputs=torch.randn(4, 5, 6))
    reason = {Normed: "a statistic is computed over its channels", Returned: "its outputs are the model's own"}[net]
    assert reason in model.dampr_skipped["recurrent"]


class ThreeByThree(nn.Conv2d):
    def __init__(self, read, written):
        super().__init__(read, written, 3, padding=1)


class Doubling(nn.GRU):
    def __init__(self, size):
        super().__init__(size, 2 * size, batch_first=True)


class Image(nn.Module):
    """Derived layers whose constructors take other arguments than torch's."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = ThreeByThree(3, 8), ThreeByThree(8, 16), ThreeByThree(16, 8)
        self.rows, self.last = Doubling(8), nn.Linear(16, 3)

    def forward(self, x):
        y = self.third(self.second(self.first(x).relu()).relu()).relu().mean(2)
        return self.last(self.rows(y.transpose(1, 2))[0][:, -1])


def test_layers_whose_constructors_take_other_arguments_are_timed():
    x = torch.randn(4, 3, 8, 8)
    model = dampr.convert(Image(), example_inputs=x)
    cost = Latency(model, x)
    assert {term.name for term in cost.terms} == {"first", "second", "third", "rows", "last"}
    assert 0 < cost(torch.zeros(cost.structure.size)) <= cost.total
