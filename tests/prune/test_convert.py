"""convert: the same function, the same parameters, or no change at all."""

import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dampr
from dampr.nn import GatedLinear
from dampr.prune.cost import Cost
from dampr.prune.measure import count_macs


class Plain(nn.Module):
    """Linear layers as attributes, one of them used twice, and a branch."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(10, 16)
        self.body = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 12)})
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        h = torch.relu(self.stem(x))
        h = torch.relu(self.body["a"](torch.relu(self.body["a"](h))))
        return self.head(torch.tanh(self.body["b"](h)))


def mlp():
    return nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


X = torch.linspace(-1, 1, 70).view(7, 10)


@pytest.mark.parametrize("build", [mlp, Plain])
@pytest.mark.parametrize("granularity", ["output", "input"])
@pytest.mark.parametrize("training", [True, False])
def test_outputs_parameters_and_modes_are_kept(build, granularity, training):
    model = build()
    x, y = X, model.eval()(X)
    model.train(training)
    before = dict(model.named_parameters())
    result = dampr.convert(model, granularity=granularity, example_inputs=x)
    assert result is model
    after = dict(model.named_parameters())
    assert all(after[name] is p for name, p in before.items())
    assert all(m.training == training for m in model.modules())
    assert torch.equal(model.eval()(x), y)


def test_with_example_inputs_the_classifier_keeps_its_outputs():
    model = dampr.convert(mlp(), example_inputs=X)
    assert [type(m) for m in model if isinstance(m, nn.Linear)] == [GatedLinear, GatedLinear, nn.Linear]
    plain = dampr.convert(Plain(), example_inputs=X)
    assert sorted(dampr.prune.gated_layers(plain)) == [
        "body.a.weight_gates.0",
        "body.b.weight_gates.0",
        "head.weight_gates.0",
    ]
    assert plain.dampr_skipped == {"head": "its outputs are the model's own"}


def test_without_example_inputs_every_match_is_converted():
    assert len(dampr.prune.gated_layers(dampr.convert(mlp()))) == 3


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (["body.*"], None, ["body.a", "body.b"]),
        ("body.?", "*.b", ["body.a"]),
        (nn.Linear, ["stem", "head"], ["body.a", "body.b"]),
        (None, ["head", "body.*"], ["stem"]),
    ],
)
def test_include_and_exclude_take_globs_and_types(include, exclude, expected):
    model = dampr.convert(Plain(), include=include, exclude=exclude)
    assert sorted(dampr.prune.gated_layers(model)) == expected


def test_layers_that_the_filters_leave_out_are_named_so():
    for how in ({"exclude": "2"}, {"include": ["0", "4"]}):
        layers = [nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 4)]
        model = dampr.convert(nn.Sequential(*layers), example_inputs=X, **how)
        assert sorted(dampr.prune.gated_layers(model)) == ["0", "4"]
        assert model.dampr_skipped["2"] == "include or exclude leaves it out"


class Shared(nn.Module):
    """Two layers whose outputs meet; what reads them has a width of its own."""

    def __init__(self, meet):
        super().__init__()
        self.a, self.b, self.meet = nn.Linear(10, 8), nn.Linear(10, 8), meet
        self.c, self.d = nn.Linear(8, 9), nn.Linear(9, 4)

    def forward(self, x):
        return self.d(self.c(self.meet(self.a(x), self.b(x))).relu())


class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 1, groups=8)
        self.c, self.d = nn.Conv2d(8, 9, 1), nn.Linear(9, 4)

    def forward(self, x):
        return self.d(self.c(self.b(self.a(x[:, None, None])).relu()).relu().mean((2, 3)))


SHARED = {
    "sum": lambda: Shared(lambda a, b: (a + b).relu()),
    "product": lambda: Shared(lambda a, b: F.silu(a) * b),
    "squeezed": lambda: Shared(lambda a, b: a.relu() * b.sigmoid()),
    "depthwise": Depthwise,
}


@pytest.mark.parametrize("how", [{"exclude": "a"}, {"exclude": "b"}, {"exclude": "b", "tie": False}], ids=str)
@pytest.mark.parametrize("net", SHARED.values(), ids=SHARED)
def test_a_width_that_an_excluded_layer_writes_too_stays_and_no_gate_is_useless(net, how):
    dense = net()
    model = dampr.convert(dense, example_inputs=X, **how)
    cost = Cost(model, X, "params")
    assert bool(cost.prunable.all())
    for layer in dampr.prune.gated_layers(model).values():
        layer.gate.log_alpha.data[::2] = -9.0
    small = dampr.compact(model, example_inputs=X)
    assert not small.dampr_manifest["closed_but_kept"]
    assert small.a.weight.shape[0] == small.b.weight.shape[0] == 8
    assert model.dampr_skipped[how["exclude"]] == "include or exclude leaves it out"
    other = {"a": "b", "b": "a"}[how["exclude"]]
    reasons = "exclude leaves out a layer that writes its width too", "depthwise convolution has the channels"
    assert any(reason in model.dampr_skipped[other] for reason in reasons)


def test_subclasses_are_left_alone():
    class Special(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = dampr.convert(nn.Sequential(Special(10, 10), nn.Linear(10, 4)))
    assert type(model[0]) is Special


def test_an_optimizer_made_before_keeps_working():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dampr.convert(model, example_inputs=X)
    before = model[0].weight.detach().clone()
    model(X).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


def test_forward_hooks_move_along():
    model, seen = mlp(), []
    model[0].register_forward_hook(lambda m, i, o: seen.append(type(m)))
    dampr.convert(model, example_inputs=X)
    seen.clear()
    model(X)
    assert seen == [GatedLinear]


def test_a_bare_linear_comes_back_converted():
    dense = nn.Linear(10, 4)
    gated = dampr.convert(dense)
    assert isinstance(gated, GatedLinear)
    assert gated.weight is dense.weight


def _snapshot(model):
    return [(n, type(m), m.training, id(m)) for n, m in model.named_modules()], [
        (n, id(p)) for n, p in model.named_parameters()
    ]


class Bypass(nn.Module):
    """Reads the weight of a layer without calling it, and scales by whether its type changed."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(10, 10)
        self.out = nn.Linear(10, 2)

    def forward(self, x):
        return self.out(nn.functional.linear(x, self.fc.weight) * (1 if type(self.fc) is nn.Linear else 2))


class Reader(nn.Module):
    """Reads the weight of a layer, whatever its type, without calling it."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(10, 10)
        self.out = nn.Linear(10, 2)

    def forward(self, x):
        return self.out(nn.functional.linear(x, self.fc.weight))


class WeightNorm(nn.Module):
    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.fc = nn.utils.weight_norm(nn.Linear(10, 10))
        self.out = nn.Linear(10, 2)

    def forward(self, x):
        return self.out(self.fc(x))


class Fails(nn.Module):
    """Runs while its layers are plain, and raises afterwards."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(10, 10)
        self.out = nn.Linear(10, 2)

    def forward(self, x):
        if type(self.fc) is not nn.Linear:
            raise ArithmeticError("only plain layers here")
        return self.out(self.fc(x))


@pytest.mark.parametrize(
    ("build", "arguments", "error", "message"),
    [
        (Bypass, {"example_inputs": X, "tie": False}, dampr.ConversionError, "outputs changed"),
        (
            Reader,
            {"example_inputs": X, "granularity": "input"},
            dampr.ConversionError,
            "'fc': the model reads its weight without calling it",
        ),
        (
            WeightNorm,
            {"example_inputs": X, "per_sample": True},
            dampr.ConversionError,
            "'fc': 'its weight is computed from other tensors",
        ),
        (Fails, {"example_inputs": X}, ArithmeticError, "only plain layers"),
        (mlp, {"include": "nothing.*"}, dampr.ConversionError, r"include='nothing.\*'.*no layer of Sequential"),
        (mlp, {"gate": "l2"}, ValueError, "gate='l2'"),
        (mlp, {"gate": dampr.gates.HardConcrete(16)}, TypeError, "gate=HardConcrete instance"),
        (mlp, {"granularity": "rows"}, ValueError, "granularity='rows'"),
        (mlp, {"include": 3}, TypeError, "include"),
        (mlp, {"exclude": [3]}, TypeError, "exclude=3: expected name globs and types"),
        (mlp, {"example_inputs": 3}, TypeError, "example_inputs=3"),
        (mlp, {"example_inputs": torch.zeros(2, 11)}, RuntimeError, "shapes"),
    ],
)
def test_a_failed_conversion_leaves_the_model_as_it_was(build, arguments, error, message):
    model = build()
    model[0].eval() if isinstance(model, nn.Sequential) else model.fc.eval()
    for p in list(model.parameters())[:1]:
        p.requires_grad_(False)
    before, frozen = _snapshot(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=message):
        dampr.convert(model, **arguments)
    assert _snapshot(model) == before
    assert [p.requires_grad for p in model.parameters()] == frozen


def test_a_layer_that_is_not_called_has_gates_on_what_reads_it():
    """A model that looks at the types of its layers keeps them where gates are on parameters."""
    model = Bypass().eval()
    expected = model(X).detach()
    dampr.convert(model, example_inputs=X)
    torch.testing.assert_close(model(X), expected)
    cost = Cost(model, X, "macs")
    (gate,) = {layer.gate for layer in dampr.prune.gated_layers(model).values()}
    gate.set_levels_(torch.where(torch.arange(10) < 6, -1.0, 1.0))
    small = dampr.compact(model, example_inputs=X)
    torch.testing.assert_close(small(X), model(X))
    assert small.fc.out_features == 4
    assert count_macs(small, X) == int(cost(cost.decision()))


def test_the_fast_path_of_a_transformer_layer_does_not_bypass_gates_unnoticed():
    class Own(nn.TransformerEncoderLayer):
        """A subclass, which convert leaves alone, with torch's fused path."""

    def made():
        return nn.Sequential(Own(16, 2, 32, batch_first=True), nn.Linear(16, 3))

    x, model = torch.randn(2, 5, 16), made()
    with pytest.raises(dampr.ConversionError, match=r"'0.linear[12]': the model reads its weight without calling it"):
        dampr.convert(model, example_inputs=x, exclude=nn.MultiheadAttention, per_sample=True)
    assert not dampr.prune.gated_layers(model)
    dampr.convert(model.eval(), example_inputs=x, exclude=nn.MultiheadAttention)
    assert dampr.verify_model(model, x).ok
    y = model(x)
    next(iter(dampr.prune.gated_layers(model).values())).gate.log_alpha.data[:9] = -9
    assert not torch.equal(model(x), y)
    assert dampr.compact(model, example_inputs=x)[0].linear1.out_features == 23


def test_a_layer_that_the_example_does_not_reach_is_no_error():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 2)

        def forward(self, x):
            return self.out(torch.relu(self.a(x) if x.sum() < 1e9 else self.b(x)))

    model = dampr.convert(Experts(), granularity="input", example_inputs=X)
    assert sorted(dampr.prune.gated_layers(model)) == ["a", "b"]
    assert "do not reach 'b', which may share its width" in model.dampr_skipped["out"]


def test_inputs_that_are_not_contiguous_are_no_reason_to_refuse():
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.out = nn.Linear(10, 33), nn.Linear(33, 2)

        def forward(self, x):
            return self.out(torch.relu(self.fc(x.transpose(0, 1))))

    for _ in range(5):
        model = Transposed()
        x = torch.randn(7, 5, 10)
        y = model.eval()(x)
        dampr.convert(model, example_inputs=x)
        torch.testing.assert_close(model.eval()(x), y)


def test_full_backward_hooks_move_along():
    model, seen = mlp(), []
    model[0].register_full_backward_hook(lambda *_: seen.append(1))
    dampr.convert(model, example_inputs=X)
    model(X.clone().requires_grad_()).sum().backward()
    assert seen == [1]


def test_not_a_module_is_refused():
    with pytest.raises(TypeError, match="model=3: expected a torch.nn.Module"):
        dampr.convert(3)


@pytest.mark.parametrize("example", [(X,), [X], {"input": X}])
def test_example_inputs_may_be_a_tuple_a_list_or_keywords(example):
    model = dampr.convert(mlp(), example_inputs=example)
    assert len(dampr.prune.gated_layers(model)) == 2


def test_the_random_state_is_left_alone():
    model = mlp()
    state = torch.get_rng_state()
    dampr.convert(model, example_inputs=X)
    assert torch.equal(torch.get_rng_state(), state)


class WrittenAttention(nn.Module):
    """Query, key and value of linear layers, viewed as four heads,
    and a feed-forward part with a learned scale that no layer holds.
    """

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 3)
        self.scaled, self.head = nn.Linear(3, 6), nn.Linear(6, 2)
        self.register_buffer("scale", torch.linspace(1, 2, 6))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        x = self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(self.scale * self.scaled(self.down(self.up(x).relu()).relu()))


def test_layers_whose_width_something_else_expects_are_left_out():
    model, x = WrittenAttention(), torch.randn(2, 5, 8)
    dampr.convert(model, example_inputs=x)
    gated = dampr.prune.gated_layers(model)
    assert sorted(gated) == ["down.weight_gates.0", "head.weight_gates.0", "scaled.weight_gates.0", "up.weight_gates.0"]
    for name in ("query", "key", "value"):
        assert model.dampr_skipped[name].startswith("without half of its channels the model"), name
    for layer in gated.values():
        layer.gate.log_alpha.data[1] = -9
    small = dampr.compact(model, example_inputs=x)
    assert (small.scaled.out_features, len(small.scale)) == (5, 5)
    assert (small.out.out_features, small.up.out_features, small.down.out_features) == (7, 11, 2)


def test_a_model_of_which_nothing_can_be_cut_says_why():
    model = nn.Sequential(nn.Linear(4, 6), nn.Unflatten(-1, (3, 2)), nn.Flatten(1), nn.Linear(6, 2))
    with pytest.raises(dampr.ConversionError, match="'0': .without half of its channels the model does not run"):
        dampr.convert(model, example_inputs=torch.randn(3, 4))
    assert type(model[0]) is nn.Linear


class Keeping(nn.Module):
    """Keeps what it computed last, as models do whose attention is to be looked at;
    ``other`` is whatever else it holds.
    """

    def __init__(self, other=None):
        super().__init__()
        self.first, self.norm, self.up, self.down = (
            nn.Linear(10, 8),
            nn.LayerNorm(8),
            nn.Linear(8, 12),
            nn.Linear(12, 8),
        )
        self.last, self.head = nn.LayerNorm(8), nn.Linear(8, 3)
        self.other, self.seen = other, None

    def forward(self, x):
        x = self.first(x)
        self.seen = self.up(self.norm(x)).relu()
        return self.head(self.last(x + self.down(self.seen)))


@pytest.mark.parametrize("residual", [False, True])
def test_a_model_that_keeps_activations_is_converted_and_compacted_after_training(residual):
    model = Keeping()
    model(X).sum().backward()
    dampr.convert(model, example_inputs=X, residual=residual)
    model(X).sum().backward()
    budget = dampr.Budget(model, X, macs=[0.9, 0.5])
    for layer in dampr.prune.gated_layers(model).values():
        layer.gate.log_alpha.data[:4] = -9
    (model(X).sum() + budget.penalty()).backward()
    budget.step()
    assert list(budget.snapshots) == [0.9]
    assert dampr.verify_model(model, X).layers
    report = budget.finalize()
    model(X).sum().backward()
    small = dampr.compact(model, example_inputs=X)
    assert small.up.out_features < 12
    assert report.reached <= report.target
    small(X).sum().backward()
    if not residual:
        assert dampr.expand(small).up.out_features == 12
    assert small.seen.grad_fn is not None


def test_a_view_of_heads_is_found_in_a_model_that_keeps_activations():
    class Viewed(Keeping):
        def __init__(self):
            super().__init__()
            del self.norm, self.last

        def forward(self, x):
            self.seen = self.up(self.first(x).unflatten(-1, (4, 2)).flatten(1))
            return self.head(self.down(self.seen.relu()))

    model = dampr.convert(Viewed(), example_inputs=X)
    assert model.dampr_skipped["first"].startswith("without half of its channels the model does not run")
    assert sorted(dampr.prune.gated_layers(model)) == ["down", "up"]


@pytest.mark.parametrize("other", [(i for i in range(3)), threading.Lock(), [{"a": threading.Lock()}]])
def test_a_model_that_holds_what_python_cannot_copy_is_converted(other):
    model = dampr.convert(Keeping(other=other), example_inputs=X)
    assert list(dampr.prune.gated_layers(model)) == ["up"]
    model.up.gate.log_alpha.data[:4] = -9
    small = dampr.compact(model, example_inputs=X)
    assert small.up.out_features == 8
    assert small.other is other or small.other[0]["a"] is other[0]["a"]


def test_a_model_that_forbids_copies_is_converted_by_its_layers():
    class Once(Keeping):
        def __deepcopy__(self, memo):
            raise TypeError("no copies")

    with pytest.warns(dampr.prune.SightWarning, match=r"^the operators of Once could not be followed \(TypeError: "):
        model = dampr.convert(Once(), example_inputs=X)
    assert list(dampr.prune.gated_layers(model)) == ["up"]


def test_what_a_layer_under_spectral_norm_reads_has_gates_in_front_of_the_norm():
    model = nn.Sequential(
        nn.Linear(10, 8),
        nn.ReLU(),
        nn.Linear(8, 6),
        nn.ReLU(),
        nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3)),
    )
    dampr.convert(model, example_inputs=X)
    assert list(dampr.prune.gated_layers(model)) == ["2.weight_gates.0", "4.parametrizations.weight.original_gates.0"]
    for gates in dampr.prune.gated_layers(model).values():
        gates.gate.log_alpha.data[2] = -9
    small = dampr.compact(model, example_inputs=X)
    assert [small[i].out_features for i in (0, 2, 4)] == [7, 5, 3]
    assert small[4].in_features == 5
    torch.testing.assert_close(small.eval()(X), model.eval()(X))


def test_a_compiled_model_is_refused():
    model = torch.compile(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), backend="eager")
    with pytest.raises(TypeError, match="torch.compile returned: expected the module itself"):
        dampr.convert(model, example_inputs=torch.randn(3, 4))


def test_a_model_that_cannot_be_traced_is_refused_in_words(monkeypatch):
    def fail(*args, **how):
        raise IndexError("no such operator")

    for module in ("graph", "sight"):
        monkeypatch.setattr(f"dampr.prune.{module}.trace_units", fail)
    with (
        pytest.warns(dampr.prune.SightWarning),
        pytest.raises(
            dampr.ConversionError,
            match=r"^the operators of Sequential cannot be followed \(IndexError: no such operator\)$",
        ),
    ):
        dampr.convert(mlp(), example_inputs=X)


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        (
            (nn.utils.parametrizations.weight_norm(nn.Linear(10, 8), dim=1), nn.ReLU()),
            "a norm of the weight counts its channels",
        ),
        (
            (nn.Linear(10, 8), nn.Softmax(-1), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8), dim=1)),
            "its channels are mixed",
        ),
    ],
)
def test_a_refusal_names_what_stands_against_gates_on_parameters_too(layers, reason):
    """Not that a layer of that class has no gates: it could have some on its parameters."""
    with pytest.raises(dampr.ConversionError, match=f"'0': [\"']{reason}"):
        dampr.convert(nn.Sequential(*layers, nn.Linear(8, 2)), example_inputs=X)


@pytest.mark.parametrize("whole", [True, False])
def test_scripted_modules_are_refused_by_name(whole):
    part = torch.jit.script(nn.Sequential(nn.Linear(4, 8), nn.ReLU()))
    model = torch.jit.script(nn.Sequential(part)) if whole else nn.Sequential(part, nn.Linear(8, 8), nn.Linear(8, 2))
    with pytest.raises(dampr.ConversionError, match=rf"^model{'' if whole else '.0'} is of torch.jit"):
        dampr.convert(model, example_inputs=torch.randn(2, 4))
