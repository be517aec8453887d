"""The operators on the Triton backend, as a layer calls them: autograd, leading dimensions, layouts, verification."""

import pytest
import torch

import dampr
from dampr.bench import verify


def test_verification_of_the_triton_backend():
    rows = [r for r in verify.run() if r.backend == "triton"]
    assert {r.op for r in rows} == {"noise", "sample_gates", "gated_linear", "weight_gated_linear", "norm_gate"}
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
