"""What a trace misses, the trace of a cut model and a look at a masked one find."""

import copy

import pytest
import torch
from torch import nn

from dampr.prune.units import trace_units
from dampr.prune.units.proof import half, mask, probe, retrace
from tests.prune.units.nets import NETS, Written
from tests.prune.units.test_classes import _built

WRONG = {
    "a number from the width": lambda h: h * h.shape[1] ** -0.5,
    "a sum over the width": lambda h: h - h.sum(1, keepdim=True) / h.shape[1],
    "a width over a number": lambda h: h / (h.shape[1] / 8),
    "literal halves": lambda h: torch.cat([h[:, :4] * 2, h[:, 4:]], 1),
    "a literal count of groups": lambda h: h.view(h.shape[0], 4, -1, *h.shape[2:]).flip(1).flatten(1, 2),
    "rolled": lambda h: h.roll(1, 1),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_cut_model_that_computes_something_else_is_found(name):
    model, x = Written(WRONG[name]), torch.randn(2, 3, 8, 8)
    units = trace_units(model, x)
    written = set(units.classes("first.weight", 0))
    differs = retrace(model, units, x, units.clusters)
    left = {one for one in written if one in units.free and one not in differs}
    assert not left or _computes_the_same(model, units, x, left)
    assert not set(units.classes("second.weight", 0)) & differs.keys()


def _computes_the_same(model, units, x, classes):
    from dampr.prune import inputs
    from dampr.prune.units.proof import cut

    model, x = copy.deepcopy(model).double().eval(), x.double()
    some = sorted(classes)[: len(classes) // 2]
    small, masked = cut(copy.deepcopy(model), units, some), mask(copy.deepcopy(model), units, some)
    expected, got = inputs.evaluate(masked, x), inputs.evaluate(small, x)
    return inputs.gap(expected, got) <= 1e-12 * inputs.size(expected)


@pytest.mark.parametrize("name", NETS)
def test_what_may_be_cut_is_held(name):
    _, model, x = _built(name)
    units = trace_units(model, x)
    assert retrace(model, units, x, units.clusters) == {}


def test_what_does_not_run_smaller_is_said():
    model = nn.Sequential(nn.Linear(6, 12), nn.Unflatten(-1, (4, 3)), nn.ReLU(), nn.Flatten(1), nn.Linear(12, 3))
    x = torch.randn(2, 6)
    units = trace_units(model, x)
    differs = retrace(model, units, x, units.clusters)
    assert differs.keys() == set(units.free)
    assert not any(why.runs for why in differs.values())


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        (torch.relu, {}),
        (torch.sigmoid, {"constant"}),
        (lambda h: torch.exp(-h), {"constant"}),
        (lambda h: h + h.mean((2, 3), keepdim=True) + 1.5, {"constant"}),
        (lambda h: h + torch.linspace(0, 1, h.shape[-1], dtype=h.dtype), {"varies"}),
    ],
)
def test_closed_units_that_are_not_zero_where_they_are_read_are_found(between, expected):
    model, x = Written(between).double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    units = trace_units(model, x)
    classes = half(units, units.clusters)
    mine = set(classes) & set(units.classes("first.weight", 0))
    alive = probe(mask(copy.deepcopy(model), units, classes), units, classes, x)
    assert alive == {one: what for one in mine for what in expected}
