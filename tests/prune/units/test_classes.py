"""The classes of small networks are what they have to be,
and a model without half of them computes what the masked one computes.
"""

import copy

import pytest
import torch
from torch import nn

from dampr.prune import inputs
from dampr.prune.units import trace_units
from dampr.prune.units.proof import cut, half, mask
from tests.prune.units.nets import NETS


def _built(name):
    torch.manual_seed(0)
    net = NETS[name]
    model = net.build().double().eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
            if (tensor == tensor.flatten()[0]).all():
                tensor.copy_(0.5 + torch.rand_like(tensor))  # fresh norms and biases are all the same
    return net, model, net.inputs()


@pytest.mark.parametrize("name", NETS)
def test_classes_are_what_they_have_to_be(name):
    net, model, x = _built(name)
    units = trace_units(model, x)
    assert sorted(map(len, units.clusters)) == net.clusters
    for parameter, dim, other, along in net.same:
        assert units.classes(parameter, dim) == units.classes(other, along)
        assert units.why_not(parameter, dim) is None
    for (parameter, dim), kind in net.stays.items():
        assert not set(units.classes(parameter, dim)) & set(units.free)
        assert units.why_not(parameter, dim).kind == kind
    assert not units.failed


@pytest.mark.parametrize("name", NETS)
def test_a_trace_without_arithmetic_says_the_same(name):
    _, model, x = _built(name)
    fake, real = (trace_units(model, x, fake=how) for how in (True, False))
    assert fake.free == real.free
    assert {c: r.kind for c, r in fake.fixed.items()} == {c: r.kind for c, r in real.fixed.items()}


@pytest.mark.parametrize("name", NETS)
def test_without_half_of_the_classes_a_model_computes_what_the_masked_one_computes(name):
    _, model, x = _built(name)
    units = trace_units(model, x)
    classes = half(units, units.clusters)
    small, masked = cut(copy.deepcopy(model), units, classes), mask(copy.deepcopy(model), units, classes)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    expected, got, whole = (inputs.evaluate(m, x) for m in (masked, small, model))
    assert inputs.gap(expected, got) <= 1e-12 * inputs.size(expected)
    assert inputs.gap(expected, whole) > 1e-6 * inputs.size(whole)


def test_tied_parameters_have_their_units_once():
    _, model, x = _built("tied")
    units = trace_units(model, x)
    assert units.alias["head.weight"] == "embed.weight"
    small = cut(copy.deepcopy(model), units, half(units, units.clusters))
    assert small.head.weight is small.embed.weight


def test_a_reason_names_operator_module_and_line():
    _, model, x = _built("local response norm")
    reason = trace_units(model, x).why_not("first.weight", 0)
    assert (reason.operator, reason.module) == ("avg_pool3d", "LocalResponseNorm 'between'")
    assert reason.line.startswith("nets.py:")
    assert str(reason) == f"its channels are mixed (avg_pool3d in LocalResponseNorm 'between', {reason.line})"


def test_an_operator_that_is_not_known_is_opaque():
    model = nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Unflatten(-1, (2, 3)), Reflections(), nn.Flatten(1), nn.Linear(6, 2)
    )
    units = trace_units(model, torch.randn(3, 4))
    assert units.why_not("0.weight", 0).kind == "opaque"
    assert "linalg" in units.why_not("0.weight", 0).operator


class Reflections(nn.Module):
    def forward(self, x):
        return torch.linalg.householder_product(x.mT, x[..., 0])


class Picked(nn.Module):
    """Channels that a number picks, behind a mask of two dimensions in the same brackets."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        every = torch.ones(x.shape[:2], dtype=torch.bool)
        h = self.first(x)[every, torch.arange(every.numel()) % 8]
        return self.last(h.flatten()[:4])


def test_channels_that_an_index_picks_behind_a_mask_are_named_as_picked():
    model = Picked()
    reason = trace_units(model, torch.randn(2, 3, 6)).why_not("first.weight", 0)
    assert reason.kind == "picked"
