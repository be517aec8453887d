"""The cost of a decision is what compaction counts; between decisions it is multilinear.

Whole networks: test_models.py.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import dampr
from dampr.nn import (
    GatedActivation,
    GatedEmbedding,
    GatedGRU,
    GatedLinear,
    GatedLSTM,
    GatedMultiheadAttention,
    GatedResidual,
    GatedRNN,
    GatedTransformerDecoderLayer,
    GatedTransformerEncoderLayer,
)
from dampr.prune.cost import Cost
from dampr.prune.measure import count_macs, count_params
from tests.prune.test_models import close_at_random
from tests.prune.unit_networks import shaken

COUNT = {"macs": count_macs, "params": lambda model, _: count_params(model)}


class Tagger(nn.Module):
    def __init__(self, recurrent):
        super().__init__()
        self.embedding, self.recurrent = GatedEmbedding(20, 12), recurrent
        each = 2 if recurrent.bidirectional else 1
        self.second = GatedGRU(each * recurrent._width, 6, batch_first=True)
        self.head = nn.Linear(6, 20)

    def forward(self, words):
        return self.head(self.second(self.recurrent(self.embedding(words))[0])[0])


class Branches(nn.Module):
    """A closed residual branch takes the layers inside with it; gates of two elements each on what comes after."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(6, 8)
        inner = GatedResidual(nn.Sequential(GatedLinear(8, 16), nn.ReLU(), nn.Linear(16, 8)))
        self.outer = GatedResidual(nn.Sequential(inner, nn.Tanh(), nn.Linear(8, 8)))
        self.gate, self.head = GatedActivation(4, index=torch.arange(8) % 4), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.gate(self.outer(self.stem(x))))


class GatedReader(nn.Module):
    """What reads the recurrent layer has gates too, and is read by a plain layer."""

    def __init__(self, recurrent):
        super().__init__()
        self.recurrent, self.middle, self.head = recurrent, GatedLinear(recurrent._width, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.middle(self.recurrent(x)[0]).relu())


class Transformer(nn.Module):
    def __init__(self, **how):
        super().__init__()
        self.stem, self.memory = nn.Linear(6, 16), nn.Linear(6, 16)
        self.encoder = GatedTransformerEncoderLayer(16, 4, 24, batch_first=True, dropout=0.0, **how)
        self.decoder = GatedTransformerDecoderLayer(16, 4, 20, batch_first=True, dropout=0.0, **how)
        self.attention, self.head = GatedMultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 3)

    def forward(self, x):
        memory = self.encoder(self.memory(x))
        x = self.decoder(self.stem(x[:, :3]), memory)
        return self.head(self.attention(x, memory, memory, need_weights=False)[0])


def words():
    return torch.randint(0, 20, (3, 7))


CASES = {
    "lstm": lambda: (Tagger(GatedLSTM(12, 10, 2, batch_first=True)), words()),
    "bidirectional": lambda: (Tagger(GatedRNN(12, 10, 2, batch_first=True, bidirectional=True)), words()),
    "own widths": lambda: (Tagger(GatedLSTM(12, 10, 2, batch_first=True, bidirectional=True, widths="own")), words()),
    "own projections": lambda: (Tagger(GatedLSTM(12, 10, 2, proj_size=5, batch_first=True, widths="own")), words()),
    "projection": lambda: (Tagger(GatedLSTM(12, 10, proj_size=5, bias=False, batch_first=True)), words()),
    "gated reader": lambda: (GatedReader(GatedGRU(6, 10, batch_first=True)), torch.randn(3, 5, 6)),
    "gated reader of projections": lambda: (
        GatedReader(GatedLSTM(6, 10, proj_size=7, batch_first=True)),
        torch.randn(3, 5, 6),
    ),
    "branches": lambda: (Branches(), torch.randn(4, 6)),
    "transformer": lambda: (Transformer(), torch.randn(2, 5, 6)),
    "sublayers": lambda: (Transformer(parts=("heads", "neurons", "sublayers")), torch.randn(2, 5, 6)),
    "norms first": lambda: (Transformer(parts=("heads", "sublayers"), norm_first=True), torch.randn(2, 5, 6)),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("metric", ["macs", "params"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("case", CASES)
def test_a_decision_costs_what_compaction_counts(case, metric, seed):
    model, x = CASES[case]()
    cost = Cost(model, x, metric)
    assert cost.total == COUNT[metric](model, x) == int(cost(cost.decision()))
    torch.manual_seed(seed)
    close_at_random(model)
    for layer in dampr.prune.gated_layers(model).values():
        if layer.gate.num_gates == 1:  # residual branches
            nn.init.constant_(layer.gate.log_alpha, 3.0 if torch.rand(()) < 0.5 else -9.0)
    foretold, counted = int(cost(cost.decision())), COUNT[metric](dampr.compact(model, example_inputs=x), x)
    if case == "branches" and not model.outer.gate.is_open():
        assert foretold >= counted, (
            "what read the stream is gone, and its own gates, which are counted as cutting nothing, cut it"
        )
    else:
        assert foretold == counted


def test_input_gates_of_a_flattened_convolution():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 5)
    )
    x = torch.randn(2, 3, 8, 8)
    dampr.convert(model, granularity="input", example_inputs=x)
    cost = Cost(model, x, "macs")
    close_at_random(model)
    model[5].gate.log_alpha.data[16:32] = -9  # all positions of one channel
    assert int(cost(cost.decision())) == count_macs(dampr.compact(model, example_inputs=x), x)
    assert cost.structure.notes == {"0": "its width is the model's own input"}
    assert cost.prunable[3:].all()
    assert not cost.prunable[:3].any()


@pytest.mark.parametrize("act", [nn.Sigmoid, nn.Softplus, nn.ReLU])
def test_input_gates_do_not_see_what_a_closed_channel_would_have_been(act):
    """A convolution that pads with zeros reads nothing of a channel whose input gate is closed,
    whatever the channel holds.
    """
    layers = [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        act(),
        nn.Conv2d(8, 6, 3, padding=1),
        act(),
        nn.Conv2d(6, 2, 3, padding=1),
    ]
    model, x = shaken(nn.Sequential(*layers)), torch.randn(2, 3, 8, 8)
    dampr.convert(model, granularity="input", example_inputs=x)
    cost = Cost(model, x, "macs")
    close_at_random(model)
    model[0].gate.log_alpha.data.fill_(3.0)
    small = dampr.compact(model, example_inputs=x)
    assert int(cost(cost.decision())) == count_macs(small, x)
    assert not small.dampr_manifest["closed_but_kept"]


@pytest.mark.parametrize("case", ["branches", "lstm"])
def test_the_gradient_is_the_difference_that_a_gate_makes(case):
    model, x = CASES[case]()
    cost = Cost(model, x, "macs")
    start = cost.structure.start("outer.branch.0" if case == "branches" else "embedding")
    p = torch.rand(cost.structure.size, dtype=torch.float64).requires_grad_()
    cost(p).backward()
    for value in (0.0, 1.0):
        ends = [p.detach().index_fill(0, torch.tensor([start]), end) for end in (value, 1 - value)]
        assert p.grad[start] == pytest.approx(float(cost(ends[0]) - cost(ends[1])) * (2 * value - 1), rel=1e-9)


def test_what_cannot_be_cut_costs_the_same_and_says_why():
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    dampr.convert(model, exclude=["4"])
    cost = Cost(model, torch.randn(3, 6), "params")
    assert cost.structure.notes == {"0": "LayerNorm '1' computes statistics over its channels"}
    assert cost.prunable.tolist() == [False] * 8 + [True] * 6
    assert float(cost(torch.zeros(14))) == cost.total - 5 * 9 - 5 * 2  # one stays


def test_macs_of_a_learned_token_that_is_handed_on_are_counted():
    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.mix, self.head = nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(8, 12), nn.Linear(12, 3)

        def forward(self, x):
            return self.head(self.mix(self.token.expand(len(x), -1, -1)).relu() + self.mix(x).relu())

    model, x = Token(), torch.randn(2, 4, 8)
    macs = count_macs(model, x)
    assert macs == 2 * 8 * 12 + 8 * 8 * 12 + 8 * 12 * 3
    assert all(p.requires_grad for p in model.parameters())
    dampr.convert(model, example_inputs=x)
    assert dampr.Budget(model, x, macs=0.5, steps=8).finalize().reached <= macs / 2


class Graph(nn.Module):
    """A product beside its layers, with what no layer has: a matrix of neighbours."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second, self.head = (
            nn.Linear(6, 16),
            nn.BatchNorm1d(16),
            nn.Linear(16, 8),
            nn.Linear(8, 3),
        )

    def forward(self, x, neighbours):
        return self.head((neighbours @ self.second((neighbours @ self.first(x)).relu())).relu())


def test_products_beside_layers_are_counted():
    model, x = shaken(Graph()), (torch.randn(5, 6), torch.rand(5, 5))
    total = count_macs(model, x)
    dampr.convert(model, example_inputs=x)
    cost = Cost(model, x, "macs")
    close_at_random(model)
    assert cost.total == total
    assert int(cost(cost.decision())) == count_macs(dampr.compact(model, example_inputs=x), x)


class Attentive(nn.Module):
    """Attention without weights over the outputs of a recurrent layer."""

    def __init__(self, recurrent, features):
        super().__init__()
        self.recurrent, self.last = recurrent, nn.Linear(features, 3)

    def forward(self, x):
        y, _ = self.recurrent(x)
        return self.last((y @ y.transpose(1, 2)).softmax(-1) @ y)


@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_products_of_the_outputs_of_a_recurrent_layer_are_counted(layers, both_ways):
    torch.manual_seed(0)
    recurrent = nn.LSTM(6, 10, layers, batch_first=True, bidirectional=both_ways)
    x = torch.randn(4, 5, 6)
    model = dampr.convert(Attentive(recurrent, 10 * (1 + both_ways)), example_inputs=x)
    cost = Cost(model, x, "macs")
    close_at_random(model)
    small = dampr.compact(model, example_inputs=x)
    assert getattr(small.recurrent, "rnn", small.recurrent).hidden_size < 10
    assert int(cost(cost.decision())) == count_macs(small, x)


@pytest.mark.parametrize("how", [{"per_sample": True}, {"tie": False}, {"include": nn.Conv2d, "per_sample": True}])
@pytest.mark.parametrize("case", ["instance norm", "sigmoid", "two norms", "prelu"])
def test_layers_whose_closed_channels_would_stay_have_no_gates(case, how):
    """Constants at a padded border: convert leaves these layers out where no gates on parameters may take their
    place.
    """
    first = {
        "instance norm": lambda: [nn.InstanceNorm2d(8, affine=True, track_running_stats=True), nn.SiLU()],
        "sigmoid": lambda: [nn.Sigmoid()],
        "two norms": lambda: [nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8)],
        "prelu": lambda: [nn.PReLU(8)],
    }[case]()
    layers = [
        nn.Conv2d(3, 8, 3, padding=1),
        *first,
        nn.Conv2d(8, 6, 3, padding=1),
        nn.PReLU(6),
        nn.Conv2d(6, 2, 3, padding=1),
    ]
    model, x = shaken(nn.Sequential(*layers)), torch.randn(2, 3, 8, 8)
    for norm in (part for part in model if isinstance(part, nn.InstanceNorm2d)):
        nn.init.uniform_(norm.bias, 0.5, 1.0)
    dampr.convert(model, example_inputs=x, **how)
    stays = case != "prelu"
    assert ("padded border" in model.dampr_skipped.get("0", "")) == stays
    costs = {metric: Cost(model, x, metric) for metric in COUNT}
    assert costs["macs"].prunable.all()
    close_at_random(model)
    small = dampr.compact(model, example_inputs=x)
    assert (small[0].out_channels == 8) == stays
    assert small[-1].in_channels < 6
    assert not small.dampr_manifest["closed_but_kept"]
    assert {metric: int(cost(cost.decision())) for metric, cost in costs.items()} == {
        metric: COUNT[metric](small, x) for metric in COUNT
    }


@pytest.mark.parametrize("case", ["linear", "conv", "norm", "no gain", "lstm", "attention"])
@pytest.mark.parametrize("family", ["hard_concrete", "dep_l0", "dam", "diffprune", "diffmask"])
def test_gates_of_a_model_in_double_precision_are_as_exact_as_it_is(case, family):
    """A gate between 0 and 1 in float32 would be as far off as compaction does not let pass."""
    torch.manual_seed(0)
    words, image = torch.randn(3, 5, 6, dtype=torch.float64), torch.randn(3, 3, 6, 6, dtype=torch.float64)
    model, x = {
        "linear": lambda: (nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 3)), words),
        "conv": lambda: (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)), image),
        "norm": lambda: (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)), image),
        "no gain": lambda: (
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False), nn.ReLU(), nn.Conv2d(8, 2, 1)),
            image,
        ),
        "lstm": lambda: (nn.Sequential(nn.LSTM(6, 10, proj_size=8, batch_first=True), First(), nn.Linear(8, 3)), words),
        "attention": lambda: (
            nn.Sequential(nn.TransformerEncoderLayer(6, 2, 12, 0.0, batch_first=True), nn.Linear(6, 3)),
            words,
        ),
    }[case]()
    model = (model if case == "no gain" else shaken(model)).double().eval()
    if case == "no gain" and family in ("dam", "diffprune"):
        pytest.skip("nothing in the norm could make up for fresh gates that are not 1")
    dampr.convert(model, example_inputs=x, gate=family)
    for gate in dict.fromkeys(layer.gate for layer in dampr.prune.gated_layers(model).values()):
        gate.set_levels_(torch.linspace(-0.3, 0.9, gate.num_gates, dtype=torch.float64))
        assert gate.deterministic().dtype == torch.float64
    cost, small = Cost(model, x, "macs"), dampr.compact(model, example_inputs=x)
    torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)
    assert count_macs(small, x) == int(cost(cost.decision())) < cost.total


class First(nn.Module):
    def forward(self, outputs):
        return outputs[0]


class LiteralHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.head = nn.Linear(12, 36), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        q, k, v = (part.view(len(x), -1, 3, 4).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.head(
            self.out(
                nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(*x.shape[:2], 12)
            ).relu()
        )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", ["literal heads", "statistics without gains", "groups"])
def test_input_gates_are_cut_or_left_out_before_training(case, seed):
    """What cannot go without its columns has no gates, or stays with a note: nothing fails after training."""
    conv = functools.partial(nn.Conv2d, kernel_size=3, padding=1)
    model, x = {
        "literal heads": lambda: (LiteralHeads(), torch.randn(2, 5, 12)),
        "statistics without gains": lambda: (
            nn.Sequential(conv(3, 8), nn.GroupNorm(2, 8, affine=False), nn.ReLU(), conv(8, 6), nn.ReLU(), conv(6, 2)),
            torch.randn(2, 3, 8, 8),
        ),
        "groups": lambda: (
            nn.Sequential(
                conv(3, 8), nn.ReLU(), conv(8, 12, groups=4), nn.ReLU(), conv(12, 6, groups=2), nn.ReLU(), conv(6, 2)
            ),
            torch.randn(2, 3, 8, 8),
        ),
    }[case]()
    dampr.convert(model.double().eval(), granularity="input", example_inputs=(x := x.double()))
    cost = Cost(model, x, "macs")
    torch.manual_seed(seed)
    for layer in dampr.prune.gated_layers(model).values():
        layer.gate.set_levels_(
            torch.where(torch.rand(layer.gate.num_gates) < 0.5, -1.0, torch.rand(layer.gate.num_gates))
        )
    small = dampr.compact(model, example_inputs=x)
    torch.testing.assert_close(small(x), model(x), rtol=1e-9, atol=1e-9)
    assert count_macs(small, x) == int(cost(cost.decision()))


@pytest.mark.parametrize("function", ["Budget", "Shrinker", "compact", "summary", "verify_model"])
def test_models_without_values_are_refused_by_name(function):
    model = nn.Sequential(dampr.nn.GatedLinear(4, 6), nn.ReLU(), nn.Linear(6, 2)).to("meta")
    how = {"macs": 0.5} if function == "Budget" else {}
    with pytest.raises(ValueError, match="^model: 0.weight is on the meta device, expected a model with values"):
        getattr(dampr, function)(model, example_inputs=torch.randn(2, 4), **how)


@pytest.mark.parametrize("x", [torch.ones(4, 6, dtype=torch.int64), torch.ones(4, 6, dtype=torch.float16)])
def test_inputs_that_the_model_refuses_are_refused_in_its_words(x):
    model = dampr.convert(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 6))
    with pytest.raises(TypeError, match="x.dtype|the dtype of x"):
        Cost(model, x, "macs")


def test_inputs_on_another_device_are_refused_in_the_words_of_the_model():
    """On the meta device, where costs are counted, both would be in one place."""
    model = dampr.convert(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 6))
    with pytest.raises(ValueError, match="expected meta, the device of x"):
        Cost(model, torch.randn(4, 6, device="meta"), "macs")
