"""explain says what happens, and a forced route does."""

from functools import partial

import pytest
import torch

import dampr
from dampr import functional
from dampr.nn import GatedActivation, GatedConv1d, GatedConv2d, GatedEmbedding, GatedLinear, GatedLSTM, GatedResidual
from dampr.ops import forced_route

needs_cpp = pytest.mark.skipif(dampr.backend_info()["cpp"].startswith("missing"), reason=dampr.backend_info()["cpp"])


@needs_cpp
@pytest.mark.parametrize(
    ("arguments", "rows", "route"),
    [
        ({}, 8, "small"),
        ({"per_sample": True}, 4096, "small"),
        ({}, 4097, "fold"),
        ({"per_sample": True}, 4097, "passes"),
        ({"granularity": "weight"}, 8, "fold"),
        ({"granularity": (4, 4)}, 8, "fold"),
    ],
)
def test_backend_route_and_reason_are_printed_and_returned(capsys, arguments, rows, route):
    layer = GatedLinear(32, 16, **arguments)
    found = dampr.explain(layer, torch.randn(rows, 32))
    assert (found.backend, found.route) == ("cpp", route)
    assert capsys.readouterr().out.strip() == str(found)
    with dampr.backend("reference"):
        assert dampr.explain(layer, torch.randn(rows, 32)).route == "reference"


def test_evaluation_has_no_draw_per_row():
    layer = GatedLinear(32, 16, per_sample=True).eval()
    assert dampr.explain(layer, torch.randn(64, 32)).route not in ("passes", "small")


@needs_cpp
def test_fewer_rows_than_features_gate_activations():
    found = dampr.explain(GatedLinear(512, 512), torch.randn(64, 512))
    assert found.route == "activations"
    assert "open gates alone" in found.route_reason
    assert "open gates alone" not in dampr.explain(GatedLinear(512, 512), torch.randn(16, 512)).route_reason


@pytest.mark.parametrize("granularity", ["output", "input"])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [("linear", (4, 3, 48)), ("conv1d", (2, 48, 9)), ("conv2d", (2, 48, 5, 5)), ("conv2d", (48, 5, 5))],
)
def test_a_slice_of_the_weight_is_told(monkeypatch, kind, shape, granularity):
    build = {
        "linear": GatedLinear,
        "conv1d": partial(GatedConv1d, kernel_size=3),
        "conv2d": partial(GatedConv2d, kernel_size=3),
    }[kind]
    layer, handed = build(48, 40, gate="dam", granularity=granularity), []
    name = f"gated_{kind}"
    inner = getattr(functional, name)
    monkeypatch.setattr(
        functional, name, lambda x, weight, *rest, **how: (handed.append(weight), inner(x, weight, *rest, **how))[1]
    )
    monkeypatch.setattr(type(layer), "_function", staticmethod(getattr(functional, name)), raising=False)
    for beta, sliced in ((-2.5, True), (1.0, False), (-9.0, False)):  # some are open, all, none
        layer.gate.beta.data.fill_(beta)
        found = dampr.explain(layer, torch.randn(shape))
        layer(torch.randn(shape))
        count = handed[-1].shape[0 if granularity == "output" else 1]
        assert (found.route == "slice") == sliced == (count < layer.gate.num_gates)
        assert (f"{count} of {layer.gate.num_gates} gates are open" in found.route_reason) == sliced


@needs_cpp
@pytest.mark.parametrize("granularity", ["output", "input"])
@pytest.mark.parametrize("rows", [8, 64])
@pytest.mark.parametrize("per_sample", [False, True])
def test_forced_routes_agree(granularity, rows, per_sample):
    layer, x = GatedLinear(32, 16, granularity=granularity, per_sample=per_sample), torch.randn(rows, 32)
    results = []
    for name in ("passes", "small") if per_sample else ("fold", "activations", "live", "small"):
        torch.manual_seed(0)
        layer.zero_grad()
        with forced_route(name):
            assert dampr.explain(layer, x).route == name
            y = layer(x)
            y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in layer.parameters())])
    for tensors in zip(*results, strict=True):
        for other in tensors[1:]:
            torch.testing.assert_close(tensors[0], other, atol=1e-4, rtol=1e-4)


@needs_cpp
def test_a_route_that_cannot_serve_is_refused():
    with pytest.raises(ValueError, match="name='fast'"), forced_route("fast"):
        pytest.fail("the block was entered")
    with (
        forced_route("one_pass"),
        pytest.raises(ValueError, match="route 'one_pass' cannot serve granularity='output'"),
    ):
        dampr.explain(GatedLinear(4, 4), torch.randn(2, 4))
    for layer, route in ((GatedLinear(4, 4), "passes"), (GatedLinear(4, 4, granularity="weight"), "activations")):
        with forced_route(route), pytest.raises(ValueError, match=f"route '{route}' cannot serve"):
            layer(torch.randn(2, 4))


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="layer=Linear"):
        dampr.explain(torch.nn.Linear(2, 2), torch.randn(1, 2))
    with pytest.raises(TypeError, match="x=3"):
        dampr.explain(GatedLinear(2, 2), 3)


@pytest.mark.parametrize(
    ("layer", "x", "route", "reason"),
    [
        (GatedLSTM(4, 6), torch.randn(3, 2, 4), "fold", "columns that read the state"),
        (GatedLSTM(4, 6, proj_size=2), torch.randn(3, 2, 4), "fold", "rows of the projection"),
        (GatedActivation(4), torch.randn(3, 4), "passes", "drawn in the pass"),
        (GatedActivation(2, index=torch.tensor([0, 1, 1])), torch.randn(3, 3), "passes", "for each element"),
        (GatedEmbedding(5, 4), torch.tensor([1]), "passes", "looked up"),
        (GatedResidual(torch.nn.Linear(4, 4)), torch.randn(3, 4), "branch", "no branch where the gate is closed"),
    ],
)
def test_other_layers_are_explained(layer, x, route, reason):
    found = dampr.explain(layer, x)
    assert found.route == route
    assert reason in found.route_reason
