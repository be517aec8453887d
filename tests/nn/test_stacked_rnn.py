"""StackedRNN: the layers and directions of one recurrent module as modules of their own, equal or not in width."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

from dampr.nn import GatedGRU, GatedLSTM, GatedRNN, StackedRNN
from dampr.nn.pruned.narrowed_rnn import narrowed

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")

KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "lstm": (nn.LSTM, GatedLSTM, {}),
    "lstm_proj": (nn.LSTM, GatedLSTM, {"proj_size": 3}),
    "gru": (nn.GRU, GatedGRU, {}),
    "rnn_relu": (nn.RNN, GatedRNN, {"nonlinearity": "relu"}),
}
SHAPES: dict[str, dict[str, Any]] = {
    "one_layer_both_ways": {"bidirectional": True},
    "three_layers": {"num_layers": 3, "bias": False},
    "two_layers_both_ways": {"num_layers": 2, "bidirectional": True},
}
T, B, I, H = 6, 3, 4, 5

every_kind = pytest.mark.parametrize("kind", KINDS)
every_shape = pytest.mark.parametrize("shape", SHAPES)


def in_parts(whole: Any) -> StackedRNN:
    """The same layer with a module for each layer and direction, put together by hand."""
    layers = []
    for i in range(whole.num_layers):
        layers.append([])
        for end in [f"_l{i}", f"_l{i}_reverse"][: 1 + whole.bidirectional]:
            how = {"bias": whole.bias, "batch_first": whole.batch_first}
            how |= {"proj_size": whole.proj_size} if isinstance(whole, nn.LSTM) else {}
            how |= {"nonlinearity": whole.nonlinearity} if isinstance(whole, nn.RNN) else {}
            part = type(whole)(getattr(whole, f"weight_ih{end}").shape[1], whole.hidden_size, **how)
            part.load_state_dict(
                {f"{n.removesuffix(end)}_l0": p for n, p in whole.state_dict().items() if n.endswith(end)}
            )
            layers[-1].append(part)
    return StackedRNN(layers, whole.dropout).train(whole.training)


def flat(result: Any) -> list[torch.Tensor]:
    """Output, h_n and c_n, as ``nn`` modules return them."""
    output, state = result
    rows = [state] if not isinstance(state, tuple) else list(state)
    values = list(output[:2]) if isinstance(output, PackedSequence) else [output]
    return values + [torch.stack(each) if isinstance(each, list) else each for each in rows]


def state_of(layer: Any, batch: tuple[int, ...]) -> Any:
    rows = layer.num_layers * (1 + layer.bidirectional)
    h = torch.randn(rows, *batch, layer.proj_size or H)
    return (h, torch.randn(rows, *batch, H)) if isinstance(layer, nn.LSTM) else h


@every_kind
@every_shape
@pytest.mark.parametrize(
    "x", ["steps_first", "batch_first", "one_sequence", "packed", "packed_in_any_order", "no_sequence"]
)
@pytest.mark.parametrize("with_state", [False, True])
def test_it_runs_as_one_module_does(kind: str, shape: str, x: str, with_state: bool) -> None:
    dense, _, arguments = KINDS[kind]
    whole = dense(I, H, **arguments, **SHAPES[shape], batch_first=x == "batch_first")
    parts = in_parts(whole)
    sequences = [torch.randn(t, I) for t in (2, 5, 1, 5)]
    values: Any = {
        "steps_first": torch.randn(T, B, I),
        "batch_first": torch.randn(B, T, I),
        "one_sequence": torch.randn(T, I),
        "packed": pack_sequence(sorted(sequences, key=len, reverse=True)),
        "packed_in_any_order": pack_sequence(sequences, enforce_sorted=False),
        "no_sequence": torch.randn(T, 0, I),
    }[x]
    batch = {"one_sequence": (), "packed": (4,), "packed_in_any_order": (4,), "no_sequence": (0,)}.get(x, (B,))
    state = state_of(whole, batch) if with_state else None
    expected, found = whole(values, state), parts(values, state)
    for a, b in zip(flat(found), flat(expected), strict=True):
        torch.testing.assert_close(a, b)
    if isinstance(values, PackedSequence):
        torch.testing.assert_close(pad_packed_sequence(found[0]), pad_packed_sequence(expected[0]))
    if x == "no_sequence":
        return
    seen = [t for t in flat(found) if t.is_floating_point()]
    right = [t for t in flat(expected) if t.is_floating_point()]
    sum(t.square().sum() for t in seen).backward()
    sum(t.square().sum() for t in right).backward()
    own = dict(parts.named_parameters())
    assert list(parts.former_names()) == list(own)
    assert sorted(parts.former_names().values()) == sorted(name for name, _ in whole.named_parameters())
    for name, former in parts.former_names().items():
        torch.testing.assert_close(own[name].grad, getattr(whole, former).grad)


@every_kind
@every_shape
@pytest.mark.parametrize("packed", [False, True])
def test_every_layer_and_direction_keeps_its_own_open_units(kind: str, shape: str, packed: bool) -> None:
    dense, gated, arguments = KINDS[kind]
    layer = gated(I, H, **arguments, **SHAPES[shape], widths="own").eval()
    rows, width = layer.gate.num_gates // layer._width, layer._width
    layer.gate.log_alpha.data.uniform_(-1, 1)
    # of one row all, where there are so many rows
    shut = [torch.randperm(width)[: i % (width + 1)] for i in range(1, rows + 1)]
    for row, units in enumerate(shut):
        layer.gate.log_alpha.data.view(rows, width)[row, units] = -9
    small, kept, scale = layer.compacted()
    assert type(small) is StackedRNN
    assert small.widths == [max(1, width - len(units)) for units in shut]
    assert all(type(part) is dense for part in small.rows())
    assert small.rows()[0].hidden_size == (H if layer.proj_size else small.widths[0])
    x: Any = (
        pack_sequence([torch.randn(t, I) for t in (2, 5, 1)], enforce_sorted=False) if packed else torch.randn(T, B, I)
    )
    masked, found = (out.data if packed else out for out in (layer(x)[0], small(x)[0]))
    torch.testing.assert_close(found * scale, masked[..., kept])
    assert len(kept) == len(scale) == sum(small.widths[-layer._directions :])
    rest = torch.ones(masked.shape[-1], dtype=torch.bool)
    rest[kept] = False
    assert not masked[..., rest].any()
    layer.widths = "equal"
    assert type(layer.compacted()[0]) is dense
    equal = sum(p.numel() for p in layer.compacted()[0].parameters())
    assert sum(p.numel() for p in small.parameters()) < equal


def test_equal_widths_need_no_modules_of_their_own() -> None:
    layer = GatedLSTM(I, H, 2, widths="own")
    layer.gate.log_alpha.data[[0, H + 3]] = -9
    small = layer.compacted()[0]
    assert type(small) is nn.LSTM
    assert small.hidden_size == H - 1


def test_a_state_of_unequal_widths_goes_from_one_half_of_a_sequence_to_the_next() -> None:
    whole = nn.LSTM(I, H, 2)
    parts = narrowed(whole, [torch.tensor([0, 2, 4]), torch.tensor([1, 3])])
    x = torch.randn(T, B, I)
    y, (h, c) = parts(x)
    assert [t.shape for t in h] == [t.shape for t in c] == [(B, 3), (B, 2)]
    first, state = parts(x[:4])
    second, (again, _) = parts(x[4:], state)
    torch.testing.assert_close(torch.cat([first, second]), y)
    torch.testing.assert_close(again, h)


def test_dropout_is_between_the_layers_in_training() -> None:
    whole = nn.GRU(I, H, 2, dropout=1.0)
    parts, x = in_parts(whole), torch.randn(T, B, I)
    torch.testing.assert_close(parts(x)[0], whole(x)[0])
    assert not torch.allclose(parts(x)[0], parts.eval()(x)[0])
    torch.testing.assert_close(parts(x)[0], whole.eval()(x)[0])
    half = in_parts(nn.GRU(I, H, 2, dropout=0.5))
    assert not torch.equal(half(x)[0], half(x)[0])


def test_parameters_keep_what_they_learn_and_their_dtype() -> None:
    layer = GatedGRU(I, H, 2, dropout=0.3, batch_first=True, dtype=torch.float64, widths="own").train()
    layer.bias_hh_l1.requires_grad_(False)
    layer.gate.log_alpha.data[0] = -9
    small = layer.compacted()[0]
    frozen = [name for name, p in small.named_parameters() if not p.requires_grad]
    assert [small.former_names()[name] for name in frozen] == ["bias_hh_l1"]
    assert {p.dtype for p in small.parameters()} == {torch.float64}
    assert small.training
    assert (small.dropout, small.batch_first, small.input_size, small.widths) == (0.3, True, I, [H - 1, H])
    assert "widths=[4, 5], dropout=0.3" in repr(small)


@pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights:UserWarning")  # torch.export, of any nn.LSTM
def test_it_is_exported() -> None:
    parts, x = in_parts(nn.LSTM(I, H, 2, bidirectional=True)).eval(), torch.randn(T, B, I)
    torch.testing.assert_close(torch.export.export(parts, (x,)).module()(x), parts(x))


def test_a_copy_is_one() -> None:
    parts, x = in_parts(nn.LSTM(I, H, 2)), torch.randn(T, B, I)
    again = copy.deepcopy(parts)
    parts.rows()[0].weight_hh_l0.data.zero_()
    assert not torch.equal(again(x)[0], parts(x)[0])


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ([], ValueError, "layers: of \\[\\] directions; expected one everywhere, or two everywhere"),
        (3, TypeError, "layers=3: expected a sequence of layers"),
        ([nn.LSTM(4, 5)], TypeError, "expected a sequence of layers, each a sequence"),
        ([[nn.LSTM(4, 5)] * 2, [nn.LSTM(10, 5)]], ValueError, "of \\[2, 1\\] directions"),
        (
            [[nn.LSTM(4, 5)], [nn.GRU(5, 5)]],
            TypeError,
            "layers\\[1\\]\\[0\\]=GRU: expected an nn.LSTM, nn.GRU or nn.RNN, the same",
        ),
        ([[nn.Linear(4, 5)]], TypeError, "layers\\[0\\]\\[0\\]=Linear: expected"),
        ([[nn.LSTM(4, 5, 2)]], ValueError, "layers\\[0\\]\\[0\\] with num_layers=2"),
        (
            [[nn.LSTM(4, 5)], [nn.LSTM(5, 5, batch_first=True)]],
            ValueError,
            "layers\\[1\\]\\[0\\] with .* the same batch_first",
        ),
        (
            [[nn.LSTM(4, 5), nn.LSTM(4, 3)], [nn.LSTM(8, 2), nn.LSTM(5, 2)]],
            ValueError,
            "layers\\[1\\]\\[1\\] .*=5: expected 8",
        ),
    ],
)
def test_parts_that_do_not_go_together_are_refused(layers: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        StackedRNN(layers)


def test_other_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="dropout=1.5: expected a number in"):
        StackedRNN([[nn.LSTM(4, 5)]], 1.5)
    with pytest.raises(ValueError, match="widths='wide': expected one of \\['equal', 'own'\\]"):
        GatedLSTM(4, 5, widths="wide")
    layer = GatedLSTM(4, 5)
    with pytest.raises(ValueError, match="widths=None: expected one of"):
        layer.widths = None
    assert layer.widths == "equal"
    parts, x = in_parts(nn.LSTM(I, H, 2)), torch.randn(T, B, I)
    with pytest.raises(ValueError, match="hx=Tensor: expected \\(h_0, c_0\\)"):
        parts(x, torch.zeros(2, B, H))
    with pytest.raises(ValueError, match="c_0=Tensor of 3: expected one state for each of 2 layers and directions"):
        parts(x, (torch.zeros(2, B, H), torch.zeros(3, B, H)))
    with pytest.raises(ValueError, match="h_0=int: expected one state"):
        in_parts(nn.GRU(I, H))(x, 3)
