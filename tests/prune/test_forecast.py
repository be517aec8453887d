"""What a cost foretells is what compaction leaves, to the unit: widths that gates empty,
biases that closed units leave, constants.
"""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import dampr
from dampr.nn import GatedLinear, GatedParameter
from dampr.prune import gated_layers
from dampr.prune.cost import Cost
from dampr.prune.measure import count_macs, count_params

COUNT = {"macs": count_macs, "params": lambda model, x: count_params(model)}


def check(model, x):
    """Compare cost and compaction in both metrics; gives the small model."""
    costs = {metric: Cost(model, x, metric) for metric in COUNT}
    foretold = {metric: float(cost(cost.decision())) for metric, cost in costs.items()}
    small = dampr.compact(model, x)
    assert foretold == {metric: count(small, x) for metric, count in COUNT.items()}
    return small


def close_half(model):
    """Close a random half of every gate vector, at least one gate."""
    for layer in gated_layers(model).values():
        gates = layer.gate.log_alpha.data
        gates[torch.randperm(len(gates))[: max(len(gates) // 2, 1)]] = -9.0


class Joined(nn.Module):
    """Two widths that are read side by side, in an order that ``join`` makes, and one of them also twice."""

    def __init__(self, join):
        super().__init__()
        self.a, self.b, self.join = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1), join
        self.c, self.d, self.head = nn.Conv2d(12, 6, 3, padding=1), nn.Conv2d(16, 6, 1), nn.Linear(6, 3)

    def forward(self, x):
        a, b = self.a(x).relu(), self.b(x).relu()
        y = self.c(self.join(a, b)).relu() + self.d(torch.cat([b, b], 1)).relu()
        return self.head(y.mean((2, 3)))


JOINS = {
    "side by side": lambda a, b: torch.cat([a, b], 1),
    "reversed": lambda a, b: torch.cat([b, a], 1),
    "backwards": lambda a, b: torch.cat([a, b], 1).flip(1),
    "rolled": lambda a, b: torch.cat([a, b], 1).roll(3, 1),
}


@pytest.mark.parametrize("join", JOINS.values(), ids=JOINS)
def test_a_width_that_the_gates_of_its_readers_empty_keeps_one_channel(join):
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for first, second, last in itertools.product(("a", "b", ""), ("all", "half", ""), ("all", "")):
        model = dampr.convert(Joined(join).double(), x, granularity="input")
        gates = {name: layer.gate.log_alpha.data for name, layer in gated_layers(model).items()}
        if set(gates) != {"a", "b", "c", "d", "head"}:
            assert join is JOINS["rolled"]
            return
        where = join(torch.zeros(1, 4, 1, 1), torch.ones(1, 8, 1, 1)).flatten()
        if first:
            gates["c"][where == float(first == "b")] = -9.0
        gates["d"][: {"all": 16, "half": 8, "": 0}[second]] = -9.0
        gates["head"][: 6 if last else 0] = -9.0
        small = check(model, x)
        assert min(small.a.out_channels, small.b.out_channels, small.head.in_features) >= 1


class Side(nn.Module):
    """Gates of both kinds in one width, one half of which has none where it is written."""

    def __init__(self):
        super().__init__()
        self.a, self.b = GatedLinear(5, 8), nn.Linear(5, 6)
        self.c, self.d = GatedLinear(14, 9, granularity="input"), nn.Linear(9, 3)

    def forward(self, x):
        return self.d(self.c(torch.cat([self.a(x).relu(), self.b(x).relu()], 1)).relu())


@pytest.mark.parametrize(("written", "read"), [(0, 0), (3, 4), (8, 0), (0, 8), (0, 14), (8, 14), (3, 14)])
def test_gates_where_a_width_is_written_and_where_it_is_read(written, read):
    model, x = Side().double(), torch.randn(4, 5, dtype=torch.float64)
    model.a.gate.log_alpha.data[:written] = -9.0
    model.c.gate.log_alpha.data[14 - read :] = -9.0
    check(model, x)


WIDTHS = {
    "layers": [nn.Linear(5, 8)],
    "parameters": [nn.Unflatten(1, (1, 5)), nn.ConvTranspose1d(1, 8, 1), nn.AdaptiveAvgPool1d(1), nn.Flatten()],
}


@pytest.mark.parametrize("first", WIDTHS.values(), ids=WIDTHS)
def test_a_width_whose_gates_are_all_closed_counts_as_the_channel_that_stays(first):
    x = torch.randn(4, 5, dtype=torch.float64)
    model = dampr.convert(nn.Sequential(*first, nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).double(), x)
    assert any(isinstance(layer, GatedParameter) for layer in gated_layers(model).values()) == (len(first) > 1)
    for layer in gated_layers(model).values():
        layer.gate.log_alpha.data[:] = -9.0
    check(model, x)


class Neighbours(nn.Module):
    """A graph network: code beside the layers multiplies what they write by a matrix of neighbours."""

    def __init__(self):
        super().__init__()
        self.register_buffer("near", torch.softmax(torch.randn(6, 6), -1))
        self.a, self.b, self.head = nn.Linear(5, 10), nn.Linear(10, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head((self.near @ self.b((self.near @ self.a(x)).relu())).relu().mean(1))


class OverTokens(nn.Module):
    """A layer over tokens, which costs as much as there are channels."""

    def __init__(self):
        super().__init__()
        self.a, self.tokens, self.b, self.head = nn.Linear(5, 12), nn.Linear(6, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        u, v = nn.functional.gelu(self.a(x)).chunk(2, -1)
        return self.head(self.b(u * self.tokens(v.transpose(1, 2)).transpose(1, 2)).relu())


class Scores(nn.Module):
    """Products of activations: a matrix of likenesses of what a layer writes."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.a(x).relu()
        return self.head((h @ h.transpose(1, 2) @ self.b(h)).relu())


@pytest.mark.parametrize("granularity", ["output", "input"])
@pytest.mark.parametrize("net", [Neighbours, OverTokens, Scores])
def test_products_that_depend_on_more_than_a_layer_reads_and_writes_are_counted(net, granularity):
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    model = dampr.convert(net().double(), x, granularity=granularity)
    assert granularity == "output" or net is not Scores or set(gated_layers(model)) == {"a", "head"}
    for _ in range(3):
        close_half(model)
        check(model, x)


class Einsums(nn.Module):
    """Products that torch computes elementwise where one channel is left to sum over."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(5, 6), nn.Linear(7, 3)
        self.up, self.down = nn.Parameter(torch.randn(2, 6, 8) * 0.3), nn.Parameter(torch.randn(2, 8, 7) * 0.3)

    def forward(self, x):
        h = torch.einsum("btd,hdk->bthk", self.first(x).relu(), self.up).relu()
        return self.head(torch.einsum("bthk, hko -> bto", h, self.down).relu())


@pytest.mark.parametrize("left", [1, 2])
def test_einsums_over_one_channel_are_counted_as_those_over_more(left):
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    model = dampr.convert(Einsums().double(), x)
    for layer in gated_layers(model).values():
        layer.gate.log_alpha.data[left:] = -9.0
    check(model, x)


class Packed(nn.Module):
    """Sequences of different lengths, whose last steps are written into memory."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 8), nn.Linear(12, 7), nn.Linear(7, 3)
        self.rnn = nn.LSTM(8, 6, batch_first=True, bidirectional=True)

    def forward(self, x):
        y = self.rnn(pack_padded_sequence(self.a(x).relu(), torch.tensor([5, 3]), batch_first=True))[0]
        return self.head(self.b(pad_packed_sequence(y, batch_first=True)[0]).relu())


def test_a_packed_layer_with_one_unit_left_does_not_keep_the_widths_behind_it():
    x = torch.randn(2, 5, 5, dtype=torch.float64)
    model = dampr.convert(Packed().double(), x)
    for layer in gated_layers(model).values():
        layer.gate.log_alpha.data[:] = -9.0
    small = check(model, x)
    assert (small.a.out_features, small.rnn.hidden_size, small.b.out_features) == (1, 1, 1)


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


CONSTANTS = {
    "sigmoid": nn.Sigmoid(),
    "softplus": nn.Softplus(),
    "cosine": Function(torch.cos),
    "shift": Function(lambda h: h.relu() + 1),
    "zero": nn.Tanh(),
}


@pytest.mark.parametrize("act", CONSTANTS.values(), ids=CONSTANTS)
@pytest.mark.parametrize("closed", ["none", "one", "half"])
@pytest.mark.parametrize("kind", ["linear", "convolution", "norm"])
def test_the_bias_that_a_constant_moves_into_is_counted(act, closed, kind):
    """What a closed unit still contributes makes a bias in layers that had none, once, however many contribute."""
    if kind == "linear":
        layers = [nn.Linear(9, 12), act, nn.Linear(12, 8, bias=False), act, nn.Linear(8, 3, bias=False)]
        x = torch.randn(5, 9)
    else:
        norms = [nn.BatchNorm2d(12), nn.BatchNorm2d(8)] if kind == "norm" else [nn.Identity(), nn.Identity()]
        convolutions = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 8, 1, bias=False)
        layers = [convolutions[0], norms[0], act, convolutions[1], norms[1], act, nn.Conv2d(8, 3, 3, bias=False)]
        x = torch.randn(2, 3, 9, 9)
    model = dampr.convert(nn.Sequential(*layers).double(), x.double())
    if closed == "half":
        close_half(model)
    elif closed == "one":
        next(iter(gated_layers(model).values())).gate.log_alpha.data[2] = -9.0
    check(model, x.double())


def test_a_budget_of_parameters_foretells_what_it_reaches():
    x = torch.randn(5, 9, dtype=torch.float64)
    layers = [nn.Linear(9, 12), nn.Sigmoid(), nn.Linear(12, 8, bias=False), nn.Sigmoid(), nn.Linear(8, 3, bias=False)]
    model = dampr.convert(nn.Sequential(*layers).double(), x)
    budget = dampr.Budget(model, x, params=0.5)
    report = budget.finalize()
    assert report.reached == float(budget.cost(budget.cost.decision())) == count_params(dampr.compact(model, x))


def test_constants_at_a_padded_border_are_seen_behind_gated_norms_too():
    """The half of a sigmoid behind a norm with gates stays at the border of the next convolution: gates on parameters,
    which leave none.
    """
    layers = [
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Sigmoid(),
        nn.Conv2d(8, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
    ]
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    model = dampr.convert(nn.Sequential(*layers, nn.Hardsigmoid(), nn.Conv2d(12, 4, 1, bias=False)).double(), x)
    close_half(model)
    assert not check(model, x).dampr_manifest["closed_but_kept"]


@pytest.mark.parametrize("tie", [True, False])
def test_constants_that_a_recurrent_layer_would_read_need_gates_on_its_weights(tie):
    """Without ties, which gates on parameters have, the layer that writes the constants is left out."""
    layers = [
        nn.Linear(9, 12),
        nn.Sigmoid(),
        nn.GRU(12, 8, batch_first=True),
        Function(lambda pair: pair[0]),
        nn.Linear(8, 3),
    ]
    x = torch.randn(2, 5, 9, dtype=torch.float64)
    model = dampr.convert(nn.Sequential(*layers).double(), x, tie=tie)
    assert tie or "as constants other than 0" in model.dampr_skipped["0"]
    assert not tie or set(model.dampr_skipped) == {"4"}
    close_half(model)
    small = check(model, x)
    assert not small.dampr_manifest["closed_but_kept"]
    assert small[0].out_features == (6 if tie else 12)
