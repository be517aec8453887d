"""Mixtures of experts whose weights are one tensor, multiplied with groups of rows, as those of transformers are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dampr
from dampr.gates import Fixed
from dampr.prune import inputs
from dampr.prune.cost import Cost
from dampr.prune.measure import count_macs
from dampr.prune.summary import distinct_gates
from tests.halves import assert_exact


class Experts(nn.Module):
    """Each row goes to the expert that its router prefers. ``turned``: weights are (experts, outputs, inputs)."""

    def __init__(self, experts: int, width: int, hidden: int, turned: bool) -> None:
        super().__init__()
        self.turned, self.router = turned, nn.Linear(width, experts)
        up, down = torch.randn(experts, width, hidden) / 4, torch.randn(experts, hidden, width) / 4
        self.up = nn.Parameter(up.mT.contiguous() if turned else up)
        self.down = nn.Parameter(down.mT.contiguous() if turned else down)
        self.bias = nn.Parameter(torch.randn(experts, hidden))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).max(-1)
        chosen, order = chosen.sort(stable=True)
        ends = torch.bincount(chosen, minlength=self.router.out_features).cumsum(0).to(torch.int32)
        up, down = (self.up.mT, self.down.mT) if self.turned else (self.up, self.down)
        hidden = F.gelu(F.grouped_mm(x[order], up, offs=ends) + self.bias[chosen])
        y = F.grouped_mm(hidden, down, offs=ends) * weights[order, None]
        return torch.zeros_like(y).index_copy(0, order, y)


class Mixture(nn.Module):
    def __init__(self, turned: bool = False, hidden: int = 24) -> None:
        super().__init__()
        self.enter, self.experts, self.leave = nn.Linear(8, 16), Experts(3, 16, hidden, turned), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.enter(x))
        y: Tensor = self.leave(h + self.experts(h))
        return y


@pytest.mark.parametrize("turned", [False, True])
def test_widths_of_experts_are_cut_as_foretold(turned: bool) -> None:
    assert_exact(Mixture(turned), torch.randn(10, 8), at_most=0.8)


def test_each_row_counts_with_one_expert() -> None:
    model = Mixture()
    assert count_macs(model, torch.randn(10, 8)) == 10 * (8 * 16 + 16 * 3 + 16 * 24 + 24 * 16 + 16 * 3)


@pytest.mark.parametrize(("hidden", "blocks"), [(24, 3), (20, 5)])
@pytest.mark.parametrize("turned", [False, True])
def test_units_go_in_blocks_that_the_operator_can_read(turned: bool, hidden: int, blocks: int) -> None:
    x = torch.randn(10, 8)
    model = dampr.convert(Mixture(turned, hidden).eval(), example_inputs=x)
    gates = distinct_gates(model).values()
    assert sorted(gate.num_gates for gate in gates) == sorted([16 // 8, blocks])
    for gate in gates:  # all but the first block: no power of two is left
        inputs.replace(model, {gate: Fixed((torch.arange(gate.num_gates) > 0).to(gate.deterministic()))})
    expected, cost = model(x), Cost(model, x, "macs")
    small = dampr.compact(model, example_inputs=x)
    torch.testing.assert_close(small(x), expected)
    assert count_macs(small, x) == float(cost(cost.decision()))


def test_gradients_reach_the_gates_of_experts() -> None:
    x = torch.randn(10, 8)
    model = dampr.convert(Mixture(), example_inputs=x)
    model(x).square().sum().backward()
    for gate in distinct_gates(model).values():
        log_alpha = next(gate.parameters())
        assert log_alpha.grad is not None
        assert bool(log_alpha.grad.isfinite().all())
