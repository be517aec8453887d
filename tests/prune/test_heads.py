"""Attention made of linear layers, of a kind that is made known, and layers whose outputs are multiplied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import dampr
from dampr.nn import GatedHeads, GatedLinear
from dampr.prune import heads
from dampr.prune.cost import Cost
from dampr.prune.measure import count_macs, count_params
from tests.prune.test_models import close_at_random

E, H, D = 12, 4, 5
x = torch.randn(3, 6, E, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Six query heads of width 2, each two of which share a key and a value; all in one projection of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.size, self.share, self.width = 2, 2, 12
        self.query, self.both, self.out = nn.Linear(E, 12), nn.Linear(E, 12, bias=False), nn.Linear(12, E)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        query, (key, value) = self.query(x), self.both(x).split(self.width // self.share, -1)
        query, key, value = (t.unflatten(-1, (-1, self.size)).transpose(1, 2) for t in (query, key, value))
        key, value = (t.repeat_interleave(self.share, 1) for t in (key, value))
        y = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.out(y.transpose(1, 2).flatten(2)), None


class Model(nn.Module):
    def __init__(self, activation: Any = nn.functional.silu) -> None:
        super().__init__()
        self.norm, self.attention, self.activation = nn.LayerNorm(E), Attention(), activation
        self.gate, self.up, self.down, self.last = nn.Linear(E, D), nn.Linear(E, D), nn.Linear(D, E), nn.Linear(E, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm(x))[0]
        x = self.norm(x + self.down(self.activation(self.gate(x)) * self.up(x)))
        return self.last(x)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    kind = heads.Kind({"query": 1, "both": 2}, "out", head_dim="size", sharing="share", scaled=("width",))
    monkeypatch.setitem(heads.KINDS, f"{Attention.__module__}.{Attention.__qualname__}", (kind,))


def converted(**how: Any) -> Any:
    torch.manual_seed(0)
    return dampr.convert(Model(), example_inputs=x, **how)


def test_what_has_gates_and_why_the_rest_has_none() -> None:
    model, dense = converted(), Model()
    torch.manual_seed(0)
    dense = Model()
    assert torch.equal(model.eval()(x), dense.eval()(x))
    gated = {name: type(layer) for name, layer in dampr.prune.gated_layers(model).items()}
    assert gated == {"attention.out": GatedHeads, "up": GatedLinear}
    assert model.attention.out.gate.num_gates == 3
    assert "'attention', whose gates are in 'attention.out'" in model.dampr_skipped["attention.query"]
    assert model.dampr_skipped["gate"] == "its outputs only multiply those of 'up', whose gates close both"
    assert dampr.verify_model(model, x).ok


@pytest.mark.parametrize("seed", range(3))
def test_masked_equals_compacted_at_the_size_foretold(seed: int) -> None:
    model = converted()
    costs = {metric: Cost(model, x, metric) for metric in ("macs", "params")}
    torch.manual_seed(seed)
    close_at_random(model)
    small = dampr.compact(model, example_inputs=x)
    torch.testing.assert_close(small.eval()(x), model.eval()(x), atol=1e-5, rtol=1e-5)
    left = len(model.attention.out.open_heads())
    assert (small.attention.query.out_features, small.attention.both.out_features, small.attention.width) == (
        4 * left,
        4 * left,
        4 * left,
    )
    assert (
        small.gate.out_features == small.up.out_features == small.down.in_features == int(model.up.gate.is_open().sum())
    )
    foretold = {metric: int(cost(cost.decision())) for metric, cost in costs.items()}
    assert foretold == {"macs": count_macs(small, x), "params": count_params(small)}
    assert small.dampr_manifest["closed_but_kept"] == {}


def test_one_head_stays_where_all_are_closed() -> None:
    model = converted()
    model.attention.out.gate.log_alpha.data.fill_(-9)
    small = dampr.compact(model, example_inputs=x)
    assert small.dampr_manifest["layers"]["attention"]["heads"] == {"before": 3, "kept": [0]}
    assert small.dampr_manifest["closed_but_kept"] == {
        "attention": "1 closed head stays: every layer keeps one at least"
    }


def test_a_budget_over_heads_and_neurons_is_kept() -> None:
    model = converted()
    report = dampr.Budget(model, x, macs=0.6).finalize()
    assert report.reached == count_macs(dampr.compact(model, example_inputs=x), x) <= report.target


def test_expand_gives_heads_back_and_an_optimizer_is_carried_over() -> None:
    model = converted()
    optimizer = torch.optim.Adam(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    close_at_random(model)
    model.attention.out.gate.log_alpha.data[:] = torch.tensor([3.0, -9.0, 3.0])
    small = dampr.compact(model, example_inputs=x, optimizer=optimizer)
    small(x).sum().backward()
    optimizer.step()
    large = dampr.expand(small)
    assert large.attention.width == 12
    torch.testing.assert_close(large.eval()(x), small.eval()(x), atol=1e-5, rtol=1e-5)
    assert {n: p.shape for n, p in large.named_parameters()} == {n: p.shape for n, p in Model().named_parameters()}


def test_the_penalty_counts_what_a_head_has() -> None:
    model = converted()
    with torch.no_grad():
        expected = model.attention.out.gate.open_probability().sum() * (12 * 13 + 12 * 12 + 12 * 12) / 3
        torch.testing.assert_close(model.attention.out.penalty(), expected)


@pytest.mark.parametrize("family", ["dam", "diffprune", "diffmask", "dep_l0"])
def test_every_family(family: str) -> None:
    torch.manual_seed(0)
    dense = Model().eval()
    before = dense(x)
    model = dampr.convert(dense, gate=family, example_inputs=x)
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)
    model.train()(x).sum().backward()


@pytest.mark.parametrize("how", [{"per_sample": True}, {"exclude": "attention"}])
def test_heads_are_left_out_where_they_have_to_be(how: Any) -> None:
    model = converted(**how)
    assert set(dampr.prune.gated_layers(model)) == {"up"}


def test_a_factor_that_is_not_0_for_0_needs_gates_of_the_other_layer() -> None:
    """sigmoid(0) = 1/2: only a gate on ``up`` makes zeros of the product."""
    model = dampr.convert(Model(torch.sigmoid), example_inputs=x)
    assert "up" in dampr.prune.gated_layers(model)
    close_at_random(model)
    assert dampr.compact(model, example_inputs=x).gate.out_features < D


def test_gates_on_the_activated_factor_alone_close_the_product_too() -> None:
    model = converted(include="gate")
    model.gate.gate.log_alpha.data[:2] = -9
    small = dampr.compact(model, example_inputs=x)
    assert small.gate.out_features == small.up.out_features == small.down.in_features == D - 2


def test_heads_must_divide_the_inputs() -> None:
    with pytest.raises(ValueError, match="heads=5: expected a divisor of in_features=12"):
        GatedHeads.from_dense(nn.Linear(12, 3), heads=5)
