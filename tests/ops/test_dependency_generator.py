"""The generator of Dep-L0 as an op: every backend against float64, gradients by finite differences,
and when it is used.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import dampr
from dampr import gates, ops, reference
from dampr.ops.dependency_generator import fused
from dampr.testing import assert_close
from tests.backends import ON_CPU, needs_cpp

LIMIT = math.log(100.0)
WIDTHS = [(1, 1), (3, 5), (5, 7, 3), (17, 64, 15, 1, 130), (20, 20, 50, 500), (16, *[16] * 10, *[32] * 9, *[64] * 9)]


def parameters(widths, dtype=torch.float32, scale=0.5):
    """W_1, b_1, W_2, ... with pre-activations on both sides of 0 and in the bend of tanh."""
    made = []
    for before, after in itertools.pairwise(widths):
        made += [scale * torch.randn(after, before, dtype=dtype) / before**0.5, torch.randn(after, dtype=dtype)]
    return made


def by_autograd(tensors, upstream):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    values = torch.cat(reference.dependency_generator(leaves, LIMIT))
    return values.detach(), torch.cat([g.reshape(-1) for g in torch.autograd.grad(values, leaves, upstream)])


def by_op(tensors, upstream):
    values = torch.ops.dampr.dependency_generator_fwd(tensors, LIMIT)
    grads = torch.ops.dampr.dependency_generator_bwd(tensors, values, upstream, LIMIT)
    return values, torch.cat([g.reshape(-1) for g in grads])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
def test_matches_float64(backend, widths, dtype):
    # Random weights of scale 0.5 keep a deep chain from doubling its rounding errors in every layer.
    tensors, upstream = parameters(widths, dtype, 0.2), torch.randn(sum(widths[1:]), dtype=dtype)
    with dampr.backend(backend):
        made = by_op(tensors, upstream)
    truth = by_autograd([t.double() for t in tensors], upstream.double())
    for name, got, exact, plain in zip(("values", "grads"), made, truth, by_autograd(tensors, upstream), strict=True):
        assert got.dtype == dtype
        if dtype == torch.float64:
            torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-11)
        else:
            assert_close(name, got, exact, plain)


@pytest.mark.parametrize("backend", ON_CPU)
def test_opcheck(backend):
    tensors = parameters((3, 5, 4))
    with dampr.backend(backend):
        values, upstream = torch.ops.dampr.dependency_generator_fwd(tensors, LIMIT), torch.randn(9)
        torch.library.opcheck(torch.ops.dampr.dependency_generator_fwd.default, (tensors, LIMIT))
        torch.library.opcheck(torch.ops.dampr.dependency_generator_bwd.default, (tensors, values, upstream, LIMIT))


@pytest.mark.parametrize("backend", ON_CPU)
def test_gradients_by_finite_differences(backend, monkeypatch):
    leaves = [t.requires_grad_() for t in parameters((3, 5, 2, 4), torch.float64)]
    with dampr.backend(backend):
        monkeypatch.setattr(ops.select(torch.device("cpu"), torch.float64), "GENERATOR_PARAMETERS", 1000)
        assert fused(leaves)
        torch.autograd.gradcheck(lambda *p: torch.cat(ops.dependency_generator(p, LIMIT)), leaves)


@pytest.mark.parametrize("backend", ON_CPU)
def test_only_what_learns_has_a_gradient_and_layouts_do_not_matter(backend, monkeypatch):
    with dampr.backend(backend):
        monkeypatch.setattr(ops.select(torch.device("cpu"), torch.float32), "GENERATOR_PARAMETERS", 1000)
        tensors = parameters((6, 9, 4))
        odd = [torch.stack((t, t), -1)[..., 0].requires_grad_(i != 1) for i, t in enumerate(tensors)]
        expected = by_autograd(tensors, torch.ones(13))
        values = torch.cat(ops.dependency_generator(odd, LIMIT))
        values.backward(torch.ones(()).expand(13))
    torch.testing.assert_close(values.detach(), expected[0])
    assert odd[1].grad is None
    for p, g in zip(odd, expected[1].split([p.numel() for p in odd]), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(p.grad, g.view(p.shape))


@needs_cpp
def test_a_small_generator_is_one_call_and_what_torch_must_see_is_not(monkeypatch):
    tensors = parameters((6, 9, 4))
    backend = ops.select(torch.device("cpu"), torch.float32)
    assert fused(tensors)
    assert not fused([*tensors[:2], tensors[2].double(), tensors[3].double()])
    assert not fused([*tensors[:2], torch.randn(4, 8), torch.randn(4)])
    assert not fused([t.to("meta") for t in tensors])
    monkeypatch.setattr(backend, "GENERATOR_PARAMETERS", sum(t.numel() for t in tensors) - 1)
    assert not fused(tensors)
    with dampr.backend("reference"):
        assert not fused(tensors)


@pytest.mark.parametrize("direction", gates.dependent.DIRECTIONS)
def test_a_generator_module_gives_what_its_layers_give_one_by_one(direction):
    generator = gates.DependencyGenerator([5, 4, 3], direction).double()
    made = generator()
    losses = [(log_alpha * torch.arange(1.0, log_alpha.numel() + 1)).sum() for log_alpha in made]
    grads = torch.autograd.grad(sum(losses), list(generator.parameters()))
    with dampr.backend("reference"):
        generator._last = None
        expected = generator()
        losses = [(log_alpha * torch.arange(1.0, log_alpha.numel() + 1)).sum() for log_alpha in expected]
        wanted = torch.autograd.grad(sum(losses), list(generator.parameters()))
    for a, b in zip((*made, *grads), (*expected, *wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
