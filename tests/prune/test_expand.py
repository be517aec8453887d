"""expand gives the widths back and keeps the function; compact(optimizer=...) goes on with what the optimizer knows."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn

import dampr
from dampr.nn import (
    GatedEmbedding,
    GatedGRU,
    GatedLSTM,
    GatedMultiheadAttention,
    GatedRNN,
    GatedTransformerEncoderLayer,
)
from dampr.nn.computed import copied
from dampr.prune.expand import PassedChecks
from tests import models
from tests.prune.test_models import close_at_random, trained


@pytest.mark.parametrize("name", models.ALL)
def test_expanded_networks_have_the_dense_shapes_and_the_same_outputs(name, tmp_path):
    model, x = models.ALL[name]()
    dense = copy.deepcopy(model)
    dampr.convert(trained(model), example_inputs=x)
    close_at_random(model)
    small = dampr.compact(model, example_inputs=x).eval()
    large = dampr.expand(small)
    assert not large.training
    torch.testing.assert_close(large(x), small(x), atol=1e-5, rtol=1e-5)
    shapes, expected = ({k: v.shape for k, v in m.state_dict().items()} for m in (large, dense))
    added = shapes.keys() - expected.keys()
    assert {k: v for k, v in shapes.items() if k not in added} == expected
    assert all(key.endswith("bias") for key in added)
    assert re.sub(", bias=(True|False)", "", str(dense)) == re.sub(", bias=(True|False)", "", str(large))
    dampr.save(small, tmp_path / "small.safetensors")
    again = dampr.expand(dampr.load(tmp_path / "small.safetensors", copy.deepcopy(dense)))
    assert all(torch.equal(v, large.state_dict()[k]) for k, v in again.state_dict().items())


def normed(norm):
    """Each kind of layer under a norm of its weight, read by another."""
    layers = [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ConvTranspose2d(12, 8, 2, 2),
        nn.Conv2d(8, 8, 3, groups=8),
    ]
    acts = [part for layer in layers for part in (norm(layer), nn.ReLU())]
    return nn.Sequential(
        *acts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), norm(nn.Linear(8, 6)), nn.Tanh(), nn.Linear(6, 3)
    )


def groups_of(channels, times=1):
    last = nn.Conv2d(channels * times, 3, 1)
    deep = nn.Conv2d(channels, channels * times, 3, padding=1, groups=channels)
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(), deep, nn.ReLU(), last
    )


def transposed_groups():
    up = nn.ConvTranspose2d(12, 12, 2, 2, groups=3)
    return nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), up, nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 3, 1))


SHAPED = {
    "weight_norm": lambda: normed(nn.utils.parametrizations.weight_norm),
    "weight_norm by hooks": lambda: normed(nn.utils.weight_norm),
    "spectral_norm": lambda: normed(nn.utils.parametrizations.spectral_norm),
    "spectral_norm by hooks": lambda: normed(nn.utils.spectral_norm),
    "depthwise": lambda: groups_of(8),
    "depthwise, two of each": lambda: groups_of(6, 2),
    "transposed groups": transposed_groups,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("left", ["some", "one"])
@pytest.mark.parametrize("name", SHAPED)
def test_norms_of_weights_and_groups_come_back(name, left, tmp_path):
    torch.manual_seed(0)
    model, x = trained(SHAPED[name]()).double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    dense = copied(model)
    dampr.convert(model, example_inputs=x)
    for gate in dict.fromkeys(layer.gate for layer in dampr.prune.gated_layers(model).values()):
        closed = torch.arange(gate.num_gates) > (0 if left == "one" else gate.num_gates // 2)
        gate.set_levels_(torch.where(closed, -3.0, 1.0))
    small = dampr.compact(model, example_inputs=x)
    torch.testing.assert_close(small(x), model(x), rtol=1e-9, atol=1e-9)
    large = dampr.expand(small)
    torch.testing.assert_close(large(x), small(x), rtol=1e-9, atol=1e-9)
    assert [(p.shape, name) for name, p in large.named_parameters()] == [
        (p.shape, name) for name, p in dense.named_parameters()
    ]
    assert str(large) == str(dense)
    dampr.save(small, tmp_path / "small.safetensors")
    loaded = dampr.load(tmp_path / "small.safetensors", dense)
    torch.testing.assert_close(loaded(x), small(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dampr.expand(loaded)(x), small(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("build", "arguments"),
    [
        (GatedLSTM, {"num_layers": 2}),
        (GatedGRU, {"num_layers": 2, "bidirectional": True}),
        (GatedRNN, {"bidirectional": True, "bias": False}),
        (GatedLSTM, {"proj_size": 5, "num_layers": 2}),
    ],
)
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_expanded_recurrent_layers(build, arguments):
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.rnn = GatedEmbedding(9, 7), build(7, 10, batch_first=True, **arguments)
            self.head = nn.Linear(self.rnn._width * self.rnn._directions, 4)

        def forward(self, x):
            return self.head(self.rnn(self.embedding(x))[0])

    model, x = Tagger(), torch.randint(0, 9, (3, 6))
    close_at_random(model, 0.6)
    small = dampr.compact(model, example_inputs=x).eval()
    large = dampr.expand(small)
    torch.testing.assert_close(large(x), small(x), atol=1e-5, rtol=1e-5)
    expected = {k: v.shape for k, v in model.state_dict().items() if "gate" not in k}
    assert {k: v.shape for k, v in large.state_dict().items()} == expected
    assert (large.rnn.hidden_size, large.rnn.input_size) == (10, 7)


@pytest.mark.parametrize("arguments", [{}, {"kdim": 7, "vdim": 9, "add_bias_kv": True}])
def test_expanded_attention(arguments):
    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = GatedMultiheadAttention(12, 4, batch_first=True, **arguments), nn.Linear(12, 3)

        def forward(self, x, k, v):
            return self.head(self.attention(x, k, v, need_weights=False)[0])

    model = Attend()
    x = (
        torch.randn(2, 5, 12),
        torch.randn(2, 6, arguments.get("kdim", 12)),
        torch.randn(2, 6, arguments.get("vdim", 12)),
    )
    model.attention.gate.log_alpha.data[:3:2] = -9
    optimizer = torch.optim.Adam(dampr.param_groups(model, lr=1e-2))
    model(*x).sum().backward()
    optimizer.step()
    moments = optimizer.state[model.attention.out_proj.weight]["exp_avg"].clone()
    small = dampr.compact(model, example_inputs=x, optimizer=optimizer).eval()
    large = dampr.expand(small)
    assert type(large.attention) is nn.MultiheadAttention
    torch.testing.assert_close(large(*x), small(*x))
    expected = {k: v.shape for k, v in model.state_dict().items() if "gate" not in k}
    assert {k: v.shape for k, v in large.state_dict().items()} == expected
    kept = [*range(3, 6), *range(9, 12)]
    assert torch.equal(optimizer.state[small.attention.out_proj.weight]["exp_avg"], moments[:, kept])


def test_expanded_transformer_layers_are_those_of_torch():
    layer = GatedTransformerEncoderLayer(16, 4, 24, batch_first=True)
    model, x = nn.Sequential(layer, nn.Linear(16, 3)), torch.randn(2, 5, 16)
    layer.self_attn.gate.log_alpha.data[1] = -9
    layer.linear1.gate.log_alpha.data[:5] = -9
    small = dampr.compact(model, example_inputs=x).eval()
    large = dampr.expand(small)
    assert [type(m) for m in large] == [nn.TransformerEncoderLayer, nn.Linear]
    assert large[0].linear1.out_features == 24
    torch.testing.assert_close(large(x), small(x), atol=1e-5, rtol=1e-5)


def test_the_compacted_model_is_not_changed():
    model, x = models.mlp()
    close_at_random(dampr.convert(model, example_inputs=x))
    small = dampr.compact(model, example_inputs=x)
    before = {k: v.clone() for k, v in small.state_dict().items()}
    large = dampr.expand(small)
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())
    assert not hasattr(large, "dampr_manifest")


def test_what_has_no_fitting_manifest_is_refused():
    model, x = models.mlp()
    with pytest.raises(ValueError, match="expected the dampr_manifest"):
        dampr.expand(model)
    close_at_random(dampr.convert(model, example_inputs=x))
    small = dampr.compact(model, example_inputs=x)
    small[0] = nn.Linear(12, 3)
    with pytest.raises(ValueError, match=r"0.weight: 3 channels, but its manifest keeps \d+ of 20"):
        dampr.expand(small)
    small.dampr_manifest["layers"]["elsewhere"] = {}
    small[0] = nn.Linear(12, len(small.dampr_manifest["layers"]["0"]["out"]["kept"]))
    with pytest.raises(ValueError, match="names a layer 'elsewhere'"):
        dampr.expand(small)


@pytest.mark.parametrize("make", [torch.optim.Adam, lambda groups: torch.optim.SGD(groups, momentum=0.9)])
@pytest.mark.parametrize("name", ["mlp", "resnet18", "mobilenet_v2"])
def test_training_goes_on_with_what_is_left_of_the_state(name, make):
    torch.manual_seed(0)
    model, x = models.ALL[name]()
    dampr.convert(model, example_inputs=x)
    optimizer = make(dampr.param_groups(model, lr=1e-2))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def step(net):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()

    model.eval()  # gates of 1, norms with their statistics: the same function before and after
    for _ in range(3):
        step(model)
    for layer in dampr.prune.gated_layers(model).values():
        layer.gate.log_alpha.data[::2] = -9
    small = dampr.compact(model, example_inputs=x, optimizer=optimizer).eval()
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in small.parameters()}
    key = "exp_avg" if make is torch.optim.Adam else "momentum_buffer"
    known = dict(model.named_parameters())
    carried = {n: optimizer.state[p][key] for n, p in small.named_parameters() if n in known}
    assert all(value.shape == small.get_parameter(n).shape for n, value in carried.items())
    assert any(bool(value.any()) for value in carried.values())
    step(small)
    scheduler.step()
    assert len(optimizer.param_groups) == 2, "groups stay, for schedulers count them"


def test_state_of_a_linear_layer_is_cut_by_rows_and_columns():
    model, x = models.mlp()
    dampr.convert(model, example_inputs=x)
    optimizer = torch.optim.Adam(dampr.param_groups(model, lr=1e-2))
    model(x).square().sum().backward()
    optimizer.step()
    before = optimizer.state[model[2].weight]["exp_avg"].clone()
    close_at_random(model)
    small = dampr.compact(model, example_inputs=x, optimizer=optimizer)
    rows, columns = (torch.tensor(small.dampr_manifest["layers"]["2"][side]["kept"]) for side in ("out", "in"))
    assert torch.equal(optimizer.state[small[2].weight]["exp_avg"], before[rows][:, columns])
    with pytest.raises(TypeError, match="optimizer=3"):
        dampr.compact(model, example_inputs=x, optimizer=3)


def small_of(kept):
    torch.manual_seed(0)
    x = torch.randn(8, 6)
    gated = dampr.convert(nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3)), example_inputs=x)
    with torch.no_grad():
        gated[0].gate.log_alpha[kept:] = -9
    return dampr.compact(gated, example_inputs=x)


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"before": 10, "kept": [0, 1, 1, 3]}, "expected rising indices below that"),
        ({"before": 10, "kept": [3, 2, 1, 0]}, "expected rising indices below that"),
        ({"before": 10, "kept": [-1, 0, 1, 2]}, "expected rising indices below that"),
        ({"before": 3, "kept": [0, 1, 2, 3]}, "expected rising indices below that"),
        ({"before": 10, "kept": [0, 1, 2]}, "4 channels, but its manifest keeps 3 of 10"),
        ({"before": 2**30, "kept": [0, 1, 2, 3]}, "expected at most 10000 times as many"),
        ({"before": 10**12, "kept": [0, 1, 2, 3]}, "1000000000000 channels before, expected 1 to 2147483647"),
        ({"before": 0, "kept": []}, "0 channels before, expected 1 to"),
        (None, "'0': out=None, expected what was cut of it"),
        ({"before": True, "kept": [0]}, "expected a number of channels before and a list"),
        ({"before": 10, "kept": [0.0, 1.0, 2.0, 3.0]}, "expected a number of channels before and a list"),
        ({"kept": [0, 1, 2, 3]}, "expected a number of channels before and a list"),
        ([10, [0, 1, 2, 3]], "expected a number of channels before and a list"),
    ],
)
def test_a_manifest_is_not_believed(entry, match):
    small = small_of(4)
    small.dampr_manifest["layers"]["0"]["out"] = entry
    with pytest.raises(ValueError, match=match):
        dampr.expand(small)


def change(*path, to):
    """A change of a manifest: what lies at ``path`` becomes ``to``."""

    def make(manifest):
        for key in path[:-1]:
            manifest = manifest[key]
        manifest[path[-1]] = to

    return make


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def transformer():
    return nn.Sequential(nn.Linear(6, 8), nn.TransformerEncoderLayer(8, 4, 12, 0.0, batch_first=True), nn.Linear(8, 3))


def groups():
    return nn.Sequential(nn.Linear(6, 16), nn.GroupNorm(4, 16), nn.ReLU(), nn.Linear(16, 3))


@pytest.mark.parametrize(
    ("build", "shape", "made", "match"),
    [
        (Recurrent, (2, 5, 6), change("layers", "rnn", "units", to=3), "'rnn': units=3, expected a list"),
        (Recurrent, (2, 5, 6), change("layers", "rnn", "units", "kept", to=[]), "expected a list of those"),
        (Recurrent, (2, 5, 6), change("layers", "rnn", "units", "kept", to=[[0]] * 2), "units: 2 lists .* expected 1"),
        (Recurrent, (2, 5, 6), change("layers", "rnn", to=7), "'rnn': 7, expected an entry for each side"),
        (Recurrent, (2, 5, 6), change("layers", "", to={"out": {"before": 9, "kept": [1]}}), "'' names a Recurrent"),
        (Recurrent, (2, 5, 6), change("layers", 3, to={}), "layers=.*, expected entries by name"),
        (transformer, (2, 5, 6), change("layers", "1.self_attn", "heads", to=None), "heads=None, expected"),
        (
            transformer,
            (2, 5, 6),
            change("layers", "1.self_attn", "heads", "before", to=5),
            r"heads=.*, expected 2 of 4, those of the layer",
        ),
        (groups, (4, 6), change("tensors", to=[1]), "tensors=.*, expected entries by name"),
        (groups, (4, 6), change("tensors", "0", to={}), "names a tensor '0' that is not there"),
        (groups, (4, 6), change("tensors", "0.weight", "0", to=4), "4, expected a number of channels"),
    ],
)
def test_manifests_of_other_kinds_of_layers_are_not_believed_either(build, shape, made, match):
    torch.manual_seed(0)
    x = torch.randn(shape)
    model = dampr.convert(build(), example_inputs=x)
    for gate in dampr.prune.distinct_gates(model).values():
        gate.log_alpha.data[: gate.num_gates // 2] = -9
    small = dampr.compact(model, example_inputs=x)
    made(small.dampr_manifest)
    with pytest.raises(ValueError, match=match):
        dampr.expand(small)


def adafactor(model):
    return torch.optim.Adafactor(model.parameters(), lr=1e-2)


class Rows(torch.optim.Optimizer):
    """Factored second moments with a dimension less, as transformers keeps them."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure=None):
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[p]
            for name, dim in (("row", -1), ("column", -2)) if p.dim() > 1 else ():
                state[name] = state.get(name, 0) + p.grad.square().mean(dim)
            p.sub_(p.grad, alpha=0.01)


class Strange(torch.optim.SGD):
    def step(self, closure=None):
        super().step(closure)
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p]["basis"] = torch.zeros(7, 5)


@pytest.mark.parametrize("make", [adafactor, lambda model: Rows(model.parameters())])
def test_factored_state_is_cut_with_its_parameter(make):
    torch.manual_seed(0)
    x = torch.randn(8, 6)
    gated = dampr.convert(nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3)), example_inputs=x)
    optimizer = make(gated)
    gated(x).square().mean().backward()
    optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[gated[2].weight].items() if torch.is_tensor(value)}
    with torch.no_grad():
        gated[0].gate.log_alpha[4:] = -9
    small = dampr.compact(gated, example_inputs=x, optimizer=optimizer)
    state = optimizer.state[small[2].weight]
    column = next(key for key in before if key in ("col_var", "column"))
    assert torch.equal(state[column], before[column][..., :4])
    row = next(key for key in before if key in ("row_var", "row"))
    assert torch.equal(state[row], before[row])
    small(x).square().mean().backward()
    optimizer.step()


def test_state_that_cannot_be_cut_is_refused_before_anything_is_done():
    torch.manual_seed(0)
    x = torch.randn(8, 6)
    gated = dampr.convert(nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3)), example_inputs=x)
    optimizer = Strange(gated.parameters(), lr=0.1)
    gated(x).square().mean().backward()
    optimizer.step()
    held = [p for group in optimizer.param_groups for p in group["params"]]
    with pytest.raises(ValueError, match=r"Strange keeps 'basis' of shape \(7, 5\) for a parameter of shape \(10, 6\)"):
        dampr.compact(gated, example_inputs=x, optimizer=optimizer)
    assert all(
        a is b for a, b in zip(held, (p for group in optimizer.param_groups for p in group["params"]), strict=True)
    )


def test_parameters_of_other_models_stay_in_their_groups_and_those_of_gates_leave():
    x = torch.randn(4, 6)
    model = dampr.convert(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)), example_inputs=x)
    head = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(dampr.param_groups(model, lr=0.1), momentum=0.9)
    optimizer.add_param_group({"params": list(head.parameters())})
    head(model(x)).sum().backward()
    optimizer.step()
    dampr.Budget(model, x, macs=0.5).finalize()
    small = dampr.compact(model, example_inputs=x, optimizer=optimizer)
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert held == {*small.parameters(), *head.parameters()}
    assert set(optimizer.state) == held


class Lookahead(torch.optim.Optimizer):
    def __init__(self, inner):
        self.inner = inner
        super().__init__(inner.param_groups, {})


def test_state_beside_that_of_parameters_is_refused():
    x = torch.randn(4, 6)
    model = dampr.convert(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)), example_inputs=x)
    nested = Lookahead(torch.optim.Adam(model.parameters()))
    with pytest.raises(ValueError, match="^optimizer: Lookahead has Adam in it, whose own state would not be cut"):
        dampr.compact(model, example_inputs=x, optimizer=nested)
    shared = torch.optim.SGD(model.parameters(), lr=0.1)
    shared.state["step"] = 3
    dampr.compact(model, example_inputs=x, optimizer=shared)
    assert shared.state["step"] == 3
    flat = torch.optim.SGD(model.parameters(), lr=0.1)
    flat.state["all"] = {"momentum": torch.zeros(52)}
    with pytest.raises(ValueError, match="^optimizer: SGD keeps 'all' for all parameters together"):
        dampr.compact(model, example_inputs=x, optimizer=flat)


def test_an_optimizer_of_something_else_is_refused():
    x = torch.randn(4, 6)
    model = dampr.convert(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)), example_inputs=x)
    other = torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="^optimizer: it holds no parameter of model; expected the one that trains it"):
        dampr.compact(model, example_inputs=x, optimizer=other)


def test_a_passed_check_runs_again_for_another_optimizer_more_parameters_or_state() -> None:
    layer, other = nn.Linear(2, 2), nn.Linear(2, 2)
    one, two = torch.optim.Adam(layer.parameters()), torch.optim.Adam(layer.parameters())
    seen: list[Any] = []
    checks = PassedChecks()

    def fails(optimizer: Any) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        checks.run(one, fails)
    for optimizer in (one, one, two, two, one):
        checks.run(optimizer, seen.append)
    assert seen == [one, two]
    layer(torch.ones(1, 2)).sum().backward()
    one.step()
    one.step()
    checks.run(one, seen.append)
    one.add_param_group({"params": list(other.parameters())})
    checks.run(one, seen.append)
    checks.run(one, seen.append)
    assert seen == [one, two, one, one]
    checks.forget()
    checks.run(one, seen.append)
    assert len(seen) == 5
