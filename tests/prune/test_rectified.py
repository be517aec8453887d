"""ReLU modules that convert has a norm with gates take in: found, run as one pass, the same results,
and gone again after compact.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dampr
from dampr.nn import AbsorbedReLU, GatedBatchNorm2d

X = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def conv_norm(read: int, written: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(read, written, 3, padding=1, bias=False), nn.BatchNorm2d(written))


class Block(nn.Module):
    """One ReLU in three places, behind a norm in two of them."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.third, self.relu = (
            conv_norm(3, 8),
            conv_norm(8, 6),
            conv_norm(6, 8),
            nn.ReLU(inplace),
        )
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.first(x))
        y = y + self.third(self.relu(self.second(y)))
        out: Tensor = self.head(self.relu(y))
        return out


class Reads(nn.Module):
    """What else reads the norm decides; ``how`` says what does."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.body, self.relu, self.head = how, conv_norm(3, 8), nn.ReLU(), nn.Conv2d(8, 2, 1)
        self.dropout = nn.Dropout()

    def forward(self, x: Tensor) -> Any:
        y = self.body(x)
        if self.how == "function":
            return self.head(torch.relu(y))
        if self.how == "also a sum":
            return self.head(self.relu(y) + y)
        if self.how == "also detached":
            return self.head(self.relu(y) + 0.1 * y.detach())
        if self.how == "in between":
            return self.head(self.relu(2 * y))
        if self.how == "kept":
            self.seen = y
        if self.how == "twice":
            return self.head(self.relu(y) + self.relu(y))
        if self.how == "something in between in training" and self.training:
            y = y + 1
        if self.how == "in place in training" and self.training:
            y -= 1
        if self.how == "also in training" and self.training:
            self.loss = y.square().mean()
        if self.how == "dropped out behind it":
            return self.head(self.dropout(self.relu(y)))
        return self.head(self.relu(y))


def named(model: nn.Module) -> dict[str, str]:
    """The kind of each norm and ReLU, and whether it takes one in."""
    return {
        name: f"{type(m).__name__}{' +' if getattr(m, 'followed', False) else ''}"
        for name, m in model.named_modules()
        if isinstance(m, (nn.BatchNorm2d, nn.ReLU))
    }


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
def test_a_relu_in_several_places_is_taken_in_where_a_norm_alone_feeds_it(per_sample: bool, inplace: bool) -> None:
    torch.manual_seed(1)
    dense = Block(inplace).eval()
    expected, keys = dense(X), list(dense.state_dict())
    model = dampr.convert(copy.deepcopy(dense), example_inputs=X, per_sample=per_sample)
    assert named(model) == {
        "first.1": "GatedBatchNorm2d +",
        "second.1": "GatedBatchNorm2d +",
        "third.1": "GatedBatchNorm2d",
        "relu": "AbsorbedReLU",
    }
    assert model.relu.inplace == inplace
    assert torch.equal(model(X), expected)
    assert [key for key in model.state_dict() if "gate" not in key] == keys
    again = copy.deepcopy(model)
    assert torch.equal(again(X), expected)


@pytest.mark.parametrize("per_sample", [False, True])
def test_training_computes_what_separate_layers_compute(per_sample: bool) -> None:
    torch.manual_seed(1)
    model = dampr.convert(Block(), example_inputs=X, per_sample=per_sample).train()
    apart = copy.deepcopy(model)
    for layer in apart.modules():
        if isinstance(layer, GatedBatchNorm2d):
            layer.activation, layer.followed = None, False
    found = []
    for net in (model, apart):
        torch.manual_seed(7)
        y = net(X)
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), list(net.parameters())), *net.buffers()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_what_a_norm_has_rectified_is_handed_on_and_anything_else_is_rectified() -> None:
    norm, relu = GatedBatchNorm2d(3, activation="relu"), AbsorbedReLU()
    norm.followed = True
    y = norm(X)
    assert relu(y) is y
    assert (y >= 0).all()
    assert (relu(X) == X.clamp(min=0)).all()
    # what a hook puts in the place of the output is not known to be rectified
    norm.register_forward_hook(lambda *_: -X)
    assert (relu(norm(X)) == (-X).clamp(min=0)).all()
    assert isinstance(norm.to_dense(), nn.BatchNorm2d)


@pytest.mark.parametrize(
    ("how", "taken"),
    [
        ("module", True),
        ("function", False),
        ("also a sum", False),
        ("also detached", False),
        ("kept", False),
        ("twice", False),
        ("in between", False),
        ("something in between in training", False),
        ("in place in training", False),
        ("also in training", False),
        ("dropped out behind it", True),
    ],
)
def test_only_a_module_that_alone_reads_a_norm_is_taken_in(how: str, taken: bool) -> None:
    model = dampr.convert(Reads(how), example_inputs=X)
    assert any("AbsorbedReLU" in kind for kind in named(model).values()) == taken
    assert any("+" in kind for kind in named(model).values()) == taken


def test_what_is_changed_in_place_behind_the_relu_is_rectified_again() -> None:
    class Again(Reads):
        def forward(self, x: Tensor) -> Any:
            y = self.relu(self.body(x))
            y -= 0.5
            return self.head(self.relu(y))

    torch.manual_seed(1)
    model = Again("").eval()
    expected = model(X)
    dampr.convert(model, example_inputs=X)
    assert named(model) == {"body.1": "GatedBatchNorm2d +", "relu": "AbsorbedReLU"}
    assert torch.equal(model(X), expected)
    with torch.inference_mode():
        assert torch.equal(model(X), expected)


def test_hooks_of_the_relu_stay_and_a_norm_with_hooks_keeps_its_values() -> None:
    model, seen = Reads("module"), []
    model.relu.register_forward_hook(lambda *_: seen.append(1))
    small = dampr.compact(dampr.convert(model, example_inputs=X), example_inputs=X)
    for net in (model, small):
        seen.clear()
        net.train()(X)
        assert seen == [1]
    hooked, lowest = Reads("module"), []
    hooked.body[1].register_forward_hook(lambda *args: lowest.append(float(args[2].detach().min())))
    dampr.convert(hooked, example_inputs=X)
    assert named(hooked) == {"body.1": "GatedBatchNorm2d", "relu": "ReLU"}
    lowest.clear()
    hooked.train()(X)
    assert lowest[0] < 0


def test_a_conversion_that_fails_gives_the_relu_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no")

    model = Block()
    monkeypatch.setattr("dampr.prune.transformer.adopt", fails)
    with pytest.raises(RuntimeError, match="no"):
        dampr.convert(model, example_inputs=X)
    assert set(named(model).values()) == {"BatchNorm2d", "ReLU"}
    assert not any(isinstance(m, AbsorbedReLU) for m in model.modules())


def test_a_batch_that_no_norm_trains_on_converts_and_takes_nothing_in() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    dampr.convert(net, example_inputs=torch.randn(1, 4))
    assert type(net[2]) is nn.ReLU


def test_a_tracer_sees_a_relu() -> None:
    traced = torch.fx.symbolic_trace(AbsorbedReLU())
    assert (traced(X) == X.clamp(min=0)).all()


@pytest.mark.parametrize("inplace", [False, True])
def test_compact_gives_back_plain_modules_under_their_names(inplace: bool) -> None:
    torch.manual_seed(1)
    model = dampr.convert(Block(inplace), example_inputs=X).eval()
    with torch.no_grad():
        model.second[1].gate.log_alpha[:2] = -9
    masked = model(X)
    small = dampr.compact(model, example_inputs=X)
    assert named(small) == {
        "first.1": "BatchNorm2d",
        "second.1": "BatchNorm2d",
        "third.1": "BatchNorm2d",
        "relu": "ReLU",
    }
    assert type(small.relu) is nn.ReLU
    assert small.relu.inplace == inplace
    assert small.second[1].num_features == 4
    torch.testing.assert_close(small(X), masked, rtol=1e-5, atol=1e-5)


# dynamo's own, of every autograd.Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_converting_twice_and_compiling_change_nothing() -> None:
    torch.manual_seed(1)
    dense = Block().eval()
    expected = dense(X)
    model = dampr.convert(dense, example_inputs=X, include=["second.0"])
    dampr.convert(model, example_inputs=X, include=["first.0", "third.0"])
    assert sum("+" in kind for kind in named(model).values()) == 2
    assert torch.equal(model.eval()(X), expected)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(X), expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("per_sample", [False, True])
def test_a_compiled_network_trains_in_one_graph_like_the_eager_one(per_sample: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(1)
    model = dampr.convert(Block(), example_inputs=X, per_sample=per_sample).train()
    found = []
    for net in (copy.deepcopy(model), torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)):
        torch.manual_seed(7)
        y = net(X)
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), list(net.parameters()))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_explain_says_that_the_relu_is_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    model = dampr.convert(Reads("module"), example_inputs=X, per_sample=True).train()
    assert "the ReLU" in dampr.explain(model.body[1], torch.randn(4, 8, 9, 9)).route_reason
    each = dampr.convert(Reads("module"), example_inputs=X).train()
    reason = dampr.explain(each.body[1], torch.randn(4, 8, 9, 9)).route_reason
    assert ("ReLU in one pass" in reason) == dampr.backend_info()["cpp"].startswith("available")
    assert "activation='relu' of the layer behind" in str(model)
