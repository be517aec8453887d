"""What the second derivative costs, and that the first does not pay for it: stage ``derivatives`` of benchmarks.run.

A backward that nobody differentiates is the fused one; with ``create_graph=True`` a differentiable form takes its
place (dampr/ops/node.py). "First derivative" times the backward alone, on a graph that is kept; "second derivative" a
gradient penalty: forward, the gradient of the input, and the backward of its square. Compiled layers have no second
derivative, in torch neither.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import nn

import dampr
from dampr.bench import linear
from dampr.bench.competitors import UnfusedLinear

CASES = {
    "cpu": [linear.Case((256, 1024, 1024), "output"), linear.Case((256, 1024, 1024), "output", True)],
    "cuda": [linear.Case((8192, 4096, 4096), "output"), linear.Case((8192, 4096, 4096), "output", True)],
}


class Backward(linear.TrainingStep):
    """The backward alone; the forward ran once."""

    def __call__(self) -> None:
        if not hasattr(self, "y"):
            self.y = self.forward()
        torch.autograd.grad(self.y, self.leaves, self.dy.to(self.y.dtype), retain_graph=True)


class GradientPenalty(linear.TrainingStep):
    """Forward, the gradient of x, and the gradients of its square."""

    def __call__(self) -> None:
        y = self.forward()
        (dx,) = torch.autograd.grad(y, self.x, self.dy.to(y.dtype), create_graph=True)
        torch.autograd.grad(dx.square().sum(), self.leaves, allow_unused=True)


def run(device: str, *, compiled: bool = True, rounds: int = 20) -> list[linear.Point]:
    """The points of every case."""
    return [point for case in CASES[device] for point in _measure(case, device, compiled, rounds)]


def _measure(case: linear.Case, device: str, compiled: bool, rounds: int) -> list[linear.Point]:
    torch.manual_seed(0)
    if compiled:
        torch._dynamo.reset()
    m, k, n = case.shape
    x, dy = torch.randn(m, k, device=device), torch.randn(m, n, device=device)
    layers: dict[str, Callable[[], nn.Module]] = {
        "dense": lambda: nn.Linear(k, n),
        "dampr": lambda: dampr.nn.GatedLinear(k, n, granularity=case.granularity, per_sample=case.per_sample),
        "eager unfused": lambda: UnfusedLinear(k, n, granularity=case.granularity, per_sample=case.per_sample),
    }
    first: dict[str, linear.Step] = {name: Backward(build().to(device), x, dy) for name, build in layers.items()}
    if compiled:
        fast = cast(nn.Module, torch.compile(layers["eager unfused"]().to(device), dynamic=False))
        first["compiled unfused"] = Backward(fast, x, dy)
    second: dict[str, linear.Step] = {
        name: GradientPenalty(build().to(device), x, dy) for name, build in layers.items()
    }
    return [
        point
        for what, steps in (("first derivative", first), ("second derivative", second))
        for point in linear.time_steps(f"{what}, {case}", case.shape, device, steps, rounds, {})
    ]
