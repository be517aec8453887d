"""compact on models with recurrent layers, gates on activations, gated branches and embeddings: smaller, plain,
and the same function.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import dampr
from dampr.gates import HardConcrete
from dampr.nn import (
    GatedActivation,
    GatedEmbedding,
    GatedGRU,
    GatedLayer,
    GatedLinear,
    GatedLSTM,
    GatedResidual,
    GatedRNN,
    Residual,
    Scale,
    ScaledRNN,
    StackedRNN,
)

KINDS: list[Any] = [GatedLSTM, GatedGRU, GatedRNN]
every_kind = pytest.mark.parametrize("kind", KINDS)
words = torch.randint(20, (3, 5), generator=torch.Generator().manual_seed(0))


class Tagger(nn.Module):
    """Words in, a score for each step, or for the last one, out; with ``between`` in front of the classifier."""

    def __init__(self, kind: Any, how: str = "all", between: nn.Module | None = None, **arguments: Any) -> None:
        super().__init__()
        self.embedding = GatedEmbedding(20, 8)
        self.rnn = kind(8, 6, 2, batch_first=True, **arguments)
        self.between = nn.Identity() if between is None else between
        self.head = nn.Linear(12 if arguments.get("bidirectional") else 6, 3)
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embedding(x)
        if self.how == "packed":
            y = pad_packed_sequence(
                self.rnn(pack_padded_sequence(x, [5, 4, 2], batch_first=True))[0], batch_first=True
            )[0]
        else:
            y, state = self.rnn(x)
        if self.how == "last":
            y = y[:, -1]
        if self.how == "state":
            y = (state[0] if isinstance(state, tuple) else state)[-1]
        return self.head(self.between(y))


class Plain(nn.Module):
    """What a :class:`Tagger` is before conversion."""

    def __init__(self, kind: Any, **arguments: Any) -> None:
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(20, 8), kind(8, 6, 2, batch_first=True, **arguments)
        self.head = nn.Linear(12 if arguments.get("bidirectional") else arguments.get("proj_size") or 6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(self.embedding(x))[0])


def close(model: nn.Module, fractional: bool = False) -> nn.Module:
    """A third of all gates closed, the rest open; where they are fractional, between 0 and 1."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, HardConcrete):
            shut = torch.arange(module.num_gates) % 3 == 0
            value = (
                torch.rand(module.num_gates, generator=generator)
                if fractional
                else torch.full((module.num_gates,), 9.0)
            )
            module.log_alpha.data = torch.where(shut, -9.0, value)
    return model.eval()


def compacted(model: nn.Module, x: torch.Tensor) -> Any:
    small = dampr.compact(model, example_inputs=x)
    torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-5)
    assert not any(isinstance(module, GatedLayer) for module in small.modules())
    return small


@every_kind
@pytest.mark.parametrize("how", ["all", "last", "state"])
@pytest.mark.parametrize("fractional", [False, True])
def test_a_recurrent_layer_and_what_reads_it_get_smaller(kind: Any, how: str, fractional: bool) -> None:
    model = close(Tagger(kind, how), fractional)
    small = compacted(model, words)
    assert type(small.rnn) in (nn.LSTM, nn.GRU, nn.RNN)
    assert small.rnn.hidden_size == small.head.in_features == 4
    assert small.embedding.embedding_dim == small.rnn.input_size == 5
    assert small.head.weight.shape == (3, 4)
    assert small.dampr_manifest["closed_but_kept"] == {}
    assert small.dampr_manifest["layers"]["rnn"] == {
        "out": {"before": 6, "kept": [1, 2, 4, 5]},
        "in": {"before": 8, "kept": [1, 2, 4, 5, 7]},
        "units": {"before": 6, "kept": [[1, 2, 4, 5]] * small.rnn.num_layers},
    }
    assert small.dampr_manifest["layers"]["head"]["in"]["kept"] == [1, 2, 4, 5]


@every_kind
def test_both_directions_and_dropout(kind: Any) -> None:
    model = close(Tagger(kind, "all", nn.Dropout(0.5), bidirectional=True), True)
    small = compacted(model, words)
    assert small.rnn.hidden_size == 4
    assert small.head.in_features == 8


def unequal(model: nn.Module, fractional: bool = True) -> nn.Module:
    """In every recurrent layer one more unit closed from row to row, of all but the last,
    where these have widths of their own.
    """
    close(model, fractional)
    for module in model.modules():
        if isinstance(module, (GatedLSTM, GatedGRU, GatedRNN)):
            module.widths = "own"
            rows = module.gate.log_alpha.data.view(-1, module._width)
            for row, values in enumerate(rows):
                values[: min(row + 1, module._width - 1)] = -9
                values[min(row + 1, module._width - 1) :].clamp_(min=-1)
    return model


@every_kind
@pytest.mark.parametrize("how", ["all", "last", "packed"])
@pytest.mark.parametrize("both_ways", [False, True])
def test_layers_and_directions_have_widths_of_their_own(kind: Any, how: str, both_ways: bool) -> None:
    model = unequal(Tagger(kind, how, bidirectional=both_ways))
    small = compacted(model, words)
    widths = [5, 4, 3, 2] if both_ways else [5, 4]
    assert type(small.rnn) is StackedRNN
    assert small.rnn.widths == widths
    assert small.rnn.input_size == small.embedding.embedding_dim == 5
    assert small.head.in_features == (5 if both_ways else 4)
    manifest = small.dampr_manifest
    assert manifest["closed_but_kept"] == {}
    assert manifest["layers"]["rnn"]["in"] == {"before": 8, "kept": [1, 2, 4, 5, 7]}
    assert manifest["layers"]["rnn"]["units"]["kept"] == [list(range(6 - width, 6)) for width in widths]
    assert manifest["layers"]["rnn"]["out"] == manifest["layers"]["head"]["in"]
    assert manifest["layers"]["head"]["in"]["kept"] == ([3, 4, 5, 10, 11] if both_ways else [2, 3, 4, 5])


@every_kind
def test_a_state_read_by_layer_is_one_of_unequal_widths(kind: Any) -> None:
    small = compacted(unequal(Tagger(kind, "state")), words)
    assert small.rnn.widths == [5, 4]


class Joined(Tagger):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = self.rnn(self.embedding(x))[1]
        h = state[0] if isinstance(state, tuple) else state
        return self.head(h.transpose(0, 1)[:, -1])


@every_kind
def test_a_model_that_needs_one_tensor_for_its_states_keeps_equal_widths(kind: Any) -> None:
    small = compacted(unequal(Joined(kind)), words)
    assert isinstance(small.rnn, nn.RNNBase)
    assert small.rnn.hidden_size == small.head.in_features == 5
    note = "1 closed units stay: the model does not take states of unequal widths, which are lists"
    assert small.dampr_manifest["closed_but_kept"] == {"rnn": note}


@every_kind
def test_a_budget_knows_which_models_do_not_take_lists(kind: Any) -> None:
    model = Joined(kind)
    model.rnn.widths = "own"
    model.rnn.gate.log_alpha.data.uniform_(-4, 4)
    report = dampr.Budget(model, words, macs=0.5).finalize()
    small = dampr.compact(model, example_inputs=words)
    assert isinstance(small.rnn, nn.RNNBase)
    assert dampr.prune.measure.count_macs(small, words) == report.reached <= report.target


@every_kind
@pytest.mark.parametrize("widths", ["equal", "own"])
@pytest.mark.parametrize("round_to", [1, 2])
def test_a_budget_leaves_no_unit_closed_that_could_open(kind: Any, widths: str, round_to: int) -> None:
    model = Tagger(kind, bidirectional=True)
    model.rnn.widths = widths
    for layer in (model.embedding, model.rnn):
        layer.gate.log_alpha.data.uniform_(-4, 4)
    report = dampr.Budget(model, words, macs=0.5).finalize(round_to=round_to)
    small = dampr.compact(model, example_inputs=words)
    sizes = small.rnn.widths if isinstance(small.rnn, StackedRNN) else [small.rnn.hidden_size]
    assert all(size % round_to == 0 and size > 0 for size in sizes)
    assert all(len(units) < 6 for units in model.rnn.closed_units())
    cost = dampr.prune.Cost(model, words, "macs")
    gates = cost.decision()
    assert int(cost(gates)) == report.reached <= report.target
    for row in cost.structure.rows("rnn") + cost.structure.rows("embedding"):
        more = gates.clone()
        more[[i for i in row if not gates[i]][:round_to]] = True
        assert int(cost(more)) > report.target or bool((more == gates).all())


@every_kind
@pytest.mark.parametrize("reader_first", [False, True])
def test_a_stack_reads_another(kind: Any, reader_first: bool) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = {"first": kind(4, 6, 2), "second": kind(6, 6, 2, bidirectional=True)}
            for name in sorted(layers, reverse=reader_first):
                setattr(self, name, layers[name])
            self.head = nn.Linear(12, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.second(self.first(x)[0])[0])

    small = compacted(unequal(Two()), torch.randn(5, 3, 4))
    assert (small.first.widths, small.second.widths) == ([5, 4], [5, 4, 3, 2])
    assert small.second.input_size == 4
    assert small.head.in_features == 5
    assert small.dampr_manifest["layers"]["second"]["in"] == small.dampr_manifest["layers"]["first"]["out"]


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_a_projection_has_widths_of_its_own() -> None:
    model = unequal(Tagger(GatedLSTM, proj_size=3, bidirectional=True))
    model.head = nn.Linear(6, 3).eval()
    small = compacted(model, words)
    assert small.rnn.widths == [2, 1, 1, 1]
    assert {part.hidden_size for part in small.rnn.rows()} == {6}


@every_kind
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_an_optimizer_goes_on_with_the_parts(kind: Any, optimizer: Any) -> None:
    model = unequal(Tagger(kind, bidirectional=True), fractional=False)
    how = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    trains = optimizer(dampr.param_groups(model, lr=0.0), **how)
    model.train()(words).square().sum().backward()
    trains.step()
    key = "momentum_buffer" if how else "exp_avg"
    old = {
        name: trains.state[p][key].clone()
        for name, p in model.named_parameters()
        if p in trains.state and p.grad is not None
    }
    small = dampr.compact(model.eval(), example_inputs=words, optimizer=trains)
    names = {p: name for name, p in small.named_parameters()}
    held = [names[p] for group in trains.param_groups for p in group["params"]]
    assert sorted(held) == sorted(names.values())
    # of the second layer, forward; of the first, both ways
    units, below = [3, 4, 5], torch.tensor([*range(1, 6), *range(8, 12)])
    rows = torch.cat([torch.tensor(units) + 6 * i for i in range(small.rnn.rows()[0].weight_hh_l0.shape[0] // 5)])
    state = trains.state[small.get_parameter("rnn.layers.1.0.weight_ih_l0")][key]
    assert torch.equal(state, old["rnn.weight_ih_l1"][rows][:, below])
    state = trains.state[small.get_parameter("rnn.layers.1.0.bias_hh_l0")][key]
    assert torch.equal(state, old["rnn.bias_hh_l1"][rows])
    assert bool(old["rnn.weight_ih_l1"].any())
    small.train()(words).square().sum().backward()
    trains.step()


@every_kind
def test_a_budget_ends_at_its_target_with_widths_of_their_own(kind: Any) -> None:
    model = dampr.convert(
        Plain({GatedLSTM: nn.LSTM, GatedGRU: nn.GRU, GatedRNN: nn.RNN}[kind], bidirectional=True), example_inputs=words
    )
    model.rnn.widths = "own"
    model.rnn.gate.log_alpha.data.uniform_(-4, 4)
    report = dampr.Budget(model, words, macs=0.5).finalize()
    small = dampr.compact(model, example_inputs=words)
    assert type(small.rnn) is StackedRNN
    assert dampr.prune.measure.count_macs(small, words) == report.reached <= report.target
    assert report.reached > 0.9 * report.target


@every_kind
def test_packed_sequences(kind: Any) -> None:
    small = compacted(close(Tagger(kind, "packed"), True), words)
    assert small.rnn.hidden_size == 4


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
def test_a_projection() -> None:
    model = close(Tagger(GatedLSTM, proj_size=3), True)
    model.head = nn.Linear(3, 3).eval()
    small = compacted(model, words)
    assert small.rnn.proj_size == 2
    assert small.rnn.hidden_size == 6


@pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights:UserWarning")  # torch.export, of any nn.LSTM
@every_kind
def test_a_nonlinearity_keeps_fractional_gates_in_a_scaled_layer_and_lets_others_go(kind: Any, tmp_path: Any) -> None:
    kept = compacted(close(Tagger(kind, between=nn.Tanh()), True), words)
    assert type(kept.rnn) is ScaledRNN
    assert kept.rnn.rnn.hidden_size == kept.head.in_features == 4
    assert kept.dampr_manifest["closed_but_kept"] == {}
    dampr.save(kept, tmp_path / "kept.pt")
    plain = Tagger(kind._dense, between=nn.Tanh())
    plain.embedding = nn.Embedding(20, 8)
    assert torch.equal(dampr.load(tmp_path / "kept.pt", plain).eval()(words), kept(words))
    torch.testing.assert_close(dampr.expand(kept)(words), kept(words))
    assert compacted(close(Tagger(kind, between=nn.Tanh())), words).rnn.hidden_size == 4
    normed = compacted(close(Tagger(kind, between=nn.LayerNorm(6))), words)
    assert type(normed.rnn) is ScaledRNN
    exported = torch.export.export(kept, (words,))
    assert not any("dampr" in str(node.target) for node in exported.graph.nodes if node.op == "call_function")
    torch.testing.assert_close(exported.module()(words), kept(words))


class Stacked(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.first = kind(4, 6)
        self.second = kind(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x)[0])[0][-1])


@every_kind
def test_a_recurrent_layer_reads_another(kind: Any) -> None:
    small = compacted(close(Stacked(kind), True), torch.randn(5, 3, 4))
    assert small.first.hidden_size == small.second.input_size == small.second.hidden_size == small.head.in_features == 4


class Decoder(Stacked):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, state = self.first(x)
        return self.head(self.second(y, state)[0])


@every_kind
def test_a_layer_whose_state_is_handed_on_keeps_its_size(kind: Any) -> None:
    small = compacted(close(Decoder(kind)), torch.randn(5, 3, 4))
    assert "its state is given to 'second'" in small.dampr_manifest["closed_but_kept"]["first"]
    assert type(small.first) is ScaledRNN


class Bare(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.rnn = kind(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(x)[0]


@every_kind
def test_a_layer_whose_output_is_the_models_keeps_its_width(kind: Any) -> None:
    small = compacted(close(Bare(kind)), torch.randn(5, 3, 4))
    assert "gets to the model's own" in small.dampr_manifest["closed_but_kept"]["rnn"]
    fresh = compacted(Bare(kind).eval(), torch.randn(5, 3, 4))
    assert isinstance(fresh.rnn, nn.RNNBase)
    assert fresh.dampr_manifest["closed_but_kept"] == {}


@every_kind
def test_training_is_left_possible_and_frozen_parameters_frozen(kind: Any) -> None:
    model = close(Tagger(kind))
    model.head.weight.requires_grad_(False)
    small = compacted(model, words)
    assert all(p.requires_grad == (name != "head.weight") for name, p in small.named_parameters())
    small.train()(words).sum().backward()
    assert all(p.grad is not None for p in small.parameters() if p.requires_grad)


@pytest.mark.parametrize("fractional", [False, True])
@pytest.mark.parametrize(
    ("model", "shape", "left"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 9), GatedActivation(9), nn.Sigmoid(), nn.Linear(9, 3)), (5, 4), 6),
        (lambda: nn.Sequential(nn.Linear(4, 9), GatedActivation(9, -1), nn.ReLU(), nn.Linear(9, 3)), (5, 2, 4), 6),
        (
            lambda: nn.Sequential(nn.Linear(4, 9), GatedActivation(3, -1, index=torch.arange(9) % 3), nn.Linear(9, 3)),
            (5, 4),
            6,
        ),
        (
            lambda: nn.Sequential(
                nn.Conv2d(4, 9, 3), nn.BatchNorm2d(9), GatedActivation(9), nn.ReLU(), nn.Conv2d(9, 3, 3, padding=1)
            ),
            (2, 4, 5, 5),
            6,
        ),
        (lambda: nn.Sequential(nn.Conv1d(4, 9, 3), GatedActivation(9), nn.Flatten(), nn.Linear(27, 3)), (2, 4, 5), 6),
    ],
)
def test_what_a_gate_closes_is_cut(model: Any, shape: tuple[int, ...], left: int, fractional: bool) -> None:
    gated = close(model(), fractional)
    small = compacted(gated, torch.randn(shape))
    assert small[0].weight.shape[0] == left
    assert small.dampr_manifest["closed_but_kept"] == {}
    scales = [m for m in small.modules() if isinstance(m, Scale)]
    assert [m.num_features for m in scales] == ([left] if fractional else [])


def test_gates_on_positions_leave_the_channels_alone() -> None:
    model = close(nn.Sequential(GatedLinear(4, 9), GatedActivation(5, 1), nn.ReLU(), nn.Linear(9, 3)))
    small = compacted(model, torch.randn(2, 5, 4))
    assert small[0].out_features == 6
    assert small[1].num_features == 5
    assert "closed channels stay" in small.dampr_manifest["closed_but_kept"]["1"]


def test_a_closed_branch_goes_with_the_gated_layers_in_it() -> None:
    def branch() -> nn.Module:
        return nn.Sequential(GatedLinear(6, 9), nn.ReLU(), GatedLinear(9, 6, granularity="input"))

    model = nn.Sequential(nn.Linear(4, 6), GatedResidual(branch()), GatedResidual(branch()), nn.Linear(6, 2))
    close(model)
    model[2].gate.log_alpha.data.fill_(0.5)
    small = compacted(model, torch.randn(5, 4))
    assert type(small[1]) is nn.Identity
    assert type(small[2]) is Residual
    assert small[2].scale is None
    assert small[2].branch[0].out_features == small[2].branch[2].in_features == 6


def test_rows_of_an_embedding_stay_and_the_manifest_says_so() -> None:
    model = close(nn.Sequential(GatedEmbedding(20, 8, granularity="input"), nn.Linear(8, 2)))
    small = compacted(model, words)
    assert small[0].weight.shape == (20, 8)
    assert "closed rows stay" in small.dampr_manifest["closed_but_kept"]["0"]


def test_a_compacted_recurrent_model_is_saved_and_loaded(tmp_path: Any) -> None:
    small = compacted(close(Tagger(GatedLSTM, bidirectional=True), True), words)
    dampr.save(small, tmp_path / "small.safetensors")
    dense = Tagger(nn.LSTM, bidirectional=True)
    dense.embedding = nn.Embedding(20, 8)
    loaded = dampr.load(tmp_path / "small.safetensors", dense)
    assert torch.equal(loaded.eval()(words), small(words))


@every_kind
@pytest.mark.parametrize("by_path", [False, True])
def test_a_stack_is_saved_and_loaded_and_expanded(kind: Any, by_path: bool, tmp_path: Any) -> None:
    model = unequal(Tagger(kind, bidirectional=True, dropout=0.25))
    small = compacted(model, words)
    dampr.save(small, tmp_path / "small.safetensors")
    if by_path:
        dampr.save(nn.ModuleList([small.rnn]), tmp_path / "rnn.safetensors")
        again, x = dampr.load(tmp_path / "rnn.safetensors")[0], torch.randn(3, 5, 5)
        assert str(again) == str(small.rnn)
        assert torch.equal(again(x)[0], small.rnn(x)[0])
        return
    dense = Tagger(type(small.rnn.rows()[0]), bidirectional=True, dropout=0.25)
    dense.embedding = nn.Embedding(20, 8)
    large = dampr.expand(small)
    shapes = {name: p.shape for name, p in dense.state_dict().items()}
    assert {name: p.shape for name, p in large.state_dict().items()} == shapes
    assert str(large) == str(dense)
    torch.testing.assert_close(large(words), small(words), rtol=1e-5, atol=1e-5)
    loaded = dampr.load(tmp_path / "small.safetensors", dense)
    assert type(loaded.rnn) is StackedRNN
    assert torch.equal(loaded.eval()(words), small(words))
