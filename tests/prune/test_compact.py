"""compact: plain modules, smaller, equal; or one error and nothing changed."""

import copy

import pytest
import torch
from torch import nn

import dampr
from dampr.prune import cutting


def mlp(activation=nn.ReLU, norm=False, bias=True):
    layers = [nn.Linear(20, 30, bias=bias), nn.BatchNorm1d(30) if norm else nn.Identity(), activation()]
    layers += [nn.Linear(30, 24, bias=bias), activation(), nn.Linear(24, 5, bias=bias)]
    model = nn.Sequential(*layers)
    if norm:
        nn.init.normal_(model[1].weight)
        nn.init.normal_(model[1].bias)
        model(torch.randn(64, 20))
    return model


class Residual(nn.Module):
    """Two layers write one width; a unit can go only when both close it."""

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(20, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x):
        h = torch.relu(self.stem(x))
        return self.head(h + torch.relu(self.block(h)))


class Concat(nn.Module):
    """Two widths side by side in the input of one layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(20, 12), nn.Linear(20, 8), nn.Linear(20, 5)

    def forward(self, x):
        return self.head(torch.cat((torch.relu(self.a(x)), torch.tanh(self.b(x))), dim=1))


X = torch.randn(11, 20, generator=torch.Generator().manual_seed(7))


def close_at_random(model, share, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in dampr.prune.gated_layers(model).values():
            log_alpha = layer.gate.log_alpha
            closed = torch.rand(log_alpha.shape, generator=generator) < share
            log_alpha.copy_(torch.where(closed, -5.0, torch.rand(log_alpha.shape, generator=generator) * 6 - 2))


def prove(model, x=X):
    """Compact, hold the result against the masked model, and check that it is plain."""
    before = copy.deepcopy(model.state_dict())
    masked = model.eval()(x)
    small = dampr.compact(model, example_inputs=x)
    torch.testing.assert_close(small(x), masked, atol=1e-5, rtol=1e-5)
    assert not [m for m in small.modules() if isinstance(m, (dampr.nn.GatedLayer, dampr.gates.Gate))]
    assert all(
        type(m).__module__.startswith("torch.nn") or type(m).__module__ == type(model).__module__
        for m in small.modules()
    )
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()), "the gated model is not changed"
    return small


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("granularity", ["output", "input"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.Tanh, nn.Sigmoid, nn.Softplus])
@pytest.mark.parametrize("bias", [True, False])
def test_masked_equals_compacted(share, granularity, activation, bias):
    model = dampr.convert(mlp(activation, bias=bias), granularity=granularity, example_inputs=X)
    close_at_random(model, share)
    prove(model)


@pytest.mark.parametrize("seed", range(5))
def test_masked_equals_compacted_after_batchnorm(seed):
    """A unit closed before BatchNorm is a non-zero constant after it; the constant moves into the next bias."""
    model = dampr.convert(mlp(norm=True), example_inputs=X)
    close_at_random(model, 0.5, seed)
    small = prove(model)
    assert small[1].num_features == small[0].out_features < 30


def test_widths_are_those_of_the_open_gates():
    model = dampr.convert(mlp(), example_inputs=X)
    close_at_random(model, 0.6)
    opened = [int(layer.gate.is_open().sum()) for layer in dampr.prune.gated_layers(model).values()]
    small = prove(model)
    assert [small[0].out_features, small[3].in_features, small[3].out_features, small[5].in_features] == [
        opened[0],
        opened[0],
        opened[1],
        opened[1],
    ]
    kept = small.dampr_manifest["layers"]
    assert kept["0"]["out"] == {"before": 30, "kept": model[0].gate.is_open().nonzero().flatten().tolist()}
    assert kept["3"]["in"]["kept"] == kept["0"]["out"]["kept"]
    assert small.dampr_manifest["closed_but_kept"] == {}


def test_input_gates_cut_the_layer_before():
    model = dampr.convert(mlp(), granularity="input", example_inputs=X)
    close_at_random(model, 0.5)
    small = prove(model)
    assert small[0].out_features == int(model[3].gate.is_open().sum())
    assert small[3].out_features == int(model[5].gate.is_open().sum())
    assert small[0].in_features == 20
    assert "the model's own input" in small.dampr_manifest["closed_but_kept"]["0"]


@pytest.mark.parametrize("granularity", ["output", "input"])
def test_all_units_closed_leaves_one(granularity):
    model = dampr.convert(mlp(), granularity=granularity, example_inputs=X)
    with torch.no_grad():
        for layer in dampr.prune.gated_layers(model).values():
            layer.gate.log_alpha.fill_(-5)
    small = prove(model)
    assert (small[0].out_features, small[3].out_features) == (1, 1)


def test_a_tied_width_is_cut_where_all_producers_are_closed():
    model = dampr.convert(Residual(), example_inputs=X, tie=False)
    with torch.no_grad():
        model.stem.gate.log_alpha[:10] = -5
        model.block.gate.log_alpha[6:] = -5
    small = prove(model)
    assert (
        small.stem.out_features == small.block.in_features == small.block.out_features == small.head.in_features == 12
    )
    assert "still use them" in small.dampr_manifest["closed_but_kept"]["stem"]


def test_layers_that_write_one_width_share_one_gate():
    model = dampr.convert(Residual(), example_inputs=X)
    assert model.stem.gate is model.block.gate
    with torch.no_grad():
        model.stem.gate.log_alpha[:10] = -5
    small = prove(model)
    assert small.stem.out_features == small.block.out_features == small.head.in_features == 6
    assert not small.dampr_manifest["closed_but_kept"]


def test_concatenated_widths_are_cut_apart():
    model = dampr.convert(Concat(), example_inputs=X)
    with torch.no_grad():
        model.a.gate.log_alpha[[0, 5, 11]] = -5
        model.b.gate.log_alpha[[1, 2]] = -5
    small = prove(model)
    assert (small.a.out_features, small.b.out_features, small.head.in_features) == (9, 6, 15)
    assert small.dampr_manifest["layers"]["head"]["in"]["kept"] == [i for i in range(20) if i not in (0, 5, 11, 13, 14)]


class GLU(nn.Module):
    """The halves of one layer's output meet in a product: unit i goes only together with unit i + 6."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(20, 12), nn.Linear(6, 5)

    def forward(self, x):
        a, b = self.up(x).chunk(2, dim=-1)
        return self.down(a * torch.sigmoid(b))


@pytest.mark.parametrize(("closed", "width"), [([2], 12), ([2, 8], 10), ([0, 1, 6, 11], 10), (range(12), 2)])
@pytest.mark.parametrize("rows", [1, 11])
def test_units_tied_within_a_layer_go_together_or_stay(closed, width, rows):
    model = dampr.convert(GLU(), include="up")
    with torch.no_grad():
        model.up.gate.log_alpha[list(closed)] = -5
    small = dampr.compact(model, example_inputs=X[:rows])
    fresh = torch.randn(50, 20)
    torch.testing.assert_close(small(fresh), model.eval()(fresh), atol=1e-5, rtol=1e-5)
    assert (small.up.out_features, small.down.in_features) == (width, width // 2)


class Flatten(nn.Module):
    """A convolution channel is nine inputs of the linear layer behind it."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(36, 10), nn.Linear(10, 3)

    def forward(self, x):
        return self.head(torch.relu(self.fc(torch.relu(self.conv(x)).flatten(1))))


@pytest.mark.parametrize(
    ("closed", "channels"),
    [(range(9, 18), 3), ([0, 10, 11, 12], 4), ([*range(9), *range(27, 36), 12], 2), (range(36), 1)],
)
@pytest.mark.parametrize("rows", [1, 4])
def test_a_convolution_channel_goes_when_all_its_readers_are_closed(closed, channels, rows):
    model = dampr.convert(Flatten(), granularity="input", include="fc")
    with torch.no_grad():
        model.fc.gate.log_alpha[list(closed)] = -5
    x = torch.randn(rows, 1, 3, 3)
    small = prove(model, x)
    assert (small.conv.out_channels, small.fc.in_features) == (channels, 9 * channels)


class Shifted(nn.Module):
    """What a closed unit passes on differs from row to row."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(20, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.relu(self.fc(x)) + x.mean(1, keepdim=True))


@pytest.mark.parametrize("rows", [1, 11])
def test_one_example_row_is_not_taken_for_a_constant(rows):
    model = Shifted()  # convert takes gates on the weights that read the units
    model.fc = dampr.nn.GatedLinear.from_dense(model.fc)
    close_at_random(model, 0.5)
    with pytest.raises(dampr.CompactionError, match="head: closed units reach it with values that differ between rows"):
        dampr.compact(model, example_inputs=X[:rows])


class Odd(nn.Module):
    """Producers and readers that cannot be cut yet, a layer called twice, a hidden width that is returned,
    bool and tuple outputs.
    """

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.a, self.b, self.head = nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 3)
        self.lstm, self.norm = nn.LSTM(20, 20, batch_first=True), nn.LayerNorm(20, elementwise_affine=False)
        self.scale = nn.Parameter(torch.randn(20))

    def forward(self, x):
        h = self.a(x)
        if self.kind == "twice":
            return self.head(torch.relu(self.b(torch.relu(self.b(torch.relu(h))))))
        if self.kind == "returned":
            return {"hidden": h, "y": self.head(torch.relu(h))}
        if self.kind == "relu returned":
            h = torch.relu(h)
            return h, self.head(h)
        if self.kind == "lstm":
            return self.head(self.lstm(torch.relu(h)[:, None])[0][:, 0])
        if self.kind == "norm":
            return self.head(self.norm(h))
        if self.kind == "parameter":
            return self.head(torch.relu(h) * self.scale)
        if self.kind == "input residual":
            return self.head(x + h)
        y = self.head(torch.relu(h))
        return y, y > 0


@pytest.mark.parametrize("rows", [1, 11])
@pytest.mark.parametrize("kind", ["twice", "returned", "relu returned", "lstm", "norm", "parameter", "bool"])
def test_what_cannot_be_cut_stays_whole_and_the_note_says_why(kind, rows):
    model = dampr.convert(Odd(kind), include=["a", "b"])
    close_at_random(model, 0.5)
    small = dampr.compact(model, example_inputs=X[:rows])
    fresh = torch.randn(50, 20)
    model.eval(), small.eval()
    for before, after in zip(
        dampr.prune.inputs.tensors(model(fresh)), dampr.prune.inputs.tensors(small(fresh)), strict=True
    ):
        torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    if kind in ("bool", "lstm"):
        assert small.a.out_features < 20
    else:
        assert small.a.out_features == 20 or kind == "twice"
        assert small.dampr_manifest["closed_but_kept"]


@pytest.mark.parametrize("rows", [1, 11])
def test_a_width_that_is_added_to_the_models_input_stays_and_says_why(rows):
    model = dampr.convert(Odd("input residual"), include=["a"])
    close_at_random(model, 0.5)
    small = dampr.compact(model, example_inputs=X[:rows])
    assert small.a.out_features == 20
    assert "channels meet data that has no channels of its own" in small.dampr_manifest["closed_but_kept"]["a"]


def test_a_module_under_two_names_is_one_gated_and_one_plain_layer():
    layer = nn.Linear(20, 20)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(20, 4))
    dampr.convert(model, exclude=["4"])  # with example inputs it would be left out, because it cannot be cut
    assert model[0] is model[2]
    assert isinstance(model[0], dampr.nn.GatedLinear)
    close_at_random(model, 0.5)
    small = dampr.compact(model, example_inputs=X)
    assert small[0] is small[2]
    torch.testing.assert_close(small.eval()(X), model.eval()(X))


@pytest.mark.parametrize("granularity", ["weight", (4, 5), (1, 20), (30, 1)])
def test_weight_gates_cut_the_units_whose_weights_are_all_closed(granularity):
    model = dampr.convert(mlp(), granularity=granularity, include=["0", "3"], example_inputs=X)
    close_at_random(model, 0.3)
    with torch.no_grad():
        z = model[3]._spread(torch.arange(model[3].gate.num_gates))
        model[3].gate.log_alpha[z[:4].unique()] = -5  # the first rows of the second layer
    small = prove(model)
    assert small[3].out_features <= 20


def test_layernorm_counts_open_units_or_blocks_the_cut_and_says_so():
    model = nn.Sequential(nn.Linear(20, 30), nn.LayerNorm(30), nn.ReLU(), nn.Linear(30, 5))
    dampr.convert(model, example_inputs=X)
    assert isinstance(model[1].open_statistics, dampr.nn.OpenStatistics)
    close_at_random(model, 0.5)
    assert prove(model)[0].out_features < 30
    model = nn.Sequential(nn.Linear(20, 30), nn.LayerNorm(30), nn.ReLU(), nn.Linear(30, 5))
    dampr.convert(model, exclude=["3"])
    close_at_random(model, 0.5)
    small = prove(model)
    assert small[0].out_features == 30
    assert "LayerNorm" in small.dampr_manifest["closed_but_kept"]["0"]


def test_frozen_parameters_and_modes_survive():
    model = dampr.convert(mlp(), example_inputs=X)
    close_at_random(model, 0.5)
    model[3].weight.requires_grad_(False)
    model.eval()
    model[0].train()
    small = dampr.compact(model, example_inputs=X)
    assert [p.requires_grad for p in small.parameters()] == [True, True, False, True, True, True]
    assert [m.training for m in small] == [m.training for m in model]


def test_compacted_model_trains_on():
    model = dampr.convert(mlp(), example_inputs=X)
    close_at_random(model, 0.5)
    small = dampr.compact(model, example_inputs=X)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    first = small(X).square().mean()
    first.backward()
    optimizer.step()
    assert small(X).square().mean() < first


def test_a_difference_names_the_first_layer_and_changes_nothing(monkeypatch):
    model = dampr.convert(mlp(), example_inputs=X)
    close_at_random(model, 0.5)
    right = cutting.cut_closed

    def wrong(small, *args):
        result = right(small, *args)
        with torch.no_grad():
            small[3].bias += 0.5
        return result

    monkeypatch.setattr(cutting, "cut_closed", wrong)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(dampr.CompactionError, match=r"layer '3' is the first whose output differs; .* differ by up to"):
        dampr.compact(model, example_inputs=X)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training


def test_a_unit_that_reaches_its_reader_with_varying_values_stays_and_says_why():
    class Positional(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.head = nn.Linear(20, 20), nn.Linear(20, 3)

        def forward(self, x):
            return self.head(self.fc(x) + x.detach().cumsum(0))

    model = dampr.convert(Positional(), include="fc")  # with example inputs it would find out
    close_at_random(model, 0.5)
    small = dampr.compact(model, example_inputs=X)
    assert small.fc.out_features == 20
    assert "channels meet data that has no channels of its own" in small.dampr_manifest["closed_but_kept"]["fc"]


@pytest.mark.parametrize(
    ("model", "example", "error", "message"),
    [
        (nn.Linear(20, 2), X, ValueError, "model=Linear: expected gated layers"),
        (dampr.nn.GatedLinear(20, 2), X, ValueError, "a gated layer itself"),
        (nn.Sequential(dampr.nn.GatedLinear(20, 2)), None, TypeError, "example_inputs=None"),
    ],
)
def test_bad_arguments(model, example, error, message):
    with pytest.raises(error, match=message):
        dampr.compact(model, example_inputs=example)


def test_summary_counts_what_compaction_leaves():
    model = dampr.convert(mlp(), example_inputs=X)
    close_at_random(model, 0.6)
    found, small = dampr.summary(model, example_inputs=X), dampr.compact(model, example_inputs=X)
    a, b = (int(layer.gate.is_open().sum()) for layer in dampr.prune.gated_layers(model).values())
    assert found.macs == 11 * (20 * 30 + 30 * 24 + 24 * 5)
    assert found.macs_compacted == 11 * (20 * a + a * b + b * 5)
    assert found.params == 20 * 30 + 30 + 30 * 24 + 24 + 24 * 5 + 5
    assert found.params_compacted == sum(p.numel() for p in small.parameters()) == 20 * a + a + a * b + b + b * 5 + 5
    assert [r.open for r in found.layers] == [a, b]
    text = str(found)
    assert f"{a} / 30" in text
    assert "compacted" in text
    assert dampr.summary(model).macs is None
