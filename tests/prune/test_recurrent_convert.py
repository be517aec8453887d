"""convert of models with recurrent layers and cells: which gates they get, and what a cut leaves of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import dampr
from dampr.nn import (
    GatedLSTM,
)
from dampr.prune.cost import Cost
from dampr.prune.measure import count_macs
from tests.prune.test_recurrent import Plain, words


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("gate", ["hard_concrete", "dep_l0", "diffmask"])
def test_convert_gates_embeddings_and_recurrent_layers(kind: Any, gate: Any) -> None:
    model = Plain(kind, bidirectional=True).eval()
    before, names = model(words), [name for name, _ in model.named_parameters()]
    dampr.convert(model, gate=gate, example_inputs=words)
    assert torch.equal(model(words), before)
    assert [name for name, _ in model.named_parameters() if "gate" not in name] == names
    assert {name: layer.gate.num_gates for name, layer in dampr.prune.gated_layers(model).items()} == {
        "embedding": 8,
        "rnn": 24,
    }
    assert model.dampr_skipped == {"head": "its outputs are the model's own"}
    report = dampr.Budget(model, words, macs=0.6).finalize()
    small = dampr.compact(model, example_inputs=words)
    torch.testing.assert_close(small(words), model(words), atol=1e-5, rtol=1e-5)
    assert dampr.prune.measure.count_macs(small, words) == report.reached <= report.target


@pytest.mark.parametrize(
    ("build", "arguments", "skipped"),
    [
        (
            lambda: Plain(nn.LSTM),
            {"gate": "dam", "tie": False},
            {"rnn": "fresh gates of 'dam' are not 1, and nothing in LSTM can make up for them"},
        ),
        (
            lambda: Plain(nn.GRU),
            {"per_sample": True},
            {"rnn": "GRU draws its gates once per call, expected per_sample=False"},
        ),
        (
            lambda: Plain(nn.RNN),
            {"granularity": "input"},
            {
                "embedding": "Embedding has gates on its columns, with granularity='output'",
                "rnn": "RNN has gates on its units, with granularity='output'",
            },
        ),
        (
            lambda: nn.Sequential(nn.Embedding(20, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)),
            {},
            {"4": "its outputs are the model's own"},
        ),
    ],
)
def test_what_convert_leaves_out(build: Any, arguments: dict[str, Any], skipped: dict[str, str]) -> None:
    model = dampr.convert(build(), example_inputs=words, **arguments)
    expected = (
        {"head": "its outputs are the model's own", **skipped}
        if hasattr(model, "head") and "granularity" not in arguments
        else skipped
    )
    assert model.dampr_skipped == expected


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_a_projection_takes_gates_that_are_not_one() -> None:
    model = Plain(nn.LSTM, proj_size=4).eval()
    before = model(words)
    dampr.convert(model, gate="dam", example_inputs=words)
    assert isinstance(model.rnn, GatedLSTM)
    torch.testing.assert_close(model(words), before)


def test_an_output_that_something_else_reads_keeps_its_units() -> None:
    class Activated(Plain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.rnn(self.embedding(x))[0]
            return self.head(y) * y.mean()

    model = dampr.convert(Activated(nn.LSTM), example_inputs=words)
    assert "rnn" in model.dampr_skipped
    assert sorted(dampr.prune.gated_layers(model)) == ["embedding"]


class Stepwise(nn.Module):
    """A cell in a loop over steps, between linear layers that are called once."""

    def __init__(self, cell):
        super().__init__()
        self.read, self.cell = nn.Linear(8, 6), cell(6, 7)
        self.inner, self.head = nn.Linear(7, 5), nn.Linear(5, 3)

    def forward(self, x):
        state = None
        for step in self.read(x).unbind(1):
            state = self.cell(step, state)
        return self.head(self.inner(state[0] if isinstance(state, tuple) else state).relu())


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_a_cell_in_a_loop_and_what_is_around_it_are_cut(cell):
    model, x = Stepwise(cell), torch.randn(2, 5, 8)
    dampr.convert(model, example_inputs=x)
    assert model.dampr_skipped == {"head": "its outputs are the model's own"}
    for gate in dict.fromkeys(layer.gate for layer in dampr.prune.gated_layers(model).values()):
        gate.log_alpha.data[1] = -9
    small = dampr.compact(model.eval(), example_inputs=x)
    assert (small.read.out_features, small.cell.input_size, small.cell.hidden_size, small.inner.out_features) == (
        5,
        5,
        6,
        4,
    )
    torch.testing.assert_close(small(x), model(x))
    layers = dampr.convert(Stepwise(cell), example_inputs=x, tie=False)
    assert list(dampr.prune.gated_layers(layers)) == ["inner"]
    assert layers.dampr_skipped["read"] == f"{cell.__name__} 'cell' shares its width, and cannot be cut yet"


class Behind(nn.Module):
    """A norm reads every unit of a recurrent layer."""

    def __init__(self, kind: Any, norm: Any) -> None:
        super().__init__()
        self.first, self.rnn = nn.Linear(6, 8), kind(8, 12, 2, batch_first=True)
        self.norm, self.last = norm(12), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.rnn(self.first(x).relu())[0]))


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_with_residual_a_norm_behind_a_recurrent_layer_counts_open_units(kind: Any, norm: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    model = dampr.convert(Behind(kind, norm).double(), example_inputs=x, residual=True)
    for gate in dampr.prune.distinct_gates(model).values():
        gate.log_alpha.data[::2] = -9
    cost, masked = Cost(model, x, "macs"), model.eval()(x)
    small = dampr.compact(model, example_inputs=x)
    assert (small.rnn.input_size, small.rnn.hidden_size) == (4, 6)
    torch.testing.assert_close(small(x), masked, rtol=1e-9, atol=1e-9)
    assert count_macs(small, x) == int(cost(cost.decision()))
