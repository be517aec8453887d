"""Gates on the parameters that read units: networks made of what no gated layer stands for, pruned exactly."""

import copy
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.prune import random_unstructured

import dampr
from dampr.nn import GatedParameter
from dampr.nn.parameter import put_on
from dampr.prune import gated_layers
from dampr.prune.cost import Cost
from dampr.prune.measure import count_macs, count_params
from tests.prune.unit_networks import IMAGE, NETS, WORDS, Gainless, Handed, Own, close_some, converted, shaken


@pytest.fixture(autouse=True)
def by_units(monkeypatch):
    """Also where gated layers reach as much."""
    monkeypatch.setattr(sys.modules["dampr.prune.convert"], "WORTH", -1.0)


@pytest.mark.parametrize("family", ["hard_concrete", "dep_l0", "dam", "diffprune", "diffmask"])
@pytest.mark.parametrize("name", NETS)
def test_masked_equals_compacted_at_the_size_foretold(name, family):
    model, x, y, _ = converted(name, gate=family)
    assert all(type(layer) is GatedParameter for layer in gated_layers(model).values())
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-6)
    costs = {"macs": Cost(model, x, "macs"), "params": Cost(model, x, "params")}
    close_some(model)
    masked = model(x)
    small = dampr.compact(model, example_inputs=x)
    torch.testing.assert_close(small(x), masked, rtol=1e-5, atol=1e-5 * float(masked.detach().abs().max()))
    left = {metric: int(cost(cost.decision())) for metric, cost in costs.items()}
    assert left == {"macs": count_macs(small, x), "params": count_params(small)}
    assert left["macs"] < costs["macs"].total
    assert not any(isinstance(module, GatedParameter) for module in small.modules())


@pytest.mark.parametrize("name", NETS)
def test_a_budget_is_met_and_everything_else_works_too(name, tmp_path):
    model, x, _, _ = converted(name)
    total = count_macs(model, x)
    # torch pickles no parametrized module
    pickled = [] if name == "weight norm" else [pickle.loads(pickle.dumps(model))]
    for copied in (copy.deepcopy(model), *pickled):
        assert torch.equal(copied(x), model(x))
    assert dampr.verify_model(model, x).layers
    budget = dampr.Budget(model, x, macs=0.6, steps=8)
    report = budget.finalize()
    assert report.reached <= 0.6 * total
    small = dampr.compact(model, example_inputs=x)
    assert count_macs(small, x) == report.reached
    large = dampr.expand(small)
    torch.testing.assert_close(large(x), small(x), rtol=1e-5, atol=1e-5)
    assert count_macs(large, x) == total
    dampr.save(small, tmp_path / "small.safetensors")
    build, _ = NETS[name]
    loaded = dampr.load(tmp_path / "small.safetensors", build())
    torch.testing.assert_close(loaded(x), small(x), rtol=0, atol=0)
    assert dampr.expand(loaded).state_dict().keys() == large.state_dict().keys()


@pytest.mark.parametrize(
    "name",
    [
        "densenet",
        "attention",
        "bare",
        "shuffle",
        "shuffle units",
        "groups without gain",
        "circular",
        "one weight in two layers",
        "one layer of two names",
        "a list of layers",
        "recurrent, with a head in it",
    ],
)
def test_a_plan_trains_compacts_and_keeps_the_optimizer(name):
    model, x, y, _ = converted(name)
    plan = dampr.Plan(model, x, macs=0.6, steps=40)
    optimizer = torch.optim.Adam(plan.model.parameters(), lr=1e-3)
    for _ in range(40):
        optimizer.zero_grad()
        (F.mse_loss(plan.model.train()(x), y) + plan.penalty()).backward()
        optimizer.step()
        plan.step(optimizer)
    small = plan.finish()
    assert not gated_layers(small)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in small.parameters()}
    assert all(state["exp_avg"].shape == p.shape for p, state in optimizer.state.items())
    optimizer.zero_grad()
    small(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    torch.testing.assert_close(copy.deepcopy(small)(x), small(x))
    assert count_macs(small, x) <= 0.6 * count_macs(NETS[name][0](), x) + 1


def test_a_layer_of_two_names_has_gates_once():
    model, _, _, _ = converted("one layer of two names")
    assert len(model.a.weight_gates) == 1


def test_once_by_each_criterion():
    build, x = NETS["densenet"]
    model = shaken(build())
    for how in (
        {"criterion": "magnitude"},
        {"criterion": "taylor", "batches": [(x, torch.zeros(2, 5))], "loss": F.mse_loss},
    ):
        small = dampr.prune_once(model, macs=0.5, example_inputs=x, **how)
        assert count_macs(small, x) <= 0.5 * count_macs(model, x)


def test_gates_keep_parameters_and_their_names_and_learn():
    model = shaken(NETS["densenet"][0]())
    before = dict(model.named_parameters())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    dampr.convert(model, example_inputs=IMAGE)
    assert all(dict(model.named_parameters())[name] is p for name, p in before.items())
    model.load_state_dict(state, strict=True)
    model.train()(IMAGE).square().sum().backward()
    for layer in gated_layers(model).values():
        assert layer.gate.log_alpha.grad is not None
    assert any(bool(layer.gate.log_alpha.grad.any()) for layer in gated_layers(model).values())
    assert float(dampr.penalty(model).detach()) > 0
    again = dampr.convert(NETS["densenet"][0](), example_inputs=IMAGE)
    close_some(model)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(IMAGE), model.eval()(IMAGE))


def test_every_group_of_a_convolution_around_a_shuffle_loses_as_many_channels():
    model, x, _, _ = converted("shuffle")
    close_some(model)
    small = dampr.compact(model, example_inputs=x)
    assert small[1][0].groups == small[3][0].groups == 2
    assert small[1][0].out_channels < 16
    assert small[3][0].in_channels == small[1][0].out_channels
    assert dampr.expand(small)[1][0].out_channels == 16


def test_a_norm_without_gain_that_norms_two_widths_is_left_alone():
    model = Gainless()
    model.joined, model.norm = nn.GroupNorm(2, 12, affine=False), nn.GroupNorm(2, 12, affine=False)
    model.c, model.head = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 2, 1)
    model.norm = model.joined
    with pytest.raises(dampr.prune.ConversionError, match="computes something else"):
        dampr.convert(model, example_inputs=IMAGE)


class Counted(nn.Module):
    """One number for two widths, which lose different numbers of channels."""

    def __init__(self):
        super().__init__()
        self.width, self.a, self.b, self.c, self.head = (
            12,
            nn.Linear(6, 12),
            nn.Linear(12, 12),
            nn.Linear(12, 8),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        h = self.a(x).relu().view(-1, 1, self.width).flatten(1)
        return self.head(self.c(self.b(h).relu().reshape(-1, self.width)).relu())


def test_widths_that_share_a_number_in_code_stay_as_they_are():
    model = dampr.convert(Counted(), example_inputs=torch.randn(5, 6))
    assert {name.partition(".")[0] for name in gated_layers(model)} == {"head"}
    assert "something beside its layers has that width" in model.dampr_skipped["a"]


def test_layers_that_one_constant_meets_have_one_width():
    model = dampr.convert(Handed(), example_inputs=WORDS)
    of_first, of_second = (gated_layers(model)[f"{name}.weight_gates.0"].gate for name in ("middle", "head"))
    assert of_first is of_second
    assert gated_layers(model)["second.weight_gates.0"].gate is not of_first  # the width in between is free


@pytest.mark.parametrize("write", ["bias[:, 3] = 2.0", "bias[:, 3:5].unsqueeze(0).mul_(3)", "bias.T[3].fill_(2)"])
def test_a_constant_that_one_unit_has_alone_is_no_constant_of_all(write):
    class Written(Handed):
        def forward(self, x):
            bias = torch.zeros((1, self.width)) + 0.5
            exec(write)
            return self.head((self.second(self.middle(self.first(x))) + bias).relu())

    model = dampr.convert(Written(), example_inputs=WORDS)
    assert "meet constants" in model.dampr_skipped["second"]
    assert {name.partition(".")[0] for name in gated_layers(model)} == {"second", "middle"}


def test_include_and_exclude_are_of_the_layers_that_write():
    model = dampr.convert(NETS["densenet"][0](), example_inputs=IMAGE, exclude="stem*")
    assert model.dampr_skipped["stem.0"].startswith("include or exclude")
    close_some(model)
    small = dampr.compact(model, example_inputs=IMAGE)
    assert small.stem[0].out_channels == 8
    assert small.head.in_features < 20


def test_a_layer_keeps_one_unit_and_widths_are_rounded():
    model, x, _, _ = converted("densenet")
    for gate in dict.fromkeys(layer.gate for layer in gated_layers(model).values()):
        gate.set_levels_(torch.full_like(gate.levels(), -3.0))
    small = dampr.compact(model, example_inputs=x)
    assert small.stem[0].out_channels == 1
    assert "every layer keeps one at least" in " ".join(small.dampr_manifest["closed_but_kept"].values())
    rounded = dampr.compact(model, example_inputs=x, round_to=4)
    assert rounded.stem[0].out_channels == 4
    torch.testing.assert_close(rounded(x), model(x), rtol=1e-5, atol=1e-5)


def test_numbers_beside_parameters_follow_and_come_back():
    model, x, _, _ = converted("attention")
    attention = model[0]
    gate = next(layer.gate for name, layer in gated_layers(model).items() if name.startswith("0.proj"))
    gate.set_levels_(torch.tensor([1.0, -3.0, 1.0]))
    small = dampr.compact(model, example_inputs=x)
    assert (attention.num_heads, small[0].num_heads, small[0].qkv.out_features, small[0].head_dim) == (3, 2, 24, 4)
    assert dampr.expand(small)[0].num_heads == 3


def test_what_cannot_be_put_back_raises_and_leaves_the_model():
    class Zero(dampr.gates.HardConcrete):
        def deterministic(self):
            return torch.zeros(self.num_gates)

        def forward(self, rows=None):
            return torch.zeros(self.num_gates)

    model = NETS["bare"][0]()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="a fresh gate of it is 0"):
        dampr.convert(model, example_inputs=WORDS, gate=Zero)
    assert not gated_layers(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "index", [torch.tensor([0.0]), torch.tensor([[0]]), torch.tensor([-2, 0]), torch.tensor([], dtype=torch.int64), 3]
)
def test_an_index_of_gates_is_checked(index):
    with pytest.raises(ValueError, match="index="):
        GatedParameter("hard_concrete", 0, index)


def test_a_gated_parameter_says_what_it_cannot_do():
    gated = GatedParameter("hard_concrete", 0, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="prior_precision=1"):
        gated.penalty(prior_precision=1.0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sizes", 3),
        ("sizes", {"0": 4}),
        ("sizes", {"0": {"num_heads": 4}}),
        ("sizes", {"0": {"num_heads": {"before": -1}}}),
        ("sizes", {"0": {"_modules": {"before": 2}}}),
        ("sizes", {"0": {"forward": {"before": 2}}}),
        ("sizes", {"9": {"num_heads": {"before": 2}}}),
        ("tensors", {"0.up.weight": 3}),
        ("tensors", {"0.up.weight": {"999999999": {"before": 2, "kept": [0]}}}),
        ("tensors", {"0.up.weight": {"0": {"before": 2, "kept": [5]}}}),
        ("tensors", {"0.nowhere": {"0": {"before": 2, "kept": [0]}}}),
    ],
)
def test_a_manifest_is_not_believed(key, value):
    model, x, _, _ = converted("attention")
    close_some(model)
    small = dampr.compact(model, example_inputs=x)
    small.dampr_manifest[key] = value
    with pytest.raises(ValueError, match="manifest"):
        dampr.expand(small)


@pytest.mark.parametrize(
    "norm",
    [parametrizations.weight_norm, parametrizations.spectral_norm, lambda m: random_unstructured(m, "weight", 1)],
)
def test_a_parameter_with_gates_is_not_computed_of_others_afterwards(norm):
    """torch would read the product and keep it as a buffer, which nothing trains."""
    layer = nn.Linear(4, 3)
    put_on(layer, "weight", GatedParameter("hard_concrete", 0, torch.tensor([0, 1, 1])))
    x = torch.randn(2, 4)
    before = layer.eval()(x)
    with pytest.raises(RuntimeError, match=r"^Linear.weight has gates, .*: expected what torch.nn.utils makes"):
        norm(layer)
    assert torch.equal(layer(x), before)
    assert isinstance(layer._parameters["weight"], nn.Parameter)


class Doubled(nn.Module):
    def forward(self, bias):
        return 2 * bias


def test_another_parameter_of_a_layer_with_gates_may_be_computed_of_others_afterwards():
    """torch derives a class of its own from that with the gates."""
    model, x, _, _ = converted("one weight in two layers")
    close_some(model)
    parametrize.register_parametrization(model.b, "bias", Doubled())
    masked = model(x)
    assert torch.equal(copy.deepcopy(model)(x), masked)
    small = dampr.compact(model, example_inputs=x)
    torch.testing.assert_close(small(x), masked)
    assert parametrize.is_parametrized(small.b, "bias")
    parametrize.remove_parametrizations(small.b, "bias")
    torch.testing.assert_close(small(x), masked)


@pytest.mark.parametrize("build", [lambda: Own(16, 8), lambda: nn.LSTM(16, 4)])
def test_reset_parameters_fills_the_parameters_and_not_their_products_or_gates(build):
    layer = build()
    name = next(name for name, _ in layer.named_parameters())
    put_on(layer, name, GatedParameter("hard_concrete", 1, torch.arange(16)))
    gate = getattr(layer, f"{name}_gates")[0].gate
    gate.log_alpha.data[:8] = -9.0
    levels, plain = gate.levels(), build()
    torch.manual_seed(1)
    layer.reset_parameters()
    torch.manual_seed(1)
    plain.reset_parameters()
    for own, parameter in plain.named_parameters():
        assert torch.equal(layer.get_parameter(own) if own != name else layer._parameters[name], parameter)
    assert torch.equal(gate.levels(), levels)
    assert len(getattr(layer, f"{name}_gates")) == 1


def test_a_transposed_weight_in_groups_writes_its_width():
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 16, 2, 2, groups=4, bias=False), nn.Conv2d(16, 3, 1)]
    with pytest.raises(dampr.ConversionError, match="'2': 'include or exclude leaves it out"):
        dampr.convert(nn.Sequential(*layers), example_inputs=IMAGE, exclude="2")
    model = dampr.convert(nn.Sequential(*layers), example_inputs=IMAGE)
    assert set(model.dampr_skipped) == {"3"}


class OneAndTied(nn.Module):
    """A layer with one channel, and a head that shares the weight of the embedding."""

    def __init__(self):
        super().__init__()
        self.table, self.first, self.second = nn.Embedding(11, 8), nn.Linear(8, 10), nn.Linear(10, 8)
        self.score, self.head = nn.Linear(8, 1), nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x):
        h = self.second(self.first(self.table(x)).relu()).relu()
        return self.head(h * self.score(h).sigmoid())


def test_layers_with_one_channel_and_with_a_shared_weight_are_named():
    model = dampr.convert(OneAndTied(), example_inputs=torch.randint(0, 11, (3, 5)))
    assert set(model.dampr_skipped) == {"score", "head"}
    assert model.dampr_skipped["score"] == "it has one channel"
    assert model.dampr_skipped["head"].startswith("rows of an embedding are picked by data")


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_columns_of_an_embedding_bag_can_go(mode, tmp_path):
    def dense():
        bag = nn.EmbeddingBag(11, 8, mode=mode, padding_idx=0)
        return nn.Sequential(bag, nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 3))

    torch.manual_seed(0)
    x = torch.randint(0, 11, (4, 5))
    model = dampr.convert(dense(), example_inputs=x).eval()
    assert set(model.dampr_skipped) == {"3"}
    close_some(model)
    cost, masked = Cost(model, x, "params"), model(x)
    small = dampr.compact(model, example_inputs=x)
    assert small[0].embedding_dim < 8
    assert count_params(small) == cost(cost.decision())
    torch.testing.assert_close(small(x), masked)
    dampr.save(small, tmp_path / "small")
    torch.testing.assert_close(dampr.load(tmp_path / "small", dense()).eval()(x), masked)
    torch.testing.assert_close(dampr.expand(small)(x), masked)
