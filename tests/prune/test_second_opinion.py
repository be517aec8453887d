"""Layers whose channels an operator mixes, fixes or reads in training alone get no gates,
and the reason is the operator's.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dampr
from dampr.prune import Cost, gated_layers
from dampr.prune.measure import count_macs


def close(model, share=0.5):
    """Close the first half of every gate vector."""
    for layer in gated_layers(model).values():
        gates = layer.gate.log_alpha.data
        gates[: max(int(share * len(gates)), 1)] = -9.0
    return model


class Between(nn.Module):
    """Two convolutions, a function between them, and two more layers."""

    def __init__(self, between, wide=8):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, wide, 3, padding=1), nn.Conv2d(wide, 6, 3, padding=1)
        self.between, self.third, self.head = between, nn.Linear(6, 10), nn.Linear(10, 4)

    def forward(self, x):
        return self.head(self.third(self.second(self.between(self.first(x).relu())).relu().mean((2, 3))).relu())


IMAGE = torch.rand(2, 3, 8, 8) * 255


def rms(h):
    return h * (h.square().mean(1, keepdim=True) + 1e-5).rsqrt()


class Equalised(nn.Module):
    """A convolution that is scaled by how many channels it reads (Karras et al. 2018)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3))

    def forward(self, x):
        return F.conv2d(x, self.weight * (2 / self.weight[0].numel()) ** 0.5, padding=1)


RESPONSE_NORMS = {  # A3
    "module": nn.LocalResponseNorm(3),
    "function": lambda h: F.local_response_norm(h, 5),
    "by hand": lambda h: h / (1 + F.avg_pool3d(F.pad(h.square()[:, None], (0, 0, 0, 0, 1, 1)), (3, 1, 1), 1)[:, 0]),
    "behind a pool": nn.Sequential(nn.MaxPool2d(2), nn.LocalResponseNorm(2)),
}
ARITHMETIC = {  # B2
    "equalised": Equalised(),
    "layer norm": lambda h: F.layer_norm(h.movedim(1, -1), h.shape[1:2]).movedim(-1, 1),
    "RMS by hand": rms,
    "centred": lambda h: h - h.mean(1, keepdim=True),
    "softmax": lambda h: h.softmax(1),
    "a width as a factor": lambda h: h * h.shape[1] ** -0.5,
}


@pytest.mark.parametrize(
    "between", [*RESPONSE_NORMS.values(), *ARITHMETIC.values()], ids=[*RESPONSE_NORMS, *ARITHMETIC]
)
def test_arithmetic_over_channels_leaves_out_what_is_in_front(between):
    model = dampr.convert(Between(between), example_inputs=IMAGE)
    assert "first" not in gated_layers(model)
    assert model.dampr_skipped["first"]
    assert {name.partition(".")[0] for name in gated_layers(model)} >= {"third"}
    y = close(model).eval()(IMAGE)
    small = dampr.compact(model, example_inputs=IMAGE)
    assert (small.first.out_channels, small.second.out_channels, small.third.out_features) == (8, 3, 5)
    torch.testing.assert_close(small(IMAGE), y)


@pytest.mark.parametrize("between", RESPONSE_NORMS.values(), ids=RESPONSE_NORMS)
def test_the_reason_names_the_operator_the_module_and_the_line(between):
    model = dampr.convert(Between(between), example_inputs=IMAGE)
    assert model.dampr_skipped["first"].startswith("its channels are mixed (avg_pool")
    assert "test_second_opinion.py:" in model.dampr_skipped["first"]
    assert ("LocalResponseNorm 'between" in model.dampr_skipped["first"]) == isinstance(between, nn.Module)


class Added(nn.Module):
    """A product of activations over the channels of ``first``, beside a layer that reads them."""

    def __init__(self, act, add):
        super().__init__()
        self.first, self.second, self.third, self.head = (
            nn.Linear(6, 10),
            nn.Linear(10, 8),
            nn.Linear(8, 9),
            nn.Linear(9, 3),
        )
        self.act, self.add = act, add

    def forward(self, x):
        h = self.act(self.first(x))
        return self.head(self.third((self.second(h) * self.add(h)).relu()).relu())


SUMS = {
    "sum": lambda h: h.sum(-1, keepdim=True),
    "product": lambda h: (h[:, None] @ h[:, :, None])[:, 0],
    "einsum": lambda h: torch.einsum("bi,bi->b", h, h.flip(0))[:, None],
    "norm": lambda h: h.norm(dim=-1, keepdim=True),
    "cosine": lambda h: F.cosine_similarity(h, h.roll(1, 0))[:, None],
    "distance": lambda h: torch.cdist(h, h[:1]),
}


@pytest.mark.parametrize("add", SUMS.values(), ids=SUMS)
@pytest.mark.parametrize("act", [torch.sigmoid, torch.exp, torch.relu, torch.tanh])
def test_what_is_not_0_when_it_is_closed_and_is_added_up_by_no_weight_gets_no_gates(act, add):
    """A closed channel of an exp is 1, which a sum over channels would miss; one of a ReLU is 0, and may go."""
    x = torch.randn(5, 6, dtype=torch.float64)
    model = dampr.convert(Added(act, add).double(), x)
    assert ("first" in gated_layers(model)) == (act in (torch.relu, torch.tanh))
    if act in (torch.sigmoid, torch.exp):
        assert "added up or multiplied with each other" in model.dampr_skipped["first"]
    y = close(model).eval()(x)
    small = dampr.compact(model, x)
    assert small.third.out_features == 5
    torch.testing.assert_close(small(x), y, rtol=1e-9, atol=1e-9)


class Kernel(nn.Module):
    """Attention without a softmax, as products of features that are not 0 where what is under them is."""

    def __init__(self, feature):
        super().__init__()
        self.q, self.k, self.v, self.o, self.feature = (
            nn.Linear(6, 8),
            nn.Linear(6, 8),
            nn.Linear(6, 10),
            nn.Linear(10, 3),
            feature,
        )

    def forward(self, x):
        q, k = self.feature(self.q(x)), self.feature(self.k(x))
        return self.o(q @ (k.transpose(1, 2) @ self.v(x)) / (q * k.sum(1, keepdim=True)).sum(-1, keepdim=True))


def test_linear_attention_keeps_its_features_and_loses_its_values():
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    model = dampr.convert(Kernel(lambda h: F.elu(h) + 1).double(), x)
    assert "sum" in model.dampr_skipped["q"]
    y = close(model).eval()(x)
    small = dampr.compact(model, x)
    assert (small.q.out_features, small.v.out_features) == (8, 5)
    torch.testing.assert_close(small(x), y, rtol=1e-9, atol=1e-9)


class Bordered(nn.Module):
    """A border of constants around what a layer, with or without a norm, writes."""

    def __init__(self, norm):
        super().__init__()
        self.a, self.n, self.b = nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 6, 3)
        self.c, self.o = nn.Conv2d(6, 5, 1), nn.Conv2d(5, 2, 1)

    def forward(self, x):
        return self.o(self.c(self.b(F.pad(self.n(self.a(x)).relu(), (1, 1), value=0.3)).relu()).relu())


@pytest.mark.parametrize("how", [{"tie": False}, {}], ids=["untied", "by units"])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d(8), nn.Identity()], ids=["norm", "none"])
def test_constants_at_a_border_that_code_writes_are_seen_before_training(norm, how):
    """They are no constant where the layer reads them, so closed channels can neither be cut nor stay:
    no gates in the layer in front.
    """
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    model = dampr.convert(Bordered(norm).double(), x, **how)
    assert ("values that differ between rows" in model.dampr_skipped.get("a", "")) == bool(how)
    y = close(model).eval()(x)
    small = dampr.compact(model, x)
    assert small.c.in_channels == 3
    torch.testing.assert_close(small(x), y, rtol=1e-9, atol=1e-9)


class Tied(nn.Module):
    """An autoencoder whose decoder reads the weights of the encoder."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 8)
        self.other = nn.Linear(8, 8)

    def forward(self, x):
        h = self.other(self.b(self.a(x).relu()).relu()).relu()
        return F.linear(F.linear(h, self.b.weight.t()).relu(), self.a.weight.t())


def test_input_gates_leave_out_weights_that_other_code_reads():
    x = torch.randn(5, 6, dtype=torch.float64)
    model = dampr.convert(Tied().double(), x, granularity="input")
    assert set(gated_layers(model)) == {"other"}
    assert model.dampr_skipped["b"].startswith("other code reads its weight too")
    y = close(model).eval()(x)
    torch.testing.assert_close(dampr.compact(model, x)(x), y, rtol=1e-9, atol=1e-9)


class Auxiliary(nn.Module):
    """A head that training alone reaches, behind ``depth`` layers of its own."""

    def __init__(self, depth=1, where="second"):
        super().__init__()
        self.first, self.second, self.third, self.head = (
            nn.Linear(6, 8),
            nn.Linear(8, 10),
            nn.Linear(10, 12),
            nn.Linear(12, 3),
        )
        width = {"first": 8, "second": 10}[where]
        self.aux = nn.Sequential(*[nn.Linear(width, width) for _ in range(depth - 1)], nn.Linear(width, 3))
        self.where = where

    def forward(self, x):
        first = self.first(x).relu()
        second = self.second(first).relu()
        y = self.head(self.third(second).relu())
        return (y, self.aux(first if self.where == "first" else second)) if self.training else y


class Sampling(nn.Module):
    """A VAE that samples in training and returns the mean in evaluation."""

    def __init__(self):
        super().__init__()
        self.encode, self.mean, self.spread = nn.Linear(6, 12), nn.Linear(12, 4), nn.Linear(12, 4)
        self.decode, self.out = nn.Linear(4, 10), nn.Linear(10, 6)

    def forward(self, x):
        h = self.encode(x).relu()
        z = self.mean(h)
        if self.training:
            z = z + self.spread(h).exp() * torch.randn_like(z)
        return self.out(self.decode(z).relu())


BRANCHES = {  # B1
    "head": (Auxiliary(), ["aux.0"], ["second"]),
    "deep head": (Auxiliary(3), ["aux.0", "aux.1", "aux.2"], ["second"]),
    "early head": (Auxiliary(2, "first"), ["aux.0", "aux.1"], ["first"]),
    "sampling": (Sampling(), ["spread"], ["encode", "mean"]),
}


@pytest.mark.parametrize(("model", "branch", "read"), BRANCHES.values(), ids=BRANCHES)
def test_what_training_alone_reaches_gets_no_gates_and_protects_what_it_reads(model, branch, read):
    x = torch.randn(5, 6)
    dampr.convert(model, example_inputs=x)
    gated = gated_layers(model)
    assert not gated.keys() & {*branch, *read}
    assert gated
    for name in branch:
        assert model.dampr_skipped[name].startswith("example_inputs reach the layer in training alone")
    for name in read:
        assert "which only training reaches, shares its width" in model.dampr_skipped[name]
    small = dampr.compact(close(model), example_inputs=x)
    small.train()(x)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


def test_what_training_returns_keeps_its_width():
    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 10), nn.Linear(10, 3)

        def forward(self, x):
            features = self.second(self.first(x).relu()).relu()
            return (self.head(features), features) if self.training else self.head(features)

    model = dampr.convert(Features(), example_inputs=torch.randn(5, 6))
    assert sorted(gated_layers(model)) == ["first"]
    assert model.dampr_skipped["second"] == "its outputs are the model's own in training"


def test_a_model_with_gates_is_judged_without_them():
    model = dampr.convert(Between(nn.LocalResponseNorm(3)), example_inputs=IMAGE, include="third")
    dampr.convert(model, example_inputs=IMAGE)
    assert sorted(gated_layers(model)) == ["second", "third"]
    assert "LocalResponseNorm" in model.dampr_skipped["first"]


class Shared(nn.Module):
    """Attention of two heads that share one key and value (C1); ``spread`` gives each head its copy."""

    def __init__(self, spread):
        super().__init__()
        self.embed, self.up, self.down, self.head = (
            nn.Embedding(20, 8),
            nn.Linear(8, 12),
            nn.Linear(12, 8),
            nn.Linear(8, 3),
        )
        self.q, self.k, self.v, self.out = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(8, 8)
        self.spread, self.norm = spread, nn.RMSNorm(8)

    def forward(self, x):
        x = self.embed(x)
        q, k, v = (layer(self.norm(x)).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, self.spread(k), self.spread(v))
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return self.head(x + self.down(self.up(x).relu()))


SPREAD = {
    "expanded": lambda t: t.expand(-1, 2, -1, -1),
    "expanded and viewed": lambda t: t[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2),
    "repeated": lambda t: t.repeat_interleave(2, 1),
}


@pytest.mark.parametrize("spread", SPREAD.values(), ids=SPREAD)
def test_attention_of_one_key_head_is_converted(spread):
    model, words = Shared(spread), torch.randint(0, 20, (2, 5))
    dampr.convert(model, example_inputs=words)
    assert {"up"} <= gated_layers(model).keys() <= {"up", "embed", "down", "out"}
    y = close(model).eval()(words)
    torch.testing.assert_close(dampr.compact(model, example_inputs=words)(words), y)


def test_a_transformer_whose_query_heads_share_keys_is_converted():
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "intermediate_size": 12,
    }
    config = transformers.Qwen3Config(**sizes, num_hidden_layers=1, vocab_size=20)
    model, x = transformers.Qwen3ForCausalLM(config), {"input_ids": torch.randint(0, 20, (2, 5)), "use_cache": False}
    dampr.convert(model, example_inputs=x)
    assert all(name.startswith("model.layers.0.mlp.") for name in gated_layers(model))
    assert all(model.dampr_skipped[f"model.layers.0.self_attn.{name}_proj"] for name in "qkvo")


def detached(h):
    return h.detach()


def without_graph(h):
    with torch.no_grad():
        return h * 1


class Frozen(nn.Module):
    """A stem whose outputs leave autograd's graph, as a frozen backbone's do."""

    def __init__(self, cut):
        super().__init__()
        self.stem, self.norm, self.mid = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3)
        self.head, self.cut = nn.Linear(12, 4), cut

    def forward(self, x):
        if self.cut is None:
            with torch.no_grad():
                h = self.norm(self.stem(x))
        else:
            h = self.cut(self.norm(self.stem(x)))
        return self.head(self.mid(h.relu()).relu().mean((2, 3)))


@pytest.mark.parametrize(
    "cut", [None, detached, without_graph, lambda h: h.data], ids=["no_grad", "detach", "in between", "data"]
)
@pytest.mark.parametrize("layers", [False, True])
def test_what_autograd_does_not_see_has_gates_that_cut_or_a_true_reason(cut, layers):
    torch.manual_seed(0)
    model, x = Frozen(cut).double(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    dampr.convert(model, x, per_sample=layers)
    if layers:  # not seen by what places gated layers
        assert (
            model.dampr_skipped["stem"]
            == "its outputs are detached (torch.no_grad, detach), so what reads them is not known"
        )
    else:
        assert "mid.weight_gates.0" in gated_layers(model)
    y, foretold = close(model).eval()(x), Cost(model, x, "macs")
    small = dampr.compact(model, x)
    assert not small.dampr_manifest["closed_but_kept"]
    assert count_macs(small, x) == int(foretold(foretold.decision()))
    torch.testing.assert_close(small(x), y, rtol=1e-9, atol=1e-9)
