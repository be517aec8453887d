"""Models of which every other unit is closed: what is cut computes the same, and costs what was foretold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import dampr
from dampr.gates import Fixed
from dampr.prune import inputs
from dampr.prune.cost import Cost
from dampr.prune.measure import count_macs
from dampr.prune.summary import distinct_gates


def halved(model: nn.Module) -> nn.Module:
    """The model itself, with every other gate of each vector at 0 and the others at 1."""
    for gate in distinct_gates(model).values():
        keep = torch.arange(gate.num_gates) % 2 == 0
        inputs.replace(model, {gate: Fixed(keep.to(gate.deterministic()))})
    return model


def cut_in_half(model: nn.Module, x: Any) -> nn.Module:
    """What is left of a converted model with half of its units, after a comparison with the masked one."""
    expected, small = inputs.evaluate(halved(model), x), dampr.compact(model, example_inputs=x)
    for found, wanted in zip(inputs.evaluate(small, x), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    return small


def finished(plan: dampr.Plan, loss: Callable[[], torch.Tensor], steps: int, lr: float = 1e-3) -> nn.Module:
    """What a plan leaves after all its steps, with Adam; ``loss`` runs the model of the plan."""
    optimizer = torch.optim.Adam(plan.model.parameters(), lr)
    for _ in range(steps):
        optimizer.zero_grad()
        total = loss() + plan.penalty()
        assert bool(total.isfinite())
        total.backward()
        optimizer.step()
        plan.step(optimizer)
    return plan.finish()


def assert_exact(model: nn.Module, x: Any, at_most: float = 1.0, *, residual: bool = False) -> None:
    """Assert that a dense model loses half of its units as foretold, and that less than ``at_most`` of its
    multiply-accumulates are left.
    """
    model = dampr.convert(model.eval(), example_inputs=x, residual=residual)
    cost = Cost(halved(model), x, "macs")
    assert count_macs(cut_in_half(model, x), x) == float(cost(cost.decision())) < at_most * cost.total
