"""pytest-benchmark cases of the linear layers on the CPU: ``make bench``. Each group holds a gated layer next to its competitors."""

import pytest
import torch
from torch import nn

import dampr
from dampr.bench.competitors import UnfusedLinear
from dampr.bench.linear import CASES, CPU_SHAPES

PROVIDERS = {
    "dense": lambda k, n, **_: nn.Linear(k, n),
    "dampr": lambda k, n, **how: dampr.nn.GatedLinear(k, n, **how),
    "eager unfused": lambda k, n, **how: UnfusedLinear(k, n, **how),
    "compiled unfused": lambda k, n, **how: torch.compile(UnfusedLinear(k, n, **how)),
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("granularity", "per_sample"), CASES)
@pytest.mark.parametrize("shape", CPU_SHAPES, ids=str)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forward_and_backward(benchmark, shape, granularity, per_sample, provider):
    m, k, n = shape
    torch._dynamo.reset()
    layer = PROVIDERS[provider](k, n, granularity=granularity, per_sample=per_sample)
    x, dy = torch.randn(m, k, requires_grad=True), torch.randn(m, n)
    benchmark.group = f"{shape}, {'per sample' if per_sample else 'per batch'}, {granularity} gates"

    def step():
        layer(x).backward(dy)
        layer.zero_grad()
        x.grad = None

    step()
    benchmark(step)
    with torch.no_grad():
        assert layer(x).shape == (m, n)
