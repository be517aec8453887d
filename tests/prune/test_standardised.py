"""Layers that standardise their weights over what these read: the statistics count open units only."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import dampr
from dampr.nn import GatedParameter
from dampr.nn.open_statistics import of_open
from dampr.prune import CompactionError
from dampr.prune.summary import distinct_gates
from tests.halves import assert_exact, finished, halved

Standardise = Callable[[Tensor], Tensor]


def step_by_step(w: Tensor) -> Tensor:
    """The code of Qiao et al. (2019): the unbiased deviation, plus eps."""
    w = w - w.mean(1, keepdim=True).mean(2, keepdim=True).mean(3, keepdim=True)
    std = w.view(w.size(0), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
    return w / std.expand_as(w)


def biased(w: Tensor) -> Tensor:
    """As in BiT."""
    var, mean = torch.var_mean(w, dim=[1, 2, 3], keepdim=True, unbiased=False)
    return (w - mean) / torch.sqrt(var + 1e-6)


def by_batch_norm(w: Tensor) -> Tensor:
    """As in timm."""
    return F.batch_norm(w.reshape(1, w.shape[0], -1), None, None, training=True, momentum=0.0).reshape_as(w)


def centred(w: Tensor) -> Tensor:
    return w - w.mean((1, 2, 3), keepdim=True)


def of_length_one(w: Tensor) -> Tensor:
    """Centred weight normalisation (Huang et al. 2017)."""
    w = w - w.mean((1, 2, 3), keepdim=True)
    return w / w.flatten(1).norm(dim=1)[:, None, None, None]


def of_mean_square_one(w: Tensor) -> Tensor:
    """As in EDM2: nothing is subtracted."""
    return w / (w.square().mean((1, 2, 3), keepdim=True) + 1e-4).sqrt()


def of_each_place(w: Tensor) -> Tensor:
    """Statistics over what each place of the kernel reads."""
    return (w - w.mean(1, keepdim=True)) / (w.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()


KINDS = [step_by_step, biased, by_batch_norm, centred, of_length_one, of_mean_square_one, of_each_place]


class StdConv2d(nn.Conv2d):
    def __init__(self, standardise: Standardise, *sizes: int, **options: int) -> None:
        super().__init__(*sizes, **options)  # type: ignore[arg-type,misc]
        self.standardise = standardise

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(
            x, self.standardise(self.weight), self.bias, self.stride, self.padding, self.dilation, self.groups
        )


def network(standardise: Standardise, norm: bool = False) -> nn.Sequential:
    """Three convolutions, the last with kernels of one pixel."""

    def conv(*sizes: int, **options: int) -> nn.Module:
        return StdConv2d(standardise, *sizes, **options)

    def after(width: int) -> nn.Module:
        return nn.Sequential(nn.GroupNorm(4, width) if norm else nn.Identity(), nn.ReLU())

    return nn.Sequential(
        conv(3, 8, 3),
        after(8),
        conv(8, 12, 3, padding=1),
        after(12),
        conv(12, 8, 1),
        after(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("standardise", KINDS, ids=lambda kind: kind.__name__)
def test_channels_are_cut_as_foretold(standardise: Standardise, norm: bool) -> None:
    x = torch.randn(2, 3, 8, 8)
    assert len(distinct_gates(dampr.convert(network(standardise, norm), x))) == 3
    assert_exact(network(standardise, norm), x, at_most=0.4)


class Parametrization(nn.Module):
    def __init__(self, standardise: Standardise) -> None:
        super().__init__()
        self.standardise = standardise

    def forward(self, weight: Tensor) -> Tensor:
        return self.standardise(weight)


@pytest.mark.parametrize("standardise", KINDS[:3], ids=lambda kind: kind.__name__)
def test_a_parametrization_that_standardises(standardise: Standardise) -> None:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        for layer in model:
            if isinstance(layer, nn.Conv2d):
                parametrize.register_parametrization(layer, "weight", Parametrization(standardise))
        return model

    x = torch.randn(2, 3, 9, 9)
    assert_exact(build(), x, at_most=0.5)


class StdLinear(nn.Module):
    """A layer of one's own, with its parameters under names of their own."""

    def __init__(self, read: int, written: int) -> None:
        super().__init__()
        self.kernel, self.shift = nn.Parameter(torch.randn(written, read)), nn.Parameter(torch.randn(written))

    def forward(self, x: Tensor) -> Tensor:
        w = (self.kernel - self.kernel.mean(1, keepdim=True)) / (self.kernel.std(1, keepdim=True) + 1e-5)
        return F.linear(x, w) + self.shift


def test_a_layer_with_names_of_its_own() -> None:
    model = nn.Sequential(StdLinear(6, 10), nn.GELU(), StdLinear(10, 12), nn.ReLU(), nn.Linear(12, 3))
    assert_exact(model, torch.randn(4, 6), at_most=0.5)


class Convolution(nn.Module):
    """Without eps."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / std, padding=1)


def test_one_standardised_layer_among_others() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Convolution(), nn.Conv2d(6, 2, 1))
    assert_exact(model, torch.randn(2, 3, 7, 7), at_most=0.5)


class AnnotatedNorm(nn.Module):
    """Of "The Annotated Transformer": the unbiased deviation, plus eps, and names of its own."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.a_2, self.b_2 = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        return self.a_2 * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6) + self.b_2


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = AnnotatedNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(self.up(self.norm(x)).relu())
        return y


def test_norms_of_the_unbiased_deviation_with_names_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(5, 12), Block(12), Block(12), AnnotatedNorm(12), nn.Linear(12, 3))
    x = torch.randn(4, 5)
    assert 12 in [g.num_gates for g in distinct_gates(dampr.convert(copy.deepcopy(model), x, residual=True)).values()]
    assert_exact(model, x, residual=True, at_most=0.35)


def test_one_closed_unit_of_two_and_all_but_one() -> None:
    for gone in (1, 7):
        model: Any = dampr.convert(network(step_by_step), torch.randn(2, 3, 8, 8)).eval()
        x = torch.randn(2, 3, 8, 8)
        for gate in distinct_gates(model).values():
            gate.set_levels_(torch.where(torch.arange(gate.num_gates) < gone, -3.0, gate.levels()))
        small: Any = dampr.compact(model, x)
        assert type(small[4]).__name__ == "StdConv2d"
        torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_small_model() -> None:
    x = torch.randn(2, 3, 8, 8).double()
    model: Any = halved(dampr.convert(network(by_batch_norm).double(), x).eval())
    small: Any = dampr.compact(model, x)
    for one in (model, small):
        one(x).square().sum().backward()
    whole, few = model[2]._parameters["weight"], small[2].weight
    assert whole is not None
    assert whole.grad is not None
    torch.testing.assert_close(whole.grad[::2, ::2], few.grad)
    assert whole.grad[1::2].abs().max() < 1e-12
    assert whole.grad[:, 1::2].abs().max() < 1e-12


def test_outside_of_a_forward_the_weight_is_itself() -> None:
    model: Any = dampr.convert(network(biased), torch.randn(2, 3, 8, 8)).eval()
    before = model[2]._parameters["weight"].clone()
    halved(model)
    model(torch.randn(2, 3, 8, 8))
    shown = model[2].weight
    assert set(shown[:, shown.abs().sum((0, 2, 3)) > 0].unique().tolist()) <= set(before.unique().tolist())


def test_after_an_error_the_weight_is_itself_too() -> None:
    model: Any = halved(dampr.convert(network(biased), torch.randn(2, 3, 8, 8)).eval())
    before = model[2].weight.clone()
    with pytest.raises(RuntimeError):
        model[2](torch.randn(1, 5, 8, 8))
    assert torch.equal(model[2].weight, before)


class OneMode(StdConv2d):
    """Standardises in one mode alone."""

    when = True

    def forward(self, x: Tensor) -> Tensor:
        weight = self.standardise(self.weight) if self.training is self.when else self.weight
        return self._conv_forward(x, weight, self.bias)


@pytest.mark.parametrize("when", [False, True])
def test_a_layer_that_standardises_in_one_mode_alone_keeps_what_it_reads(when: bool) -> None:
    one, x = OneMode(biased, 8, 6, 3), torch.randn(4, 3, 8, 8)
    one.when = when
    model: Any = dampr.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), one, nn.ReLU(), nn.Conv2d(6, 2, 1)), x)
    assert "0" in model.dampr_skipped
    small: Any = dampr.compact(halved(model), x)
    for training in (False, True):
        torch.testing.assert_close(small.train(training)(x), model.train(training)(x))


@pytest.mark.parametrize("standardise", KINDS[:4], ids=lambda kind: kind.__name__)
def test_kernels_of_one_element_keep_two_columns(standardise: Standardise) -> None:
    x, y = torch.randn(8, 3, 5, 5), torch.randint(5, (8,))
    body = (StdConv2d(standardise, 8, 8, 1), nn.ReLU(), StdConv2d(standardise, 8, 8, 1), nn.ReLU())
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    other = copy.deepcopy(model)
    plan = dampr.Plan(model, x, macs=0.2, steps=40)
    small: Any = finished(plan, lambda: F.cross_entropy(plan.model(x), y), 40)
    assert small(x).isfinite().all()
    assert min(small[2].in_channels, small[4].in_channels) >= 2
    closed: Any = dampr.convert(other, x).eval()
    for gate in distinct_gates(closed).values():
        gate.set_levels_(torch.where(torch.arange(gate.num_gates) > 0, -3.0, 3.0))
    with pytest.raises(CompactionError, match="1 of 8 gates open, expected two at least"):
        dampr.compact(closed, x)


def test_a_norm_of_the_unbiased_deviation_keeps_two_units() -> None:
    x = torch.randn(4, 5)
    model = nn.Sequential(nn.Linear(5, 12), Block(12), AnnotatedNorm(12), nn.Linear(12, 3))
    gated = dampr.convert(model, x, residual=True)
    budget = dampr.Budget(gated, x, macs=0.2)
    budget.finalize()
    small: Any = dampr.compact(gated, x)
    assert small[3].in_features >= 2
    assert small(x).isfinite().all()


def test_copies_files_and_training(tmp_path: Path) -> None:
    x, y = torch.randn(16, 3, 8, 8), torch.randint(5, (16,))
    plan = dampr.Plan(network(biased), x, macs=0.4, steps=60)
    optimizer = torch.optim.Adam(plan.model.parameters(), 1e-3)
    for step in range(60):
        optimizer.zero_grad()
        (F.cross_entropy(plan.model(x), y) + plan.penalty()).backward()
        optimizer.step()
        plan.step(optimizer)
        if step == 30:
            other = pickle.loads(pickle.dumps(copy.deepcopy(plan.model)))
            held = io.BytesIO()
            torch.save(plan.model.state_dict(), held)
            other.load_state_dict(torch.load(io.BytesIO(held.getvalue())))
            torch.testing.assert_close(other.eval()(x), plan.model.eval()(x), rtol=0, atol=0)
            plan.model.train()
    small = plan.finish()
    assert not any(isinstance(module, GatedParameter) for module in small.modules())
    assert not any("open_statistics" in name for name, _ in small.named_modules())
    dampr.save(small, tmp_path / "small.pt")
    loaded = dampr.load(tmp_path / "small.pt", network(biased))
    torch.testing.assert_close(loaded(x), small(x), rtol=0, atol=0)
    with pytest.raises(ValueError, match="2: channels that this StdConv2d counts were cut"):
        dampr.expand(small)


@pytest.mark.parametrize("correction", [0, 1, None])
def test_the_statistics_are_those_of_the_open_elements(correction: int | None) -> None:
    x, opened = torch.randn(4, 10, dtype=torch.float64), torch.arange(10) % 3 > 0
    spread, factor = of_open(x, opened, (1,), correction=correction)
    few = x[:, opened]
    torch.testing.assert_close(spread.mean(1) * 1.0, few.mean(1) * factor)
    torch.testing.assert_close((spread - spread.mean(1, keepdim=True))[:, opened] / factor, few - few.mean(1)[:, None])
    if correction is not None:
        torch.testing.assert_close(spread.std(1, correction=correction), few.std(1, correction=correction))


@pytest.mark.parametrize("standardise", KINDS[:3], ids=lambda kind: kind.__name__)
def test_wide_layers_tell_the_deviations_apart(standardise: Standardise) -> None:
    """Of 2304 elements the two deviations differ by a part in ten thousand."""
    model = nn.Sequential(
        StdConv2d(standardise, 3, 256, 1), nn.ReLU(), StdConv2d(standardise, 256, 8, 3), nn.Flatten(), nn.Linear(8, 2)
    ).double()
    x = torch.randn(2, 3, 3, 3, dtype=torch.float64)
    gated = halved(dampr.convert(model, example_inputs=x).eval())
    torch.testing.assert_close(dampr.compact(gated, x)(x), gated(x), rtol=1e-9, atol=1e-9)
