"""The operators on the Triton backend, as a layer calls them: autograd, leading dimensions, layouts, verification."""

import pytest
import torch

import dampr
from dampr.testing import verify


@pytest.mark.parametrize("part", [0, pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long)])
def test_verification_of_the_triton_backend(part):
    """Every third case from ``part`` on: all of them take minutes."""
    rows = [verify.verify_op(*job, part=(part, 3)) for job in verify.jobs(only_backend="triton")]
    drawn = {"noise", "sample_gates", "gated_linear", "weight_gated_linear", "gated_conv2d", "norm_gate"}
    assert {r.op for r in rows} == {*drawn, "dependency_generator"}
    assert [f for row in rows for f in row.failures] == []


@pytest.mark.parametrize("granularity", ["output", "input"])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("shape", [(6, 24), (2, 3, 24), (24,), (0, 24), (2, 0, 24)])
def test_a_layer_agrees_with_the_reference(granularity, per_sample, shape):
    layer, x = dampr.nn.GatedLinear(24, 20, granularity=granularity, per_sample=per_sample), torch.randn(shape)
    results = []
    for name in ("reference", "triton"):
        torch.manual_seed(3)
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        with dampr.backend(name):
            y = layer(leaf)
            y.square().sum().backward()
        results.append([y.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters())])
    for expected, out in zip(*results, strict=True):
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


def test_deterministic_gates_are_bit_equal_to_dense_when_fresh():
    dense = torch.nn.Linear(24, 20).eval()
    x = torch.randn(7, 24)
    with dampr.backend("triton"):
        for granularity in ("output", "input"):
            assert torch.equal(dampr.nn.GatedLinear.from_dense(dense, granularity=granularity)(x), dense(x))


CONVOLUTIONS = [{}, {"stride": 2, "padding": 1}, {"groups": 2, "padding": "same"}, {"groups": 4}]


@pytest.mark.parametrize("arguments", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("granularity", ["output", "input", "weight", (2, 1)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_convolution_agrees_with_the_reference(arguments, granularity, channels_last):
    torch.manual_seed(0)
    for per_sample in (False, True) if granularity in ("output", "input") else (False,):
        layer = dampr.nn.GatedConv2d(4, 8, 3, **arguments, granularity=granularity, per_sample=per_sample)
        x = torch.randn(2, 4, 7, 6)
        if channels_last:
            layer, x = layer.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
        results = []
        for name in ("reference", "triton"):
            torch.manual_seed(3)
            layer.zero_grad()
            leaf = x.clone().requires_grad_()
            with dampr.backend(name):
                y = layer(leaf)
                y.square().sum().backward()
            results.append([y.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters())])
        for expected, out in zip(*results, strict=True):
            torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("shape", "dim"),
    [((5, 7), 1), ((4, 6, 5, 3), 1), ((3, 5, 4), 2), ((6, 2), 0), ((2, 40, 9, 9), 1), ((0, 4, 3), 1)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gated_activations_agree_with_the_reference(shape, dim, dtype):
    for per_sample in (False, True) if dim else (False,):
        for x in (
            torch.randn(shape),
            *([torch.randn(shape).contiguous(memory_format=torch.channels_last)] if len(shape) == 4 else []),
        ):
            results = []
            for name in ("reference", "triton"):
                leaf, gate = x.to(dtype).detach().requires_grad_(), torch.linspace(-2, 2, shape[dim]).requires_grad_()
                with dampr.backend(name):
                    y = dampr.functional.gate_activations(leaf, gate, dim=dim, seed=9, per_sample=per_sample)
                    y.float().square().sum().backward()
                results.append([y.detach(), leaf.grad, gate.grad])
            for expected, out in zip(*results, strict=True):
                assert out.dtype == expected.dtype
                assert out.stride() == expected.stride()
                torch.testing.assert_close(out.float(), expected.float(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "layer",
    [dampr.nn.GatedBatchNorm2d(6), dampr.nn.GatedBatchNorm2d(6, per_sample=True), dampr.nn.GatedLayerNorm(5)],
    ids=str,
)
def test_norms_agree_with_the_reference(layer):
    x, results = torch.randn(3, 6, 4, 5), []
    for name in ("reference", "triton"):
        torch.manual_seed(3)
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        with dampr.backend(name):
            y = layer(leaf)
            y.square().sum().backward()
        results.append([y.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters())])
    for expected, out in zip(*results, strict=True):
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "arguments",
    [{"padding": 1}, {"stride": 2}, {"groups": 2, "padding": "same"}, {"dilation": 2, "padding": (2, 1)}],
    ids=str,
)
@pytest.mark.parametrize("granularity", ["output", "input"])
def test_the_live_convolution_trains_as_the_folded_one(arguments, granularity):
    torch.manual_seed(0)
    layer, x = dampr.nn.GatedConv2d(32, 32, 3, **arguments, granularity=granularity), torch.randn(2, 32, 6, 5)
    with torch.no_grad():
        layer.gate.parameter[:20] = -60.0  # of the two blocks of channels one is dead
    results = []
    for route in ("fold", "live"):
        torch.manual_seed(3)
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        with dampr.backend("triton"), dampr.ops.forced_route(route):
            assert dampr.explain(layer, leaf).route == route
            y = layer(leaf)
            y.square().sum().backward()
        results.append([y.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters())])
    for expected, out in zip(*results, strict=True):
        torch.testing.assert_close(out, expected, atol=2e-3, rtol=1e-3)


def test_a_pointwise_convolution_on_channels_last_is_a_linear_map():
    layer = dampr.nn.GatedConv2d(8, 6, 1)
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    results = []
    with dampr.backend("triton"):
        assert dampr.explain(layer, x).route == "linear"
        assert dampr.explain(layer.eval(), x).route == "fold"
        for route in ("fold", "linear"):
            torch.manual_seed(3)
            layer.train().zero_grad()
            with dampr.ops.forced_route(route):
                y = layer(x)
                y.square().sum().backward()
            assert y.is_contiguous(memory_format=torch.channels_last)
            results.append([y.detach(), *(p.grad.clone() for p in layer.parameters())])
    for expected, out in zip(*results, strict=True):
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
